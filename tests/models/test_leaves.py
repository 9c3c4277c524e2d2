"""Properties of a parameter, from its path."""

import jax
import pytest

from btx_jax.models.leaves import (
    computes_in_float32,
    is_anchor,
    is_norm_or_bias,
    is_router,
    stays_float32,
)


@pytest.mark.parametrize(
    ("path", "predicates"),
    [
        ("embed/embedding", {stays_float32}),
        ("final_norm/scale", {stays_float32, computes_in_float32, is_norm_or_bias}),
        ("attention/query_norm/scale", {stays_float32, computes_in_float32, is_norm_or_bias}),
        ("ffn/router", {stays_float32, computes_in_float32, is_router}),
        ("ffn/router_bias", {stays_float32, computes_in_float32, is_router, is_norm_or_bias}),
        ("attention/lora/q/router", {stays_float32, computes_in_float32, is_router}),
        ("attention/query_bias", {is_norm_or_bias}),
        ("ffn/gate", set()),
        ("anchor/gate", {is_anchor}),
        ("head/kernel", set()),
    ],
)
def test_a_leaf_is_told_by_its_names_and_by_jax_s_keys(path, predicates):
    names = path.split("/")
    for predicate in (computes_in_float32, stays_float32, is_norm_or_bias, is_router, is_anchor):
        told = predicate in predicates
        assert predicate(names) == told
        assert predicate([jax.tree_util.DictKey(name) for name in names]) == told
