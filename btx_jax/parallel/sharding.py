"""One strict table from logical axis names to mesh axes, for parameters, optimizer state and
activations.

A sharding mistake changes no number, only speed and memory, so nothing downstream would notice it:
everything here raises.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": (
        "data",
        "fsdp",
        "expert",
    ),  # rows spread over every device but those of the tensor and context axes
    "sequence": "context",
    "group": (
        "context",
        "data",
        "fsdp",
        "expert",
    ),  # routing groups are cut from the batch (`sequence.groups`)
    "expert_group": (
        "context",
        "data",
        "fsdp",
    ),  # the same tokens once the expert axis holds experts: the flip is the all-to-all
    # parameters
    "replica": "data",  # devices that hold the same parameters
    "layer": None,
    "vocab": "tensor",
    "embed": (
        "fsdp",
        "expert",
        "context",
    ),  # what is not an expert is also cut over the expert axis, which would hold copies of it
    "expert_embed": ("fsdp", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "norm": None,
    "expert": "expert",
    "hidden": "tensor",
    "router": None,
    "lora_expert": None,
    "rank": None,
}


Names = Sequence[str | None]  # logical axes of an array, None where it is not cut


def inference_mesh(model: ModelConfig) -> Mesh:
    """This process's devices along `tensor`, as many as divide the model: rows of any number stay
    whole, weights are spread."""
    devices = jax.local_devices()
    inner = {width for spec in model.layer_specs() for width in (spec.d_ff, spec.shared_d_ff)}
    widths = (model.vocab_size, model.heads, model.kv_heads, *inner)
    count = max(n for n in range(1, len(devices) + 1) if all(width % n == 0 for width in widths))
    return make_mesh((1, 1, 1, count), devices[:count])


def resolve(names: Sequence[str | None], mesh_axes: Sequence[str] = MESH_AXES) -> P:
    """Logical axis names -> PartitionSpec.

    Raises KeyError for a name without a rule, ValueError for a mesh axis that is unknown or used
    twice.
    """
    used: list[str] = []
    spec: list[Any] = []
    for name in names:
        if name is not None and name not in RULES:
            raise KeyError(f"no sharding rule for logical axis {name!r}; known: {', '.join(RULES)}")
        rule = RULES[name] if name is not None else None
        axes = (rule,) if isinstance(rule, str) else rule or ()
        for axis in axes:
            if axis not in mesh_axes:
                raise ValueError(
                    f"rule {name!r} uses mesh axis {axis!r}; the mesh has {tuple(mesh_axes)}"
                )
            if axis in used:
                raise ValueError(f"{tuple(names)} puts two dimensions on mesh axis {axis!r}")
            used.append(axis)
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    return P(*spec)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation under the mesh that the caller has set; outside any mesh, x
    itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, resolve(names, mesh.axis_names))


def shard_map(
    function: Callable, in_names: Sequence[Names], out_names: Names | tuple[Names, ...]
) -> Callable:
    """`function` run by each device on its own part of every argument (jax.shard_map), under the
    mesh that the caller has set; on one device, or outside any mesh, function itself. Names of
    trailing axes that are not cut may be left out.

    Layers that hold weights run in it and say what they gather and sum. Left alone, the compiler
    gathers a weight again for each of its uses and all-reduces gradients of which every device
    needs a part; kernels it cannot cut at all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    specs = tuple(resolve(names, mesh.axis_names) for names in in_names)
    several = not isinstance(out_names[0], str)
    outs: Any = out_names if several else (out_names,)
    resolved = tuple(resolve(names, mesh.axis_names) for names in outs)
    out = resolved if several else resolved[0]
    return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)


def _axes(name: str) -> tuple[str, ...]:
    """Mesh axes of a logical axis that cut anything."""
    rule = RULES[name]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return ()
    return tuple(
        axis for axis in ((rule,) if isinstance(rule, str) else rule or ()) if mesh.shape[axis] > 1
    )


