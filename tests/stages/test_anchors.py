"""Branches with an anchor through the real stages: what they keep, that they mix exactly, and that
experts can be added and dropped."""

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
from btx_jax.commands.generate import generate
from btx_jax.commands.verify import verify
from btx_jax.config.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    MixConfig,
    ReportConfig,
    TrainConfig,
)
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import ConfigError, UserError
from btx_jax.evaluation.heldout import make_heldout_step, token_losses
from btx_jax.parallel import sharding
from btx_jax.training.start import anchored_model, start_branch
from btx_jax.training.step import state_shardings
from tests.conftest import sentences
from tests.stages import test_branches
from tests.stages.test_branches import COMPUTE, params, same
from tests.stages.test_evaluate import DENSE, MIXTURE, checkpoint

NAMES = "abc"
OWN, ANCHOR = "/ffn/", "/anchor/"


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
    beside = {"anchor": True, "balance_weight": 0.0, "z_loss_weight": 1e-3}
    return test_branches.training(home, name, init, **beside | train)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_file):
    """A seed, text of three domains, and for each a branch with an anchor."""
    home = tmp_path_factory.mktemp("anchors")
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


def test_a_run_goes_on_exactly(made, tmp_path):
    config = training(made, "a")
    stages.run(config, tmp_path / "run")
    (tmp_path / "run" / "done.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    stages.run(config, tmp_path / "run")
    assert same(params(tmp_path / "run"), params(made / "a"))


def test_a_branch_starts_as_its_base(made, tmp_path):
    """A branch continued from another names the first one's base."""
    config = training(made, "b", eval_every=4)
    stages.run(config, tmp_path / "run")
    dense = test_branches.training(made, "b", eval_every=4)
    stages.run(dense, tmp_path / "dense")
    first, other = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["heldout"]
        for name in ("run", "dense")
    )
    assert first == other
    stages.run(training(made, "b", "a", anchor=False), tmp_path / "longer")
    one, longer = (find_checkpoint(place).metadata for place in (made / "a", tmp_path / "longer"))
    assert longer.base == one.base
    assert longer.model == one.model


def test_an_anchor_kept_in_bfloat16_rounds_nothing_of_its_copy(made, one_device):
    train = training(made, "a", frozen_dtype="bfloat16").train
    model = anchored_model(DENSE)
    abstract, _ = state_shardings(model, train, one_device)
    started, _ = start_branch(find_checkpoint(made / "seed"), model, abstract.params)
    layers, seed = started["layers_0"], params(made / "seed")
    for name in ("gate", "up", "down"):
        assert layers["anchor"][name].dtype == jnp.bfloat16
        assert np.array_equal(layers["ffn"][name][:, 0], seed[f"layers_0/ffn/{name}"])


def test_less_and_less_frozen_from_one_run_to_the_next(home, tmp_path):
    """BAR's schedule: trained parameters are averaged, the others stay bit-identical."""
    for name in "ab":
        stages.run(training(home, name, name, frozen="shared_layers"), home / f"{name}2")
        stages.run(training(home, name, f"{name}2", frozen="anchor"), home / f"{name}3")
    seed = {name.replace(OWN, ANCHOR): leaf for name, leaf in params(home / "seed").items()}
    for stage, moved in (("2", ("embed", "head")), ("3", ("embed", "head", "norm", "attention"))):
        branches = [params(home / f"{name}{stage}") for name in "ab"]
        assert find_checkpoint(home / f"a{stage}").metadata.base is None
        for name, leaf in mixed(home, [f"a{stage}", f"b{stage}"], tmp_path / stage).items():
            if OWN in name:
                continue
            one, other = (np.asarray(branch[name]) for branch in branches)
            if any(part in name for part in moved):
                assert np.all((one != seed[name]).any()) and (one != other).any(), name
                np.testing.assert_allclose(leaf, (one + other) / 2, rtol=1e-6, atol=1e-8)
            else:
                assert np.asarray(leaf).tobytes() == np.asarray(seed[name]).tobytes(), name


def test_a_mixture_s_routers_are_trained_alone(home):
    mixed(home, "ab", home / "mix")
    before = params(home / "mix")
    config = test_branches.training(home, "c", "mix", frozen="all_but_routers", anchor=False)
    stages.run(config, home / "routed")
    after = params(home / "routed")
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    assert changed == {"layers_0/ffn/router", "layers_0/ffn/router_bias"}
    assert find_checkpoint(home / "routed").metadata.base is None


