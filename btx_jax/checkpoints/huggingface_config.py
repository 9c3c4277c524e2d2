"""config.json of Hugging Face's Llama, Mistral and Mixtral <-> ModelConfig, in the spelling of
every transformers version."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from btx_jax.config.model_config import ModelConfig, MoEConfig, RopeScaling
from btx_jax.config.schema import HUGE, shown
from btx_jax.errors import ConfigError, UserError

log = logging.getLogger(__name__)

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
# What transformers 5.23 takes for a key that config.json leaves out.
_LLAMA = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as heads
    "head_dim": None,  # hidden_size / heads
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "sliding_window": None,
}
_MISTRAL = _LLAMA | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
_ROUTER = {"router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0}  # of a Mixtral's training
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL
    | {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
_POSITIVE = f"must be a positive number, at most {HUGE:g}"
_SILU = ("silu", "swish")  # two names of one function
# Keys that are not carried from config.json to config.json: what ModelConfig says itself, and what
# only holds for the files beside it.
_NOT_KEPT = {
    *_DEFAULTS["mixtral"],
    *("architectures", "model_type", "attention_bias", "mlp_bias", "layer_types", "num_experts"),
    *("rope_parameters", "rope_scaling", "original_max_position_embeddings"),
    *("partial_rotary_factor", "use_sliding_window", "max_window_layers", "dtype", "torch_dtype"),
    *("quantization_config", "compression_config", "auto_map", "transformers_weights"),
    *("transformers_version", "_name_or_path", "name_or_path"),
}


def model_from_config(config: dict[str, Any], where: str) -> ModelConfig:
    """As transformers 5.23 reads it, its defaults for absent keys included. Raises UserError,
    prefixed with `where`, listing everything that this model cannot represent."""
    kind = _family(config, where)
    values = _DEFAULTS[kind] | {
        key: config[key] for key in _DEFAULTS[kind] if key in config and key != "rope_theta"
    }
    if kind == "mixtral" and "num_experts" in config:  # transformers' other name of it
        values["num_local_experts"] = config["num_experts"]
    problems = _unsupported(config, values, kind)
    for key in (
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "sliding_window",
        "num_local_experts",
        "num_experts_per_tok",
    ):
        value = values.get(key)
        if value is None and key in values and key not in _MAY_BE_NULL:
            problems.append(f"{key} is null; give a number, or leave it out for {kind}'s default")
        elif value is not None and (type(value) is not int or value < 1):
            problems.append(f"{key}={shown(value)}: must be a whole number of at least 1")
        elif value is not None and value > _LARGEST.get(key, 2**40):
            problems.append(f"{key}={shown(value)}: more than any model has")
    if not _is_positive(values["rms_norm_eps"]):
        problems.append(f"rms_norm_eps={shown(values['rms_norm_eps'])}: {_POSITIVE}")
    if type(values["tie_word_embeddings"]) is not bool:
        problems.append(
            f"tie_word_embeddings={values['tie_word_embeddings']!r}: must be true or false"
        )
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")

    heads, width, layers = (
        values["num_attention_heads"],
        values["hidden_size"],
        values["num_hidden_layers"],
    )
    context, window = values["max_position_embeddings"], values["sliding_window"]
    if kind != "llama" and window is not None and window < context:
        log.warning(
            "%s: sliding_window=%d: attention here is full, so the context is cut to it, where both"
            " are equal",
            where,
            window,
        )
        context = window
    try:
        theta, scaling = _rope(config, values, where)
        moe = (
            MoEConfig((values["num_local_experts"],) * layers, values["num_experts_per_tok"])
            if kind == "mixtral"
            else None
        )
        return ModelConfig(
            vocab_size=values["vocab_size"],
            layers=layers,
            d_model=width,
            d_ff=values["intermediate_size"],
            heads=heads,
            kv_heads=values["num_key_value_heads"] or heads,
            head_dim=values["head_dim"] or width // heads,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=float(values["rms_norm_eps"]),
            tied_head=values["tie_word_embeddings"],
            context=context,
            moe=moe,
        )
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from error


# Beyond them nothing is meant, and tuples of that length would fill the memory.
_LARGEST = {"num_hidden_layers": 10_000, "num_local_experts": 4096}
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")


def _family(config: Mapping[str, Any], where: str) -> str:
    """By model_type alone, as transformers' Auto classes have it: `architectures` may name the
    model without its head, or a finetune's own class."""
    named = class_names(config)
    kind = config.get("model_type")
    if kind is None:
        by_class = {name: family for family, name in ARCHITECTURES.items()}
        kind = next((by_class[name] for name in named if name in by_class), None)
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        classes = f" ({', '.join(named)})" if named else ""
        raise UserError(
            f"{where}: model_type {kind}{classes} is not supported; readable are"
            f" {', '.join(ARCHITECTURES)}"
        )
    return kind


