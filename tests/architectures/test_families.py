"""Every supported Hugging Face family, compared with transformers on the same tiny checkpoint
(golden/, see peer.py): logits, tensors and settings after a round trip, greedy tokens, and one
training step."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from btx_jax.architectures.layout import constants
from btx_jax.architectures.registry import known_families
from btx_jax.architectures.tensors import slots
from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params, write_checkpoint
from btx_jax.commands import convert
from btx_jax.config.config import TrainConfig
from btx_jax.evaluation.generation import Generator
from btx_jax.parallel.sharding import make_mesh
from btx_jax.training.step import init_state, make_train_step, state_shardings
from tests.architectures import goldens
from tests.architectures.exports import COMPUTE, load, our_logits, our_tokens

NAMES = goldens.names()
# Whose maths another golden has, with other settings: decoded in slow runs only.
ALIKE = (
    "cwm", "exaone4_full", "ministral", "mixtral_window", "olmo3_plain", "qwen2_moe_norm",
    "qwen2_window", "qwen3_moe_norm", "qwen3_yarn", "seed_oss",
)  # fmt: skip
TRAIN = TrainConfig(
    steps=10,
    batch_size=4,
    learning_rate=goldens.LEARNING_RATE,
    warmup_steps=1,
    beta1=goldens.BETA1,
    beta2=goldens.BETA2,
    eps=goldens.EPS,
    weight_decay=goldens.WEIGHT_DECAY,
    clip_norm=1e9,
    balance_weight=0.0,
)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    model, params = load(goldens.FOLDER / name)
    saved = goldens.expected(name)
    cases = [(saved["tokens"], saved["logits"])]
    if "short_logits" in saved:
        cases.append((saved["tokens"][:, : goldens.SHORT], saved["short_logits"]))
    for tokens, theirs in cases:
        ours = our_logits(model, params, tokens)
        np.testing.assert_allclose(ours, theirs, atol=goldens.TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ALIKE else ()) for n in NAMES]
)
def test_greedy_tokens_are_those_of_transformers(name):
    model, params = load(goldens.FOLDER / name)
    saved = goldens.expected(name)
    assert our_tokens(model, params, saved) == [ids for _, ids in goldens.prompts(saved)]


@pytest.mark.parametrize("name", goldens.BEYOND)
def test_unequal_prompts_go_on_beyond_the_window_and_the_original_context(name):
    model, params = load(goldens.FOLDER / name)
    rows = json.loads((goldens.FOLDER.parent / "decoding.json").read_text())[name]
    generator = Generator(model, params, COMPUTE, mesh_of(model, 1))
    ours = generator.generate([prompt for prompt, _ in rows], goldens.MANY_TOKENS)
    assert ours == [ids for _, ids in rows]


def constants_of(name):
    """The tensors that are not parameters here."""
    about = find_checkpoint(goldens.FOLDER / name).metadata
    return constants(known_families()[about.huggingface["model_type"]], about.model)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_keeps_every_tensor_and_what_the_settings_mean(name, tmp_path):
    source, back = goldens.FOLDER / name, tmp_path / "back"
    convert.run(str(source), str(tmp_path / "ours"))
    convert.run(str(tmp_path / "ours"), str(back))
    before, after = goldens.tensors(source), goldens.tensors(back)
    assert set(before) == set(after)
    fixed = constants_of(name)
    for key, tensor in before.items():
        if key in fixed:  # float32, whatever their original dtype
            np.testing.assert_array_equal(after[key], fixed[key])
            continue
        assert tensor.dtype == after[key].dtype == ml_dtypes.bfloat16, key
        assert tensor.tobytes() == after[key].tobytes(), key
    was, now = (
        goldens.effective(json.loads((place / "config.json").read_text()))
        for place in (source, back)
    )
    assert {key: now.get(key, "absent") for key in was} == was
    was, now = (
        json.loads((place / "generation_config.json").read_text()) for place in (source, back)
    )
    assert now == was


def mesh_of(model, devices):
    """A mesh with all four axes where the experts divide, else with all but `expert`."""
    if devices == 1:
        return make_mesh((1, 1, 1, 1), jax.devices()[:1])
    even = all(spec.experts % 2 == 0 for spec in model.layer_specs())
    return make_mesh((1, 2, 2, 2) if even else (2, 2, 1, 2), jax.devices()[:devices])


def in_their_names(found, params, directory):
    """Parameters of this checkpoint's model, named as the tensors of a Hugging Face directory."""
    model, places = found.metadata.model, slots(found.metadata.model)

    def read(name):
        leaf = params
        for key in places[name].path:
            leaf = leaf[key]
        return places[name].to_theirs(leaf[places[name].indices])

    write_checkpoint(
        directory,
        True,
        model,
        dict.fromkeys(places, np.dtype(np.float32)),
        read,
        None,
        history={},
        huggingface=found.metadata.huggingface,
        card="",
        check=lambda: None,
        verb="writing",
    )
    return goldens.tensors(directory)


# Trained on one device and on eight; the others only in slow runs. One for every kind of maths, and
# for every kind of layout.
TRAINED = (
    "ernie_moe", "exaone4", "gemma2", "gemma3", "glm4", "granite", "hunyuan_moe",
    "llama_bias", "ministral3", "olmo", "olmo3", "phi35", "qwen2_moe", "qwen3_moe", "smollm3",
)  # fmt: skip
SPREAD = ("llama_bias", "qwen3", "gemma3", "qwen2_moe")
FAST = {1: TRAINED, 8: SPREAD}
ON_DEVICES = [
    pytest.param(name, devices, marks=() if name in FAST[devices] else pytest.mark.slow)
    for name in NAMES
    for devices in (1, 8)
]


@pytest.mark.parametrize(("name", "devices"), ON_DEVICES)
def test_a_step_of_training_is_that_of_transformers(name, devices, tmp_path):
    found, saved = find_checkpoint(goldens.FOLDER / name), goldens.expected(name)
    model = found.metadata.model
    mesh = mesh_of(model, devices)
    length = saved["batch_tokens"].shape[1] - 1
    params = load_params(found, state_shardings(model, TRAIN, mesh)[0].params)
    state = init_state(model, TRAIN, mesh, params=params)
    step = make_train_step(model, COMPUTE, TRAIN, mesh, length)
    batch = {"tokens": saved["batch_tokens"], "segments": saved["batch_segments"]}
    state, metrics = step(state, batch, jax.random.key(0))
    np.testing.assert_allclose(metrics.loss, saved["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, saved["grad_norm"], rtol=1e-4)

    updated = in_their_names(found, jax.device_get(state.params), tmp_path / "updated")
    before = goldens.tensors(goldens.FOLDER / name)
    assert set(updated) == set(before)
    start = goldens.sampled(before)
    ours, theirs = goldens.sampled(updated) - start, saved["after"] - start
    fixed = constants_of(name)
    for key, our, their in zip(sorted(before), ours, theirs, strict=True):
        if key in fixed:
            assert not their.any()
            continue
        largest = np.abs(their).max()
        np.testing.assert_allclose(our, their, rtol=0, atol=1e-4 * largest, err_msg=key)
