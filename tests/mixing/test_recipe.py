"""Recipes: parsing, merging one tensor, and gates, against mergekit-moe's own (golden/, see
mergekit_peer.py)."""

import numpy as np
import pytest

from btx_jax.config_dict import from_dict
from btx_jax.errors import UserError
from btx_jax.mixing.gates import condition_number, gate_row, pool, random_gates
from btx_jax.mixing.merge import dare, mean, ties, wide
from btx_jax.mixing.recipe import Recipe, read_recipe
from btx_jax.stages.mix_recipe import ulp

BFLOAT16 = np.dtype("bfloat16")


def write(tmp_path, text):
    path = tmp_path / "recipe.yml"
    path.write_text(text)
    return path


BARE = (
    "base_model: base\nexperts:\n  - source_model: a\n    positive_prompts: [x]\n  - source_model:"
    " b\n    positive_prompts: [y]\n"
)


def test_a_mergekit_recipe_is_read_unchanged_and_means_what_it_means_there(tmp_path):
    recipe = read_recipe(
        write(tmp_path, BARE + "gate_mode: hidden\ndtype: bfloat16\nexperts_per_token: 1\n")
    )
    assert (recipe.base, recipe.gate_mode, recipe.dtype, recipe.experts_per_token) == (
        "copy",
        "hidden",
        "bfloat16",
        1,
    )
    assert read_recipe(write(tmp_path, BARE)).gate_mode == "hidden", "mergekit's default"
    assert read_recipe(write(tmp_path, BARE + "base: average\n")).gate_mode == "normal", (
        "BTX's routers are trained"
    )
    nulls = BARE.replace(
        "positive_prompts: [y]",
        "positive_prompts: [y]\n    noise_scale: null\n    residual_scale: 0.5",
    )
    assert read_recipe(write(tmp_path, nulls)).experts[1].residual_scale == 0.5