def class_names(config: Mapping[str, Any]) -> list[str]:
    """What config.json names as `architectures`; none where that is no list of names."""
    named = config.get("architectures")
    is_list = isinstance(named, list) and all(isinstance(name, str) for name in named)
    return named if is_list else []  # type: ignore[return-value]


def _unsupported(config: Mapping[str, Any], values: Mapping[str, Any], kind: str) -> list[str]:
    """Features that change what the weights mean and that this model has not."""
    problems = []
    if values["hidden_act"] not in _SILU:
        problems.append(f"hidden_act={values['hidden_act']!r} is not supported, only 'silu'")
    for key in ("attention_bias", "mlp_bias") if kind == "llama" else ():  # others ignore them
        if config.get(key):
            problems.append(f"{key}={config[key]!r}: biases are not supported")
    for key in ("quantization_config", "compression_config"):
        if (quantization := config.get(key)) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
            problems.append(
                f"{key} ({method or 'of no named method'}): quantised weights are not supported;"
                " save the model dequantised"
            )
    if config.get("per_layer_config"):
        problems.append("per_layer_config: layers of different sizes are not supported")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), Mapping | None):
            problems.append(f"{key}={config[key]!r}: must be an object")
    return problems


_ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor")


def _rope(
    config: Mapping[str, Any], values: Mapping[str, Any], where: str
) -> tuple[float, RopeScaling]:
    """transformers 5 writes rope_parameters, older ones rope_theta and rope_scaling. Where both are
    there and contradict each other, what transformers 5 takes is taken, with a warning: older ones
    take the other."""
    chosen = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if nested := [key for key, value in chosen.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"rope_parameters for {', '.join(nested)}: a rotary embedding per kind of layer is not"
            " supported"
        )
    if any(place.get("partial_rotary_factor") not in (None, 1, 1.0) for place in (config, chosen)):
        raise ConfigError("partial_rotary_factor: a part of the rotary embedding is not supported")
    outside = config.get("rope_theta", values["rope_theta"])
    rope = {
        "rope_theta": outside if chosen.get("rope_theta") is None else chosen["rope_theta"],
        "rope_type": chosen.get("rope_type") or chosen.get("type") or "default",
        **{key: chosen[key] for key in _ROPE_NUMBERS if key in chosen},
    }
    if rope["rope_type"] == "llama3":
        rope["original_max_position_embeddings"] = config.get(
            "original_max_position_embeddings",
            chosen.get("original_max_position_embeddings", values["max_position_embeddings"]),
        )
    _warn_of_contradictions(config, rope, where)
    for key in ("rope_theta", *_ROPE_NUMBERS, "original_max_position_embeddings"):
        if key in rope and not _is_positive(rope[key]):
            raise ConfigError(f"{key}={shown(rope[key])}: {_POSITIVE}")
    theta, name = float(rope["rope_theta"]), rope["rope_type"]
    needed = {"default": (), "linear": ("factor",), "llama3": _ROPE_NUMBERS}
    if not isinstance(name, str) or name not in needed:
        raise ConfigError(
            f"rope scaling {shown(name)} is not supported; known: {', '.join(needed)}"
        )
    for key in needed[name]:
        if key not in rope:
            raise ConfigError(f"rope scaling {name} without {key}")
    if name == "default" or (name == "linear" and rope["factor"] == 1):
        return theta, RopeScaling()
    if name == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    factor, low, high = (float(rope[key]) for key in _ROPE_NUMBERS)
    original = int(rope["original_max_position_embeddings"])
    return theta, RopeScaling("llama3", factor, low, high, original)


