"""The small parts of a Llama: RMSNorm, embedding, SwiGLU.

Shape legend for this folder (capital letters name axes, as in x_BTD):
  B batch  T sequence  D model  F hidden  V vocabulary  L layers  H query heads  N key/value heads
  K head dim or choices per token G routing groups  S tokens per group  E experts  C capacity (slots
  per expert and group)  M rows
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from btx_jax.config.model_config import LoRASpec, ModelConfig
from btx_jax.errors import ConfigError
from btx_jax.models import int8
from btx_jax.models.lora import Adapted, adapter_params, cut
from btx_jax.parallel.sequence import TOKENS
from btx_jax.parallel.sharding import psum, shard_map

INIT_STD = 0.02
OLDEST_GPU = 8.0  # compute capability from which on cuDNN has fused attention (Ampere)
OLDEST_JAX = (0, 11, 2)  # before, cuDNN's backward pass also computes a gradient of its mask


def platform_kernels(kernels: str, platform: str | None = None) -> str:
    """Resolve `auto` in ComputeConfig.kernels: for `platform`, or for this process's devices.
    Raises ConfigError for kernels that `platform` does not have."""
    if platform and (mistake := foreign_kernels(kernels, platform)):
        raise ConfigError(mistake)
    if kernels != "auto":
        return kernels
    platform = platform or jax.default_backend()
    if platform == "gpu":
        is_new = compute_capability() >= OLDEST_GPU and jax.__version_info__ >= OLDEST_JAX
        return "cuda" if is_new else "xla"
    return "pallas" if platform == "tpu" else "xla"


def compute_capability() -> float:
    """That of this process's NVIDIA GPUs, such as 9.0; 0 on other devices."""
    device = jax.devices()[0]
    is_nvidia = device.platform == "gpu" and device.device_kind.startswith(("NVIDIA", "Tesla"))
    return float(device.compute_capability) if is_nvidia else 0.0


def foreign_kernels(kernels: str, platform: str) -> str:
    """What is wrong with these kernels on this platform; "" if nothing."""
    home = {"pallas": "tpu", "cuda": "gpu"}.get(kernels, platform)
    if kernels == "cuda" and platform == home and compute_capability() < OLDEST_GPU:
        return (
            f"config.compute.kernels='cuda': needs an NVIDIA GPU of compute capability {OLDEST_GPU}"
            f" or more, not {jax.devices()[0].device_kind}; set it to 'auto'"
        )
    if home != platform:
        return (
            f"config.compute.kernels={kernels!r}: made for a {home.upper()}, and this runs on a"
            f" {platform.upper()}; set it to 'auto'"
        )
    return ""


def platform_dispatch(dispatch: str, platform: str, expert_axis: int) -> str:
    """Resolve `auto` in ComputeConfig.dispatch, for a mesh with `expert_axis` devices along the
    expert axis.

    Ragged drops no tokens and is faster on one device. Across TPUs, einsum's two all-to-alls send
    half the bytes that ragged gathers (docs/tpu.md).
    """
    if dispatch != "auto":
        return dispatch
    return "einsum" if platform == "tpu" and expert_axis > 1 else "ragged"


def normal_param(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    std: float = INIT_STD,
) -> jax.Array:
    """A float32 parameter with logical axis names."""
    init = nn.with_logical_partitioning(nn.initializers.normal(std), axes)
    return cast(jax.Array, module.param(name, init, shape, jnp.float32))


def bias_param(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]
) -> jax.Array:
    """A float32 bias with logical axis names, initialised to zero."""
    init = nn.with_logical_partitioning(nn.initializers.zeros, axes)
    return cast(jax.Array, module.param(name, init, shape, jnp.float32))


def rms_norm(x: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale, computed in float32 and returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    return (
        x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps) * scale_D
    ).astype(x.dtype)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / standard deviation, computed in float32 and returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def scaled_norm(config: ModelConfig, x: jax.Array, scale_D: jax.Array | None) -> jax.Array:
    """The model's norm over the last axis. scale_D: None for a norm without parameters."""
    if scale_D is None:
        return layer_norm(x, config.norm_eps)
    return rms_norm(x, effective_scale(config, scale_D), config.norm_eps)


def effective_scale(config: ModelConfig, scale_D: jax.Array) -> jax.Array:
    """The factor that an RMSNorm multiplies by: scale or 1 + scale, depending on the model."""
    return 1 + scale_D if config.norm == "rms_plus_one" else scale_D


