"""Conversion between Hugging Face's config.json and ModelConfig, as the families declare it. Reads
and writes the spellings of all transformers versions."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from btx_jax.architectures.family import KEYS, Family, MoEKeys
from btx_jax.architectures.registry import known_families, require_held
from btx_jax.config.model_config import ModelConfig, MoEConfig, RopeScaling
from btx_jax.config.schema import HUGE, shown
from btx_jax.errors import ConfigError, UserError

log = logging.getLogger(__name__)

_POSITIVE = f"must be a positive number, at most {HUGE:g}"
# Keys that change what other classes compute -> the values that change nothing. transformers
# ignores these keys in the supported classes, but whoever wrote another value meant it to count.
_FOREIGN: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), (None, 0)),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), (None, 1)),
    **dict.fromkeys(("logit_scale", "scale_emb", "attention_multiplier"), (None, 1)),
    **dict.fromkeys(("query_pre_attn_scalar", "no_rope_layers", "attention_k_eq_v"), (None, False)),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "alibi", "parallel_attn"), (None, False)),
}
_QUANTISED = ("quantization_config", "compression_config")
# Keys that are not copied to a new config.json: those that ModelConfig represents, and those that
# describe the files of the old directory.
_NOT_KEPT = {
    *KEYS.values(),
    *("hidden_act", "architectures", "model_type", "layer_types", "sliding_window"),
    *("use_sliding_window", "rope_theta", "rope_parameters", "rope_scaling"),
    *("original_max_position_embeddings", "partial_rotary_factor", "dtype", "torch_dtype"),
    *("attention_bias", "mlp_bias", "transformers_version", "transformers_weights", "auto_map"),
    *("_name_or_path", "name_or_path", *_QUANTISED),
}


def model_from_config(config: dict[str, Any], where: str) -> ModelConfig:
    """The model as transformers 5.23 would read it, including defaults for missing keys. Raises
    UserError, prefixed with `where`, that lists everything ModelConfig cannot represent."""
    family = family_of(config, where)
    config = _with_standard_names(config, family)
    values = dict(family.defaults) | {
        key: config[key] for key in family.defaults if key in config and key != "rope_theta"
    }
    problems = [*_unsupported(config, values, family), *_bad_numbers(values, family)]
    if problems:
        raise UserError(f"{where}: {'; '.join(problems)}")
    heads, width = values["num_attention_heads"], values["hidden_size"]
    try:
        theta, scaling, rotary = _rope(config, values, family, where)
        if family.nope_thetas:
            theta = _common_theta(config, family, theta)
        window, window_layers = _window(config, values, family)
        local = _local_theta(config, family, where) if window else 0.0
        if local == theta and scaling == RopeScaling():
            local = 0.0
        return ModelConfig(
            vocab_size=values["vocab_size"],
            layers=values["num_hidden_layers"],
            d_model=width,
            d_ff=values["intermediate_size"],
            heads=heads,
            kv_heads=values["num_key_value_heads"] or heads,
            head_dim=values["head_dim"] or config.get("head_dim") or width // heads,
            rope_theta=theta,
            rope_scaling=scaling,
            rotary=rotary,
            biases=_biases(config, values, family),
            **family.maths,
            **_numbers(values, family),
            activation=family.activations[values[family.activation_key]],
            nope_layers=_nope_layers(config, values, family),
            window=window,
            window_layers=window_layers,
            window_theta=local,
            norm_eps=float(values["rms_norm_eps"]),
            tied_head=values["tie_word_embeddings"],
            context=values["max_position_embeddings"],
            moe=_moe(values, family.moe) if family.moe else None,
        )
    except ConfigError as error:
        raise UserError(f"{where}: {error}") from error


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family, determined by model_type alone as in transformers' Auto classes: `architectures`
    may name the model without its head, or a finetune's own class. Raises UserError."""
    families = known_families()
    named = class_names(config)
    kind = config.get("model_type")
    if kind is None:
        by_class = {family.model_class: family for family in families.values()}
        kind = next((by_class[name].model_type for name in named if name in by_class), None)
    if not isinstance(kind, str) or kind not in families:
        classes = f" ({', '.join(named)})" if named else ""
        raise UserError(
            f"{where}: model_type {kind}{classes} is not supported; supported:"
            f" {', '.join(families)}"
        )
    return families[kind]


