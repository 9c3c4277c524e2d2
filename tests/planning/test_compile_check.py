"""The step of a small MoE compiled for TPU topologies by libtpu, on a machine without a TPU,
through the real command line."""

import dataclasses
import json

import pytest

from btx_jax.errors import UserError
from btx_jax.planning import compile_check
from btx_jax.presets.registry import PRESETS

pytestmark = pytest.mark.cli

MODEL = (
    "--config.model.vocab_size=4096", "--config.model.layers=4", "--config.model.d_model=512", "--config.model.d_ff=1024",
    "--config.model.heads=4", "--config.model.kv_heads=4", "--config.model.head_dim=128", "--config.data.sequence_length=1024",
    "--config.train.accumulate=1",
)  # fmt: skip
MOE = (
    "--config=configs/moe_finetune.py",
    *MODEL,
    "--config.model.moe.experts=(4, 4, 4, 4)",
    "--config.train.batch_size=16",
)
LAYERS, TOKENS, D, F, VOCAB = 4, 16 * 1024, 512, 1024, 4096


def check(cli, name, *arguments, status=0):
    out, _ = cli.run(*arguments, f"--workdir={cli.home / name}", status=status)
    return json.loads((cli.home / name / "compile.json").read_text()), out


def moved(result, kind, across=False):
    return sum(
        row["wire_bytes"]
        for row in result["collectives"]
        if row["kind"] == kind and row["across_slices"] == across
    )


@pytest.mark.slow
def test_a_moe_on_one_slice_and_on_two(cli):
    einsum, told = check(cli, "einsum", *MOE, "--compile_topology=v5p:2x2x4")
    assert einsum["fits"]
    assert 0 < einsum["memory"]["heldout"] < einsum["memory"]["limit"]
    assert einsum["mesh"] == {"data": 1, "fsdp": 4, "expert": 4, "tensor": 1, "context": 1}
    assert "step by the compiler's clock" in told
    step, rows = einsum["clock"], einsum["collectives"]
    assert 0 < step["mfu"] < 1
    assert step["seconds"] > max(einsum["floors"]["compute"], step["exposed"])
    assert step["exposed"] == pytest.approx(sum(row["exposed"] for row in rows))
    assert all(row["asynchronous"] + row["synchronous"] == row["count"] for row in rows)
    assert len(step["dearest"]) == 10
    assert any("layers_0/ffn" in one["place"] for one in step["dearest"])
    assert sum(one["exposed"] for one in step["collectives"]) == pytest.approx(step["exposed"])
    gathers = [one for one in step["collectives"] if one["kind"] == "all-gather"]
    assert any("layers_0/ffn" in one["place"] for one in gathers)
    flops = einsum["flops"]
    attention, experts, head = 4 * D * D, 3 * D * F, D * VOCAB
    least = 6 * TOKENS / 16 * (LAYERS * (attention + 2 * 1.25 * experts) + head)
    assert least < flops["dots"] < 1.35 * least, (
        "every matmul forward and twice backward, the down product and dispatch once more"
    )
    assert moved(einsum, "all-to-all") > 0
    weights = 2 * LAYERS * 4 * experts  # all experts, bfloat16
    gathered = moved(einsum, "all-gather")
    assert gathered < 0.75 * 2 * (weights / 4 + 2 * LAYERS * attention + 2 * head) * 1.6, (
        "experts travel over fsdp alone, not over expert"
    )
    assert moved(einsum, "all-reduce") < moved(einsum, "reduce-scatter"), (
        "gradients are reduce-scattered, but for a few small ones"
    )

    ragged, _ = check(
        cli, "ragged", *MOE, "--config.compute.dispatch=ragged", "--compile_topology=v5e:4x4"
    )
    assert ragged["flops"]["gmm"] == pytest.approx(ragged["flops"]["gmm_at_most"] / 2), (
        "room for all tokens, half of them chose this expert"
    )
    exact, _ = check(
        cli,
        "exact",
        *MOE,
        "--config.compute.dispatch=ragged",
        "--config.compute.dtype=float32",
        "--compile_topology=v5e:4x4",
    )
    assert exact["fits"], (
        "float32 multiplied as float32: the kernels' tiles must leave room for its passes"
    )
    assert moved(ragged, "all-to-all") < 0.1 * moved(einsum, "all-to-all"), (
        "tokens are gathered; what is left is the embedding's"
    )

    two, _ = check(
        cli,
        "two",
        *MOE,
        "--config.mesh.data=2",
        "--config.train.batch_size=32",
        "--compile_topology=v5e:4x4",
        "--num_slices=2",
    )
    assert two["devices"] == 32
    assert moved(two, "all-to-all") > 0
    across = {
        row["kind"]
        for row in two["collectives"]
        if row["across_slices"] and row["wire_bytes"] > 1e5
    }
    assert across <= {"all-reduce"}, "only gradients are summed across slices"
    assert across, "two slices that exchange no gradient would train two models"


