"""JAX looks for a TPU wherever there may be one; elsewhere libtpu is not loaded and prints
nothing."""

import os
import subprocess
import sys

import pytest

from btx_jax.parallel import accelerators
from btx_jax.planning.compile_check import ENVIRONMENT
from tests.conftest import ROOT


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine without any sign of a TPU."""
    for name in [name for name in os.environ if "TPU" in name.split("_")]:
        monkeypatch.delenv(name)
    for name in accelerators.SET_WITHOUT_ONE:
        monkeypatch.setenv(name, "x")
    devices = (str(tmp_path / "accel[0-9]*"), str(tmp_path / "vfio" / "[0-9]*"))
    monkeypatch.setattr(accelerators, "DEVICES", devices)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # exists on every Linux machine with the module
    return tmp_path


@pytest.mark.parametrize(
    "name", ["TPU_WORKER_HOSTNAMES", "TPU_NAME", "COLAB_TPU_ADDR", "CLOUD_TPU_TASK_ID", "OUTPUT"]
)
def test_the_environment_of_a_tpu_machine_is_a_sign(bare, monkeypatch, name):
    assert not accelerators.may_have_tpu()
    monkeypatch.setenv(name, "x")
    assert accelerators.may_have_tpu() == (name != "OUTPUT")


@pytest.mark.parametrize("device", ["accel0", "accel3", "vfio/0", "vfio/17"])
def test_a_device_file_is_a_sign(bare, device):
    assert not accelerators.may_have_tpu()
    (bare / device).touch()
    assert accelerators.may_have_tpu()
    assert accelerators.has_tpu_device()


@pytest.mark.parametrize("sign", ["", "device", "JAX_PLATFORMS"])
def test_only_where_nothing_speaks_for_a_tpu_is_it_left_alone(bare, monkeypatch, sign):
    registered = []
    monkeypatch.setattr(
        accelerators, "register_backend_factory", lambda name, *_, **__: registered.append(name)
    )
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(accelerators, "chosen_platforms", lambda: "")
    if sign == "JAX_PLATFORMS":
        monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    if sign == "device":
        (bare / "vfio" / "0").touch()
    accelerators.leave_absent_tpu()
    assert registered == ([] if sign else ["tpu"])


def test_what_jax_itself_found_on_the_bus_is_used(bare, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(accelerators, "chosen_platforms", lambda: "tpu,cpu")
    monkeypatch.setattr(accelerators, "register_backend_factory", pytest.fail)
    accelerators.leave_absent_tpu()


GOLDEN = str(ROOT / "tests" / "checkpoints" / "golden" / "llama")


def bare_environment() -> dict[str, str]:
    """The environment without variables that select CPUs or were set by compiling for TPUs."""
    left_out = {"JAX_PLATFORMS", *ENVIRONMENT}
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return kept | {"PYTHONPATH": str(ROOT)}


@pytest.mark.cli
@pytest.mark.skipif(accelerators.may_have_tpu(), reason="libtpu has nothing to complain of here")
@pytest.mark.parametrize(
    ("module", "arguments", "lines"),
    [
        ("btx_jax", ["digest", GOLDEN], 0),
        pytest.param(
            "btx_jax", ["run", "seed:tiny", "--config.train.stepz=1"], 1, marks=pytest.mark.slow
        ),
        ("btx_jax", ["run", "seed:tiny", "--config.mesh.data=64"], 1),
        pytest.param(
            "btx_jax",
            ["run", "math_expert:tiny", "--config.init=/nowhere"],
            1,
            marks=pytest.mark.slow,
        ),
        pytest.param("btx_jax", ["run", "mix:tiny"], 1, marks=pytest.mark.slow),
        pytest.param(
            "btx_jax.launch",
            ["--config=evaluate:tiny", "--config.evaluate.rows=0"],
            1,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "btx_jax.launch",
            ["--config=demo", "--config.pipeline.mix.config.mix.k=9"],
            1,
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else str(x),
)
def test_stderr_holds_nothing_but_our_line(tmp_path, module, arguments, lines):
    """With libtpu installed, as in development and on TPU machines."""
    pytest.importorskip("libtpu")
    environment = bare_environment()
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (2 if lines else 0), done.stderr
    assert done.stderr.count("\n") == lines, done.stderr
    assert done.stderr.startswith("btx_jax: error: " if lines else "")
    assert not list(tmp_path.iterdir())


LOADED = """
from jax.extend.backend import register_backend_factory
asked = []
register_backend_factory("like_a_gpu", lambda: asked.append(1) or 1 / 0, priority=400)
from btx_jax.parallel.accelerators import leave_absent_tpu
import jax
if {leave}: leave_absent_tpu()
assert jax.devices()[0].platform == "cpu"
assert asked
print("libtpu.so" in open("/proc/self/maps").read())
"""


@pytest.mark.cli
@pytest.mark.skipif(accelerators.may_have_tpu(), reason="libtpu is to be loaded here")
@pytest.mark.parametrize("leave", [True, False])
def test_libtpu_is_not_even_loaded_and_other_backends_are_asked_as_ever(leave):
    pytest.importorskip("libtpu")
    environment = bare_environment()
    command = [sys.executable, "-c", LOADED.format(leave=leave)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{not leave}\n"
