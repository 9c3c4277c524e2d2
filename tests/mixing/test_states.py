"""States streamed layer by layer, with one layer in memory, equal those of the whole model, in
every family."""

import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.architectures.tensors import HEAD
from btx_jax.checkpoints.checkpoint import find_checkpoint, open_reader
from btx_jax.mixing.states import forced_states
from btx_jax.mixing.text import Rows
from btx_jax.models.layers import Readout
from btx_jax.models.llama import logits
from tests.architectures import goldens
from tests.architectures.exports import dense_names, load

UNTIED = [
    name
    for name in dense_names()
    if not find_checkpoint(goldens.FOLDER / name).metadata.model.tied_head
]


@pytest.mark.parametrize("name", UNTIED)
def test_what_the_head_gets_gives_the_logits_of_transformers(name):
    model, params = load(goldens.FOLDER / name)
    saved = goldens.expected(name)
    tokens = saved["tokens"]
    rows = Rows(tokens, np.ones_like(tokens), np.zeros_like(tokens, bool))
    heads = []

    def inputs(tensors, states):
        if HEAD in tensors:
            heads.append(states[0])

    reader = open_reader(find_checkpoint(goldens.FOLDER / name))
    for _ in forced_states(model, reader.read, [(None, rows)], inputs):
        pass
    ours = np.asarray(logits(params, jnp.asarray(heads[0]), Readout.of(model)))[0]
    kept = goldens.positions(tokens.shape[1])
    np.testing.assert_allclose(ours[kept], saved["logits"], atol=goldens.TOLERANCE, rtol=0)
