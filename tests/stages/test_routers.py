"""The mix stage with routers solved from text, and later uses of them."""

import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params, open_reader
from btx_jax.checkpoints.router_statistics import FILE, RouterStatistics
from btx_jax.checkpoints.training_state import CheckpointMetadata, Checkpoints
from btx_jax.commands import convert, experts
from btx_jax.commands import mix as mix_recipe
from btx_jax.config.config import CheckpointConfig, Config, DataConfig, MeshConfig, MixConfig
from btx_jax.config.ridge import RidgeConfig
from btx_jax.data.tokenizers import copy_tokenizer, load_tokenizer
from btx_jax.errors import UserError
from btx_jax.mixing.ridge import Moments, solve
from btx_jax.models.llama import init_params
from tests.models import test_llama

MODEL = dataclasses.replace(test_llama.TINY, vocab_size=320)
WORDS = {"a": "river mountain the of city", "b": "def return x y print", "seed": "0 1 2 3 + - ="}
RIDGE = RidgeConfig(temperature=0.5)
UNSOLVED = {"router": "normal", "tokens": MixConfig.tokens, "ridge": RidgeConfig()}


@pytest.fixture
def home(tmp_path, tokenizer_file):
    """Branches a and b, a seed, and text for each."""
    rng = random.Random(0)
    for number, (name, words) in enumerate(WORDS.items()):
        checkpoints = Checkpoints(tmp_path / name, CheckpointConfig())
        params = init_params(MODEL, jax.random.key(number))
        checkpoints.save(CheckpointMetadata(MODEL, 1, {}), params)
        checkpoints.close()
        copy_tokenizer(load_tokenizer(tokenizer_file), tmp_path / name / "tokenizer")
        texts = [" ".join(rng.choices(words.split(), k=25)) for _ in range(150)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


def config(home, text=("a", "b"), **mix):
    domains = {name: str(home / f"{name}.jsonl") for name in ("a", "b", "seed")}
    data = DataConfig(
        "a", domains=domains, sequence_length=32, heldout_fraction=0.2, cache=str(home / "cache")
    )
    given = {"router": "ridge", "text": text, "tokens": 1600, "ridge": RIDGE} | mix
    sources = tuple(str(home / name) for name in ("a", "b"))
    return Config("mix", mix=MixConfig(sources, **given), data=data, mesh=MeshConfig())


def routers(path):
    reader = open_reader(find_checkpoint(path))
    return np.stack([reader.read(tensor) for tensor in reader.slots if tensor.is_router])


def test_routers_follow_from_the_statistics_beside_the_run(home, caplog):
    caplog.set_level("INFO")
    stages.run(config(home), home / "mix")
    found = RouterStatistics(home / "mix" / FILE)
    assert [expert.name for expert in found.about.experts] == [str(home / n) for n in ("a", "b")]
    for layer, rows in enumerate(routers(home / "mix")):
        np.testing.assert_allclose(rows, solve(Moments(*found.read(layer)), RIDGE), atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 2, rtol=1e-6)
    told = [line for line in caplog.messages if "share of held-out tokens routed to" in line]
    assert len(told) == MODEL.layers and "nan" not in told[0]


def test_all_but_the_routers_is_as_without(home):
    stages.run(config(home), home / "mix")
    stages.run(config(home, (), **UNSOLVED), home / "plain")
    one, other = (load_params(find_checkpoint(home / name)) for name in ("mix", "plain"))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        assert np.array_equal(a, b) is not (path[-1].key == "router"), path


def test_a_recipe_gives_nearly_the_same_routers(home):
    """From other tokens of the same texts, as a stage leaves out held-out documents."""
    stages.run(config(home), home / "mix")
    recipe = {
        "base_model": str(home / "a"),
        "base": "average",
        "gate_mode": "ridge",
        "tokens": 1600,
        "ridge": {"temperature": 0.5},
        "experts": [
            {"source_model": str(home / name), "text": str(home / f"{name}.jsonl")} for name in "ab"
        ],
    }
    (home / "recipe.yml").write_text(json.dumps(recipe))
    mix_recipe.run(str(home / "recipe.yml"), str(home / "recipe"))
    cosine = np.einsum("led,lfd->lef", routers(home / "mix"), routers(home / "recipe")) / 4
    assert cosine[:, [0, 1], [0, 1]].min() > 0.8 and cosine[:, [0, 1], [1, 0]].max() < 0.2


def test_experts_come_and_go_beside_a_run(home):
    stages.run(config(home), home / "mix")
    told = experts.add(
        str(home / "mix"), str(home / "seed"), str(home / "three"), text=str(home / "seed.jsonl")
    )
    assert "3 experts; all router rows were recomputed" in told
    assert RouterStatistics(home / "three" / FILE).about.ridge == RIDGE
    experts.drop(str(home / "three"), 2, str(home / "two"))
    np.testing.assert_allclose(routers(home / "two"), routers(home / "mix"), atol=1e-6)


def test_a_shared_expert_answers_beside_the_forced_one(home):
    """Replacing it by zeros changes the inputs of layers after the first, and nothing before."""
    made = config(home, shared_expert=str(home / "seed"))
    stages.run(made, home / "mix")
    stages.run(config(home), home / "plain")
    with_it, without = (RouterStatistics(home / name / FILE) for name in ("mix", "plain"))
    for layer in range(MODEL.layers):
        same = np.allclose(with_it.read(layer)[0], without.read(layer)[0], rtol=1e-4)
        assert same is (layer == 0)


def test_statistics_of_an_interrupted_attempt_do_not_stay(home):
    stages.run(config(home), home / "mix")
    (home / "mix" / "done.json").unlink()
    before = (home / "mix" / FILE).read_bytes()
    stages.run(config(home), home / "mix")
    assert (home / "mix" / FILE).read_bytes() == before


def test_statistics_of_a_mixture_that_was_changed_are_refused(home):
    stages.run(config(home), home / "mix")
    convert.run(str(home / "mix"), str(home / "export"), "bfloat16")
    text = home / "seed.jsonl"
    shutil.copy(home / "mix" / FILE, home / "export" / FILE)
    with pytest.raises(UserError, match="different weights outside the experts"):
        experts.add(str(home / "export"), str(home / "seed"), str(home / "x"), text=str(text))
    assert not (home / "x").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"text": ("a",)}, "text: 1 texts for 2 experts"),
        ({"text": ("a", "a")}, "text: all experts have the same"),
        (
            {"router": "normal"},
            "text: only used with router='ridge' or 'logistic' and merge='regmean'; leave it out",
        ),
        ({"copies": 2}, "with method='btx' and copies=2 experts have no domains"),
        ({"method": "blend"}, "with method='blend' and copies=1"),
    ],
)
def test_configs_that_make_no_sense_are_refused(home, changes, told):
    with pytest.raises(UserError, match=told):
        config(home, **changes)


def test_text_is_looked_for_before_anything_is_done(home):
    for text, told in (
        (("a", "c"), r"config\.mix\.text\[1\]: 'c' is neither a domain nor a file"),
        (("a", "no/file"), r"config\.mix\.text\[1\]: no file matches 'no/file'"),
    ):
        with pytest.raises(UserError, match=told):
            stages.run(config(home, text), home / "mix")
        assert not (home / "mix").exists()
    made = config(home)
    with pytest.raises(UserError, match=r"data: missing, but mix\.text needs its"):
        Config("mix", mix=made.mix, mesh=made.mesh)