def scale_param(
    module: nn.Module, config: ModelConfig, shape: tuple[int, ...], axes: tuple[str, ...]
) -> jax.Array:
    """A norm's scale as a float32 parameter, initialised so that the norm multiplies by one."""
    fill = nn.initializers.zeros if config.norm == "rms_plus_one" else nn.initializers.ones
    init = nn.with_logical_partitioning(fill, axes)
    return cast(jax.Array, module.param("scale", init, shape, jnp.float32))


class Scale(nn.Module):
    """Holds the scale of a norm that is applied elsewhere."""

    config: ModelConfig
    shape: tuple[int, ...]
    axes: tuple[str, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return scale_param(self, self.config, self.shape, self.axes)


class Norm(nn.Module):
    """`scaled_norm` with its own scale, where the model's norms have one."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _own_norm(self, self.config, x)


class Before(nn.Module):
    """Input of attention or a feed-forward: x, normalised where the model has a norm there."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x if self.config.norms == "after" else _own_norm(self, self.config, x)


class After(nn.Module):
    """x plus y, the output of attention or a feed-forward, normalised where the model has a norm
    there."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        c = self.config
        if c.norms != "before":
            y = _own_norm(self, c, y)
        return x + times(y, c.residual_scale)


def _own_norm(module: nn.Module, config: ModelConfig, x: jax.Array) -> jax.Array:
    scale_D = None
    if config.norm != "layer":
        scale_D = scale_param(module, config, (x.shape[-1],), ("norm",))
    return scaled_norm(config, x, scale_D)


def times(x: jax.Array, factor: float) -> jax.Array:
    """x times a constant rounded to x's dtype."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def capped(x: jax.Array, cap: float) -> jax.Array:
    """Soft cap: cap * tanh(x / cap); x itself for a cap of 0."""
    return cap * jnp.tanh(x / cap) if cap else x


class Readout(NamedTuple):
    """Turns the head's matmul output into logits. Fields as in ModelConfig."""

    divisor: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, config: ModelConfig) -> "Readout":
        return cls(config.logits_divisor, config.logits_cap)

    def logits(self, products: jax.Array) -> jax.Array:
        return capped(products if self.divisor == 1 else products / self.divisor, self.cap)

    def pulled(self, logits: jax.Array, dlogits: jax.Array) -> jax.Array:
        """Gradient with respect to the head's matmul output, from that with respect to the
        logits."""
        if self.cap:
            dlogits = dlogits * (1 - (logits / self.cap) ** 2)
        return dlogits if self.divisor == 1 else dlogits / self.divisor


class Embed(nn.Module):
    vocab_size: int
    d_model: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return normal_param(self, "embedding", (self.vocab_size, self.d_model), ("vocab", "embed"))[
            tokens
        ]


class Head(nn.Module):
    """Holds the kernel [D, V]. The loss multiplies by it in chunks, so that [tokens, V] is never
    held at once."""

    vocab_size: int
    d_model: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return normal_param(self, "kernel", (self.d_model, self.vocab_size), ("embed", "vocab"))


def exact_matmuls(dtype: str) -> contextlib.AbstractContextManager:
    """Context in which float32 matmuls are compiled with full precision, if dtype is float32. By
    default, a TPU rounds the operands to bfloat16."""
    return (
        jax.default_matmul_precision("highest") if dtype == "float32" else contextlib.nullcontext()
    )