def class_names(config: Mapping[str, Any]) -> list[str]:
    """The names in config.json's `architectures`; none if it is not a list of names."""
    named = config.get("architectures")
    is_list = isinstance(named, list) and all(isinstance(name, str) for name in named)
    return named if is_list else []  # type: ignore[return-value]


def _with_standard_names(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    synonyms = dict(family.synonyms)
    if family.moe:
        synonyms |= dict.fromkeys(family.moe.experts[1:], family.moe.experts[0])
    return {**config, **{new: config[old] for old, new in synonyms.items() if old in config}}


def _unsupported(config: Mapping[str, Any], values: Mapping[str, Any], family: Family) -> list[str]:
    """Messages about features that change the meaning of the weights and are not supported."""
    problems = []
    key = family.activation_key
    if values[key] not in family.activations:
        problems.append(
            f"{key}={values[key]!r} is not supported, only {next(iter(family.activations))!r}"
        )
    for key in _QUANTISED:
        if (quantization := config.get(key)) is not None:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
            problems.append(
                f"{key} ({method or 'unnamed method'}): quantised weights are not supported;"
                " save the model dequantised"
            )
    if config.get("per_layer_config"):
        problems.append("per_layer_config: layers of different sizes are not supported")
    own = {*family.numbers.values(), family.query_scalar, family.nope}
    for key, neutral in {**_FOREIGN, **family.fixed}.items():
        if key in config and key not in own and config[key] not in neutral:
            problems.append(f"{key}={shown(config[key])}: is not supported")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), Mapping | None):
            problems.append(f"{key}={config[key]!r}: must be an object")
    return problems


# Larger values are mistakes, and tuples of such length would exhaust memory.
_LARGEST = {"num_hidden_layers": 10_000}
_LARGEST_COUNT = 4096  # experts
_MAY_BE_NULL = ("num_key_value_heads", "head_dim", "sliding_window")


def _bad_numbers(values: Mapping[str, Any], family: Family) -> list[str]:
    keys = [key for key in KEYS.values() if key not in ("rms_norm_eps", "tie_word_embeddings")]
    keys += [key for key in ("sliding_window", "max_window_layers") if key in values]
    moe = family.moe
    if moe:
        named = (moe.experts[0], moe.k, moe.d_ff, moe.shared_d_ff, moe.shared_count, moe.step)
        keys += [key for key in (*named, moe.dense_first) if key]
    problems = []
    for key in keys:
        value = values.get(key)
        least = 0 if key == "max_window_layers" or (moe and key in moe.may_be_zero) else 1
        # transformers writes a disabled window as 0.
        least = 0 if key == "sliding_window" and family.window == "switched" else least
        largest = _LARGEST_COUNT if moe and key == moe.experts[0] else _LARGEST.get(key, 2**40)
        may_be_null = key in _MAY_BE_NULL or (moe and key == moe.shared_count)
        if value is None and not may_be_null:
            problems.append(
                f"{key} is null; give a number, or leave it out for {family.model_type}'s default"
                if family.defaults[key] is not None
                else f"{key} is missing"
            )
        elif value is not None and (type(value) is not int or value < least):
            problems.append(f"{key}={shown(value)}: must be a whole number of at least {least}")
        elif value is not None and value > largest:
            problems.append(f"{key}={shown(value)}: larger than in any model")
    for key in filter(None, (*family.numbers.values(), family.query_scalar)):
        if values[key] is not None and not _is_positive(values[key]):
            problems.append(f"{key}={shown(values[key])}: {_POSITIVE}")
    if not _is_positive(values["rms_norm_eps"]):
        problems.append(f"rms_norm_eps={shown(values['rms_norm_eps'])}: {_POSITIVE}")
    for key in ("tie_word_embeddings", "use_sliding_window", moe.renormalise if moe else ""):
        if type(values.get(key, False)) is not bool:
            problems.append(f"{key}={values[key]!r}: must be true or false")
    return problems


def _biases(
    config: Mapping[str, Any], values: Mapping[str, Any], family: Family
) -> tuple[str, ...]:
    return tuple(
        name
        for key, names in family.biases.items()
        if not key or config.get(key, values.get(key))
        for name in names
    )


