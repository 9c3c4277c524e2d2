"""The mix stage with merges other than the mean of shared parameters."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params, open_reader
from btx_jax.checkpoints.router_statistics import FILE
from btx_jax.checkpoints.training_state import CheckpointMetadata, Checkpoints
from btx_jax.commands import experts
from btx_jax.commands import mix as mix_recipe
from btx_jax.config.config import CheckpointConfig, MeshConfig, MixConfig
from btx_jax.config.ridge import RidgeConfig
from btx_jax.data.tokenizers import copy_tokenizer, load_tokenizer
from btx_jax.errors import UserError
from btx_jax.models.llama import init_params
from tests.stages import test_routers
from tests.stages.test_routers import MODEL, UNSOLVED, home

__all__ = ["home"]  # a fixture


def config(home, text=(), experts=("a", "b"), **mix):
    made = test_routers.config(home, text, **UNSOLVED | mix)
    sources = tuple(str(home / name) for name in experts)
    return dataclasses.replace(made, mix=dataclasses.replace(made.mix, experts=sources))


def regmean(home, **mix):
    return config(home, ("a", "b"), merge="regmean", tokens=1600, **mix)


def read_all(path):
    reader = open_reader(find_checkpoint(path))
    return {tensor: reader.read(tensor) for tensor in reader.slots}


@pytest.mark.parametrize(
    ("merge", "settings"),
    [
        ("copy", {"base": "seed"}),
        ("ties", {"base": "seed", "density": 0.5}),
        ("dare", {"base": "seed", "density": 0.5}),
        ("task_arithmetic", {"base": "seed", "scale": 0.4}),
        ("slerp", {"t": 0.3}),
        ("regmean", {"alpha": 0.8}),
    ],
)
def test_a_stage_merges_as_a_recipe_does(home, merge, settings):
    text = ("a", "b") if merge == "regmean" else ()
    given = settings | ({"base": str(home / "seed")} if "base" in settings else {})
    stages.run(config(home, text, merge=merge, **given), home / "stage")
    recipe = {
        "base_model": str(home / "seed"),
        "base": "copy" if merge == "copy" else "average",
        "gate_mode": "normal",
        "experts": [
            {"source_model": str(home / n)} | ({"text": str(home / f"{n}.jsonl")} if text else {})
            for n in "ab"
        ],
    }
    if merge != "copy":
        recipe |= {"merge": merge} | {k: v for k, v in settings.items() if k != "base"}
    (home / "recipe.yml").write_text(json.dumps(recipe))
    mix_recipe.run(str(home / "recipe.yml"), str(home / "recipe"))
    stages.run(config(home), home / "mean")
    one, other, mean = (read_all(home / name) for name in ("stage", "recipe", "mean"))
    for tensor in one:
        if tensor.is_router:
            continue
        if merge != "regmean":
            assert one[tensor].tobytes() == other[tensor].tobytes(), tensor
            continue
        # From other tokens of the same texts: a stage leaves out held-out documents, and packs
        # whole documents.
        apart, moved = (np.linalg.norm(one[tensor] - x[tensor]) for x in (other, mean))
        assert apart == moved == 0 or apart < 0.5 * moved, tensor
    embedding = next(tensor for tensor in one if str(tensor) == "model.embed_tokens.weight")
    assert not np.array_equal(one[embedding], mean[embedding])


def test_models_that_are_equal_are_merged_into_that_model(home):
    stages.run(regmean(home, experts=("a", "a")), home / "mix")
    made, dense = read_all(home / "mix"), read_all(home / "a")
    for tensor, array in made.items():
        if tensor.expert is None and not tensor.is_router:
            assert array.tobytes() == dense[tensor].tobytes(), tensor


def test_eight_devices_merge_as_one(home, monkeypatch):
    stages.run(regmean(home), home / "one")
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    sharded = dataclasses.replace(
        regmean(home), mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    )
    stages.run(sharded, home / "eight")
    one, eight = (load_params(find_checkpoint(home / name)) for name in ("one", "eight"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), one, eight)


def test_routers_and_what_experts_share_are_solved_together(home):
    """Statistics belong to the weights as written, so that experts can be added and dropped."""
    solved = {"router": "ridge", "ridge": RidgeConfig(temperature=0.5)}
    stages.run(regmean(home, **solved), home / "both")
    stages.run(regmean(home), home / "alone")
    both, alone = read_all(home / "both"), read_all(home / "alone")
    for tensor in both:
        assert (both[tensor].tobytes() == alone[tensor].tobytes()) is not tensor.is_router, tensor
    experts.add(
        str(home / "both"), str(home / "seed"), str(home / "three"), text=str(home / "seed.jsonl")
    )
    experts.drop(str(home / "three"), 2, str(home / "again"))
    again = read_all(home / "again")
    assert all(array.tobytes() == again[tensor].tobytes() for tensor, array in both.items())


@pytest.mark.parametrize("merge", ["mean", "regmean"])
def test_fitted_routers_find_their_domains(home, caplog, merge):
    caplog.set_level("INFO")
    stages.run(config(home, ("a", "b"), tokens=1600, router="logistic", merge=merge), home / "mix")
    told = [line for line in caplog.messages if "share of held-out tokens routed to" in line]
    assert len(told) == MODEL.layers
    shares = [float(part.rstrip("%")) for part in told[-1].split(": ")[-1].split(", ")]
    assert min(shares) > 80, "words of the two texts are others"
    assert not (home / "mix" / FILE).exists()


def test_biased_attention_and_a_tied_head(home, tokenizer_file):
    """A family with more leaves: each is merged, or averaged."""
    model = dataclasses.replace(
        MODEL, tied_head=True, qk_norm=True, biases=("q", "k", "v"), head_dim=MODEL.head_dim
    )
    for number, name in enumerate(("a", "b")):
        checkpoints = Checkpoints(home / f"{name}2", CheckpointConfig())
        params = init_params(model, jax.random.key(number))
        checkpoints.save(CheckpointMetadata(model, 1, {}), params)
        checkpoints.close()
        copy_tokenizer(load_tokenizer(tokenizer_file), home / f"{name}2" / "tokenizer")
    stages.run(regmean(home, experts=("a2", "b2")), home / "mix")
    stages.run(config(home, experts=("a2", "b2")), home / "mean")
    made, mean = read_all(home / "mix"), read_all(home / "mean")
    solved = {t.part for t in made if made[t].tobytes() != mean[t].tobytes()}
    assert solved == {
        "embed/embedding",
        *(f"attention/{part}" for part in ("query", "key", "value", "out")),
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"merge": "regmean"}, "text: 0 texts for 2 experts"),
        ({"merge": "ties"}, "base: missing, but merge='ties' needs it"),
        ({"merge": "copy"}, "base: missing, but merge='copy' needs it"),
        ({"base": "seed"}, "base='seed': not used by merge='mean'"),
        ({"alpha": 0.5}, "alpha=0.5: only used with merge regmean; remove it or set merge"),
        (
            {"tokens": 100},
            "tokens: only used with router='ridge' or 'logistic' and merge='regmean'",
        ),
        (
            {"merge": "regmean", "text": ("a", "b"), "copies": 2},
            "merge='regmean': with method='btx'",
        ),
        ({"merge": "slerp", "experts": ("a", "b", "c")}, "merge='slerp': merges exactly 2 models"),
        (
            {"merge": "ties", "base": "s", "method": "average"},
            "method='average' makes a dense model",
        ),
    ],
)
def test_configs_that_make_no_sense_are_refused(home, changes, told):
    with pytest.raises(UserError, match=told):
        MixConfig(**{"experts": ("a", "b")} | changes)


def test_a_base_of_another_model_or_tokenizer_is_refused(home, tokenizer_file):
    with pytest.raises(UserError, match=r"config\.mix\.base: nothing at|config\.mix\.base"):
        stages.run(config(home, merge="copy", base=str(home / "none")), home / "mix")
    other = dataclasses.replace(MODEL, layers=MODEL.layers + 1)
    checkpoints = Checkpoints(home / "deep", CheckpointConfig())
    checkpoints.save(CheckpointMetadata(other, 1, {}), init_params(other, jax.random.key(0)))
    checkpoints.close()
    copy_tokenizer(load_tokenizer(tokenizer_file), home / "deep" / "tokenizer")
    with pytest.raises(UserError, match=r"config\.mix\.base: a different model from experts\[0\]"):
        stages.run(config(home, merge="copy", base=str(home / "deep")), home / "mix")
    assert not (home / "mix").exists()