@contextlib.contextmanager
def on_mesh(mesh: Mesh, dtype: str) -> Iterator[None]:
    """Context in which a model is compiled and run, sharded over the mesh, with `exact_matmuls`."""
    with jax.set_mesh(mesh), exact_matmuls(dtype):
        yield


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A kernel stored as [outputs, inputs], so that each dot product reads contiguous memory: with
    few rows, reading the weights dominates the time."""

    array: jax.Array

    @classmethod
    def of(cls, kernel_DF: jax.Array) -> "Transposed":
        return cls(kernel_DF.T)


Kernel = jax.Array | Transposed


def matmul(x_MD: jax.Array, kernel_DF: Kernel, out_dtype: Any = None) -> jax.Array:
    """x times a kernel, for inference. A transposed kernel must be bfloat16; XLA's CPU backend is
    fast for it only if the result is float32 and x has more than one row."""
    if not isinstance(kernel_DF, Transposed):
        return jnp.matmul(x_MD, kernel_DF, preferred_element_type=out_dtype)
    rows = jnp.pad(x_MD, ((0, 1), (0, 0))) if len(x_MD) == 1 else x_MD
    y_MF = jax.lax.dot_general(
        rows, kernel_DF.array, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return y_MF[: len(x_MD)].astype(out_dtype or x_MD.dtype)


def activate(a: jax.Array, activation: str) -> jax.Array:
    """Apply an activation function. activation: as in ModelConfig."""
    return jax.nn.silu(a) if activation == "silu" else jax.nn.gelu(a, approximate=True)


def joint_swiglu(
    x_MD: jax.Array,
    gate_up: Kernel,
    down: Kernel,
    gate_up_bias: jax.Array | None = None,
    down_bias: jax.Array | None = None,
    activation: str = "silu",
) -> jax.Array:
    """`swiglu` for inference, with its first two matmuls joined: gate's columns, then up's."""
    h_MF = matmul(x_MD, gate_up, jnp.float32)
    if gate_up_bias is not None:
        h_MF += gate_up_bias
    a_MF, b_MF = jnp.split(h_MF, 2, axis=-1)
    y_MD = matmul((activate(a_MF, activation) * b_MF).astype(x_MD.dtype), down)
    return y_MD if down_bias is None else y_MD + down_bias.astype(y_MD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def swiglu(
    x_MD: jax.Array,
    gate_DF: int8.Kernel,
    up_DF: int8.Kernel,
    down_FD: int8.Kernel,
    activation: str = "silu",
) -> jax.Array:
    """(silu(x gate) * (x up)) down, or with another activation. Leading axes are batched: [E, M, D]
    with [E, D, F] runs E experts.

    The derivative is written out to keep two [M, F] residuals where autodiff keeps four.
    """
    h_MF = activate(int8.product(x_MD, gate_DF), activation) * int8.product(x_MD, up_DF)
    return int8.product(h_MF, down_FD)


def swiglu_forward(x, gate, up, down, activation):
    a, b = (checkpoint_name(int8.product(x, w), "ffn") for w in (gate, up))
    y = int8.product(activate(a, activation) * b, down)
    return y, (x, a, b, gate, up, down)


def swiglu_backward(activation, residuals, dy):
    dx, _, *dw = _scaled_backward(activation, (residuals, jnp.ones((), dy.dtype)), dy)
    return dx, *dw


swiglu.defvjp(swiglu_forward, swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def scaled_swiglu(
    x_MD: jax.Array,
    scale_M: jax.Array,
    gate_DF: int8.Kernel,
    up_DF: int8.Kernel,
    down_FD: int8.Kernel,
    activation: str = "silu",
) -> jax.Array:
    """scale * swiglu(x), row by row.

    Autodiff computes the scale's gradient from the output: <dy, h down>. Here it is <dy down^T, h>,
    which the backward pass computes anyway, so that the output is neither stored nor, under
    rematerialisation, recomputed.
    """
    y_MD = swiglu(x_MD, gate_DF, up_DF, down_FD, activation)
    return y_MD * scale_M[..., None].astype(x_MD.dtype)


def _scaled_forward(x, scale, gate, up, down, activation):
    y, residuals = swiglu_forward(x, gate, up, down, activation)
    return y * scale[..., None].astype(y.dtype), (residuals, scale)


def _activated(a: jax.Array, activation: str) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """(activate(a), a function that returns its derivative)."""
    if activation == "silu":
        s = jax.nn.sigmoid(a)
        return a * s, lambda: s * (1 + a * (1 - s))
    value, pull = jax.vjp(lambda a: activate(a, activation), a)
    return value, lambda: pull(jnp.ones_like(a))[0]


def _scaled_backward(activation, saved, dy):
    residuals, scale_M = saved
    # Without the barrier, XLA shares sigmoid(a) with the forward pass, which then writes it to
    # memory instead of fusing it.
    x, a, b, gate, up, down = jax.lax.optimization_barrier(residuals)
    active, slope = _activated(a, activation)
    h, scale = active * b, scale_M[..., None].astype(dy.dtype)
    dh_unscaled = int8.back_product(dy, down)
    dscale = jnp.sum(dh_unscaled.astype(jnp.float32) * h.astype(jnp.float32), axis=-1).astype(
        scale_M.dtype
    )
    dh = dh_unscaled * scale
    da, db = dh * b * slope(), dh * active
    dx = int8.back_product(da, gate) + int8.back_product(db, up)
    pairs = (x, da, gate), (x, db, up), (h, dy * scale, down)
    return dx, dscale, *(int8.kernel_gradient(*pair) for pair in pairs)


scaled_swiglu.defvjp(_scaled_forward, _scaled_backward)


def sigmoid_gate(x_BTD: jax.Array, router_D1: jax.Array) -> jax.Array:
    """A shared expert's gate, sigmoid(x router), [B, T, 1], float32."""
    logits = jnp.einsum("btd,de->bte", x_BTD.astype(jnp.float32), router_D1, precision="highest")
    return jax.nn.sigmoid(logits)


