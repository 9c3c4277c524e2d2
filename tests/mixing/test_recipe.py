"""Recipes: parsing, merging of one tensor, and gates, compared with mergekit-moe (golden/, see
mergekit_peer.py)."""

import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest

from btx_jax.config.schema import from_dict
from btx_jax.errors import UserError
from btx_jax.mixing.gates import condition_number, gate_row, pool, random_gates
from btx_jax.mixing.merge import dare, mean, ties, ulp, wide
from btx_jax.mixing.recipe import Recipe
from btx_jax.mixing.recipe_file import read_recipe

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
    both = text.replace("positive_prompts: [x]", "positive_prompts: [one, two]")
    with pytest.raises(UserError, match=r"recipe\.experts: all have the same prompts"):
        read_recipe(write(tmp_path, both))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gate_mod: hidden\n", "recipe.gate_mod: unknown key; did you mean 'gate_mode'?"),
        ("gate_mode: hiden\n", "recipe.gate_mode='hiden': did you mean 'hidden'? known: normal"),
        ("experts_per_token: 3\n", "recipe.experts_per_token=3: more than the 2 experts"),
        ("dtype: int8\n", "recipe.dtype='int8': known: float32"),
        ("merge: ties\n", "only used with base: average"),
        ("allow: [d_ff]\n", "recipe.allow='d_ff': known: vocab_size"),
        ("method: split\nlayers: [0]\ngate_mode: normal\n", "leave layers out"),
        ("method: blend\n", "experts of method 'blend' come from no single source"),
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


@pytest.mark.parametrize(
    ("written", "value"),
    [  # as pydantic parses them in mergekit
        ("1e-4", 0.0001), ("1E2", 100.0), ("1e-05", 1e-05), (".5", 0.5), ("5.", 5.0),
        ("1_0", 10.0), ("'1_0.5'", 10.5), ("'0.5'", 0.5), ("' 0.5 '", 0.5), ("'+1'", 1.0),
        ("0x10", 16.0), ("'.5e1'", 5.0), ("0", 0.0), ("null", 0.0),
    ],
)  # fmt: skip
def test_numbers_are_those_that_mergekit_reads(tmp_path, written, value):
    text = f"{BARE}    noise_scale: {written}\n"
    assert read_recipe(write(tmp_path, text)).experts[1].noise_scale == value


@pytest.mark.parametrize(
    "written", ["2", "2.0", "'2'", "'2.0'", "'2.00'", "' 2 '", "'+2'", "'02'", "0x2", "2.0e+0"]
)
def test_whole_numbers_are_those_that_mergekit_reads(tmp_path, written):
    found = read_recipe(write(tmp_path, f"{BARE}experts_per_token: {written}\n"))
    assert found.experts_per_token == 2


@pytest.mark.parametrize(
    "written", ["yes", "'yes'", "'1,5'", "''", "'0x10'", "'1__0'", "'\u0663'", "[1]", "1e400"]
)
def test_what_is_no_number_there_is_none_here(tmp_path, written):
    with pytest.raises(UserError, match=r"experts\[1\].noise_scale=.*: must be"):
        read_recipe(write(tmp_path, f"{BARE}    noise_scale: {written}\n"))


def test_what_mergekit_says_of_every_mixtral_is_taken_and_the_rest_named(tmp_path):
    same = read_recipe(write(tmp_path, BARE))
    for said in (
        "architecture: ''", "architecture: ~", "tokenizer_source: base", "shared_experts: ~",
        "shared_experts: []", "dtype: ~", "gate_mode: hidden_last",
    ):  # fmt: skip
        assert read_recipe(write(tmp_path, f"{BARE}{said}\n")) == same, said
    assert read_recipe(write(tmp_path, f"{BARE}dtype: torch.bfloat16\n")).dtype == "bfloat16"
    for said, told in (
        ("architecture: bert", "architecture='bert': known: Mixtral, DeepSeek MoE, Qwen MoE"),
        ("architecture: 'mixtral '", "architecture='mixtral ': known: Mixtral"),
        ("architecture: qwen2", "architecture='qwen2': known: .*, qwen2_moe, qwen3_moe"),
        ("architecture: 3", "architecture=3: must be str"),
        (
            "tokenizer_source: union",
            "tokenizer_source='union': the mixture always gets base_model's",
        ),
        (
            "shared_experts: [{source_model: a}, {source_model: b}]",
            "shared_experts: 2; .* at most one",
        ),
        ("shared_experts: {source_model: a}", "shared_experts=.*: must be a list"),
        ("shared_experts: [{source: a}]", "shared_experts.source: unknown key"),
        ("dtype: bf16", "did you mean 'bfloat16'"),
    ):
        with pytest.raises(UserError, match=told):
            read_recipe(write(tmp_path, f"{BARE}{said}\n"))


def test_all_mistakes_are_told_at_once(tmp_path):
    text = (
        "base_model: base\nbase: averag\nsed: 3\nseed: -1\ndensity: 2\narchitecture: bert\nexperts:\n"
        "  - {source_model: a, noise_scale: .nan}\n  - {positive_prompts: x}\n"
    )
    with pytest.raises(UserError) as caught:
        read_recipe(write(tmp_path, text))
    for told in (
        "8 mistakes", "base='averag': did you mean 'average'", "sed: unknown key; did you mean 'seed'",
        "seed=-1: must not be negative", "density=2: must", "architecture='bert'",
        "experts[0].noise_scale=nan: must", "experts[1].source_model: missing",
        "experts[1].positive_prompts='x': must be a list",
    ):  # fmt: skip
        assert told in str(caught.value)
    assert "\n" not in str(caught.value)


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
)

