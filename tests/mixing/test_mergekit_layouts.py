"""Mixing compared with mergekit-moe's results for the same recipes, in each of its layouts
(golden_layouts/, see mergekit_layouts_peer.py). Random numbers are compared by magnitude."""

import json

import numpy as np
import pytest
import yaml

from btx_jax.checkpoints.checkpoint import find_checkpoint, open_reader
from btx_jax.commands import mix as mix_recipe
from tests.conftest import ROOT

LAYOUTS = ROOT / "tests" / "mixing" / "golden_layouts"
RECIPES = {path.parent.name: path for path in sorted(LAYOUTS.glob("*/recipe.yml"))}
NOISE = "mixtral_noise"


@pytest.fixture(autouse=True)
def _in_golden(monkeypatch):
    monkeypatch.chdir(LAYOUTS)


def mixed(tmp_path, name, **changes):
    """Our mixture of a golden recipe with changed keys; None omits one."""
    recipe = RECIPES[name]
    if changes:
        values = yaml.safe_load(recipe.read_text()) | changes
        recipe = tmp_path / f"{name}.yml"
        recipe.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    mix_recipe.run(str(recipe), str(tmp_path / name), verify=True)
    return tmp_path / name


def read(path):
    return open_reader(find_checkpoint(path))


def is_router(tensor):
    return tensor.part in ("ffn/router", "shared_expert/router")


def gate_mode(name):
    return yaml.safe_load(RECIPES[name].read_text()).get("gate_mode", "hidden")


@pytest.mark.parametrize("name", RECIPES)
def test_tensors_are_those_of_mergekit_bit_for_bit(tmp_path, name):
    ours, theirs = read(mixed(tmp_path, name)), read(LAYOUTS / name)
    assert set(ours.slots) == set(theirs.slots)
    for tensor in theirs.slots:
        if is_router(tensor) or (name == NOISE and tensor.expert is not None):
            continue
        a, b = ours.read(tensor), theirs.read(tensor)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), tensor
        assert a.tobytes() == b.tobytes(), tensor


@pytest.mark.parametrize("name", RECIPES)
def test_routers_are_those_of_mergekit(tmp_path, name):
    ours, theirs = read(mixed(tmp_path, name)), read(LAYOUTS / name)
    routers = [tensor for tensor in theirs.slots if is_router(tensor)]
    assert routers == [tensor for tensor in ours.slots if is_router(tensor)]
    pairs = [(ours.read(tensor), theirs.read(tensor)) for tensor in routers]
    for tensor, (a, b) in zip(routers, pairs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), tensor
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs]
    mode = gate_mode(name)
    if mode == "random":
        for side in zip(*pairs, strict=True):
            assert 0.7 < np.concatenate([rows.ravel() for rows in side]).std() < 1.3
    elif mode == "uniform_random":
        for side in zip(*pairs, strict=True):
            values = np.concatenate([rows.ravel() for rows in side])
            assert np.abs(values).max() <= 0.25 and 0.1 < values.std() < 0.19
    else:
        for tensor, (a, b) in zip(routers, pairs, strict=True):
            if mode == "cheap_embed":
                ulp = 0 if theirs.read(tensor).dtype == np.float32 else 2.0**-7
                np.testing.assert_allclose(a, b, atol=1e-4, rtol=ulp, err_msg=tensor)
            lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            assert ((a * b).sum(-1) / lengths).min() >= 0.9999, (
                f"{tensor}: mergekit runs its forward pass in bfloat16; anything below is another"
                " place or another pooling"
            )


@pytest.mark.parametrize("name", RECIPES)
def test_settings_mean_those_of_mergekit(tmp_path, name):
    target = mixed(tmp_path, name)
    ours, theirs = (
        json.loads((folder / "config.json").read_text()) for folder in (target, LAYOUTS / name)
    )
    assert meaning(ours) == meaning(theirs)
    assert find_checkpoint(target).metadata.model == find_checkpoint(LAYOUTS / name).metadata.model


