"""Branches that train beside an anchor, through the real stages: what they keep, that they mix
exactly, and that their experts come and go."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params, open_reader
from btx_jax.checkpoints.training_state import StepReader, named_leaves
from btx_jax.commands import experts
from btx_jax.commands.verify import verify
from btx_jax.config.config import Config, MeshConfig, MixConfig
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.evaluation.heldout import make_heldout_step, token_losses
from btx_jax.parallel import sharding
from tests.conftest import sentences
from tests.stages import test_branches
from tests.stages.test_branches import COMPUTE, params
from tests.stages.test_evaluate import DENSE, checkpoint

NAMES = "abc"
OWN, ANCHOR = "/ffn/", "/anchor/"


@pytest.fixture(autouse=True, scope="module")
def one_device_only():
    """These stages take one of the eight simulated devices."""
    real = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "device_count", lambda: 1)
        for module in ("btx_jax.training.start", "btx_jax.stages.mix"):
            patched.setattr(
                f"{module}.make_mesh", lambda shape, devices=None: real(shape, jax.devices()[:1])
            )
        yield


def training(home, name, init="seed", **train):
    beside = {"anchor": True, "balance_weight": 0.0, "z_loss_weight": 1e-3}
    return test_branches.training(home, name, init, **beside | train)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_file):
    """A seed, text of three domains, and for each a branch beside the seed's feed-forwards."""
    home = tmp_path_factory.mktemp("anchors")
    checkpoint(home / "seed", DENSE, 1, load_tokenizer(tokenizer_file))
    for number, name in enumerate(NAMES):
        lines = (json.dumps({"text": text}) + "\n" for text in sentences(60, seed=number))
        (home / f"{name}.jsonl").write_text("".join(lines))
        stages.run(training(home, name), home / name)
    return home


@pytest.fixture
def home(made, tmp_path):
    """The same, to be changed: where all of it was moved to."""
    shutil.copytree(made, tmp_path / "moved", symlinks=True)
    return tmp_path / "moved"


def mixed(home, names, target, **mix):
    sources = tuple(str(home / name) for name in names)
    stages.run(Config("mix", mix=MixConfig(sources, **mix), mesh=MeshConfig()), target)
    return params(target)


def test_a_branch_keeps_what_it_trained_and_is_read_as_a_whole(made):
    found, seed = find_checkpoint(made / "a"), params(made / "seed")
    whole = named_leaves(load_params(found))
    for name, leaf in whole.items():
        if OWN not in name:
            under = seed[name.replace(ANCHOR, OWN)]
            assert np.asarray(leaf).tobytes() == np.asarray(under).tobytes(), name
        elif "router" in name:
            assert np.all(leaf != 0), name
        else:
            assert np.all(leaf[:, 0] != seed[name]), name
    held = {"/".join(slot.path) for slot in StepReader(found.path).slots.values()}
    assert held == {name for name in whole if OWN in name}
    assert find_checkpoint(found.metadata.base.path).path.parent.parent.name == "seed"
    reader = open_reader(found)
    for tensor, slot in reader.slots.items():
        leaf = np.asarray(whole["/".join(slot.path)])
        assert np.array_equal(slot.to_ours(reader.read(tensor)), leaf[slot.indices]), tensor
    reader.check()
    assert all(finding.good for finding in verify(str(made / "a")))


def test_mixing_averages_nothing(made, tmp_path):
    mixture = mixed(made, NAMES, tmp_path / "mix")
    branches = [params(made / name) for name in NAMES]
    for name, leaf in mixture.items():
        if OWN in name:
            axis = -1 if name.endswith("router") else 1
            joined = np.concatenate([branch[name] for branch in branches], axis)
            assert np.array_equal(leaf, joined), name
        else:
            assert np.asarray(leaf).tobytes() == np.asarray(branches[0][name]).tobytes(), name


def losses(found, tree, mesh):
    tokens = np.random.default_rng(0).integers(3, DENSE.vocab_size, (5, 49)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, 40:] = 0
    step = make_heldout_step(found.metadata.model, COMPUTE, mesh)
    rows = {"tokens": tokens, "segments": segments}
    return token_losses(step, tree, rows, 2, mesh)[0][:, :39]


def test_beside_the_anchor_alone_an_expert_is_its_branch_to_the_last_bit(
    made, tmp_path, one_device
):
    mixed(made, NAMES, tmp_path / "mix")
    found = find_checkpoint(tmp_path / "mix")
    tree = load_params(found)
    told = set()
    for number, name in enumerate(NAMES):
        bias_LE = tree["layers_0"]["ffn"]["router_bias"]
        forced = jnp.full_like(bias_LE, -1e30).at[:, number].set(bias_LE[:, number])
        ffn = {**tree["layers_0"]["ffn"], "router_bias": forced}
        through = {**tree, "layers_0": {**tree["layers_0"], "ffn": ffn}}
        branch = find_checkpoint(made / name)
        own = losses(branch, load_params(branch), one_device)
        np.testing.assert_array_equal(losses(found, through, one_device), own, err_msg=name)
        told.add(own.tobytes())
    assert len(told) == 3


@pytest.mark.parametrize("number", range(3))
def test_an_expert_comes_and_goes(number, made, tmp_path):
    others = [name for name in NAMES if name != NAMES[number]]
    mixed(made, NAMES, tmp_path / "all")
    mixed(made, others, tmp_path / "others")
    experts.drop(str(tmp_path / "all"), number, str(tmp_path / "dropped"))
    assert digests(tmp_path, "dropped") == digests(tmp_path, "others")
    mixed(made, [*others, NAMES[number]], tmp_path / "last")
    experts.add(str(tmp_path / "others"), str(made / NAMES[number]), str(tmp_path / "added"))
    assert digests(tmp_path, "added") == digests(tmp_path, "last")


def digests(home, name):
    return digest(load_params(find_checkpoint(home / name)))
