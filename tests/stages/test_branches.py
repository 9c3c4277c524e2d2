"""Branches that train only their feed-forwards, through the real stages: what they keep, how they
are read, and that they mix exactly."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params, open_reader
from btx_jax.checkpoints.training_state import StepReader, named_leaves
from btx_jax.commands import convert, experts
from btx_jax.commands import mix as mix_recipe
from btx_jax.commands.verify import verify
from btx_jax.config.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    MeshConfig,
    MixConfig,
    TrainConfig,
)
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import ConfigError, UserError
from btx_jax.evaluation.heldout import make_heldout_step, token_losses
from btx_jax.mixing.mix import mix_params
from btx_jax.parallel import sharding
from btx_jax.stages.mix import mixed_model
from tests.conftest import sentences
from tests.stages.test_evaluate import DENSE, MIXTURE, checkpoint

NAMES = "abc"
COMPUTE = ComputeConfig(dtype="float32", remat="none", loss_chunk=64, dispatch="ragged")


@pytest.fixture(autouse=True, scope="module")
def one_device_only():
    """These stages use one of the eight simulated devices."""
    real = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "device_count", lambda: 1)
        for module in ("btx_jax.training.start", "btx_jax.stages.mix"):
            patched.setattr(
                f"{module}.make_mesh", lambda shape, devices=None: real(shape, jax.devices()[:1])
            )
        yield


def training(home, name, init="seed", **train):
    given = {"steps": 4, "batch_size": 2, "warmup_steps": 1, "learning_rate": 0.02}
    return Config(
        "train",
        init=str(home / init),
        compute=COMPUTE,
        train=TrainConfig(**given | {"frozen": "shared"} | train),
        data=DataConfig(str(home / f"{name}.jsonl"), sequence_length=48, cache=str(home / "cache")),
        mesh=MeshConfig(),
        checkpoint=CheckpointConfig(2, keep=3),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_file):
    """A seed, text of three domains, and a branch for each."""
    home = tmp_path_factory.mktemp("branches")
    checkpoint(home / "seed", DENSE, 1, load_tokenizer(tokenizer_file))
    for number, name in enumerate(NAMES):
        lines = (json.dumps({"text": text}) + "\n" for text in sentences(60, seed=number))
        (home / f"{name}.jsonl").write_text("".join(lines))
        stages.run(training(home, name), home / name)
    return home


@pytest.fixture
def home(made, tmp_path):
    """A modifiable copy, as if all of it had been moved."""
    shutil.copytree(made, tmp_path / "moved", symlinks=True)
    return tmp_path / "moved"


def params(path):
    return named_leaves(load_params(find_checkpoint(path)))


def same(one, other):
    return one.keys() == other.keys() and all(
        np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes() for name in one
    )


def test_a_branch_keeps_its_feed_forwards_and_is_read_as_a_whole(made, tmp_path):
    found, seed = find_checkpoint(made / "a"), params(made / "seed")
    whole = named_leaves(load_params(found))
    for name, leaf in whole.items():
        assert np.array_equal(leaf, seed[name]) is ("/ffn/" not in name), name
    # It has been compared with the stored data.
    held = {"/".join(slot.path) for slot in StepReader(found.path).slots.values()}
    assert held == {name for name in whole if "/ffn/" in name}
    reader = open_reader(found)
    for tensor, slot in reader.slots.items():
        leaf = np.asarray(whole["/".join(slot.path)])
        assert np.array_equal(slot.to_ours(reader.read(tensor)), leaf[slot.indices]), tensor
    reader.check()
    convert.run(str(made / "a"), str(tmp_path / "export"))
    assert same(params(tmp_path / "export"), whole)


def test_a_base_in_bfloat16_is_read_in_float32(made, tmp_path, home):
    convert.run(str(home / "seed"), str(tmp_path / "half"), "bfloat16")
    shutil.copytree(tmp_path / "half", home / "half")
    stages.run(training(home, "a", "half"), home / "on_half")
    reader = open_reader(find_checkpoint(home / "on_half"))
    assert {dtype.name for dtype in reader.dtypes.values()} == {"float32"}
    half, branch = params(home / "half"), params(home / "on_half")
    assert same(*({n: x for n, x in p.items() if "/ffn/" not in n} for p in (half, branch)))


def test_a_run_goes_on_exactly(made, tmp_path):
    config = training(made, "a")
    stages.run(config, tmp_path / "run")
    (tmp_path / "run" / "done.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    stages.run(config, tmp_path / "run")
    assert same(params(tmp_path / "run"), params(made / "a"))


def test_a_branch_of_a_branch_names_the_first_ones_base(home):
    stages.run(training(home, "b", "a"), home / "longer")
    one, other = (find_checkpoint(home / name).metadata for name in ("a", "longer"))
    assert other.base.digest == one.base.digest
    assert find_checkpoint(other.base.path).path.parent.parent.name == "seed"
    stages.run(training(home, "b", "a", frozen=""), home / "free")
    assert find_checkpoint(home / "free").metadata.base is None


def mixing(home, names, **mix):
    text = tuple(str(home / f"{name}.jsonl") for name in names)
    ridge = {"router": "ridge", "text": text, "tokens": 1600}
    data = DataConfig(text[0], sequence_length=32, cache=str(home / "cache"))
    sources = tuple(str(home / name) for name in names)
    return Config("mix", mix=MixConfig(sources, **ridge | mix), data=data, mesh=MeshConfig())


def test_mixing_averages_nothing(made, tmp_path):
    stages.run(mixing(made, NAMES), tmp_path / "mix")
    seed, mixed = params(made / "seed"), params(tmp_path / "mix")
    branches = [params(made / name) for name in NAMES]
    for name, leaf in mixed.items():
        if "/ffn/" not in name:
            assert np.asarray(leaf).tobytes() == np.asarray(seed[name]).tobytes(), name
        elif not name.endswith("router"):
            assert np.array_equal(leaf, np.stack([branch[name] for branch in branches], 1)), name


def test_a_branch_of_another_base_is_told(home, tmp_path, caplog):
    checkpoint(home / "other", DENSE, 2, load_tokenizer(home / "seed" / "tokenizer"))
    stages.run(training(home, "c", "other"), home / "stranger")

    def warned(*names):
        caplog.clear()
        stages.run(
            mixing(home, names, router="normal", text=(), tokens=MixConfig.tokens),
            tmp_path / "-".join(names),
        )
        return [line for line in caplog.messages if "they do not mix exactly" in line]

    assert not warned("seed", "a", "b")
    assert len(warned("a", "b", "stranger")) == len(warned("other", "a")) == 1
    mixture = str(tmp_path / "seed-a-b")
    assert "a different base" in experts.add(mixture, str(home / "stranger"), str(tmp_path / "x"))
    assert "a different base" not in experts.add(mixture, str(home / "c"), str(tmp_path / "y"))


@pytest.mark.parametrize("dropped", range(3))
def test_a_dropped_expert_was_never_there(dropped, made, tmp_path):
    others = [name for number, name in enumerate(NAMES) if number != dropped]
    stages.run(mixing(made, NAMES), tmp_path / "all")
    stages.run(mixing(made, others), tmp_path / "others")
    experts.drop(str(tmp_path / "all"), dropped, str(tmp_path / "dropped"))
    one, other = (
        digest(load_params(find_checkpoint(tmp_path / name))) for name in ("others", "dropped")
    )
    assert one == other


@pytest.mark.parametrize("base", ["copy", "average"])
def test_recipes_mix_branches_exactly_too(base, made, tmp_path):
    def recipe(name, names):
        told = [
            {"source_model": str(made / n), "positive_prompts": [f"the {n} x y"]} for n in names
        ]
        values = {
            "base_model": str(made / ("seed" if base == "copy" else names[0])),
            "base": base,
            "gate_mode": "cheap_embed",
            "experts": told,
        }
        (tmp_path / f"{name}.yml").write_text(json.dumps(values))
        mix_recipe.run(str(tmp_path / f"{name}.yml"), str(tmp_path / name), verify=True)

    recipe("all", NAMES)
    recipe("others", "ac")
    experts.drop(str(tmp_path / "all"), 1, str(tmp_path / "dropped"))
    assert same(params(tmp_path / "others"), params(tmp_path / "dropped"))
    seed, mixed = params(made / "seed"), params(tmp_path / "all")
    assert all(np.array_equal(mixed[name], seed[name]) for name in mixed if "/ffn/" not in name)


def test_a_forced_expert_has_its_branchs_losses_to_the_last_bit(made, one_device):
    trees = [load_params(find_checkpoint(made / name)) for name in NAMES]
    model = mixed_model(DENSE, MixConfig(tuple(NAMES), k=1))
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, DENSE.vocab_size, (5, 49)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, 40:] = 0
    rows = {"tokens": tokens, "segments": segments}

    def losses(model, tree):
        step = make_heldout_step(model, COMPUTE, one_device)
        return token_losses(step, tree, rows, 2, one_device)[0][:, :39]

    for number, tree in enumerate(trees):
        # Equal logits choose the first expert.
        ordered = [tree, *(other for other in trees if other is not tree)]
        zeros = {
            name: jnp.zeros((length, DENSE.d_model, spec.experts))
            for name, length, spec in model.runs()
        }
        forced = losses(model, mix_params(ordered, zeros))
        np.testing.assert_array_equal(forced, losses(DENSE, tree), err_msg=NAMES[number])
        assert not np.array_equal(forced, losses(DENSE, trees[number - 1]))


def test_the_base_is_found_where_it_was_moved_to_and_another_is_refused(home, made):
    assert same(params(home / "a"), params(made / "a"))
    assert all(finding.good for finding in verify(str(home / "a")))
    shutil.move(made / "seed", made / "away")
    try:
        assert same(params(home / "a"), params(home / "a"))
        assert all(finding.good for finding in verify(str(home / "a")))
        shutil.rmtree(home / "seed")
        with pytest.raises(
            UserError, match=r"its base .*seed/checkpoints/0 is missing; restore it"
        ):
            load_params(find_checkpoint(home / "a"))
        checkpoint(home / "seed", DENSE, 2, load_tokenizer(made / "away" / "tokenizer"))
        told = "was trained on a base with digest .* the weights differ; restore the original base"
        with pytest.raises(UserError, match=told):
            load_params(find_checkpoint(home / "a"))
        with pytest.raises(UserError, match=told):
            convert.run(str(home / "a"), str(home / "out"))
        assert not (home / "out").exists()
        bad = {finding.name for finding in verify(str(home / "a")) if not finding.good}
        assert bad == {"step 2, base", "step 4, base"}
    finally:
        shutil.move(made / "away", made / "seed")


def test_what_cannot_be_such_a_branch_is_told(home, tmp_path):
    scratch = dataclasses.replace(training(home, "a"), init="scratch", model=DENSE)
    with pytest.raises(ConfigError, match="branches cannot share random weights"):
        stages.run(scratch, tmp_path / "out")
    checkpoint(home / "mixture", MIXTURE, 2, load_tokenizer(home / "seed" / "tokenizer"))
    with pytest.raises(ConfigError, match="the model is already a mixture"):
        stages.run(training(home, "a", "mixture"), tmp_path / "out")
