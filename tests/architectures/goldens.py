"""The golden checkpoints in golden/: tiny random models saved by transformers, with the results
that peer.py computed from them, and conventions shared by both sides. Needs no torch."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent / "golden"
NEW_TOKENS = 24
MANY_TOKENS = 64  # beyond a window, or the original context before scaling
BEYOND = (
    *("mistral_window", "gemma2", "gemma3", "olmo3", "qwen3_yarn", "ministral3", "llama_dynamic"),
    *("phi35", "smollm3", "hunyuan", "exaone4", "granitemoe_swa", "cwm"),
)
SAMPLES = 32  # values kept of each tensor after a step
SHORT = 128  # original context of longrope models, up to which short factors apply
TOLERANCE = 1e-4  # on logits in float32

# One step of AdamW. With a small eps, the first step would depend only on the signs of gradients.
LEARNING_RATE, BETA1, BETA2, EPS, WEIGHT_DECAY = 0.1, 0.9, 0.95, 1e-2, 0.1


def names() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def positions(length: int) -> np.ndarray:
    """Positions whose logits are kept: every 16th and the last 16."""
    return np.array(sorted({*range(0, length, 16), *range(length - 16, length)}))


def sample(tensor: np.ndarray) -> np.ndarray:
    """SAMPLES values of a tensor, evenly spaced; some occur twice in small tensors."""
    flat = np.asarray(tensor, np.float32).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, SAMPLES).round().astype(int)]


def sampled(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Samples of all tensors, [tensors, SAMPLES], in the order of their names."""
    return np.stack([sample(tensors[name]) for name in sorted(tensors)])


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, read by the safetensors library."""
    return {
        name: array
        for file in sorted(directory.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def expected(name: str) -> dict[str, np.ndarray]:
    """The results of transformers:

    tokens [1, T]; logits [positions(T), V]; for longrope short_logits of only the first SHORT
    tokens. prompt_0, generated_0 and so on: a prompt and its greedy continuation. batch_tokens,
    batch_segments [B, T + 1]: packed rows of a training step; loss, grad_norm, and `after`, the
    resulting tensors as returned by `sampled`.
    """
    with np.load(FOLDER / name / "expected.npz") as saved:
        return dict(saved)


def prompts(saved: Mapping[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """The prompts, each with its greedy continuation."""
    count = sum(key.startswith("prompt_") for key in saved)
    return [(saved[f"prompt_{i}"].tolist(), saved[f"generated_{i}"].tolist()) for i in range(count)]


# Alternative names that transformers reads as the same key.
_ALIASES = {
    "internlm3": {"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    "ernie4_5_moe": {"num_experts": "moe_num_experts"},
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
}


def _effective_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE settings with yarn's factor under one name, and all numbers as floats."""
    result = {key: float(x) if type(x) is int else x for key, x in rope.items()}
    scales = [result.pop(key, None) for key in ("mscale", "mscale_all_dim")]
    result.pop("max_position_embeddings", None)
    if result.get("rope_type") == "yarn" and "attention_factor" not in result:
        grown = [0.1 * (scale or 1) * math.log(result["factor"]) + 1 for scale in scales]
        result["attention_factor"] = grown[0] / grown[1] if all(scales) else grown[0]
    return result


def effective(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as transformers interprets it: one name for each key, no disabled window, no head
    size that follows from other keys, and no version."""
    aliases = _ALIASES.get(config["model_type"], {})
    result = {aliases.get(key, key): value for key, value in config.items()}
    if config["model_type"] == "gemma" and result["hidden_act"] == "gelu":
        result["hidden_act"] = "gelu_pytorch_tanh"
    if result.get("use_sliding_window") is False:
        result["sliding_window"] = None
    if result.get("head_dim", 0) is None:
        result["head_dim"] = result["hidden_size"] // result["num_attention_heads"]
    rope = dict(result.get("rope_parameters") or {})
    for key, kind in rope.items():
        if isinstance(kind, dict):
            rope[key] = _effective_rope(kind)
    if config.get("layer_rope_theta"):
        rope.pop("rope_theta", None)  # no layer has one
    if rope:
        result["rope_parameters"] = _effective_rope(rope)
    if "torch_dtype" in result:
        result.setdefault("dtype", result.pop("torch_dtype"))
    result.pop("transformers_version", None)
    return result