def test_prompts_may_lie_in_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    text = BARE.replace("positive_prompts: [y]", f"positive_prompts_file: {tmp_path / 'p.txt'}")
    assert read_recipe(write(tmp_path, text)).experts[1].positive_prompts == ("one", "two")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gate_mod: hidden\n", "recipe.gate_mod: unknown key; did you mean 'gate_mode'?"),
        ("gate_mode: hiden\n", "recipe.gate_mode='hiden': known are normal, random"),
        ("experts_per_token: 3\n", "recipe.experts_per_token=3: more than the 2 experts"),
        ("dtype: int8\n", "recipe.dtype='int8': known are float32"),
        ("merge: ties\n", "needs base: average"),
        ("allow: [d_ff]\n", "'d_ff' cannot be allowed"),
        ("method: split\nlayers: [0]\ngate_mode: normal\n", "leave layers out"),
        ("method: blend\n", "experts of method 'blend' belong to no source"),
        ("gate_mode: normal\ngate_mode: random\n", "key 'gate_mode' appears twice"),
        ("seed: soon\n", "recipe.seed='soon': must be int, not str"),
        ("seed: [\n", "expected the node content"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_key_and_cure(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        read_recipe(write(tmp_path, BARE + change))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_prompts_are_required_where_they_are_read_and_must_differ(tmp_path):
    with pytest.raises(UserError, match=r"experts\[1\]: no positive_prompts"):
        read_recipe(write(tmp_path, BARE.replace("    positive_prompts: [y]\n", "")))
    with pytest.raises(UserError, match="all have the same prompts"):
        read_recipe(write(tmp_path, BARE.replace("[y]", "[x]")))
    assert (
        read_recipe(
            write(tmp_path, BARE.replace("    positive_prompts: [y]\n", "") + "gate_mode: random\n")
        ).gate_mode
        == "random"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_mean_is_within_one_ulp_of_a_float64_mean_and_no_running_sum_in_16_bits(dtype):
    rng = np.random.default_rng(0)
    tensors = [
        rng.standard_normal((300, 301)).astype(np.float32).astype(np.dtype(dtype)) for _ in range(5)
    ]
    exact = np.mean([t.astype(np.float64) for t in tensors], axis=0)
    found = mean(tensors, np.dtype(dtype))
    assert found.dtype == np.dtype(dtype)
    assert (
        np.abs(found.astype(np.float64) - exact)
        <= ulp(exact, np.dtype(dtype)) / 2 * 1.01 + 5 * 2.0**-24
    ).all()
    if dtype == "float32":
        np.testing.assert_allclose(found, exact, atol=2e-7, rtol=0)
    else:
        running = tensors[0]
        for tensor in tensors[1:]:
            running = running + tensor
        assert (found != running / np.dtype(dtype).type(5)).mean() > 0.05, (
            "as bad as a running sum in 16 bits"
        )


def test_bfloat16_widens_exactly():
    values = np.array([0.0, -0.0, 1.5, -3e38, 1e-40, np.inf], np.float32).astype(BFLOAT16)
    assert wide(values).tobytes() == values.astype(np.float32).tobytes()


def test_ties_trims_elects_signs_and_averages_those_that_agree():
    base = np.zeros(4, np.float32)
    a, b = np.array([4.0, 0.1, -3.0, 2.0], np.float32), np.array([2.0, 0.2, 5.0, -2.5], np.float32)
    # density 3/4 drops each one's smallest change. Element 0: mean(4, 2). 1: both trimmed. 2: +5
    # wins. 3: -2.5 wins.
    np.testing.assert_allclose(
        ties(base, [a, b], 0.75, np.dtype(np.float32)), [3.0, 0.0, 5.0, -2.5]
    )
    np.testing.assert_array_equal(
        ties(base + 7, [base + 7, base + 7], 0.5, np.dtype(np.float32)), base + 7
    )


def test_dare_keeps_a_share_of_the_changes_and_their_expectation():
    rng = np.random.default_rng(0)
    base, changed = np.zeros((400, 400), np.float32), np.ones((400, 400), np.float32)
    merged = dare(base, [changed], 0.25, np.dtype(np.float32), rng)
    assert set(np.unique(merged)) == {0.0, 4.0}
    assert abs(merged.mean() - 1) < 0.02


def test_random_gates_have_the_named_distributions():
    shape = (4, 8, 256)
    assert abs(random_gates("normal", *shape, 0).std() - 0.02) < 1e-3
    assert abs(random_gates("random", *shape, 0).std() - 1) < 0.05
    uniform = random_gates("uniform_random", *shape, 0)
    assert (
        0.99 / 16 < np.abs(uniform).max() <= 1 / 16 and abs(uniform.std() - 1 / 16 / 3**0.5) < 1e-3
    )
    assert not np.array_equal(random_gates("normal", *shape, 0), random_gates("normal", *shape, 1))


def test_pooling_by_hand():
    one, two = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[0.0, 2.0]])
    np.testing.assert_allclose(pool([one, two], "hidden"), [0.5, 1.0])
    np.testing.assert_allclose(pool([one, two], "hidden_avg"), [1.0, 2.0])
    np.testing.assert_allclose(pool([one, two], "cheap_embed"), np.array([4.0, 6.0]) / 52**0.5)
    np.testing.assert_allclose(pool([one, two], "router_input", "last"), [0.5, 0.5])
    np.testing.assert_allclose(gate_row(np.array([3.0, 4.0]), None), [0.6, 0.8])
    np.testing.assert_allclose(gate_row(np.array([3.0, 4.0]), np.array([3.0, 3.0])), [0.0, 1.0])
    assert (
        condition_number(np.eye(2)) == 1
        and condition_number(np.array([[1.0, 0.0], [1.0, 1e-3]])) > 100
    )


def test_split_and_blend_count_experts():
    experts = [{"source_model": name} for name in "abc"]

    split = from_dict(
        Recipe,
        {
            "base_model": "a",
            "experts": experts,
            "method": "split",
            "chunks": 2,
            "gate_mode": "normal",
            "base": "average",
        },
    )
    assert split.expert_count == 6
    blend = from_dict(
        Recipe, {"base_model": "a", "experts": experts, "method": "blend", "gate_mode": "normal"}
    )
    assert blend.expert_count == 3
