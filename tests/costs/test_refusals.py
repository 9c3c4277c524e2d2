"""libtpu's out-of-memory errors, as worded by versions 0.0.30 to 0.0.50."""

import pytest

from btx_jax.costs.refusals import Refusal, read_refusal

G, M = 2**30, 2**20


@pytest.mark.parametrize(
    ("message", "refusal"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
            " hbm. Used 38.90G of 31.25G hbm. Exceeded hbm capacity by 7.65G.",
            Refusal(False, 38.9 * G, 31.25 * G),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
            " temporaries (44.13G) exceeds available HBM (31.25G).",
            Refusal(False, 44.13 * G, 31.25 * G),
        ),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total"
            " memory required for HLO temporaries (1.50T) exceeds available HBM (31.24G). HLO"
            " module: jit_f.",
            Refusal(False, 1536 * G, 31.24 * G),
        ),
        (
            "RESOURCE_EXHAUSTED: Allocation (size=536870912) would exceed memory (size=134217728)"
            " :: #allocation2 [shape = 'f32[65536,2048]{1,0:T(8,128)}', space=vmem, scoped]",
            Refusal(True, 512 * M, 128 * M),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack"
            " for %fusion. Scoped allocation with size 17.00M and limit 16.00M exceeded scoped vmem"
            " limit by 1.00M.",
            Refusal(True, 17 * M, 16 * M),
        ),
        ("RESOURCE_EXHAUSTED: in words of a later version", Refusal(False, None, None)),
        ("INTERNAL: the compiler fell over", None),
    ],
    ids=range(7),
)
def test_refusals(message, refusal):
    assert read_refusal(message) == refusal
