"""One strict table from logical axis names to mesh axes, for parameters, optimizer state and
activations.

A sharding mistake affects speed and memory but no result, so nothing downstream would notice it.
Everything here therefore raises on error.
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
    ),  # rows are spread over all axes but `tensor` and `context`
    "sequence": "context",
    "group": (
        "context",
        "data",
        "fsdp",
        "expert",
    ),  # routing groups, cut from the batch (`sequence.groups`)
    "expert_group": (
        "context",
        "data",
        "fsdp",
    ),  # the same groups while the expert axis shards experts: the change is an all-to-all
    # parameters
    "replica": "data",  # devices that hold the same parameters
    "layer": None,
    "vocab": "tensor",
    "embed": (
        "fsdp",
        "expert",
        "context",
    ),  # also over the expert axis, along which these weights would otherwise be replicated
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

# device kind -> most chips in one stage of a gather, on slices of more than twice as many. Sparse
# cores of a v6e can gather while matmuls run only along a line of chips; of a gather over 64 chips
# of v5p the compiler makes an all-reduce, with twice the traffic.
IN_ONE_STAGE = {"TPU v5": 16, "TPU v6 lite": 8}

Stage = tuple[str | tuple[str, ...], list[list[int]] | None]  # mesh axes, groups of their devices
Names = Sequence[str | None]  # logical axes of an array; None for an unsharded dimension


def inference_mesh(model: ModelConfig) -> Mesh:
    """A mesh of this process's devices along `tensor`, as many as the model divides over. Weights
    are sharded and batches are not, so any number of rows works."""
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
    """Constrain an activation's sharding under the current mesh; without a mesh, return x
    unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, resolve(names, mesh.axis_names))


def shard_map(
    function: Callable, in_names: Sequence[Names], out_names: Names | tuple[Names, ...]
) -> Callable:
    """Run `function` on each device's shard of every argument (jax.shard_map), under the current
    mesh. On one device, or without a mesh, return `function` itself. Names of trailing unsharded
    axes may be omitted.

    Layers with weights run inside it and state explicitly what they gather and sum. Left to itself,
    the compiler gathers a weight again for each use, and all-reduces gradients of which each device
    needs only a shard; it cannot partition Pallas kernels at all.
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
    """The mesh axes of a logical axis, leaving out those with a single device."""
    rule = RULES[name]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return ()
    return tuple(
        axis for axis in ((rule,) if isinstance(rule, str) else rule or ()) if mesh.shape[axis] > 1
    )


def all_gather(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Inside `shard_map`: gather array axis `axis`, sharded over logical axis `name`. Its gradient
    is reduce-scattered."""
    axes = _axes(name)
    return _gather(x, axes, axis) if axes else x


def psum(x: jax.Array, name: str) -> jax.Array:
    """Inside `shard_map`: the sum over the devices of logical axis `name`, replicated."""
    return jax.lax.psum(x, axes) if (axes := _axes(name)) else x


def psum_scatter(x: jax.Array, name: str, axis: int) -> jax.Array:
    """Inside `shard_map`: the sum over the devices of logical axis `name`, sharded along `axis`."""
    return _scatter(x, axes, axis) if (axes := _axes(name)) else x


def pmax(x: jax.Array, name: str) -> jax.Array:
    """Inside `shard_map`: the elementwise maximum over the devices of logical axis `name`."""
    return jax.lax.pmax(x, axes) if (axes := _axes(name)) else x