def all_gather(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Inside `shard_map`: all parts of an array axis that is cut over logical axis `name`. Its
    gradient is reduce-scattered."""
    axes = _axes(name)
    return _gather(x, axes, axis) if axes else x


def psum(x: jax.Array, name: str) -> jax.Array:
    """Inside `shard_map`: the sum over the devices of logical axis `name`, whole on each."""
    return jax.lax.psum(x, axes) if (axes := _axes(name)) else x


def psum_scatter(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Inside `shard_map`: the sum over the devices of logical axis `name`, cut along `axis`."""
    return _scatter(x, axes, axis) if (axes := _axes(name)) else x


def pmax(x: jax.Array, name: str) -> jax.Array:
    """Inside `shard_map`: the elementwise maximum over the devices of logical axis `name`."""
    return jax.lax.pmax(x, axes) if (axes := _axes(name)) else x


def axis_index(name: str) -> jax.Array | int:
    """Inside `shard_map`: this device's place along logical axis `name`."""
    return jax.lax.axis_index(axes) if (axes := _axes(name)) else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scatter(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """A reduce-scatter in stages. In one stage over all chips of a slice, the TPU compiler makes it
    an all-reduce: twice the traffic. It does so as well when axes of one element come before the
    one that is cut."""
    mesh = jax.sharding.get_abstract_mesh()
    if x.shape[0] == 1 and axis > 0:
        return _scatter(x[0], axes, axis - 1)[None]
    for name in axes:
        size = mesh.shape[name]
        inner = (
            next((n for n in range(math.isqrt(size), 1, -1) if size % n == 0), 1)
            if size == mesh.size
            else 1
        )
        # Device number outer * inner + i holds part `outer` after the first stage and piece i of it
        # after the second.
        apart = [[i + inner * o for o in range(size // inner)] for i in range(inner)]
        together = [[i + inner * o for i in range(inner)] for o in range(size // inner)]
        for groups in (apart, together) if inner > 1 else (None,):
            x = jax.lax.psum_scatter(
                x, name, scatter_dimension=axis, axis_index_groups=groups, tiled=True
            )
    return x


_gather.defvjp(
    lambda x, axes, axis: (_gather(x, axes, axis), None),
    lambda axes, axis, _, dy: (_scatter(dy, axes, axis),),
)
_scatter.defvjp(
    lambda x, axes, axis: (_scatter(x, axes, axis), None),
    lambda axes, axis, _, dy: (_gather(dy, axes, axis),),
)


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """(data, fsdp, expert, tensor, context) -> Mesh with Auto axes; Linen's constraints fail under
    jax's default, Explicit. Axes that are left out at the end are 1.

    Over several slices the data axis is what crosses from one to another, so that only gradients
    do. Raises UserError when it cannot.
    """
    auto = (AxisType.Auto,) * len(MESH_AXES)
    shape = (*shape, *[1] * (len(MESH_AXES) - len(shape)))
    slices = len(
        {
            getattr(device, "slice_index", 0)
            for device in (jax.devices() if devices is None else devices)
        }
    )
    if slices == 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types=auto, devices=devices)
    data, *rest = shape
    if data % slices:
        raise UserError(
            f"config.mesh.data={data}: must be a multiple of the {slices} slices, between which"
            " only gradients should travel"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (data // slices, *rest), (slices, *[1] * len(rest)), devices=devices
    )
    return Mesh(grid, MESH_AXES, axis_types=auto)


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Boxed abstract parameters (`jax.eval_shape` of a Linen init) -> tree of NamedSharding,
    unboxed.

    Raises UserError, naming the leaf, when a dimension does not divide over its mesh axes, and
    ValueError when a parameter
    carries no logical names: it would be replicated without a word.
    """

    def one(path, box):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(box, nn.LogicallyPartitioned):
            raise ValueError(f"parameter {where} has no logical axis names")
        spec = resolve(box.names, mesh.axis_names)
        for size, name, axes in zip(box.value.shape, box.names, spec, strict=True):
            parts = 1
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                parts *= mesh.shape[axis]
            if size % parts:
                raise UserError(
                    f"config.mesh: {where} has {size} along {name!r}, not divisible by the {parts}"
                    f" devices of {axes}; change the mesh"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
        one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned | nn.LogicallyPartitioned)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[batch, ...] arrays: rows over data, fsdp and expert."""
    return NamedSharding(mesh, resolve(("batch",), mesh.axis_names))
