"""Presets by name agree with the files in configs/."""

from btx_jax.presets.config_file import read_config
from btx_jax.presets.registry import PRESETS
from tests.conftest import ROOT

FILES = {path.stem: str(path) for path in (ROOT / "configs").rglob("*.py")}


def test_every_file_is_a_preset_and_every_preset_a_file():
    assert set(FILES) == set(PRESETS)


def test_a_name_makes_what_its_file_makes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an installed package is not inside a checkout
    for name, file in FILES.items():
        arguments = [""]
        if "SIZE" in PRESETS[name].argument:
            arguments += [":tiny", ":qwen3_8b"]
        for argument in arguments:
            assert read_config(name + argument) == read_config(file + argument), name
    assert read_config("mola:gsm8k") == read_config(f"{FILES['mola']}:gsm8k")
    assert read_config("paper_small:report") == read_config(f"{FILES['paper_small']}:report")
    changed = read_config("seed:tiny", ("--config.train.steps=70",))
    assert changed.train.steps == 70


def test_a_preset_is_not_hidden_by_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert read_config("demo").stage == "pipeline"
