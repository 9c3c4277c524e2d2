import jax
import numpy as np
import pytest

from btx_jax.mixing.split import split_ffn
from btx_jax.models.llama import init_params
from tests import reference
from tests.models.test_llama import TINY


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_all_chunks_at_weight_one_are_the_original_block(chunks):
    ffn = init_params(TINY, jax.random.key(0))["layers_0"]["ffn"]
    parts = split_ffn(ffn, chunks)
    assert parts["gate"].shape == (3, chunks, 32, 48 // chunks)
    assert parts["down"].shape == (3, chunks, 48 // chunks, 32)
    x = jax.random.normal(jax.random.key(1), (5, 32))
    for layer in range(3):
        want = reference.swiglu(x, *(ffn[n][layer] for n in ("gate", "up", "down")))
        got = sum(reference.swiglu(x, *(parts[n][layer, c] for n in ("gate", "up", "down"))) for c in range(chunks))
        np.testing.assert_allclose(got, want, atol=1e-6)
    with pytest.raises(ValueError, match="d_ff=48 is not divisible into 5"):
        split_ffn(ffn, 5)
