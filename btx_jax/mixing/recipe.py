"""Recipes: which models become which mixture. A mergekit-moe YAML is one; the keys that follow its
own are ours."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from btx_jax.config_dict import from_dict
from btx_jax.errors import ConfigError, UserError
from btx_jax.model_config import MoEConfig

PROMPT_MODES = ("cheap_embed", "hidden", "hidden_avg", "router_input")
KEPT = "mergekit_moe_config.yml"  # a mixture's recipe beside its weights, as mergekit-moe keeps it
GATE_MODES = ("normal", "random", "uniform_random", *PROMPT_MODES)
DIFFERENCES = (
    "vocab_size",
    "heads",
    "kv_heads",
    "head_dim",
    "rope_theta",
    "rope_scaling",
    "norm_eps",
    "tied_head",
    "tokenizer",
)


@dataclass(frozen=True)
class ExpertSource:
    """One expert: a dense model and, for gate modes that read prompts, what should be routed to it.

    positive_prompts_file, negative_prompts_file: more prompts, one a line. noise_scale: standard
    deviation of normal noise added to its feed-forward weights. residual_scale: factor on its down
    projection.
    """

    source_model: str
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    positive_prompts_file: str = ""
    negative_prompts_file: str = ""
    noise_scale: float = 0.0
    residual_scale: float = 1.0

    def __post_init__(self):
        if not 0 <= self.noise_scale < 1e3:
            raise ConfigError(f"noise_scale={self.noise_scale}: must lie in [0, 1000)")
        if not math.isfinite(self.residual_scale):
            raise ConfigError(f"residual_scale={self.residual_scale}: must be finite")
        for kind in ("positive_prompts", "negative_prompts"):
            if file := getattr(self, f"{kind}_file"):
                try:
                    lines = Path(file).read_text(encoding="utf-8").splitlines()
                except (OSError, ValueError) as error:
                    raise ConfigError(f"{kind}_file={file!r}: {error}") from error
                object.__setattr__(
                    self, kind, (*getattr(self, kind), *(line for line in lines if line.strip()))
                )


@dataclass(frozen=True)
class Recipe:
    """A mixture of experts.

    base: where everything but the feed-forwards comes from: `copy` (base_model, as mergekit does)
    or `average` (the mean of all distinct experts' models, as Branch-Train-MiX does; list the seed
    among the experts to include it).
    method: `stack` (one expert per source), `split` (each source's feed-forward cut into `chunks`
    experts) or `blend` (expert n is the n-th of N chunks of every source); the latter two are
    ablations of the BTX paper, section 4.4.
    merge: how `average` averages: `mean`, `ties` (arXiv 2306.01708: keep the `density` largest
    changes from base_model, elect signs, mean of those that agree) or `dare` (arXiv 2311.03099:
    drop changes at random down to `density`, rescale, mean).
    layers: the layers that become mixtures; the others stay dense. Empty for all.
    gate_mode: how routers start; `hidden` when base is copy, `normal` (std 0.02, to be trained)
    when it is average.
    gate_pooling, gate_scale: of router_input: `mean` over tokens or `last`; the length of every
    router row.
    allow: settings in which sources may differ from base_model although it changes what their
    weights mean.
    """

    base_model: str
    experts: tuple[ExpertSource, ...]
    gate_mode: str = ""
    dtype: str = ""
    experts_per_token: int = 2
    base: str = "copy"
    method: str = "stack"
    chunks: int = 2
    merge: str = "mean"
    density: float = 0.2
    layers: tuple[int, ...] = ()
    gate_pooling: str = "mean"
    gate_scale: float = 1.0
    allow: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if not self.gate_mode:
            object.__setattr__(self, "gate_mode", "hidden" if self.base == "copy" else "normal")
        for key, known in (
            ("gate_mode", GATE_MODES),
            ("dtype", ("", "float32", "bfloat16", "float16")),
            ("base", ("copy", "average")),
            ("method", ("stack", "split", "blend")),
            ("merge", ("mean", "ties", "dare")),
            ("gate_pooling", ("mean", "last")),
        ):
            if getattr(self, key) not in known:
                raise ConfigError(
                    f"{key}={getattr(self, key)!r}: known are {', '.join(filter(None, known))}"
                )
        for key in self.allow:
            if key not in DIFFERENCES:
                raise ConfigError(
                    f"allow: {key!r} cannot be allowed; known are {', '.join(DIFFERENCES)}"
                )
        if not self.experts:
            raise ConfigError("experts: none named")
        if self.method == "split" and self.chunks < 2:
            raise ConfigError(f"chunks={self.chunks}: must be at least 2")
        if not 0 < self.gate_scale < math.inf:
            raise ConfigError(f"gate_scale={self.gate_scale}: must be positive and finite")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed}: must not be negative")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density}: must lie in (0, 1]")
        if self.gate_scale != type(self).gate_scale and self.gate_mode != "router_input":
            raise ConfigError(
                f"gate_scale={self.gate_scale}: of gate_mode router_input; leave it out"
            )
        if self.density != type(self).density and self.merge == "mean":
            raise ConfigError(
                f"density={self.density}: of merge ties and dare; leave it out or name one"
            )
        if self.merge != "mean" and self.base != "average":
            raise ConfigError(
                f"merge={self.merge!r}: says how to average, so it needs base: average"
            )
        if self.method == "split" and self.layers:
            raise ConfigError(
                "method: split makes narrower feed-forwards, which all layers must share; leave"
                " layers out"
            )
        if self.gate_mode in PROMPT_MODES:
            if self.method != "stack":
                raise ConfigError(
                    f"gate_mode={self.gate_mode!r}: experts of method {self.method!r} belong to no"
                    " source; use normal"
                )
            missing = [
                str(i) for i, expert in enumerate(self.experts) if not expert.positive_prompts
            ]
            if missing:
                raise ConfigError(
                    f"experts[{'], ['.join(missing)}]: no positive_prompts, and"
                    f" gate_mode={self.gate_mode!r} reads them"
                )
            if (
                len(self.experts) > 1
                and len({(e.positive_prompts, e.negative_prompts) for e in self.experts}) == 1
            ):
                raise ConfigError(
                    "experts: all have the same prompts, so that all router rows would be equal;"
                    " use gate_mode: normal"
                )
        MoEConfig((self.expert_count,), self.experts_per_token)

    @property
    def expert_count(self) -> int:
        return len(self.experts) * (self.chunks if self.method == "split" else 1)


class _Loader(yaml.SafeLoader):
    """Refuses a key that appears twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        keys = [
            self.construct_object(key, deep=True)
            for key, _ in pairs
            if key.tag != "tag:yaml.org,2002:merge"
        ]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} appears twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> Recipe:
    """Raises UserError with one line that names key and cure."""
    try:
        values = _without_none(yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader))
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        return from_dict(Recipe, values, "recipe")
    except ConfigError as error:
        line = str(error).replace("recipe.k=", "recipe.experts_per_token=")
        raise UserError(f"{path}: {line}") from None


def expert_sources(mixture: Path) -> list[str]:
    """The model behind each expert of a mixture, by the recipe kept beside its weights; empty where
    there is none, or every expert is made of all."""
    path = mixture / KEPT
    if not path.exists():
        return []
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        sources = [str(expert["source_model"]) for expert in recipe["experts"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}; delete it") from error
    if recipe.get("method") == "blend":
        return []
    chunks = recipe.get("chunks", Recipe.chunks) if recipe.get("method") == "split" else 1
    return [source for source in sources for _ in range(chunks)]


def _without_none(values: Any) -> Any:
    """mergekit writes unset options as null."""
    if isinstance(values, dict):
        return {key: _without_none(value) for key, value in values.items() if value is not None}
    return [_without_none(value) for value in values] if isinstance(values, list) else values


def describe(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)