def _numbers(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Fields of ModelConfig that config.json states or that follow from the width."""
    found: dict[str, Any] = {
        name: float(values[key]) for name, key in family.numbers.items() if values[key] is not None
    }
    if family.query_scalar:
        found["attention_scale"] = values[family.query_scalar] ** -0.5
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if found.get("attention_scale") == (values["head_dim"] or width // heads) ** -0.5:
        del found["attention_scale"]  # the default
    if family.embeds_by_width:
        found["embed_scale"] = width**0.5
    return found


def _window(
    config: Mapping[str, Any], values: Mapping[str, Any], family: Family
) -> tuple[int, tuple[int, ...]]:
    """(the window, the layers that have it; () for all)."""
    has, window = _have_window(config, values, family), int(values.get("sliding_window") or 0)
    if has and all(has) and family.window_layers in ("all", "typed"):
        return window, ()
    if not any(has) or window >= values["max_position_embeddings"]:
        return 0, ()  # the window covers the whole context
    return window, () if all(has) else tuple(layer for layer, it_has in enumerate(has) if it_has)


def _have_window(
    config: Mapping[str, Any], values: Mapping[str, Any], family: Family
) -> list[bool]:
    """Whether each layer has the window; [] if no window is enabled."""
    layers = values["num_hidden_layers"]
    if not family.window or not values.get("sliding_window"):
        return []
    if family.window == "switched" and not values["use_sliding_window"]:
        return []
    types = config.get("layer_types")
    if family.window_layers == "all" or (types is None and family.window_layers == "typed"):
        return [True] * layers
    if types is None and family.window_layers == "spaced":
        every, place = _full_every(config, family), 0 if family.full_first else -1
        has = [(layer - place) % every != 0 for layer in range(layers)]
    elif types is None and family.window_layers == "nope":
        nope = _nope_layers(config, values, family)
        has = [layer in nope for layer in range(layers)]
    elif types is None:
        first = values["max_window_layers"]
        has = [
            layer >= first if family.window_layers == "from" else layer < first and layer % 2 == 0
            for layer in range(layers)
        ]
    elif isinstance(types, list) and len(types) == layers:
        has = [name == "sliding_attention" for name in types]
    else:
        raise ConfigError(
            f"layer_types={shown(types)}: must name the kind of each of {layers} layers"
        )
    return has


def _full_every(config: Mapping[str, Any], family: Family) -> int:
    key = family.full_every_key
    every = config.get(key, family.full_every) if key else family.full_every
    if type(every) is not int or every < 1:
        raise ConfigError(f"{key}={shown(every)}: must be a whole number of at least 1")
    return every


def _common_theta(config: Mapping[str, Any], family: Family, outside: float) -> float:
    """The RoPE base, if config.json gives every layer with RoPE the same one."""
    thetas = config.get(family.nope)
    if not isinstance(thetas, list) or not any(thetas):
        return outside
    given = {shown(theta): theta for theta in thetas if theta}
    theta = next(iter(given.values()))
    if len(given) > 1 or not _is_positive(theta):
        raise ConfigError(f"{family.nope}={', '.join(given)}: must be one positive number, or 0")
    return float(theta)


def _nope_layers(
    config: Mapping[str, Any], values: Mapping[str, Any], family: Family
) -> tuple[int, ...]:
    if not family.full_rotates:
        has = _have_window(config, values, family)
        return tuple(layer for layer, it_has in enumerate(has) if not it_has)
    if not family.nope:
        return ()
    layers, rotates = values["num_hidden_layers"], config.get(family.nope)
    if rotates is None and not family.nope_every_key:
        return ()
    if rotates is None:
        every = values[family.nope_every_key]
        if type(every) is not int or every < 1:
            raise ConfigError(f"{family.nope_every_key}={shown(every)}: must be a whole number")
        return tuple(range(every - 1, layers, every))
    if not isinstance(rotates, list) or len(rotates) < layers:
        raise ConfigError(
            f"{family.nope}={shown(rotates)}: must say for each of {layers} layers whether it"
            " rotates"
        )
    return tuple(layer for layer in range(layers) if not rotates[layer])


def _moe(values: Mapping[str, Any], keys: MoEKeys) -> MoEConfig:
    layers, experts = values["num_hidden_layers"], values[keys.experts[0]]
    dense = values.get(keys.dense_list) or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError(f"{keys.dense_list}={shown(dense)}: must be a list of layers")
    step = values.get(keys.step, 1)
    # Qwen counts layers from one, DeepSeek from zero.
    offset = 1 if keys.dense_list else 0
    first = values.get(keys.dense_first, 0)
    counts = tuple(
        experts if layer >= first and layer not in dense and (layer + offset) % step == 0 else 0
        for layer in range(layers)
    )
    if not any(counts):
        named = " and ".join(filter(None, (keys.dense_list, keys.dense_first, keys.step)))
        raise ConfigError(f"{named}: no layer has experts; such a model is not supported")
    if keys.last and values[keys.last] not in (-1, layers - 1):
        raise ConfigError(f"{keys.last}={shown(values[keys.last])}: must be the last layer, or -1")
    d_ff = values[keys.d_ff] if keys.d_ff else values["intermediate_size"]
    shared = values[keys.shared_d_ff] if keys.shared_d_ff else 0
    if keys.shares_one:
        shared = d_ff
    if keys.shared_count:
        shared = (values[keys.shared_count] or 0) * d_ff
    return MoEConfig(
        counts,
        values[keys.k],
        renormalise=(values[keys.k] > 1 or keys.renormalises_one)
        and (bool(values[keys.renormalise]) if keys.renormalise else True),
        d_ff=d_ff if d_ff != values["intermediate_size"] else 0,
        shared_d_ff=shared,
        shared_gate=bool(shared) and keys.has_shared_gate,
    )


def _of_layer_type(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """rope_parameters of layers of this kind."""
    found = (config.get("rope_parameters") or {}).get(kind) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"rope_parameters.{kind}={shown(found)}: must be an object")
    return dict(found)


def _local_theta(config: Mapping[str, Any], family: Family, where: str) -> float:
    """RoPE base of layers with a window; 0 if it equals that of the others."""
    if not family.local_theta:
        return 0.0
    own = _of_layer_type(config, "sliding_attention")
    if own.get("rope_type", "default") != "default":
        raise ConfigError(
            f"rope scaling {shown(own['rope_type'])} in layers with a window is not supported"
        )
    theta = own.get("rope_theta", config.get(family.local_theta_key, family.local_theta))
    if not _is_positive(theta):
        raise ConfigError(f"rope_theta={shown(theta)}: {_POSITIVE}")
    return float(theta)


_NUMBERS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "alpha": ("alpha",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": (),
}
_LISTS = ("short_factor", "long_factor")
_OF_ORIGINAL = ("llama3", "yarn", "longrope")  # kinds that depend on the original context


def _rope(
    config: Mapping[str, Any], values: Mapping[str, Any], family: Family, where: str
) -> tuple[float, RopeScaling, float]:
    """(theta, scaling, fraction of each head that RoPE rotates).

    transformers 5 writes rope_parameters, older releases rope_theta and rope_scaling. If both are
    present and contradict each other, the values that transformers 5 uses are taken, with a
    warning: older releases use the others.
    """
    usual = values.get("rope_parameters", {})
    chosen = config.get("rope_scaling") or config.get("rope_parameters") or usual
    if family.local_theta:
        chosen = _of_layer_type(config, "full_attention") | dict(config.get("rope_scaling") or {})
        config = {**config, "rope_parameters": chosen}
    if nested := [key for key, value in chosen.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"rope_parameters for {', '.join(nested)}: a rotary embedding per kind of layer is not"
            " supported"
        )
    outside = config.get("rope_theta", values["rope_theta"])
    kind = chosen.get("rope_type") or chosen.get("type") or "default"
    if "longrope" in family.scalings and "yarn" not in family.scalings and kind in ("su", "yarn"):
        kind = "longrope"  # its names in the first Phi-3 releases
    if kind == "dynamic" and "alpha" in family.scalings and chosen.get("alpha"):
        kind = "alpha"  # in this family "dynamic" with alpha is another scaling
    rope: dict[str, Any] = {
        "rope_theta": outside if chosen.get("rope_theta") is None else chosen["rope_theta"],
        "rope_type": kind,
    }
    for key in ("factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"):
        if chosen.get(key, config.get(key) if key == "partial_rotary_factor" else None) is not None:
            rope[key] = chosen.get(key, config.get(key))
    if kind in _OF_ORIGINAL:
        key = "original_max_position_embeddings"
        rope[key] = config.get(key, values.get(key))
        if rope[key] is None:
            rope[key] = chosen.get(key, values["max_position_embeddings"])
    if kind == "yarn" and "factor" in chosen and chosen["factor"] is None:
        original = rope["original_max_position_embeddings"]
        if _is_positive(original):  # otherwise reported below
            rope["factor"] = values["max_position_embeddings"] / original
    _warn_of_contradictions(config, rope, where)
    for key, value in rope.items():
        if key != "rope_type" and not _is_positive(value):
            raise ConfigError(f"{key}={shown(value)}: {_POSITIVE}")
    rotary = float(rope.get("partial_rotary_factor", family.rotary or 1))
    if rotary != 1 and not family.rotary:
        raise ConfigError("partial_rotary_factor: a part of the rotary embedding is not supported")
    theta = float(rope["rope_theta"])
    if kind == "default":
        return theta, RopeScaling(), rotary
    known = [name for name in _NUMBERS if name in family.scalings]
    if not isinstance(kind, str) or kind not in known:
        raise ConfigError(
            f"rope scaling {shown(kind)} is not supported; known: {', '.join(['default', *known])}"
        )
    for key in (*_NUMBERS[kind], *(_LISTS if kind == "longrope" else ())):
        if rope.get(key, chosen.get(key)) is None:
            raise ConfigError(f"rope scaling {kind} without {key}")
    scaling = _scaling(kind, rope, chosen, values["max_position_embeddings"])
    if growth := chosen.get("llama_4_scaling_beta") if family.grows_queries else None:
        if not _is_positive(growth):
            raise ConfigError(f"llama_4_scaling_beta={shown(growth)}: {_POSITIVE}")
        scaling = dataclasses.replace(scaling, query_growth=float(growth))
    return theta, scaling, rotary


def _scaling(
    kind: str, rope: Mapping[str, Any], chosen: Mapping[str, Any], context: int
) -> RopeScaling:
    factor = float(rope.get("factor", 1))
    if kind == "alpha":
        if not _is_positive(chosen["alpha"]):
            raise ConfigError(f"alpha={shown(chosen['alpha'])}: {_POSITIVE}")
        return RopeScaling(kind, float(chosen["alpha"]))
    if kind in ("linear", "dynamic"):
        if kind == "dynamic":
            return RopeScaling(kind, factor, original_context=context)
        return RopeScaling() if factor == 1 else RopeScaling(kind, factor)
    original = int(rope["original_max_position_embeddings"])
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return RopeScaling(kind, factor, low, high, original)
    if kind == "yarn":
        return _yarn(factor, original, chosen)
    lists = []
    for key in _LISTS:
        numbers = chosen[key]
        if not isinstance(numbers, list) or not all(map(_is_positive, numbers)):
            raise ConfigError(f"{key}={shown(numbers)}: must be a list of positive numbers")
        lists.append(tuple(map(float, numbers)))
    given = chosen.get("attention_factor")
    if given is not None and not _is_positive(given):
        raise ConfigError(f"attention_factor={shown(given)}: {_POSITIVE}")
    attention = _longrope_attention(float(rope.get("factor", context / original)), original)
    return RopeScaling(
        kind,
        original_context=original,
        attention_factor=attention if given is None else float(given),
        short_factors=lists[0],
        long_factors=lists[1],
    )


def _yarn(factor: float, original: int, chosen: Mapping[str, Any]) -> RopeScaling:
    if chosen.get("truncate", True) is not True:
        raise ConfigError("rope scaling yarn with truncate=False is not supported")
    numbers = {"beta_fast": 32, "beta_slow": 1}
    for key in (*numbers, "attention_factor", "mscale", "mscale_all_dim"):
        # As in transformers, 0 is a value for attention_factor and means unset for the others.
        given = chosen.get(key)
        if given is not None if key == "attention_factor" else given:
            numbers[key] = chosen[key]
            if not _is_positive(chosen[key]):
                raise ConfigError(f"{key}={shown(chosen[key])}: {_POSITIVE}")

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1

    usual = grown(1)
    if "mscale" in numbers and "mscale_all_dim" in numbers:
        usual = grown(numbers["mscale"]) / grown(numbers["mscale_all_dim"])
    return RopeScaling(
        "yarn",
        factor,
        original_context=original,
        beta_fast=float(numbers["beta_fast"]),
        beta_slow=float(numbers["beta_slow"]),
        attention_factor=float(numbers.get("attention_factor", usual)),
    )


def _longrope_attention(factor: float, original: int) -> float:
    """Factor on queries and keys when none is stated."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _warn_of_contradictions(config: Mapping[str, Any], rope: Mapping[str, Any], where: str) -> None:
    for key, taken in rope.items():
        said = [
            place.get("type", place.get(key)) if key == "rope_type" else place.get(key)
            for place in (config, config.get("rope_parameters"), config.get("rope_scaling"))
            if place
        ]
        others = {str(value) for value in said if value is not None and value != taken}
        if key == "rope_type" and taken == "longrope":
            others -= {"su", "yarn"}
        if others:
            log.warning(
                "%s: says %s %s and %s; %s is used, as in transformers 5, but older versions"
                " may differ: delete the wrong one",
                where,
                key,
                taken,
                " and ".join(sorted(others)),
                taken,
            )


def kept_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything in config.json that ModelConfig does not represent: ids of special tokens,
    settings of training and generation, and anything else."""
    family = family_of(config, "config.json")
    ours = {*_NOT_KEPT, *family.biases, *family.synonyms, *family.numbers.values()}
    ours |= {family.query_scalar, family.activation_key, family.local_theta_key, family.nope}
    ours -= family.defaults.keys() & {"original_max_position_embeddings"}
    if family.moe:
        ours |= {*family.moe.all(), "num_experts", "num_local_experts"}
    # Training settings of a mixture, with transformers' defaults.
    training = ("router_aux_loss_coef", "router_jitter_noise")
    usual = {key: family.defaults[key] for key in training if key in family.defaults}
    return usual | {key: value for key, value in config.items() if key not in ours}


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= HUGE


def needed_transformers(model: ModelConfig, family: Family) -> str:
    """The oldest tested release that reads what `config_from_model` writes; earlier ones fail. ""
    for a class that is not part of transformers."""
    if _needs_new_rope(model, family):
        return family.scaling_since
    oldest = [family.since]
    if family.since and model.heads * model.head_dim != model.d_model:
        oldest.append(family.head_dim_since)
    if family.since and model.rope_scaling.kind == "llama3":
        oldest.append("4.43.0")
    if family.since and model.rotary != 1:
        oldest.append("4.49.0")
    return max(oldest, key=lambda release: [int(n) for n in release.split(".")] if release else [])


def _needs_new_rope(model: ModelConfig, family: Family) -> bool:
    """Whether older releases would silently read the model without its RoPE scaling."""
    return bool(family.scaling_since) and model.rope_scaling.kind != "none"


def config_from_model(
    model: ModelConfig, family: Family, dtype: str, kept: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json with old and new spellings: transformers 4.42 reads rope_theta and torch_dtype,
    version 5 rope_parameters and dtype. kept: the result of `kept_config`, or the ids of special
    tokens. Raises UserError for a model that the family cannot hold.

    If the family has a `scaling_since` and RoPE is scaled, rope_theta is null: earlier releases,
    some of which would silently ignore the scaling, fail on it, and newer ones read
    rope_parameters.
    """
    require_held(family, model)
    values: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "transformers_version": needed_transformers(model, family) or None,
        **{key: getattr(model, ours) for ours, key in KEYS.items()},
        **_written_maths(model, family),
        **_written_rope(model, family),
        "torch_dtype": dtype,
        "dtype": dtype,
        "attention_bias": False,
    }
    for key, names in family.biases.items():
        if key:
            values[key] = names[0] in model.biases
    if family.window:
        # Classes that always have windowed layers require a window even if no layer has it.
        asks = family.window_layers == "spaced" and (family.full_rotates or model.nope_layers)
        none = model.context if asks else None
        values["sliding_window"] = model.window or none
    if family.window == "switched":
        values["use_sliding_window"] = bool(model.window)
        if model.window and "max_window_layers" in family.defaults:
            values["max_window_layers"] = min(model.window_layers, default=0)
    says_kinds = ("from", "even", "nope", "spaced", *(["typed"] if model.window_layers else []))
    if family.window and family.window_layers in says_kinds:
        kinds = [bool(spec.window) for spec in model.layer_specs()]
        if not family.full_rotates and model.nope_layers:
            kinds = [layer not in model.nope_layers for layer in range(model.layers)]
        values["layer_types"] = [
            "sliding_attention" if has_window else "full_attention" for has_window in kinds
        ]
    if family.moe:
        values |= _written_moe(model, family.moe)
    usual = {"attention_dropout": 0.0, "use_cache": True, **family.usual}
    return usual | dict(kept) | values


