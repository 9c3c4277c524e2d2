"""Models of other families through the stages: their plans, branches with the mixing probe, LoRA,
closed-form mixing, finetuning of the mixture, text."""

import dataclasses

import jax
import numpy as np
import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import LoRAConfig, RopeScaling
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.evaluation.generation import Generator
from btx_jax.models.layers import Readout
from btx_jax.models.llama import Llama, logits
from btx_jax.parallel.sharding import make_mesh
from btx_jax.planning import steps
from btx_jax.planning.plan import plan
from tests.architectures import goldens
from tests.architectures.exports import dense_names
from tests.stages import test_routers
from tests.stages.test_evaluate import DENSE, checkpoint
from tests.stages.test_routers import home
from tests.stages.test_train import metrics

__all__ = ["home"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_device_only")
YARN = RopeScaling("yarn", factor=4.0, original_context=32, attention_factor=1.2)
LLAMA3 = RopeScaling("llama3", factor=8.0, original_context=32)
LONGROPE = RopeScaling(
    "longrope",
    original_context=32,
    short_factors=(1.0, 1.25, 1.5, 2.0),
    long_factors=(1.5, 2.0, 3.0, 4.0),
)
OLMO2 = {"norms": "after", "qk_norm": True, "qk_norm_kind": "width"}
GEMMA = {"norm": "rms_plus_one", "activation": "gelu_tanh", "embed_scale": 32**0.5}
FEATURES = {
    "olmo2": OLMO2,
    "olmo3": OLMO2
    | {"window": 8, "window_layers": (0,), "window_theta": 1e4, "rope_scaling": YARN},
    "gemma2": GEMMA
    | {"norms": "both", "attention_cap": 5.0, "logits_cap": 8.0, "attention_scale": 0.3}
    | {"window": 8, "window_layers": (1,)},
    "vaultgemma": GEMMA
    | {"attention_cap": 5.0, "logits_cap": 8.0, "window": 8, "window_layers": (1,)},
    "granite": {"embed_scale": 3.0, "residual_scale": 0.2, "logits_divisor": 1.5}
    | {"rope_scaling": RopeScaling("linear", factor=2.0)},
    "smollm3": {"nope_layers": (1,)},
    "ernie": {"rope_interleaved": True, "biases": ("q", "k", "v", "o")}
    | {"rope_scaling": RopeScaling("dynamic", factor=2.0, original_context=32)},
    "hunyuan": {"qk_norm": True, "qk_norm_kind": "rotated"}
    | {"rope_scaling": RopeScaling("alpha", factor=9.0)},
    "exaone4": {"norms": "after", "qk_norm": True, "rope_scaling": LLAMA3}
    | {"window": 8, "window_layers": (0,), "nope_layers": (1,)},
    "glm4": {"norms": "both", "rope_interleaved": True, "rotary": 0.5, "biases": ("q", "k", "v")},
    "cwm": {"window": 8, "window_layers": (1,), "rope_scaling": LLAMA3},
    "olmo": {"norm": "layer"},
    "phi4_mini": {"rotary": 0.5, "rope_scaling": LONGROPE},
    "ministral3": {"rope_scaling": dataclasses.replace(YARN, query_growth=0.5)},
}
LORA = LoRAConfig("1", rank=(2,), k=(1,), targets=("q", "down"), dropout=0.0)
FP32 = ComputeConfig(dtype="float32", remat="none", dispatch="ragged")


def changed(changes):
    return dataclasses.replace(DENSE, **changes)


def logits_of(path):
    found = find_checkpoint(path)
    model, params = found.metadata.model, load_params(found)
    tokens = np.arange(4, 52, dtype=np.int32)[None]
    hidden, _ = Llama(model, FP32).apply({"params": params}, tokens, np.ones_like(tokens))
    return np.asarray(logits(params, hidden, Readout.of(model)))


FAST = ("olmo3",)  # has many of the features
SIZES = ("vocab_size", "layers", "d_model", "d_ff", "heads", "kv_heads", "head_dim", "context")


def settings(model):
    """The features of a model that differ from the default: kinds by name, numbers by key."""
    usual = {field.name: field.default for field in dataclasses.fields(model)}
    for key in usual.keys() - {*SIZES, "moe", "lora", "rope_theta", "norm_eps", "tied_head"}:
        value = getattr(model, key)
        if isinstance(value, RopeScaling):
            yield from {(key, value.kind), ("query_growth", bool(value.query_growth))}
        elif value != usual[key]:
            yield key, value if isinstance(value, str) else True


def test_everything_that_a_family_computes_is_tried_here():
    tried = {s for changes in FEATURES.values() for s in settings(changed(changes))}
    for name in dense_names():
        model = find_checkpoint(goldens.FOLDER / name).metadata.model
        assert set(settings(model)) <= tried, name


def as_planned(config, workdir, monkeypatch):
    """Plan a run, run it, and compare."""
    monkeypatch.setattr(steps, "TIMED_SECONDS", 0.01)
    (planned,) = plan(config, workdir, steps.on_this_machine, 1).stages
    assert planned.memory and planned.seconds > planned.stepping > 0
    stages.run(config, workdir)
    history = find_checkpoint(workdir).metadata.history
    own = [run for run in history.values() if run][-1]
    assert (planned.tokens, planned.flops) == (own.tokens, pytest.approx(own.flops))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in FEATURES]
)
def test_a_family_goes_through_every_stage(
    name, home, training, tokenizer_file, tmp_path, monkeypatch
):
    model = changed(FEATURES[name])
    seed = checkpoint(tmp_path / "seed2", model, 1, load_tokenizer(tokenizer_file))
    branch = training(seed, 2, eval_every=2, mixing_probe=True, learning_rate=1e-2)
    as_planned(branch, tmp_path / "branch", monkeypatch)
    first, last = (line for line in metrics(tmp_path / "branch") if "heldout" in line)
    assert first["barrier"] == 0 and last["heldout"] != first["heldout"]

    adapted = training(seed, 2, learning_rate=1e-2, frozen="base")
    stages.run(dataclasses.replace(adapted, lora=LORA), tmp_path / "lora")
    assert find_checkpoint(tmp_path / "lora").metadata.model.lora == LORA

    def mixed(out, *sources):
        made = test_routers.config(home, merge="regmean")
        mix = dataclasses.replace(made.mix, experts=sources)
        stages.run(dataclasses.replace(made, mix=mix), tmp_path / out)

    mixed("equal", seed, seed)
    np.testing.assert_allclose(logits_of(tmp_path / "equal"), logits_of(seed), atol=1e-4)
    mixed("mix", seed, str(tmp_path / "branch"))
    finetune = training(tmp_path / "mix", 2, learning_rate=1e-3)
    as_planned(finetune, tmp_path / "finetuned", monkeypatch)
    found = find_checkpoint(tmp_path / "finetuned")
    mesh = make_mesh((1, 1, 1, 1), jax.devices()[:1])
    generator = Generator(found.metadata.model, load_params(found), FP32, mesh)
    prompt = list(range(4, 44))
    (ids,) = generator.generate([prompt], 4)
    hidden, _ = Llama(found.metadata.model, FP32).apply(
        {"params": load_params(found)}, np.array([prompt + ids]), np.ones((1, 44), np.int32)
    )
    best = logits(load_params(found), hidden, Readout.of(found.metadata.model))[0].argmax(-1)
    assert best[39:43].tolist() == ids