def meaning(config):
    """The settings in a mixture's config.json, under one name each."""
    kind = config["model_type"]
    counts = ("num_local_experts", "num_experts", "n_routed_experts")
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    shared = config.get("shared_expert_intermediate_size", 0)
    copied = (
        "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "vocab_size", "rms_norm_eps", "tie_word_embeddings", "hidden_act",
        "num_experts_per_tok", "max_position_embeddings", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    found = {
        "kind": kind,
        "experts": next(config[key] for key in counts if config.get(key) is not None),
        "normalised": config.get("norm_topk_prob", kind == "mixtral"),
        "width": width,
        "shared width": shared or (config.get("n_shared_experts") or 0) * width,
        "dense layers": (
            config.get("first_k_dense_replace", 0),
            config.get("moe_layer_freq", 1),
            config.get("decoder_sparse_step", 1),
            config.get("mlp_only_layers") or [],
        ),
        "scores": config.get("scoring_func", "softmax"),
        "head_dim": config.get("head_dim")
        or config["hidden_size"] // config["num_attention_heads"],
        "rope": config.get("rope_theta") or config["rope_parameters"]["rope_theta"],
        "window": config.get("sliding_window") if config.get("use_sliding_window", True) else None,
        "dtype": config.get("torch_dtype") or config["dtype"],
    }
    return found | {key: config.get(key) for key in copied}


def test_noise_has_the_size_of_mergekits(tmp_path):
    """Each side has independent noise, so that their difference has sqrt(2) times its standard
    deviation; noise on the down projection is scaled with it."""
    ours, theirs = read(mixed(tmp_path, NOISE)), read(LAYOUTS / NOISE)
    apart = {}
    for tensor in theirs.slots:
        if tensor.expert is not None:
            key = (tensor.expert, tensor.part == "ffn/down")
            apart.setdefault(key, []).append((ours.read(tensor) - theirs.read(tensor)).ravel())
    found = {key: np.concatenate(parts) / np.sqrt(2) for key, parts in apart.items()}
    wanted_std = {(0, False): 0.5, (0, True): 0.5, (1, False): 0.25, (1, True): 0.5}
    assert found.keys() == wanted_std.keys()
    for key, std in wanted_std.items():
        assert found[key].std() == pytest.approx(std, rel=0.12), key
        assert abs(found[key].mean()) < 0.2 * std, key


SHARED = [{"source_model": "sources/llama/a"}]
GATED = [{"source_model": "sources/llama/a", "positive_prompts": ["x"]}]


@pytest.mark.parametrize(
    ("name", "changes", "kind"),
    [
        ("mixtral", {"architecture": None}, "mixtral"),
        ("deepseek", {"architecture": None}, "mixtral"),
        ("mixtral", {"architecture": "D"}, "deepseek"),
        ("mixtral", {"architecture": "DeepSeek MoE"}, "deepseek"),
        ("mixtral", {"architecture": None, "shared_experts": SHARED}, "deepseek"),
        ("mixtral_noise", {"shared_experts": SHARED}, "deepseek"),
        ("mixtral_noise", {"shared_experts": SHARED, "gate_mode": "random"}, "deepseek"),
        (
            "mixtral_noise",
            {"shared_experts": SHARED, "gate_mode": "random", "architecture": "qwen"},
            "qwen2_moe",
        ),
        ("mixtral_noise", {"shared_experts": GATED}, "qwen2_moe"),
        ("mixtral_noise", {"shared_experts": GATED, "gate_mode": "random"}, "qwen2_moe"),
        ("qwen2_moe_llama", {"architecture": None}, "qwen2_moe"),
        ("qwen2_moe", {"architecture": "qwen moe"}, "qwen2_moe"),
        ("qwen3_moe", {"architecture": "qwen"}, "qwen3_moe"),
        ("qwen3_moe", {"architecture": "Qwen3 MoE"}, "qwen3_moe"),
    ],
)
def test_the_layout_is_the_one_that_mergekit_chooses(tmp_path, name, changes, kind):
    target = mixed(tmp_path, name, **changes)
    assert json.loads((target / "config.json").read_text())["model_type"] == kind