MERGE_BOMB = "m0: &m0 {k: x}\n" + "".join(
    f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 40)
)


def aliases(count, file):
    """A recipe in which one expert occurs `count` times."""
    source = f"{{source_model: a, positive_prompts_file: {file}}}"
    return f"base_model: b\ngate_mode: random\nexperts:\n- &e {source}\n" + "- *e\n" * (count - 1)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A directory of invalid prompt files."""
    home = tmp_path_factory.mktemp("hostile")
    (home / "p.gz").write_bytes(gzip.compress(bytes(10**7)))
    (home / "lines").write_text("a prompt\n" * 9_000)
    (home / "many").write_text("x\n" * 10**6)
    with (home / "large").open("wb") as file:
        file.truncate(1 << 34)
    (home / "empty").write_text("\n \n")
    os.mkfifo(home / "pipe")
    return home


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOMB + BARE, "aliases expand to more"),
        (MERGE_BOMB + BARE, "aliases expand to more"),
        ("&a [*a]", "aliases expand to more"),
        ("[" * 50_000, "nested too deeply"),
        (BARE + "".join(f"k{i}: 1\n" for i in range(50_000)), "more than 262144 bytes"),
        (BARE + "".join(f"k{i}: 1\n" for i in range(3_000)), "2990 more unknown keys"),
        ("base_model: b\nexperts:\n" + "- {source_model: a}\n" * 5_000, "experts: 5000; at most 1024"),
        (BARE + "method: split\ngate_mode: normal\nchunks: 1000\n", "experts: 2000; at most 1024"),
        (BARE + "chunks: 1000000000\n", "chunks=1000000000: must be at most 1024"),
        (BARE + "experts_per_token: 0\n", "experts_per_token=0: must be at least 1"),
        (BARE + "experts_per_token: yes\n", "experts_per_token=True: must be int, not bool"),
        (BARE + "layers: [-1]\n", "=-1: must not be negative"),
        (BARE + "layers: 3\n", "layers=3: must be a list"),
        (BARE + "allow: tokenizer\n", "allow='tokenizer': must be a list"),
        (BARE + "seed: 9223372036854775808\n", "seed=9223372036854775808: must be at most 9.22"),
        (BARE + f"seed: {'9' * 5000}\n", "Exceeds the limit"),
        (BARE + "gate_scale: .inf\ngate_mode: router_input\n", "gate_scale=inf: must be positive"),
        (BARE + "gate_scale: 1e300\ngate_mode: router_input\n", "gate_scale=1e+300: must be at most"),
        (BARE + "density: 1e-300\nmerge: ties\nbase: average\n", "density=1e-300: must lie in"),
        (BARE + "density: .nan\n", "density=nan: must lie in"),
        (BARE + "    noise_scale: -1\n", "noise_scale=-1: must not be negative"),
        (BARE + "    noise_scale: .inf\n", "noise_scale=inf: must be"),
        (BARE + "    residual_scale: 1e300\n", "residual_scale=1e+300: must be at most"),
        (BARE + "    residual_scale: .nan\n", "residual_scale=nan: must be finite"),
        (BARE + "    positive_prompts_file: /dev/zero\n", "'/dev/zero': not a regular file"),
        (BARE + "    positive_prompts_file: /\n", "'/': not a regular file"),
        (BARE + "    negative_prompts_file: HOME/p.gz\n", "not UTF-8 text"),
        (BARE + "    negative_prompts_file: HOME/many\n", "1000000 prompts, at most 10000"),
        (BARE + "    negative_prompts_file: HOME/large\n", "more than 16777216 bytes"),
        (BARE + "    negative_prompts_file: HOME/pipe\n", "not a regular file"),
        (BARE + "    negative_prompts_file: HOME/empty\n", "contains no prompt"),
        (BARE + "    negative_prompts_file: HOME/none\n", "No such file"),
        (aliases(10_000, "HOME/lines"), "experts: 10000; at most 1024"),
        (aliases(1_000, "HOME/lines"), "prompts_file='HOME/lines': with the files before it, more"),
        ("", "must be a section (a mapping of keys to values)"),
        ("- 1\n", "must be a section (a mapping of keys to values)"),
        (BARE + "\tx: 1\n", "cannot start any token"),
        (BARE + "? [a]\n: b\n", "unhashable"),
        (BARE + "--- \n" + BARE, "single document"),
        (BARE + "x: !!python/object:os.system {}\n", "could not determine a constructor"),
    ],
)  # fmt: skip
def test_what_would_hang_or_fill_the_memory_is_refused_at_once(tmp_path, hostile, text, told):
    path = write(tmp_path, text.replace("HOME", str(hostile)))
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_recipe(path)
    assert told.replace("HOME", str(hostile)) in str(caught.value)
    assert len(str(caught.value)) < 3000 and "\n" not in str(caught.value)
    assert time.monotonic() - start < 60


def test_a_recipe_that_is_a_device_or_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            read_recipe(path)


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
    # Density 3/4 drops the smallest change of each. Element 0: mean(4, 2). 1: both trimmed. 2: +5
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
