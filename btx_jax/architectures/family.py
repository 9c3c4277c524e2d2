"""How a Hugging Face model family is declared: the tensors of its files, the keys of its
config.json, and which models it can represent. families/ has one file for each family."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from btx_jax.architectures.folding import folded
from btx_jax.config.model_config import ModelConfig

ATTENTION_MAPS, FEED_FORWARD_MAPS = ("q", "k", "v", "o"), ("gate", "up", "down")
ALL_SCALINGS = ("none", "linear", "llama3", "longrope", "dynamic", "yarn")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file, or a pattern for one per layer ({l}) or per expert ({e}).

    parts: the names of our tensors that it holds, concatenated along the rows. stacked: whether it
    holds all experts of a layer, on a leading axis.
    """

    name: str
    parts: tuple[str, ...]
    stacked: bool = False


def tensor(name: str, *parts: str, stacked: bool = False) -> Tensor:
    """Declare a tensor that every layer has."""
    return Tensor(f"model.layers.{{l}}.{name}", parts, stacked)


@dataclass(frozen=True)
class Constant:
    """A tensor that the class requires but our models lack, in every layer or, with of_experts, in
    those with experts. Filled with `value`, it does not change what the class computes. Stored in
    float32."""

    name: str
    value: float
    shape: Callable[[ModelConfig], tuple[int, ...]]
    of_experts: bool = False


OUTSIDE = (
    Tensor("model.embed_tokens.weight", ("embed/embedding",)),
    Tensor("model.norm.weight", ("final_norm/scale",)),
    Tensor("lm_head.weight", ("head/kernel",)),
)
NORMS = (
    tensor("input_layernorm.weight", "attention_norm/scale"),
    tensor("post_attention_layernorm.weight", "ffn_norm/scale"),
)
_PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
ATTENTION = (
    *(tensor(f"self_attn.{name}.weight", f"attention/{our}") for name, our in _PROJECTIONS.items()),
    *(
        tensor(f"self_attn.{name}.bias", f"attention/{our}_bias")
        for name, our in _PROJECTIONS.items()
    ),
)
POST_NORMS = (
    tensor("post_attention_layernorm.weight", "attention_post_norm/scale"),
    tensor("post_feedforward_layernorm.weight", "ffn_post_norm/scale"),
)
QK_NORM = (
    tensor("self_attn.q_norm.weight", "attention/query_norm/scale"),
    tensor("self_attn.k_norm.weight", "attention/key_norm/scale"),
)


def swiglu(prefix: str, into: str) -> tuple[Tensor, ...]:
    """Tensors PREFIX.gate_proj.weight, up_proj and down_proj, which hold INTO/gate, up and down;
    with biases for the dense feed-forward, swiglu("mlp", "ffn")."""
    return tuple(
        tensor(f"{prefix}.{name}_proj.{kind}", f"{into}/{name}{'_bias' * (kind == 'bias')}")
        for name in FEED_FORWARD_MAPS
        for kind in ("weight", "bias")
        if kind == "weight" or (into, prefix) == ("ffn", "mlp")
    )


DENSE = swiglu("mlp", "ffn")
LLAMA_TENSORS = (*OUTSIDE, *NORMS, *ATTENTION, *DENSE)
# The layout that transformers 5 keeps in memory and mergekit writes: gate rows first.
FUSED_EXPERTS = (
    tensor("mlp.experts.gate_up_proj", "ffn/gate", "ffn/up", stacked=True),
    tensor("mlp.experts.down_proj", "ffn/down", stacked=True),
)

SHARED_OF_ZEROS = 128  # width of a shared expert of zeros; device meshes divide it

# ModelConfig field -> config.json key, in every family.
KEYS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied_head": "tie_word_embeddings",
}
# Numeric fields of ModelConfig that have no effect at their defaults; a family may have keys for
# them in config.json.
NUMBERS = (
    *("embed_scale", "residual_scale", "attention_scale", "attention_cap", "logits_divisor"),
    "logits_cap",
)
# ModelConfig fields that a family fixes -> description of a model with another value.
_FIXED: Mapping[str, Callable[[Any], str]] = {
    "norm": lambda kind: f"norms of kind {kind}",
    "norms": lambda place: f"norms {place.replace('both', 'before and after')} its blocks",
    "qk_norm": lambda has: f"attention {'with' if has else 'without'} norms on queries and keys",
    "qk_norm_kind": lambda kind: f"norms on queries and keys of kind {kind}",
    "rope_interleaved": lambda is_so: f"RoPE of {'neighbours' if is_so else 'halves'}",
}
_USUAL = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
SILU = {"silu": "silu", "swish": "silu"}  # two names for the same function


