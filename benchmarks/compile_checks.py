"""Run every compile check of docs/tpu.md and update its tables.

    python benchmarks/compile_checks.py [--folder=runs/compile] [--only=NAME]

Each check is one `--compile_topology` command in a separate process, two to six minutes on one
core; finished ones are skipped. Needs libtpu (`pip install -e '.[tpu]'`), but no TPU. The tables
are written between the marks in docs/tpu.md.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from btx_jax.parallel.compiler_options import OPTIONS

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "tpu.md"
GIB = 2**30
WEIGHTS = ("all-gather", "reduce-scatter")

EXPERT, MOE = "--config=configs/math_expert.py", "--config=configs/moe_finetune.py"
MICRO_BATCHES = "--config.train.accumulate=64"  # unless a check sets another number
ONE_STEP = ("--config.train.batch_size=16", "--config.train.accumulate=1")
FULL, FFN = "--config.compute.remat=full", "--config.compute.remat=ffn"
RAGGED = "--config.compute.dispatch=ragged"
V5P_16, V5E_64 = "--compile_topology=v5p:2x2x4", "--compile_topology=v5e:8x8"

# name -> (arguments, description, MaxText's figures for the same program). The figures, in GiB and
# FLOPs: memory, dots, grouped matmuls, traffic by kind, and a lower bound on what is sent: (n - 1)
# / n of the bytes of an all-gather or all-to-all, twice that for an all-reduce, with n the smallest
# group.
PEERS = {
    "d8": (
        (
            EXPERT,
            *ONE_STEP,
            FULL,
            "--config.train.mixing_probe=False",
            "--compile_topology=v5p:2x2x2",
        ),
        "Llama-2-7B, fsdp=8",
        (22.27, 4.072e14, 0, "9.6 / 0.0 / 30.4", 38.8),
    ),
    "e16": (
        (MOE, *ONE_STEP, FULL, "--config.mesh.expert=1", V5P_16),
        "MoE einsum, fsdp=16",
        (27.87, 4.942e14, 0, "40.6 / 0.0 / 77.3", 115.4),
    ),
    "r16": (
        (MOE, *ONE_STEP, FULL, RAGGED, "--config.mesh.expert=1", V5P_16),
        "MoE ragged, fsdp=16",
        (27.59, 0.736e14, 2.837e14, "72.8 / 32.3 / 8.8", 137.6),
    ),
    "e44": (
        (MOE, *ONE_STEP, FULL, V5P_16),
        "MoE einsum, expert=4 x fsdp=4",
        (28.08, 4.942e14, 0, "89.0 / 40.5 / 8.9", 136.4),
    ),
    "r44": (
        (MOE, *ONE_STEP, FULL, RAGGED, V5P_16),
        "MoE ragged, expert=4 x fsdp=4",
        (27.75, 0.736e14, 5.674e14, "24.4 / 8.1 / 8.8, ragged all-to-all 18.0", 52.8),
    ),
}
# The same work as published runs: name -> (arguments, description, what was published, its seconds
# per step). Their MFU counts causal attention whole, so seconds are compared. From
# AI-Hypercomputer/tpu-recipes and MaxText's Run_Mixtral.md, whose step time follows from 251.94
# TFLOP/s and the FLOPs per token of MaxText's other Mixtral row (241.2 TFLOP/s, 2,909 tokens/s).
# The published runs compute all rows of a chip at once; ours as few times as its memory allows.
TRAINING_ALONE = (
    "--config.train.eval_every=0",
    "--config.train.mixing_probe=False",
)
MIXTRAL = (
    "--config=configs/moe_finetune.py:mistral_7b",
    f"--config.model.moe.experts=({'8,' * 32})",
)
PUBLISHED = {
    "llama31_v6e": (
        (
            "--config=configs/math_expert.py:llama31_8b",
            "--config.data.sequence_length=8192",
            "--config.train.batch_size=48",
            "--config.train.accumulate=1",
            *TRAINING_ALONE,
            "--compile_topology=v6e:4x4",
        ),
        "Llama-3.1-8B, 3 rows of 8,192 per chip",
        "16 x v6e",
        3.39,
    ),
    "mistral_v6e": (
        (
            "--config=configs/math_expert.py:mistral_7b",
            "--config.model.window=0",
            "--config.data.sequence_length=8192",
            "--config.train.batch_size=48",
            "--config.train.accumulate=0",
            *TRAINING_ALONE,
            "--compile_topology=v6e:2x4",
        ),
        "Mistral-7B, 6 rows of 8,192 per chip",
        "8 x v6e, 47.1 %",
        6.32,
    ),
    "mixtral_v6e": (
        (
            *MIXTRAL,
            "--config.train.batch_size=2048",
            "--config.train.accumulate=0",
            *TRAINING_ALONE,
            "--compile_topology=v6e:16x16",
        ),
        "Mixtral 8x7B, 8 rows of 4,096 per chip, capacity 1.25",
        "256 x v6e, 35.2 %",
        8.409,
    ),
    "mixtral_v5p": (
        (
            *MIXTRAL,
            RAGGED,
            FULL,
            "--config.mesh.expert=1",
            "--config.train.batch_size=2304",
            "--config.train.accumulate=0",
            *TRAINING_ALONE,
            "--compile_topology=v5p:4x4x4",
        ),
        "Mixtral 8x7B, 36 rows of 4,096 per chip, no token dropped",
        "64 x v5p, 54.9 %",
        48.5,
    ),
}
CHECKS = {
    "expert_v5p": ((EXPERT, FULL, "--compile_topology=v5p:2x2x2"), "Llama-2-7B expert"),
    "expert_v5e": ((EXPERT, FULL, "--compile_topology=v5e:4x4"), "Llama-2-7B expert"),
    "expert_2slices": (
        (
            EXPERT,
            FULL,
            "--config.mesh.data=2",
            "--config.train.accumulate=32",
            "--compile_topology=v5e:4x4",
            "--num_slices=2",
        ),
        "Llama-2-7B expert, two slices",
    ),
    "llama3_v5p": (
        ("--config=configs/seed.py:llama3_8b", FULL, "--compile_topology=v5p:2x2x2"),
        "Llama-3-8B seed",
    ),
    "moe_einsum_default": ((MOE, FFN, V5P_16), "BTX 4x7B Top-2, einsum"),
    "moe_ragged_default": ((MOE, RAGGED, FULL, V5P_16), "BTX 4x7B Top-2, ragged"),
    "moe_2slices": (
        (
            MOE,
            FFN,
            "--config.mesh.data=2",
            "--config.train.accumulate=32",
            V5P_16,
            "--num_slices=2",
        ),
        "BTX 4x7B Top-2, einsum, two slices",
    ),
    "moe_einsum_v5e": (
        (MOE, "--config.train.accumulate=16", FULL, "--compile_topology=v5e:8x8"),
        "BTX 4x7B Top-2, einsum",
    ),
    "moe_einsum_v5e_capacity_1": (
        (
            MOE,
            "--config.train.accumulate=16",
            FULL,
            "--config.compute.capacity_factor=1.0",
            "--compile_topology=v5e:8x8",
        ),
        "BTX 4x7B Top-2, einsum, capacity 1.0",
    ),
    "qwen3_v5p": (
        ("--config=configs/math_expert.py:qwen3_8b", FULL, "--compile_topology=v5p:2x2x2"),
        "Qwen3-8B expert",
    ),
    "qwen3_v5e": (
        ("--config=configs/math_expert.py:qwen3_8b", FULL, "--config.train.accumulate=16", V5E_64),
        "Qwen3-8B expert",
    ),
    "qwen3_moe_v5p": (
        ("--config=configs/moe_finetune.py:qwen3_8b", FFN, V5P_16),
        "BTX 4xQwen3-8B Top-2, einsum",
    ),
    "qwen3_moe_v5e": (
        ("--config=configs/moe_finetune.py:qwen3_8b", "--config.train.accumulate=16", FULL, V5E_64),
        "BTX 4xQwen3-8B Top-2, einsum",
    ),
    "mistral_window": (
        (
            "--config=configs/math_expert.py:mistral_7b",
            FULL,
            "--config.data.sequence_length=16384",
            "--config.train.batch_size=512",
            "--compile_topology=v5p:2x2x2",
        ),
        "Mistral-7B 0.1 expert, rows of 16384, window 4096",
    ),
    "moe_ragged_v5e": (
        (MOE, RAGGED, "--config.train.accumulate=16", FULL, "--compile_topology=v5e:8x8"),
        "BTX 4x7B Top-2, ragged",
    ),
}


def run(name: str, arguments: tuple[str, ...], folder: Path) -> dict | None:
    file = folder / name / "compile.json"
    if not file.exists():
        print(f"{name}: {' '.join(arguments)}", flush=True)
        config, *others = (*arguments, f"--workdir={folder / name}")
        command = [sys.executable, "-m", "btx_jax.launch", config, MICRO_BATCHES, *others]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not file.exists():
            print(f"{name}: exit status {done.returncode}: {done.stderr[-500:]}")
            return None
    return json.loads(file.read_text())


def sent(check: dict, across: bool | None = None) -> float:
    return (
        sum(
            row["wire_bytes"]
            for row in check["collectives"]
            if across in (None, row["across_slices"])
        )
        / GIB
    )


def peer_table(results: dict[str, dict]) -> str:
    lines = [
        (
            "| program | step by the clock | memory, GiB | dot FLOPs | grouped matmuls, at most |"
            " sent, GiB | executed bytes by kind, GiB |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for name, check in results.items():
        memory, dots, grouped, kinds, least = PEERS[name][2]
        flops = check["flops"]
        by_kind = " / ".join(
            f"{row['bytes'] / GIB:.1f} {row['kind']}"
            for row in check["collectives"]
            if row["bytes"] > 0.05 * GIB
        )
        lines.append(
            f"| {PEERS[name][1]} | {check['clock']['seconds']:.2f} s |"
            f" {check['memory']['total'] / GIB:.2f} | {flops['dots']:.3e} |"
            f" {flops['gmm_at_most']:.3e} | **{sent(check):.1f}** | {by_kind} |"
        )
        lines.append(
            f"| MaxText, the same | | {memory:.2f} | {dots:.3e} | {grouped:.3e} | at least"
            f" {least:.1f} | {kinds} |"
        )
    return "\n".join(lines)


def published_table(results: dict[str, dict]) -> str:
    lines = [
        "| work | published: chips, MFU | s | ours by the clock: mesh, `remat`, micro-batches |"
        " s, MFU | ratio | exposed / hidden | memory, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, check in results.items():
        _, work, where, seconds = PUBLISHED[name]
        step, memory = check["clock"], check["memory"]
        mesh = " ".join(f"{axis}={size}" for axis, size in check["mesh"].items() if size > 1)
        lines.append(
            f"| {work} | {where} | {seconds:.2f} |"
            f" {mesh}, {check['remat']}, {check['accumulate']} |"
            f" {step['seconds']:.2f}, {step['mfu']:.0%} | {step['seconds'] / seconds:.2f} |"
            f" {step['exposed']:.1f} / {step['hidden']:.1f} |"
            f" {memory['total'] / GIB:.1f} of {memory['limit'] / GIB:.1f} |"
        )
    return "\n".join(lines)


def check_table(results: dict[str, dict]) -> str:
    lines = [
        (
            "| run | slice, mesh | step by the clock, MFU | collectives exposed / hidden, s |"
            " gathers and scatters of them async / sync | at least: compute / memory / links /"
            " network, s | memory, GiB | compiled / model FLOPs | dispatch | sent inside / across"
            " slices, GiB | compiled in |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, check in results.items():
        mesh = " ".join(f"{axis}={size}" for axis, size in check["mesh"].items() if size > 1)
        limit = check["memory"]["limit"] / GIB
        where = f"{check['topology']}{' x 2' if '2slices' in name else ''}, {mesh}"
        took = f"{check['compile_seconds']:.0f} s, {check['host_memory'] / GIB:.1f} GiB"
        if not check["fits"]:
            total = check["memory"].get("total")
            memory = f"{total / GIB:.1f}" if total else "more"
            changes = "; ".join(change["change"] for change in check["changes"][-1:])
            lines.append(
                f"| {CHECKS[name][1]} | {where} | cure: {changes} | | | | {memory} of {limit:.1f}:"
                f" **does not fit** | | | | {took} |"
            )
            continue
        step, flops = check["clock"], check["flops"]
        rows = [row for row in check["collectives"] if row["kind"] in WEIGHTS]
        beside, alone = (sum(row[kind] for row in rows) for kind in ("asynchronous", "synchronous"))
        floors = " / ".join(f"{seconds:.1f}" for seconds in check["floors"].values())
        lines.append(
            f"| {CHECKS[name][1]} | {where} | **{step['seconds']:.1f} s, {step['mfu']:.0%}** |"
            f" {step['exposed']:.1f} / {step['hidden']:.1f} | {beside:,} / {alone:,} | {floors} |"
            f" {check['memory']['total'] / GIB:.1f} of {limit:.1f}: fits | {flops['ratio']:.2f} |"
            f" {flops['dispatch_share']:.1%} | {sent(check, False):.0f} / {sent(check, True):.0f} |"
            f" {took} |"
        )
    return "\n".join(lines)


def option_table() -> str:
    lines = ["| chip | options | why | step by the clock |", "|---|---|---|---|"]
    for kind, options in OPTIONS.items():
        for some in options:
            values = " ".join(f"`{name}={value}`" for name, value in some.values.items())
            lines.append(f"| {kind} | {values} | {some.reason} | {some.gain} |")
    return "\n".join(lines)


def command_list() -> str:
    lines = [
        f"    python -m btx_jax.launch {shlex.join(arguments)}"
        for arguments, *_ in (*PEERS.values(), *PUBLISHED.values(), *CHECKS.values())
    ]
    return "\n".join(line for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default="runs/compile", type=Path)
    parser.add_argument("--only", default="")
    args = parser.parse_args()

    def chosen(checks):
        return {name: value for name, value in checks.items() if args.only in ("", name)}

    peers, published, checks = (
        {n: r for n, value in chosen(group).items() if (r := run(n, value[0], args.folder))}
        for group in (PEERS, PUBLISHED, CHECKS)
    )
    if args.only:
        return
    text = DOCUMENT.read_text()
    for mark, table in (
        ("peers", peer_table(peers)),
        ("published", published_table(published)),
        ("checks", check_table(checks)),
        ("commands", command_list()),
        ("options", option_table()),
    ):
        before, rest = text.split(f"<!-- {mark} -->\n", 1)
        after = rest.split("<!-- end -->", 1)[1]
        text = f"{before}<!-- {mark} -->\n{table}\n<!-- end -->{after}"
    DOCUMENT.write_text(text)
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