@pytest.mark.slow
def test_what_does_not_fit_says_what_would(cli):
    big = (
        "--config=configs/math_expert.py",
        *MODEL[:-1],
        "--config.train.batch_size=64",
        "--config.train.accumulate=1",
    )
    wide = (
        "--config.model.layers=24",
        "--config.compute.remat=none",
        "--config.data.sequence_length=4096",
    )
    result, told = check(cli, "big", *big, *wide, "--compile_topology=v5e:2x2", status=1)
    assert not result["fits"]
    assert "does not fit" in told
    assert result["changes"][-1]["fits"]
    assert result["changes"][0]["change"] == "--config.compute.remat=ffn", (
        "what costs least is tried first"
    )
    memory = result["changes"][-1]["memory"]
    shared = 24 * (4 * D * D + 2 * D) + 2 * VOCAB * D + D
    assert memory["seed"] == pytest.approx(4 * shared / 4, rel=0.01), "a fourth, in float32"
    parts = ("arguments", "temporaries", "outputs", "seed")
    assert memory["total"] == sum(memory[part] for part in parts)


@pytest.mark.parametrize(
    ("chips", "topology", "told"),
    [
        (32, "v5e:4x4", "use 32 chips with --config.train.accumulate=32"),
        (64, "v5p:2x4x4", "use 64 chips with --config.train.accumulate=16"),
        (512, "v5p:4x8x8", "use 512 chips with --config.train.accumulate=2"),
        (512, "v6e:16x16", "it fits no slice of v6e, use chips with more memory"),
    ],
)
def test_more_chips_come_with_the_micro_batches_that_divide_over_them(chips, topology, told):
    config = PRESETS["math_expert"].make()
    fixed = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=64))
    assert compile_check.more_chips(fixed, chips, 1, topology) == told
    left_open = told.partition(" with --config")[0]
    assert compile_check.more_chips(config, chips, 1, topology) == left_open


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*MOE, "--compile_topology=v5p:2x2x3"), "v5p slices have three dimensions"),
        ((*MOE, "--compile_topology=v5e:2x2x2"), "v5e slices have two dimensions"),
        ((*MOE, "--compile_topology=h100:8"), "'h100:8' is not a TPU topology"),
        (
            (*MOE, "--config.train.accumulate=4", "--compile_topology=v5p:2x2x4"),
            "are not divisible by the 16 devices of data x fsdp x expert; use"
            " config.train.accumulate=1",
        ),
        (
            (*MOE, "--config.train.batch_size=32", "--compile_topology=v5e:4x4", "--num_slices=2"),
            "must be a multiple of the 2 slices",
        ),
        (
            ("--config=configs/mix.py", "--compile_topology=v5e:4x4"),
            "only training configs, such as",
        ),
        (
            (*MOE, "--config.train.batch_size=12", "--compile_topology=v5p:2x2x4"),
            "config.train.batch_size=12",
        ),
    ],
)
def test_wrong_topologies_are_one_line(cli, arguments, told):
    assert told in cli.fails(*arguments)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compile_check, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu: pip install 'btx_jax\[tpu\]'"):
        compile_check.topology_devices("v5p:2x2x4", 1)
