"""One strict table from logical axis names to mesh axes, for parameters, optimizer state and activations.

A sharding mistake changes no number, only speed and memory, so nothing downstream would notice it: everything here raises.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from btx_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "expert", "tensor")

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp", "expert"),  # tokens spread over every device but those of the tensor axis
    "group": ("data", "fsdp", "expert"),  # routing groups are cut from the batch
    "expert_group": ("data", "fsdp"),  # the same tokens once the expert axis holds experts: the flip is the all-to-all
    # parameters
    "layer": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "norm": None,
    "expert": "expert",
    "hidden": "tensor",
    "router": None,
}


def resolve(names: Sequence[str | None], mesh_axes: Sequence[str] = MESH_AXES) -> P:
    """Logical axis names -> PartitionSpec.

    Raises KeyError for a name without a rule, ValueError for a mesh axis that is unknown or used twice.
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
                raise ValueError(f"rule {name!r} uses mesh axis {axis!r}; the mesh has {tuple(mesh_axes)}")
            if axis in used:
                raise ValueError(f"{tuple(names)} puts two dimensions on mesh axis {axis!r}")
            used.append(axis)
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    return P(*spec)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation under the mesh that the caller has set; outside any mesh, x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, resolve(names, mesh.axis_names))


def make_mesh(shape: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """(data, fsdp, expert, tensor) -> Mesh with Auto axes; Linen's constraints fail under jax's default, Explicit."""
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices)


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Boxed abstract parameters (`jax.eval_shape` of a Linen init) -> tree of NamedSharding, unboxed.

    Raises UserError, naming the leaf, when a dimension does not divide over its mesh axes, and ValueError when a parameter
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
                    f"config.mesh: {where} has {size} along {name!r}, not divisible by the {parts} devices of {axes}; change the mesh"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned | nn.LogicallyPartitioned))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """[batch, ...] arrays: rows over data, fsdp and expert."""
    return NamedSharding(mesh, resolve(("batch",), mesh.axis_names))
