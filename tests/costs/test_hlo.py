"""FLOPs and collectives read from compiled programs, compared with their known work."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.costs.collectives import groups_of
from btx_jax.costs.hlo import Instruction
from btx_jax.costs.program import read_program
from btx_jax.parallel.sharding import all_gather, make_mesh, psum_scatter, resolve, shard_map

N = jax.sharding.NamedSharding


def program(function, *shapes):
    return read_program(jax.jit(function).lower(*shapes).compile().as_text())


def test_dots_count_with_the_trips_of_every_loop_around_them():
    w = jax.ShapeDtypeStruct((5, 32, 32), jnp.float32)
    x = jax.ShapeDtypeStruct((7, 16, 32), jnp.float32)

    def f(x, w):
        inner = lambda h: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, w)[0]  # noqa: E731
        return jax.lax.map(inner, x)

    assert program(f, x, w).dot_flops == 7 * 5 * 2 * 16 * 32 * 32


def test_products_of_int8_are_counted_apart():
    found = read_program("""HloModule step, is_scheduled=true

ENTRY %main (a: s8[16,32], b: s8[32,8], c: bf16[16,32], d: bf16[32,8]) -> (s32[16,8], f32[16,8]) {
  %a = s8[16,32]{1,0} parameter(0)
  %b = s8[32,8]{1,0} parameter(1)
  %c = bf16[16,32]{1,0} parameter(2)
  %d = bf16[32,8]{1,0} parameter(3)
  %e = s32[16,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %f = f32[16,8]{1,0} dot(%c, %d), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %g = (s32[16,8]{1,0}, f32[16,8]{1,0}) tuple(%e, %f)
}
""")
    each = 2 * 16 * 32 * 8
    assert (found.dot_flops, found.int8_flops) == (2 * each, each)


def test_collectives_count_with_trips_and_groups():
    mesh = make_mesh((1, 2, 4, 1))
    w = jax.ShapeDtypeStruct((3, 64, 16), jnp.float32, sharding=N(mesh, resolve((None, "embed"))))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=N(mesh, resolve(("batch",))))

    def f(x, w):
        def one(x, w):
            def local(x, w):
                return jnp.sin(x @ all_gather(w, "embed", 0)) @ all_gather(w, "embed", 0).T

            return shard_map(local, (("batch",), ("embed",)), ("batch",))(x, w), None

        return jax.lax.scan(one, x, w)[0].sum()

    with jax.set_mesh(mesh):
        counted = program(jax.grad(f, argnums=1), x, w)
    size = 64 * 16 * 4
    gathers = [c for c in counted.collectives if c.kind == "all-gather"]
    scatters = [c for c in counted.collectives if c.kind == "reduce-scatter"]
    assert {c.group_size for c in gathers} == {8}
    assert {(c.bytes, c.trips % 3) for c in gathers} == {(size, 0)}
    assert sum(c.wire_bytes for c in gathers) == pytest.approx(
        sum(c.trips for c in gathers) * size * 7 / 8
    )
    assert scatters, "the gradient of a gathered weight is reduce-scattered, not all-reduced"
    assert not [c for c in counted.collectives if c.kind == "all-reduce" and c.bytes >= size]


def test_a_gather_in_one_axis_and_its_gradient_in_stages_are_right():
    mesh = make_mesh((1, 8, 1, 1))
    w = jax.random.normal(jax.random.key(0), (16, 4))
    x = jax.random.normal(jax.random.key(1), (8, 16))
    local = lambda x, w: jnp.sin(x @ all_gather(w, "embed", 0))  # noqa: E731

    def loss(w):
        return (shard_map(local, (("batch",), ("embed",)), ("batch",))(x, w) ** 2).sum()

    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(loss))(w)
    np.testing.assert_allclose(got, jax.grad(lambda w: (jnp.sin(x @ w) ** 2).sum())(w), atol=1e-5)
    with jax.set_mesh(mesh):
        summed = jax.jit(shard_map(lambda x: psum_scatter(x, "embed", 0), ((None,),), ("embed",)))(
            w
        )
    np.testing.assert_allclose(summed, 8 * w, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[4], x", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", ((0, 2), (1, 3))),
        ("source_target_pairs={{0,1},{1,0}}, x", ((0, 1), (1, 0))),
    ],
)
def test_groups_in_every_notation(text, groups):
    assert groups_of(Instruction("x", "all-reduce", [], [], ", " + text, "")) == groups
    with pytest.raises(ValueError, match="its groups cannot be parsed"):
        groups_of(Instruction("x", "all-reduce", [], [], ", replica_groups=new", ""))


@pytest.mark.parametrize(
    ("lhs", "rhs", "stride", "padding"),
    [((2, 5, 5, 3), (3, 3, 3, 4), 1, "SAME"), ((2, 8, 8, 3), (2, 2, 3, 4), 2, "VALID")],
)
def test_convolutions_count_only_taps_on_elements(lhs, rhs, stride, padding):
    dims = ("NHWC", "HWIO", "NHWC")

    def f(x, k):
        return jax.lax.conv_general_dilated(x, k, (stride, stride), padding, dimension_numbers=dims)

    x, k = jnp.ones(lhs), jnp.ones(rhs)
    # For inputs of ones, each output is the number of taps on elements times the input features.
    assert program(f, x, k).dot_flops == 2 * float(f(x, k).sum())


def test_a_loop_without_a_readable_count_is_an_error():
    f = lambda x: jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x, x)  # noqa: E731
    with pytest.raises(ValueError, match="trip count cannot be derived"):
        program(f, jnp.ones((4, 4)))


IN_PIECES = """
HloModule step

%start (p: bf16[2,8]) -> (bf16[2,8], bf16[8,8]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, FLAG(-1)
  ROOT %c = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%piece (p: bf16[2,8], q: bf16[8,8], x: f32[4,16], w: f32[16,4]) -> (f32[4,4], bf16[2,8], bf16[8,8], bf16[8,8]) {
  %p = bf16[2,8]{1,0} parameter(0)
  %q = bf16[8,8]{1,0} parameter(1)
  %x = f32[4,16]{1,0} parameter(2)
  %w = f32[16,4]{1,0} parameter(3)
  %dot.1 = f32[4,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, FLAG(2)
  ROOT %t = (f32[4,4]{1,0}, bf16[2,8]{1,0}, bf16[8,8]{1,0}, bf16[8,8]{1,0}) tuple(%dot.1, %p, %q, %all-gather.2)
}

%done (p: bf16[2,8], q: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  %q = bf16[8,8]{1,0} parameter(1)
  %all-gather.3 = bf16[8,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, FLAG(2)
  ROOT %d = bf16[8,8]{1,0} custom-call(%p, %q, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[2,8], x: f32[4,16], w: f32[16,4]) -> bf16[8,8] {
  %a = bf16[2,8]{1,0} parameter(0)
  %x = f32[4,16]{1,0} parameter(1)
  %w = f32[16,4]{1,0} parameter(2)
  %s = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) fusion(%a), kind=kCustom, calls=%start
  %s0 = bf16[2,8]{1,0} get-tuple-element(%s), index=0
  %s1 = bf16[8,8]{1,0} get-tuple-element(%s), index=1
  %f = (f32[4,4]{1,0}, bf16[2,8]{1,0}, bf16[8,8]{1,0}, bf16[8,8]{1,0}) fusion(%s0, %s1, %x, %w), kind=kCustom, calls=%piece
  %f1 = bf16[2,8]{1,0} get-tuple-element(%f), index=1
  %f2 = bf16[8,8]{1,0} get-tuple-element(%f), index=2
  ROOT %r = bf16[8,8]{1,0} fusion(%f1, %f2), kind=kCustom, calls=%done
}
"""


def test_a_gather_hidden_behind_several_fusions_happens_once():
    """In libtpu's form, abbreviated: each fusion contains the whole gather."""
    flag = r'backend_config={"async_collective_fusion_config":{"flag_start":"\1","flag_end":"8"}}'
    counted = read_program(re.sub(r"FLAG\((-?\d)\)", flag, IN_PIECES))
    assert [(c.bytes, c.trips, c.group_size) for c in counted.collectives] == [(2 * 64, 1, 4)]
    assert counted.dot_flops == 2 * 4 * 4 * 16
    gathered, multiplied = 2 * 16 + (2 * 16 + 2 * 64), 4 * (64 + 64 + 16)
    assert counted.memory_bytes == gathered + multiplied


NESTED = """
HloModule step

%cut (stack: bf16[32,8,8], i: s32[]) -> bf16[1,8,8] {
  %stack = bf16[32,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = bf16[1,8,8]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), \
dynamic_slice_sizes={1,8,8}
}

%put (stack: bf16[32,8,8], x: bf16[1,8,8], i: s32[]) -> bf16[32,8,8] {
  %stack = bf16[32,8,8]{2,1,0} parameter(0)
  %x = bf16[1,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = bf16[32,8,8]{2,1,0} dynamic-update-slice(%stack, %x, %i, %zero, %zero)
}

%outer (stack: bf16[32,8,8], out: bf16[32,8,8], i: s32[]) -> bf16[32,8,8] {
  %stack = bf16[32,8,8]{2,1,0} parameter(0)
  %out = bf16[32,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %bitcast = bf16[32,8,8]{2,1,0} bitcast(%stack)
  %inner = bf16[1,8,8]{2,1,0} fusion(%bitcast, %i), kind=kLoop, calls=%cut
  ROOT %written = bf16[32,8,8]{2,1,0} fusion(%out, %inner, %i), kind=kLoop, calls=%put
}

ENTRY %main (stack: bf16[32,8,8], out: bf16[32,8,8], i: s32[]) -> bf16[32,8,8] {
  %stack = bf16[32,8,8]{2,1,0} parameter(0)
  %out = bf16[32,8,8]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = bf16[32,8,8]{2,1,0} fusion(%stack, %out, %i), kind=kOutput, calls=%outer
}
"""


def test_what_a_nested_fusion_slices_counts_by_the_slice():
    """As libtpu reads one layer's input from the stack of all layers: one layer is read and one
    written."""
    layer, index = 2 * 8 * 8, 4
    assert read_program(NESTED).memory_bytes == 2 * layer + index
