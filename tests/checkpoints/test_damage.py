"""Bits flipped in what is stored: told as damage, or without effect on any value."""

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from btx_jax.checkpoints import adapter
from btx_jax.checkpoints.checkpoint import (
    digest,
    find_checkpoint,
    load_adapter,
    load_params,
    open_reader,
    write_checkpoint,
)
from btx_jax.checkpoints.checksums import SUMS, write_sums
from btx_jax.checkpoints.huggingface import HuggingFaceWriter, slots
from btx_jax.checkpoints.training_state import (
    About,
    Base,
    Checkpoints,
    TrainingRun,
    about_to_json,
    named_leaves,
)
from btx_jax.config import CheckpointConfig, TrainConfig
from btx_jax.data.tokenizers import copy_tokenizer, load_tokenizer
from btx_jax.errors import UserError
from btx_jax.model_config import LoRAConfig
from btx_jax.models.llama import init_params
from btx_jax.models.lora import is_adapter, partition
from btx_jax.parallel.sharding import make_mesh
from btx_jax.stages.convert import run as convert
from btx_jax.stages.verify import verify
from btx_jax.training.step import init_state, state_shardings
from tests.models.test_llama import MOE, TINY

TRAIN = TrainConfig(steps=10, batch_size=8, warmup_steps=1)
RUN = TrainingRun(5, 30.0, seconds=2.0, chips=1, peak_bytes=7)
LORA = TINY.__class__(**{**vars(TINY), "lora": LoRAConfig("2", (4,), (1,), 8.0)})


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tokenizer_file):
    """One of each kind: a run, an export in shards, a conversion of it, an adapter."""
    home = tmp_path_factory.mktemp("stored")
    one = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    state = init_state(MOE, TRAIN, one, jax.random.key(0))
    checkpoints = Checkpoints(home / "run", CheckpointConfig())
    for step in (2, 4):
        about = About(MOE, step, {"a": RUN})
        checkpoints.save(about, state.params, state.opt_state, {"next_index": step})
        checkpoints.wait()
    checkpoints.close()
    copy_tokenizer(load_tokenizer(tokenizer_file), home / "run" / "tokenizer")
    write_sums(home / "run" / "tokenizer")
    convert(str(home / "run"), str(home / "huggingface"))
    convert(str(home / "huggingface"), str(home / "converted"), "bfloat16")
    (home / "adapter").mkdir()
    params = partition(init_params(LORA, jax.random.key(1)), is_adapter)[0]
    about = About(LORA, 3, {"a": RUN}, Base("/nowhere", "0" * 64))
    adapter.write_directory(home / "adapter", about, adapter.to_tensors(LORA, params))
    write_sums(home / "adapter")
    return home


def values(path: Path) -> str:
    """Of everything that anyone loads from it."""
    if path.name == "run":
        found = find_checkpoint(path / "checkpoints" / "4")
        one = make_mesh((1, 1, 1, 1), jax.devices()[:1])
        abstract, _ = state_shardings(MOE, TRAIN, one)
        checkpoints = Checkpoints(path, CheckpointConfig())
        try:
            assert checkpoints.latest_step() == 4
            params, opt_state, data = checkpoints.restore(4, abstract.params, abstract.opt_state)
        finally:
            checkpoints.close()
        told = [digest(params), digest(opt_state), data]
    else:
        found = find_checkpoint(path)
        if path.name == "adapter":
            tree = adapter.read_directory(path, found.about.model)
            told = [digest(tree), [path.read_bytes().hex() for path in []]]
        else:
            told = [digest(load_params(found))]
    if path.name != "adapter":
        reader = open_reader(found)
        told += [reader.read(name).tobytes().hex() for name in reader.slots]
        told += [load_tokenizer(found.tokenizer).encode("the river 123")]
    return json.dumps([about_to_json(found.about), told])


def flip(file: Path, rng: random.Random) -> int:
    data = bytearray(file.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    return bit


def kinds(home: Path) -> dict[str, list[Path]]:
    """Files by what they are: random names and numbers left out."""
    found: dict[str, list[Path]] = {}
    for file in sorted(home.rglob("*")):
        if file.is_file() and file.stat().st_size and "checkpoints/2/" not in str(file):
            kind = re.sub(r"[0-9a-f]{32}|\d+", "N", str(file.relative_to(home)))
            found.setdefault(kind, []).append(file)
    return found


def attempt(home: Path, file: Path, seed: int, want: dict[str, str]) -> str:
    """'told', or 'harmless': anything else fails."""
    original = file.read_bytes()
    kind = file.relative_to(home).parts[0]
    bit = flip(file, random.Random(seed))
    try:
        got = values(home / kind)
    except UserError as error:
        assert "\n" not in str(error)
        return f"told: {error}"
    finally:
        file.write_bytes(original)
    assert got == want[kind], f"bit {bit} of {file} changed a value in silence"
    return "harmless"


@pytest.fixture(scope="module")
def want(stored):
    return {p.name: values(p) for p in stored.iterdir()}


def test_a_flipped_bit_in_any_kind_of_file_is_told_or_changes_nothing(stored, want):
    results = {
        kind: attempt(stored, random.Random(1).choice(files), 1, want)
        for kind, files in kinds(stored).items()
    }
    for kind, r in results.items():
        print(kind, r[:250])