def axis_index(name: str) -> jax.Array | int:
    """Inside `shard_map`: this device's index along logical axis `name`."""
    return jax.lax.axis_index(axes) if (axes := _axes(name)) else 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """Gather in one stage, which uses all links, or in several where the compiler handles large
    gathers badly (IN_ONE_STAGE). On a slice of 16 v6e chips one stage suffices, because JAX lays
    them out as a ring."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device
    most = IN_ONE_STAGE.get(device.device_kind, mesh.size) if device else mesh.size
    chips = math.prod(mesh.shape[name] for name in axes)
    stages: list[Stage] = [(axes, None)]
    if chips > most and mesh.size > 2 * most:
        stages = _stages(axes)[::-1]
    for name, groups in stages:
        x = jax.lax.all_gather(x, name, axis=axis, axis_index_groups=groups, tiled=True)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scatter(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """Reduce-scatter in stages. The TPU compiler turns a single stage over all chips of a slice
    into an all-reduce, with twice the traffic; it does the same when axes of size one precede the
    sharded axis."""
    if x.shape[0] == 1 and axis > 0:
        return _scatter(x[0], axes, axis - 1)[None]
    for name, groups in _stages(axes):
        x = jax.lax.psum_scatter(
            x, name, scatter_dimension=axis, axis_index_groups=groups, tiled=True
        )
    return x


def _stages(axes: tuple[str, ...]) -> list[Stage]:
    """Stages of a reduce-scatter, one per axis; a gather has the same stages in reverse order.

    An axis that spans all chips of a slice takes two stages. They divide the array by device number
    = outer * inner + i: the first into parts by `outer`, the second each part into pieces by i.
    """
    mesh = jax.sharding.get_abstract_mesh()
    stages: list[Stage] = []
    for name in axes:
        size = mesh.shape[name]
        inner = 1
        if size == mesh.size:
            inner = next((n for n in range(math.isqrt(size), 1, -1) if size % n == 0), 1)
        if inner == 1:
            stages.append((name, None))
            continue
        apart = [[i + inner * o for o in range(size // inner)] for i in range(inner)]
        together = [[i + inner * o for i in range(inner)] for o in range(size // inner)]
        stages += [(name, apart), (name, together)]
    return stages


_gather.defvjp(
    lambda x, axes, axis: (_gather(x, axes, axis), None),
    lambda axes, axis, _, dy: (_scatter(dy, axes, axis),),
)
_scatter.defvjp(
    lambda x, axes, axis: (_scatter(x, axes, axis), None),
    lambda axes, axis, _, dy: (_gather(dy, axes, axis),),
)


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of shape (data, fsdp, expert, tensor, context). Its axes are Auto, since Linen's
    constraints fail under jax's default, Explicit. Trailing axes that are left out are 1; a mesh
    smaller than the number of devices takes the first ones.

    With several slices, the data axis spans them, so that only gradients cross between slices.
    Raises UserError if it cannot.
    """
    auto = (AxisType.Auto,) * len(MESH_AXES)
    shape = (*shape, *[1] * (len(MESH_AXES) - len(shape)))
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # JAX splits physical axes only as a last resort: on 8x8 chips, fsdp=16 expert=4 needs it, since
    # two mesh axes must share a torus axis.
    if slices == 1:
        taken = devices[: math.prod(shape)]
        grid = mesh_utils.create_device_mesh(shape, taken, allow_split_physical_axes=True)
        return Mesh(grid, MESH_AXES, axis_types=auto)
    data, *rest = shape
    if data % slices:
        raise UserError(
            f"config.mesh.data={data}: must be a multiple of the {slices} slices, as only"
            " gradients should be sent between slices"
        )
    grid = mesh_utils.create_hybrid_device_mesh(
        (data // slices, *rest),
        (slices, *[1] * len(rest)),
        devices=devices,
        allow_split_physical_axes=True,
    )
    return Mesh(grid, MESH_AXES, axis_types=auto)


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Tree of NamedSharding (unboxed) for boxed abstract parameters, as from `jax.eval_shape` of a
    Linen init.

    Raises UserError, naming the leaf, if a dimension does not divide over its mesh axes, and
    ValueError for a parameter without logical names, which would otherwise be replicated silently.
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
    """Sharding of [batch, ...] arrays: rows over data, fsdp and expert."""
    return NamedSharding(mesh, resolve(("batch",), mesh.axis_names))
