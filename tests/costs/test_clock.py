"""The compiler's clock: HLO programs with known times, and one compiled by libtpu."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from btx_jax.costs.chips import CHIPS
from btx_jax.costs.clock import Traffic, place_of, read_clock
from btx_jax.costs.program import read_program
from btx_jax.planning.compile_check import topology_devices
from tests.costs.test_hlo import IN_PIECES
from tests.costs.test_links import Slice, a_slice

V5E = CHIPS["TPU v5 lite"]
WHERE = a_slice(V5E, 2, 2)
MICROSECOND = 1500  # in cycles
# 4 devices in a square, two links each, through which 12 of 16 MB arrive
GATHER = 0.75 * 16e6 / (2 * V5E.link)


def cycles(microseconds):
    return (
        f'backend_config={{"window_config":{{"estimated_cycles":"{microseconds * MICROSECOND}"}}}}'
    )


def loop(*body):
    """A loop of five iterations over lines of HLO about %x, 4 MB, and %all, its gather of 16 MB."""
    lines = "\n  ".join(body)
    trips = 'backend_config={"known_trip_count":{"n":"5"}}'
    return f"""HloModule step, is_scheduled=true

%work (p: bf16[2000000]) -> bf16[2000000] {{
  %p = bf16[2000000]{{0:S(1)}} parameter(0)
  ROOT %n = bf16[2000000]{{0:S(1)}} negate(%p)
}}

