"""Flipped bits in stored files: reported as damage, or without effect on any value."""

import dataclasses
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from btx_jax.__main__ import main
from btx_jax.checkpoints import adapter
from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params, open_reader
from btx_jax.checkpoints.checksums import SUMS, sealed, write_sums
from btx_jax.checkpoints.training_state import (
    Base,
    CheckpointMetadata,
    Checkpoints,
    StepReader,
    TrainingRun,
    metadata_to_json,
)
from btx_jax.commands.convert import run as convert
from btx_jax.commands.verify import verify
from btx_jax.config.config import CheckpointConfig, TrainConfig
from btx_jax.config.model_config import LoRAConfig
from btx_jax.data.tokenizers import copy_tokenizer, load_tokenizer
from btx_jax.errors import UserError
from btx_jax.models.llama import init_params
from btx_jax.models.lora import is_adapter, partition
from btx_jax.parallel.sharding import make_mesh
from btx_jax.training.step import init_state, state_shardings
from tests.conftest import ROOT
from tests.models.test_llama import MOE, TINY

TRAIN = TrainConfig(steps=10, batch_size=8, warmup_steps=1)
RUN = TrainingRun(5, 30.0, seconds=2.0, chips=1, peak_bytes=7)
LORA = dataclasses.replace(TINY, lora=LoRAConfig("2", (4,), (1,), 8.0))


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tokenizer_file):
    """One of each kind: a run, a sharded export, its conversion, an adapter."""
    home = tmp_path_factory.mktemp("stored")
    one = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    state = init_state(MOE, TRAIN, one, jax.random.key(0))
    moments = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype) if x.ndim else x,
        state.opt_state,
    )
    checkpoints = Checkpoints(home / "run", CheckpointConfig())
    for step in (2, 4):
        metadata = CheckpointMetadata(MOE, step, {"a": RUN})
        checkpoints.save(metadata, state.params, moments, {"next_index": step})
        checkpoints.wait()
    checkpoints.close()
    copy_tokenizer(load_tokenizer(tokenizer_file), home / "run" / "tokenizer")
    write_sums(home / "run" / "tokenizer")
    convert(str(home / "run"), str(home / "huggingface"))
    convert(str(home / "huggingface"), str(home / "converted"), "bfloat16")
    (home / "adapter").mkdir()
    params = partition(init_params(LORA, jax.random.key(1)), is_adapter)[0]
    metadata = CheckpointMetadata(LORA, 3, {"a": RUN}, Base("/nowhere", "0" * 64))
    adapter.write_directory(home / "adapter", metadata, adapter.to_tensors(LORA, params))
    write_sums(home / "adapter")
    return home


def values(path: Path) -> str:
    """A hash of everything that is loaded from a path."""
    told: list = []
    if path.name == "run":
        abstract, _ = state_shardings(MOE, TRAIN, make_mesh((1, 1, 1, 1), jax.devices()[:1]))
        checkpoints = Checkpoints(path, CheckpointConfig())
        try:
            assert checkpoints.latest_step() == 4
            params, opt_state, data = checkpoints.restore(4, abstract.params, abstract.opt_state)
        finally:
            checkpoints.close()
        told = [digest(params), digest(opt_state), data]
    found = find_checkpoint(path)
    if path.name == "adapter":
        told += [digest(adapter.read_directory(path, found.metadata.model))]
    else:
        reader = open_reader(found)
        told += [digest({name: reader.read(name) for name in reader.slots})]
        told += [load_tokenizer(found.tokenizer).encode("the river 123")]
    return json.dumps([metadata_to_json(found.metadata), told])