def _warn_of_contradictions(config: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> None:
    for key, taken in rope.items():
        said = [
            place.get("type", place.get(key)) if key == "rope_type" else place.get(key)
            for place in (config, config.get("rope_parameters"), config.get("rope_scaling"))
            if place
        ]
        others = {str(value) for value in said if value is not None and value != taken}
        if others:
            log.warning(
                "%s: says %s %s and %s; %s is taken, as transformers 5 does, and older ones may"
                " not: delete what is wrong",
                where,
                key,
                taken,
                " and ".join(sorted(others)),
                taken,
            )


def kept_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says beyond ModelConfig: ids of special tokens, settings of training and
    generation, whatever else somebody wrote there."""
    routers = _ROUTER if config.get("model_type") == "mixtral" else {}
    return routers | {key: value for key, value in config.items() if key not in _NOT_KEPT}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= HUGE


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


def needed_transformers(model: ModelConfig) -> str:
    """The oldest release that reads what `config_from_model` writes; those before it fail."""
    if _is_scaled_mixtral(model):
        return "5.0.0"
    kind = _written_as(model)
    if model.heads * model.head_dim != model.d_model:
        return {"mixtral": "4.47.0", "llama": "4.45.0", "mistral": "4.43.0"}[kind]
    return "4.43.0" if model.rope_scaling.kind == "llama3" else "4.42.0"


def _written_as(model: ModelConfig) -> str:
    """transformers' Llama refuses a width that is no multiple of the heads, its Mistral does
    not."""
    dense = "mistral" if model.d_model % model.heads else "llama"
    return "mixtral" if model.moe else dense


def _is_scaled_mixtral(model: ModelConfig) -> bool:
    """What releases before 4.48 read as a Mixtral without scaling."""
    return model.moe is not None and model.rope_scaling.kind != "none"


def config_from_model(model: ModelConfig, dtype: str, kept: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, with old and new spellings: transformers 4.42 reads rope_theta and torch_dtype,
    5 rope_parameters and dtype. kept: what `kept_config` found, or the special tokens' ids.

    A Mixtral with RoPE scaling has rope_theta null: releases before 5, some of which would leave
    the scaling out without a word, fail at that; 5 reads rope_parameters.
    """
    kind = _written_as(model)
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
    old_scaling = {"none": None, "linear": {"type": "linear", "factor": scaling.factor}}
    is_new = _is_scaled_mixtral(model)
    usual: dict[str, Any] = {"attention_dropout": 0.0, "use_cache": True}
    ours: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "transformers_version": needed_transformers(model),
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": None if is_new else model.rope_theta,
        "rope_scaling": None if is_new else old_scaling.get(scaling.kind, rope),
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied_head,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    if kind == "llama":
        return usual | {"pretraining_tp": 1} | dict(kept) | ours | {"mlp_bias": False}
    if kind == "mistral":
        return usual | dict(kept) | ours | {"sliding_window": None}
    usual |= {
        "router_aux_loss_coef": 0.01,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
    }
    return (
        usual
        | dict(kept)
        | ours
        | {
            "num_local_experts": model.layer_specs()[0].experts,
            "num_experts_per_tok": experts_per_token(model),
            "sliding_window": None,
        }
    )


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