%body (s: (s32[], bf16[2000000])) -> (s32[], bf16[2000000]) {{
  %s = (s32[], bf16[2000000]{{0:S(1)}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[2000000]{{0:S(1)}} get-tuple-element(%s), index=1
  {lines}
  ROOT %t = (s32[], bf16[2000000]{{0:S(1)}}) tuple(%i, %x)
}}

%condition (s: (s32[], bf16[2000000])) -> pred[] {{
  %s = (s32[], bf16[2000000]) parameter(0)
  ROOT %true = pred[] constant(true)
}}

ENTRY %main (x: bf16[2000000]) -> (s32[], bf16[2000000]) {{
  %x = bf16[2000000]{{0:S(1)}} parameter(0)
  %zero = s32[] constant(0)
  %first = (s32[], bf16[2000000]{{0:S(1)}}) tuple(%zero, %x)
  ROOT %w = (s32[], bf16[2000000]{{0:S(1)}}) while(%first), condition=%condition, body=%body, {trips}
}}
"""


def work(name, microseconds):
    place = 'metadata={op_name="jit(f)/jvp(Llama)/while/body/layers_0/ffn/dot_general"}'
    called = "fusion(%x), kind=kLoop, calls=%work"
    return f"%{name} = bf16[2000000]{{0:S(1)}} {called}, {place}, {cycles(microseconds)}"


GROUPS = "replica_groups={{0,1,2,3}}, dimensions={0}"
SYNC = f"%all = bf16[8000000]{{0:S(1)}} all-gather(%x), {GROUPS}"
START = f"%g = (bf16[2000000]{{0:S(1)}}, bf16[8000000]{{0:S(1)}}) all-gather-start(%x), {GROUPS}"
DONE = "%all = bf16[8000000]{0:S(1)} all-gather-done(%g)"


def read(text, kernel_seconds=lambda _: 0.0):
    return read_clock(text, V5E, WHERE, kernel_seconds)


def gathers(text):
    return read(text).collectives["all-gather", False]


def test_cycles_count_with_the_trips_of_their_loop_and_have_a_place():
    clock = read(loop(work("a", 30), work("b", 10)))
    assert clock.seconds == clock.cycles == pytest.approx(5 * 40e-6)
    assert clock.by_place["forward layers_0/ffn dot_general", "a"] == pytest.approx(5 * 30e-6)


def test_a_synchronous_collective_is_exposed_whole():
    clock = read(loop(work("a", 1000), SYNC))
    assert clock.collectives["all-gather", False] == Traffic(0, 5, 0.0, pytest.approx(5 * GATHER))
    assert clock.seconds == pytest.approx(5 * (GATHER + 1e-3))


def test_collectives_are_told_apart_by_the_place_they_serve():
    place = 'metadata={op_name="jit(f)/jvp(Llama)/while/body/layers_0/ffn/all_gather"}'
    own = SYNC.replace("%all", "%own")
    clock = read(loop(f"{own}, {place}", START, work("a", 1000), DONE))
    sync = clock.by_site["all-gather", False, "forward layers_0/ffn all_gather"]
    assert sync == Traffic(0, 5, 0.0, pytest.approx(5 * GATHER))
    assert clock.by_site["all-gather", False, ""].asynchronous == 5
    whole = clock.collectives["all-gather", False]
    assert (whole.asynchronous, whole.synchronous) == (5, 5)
    assert whole.exposed == pytest.approx(clock.exposed) == pytest.approx(5 * GATHER)


def test_of_an_asynchronous_one_what_its_computation_does_not_cover_is():
    covered = gathers(loop(START, work("a", 1000), DONE))
    assert covered == Traffic(5, 0, pytest.approx(5 * GATHER), pytest.approx(0))
    part = gathers(loop(work("before", 1000), START, work("a", 50), DONE, work("after", 1000)))
    assert part == Traffic(5, 0, pytest.approx(5 * 50e-6), pytest.approx(5 * (GATHER - 50e-6)))


def test_a_collective_on_a_sparse_core_runs_beside():
    """In the form of libtpu's offloading: a call on another thread."""
    offloaded = """%offloaded (p: bf16[2000000]) -> bf16[8000000] {
  %p = bf16[2000000]{0:S(1)} parameter(0)
  ROOT %all-gather.1 = bf16[8000000]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

%body"""
    start = (
        "%g = ((bf16[2000000]{0:S(1)}), bf16[8000000]{0}) call-start(%x),"
        ' async_execution_thread="sparsecore", to_apply=%offloaded'
    )
    text = loop(start, work("a", 100), "%all = bf16[8000000]{0} call-done(%g)")
    text = text.replace("%body", offloaded, 1)
    assert gathers(text) == Traffic(5, 0, pytest.approx(5e-4), pytest.approx(5 * (GATHER - 1e-4)))
    (counted,) = read_program(text).collectives
    assert (counted.kind, counted.trips, counted.bytes) == ("all-gather", 5, 16e6)


def test_two_under_way_share_the_links():
    second = [line.replace("%g", "%h").replace("%all", "%other") for line in (START, DONE)]
    both = gathers(loop(START, second[0], work("a", 200), DONE, second[1]))
    assert both.hidden == pytest.approx(5 * 200e-6)
    assert both.exposed == pytest.approx(5 * (2 * GATHER - 200e-6))


def test_copies_fetched_ahead_take_the_memory_not_the_links():
    start = "%c = (bf16[2000000]{0:S(1)}, bf16[2000000]{0}, u32[]) copy-start(%m)"
    made = "%m = bf16[2000000]{0} get-tuple-element(%s), index=1"
    done = "%d = bf16[2000000]{0:S(1)} copy-done(%c)"
    clock = read(loop(made, start, START, work("a", 3), done, DONE))
    copy = 4e6 / V5E.bandwidth  # one end is on the chip
    assert clock.copies == pytest.approx(5 * (copy - 3e-6))
    assert clock.collectives["all-gather", False].hidden == pytest.approx(5 * copy), (
        "the links are busy while a copy is waited for"
    )


def test_what_goes_to_the_host_takes_its_own_way():
    """In the form of a layer's input written to a stack of them in the host's memory."""
    stack = "bf16[5,2000000]{1,0:S(5)}"
    start = (
        f"%d = (({stack}, bf16[1,2000000]{{1,0}}, s32[]), {stack}, u32[]{{:S(2)}})"
        " dynamic-update-slice-start(%x, %x, %i)"
    )
    done = f"%kept = {stack} dynamic-update-slice-done(%d)"
    needed = 4e6 / V5E.host
    covered = read(loop(start, work("a", 1000), done))
    assert covered.copies == pytest.approx(0)
    late = read(loop(start, START, work("a", 50), DONE, done))
    waited = late.collectives["all-gather", False].exposed / 5  # the host's way goes on meanwhile
    assert late.copies == pytest.approx(5 * (needed - 50e-6 - waited))
    fetched = (
        f"%d = (({stack}, s32[], s32[]), bf16[1,2000000]{{1,0}}, u32[]{{:S(2)}})"
        " dynamic-slice-start(%x, %i, %i)"
    )
    done = "%kept = bf16[1,2000000]{1,0} dynamic-slice-done(%d)"
    assert read(loop(fetched, done, work("a", 1))).copies == pytest.approx(5 * needed)


def test_what_has_no_cycles_takes_the_memorys_time():
    clock = read(loop(work("a", 1), "%m = bf16[2000000]{0} concatenate(%x), dimensions={0}"))
    assert clock.moves == pytest.approx(5 * 4e6 / V5E.bandwidth)


def test_kernels_take_what_the_caller_says():
    call = '%k.1 = bf16[2000000]{0} custom-call(%x), custom_call_target="tpu_custom_call"'
    clock = read(loop(work("a", 1), call), lambda kernel: {"k": 2e-3}[kernel.name])
    assert clock.kernels == pytest.approx(5 * 2e-3)


def test_what_a_fusion_takes_along_moves_only_while_it_runs():
    flag = r'backend_config={"async_collective_fusion_config":{"flag_start":"\1","flag_end":"8"}}'
    text = re.sub(r"FLAG\((-?\d)\)", flag, IN_PIECES).replace("step\n", "step, is_scheduled=true\n")
    text = text.replace("bf16[2,8]", "bf16[2000000]").replace("bf16[8,8]", "bf16[8000000]")
    text = text.replace("calls=%piece", f"calls=%piece, {cycles(50)}")
    clock = read(text)
    assert clock.cycles == pytest.approx(50e-6)
    assert clock.collectives["all-gather", False] == Traffic(
        1, 0, pytest.approx(50e-6), pytest.approx(GATHER - 50e-6)
    )


def test_an_all_reduce_fused_with_a_slice_is_one_reduce_scatter():
    fused = """%all-reduce-scatter.1 (p: bf16[2000000]) -> bf16[500000] {
  %p = bf16[2000000]{0:S(1)} parameter(0)
  %r = bf16[2000000]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %d = bf16[500000]{0} dynamic-slice(%r), dynamic_slice_sizes={500000}
}

%body"""
    call = "%f = bf16[500000]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    clock = read(loop(work("a", 1), call).replace("%body", fused, 1))
    took = 5 * 0.75 * 4e6 / (2 * V5E.link)
    assert clock.collectives["reduce-scatter", False] == Traffic(0, 5, 0.0, pytest.approx(took))
    assert clock.moves == 0


@pytest.mark.parametrize(
    ("op_name", "place"),
    [
        ("jit(train_step)/while/body/closed_call/jvp(Llama)/while/body/closed_call/layers_0/ffn/"
         "shard_map/dot_general", "forward layers_0/ffn dot_general"),
        ("jit(train_step)/transpose(jvp(Llama))/while/body/closed_call/checkpoint/layers_0/"
         "attention_norm/div", "backward layers_0/attention_norm div"),
        ("jit(train_step)/add", "add"),
        ("jit(step)/transpose(jvp(Llama))/while/body/dynamic_slice", "backward dynamic_slice"),
        ("", ""),
    ],
)  # fmt: skip
def test_places_are_told_by_our_names(op_name, place):
    assert place_of(op_name) == place


def test_a_program_without_cycles_is_an_error():
    text = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()
    with pytest.raises(ValueError, match="was not compiled for a TPU"):
        read(text)


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_a_product_that_libtpu_compiles_takes_about_its_peak(topology):
    """Detects a clock that is off by two, or that counts one of a chip's two cores."""
    devices = topology_devices(topology, 1)
    chip = CHIPS[devices[0].device_kind]
    mesh = Mesh(devices[:1], ("x",))
    x = jax.ShapeDtypeStruct(
        (4096, 4096), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec())
    )
    text = jax.jit(lambda x, w: x @ w).lower(x, x).compile().as_text()
    clock = read_clock(text, chip, Slice.of(devices[:1], chip), lambda _: 0.0)
    assert 0.6 < read_program(text).dot_flops / chip.flops / clock.seconds < 1
