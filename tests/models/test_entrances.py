"""Inputs of a model, a kernel or a router with a wrong rank, shape or dtype are reported while
tracing."""

import re

import jax
import jax.numpy as jnp
import pytest

from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import LayerSpec, ModelConfig
from btx_jax.mixing.mix import mix_params
from btx_jax.models.attention import attend
from btx_jax.models.decoding import Cache, forward
from btx_jax.models.llama import Llama, init_params
from btx_jax.models.moe import MoEFeedForward
from btx_jax.models.routing import Choice, place, route
from btx_jax.models.splash import splash_attend

MODEL = ModelConfig(vocab_size=16, layers=1, d_model=8, d_ff=8, heads=2, kv_heads=1, head_dim=4)
FP32 = ComputeConfig(dtype="float32")
SPEC = LayerSpec(4, 2, "top_k")
INT, FLOAT, BOOL = jnp.int32, jnp.float32, jnp.bool_


def of(*shape, dtype=FLOAT):
    return jax.ShapeDtypeStruct(shape, dtype)


def llama(tokens, segments):
    return Llama(MODEL, FP32).init(jax.random.key(0), tokens, segments)


def moe(x, valid):
    return MoEFeedForward(8, SPEC, FP32).init(jax.random.key(0), x, valid, jnp.int32(0))


def routed(logits, valid):
    return route(logits, valid, SPEC, None, jnp.int32(0))


def placed(gate, index):
    return place(Choice(gate, index, jnp.zeros((1, 8, 4))), 4, 4)


def splash(q, k, v, segments):
    return splash_attend(q, k, v, segments, 0, interpret=True)


def decoded(tokens, count, length):
    return forward(MODEL, FP32, ({}, ()), tokens, count, Cache((), (), length))


HEADS = [of(2, 1, 2, 128, 4), of(2, 1, 128, 4), of(2, 1, 128, 4), of(2, 128, dtype=INT)]


@pytest.mark.parametrize(
    ("function", "right", "number", "wrong", "told"),
    [
        (llama, [of(2, 8, dtype=INT)] * 2, 0, of(8, dtype=INT), "rank"),
        (llama, [of(2, 8, dtype=INT)] * 2, 1, of(2, 9, dtype=INT), "different shape"),
        (llama, [of(2, 8, dtype=INT)] * 2, 0, of(2, 8), "type"),
        (attend, HEADS, 0, of(2, 2, 128, 4), "rank"),
        (attend, HEADS, 1, of(2, 1, 1, 128, 4), "shape"),
        (attend, HEADS, 3, of(128, dtype=INT), "shape"),
        (splash, HEADS, 0, of(2, 2, 128, 4), "rank"),
        (splash, HEADS, 2, of(2, 128, 4), "shape"),
        (moe, [of(2, 8, 8), of(2, 8, dtype=BOOL)], 0, of(8, 8), "rank"),
        (moe, [of(2, 8, 8), of(2, 8, dtype=BOOL)], 1, of(2, 9, dtype=BOOL), "different shape"),
        (moe, [of(2, 8, 8), of(2, 8, dtype=BOOL)], 1, of(2, 8, dtype=INT), "type"),
        (routed, [of(1, 8, 4), of(1, 8, dtype=BOOL)], 0, of(8, 4), "rank"),
        (routed, [of(1, 8, 4), of(1, 8, dtype=BOOL)], 1, of(8, 1, dtype=BOOL), "different shape"),
        (routed, [of(1, 8, 4), of(1, 8, dtype=BOOL)], 0, of(1, 8, 4, dtype=jnp.bfloat16), "type"),
        (placed, [of(1, 8, 2), of(1, 8, 2, dtype=INT)], 1, of(8, 2, dtype=INT), "rank"),
        (placed, [of(1, 8, 2), of(1, 8, 2, dtype=INT)], 0, of(1, 8, 1), "different shape"),
    ],
)
def test_a_wrong_rank_shape_or_dtype_is_told(function, right, number, wrong, told):
    jax.eval_shape(function, *right)
    with pytest.raises(AssertionError, match=re.compile(told, re.IGNORECASE)):
        jax.eval_shape(function, *right[:number], wrong, *right[number + 1 :])


@pytest.mark.parametrize(
    ("tokens", "count", "length", "told"),
    [
        (of(8, dtype=INT), of(2, dtype=INT), of(2, dtype=INT), "rank"),
        (of(2, 8, dtype=INT), of(1, 2, dtype=INT), of(2, dtype=INT), "rank"),
        (of(2, 8, dtype=INT), of(2, dtype=INT), of(3, dtype=INT), "different shape"),
        (of(2, 8), of(2, dtype=INT), of(2, dtype=INT), "type"),
    ],
)
def test_decoding_tells_it_before_it_looks_at_weights(tokens, count, length, told):
    with pytest.raises(AssertionError, match=re.compile(told, re.IGNORECASE)):
        jax.eval_shape(decoded, tokens, count, length)


def test_mixing_names_the_leaf_whose_rank_differs():
    params = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    gate = params["layers_0"]["ffn"]["gate"]
    wrong = {**params["layers_0"]["ffn"], "gate": of(*gate.shape[1:])}
    other = {**params, "layers_0": {**params["layers_0"], "ffn": wrong}}
    with pytest.raises(ValueError, match="layers_0/ffn/gate differs between the models"):
        jax.eval_shape(lambda *models: mix_params(models, {}), params, other)