def _written_maths(model: ModelConfig, family: Family) -> dict[str, Any]:
    named = (name for name, ours in family.activations.items() if ours == model.activation)
    values: dict[str, Any] = {family.activation_key: next(named)}
    scale = model.attention_scale or model.head_dim**-0.5
    for name, key in family.numbers.items():
        number = scale if name == "attention_scale" else getattr(model, name)
        # A cap of 0 means none, which is null here.
        values[key] = number or None
    if family.query_scalar:
        # Restores a whole number: its power of -1/2 was rounded.
        scalar = scale**-2
        values[family.query_scalar] = round(scalar) if round(scalar) ** -0.5 == scale else scalar
    if family.nope:
        rotating = model.rope_theta if family.nope_thetas else 1
        values[family.nope] = [
            0 if layer in model.nope_layers else rotating for layer in range(model.layers)
        ]
    return values


def _written_moe(model: ModelConfig, keys: MoEKeys) -> dict[str, Any]:
    specs = model.layer_specs()
    spec = next(spec for spec in specs if spec.experts)
    dense = [layer for layer, spec in enumerate(specs) if not spec.experts]
    values: dict[str, Any] = {keys.experts[0]: spec.experts, keys.k: spec.k}
    if not keys.d_ff:
        values["intermediate_size"] = spec.d_ff
    for key, value in (
        (keys.d_ff, spec.d_ff),
        # For k = 1, a class that never renormalises has the value of its mixtures with k > 1.
        (keys.renormalise, spec.renormalise or (spec.k == 1 and not keys.renormalises_one)),
        (keys.shared_d_ff, spec.shared_d_ff),
        (keys.shared_count, spec.shared_d_ff // spec.d_ff or keys.none_shared),
        (keys.dense_list, dense),
        (keys.step, 1),
        (keys.dense_first, len(dense)),
        (keys.last, model.layers - 1),
    ):
        if key:
            values[key] = value
    return values


def _written_rope(model: ModelConfig, family: Family) -> dict[str, Any]:
    scaling = model.rope_scaling
    rope: dict[str, Any] = {"rope_type": scaling.kind}
    old: dict[str, Any] | None = None
    if scaling.kind == "none":
        rope = {"rope_type": "default"}
    elif scaling.kind in ("linear", "dynamic"):
        rope |= {"factor": scaling.factor}
        old = {"type": scaling.kind, "factor": scaling.factor}
    elif scaling.kind == "alpha":
        rope = old = {"rope_type": "dynamic", "alpha": scaling.factor, "factor": 1.0}
    elif scaling.kind == "llama3":
        rope |= {
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    elif scaling.kind == "yarn":
        rope |= {
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_context,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": scaling.attention_factor,
        }
    else:
        factors = {"short_factor": scaling.short_factors, "long_factor": scaling.long_factors}
        lists = {key: list(numbers) for key, numbers in factors.items()}
        old = {"type": "longrope", **lists}
        usual = _longrope_attention(
            model.context / scaling.original_context, scaling.original_context
        )
        rope |= lists | {"original_max_position_embeddings": scaling.original_context}
        if scaling.attention_factor != usual:  # older releases read only three keys
            old["attention_factor"] = rope["attention_factor"] = scaling.attention_factor
    values: dict[str, Any] = {}
    if family.rotary:
        rope["partial_rotary_factor"] = values["partial_rotary_factor"] = model.rotary
    if scaling.kind == "longrope":
        values["original_max_position_embeddings"] = scaling.original_context
    if scaling.query_growth:
        rope["llama_4_scaling_beta"] = scaling.query_growth
    if family.local_theta:
        local = model.window_theta or model.rope_theta
        if family.local_theta_key:
            values[family.local_theta_key] = local
        return values | {
            "rope_theta": model.rope_theta,
            "rope_scaling": None if scaling.kind == "none" else old or rope,
            "rope_parameters": {
                "full_attention": {**rope, "rope_theta": model.rope_theta},
                "sliding_attention": {"rope_type": "default", "rope_theta": local},
            },
        }
    is_new = _needs_new_rope(model, family)
    return values | {
        "rope_theta": None if is_new else model.rope_theta,
        "rope_scaling": None if is_new or scaling.kind == "none" else old or rope,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
    }


def same_function(a: ModelConfig, b: ModelConfig) -> list[str]:
    """A line `KEY: A's value against B's value` for every setting that differs, so that equal
    parameters would compute different functions."""
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