def attempt(home: Path, file: Path, seed: int, want: dict[str, str]) -> str:
    """The error for a flipped bit, or "" when it changes no value; anything else fails."""
    original, bit = file.read_bytes(), random.Random(seed).randrange(8 * file.stat().st_size)
    flipped = bytearray(original)
    flipped[bit // 8] ^= 1 << bit % 8
    file.write_bytes(flipped)
    kind, told = file.relative_to(home).parts[0], ""
    try:
        got = values(home / kind)
    except UserError as error:
        got, told = want[kind], str(error)
    finally:
        file.write_bytes(original)
    assert got == want[kind], f"bit {bit} of {file} changed a value in silence"
    assert "\n" not in told
    return told


def files_by_kind(home: Path) -> dict[str, list[Path]]:
    """Files by kind, ignoring random names and numbers; the largest of each first."""
    found: dict[str, list[Path]] = {}
    for file in sorted(home.rglob("*"), key=lambda file: -file.stat().st_size):
        if file.is_file() and file.stat().st_size and "checkpoints/2/" not in str(file):
            kind = re.sub(r"[0-9a-f]{32}|\d+", "N", str(file.relative_to(home)))
            found.setdefault(kind, []).append(file)
    return found


@pytest.fixture(scope="module")
def want(stored):
    return {path.name: values(path) for path in stored.iterdir()}


# Files that hold values, by kind: a flip there is always reported. Elsewhere (Orbax's dates, model
# cards, merged trees of single processes) it may have no effect.
HOLDS_VALUES = (
    "run/checkpoints/N/about/metadata",
    "run/checkpoints/N/data/metadata",
    "run/checkpoints/N/params/ocdbt.process_N/d/N",
    "run/checkpoints/N/opt_state/ocdbt.process_N/d/N",
    "run/checkpoints/N/params/manifest.ocdbt",
    "run/tokenizer/tokenizer.model",
    "converted/checkpoints/N/params/d/N",
    "huggingface/config.json",
    "huggingface/model.safetensors",
    "huggingface/tokenizer.model",
    "adapter/adapter.json",
    "adapter/adapter.safetensors",
)


def test_a_flipped_bit_where_values_are_is_told_as_damage_with_its_cure(stored, want):
    files = files_by_kind(stored)
    for kind in HOLDS_VALUES:
        told = attempt(stored, files[kind][0], 1, want)
        assert "is damaged (" in told, kind
        cure = "delete it" if "/checkpoints/" in kind else "download or export it again"
        assert cure in told, told
        if kind.startswith("run/checkpoints"):
            assert told.endswith("delete it to resume from step 2")


@pytest.mark.slow
def test_two_hundred_flipped_bits_change_no_value_in_silence(stored, want):
    files, rng, told = files_by_kind(stored), random.Random(0), 0
    for number in range(200):
        kind = sorted(files)[number % len(files)]
        told += bool(attempt(stored, rng.choice(files[kind]), number, want))
    print(f"{told} of 200 were told, {200 - told} changed no value; {len(files)} kinds of files")
    assert told > 100


def test_verify_names_what_is_damaged_and_nothing_else(stored, capsys):
    for path in stored.iterdir():
        assert all(finding.good for finding in verify(str(path))), path
    for kind, name in (
        ("run/checkpoints/N/opt_state/ocdbt.process_N/d/N", "step 4, opt_state"),
        ("huggingface/model.safetensors", "model.safetensors"),
        ("adapter/adapter.safetensors", "adapter.safetensors"),
    ):
        file = files_by_kind(stored)[kind][0]
        original = file.read_bytes()
        half = len(original) // 2
        file.write_bytes(original[:half] + bytes([original[half] ^ 4]) + original[half + 1 :])
        with pytest.raises(SystemExit) as ended:
            main(["verify", str(stored / kind.partition("/")[0])])
        file.write_bytes(original)
        assert ended.value.code == 1
        bad = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DAMAGED")]
        assert {line[8:].partition(":")[0] for line in bad} <= {name, "tensors"}
        assert bad
    with pytest.raises(UserError, match="contains nothing to verify"):
        list(verify(str(stored / "run" / "checkpoints")))
    assert {finding.told for finding in verify(str(stored / "run" / "tokenizer"))} == {"sha256"}


def test_damage_is_one_line_and_names_the_leaf(stored, tmp_path):
    """In a separate process, to include what Orbax's unfinished reads print at exit."""
    step = tmp_path / "run" / "checkpoints" / "4"
    shutil.copytree(stored / "run", tmp_path / "run")
    for file in (step / "params" / "ocdbt.process_0" / "d").iterdir():
        data = bytearray(file.read_bytes())
        for at in range(200, len(data), 500):
            data[at] ^= 4
        file.write_bytes(data)
    command = [sys.executable, "-m", "btx_jax", "digest", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "4 is damaged (params/" in done.stderr, done.stderr
    assert "TensorStore details" not in done.stderr, done.stderr


def test_verify_takes_a_path_from_here(stored, monkeypatch):
    for path in stored.iterdir():
        monkeypatch.chdir(path)
        assert all(finding.good for finding in verify(".")), path
        monkeypatch.chdir(stored)
        assert all(finding.good for finding in verify(path.name)), path


@pytest.mark.parametrize(
    ("gone", "names"),
    [
        ("checkpoints/4/params", ["step 4, params"]),
        ("checkpoints/4/params/manifest.ocdbt", ["step 4, params"]),
        ("checkpoints/4/opt_state", ["step 4, opt_state"]),
        ("checkpoints/4/opt_state/manifest.ocdbt", ["step 4, opt_state"]),
        ("checkpoints/4/data", ["step 4, opt_state", "step 4, data"]),
        ("checkpoints/4/about", ["step 4, about", "step 4, params"]),
        ("checkpoints/2/about/metadata", ["step 2, about", "step 2, params"]),
        ("tokenizer/tokenizer.model", ["tokenizer/tokenizer.model"]),
        ("tokenizer", ["tokenizer"]),
    ],
)
def test_verify_misses_what_is_gone_of_a_run_and_goes_on(stored, tmp_path, gone, names):
    run = tmp_path / "run"
    shutil.copytree(stored / "run", run)
    (run / "config.json").write_text('{"stage": "train"}')
    place = run / gone
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    findings = list(verify(str(run)))
    assert [finding.name for finding in findings if not finding.good] == names
    assert {"step 2, opt_state", "step 4, opt_state"} <= {finding.name for finding in findings}


def test_verify_tells_what_is_cut_off_or_of_other_leaves(stored, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stored / "run", run)
    metadata, data = (run / "checkpoints" / "4" / item / "metadata" for item in ("about", "data"))
    held = json.loads(data.read_text())
    leaves = {"data": held["data"], "opt_state": [*held["opt_state"], "more"]}
    data.write_text(json.dumps(sealed(leaves)))
    (bad,) = (finding for finding in verify(str(run)) if not finding.good)
    assert bad.name == "step 4, opt_state"
    assert "(opt_state/, missing more): delete it to resume from step 2" in bad.told
    for text in (metadata.read_text()[:50], "", "5"):
        metadata.write_text(text)
        bad_names = {finding.name for finding in verify(str(run)) if not finding.good}
        assert {"step 4, about", "step 4, params", "step 4, opt_state"} == bad_names


def test_a_tokenizer_is_missed_only_where_a_run_must_have_had_one(stored, tmp_path):
    shutil.copytree(stored / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    assert all(finding.good for finding in verify(str(tmp_path / "run")))


@pytest.mark.parametrize("kind", ["huggingface", "adapter"])
def test_every_file_of_an_export_that_is_gone_or_empty_is_told(stored, tmp_path, kind):
    folder = tmp_path / kind
    shutil.copytree(stored / kind, folder)
    for file in sorted(folder.iterdir()):
        original = file.read_bytes()
        if file.name == "README.md":
            continue
        for change in (file.unlink, lambda file=file: file.write_bytes(b"")):
            change()
            if file.exists() or file.name != SUMS:  # checksum files may be deleted
                assert not all(finding.good for finding in verify(str(folder))), file
                with pytest.raises(UserError, match=re.escape(str(folder))):
                    values(folder)
            file.write_bytes(original)


def test_a_flip_in_a_tensors_name_is_told_as_damage(stored, tmp_path):
    shutil.copytree(stored / "huggingface", tmp_path / "huggingface")
    file = tmp_path / "huggingface" / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"model.norm.weight", b"model.oorm.weight", 1))
    with pytest.raises(UserError, match=r"model.safetensors is damaged \(sha256"):
        values(tmp_path / "huggingface")
    (tmp_path / "huggingface" / SUMS).unlink()
    with pytest.raises(UserError, match=r"unknown model.oorm.weight; missing model.norm.weight"):
        values(tmp_path / "huggingface")


@pytest.mark.parametrize("text", ["[" * 100_000, "5", "[]"], ids=["deep", "number", "list"])
def test_what_a_step_says_of_itself_may_be_any_json(stored, text):
    file = stored / "run" / "checkpoints" / "4" / "about" / "metadata"
    original = file.read_bytes()
    file.write_text(text)
    try:
        found = {finding.name: finding for finding in verify(str(stored / "run"))}
        assert (
            not found["step 4, about"].good
            and "is damaged (about/, " in found["step 4, about"].told
        )
        with pytest.raises(UserError, match="is damaged"):
            find_checkpoint(stored / "run")
    finally:
        file.write_bytes(original)


def test_sha256sum_itself_checks_an_export(stored):
    for kind in ("huggingface", "adapter"):
        done = subprocess.run(
            ["sha256sum", "--strict", "-c", SUMS], cwd=stored / kind, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert ".safetensors: OK" in done.stdout
    assert "config.json" in (stored / "huggingface" / SUMS).read_text()


def test_what_earlier_versions_wrote_without_checksums_is_read(stored, tmp_path):
    """One chunk per leaf, in zarr 2; the values equal those of the run."""
    step = write_unsealed(stored / "run" / "checkpoints" / "4", tmp_path / "checkpoints" / "4")
    old, new = StepReader(step), StepReader(stored / "run" / "checkpoints" / "4")
    assert old.by_leaf
    assert not new.by_leaf
    for name in new.slots:
        np.testing.assert_array_equal(old.read(name), new.read(name))
    told = {finding.name: finding.told for finding in verify(str(tmp_path))}
    assert told["step 4, about"] == "no checksum"
    assert told["step 4, params"].startswith("no checksums; structure, finite values")


def write_unsealed(source: Path, target: Path) -> Path:
    found = find_checkpoint(source)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target / "params", load_params(found))
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        checkpointer.save(target / "about", metadata_to_json(found.metadata) | {"format": 2})
    return target


@pytest.mark.parametrize("as_before", [False, True], ids=["checked", "in large chunks"])
def test_every_byte_of_a_run_is_read_once_when_it_streams(tmp_path, as_before):
    """Counts bytes rather than time, both for convert's tensors and for assemble's."""
    model = dataclasses.replace(MOE, vocab_size=512, d_model=64, d_ff=1024)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(CheckpointMetadata(model, 1, {}), init_params(model, jax.random.key(0)))
    checkpoints.close()
    path = tmp_path / "checkpoints" / "1"
    if as_before:
        path = write_unsealed(path, tmp_path / "old" / "checkpoints" / "1")
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size > 5_000_000
    before = read_so_far()
    convert(str(path), str(tmp_path / "out"))
    assert read_so_far() - before < 1.2 * size, "tensors share chunks that are read again for each"


def read_so_far() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
    told = {finding.name: finding.told for finding in verify(str(stored / "run"))}
    assert told["step 4, about"] == told["step 4, data"] == "checksum"
    assert told["step 4, params"].startswith("checksums, finite values")
