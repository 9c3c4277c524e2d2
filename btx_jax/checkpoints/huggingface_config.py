"""config.json of Hugging Face's Llama, Mistral and Mixtral <-> ModelConfig, in the spelling of
every transformers version."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from btx_jax.errors import ConfigError, UserError
from btx_jax.model_config import ModelConfig, MoEConfig, RopeScaling

log = logging.getLogger(__name__)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def model_from_config(config: dict[str, Any], where: str) -> ModelConfig:
    """Raises UserError, prefixed with `where`, listing everything that this model cannot
    represent."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        named = ", ".join(config.get("architectures") or ()) or kind
        raise UserError(
            f"{where}: architecture {named}; readable are {', '.join(ARCHITECTURES.values())}"
        )
    architectures = config.get("architectures") or [ARCHITECTURES[kind]]
    problems = []
    if architectures != [ARCHITECTURES[kind]]:
        problems.append(
            f"architectures={architectures} is not the language model {ARCHITECTURES[kind]}"
        )
    for key, plain in (
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("quantization_config", None),
        ("partial_rotary_factor", 1.0),
    ):
        if config.get(key, plain) != plain:
            problems.append(f"{key}={config[key]!r} is not supported, only {plain!r}")
    needed = [
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
    ]
    needed += ["num_local_experts", "num_experts_per_tok"] if kind == "mixtral" else []
    problems += [f"{key} is missing" for key in needed if config.get(key) is None]
    whole = [
        *needed,
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "sliding_window",
    ]
    for key in whole:
        value = config.get(key)
        if value is not None and (type(value) is not int or value < 1):
            problems.append(f"{key}={value!r}: must be a whole number of at least 1")
    for key in ("rms_norm_eps", "rope_theta"):
        value = config.get(key)
        if value is not None and not _is_positive(value):
            problems.append(f"{key}={value!r}: must be a positive number")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), Mapping | None):
            problems.append(f"{key}={config[key]!r}: must be an object")
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")

    heads, width, layers = (
        config["num_attention_heads"],
        config["hidden_size"],
        config["num_hidden_layers"],
    )
    context = config.get("max_position_embeddings") or 4096
    window = config.get(
        "sliding_window", 4096 if kind == "mistral" else None
    )  # as transformers' MistralConfig has it
    if kind != "llama" and window is not None and window < context:
        log.warning(
            "%s: sliding_window=%d: attention here is full, so the context is cut to it, where both"
            " are equal",
            where,
            window,
        )
        context = window
    try:
        theta, scaling = _rope(config, kind)
        moe = (
            MoEConfig((config["num_local_experts"],) * layers, config["num_experts_per_tok"])
            if kind == "mixtral"
            else None
        )
        return ModelConfig(
            vocab_size=config["vocab_size"],
            layers=layers,
            d_model=width,
            d_ff=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or width // heads,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(config.get("rms_norm_eps") or (1e-5 if kind == "mixtral" else 1e-6)),
            tied_head=bool(config.get("tie_word_embeddings", False)),
            context=context,
            moe=moe,
        )
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from error


def _rope(config: dict[str, Any], kind: str) -> tuple[float, RopeScaling]:
    """transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling. When both are
    there, they must agree."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    scaling = new or old or {}
    places = (config, new or {}, old or {})
    thetas = {float(place["rope_theta"]) for place in places if place.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise ConfigError(f"rope_theta: {', '.join(map(str, sorted(thetas)))}; which is right?")
    if any(
        place.get("partial_rotary_factor") not in (None, 1, 1.0) for place in (new or {}, old or {})
    ):
        raise ConfigError("partial_rotary_factor: a part of the rotary embedding is not supported")
    theta = thetas.pop() if thetas else {"mixtral": 1e6}.get(kind, 10_000.0)
    name = scaling.get("rope_type") or scaling.get("type") or "default"
    if new and old and (old.get("rope_type") or old.get("type")) not in (None, name):
        raise ConfigError(
            f"rope_parameters say {name}, rope_scaling says"
            f" {old.get('rope_type') or old.get('type')}; which is right?"
        )
    for key in {*(new or {}), *(old or {})} & {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    }:
        sources = (new, old, config) if key == "original_max_position_embeddings" else (new, old)
        values = {
            float(source[key]) for source in sources if source and source.get(key) is not None
        }
        if len(values) > 1 or not all(map(_is_positive, values)):
            raise ConfigError(f"rope {key}: {', '.join(map(str, sorted(values)))}; which is right?")
    if not _is_positive(theta):
        raise ConfigError(f"rope_theta={theta}: must be a positive number")
    if name == "default":
        return theta, RopeScaling()
    if name == "linear":
        if "factor" not in scaling:
            raise ConfigError("rope scaling linear without factor")
        return theta, RopeScaling("linear", float(scaling["factor"]))
    if name == "llama3":
        try:
            return theta, RopeScaling(
                "llama3",
                float(scaling["factor"]),
                float(scaling["low_freq_factor"]),
                float(scaling["high_freq_factor"]),
                int(scaling["original_max_position_embeddings"]),
            )
        except KeyError as error:
            raise ConfigError(f"rope scaling llama3 without {error.args[0]}") from error
    raise ConfigError(f"rope scaling {name!r} is not supported; known: default, linear, llama3")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def experts_per_token(model: ModelConfig) -> int:
    """num_experts_per_tok of a Mixtral that computes the same. Raises UserError when no Mixtral
    does.

    Mixtral is SoftMax(TopK). Soft routing is that with k = E; sample_top1 at inference (argmax,
    weight 1) is that with k = 1. Switch is
    not: it weights its one expert by the full softmax. Every layer must be a mixture of the same
    size.
    """
    specs = set(model.layer_specs())
    routings = {spec.routing for spec in specs}
    if (
        len({(spec.experts, spec.k) for spec in specs}) > 1
        or 0 in {spec.experts for spec in specs}
        or "switch" in routings
    ):
        described = ", ".join(
            sorted(f"{spec.experts or 'no'} experts {spec.routing} k={spec.k}" for spec in specs)
        )
        raise UserError(
            "Hugging Face's Mixtral has the same top-k mixture in every layer, this model has"
            f" {described}; keep it as it is"
        )
    return specs.pop().k


def config_from_model(
    model: ModelConfig, dtype: str, bos: int | None, eos: int | None
) -> dict[str, Any]:
    """config.json, with old and new spellings: transformers 4.42 reads rope_theta and torch_dtype,
    5 rope_parameters and dtype."""
    kind = "mixtral" if model.moe else "llama"
    scaling = model.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling.kind == "linear":
        rope = {"rope_type": "linear", "factor": scaling.factor}
    elif scaling.kind == "llama3":
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": (
            {"none": None, "linear": {"type": "linear", "factor": scaling.factor}}.get(
                scaling.kind, rope
            )
        ),
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied_head,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    if kind == "llama":
        return config | {"mlp_bias": False, "pretraining_tp": 1}
    experts = model.layer_specs()[0].experts
    return config | {
        "num_local_experts": experts,
        "num_experts_per_tok": experts_per_token(model),
        "sliding_window": None,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": False,
    }


def same_function(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Lines `key: a's value, b's value` for every setting in which two models' parameters would
    mean something else."""
    lines = []
    for field in dataclasses.fields(ModelConfig):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if x != y:
            lines.append(f"{field.name}: {_short(x)} against {_short(y)}")
    return lines


def _short(value: Any) -> str:
    return (
        str(dataclasses.asdict(value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else repr(value)
    )