BIAS_AXES = {"gate": ("hidden",), "up": ("hidden",), "down": ("norm",)}


class FeedForward(nn.Module):
    """Dense feed-forward, SwiGLU or with another activation: x [B, T, D] -> ([B, T, D], router
    logits [B, T, E] of each adapted map that has a router).

    biases: the maps that have one; names other than gate, up and down are ignored. gated: whether
    the output is multiplied by a sigmoid gate of its own, as in shared experts.
    """

    d_ff: int
    biases: tuple[str, ...] = ()
    gated: bool = False
    lora: LoRASpec | None = None
    activation: str = "silu"
    quantize: str = "none"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        d_model = x_BTD.shape[-1]
        gate_DF = normal_param(self, "gate", (d_model, self.d_ff), ("embed", "hidden"))
        up_DF = normal_param(self, "up", (d_model, self.d_ff), ("embed", "hidden"))
        down_FD = normal_param(self, "down", (self.d_ff, d_model), ("hidden", "embed"))
        biases = {
            name: bias_param(
                self, f"{name}_bias", (d_model if name == "down" else self.d_ff,), axes
            ).astype(x_BTD.dtype)
            for name, axes in BIAS_AXES.items()
            if name in self.biases
        }
        widths = {
            "gate": (d_model, self.d_ff),
            "up": (d_model, self.d_ff),
            "down": (self.d_ff, d_model),
        }
        adapters = cut(
            self, self.lora, adapter_params(self, self.lora, widths), x_BTD.shape[:2], x_BTD.dtype
        )

        def local(x_BTD, gate_DF, up_DF, down_FD, *others):
            bias = dict(zip(biases, others, strict=False))
            gate_DF, up_DF, down_FD = (
                int8.gathered(w, "embed", axis, self.quantize)
                for w, axis in ((gate_DF, 0), (up_DF, 0), (down_FD, 1))
            )
            # Two-dimensional operands: XLA's CPU matmul is a third slower on [B, T, D].
            x_MD = x_BTD.reshape(-1, d_model)
            if not others:
                y_MD = swiglu(x_MD, gate_DF, up_DF, down_FD, self.activation)
                return (psum(y_MD.reshape(x_BTD.shape), "hidden"),)
            lora = Adapted(self.lora, adapters.restore(others[len(bias) :]))

            def into(name, w):
                y_MF = int8.trained_product(x_MD, w)
                y_MF = y_MF + bias[name] if name in bias else y_MF
                return lora.plus(name, x_BTD, y_MF.reshape(*x_BTD.shape[:2], -1))

            gate_BTF = checkpoint_name(into("gate", gate_DF), "ffn")
            up_BTF = checkpoint_name(into("up", up_DF), "ffn")
            h_BTF = activate(gate_BTF, self.activation) * up_BTF
            y_MD = int8.trained_product(h_BTF.reshape(-1, h_BTF.shape[-1]), down_FD)
            y_BTD = psum(y_MD.reshape(x_BTD.shape), "hidden")
            if "down" in bias:
                y_BTD += bias["down"]
            y_BTD = lora.plus("down", h_BTF, y_BTD)
            return y_BTD, *(lora.logits[target] for target in adapters.routed)

        names = (
            TOKENS,
            ("embed", "hidden"),
            ("embed", "hidden"),
            ("hidden", "embed"),
            *(BIAS_AXES[name] for name in biases),
            *adapters.names,
        )
        outputs = (TOKENS,) * (1 + len(adapters.routed))
        weights = (w.astype(x_BTD.dtype) for w in (gate_DF, up_DF, down_FD))
        y_BTD, *logits = shard_map(local, names, outputs)(
            x_BTD, *weights, *biases.values(), *adapters.arrays
        )
        if self.gated:
            router_D1 = normal_param(self, "router", (d_model, 1), ("embed", "router"))
            y_BTD = sigmoid_gate(x_BTD, router_D1).astype(y_BTD.dtype) * y_BTD
        return y_BTD, dict(zip(adapters.routed, logits, strict=True))