@dataclass(frozen=True)
class MoEKeys:
    """The config.json keys of a mixture; "" for a key that the class does not have.

    experts: names of the key for the number of experts; any is read, the first is written.
    d_ff: width of an expert; without it, experts are as wide as dense layers.
    renormalise: whether gates are normalised to sum to one; without it, they are.
    shared_d_ff: width of the shared expert.
    shared_count: its width as a multiple of d_ff, in classes that specify it that way.
    none_shared: value of shared_count where there is no shared expert.
    has_shared_gate: whether a sigmoid gate multiplies the shared expert's output.
    needs_shared: whether the class requires a shared expert.
    dense_list, step, dense_first: keys that determine which layers stay dense.
    last: index of the last layer with experts, or -1 for the last layer.
    renormalises_one: whether renormalisation also applies with k = 1, where it makes the gate one.
    shares_one: whether the class always has a shared expert, as wide as the others.
    """

    experts: tuple[str, ...]
    k: str = "num_experts_per_tok"
    d_ff: str = ""
    renormalise: str = ""
    shared_d_ff: str = ""
    shared_count: str = ""
    has_shared_gate: bool = False
    needs_shared: bool = False
    dense_list: str = ""
    step: str = ""
    dense_first: str = ""
    last: str = ""
    renormalises_one: bool = True
    shares_one: bool = False
    none_shared: int | None = None

    @property
    def may_be_zero(self) -> tuple[str, ...]:
        return self.dense_first, self.shared_count

    @property
    def has_shared(self) -> bool:
        return bool(self.shared_d_ff or self.shared_count or self.shares_one)

    @property
    def has_dense_layers(self) -> bool:
        return bool(self.dense_list or self.dense_first)

    def all(self) -> Iterator[str]:
        """Yield every key name."""
        yield from self.experts
        for key in dataclasses.astuple(self)[1:]:
            if isinstance(key, str) and key:
                yield key