def test_another_anchor_is_refused(home, tmp_path):
    checkpoint(home / "other", DENSE, 2, load_tokenizer(home / "seed" / "tokenizer"))
    stages.run(training(home, "c", "other"), home / "stranger")
    stages.run(training(home, "c", "stranger", frozen="anchor"), home / "far")
    mixed(home, "ab", home / "mix")
    for name in ("stranger", "far"):
        told = (
            rf"experts\[2\]: .*{name}.* was trained with a different anchor from .*;"
            " only branches of one"
        )
        with pytest.raises(ConfigError, match=told):
            mixed(home, ["a", "b", name], tmp_path / "out")
        with pytest.raises(
            UserError, match=r"SOURCE: .* was trained with a different anchor from the"
        ):
            experts.add(str(home / "mix"), str(home / name), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_base_with_other_weights_is_refused(home, made):
    shutil.move(made / "seed", made / "away")
    try:
        assert same(params(home / "a"), params(home / "a"))
        shutil.rmtree(home / "seed")
        checkpoint(home / "seed", DENSE, 2, load_tokenizer(made / "away" / "tokenizer"))
        with pytest.raises(
            UserError, match=r"was trained on a base with digest .* the weights differ"
        ):
            load_params(find_checkpoint(home / "a"))
        bad = {finding.name for finding in verify(str(home / "a")) if not finding.good}
        assert bad == {"step 2, base", "step 4, base"}
    finally:
        shutil.move(made / "away", made / "seed")


def test_what_cannot_be_done_with_them_is_one_line(home, tmp_path):
    checkpoint(home / "mixture", MIXTURE, 2, load_tokenizer(home / "seed" / "tokenizer"))
    mixed(home, "abc", home / "mix")
    seed, a, mix = (str(home / name) for name in ("seed", "a", "mix"))
    out = str(tmp_path / "out")

    def mixing(*names, **options):
        return lambda: mixed(home, names, tmp_path / "out", **options)

    def train(**changes):
        return lambda: stages.run(
            dataclasses.replace(training(home, "a"), **changes), tmp_path / "out"
        )

    def recipe():
        told = {"base_model": seed, "gate_mode": "random", "experts": [{"source_model": a}] * 2}
        (tmp_path / "recipe.yml").write_text(json.dumps(told))
        mix_recipe.run(str(tmp_path / "recipe.yml"), out)

    two = dataclasses.replace(training(home, "a").train, balance_weight=0.01)
    long = dataclasses.replace(training(home, "a").data, sequence_length=500)
    bare = dataclasses.replace(training(home, "a").train, anchor=False, frozen="anchor")
    for function, told in (
        (lambda: convert.run(a, out), "cannot hold .*an anchor, beside which the router adds a bias"),
        (lambda: convert.run(mix, out), "an anchor, beside which the router adds a bias"),
        (recipe, "is already a mixture"),
        (lambda: experts.add(mix, seed, out), "is not a branch with an anchor, as the experts of"),
        (lambda: experts.add(str(home / "mixture"), a, out), "is already a mixture"),
        (lambda: experts.drop(mix, 3, out), "no expert 3 in layer 0, which has experts 0 to 2"),
        (lambda: experts.drop(a, 0, out), "cannot drop the only expert"),
        (mixing("a", "seed"), "a different model from experts"),
        (mixing("a", "mix"), "a different model from experts"),
        (mixing("mix", "mix"), "is already a mixture"),
        (mixing("a", "b", copies=2, router="uniform"), "2 mistakes: .*copies=2: .*router='uniform'"),
        (
            mixing("a", "b", method="average"),
            "config.mix.method='average': branches trained with an anchor",
        ),
        (mixing("a", "b", shared_expert=seed), "config.mix.shared_expert="),
        (
            mixing("a", "b", merge="copy", base=seed),
            "config.mix.merge='copy': branches trained with an anchor",
        ),
        (train(init="scratch", model=DENSE), "config.train.anchor: branches cannot share"),
        (train(init=str(home / "mixture")), "config.train.anchor: the model is already a mixture"),
        (train(train=two, data=long, mesh=MeshConfig(2)), "3 mistakes: .*mesh.*500.*balance_weight"),
        (train(train=bare), "config.train.frozen='anchor': the model has no anchor"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=told):
            function()
        assert not (tmp_path / "out").exists(), told
    for frozen in ("", "experts", "all_but_routers", "base"):
        with pytest.raises(ConfigError, match=r"anchor: with frozen=.* set frozen to 'shared'"):
            TrainConfig(4, 2, anchor=True, frozen=frozen, warmup_steps=1)


@pytest.mark.slow
def test_they_are_evaluated_and_reported_as_any_model(home, tmp_path):
    mixed(home, "ab", home / "mix")
    text = {name: str(home / f"{name}.jsonl") for name in "ab"}
    names = ("seed", "a", "b", "mix")
    models = {name: str(home / name) for name in names}
    data = DataConfig(
        "a,b", heldout="a,b", domains=text, sequence_length=48, heldout_fraction=0.2,
        cache=str(home / "cache"),
    )  # fmt: skip
    evaluate = EvaluateConfig(models, "seed", ("a", "b"), "mix", rows=4)
    config = Config("evaluate", data=data, compute=COMPUTE, mesh=MeshConfig(), evaluate=evaluate)
    stages.run(config, tmp_path / "evaluate")
    found = json.loads((tmp_path / "evaluate" / "results.json").read_text())["models"]
    load = found["mix"]["routing"]["domains"]["a"]["load"]
    assert np.shape(load) == (2, 3)
    np.testing.assert_allclose(np.sum(load, 1), 1, rtol=1e-5)
    assert found["seed"]["params_active"] < found["a"]["params_active"]
    assert found["a"]["params_active"] < found["mix"]["params_active"]
    stages.run(Config("report", report=ReportConfig(str(tmp_path / "evaluate"))), tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "anchor" in page
    for name in ("a", "mix"):
        shown: list[str] = []
        generate(str(home / name), "the river", shown.append, max_tokens=5)
        assert "".join(shown)
