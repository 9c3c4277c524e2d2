import dataclasses

import jax
import numpy as np
import pytest

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import MoEConfig
from btx_jax.evaluation.explain import explain, pieces
from btx_jax.models.llama import Llama, init_params
from btx_jax.parallel.sharding import make_mesh
from tests.models.test_llama import TINY

COMPUTE = ComputeConfig(dtype="float32", remat="none", dispatch="ragged")
MIXED = dataclasses.replace(
    TINY, vocab_size=320, moe=MoEConfig((0, 4, 2))
)  # a dense layer, then two runs of MoE layers


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 2, 1)])
def test_every_token_has_the_experts_that_the_model_chose_for_it(shape, tokenizer):
    params = jax.tree.map(
        lambda x: x * 5 if x.ndim > 2 else x, init_params(MIXED, jax.random.key(0))
    )
    texts = {
        "short": tokenizer.encode("the river"),
        "long": tokenizer.encode("a mountain of paper " * 3),
    }
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    found = explain(MIXED, COMPUTE, params, tokenizer, texts, mesh)
    assert list(found) == ["short", "long"]
    whole = jax.jit(Llama(MIXED, COMPUTE, keep_choices=True).apply)
    for name, ids in texts.items():
        stats = whole({"params": params}, np.array([ids]), np.ones((1, len(ids)), np.int32))[1]
        text = found[name]
        assert text["layers"] == [1, 2]
        for number, run in enumerate(stats.values()):
            assert text["experts"][number] == run.choice.index_GSK[0, 0].tolist()
            np.testing.assert_allclose(text["gates"][number], run.choice.gate_GSK[0, 0], atol=1e-4)
        assert "".join(text["pieces"]) == tokenizer.decode(ids)
        assert len(text["pieces"]) == len(ids)


def test_a_character_of_several_tokens_is_shown_at_its_last_one(tokenizer):
    text = "a 東 city"
    ids = tokenizer.encode(text)
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == text
    assert sum(piece == "" for piece in shown) >= 2, "three bytes, two of which show nothing"
    assert not any("\ufffd" in piece for piece in shown)


def test_bytes_that_are_no_character_are_shown_once(tokenizer):
    first, second = (tokenizer.encode(character)[-1] for character in "éö")  # second bytes
    ids = [*tokenizer.encode("the"), first, second, first, *tokenizer.encode("é city"), first]
    shown = pieces(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "".join(shown) == tokenizer.decode(ids)