@dataclass(frozen=True, eq=False)
class Family:
    """A `model_type` of Hugging Face.

    model_class: the class named under `architectures`.
    tensors: the tensors of its files, as read and written.
    also: alternative names, read only.
    constants: further tensors of the files that our models lack.
    defaults: the values that transformers assumes for keys absent from config.json.
    biases: boolean key -> the maps to which it adds biases; "" for maps that always have one.
    synonyms: alternative name of a key -> its name.
    maths: ModelConfig fields that the family fixes.
    activation_key, activations: the activation's key, and its values -> ModelConfig's.
    numbers: ModelConfig number -> its key in config.json.
    query_scalar: key of a number n such that attention_scale is n ** -0.5.
    embeds_by_width: whether embeddings are multiplied by the square root of the width.
    window: when `sliding_window` applies: never (""), always ("always"), or if
        `use_sliding_window` is set ("switched").
    window_layers: the layers with a window: "all" (ignoring `layer_types`) or, unless
        `layer_types` says otherwise, all ("typed"), those from `max_window_layers` on ("from"),
        the even ones below it ("even"), those without RoPE ("nope"), or all but one in every
        full_every ("spaced").
    full_every, full_every_key, full_first: period of the layers without a window, its key, and
        whether the first of a period has none rather than the last.
    full_rotates: whether layers without a window have RoPE in a model that has windows.
    local_theta: RoPE base of layers with a window, where it differs; these are never scaled.
    local_theta_key: the key that older releases use for local_theta.
    nope: key of a list that says for each layer whether it has RoPE.
    nope_every_key: without that list, key of a period n: the last of every n layers has no RoPE.
    nope_thetas: whether the list holds RoPE bases.
    rotary: default fraction of each head that RoPE rotates; 0 if it always rotates the whole head.
    grows_queries: whether RopeScaling's query_growth is supported.
    scalings: the supported kinds of RoPE scaling.
    moe: the keys of a mixture; None for dense families.
    home: model_type that represents a mixture of these models; "" if none is known.
    fixed: keys that change the computation -> the values that are supported.
    usual: further keys to write, with their values.
    since: first release of transformers that has the family; "" for remote code.
    head_dim_since, scaling_since: first release that reads independent head sizes, and scaled RoPE;
        earlier ones ignore them silently and compute something else.
    fallback: rank among the families tried when no other fits; 0 to exclude it.
    whole_heads: whether the width must be a multiple of the number of heads.
    own_head_dim: whether the head size may differ from width / heads.
    peft_default: modules that peft adapts when a LoRA's config names none; () if it must name them.
    """

    model_type: str
    model_class: str
    tensors: tuple[Tensor, ...] = LLAMA_TENSORS
    also: tuple[Tensor, ...] = ()
    constants: tuple[Constant, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    synonyms: Mapping[str, str] = field(default_factory=dict)
    maths: Mapping[str, Any] = field(default_factory=dict)
    activation_key: str = "hidden_act"
    activations: Mapping[str, str] = field(default_factory=lambda: SILU)
    numbers: Mapping[str, str] = field(default_factory=dict)
    query_scalar: str = ""
    embeds_by_width: bool = False
    window: str = ""
    window_layers: str = "all"
    full_every: int = 0
    full_every_key: str = ""
    full_first: bool = False
    full_rotates: bool = True
    local_theta: float = 0.0
    local_theta_key: str = ""
    nope: str = ""
    nope_every_key: str = ""
    nope_thetas: bool = False
    rotary: float = 0.0
    grows_queries: bool = False
    scalings: tuple[str, ...] = ALL_SCALINGS
    moe: MoEKeys | None = None
    home: str = ""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)
    since: str = "4.42.0"
    head_dim_since: str = "4.43.0"
    scaling_since: str = ""
    fallback: int = 0
    whole_heads: bool = False
    own_head_dim: bool = True
    peft_default: tuple[str, ...] = ()

    def always_biased(self) -> tuple[str, ...]:
        return self.biases.get("", ())

    def lacks(self, model: ModelConfig) -> list[str]:
        """Features of the model that checkpoints of this class cannot represent, as short phrases;
        [] if they can represent the model, possibly with added zeros (`filled`)."""
        told = []
        groups = list(self.biases.values())
        for name in model.biases:
            group = next((group for group in groups if name in group), ())
            if not group:
                told.append(f"a bias on {name}")
                continue
            missing = [other for other in group if other not in model.biases]
            if missing and group != self.always_biased():
                told.append(f"a bias on {name} and none on {', '.join(missing)}")
        told += self._lacks_of_maths(model)
        if model.window and not self.window:
            told.append(f"a window of {model.window}")
        elif model.window_layers and not self._has_window_in(model):
            told.append(f"a window in layers {', '.join(map(str, model.window_layers))} alone")
        if model.window_theta and not self.local_theta:
            told.append(f"a RoPE base of {model.window_theta:g} in layers with a window alone")
        if self.full_rotates and model.nope_layers and not self.nope:
            told.append(f"layers without RoPE ({', '.join(map(str, model.nope_layers))})")
        if not self.full_rotates and model.window and not _rotates_in_windows(model):
            told.append("other layers without RoPE than those without a window")
        if model.rope_scaling.query_growth and not self.grows_queries:
            told.append("queries that grow with their position")
        if model.rotary != 1 and not self.rotary:
            told.append(f"heads of which {model.rotary:g} rotates")
        if model.rope_scaling.kind not in self.scalings:
            told.append(f"RoPE scaling {model.rope_scaling.kind}")
        if self.whole_heads and model.d_model % model.heads:
            told.append(f"a width of {model.d_model} with {model.heads} heads")
        elif not self.own_head_dim and model.heads * model.head_dim != model.d_model:
            told.append(f"heads of {model.head_dim}, {model.heads} in a width of {model.d_model}")
        if (model.moe is None) != (self.moe is None):
            told.append("experts" if model.moe else "a model without experts")
        elif model.moe and self.moe:
            told += self._lacks_of_mixture(model, self.moe)
        return told

    def _lacks_of_maths(self, model: ModelConfig) -> Iterator[str]:
        for name, told in _FIXED.items():
            value = getattr(model, name)
            if value != self.maths.get(name, _USUAL[name]) and not (
                name == "norm" and self.folds_norms_of(model)
            ):
                yield told(value)
        if model.activation not in self.activations.values():
            yield f"the activation {model.activation}"
        held = {*self.numbers, *(["attention_scale"] if self.query_scalar else [])}
        for name in NUMBERS:
            value, usual = getattr(model, name), _USUAL[name]
            if name == "embed_scale" and self.embeds_by_width:
                usual = model.d_model**0.5
            if value != usual and name not in held:
                yield f"{name}={value:g}"

    def folds_norms_of(self, model: ModelConfig) -> bool:
        """Whether the family can hold a mixture with LayerNorms by folding them into RMSNorms
        (folding.py)."""
        usual = self.maths.get("norm", _USUAL["norm"]) == "rms" and not model.qk_norm
        return usual and self.moe is not None and (model.norm, model.norms) == ("layer", "before")

    def _has_window_in(self, model: ModelConfig) -> bool:
        """Whether the family can express which of the model's layers have a window."""
        if self.window_layers == "from":  # as in releases without layer_types
            return model.window_layers == tuple(range(model.window_layers[0], model.layers))
        return self.window_layers in ("typed", "nope", "spaced")

    def _lacks_of_mixture(self, model: ModelConfig, keys: MoEKeys) -> list[str]:
        assert model.moe
        told = []
        specs = [spec for spec in model.layer_specs() if spec.experts]
        dense = [not spec.experts for spec in model.layer_specs()]
        kinds = {(spec.experts, spec.k) for spec in specs}
        if "switch" in {spec.routing for spec in specs} or len(kinds) > 1:
            described = sorted({f"{s.experts} experts {s.routing} k={s.k}" for s in specs})
            told.append(
                f"other than the same top-k mixture in every layer ({', '.join(described)})"
            )
        if any(dense) and not keys.has_dense_layers:
            told.append("dense layers among the mixtures")
        elif keys.dense_first and not keys.dense_list and dense != sorted(dense, reverse=True):
            told.append("dense layers after mixtures")
        if model.moe.d_ff not in (0, model.d_ff) and not keys.d_ff and any(dense):
            told.append("experts of a different width from dense layers")
        if not all(spec.renormalise for spec in specs) and not keys.renormalise:
            told.append("gates that do not sum to one")
        if any(spec.k == 1 and spec.renormalise for spec in specs) and not keys.renormalises_one:
            told.append("one expert for a token with a gate of one")
        if model.moe.anchor:
            told.append("an anchor, beside which the router adds a bias to each expert's logit")
        shared = specs[0].shared_d_ff
        if shared and not keys.has_shared:
            told.append("a shared expert")
        elif shared and model.moe.shared_gate != keys.has_shared_gate:
            told.append(f"a shared expert {'with a' if model.moe.shared_gate else 'without'} gate")
        elif shared and keys.shares_one and shared != specs[0].d_ff:
            told.append(f"a shared expert of {shared} beside others of {specs[0].d_ff}")
        elif shared and keys.shared_count and shared % specs[0].d_ff:
            told.append(f"a shared expert of {shared}, which is not a multiple of {specs[0].d_ff}")
        return told

    def filled(self, model: ModelConfig) -> ModelConfig:
        """The model with the parameters added that this class cannot omit: zero biases, a shared
        expert of zeros, and norm scales of one. They do not change what the model computes."""
        biases = tuple(dict.fromkeys((*model.biases, *self.always_biased())))
        moe = model.moe
        keys = self.moe
        if moe and keys and (keys.needs_shared or keys.shares_one) and not moe.shared_d_ff:
            width = moe.d_ff or model.d_ff
            width = width if keys.shares_one else min(SHARED_OF_ZEROS, width)
            moe = dataclasses.replace(moe, shared_d_ff=width, shared_gate=keys.has_shared_gate)
        model = folded(model) if self.folds_norms_of(model) else model
        return dataclasses.replace(model, biases=biases, moe=moe)


def _rotates_in_windows(model: ModelConfig) -> bool:
    """Whether the layers with a window have RoPE and no others do."""
    specs = model.layer_specs()
    return all(bool(spec.window) == bool(spec.rope_theta) for spec in specs)
