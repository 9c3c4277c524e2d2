"""Time and memory of mixing three models on disk, compared with copying the same bytes and with
mergekit-moe, in one run.

    python benchmarks/mix.py [--mergekit=PATH/TO/mergekit-moe] [--rounds=3] [--folder=DIR]
    python benchmarks/mix.py --solved

Writes three random Llamas of TinyLlama's shape (1.1B parameters, bfloat16, 2.2 GB each) under
--folder. Every round copies the mixture's bytes (`cp -r` of the previous result, then fsync), makes
a mixture with base: copy (a frankenMoE) and one with base: average by `btx mix` and, if given, the
first by mergekit-moe on the same recipe (gate_mode random). `btx mix` also makes both from btx_jax
runs of the same models, and a mixture is converted from Hugging Face files to a run and back,
recording the bytes read (rchar in /proc/self/io). Peak resident memory is the process's own
high-water mark; that of the interpreter with the same imports is measured for comparison. Needs 45
GB of disk.

With --solved, runs once instead: the same models with shared parameters and routers solved from
text (merge: regmean, gate_mode: ridge; 8192 tokens each), compared with their plain mean.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from btx_jax.architectures.registry import known_families
from btx_jax.architectures.tensors import slots
from btx_jax.checkpoints.huggingface import HuggingFaceWriter
from btx_jax.config.model_config import ModelConfig

TINYLLAMA = ModelConfig(
    vocab_size=32000,
    layers=22,
    d_model=2048,
    d_ff=5632,
    heads=32,
    kv_heads=4,
    head_dim=64,
    context=2048,
)
SOURCES = ("a", "b", "c")
# Run in a separate process: prints its peak resident memory in KiB. (ru_maxrss would start from
# that of the forking process.)
PEAK = (
    "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
)
READ = "print(next(line for line in open('/proc/self/io') if line.startswith('rchar')).split()[1])"
IMPORTED = f"import sys, btx_jax.commands.mix; from btx_jax.__main__ import main; {READ}"
MEASURE = f"{IMPORTED}; main(sys.argv[1:]); {READ}; {PEAK}"
IMPORTS = f"import btx_jax.commands.mix; {PEAK}"


def write_models(folder: Path) -> None:
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    for seed, name in enumerate(SOURCES):
        directory = folder / name
        if (directory / "config.json").exists():
            continue
        directory.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(seed)
        names = slots(TINYLLAMA)
        writer = HuggingFaceWriter(
            directory, TINYLLAMA, known_families()["llama"], dict.fromkeys(names, bfloat16)
        )
        for tensor, slot in names.items():
            values = rng.standard_normal(slot.shape, np.float32) * 0.02
            is_norm = tensor.part.endswith("scale")
            writer.write(tensor, (values + 1 if is_norm else values).astype(bfloat16))
        writer.finish({}, 1, 2, "# random weights\n")
        print(f"wrote {directory}", flush=True)


def timed(command: list[str], **kwargs) -> tuple[float, str]:
    start = time.perf_counter()
    result = subprocess.run(command, check=True, capture_output=True, text=True, **kwargs)
    return time.perf_counter() - start, result.stdout


def write_texts(folder: Path) -> None:
    """Write a word tokenizer, and for each model a text with words of its own and common words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0} | {f"w{i}": i for i in range(1, TINYLLAMA.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for seed, name in enumerate(SOURCES):
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}'
        )
        drawn = np.random.default_rng(seed).integers(1, 8000, 20_000) + 4000 * seed
        (folder / f"{name}.txt").write_text(" ".join(f"w{i}" for i in drawn))


def measure_solved(folder: Path) -> None:
    write_texts(folder)
    named = [
        {"source_model": str(folder / name), "text": str(folder / f"{name}.txt")}
        for name in SOURCES
    ]
    common = {"base_model": named[0]["source_model"], "base": "average", "dtype": "bfloat16"}
    untaught = [{"source_model": expert["source_model"]} for expert in named]
    imports = int(timed([sys.executable, "-c", IMPORTS])[1])
    for kind, recipe in {
        "mean": {"gate_mode": "normal", "experts": untaught},
        "ridge": {"gate_mode": "ridge", "experts": named},
        "ridge and regmean": {"gate_mode": "ridge", "merge": "regmean", "experts": named},
    }.items():
        (folder / "solved.yml").write_text(json.dumps(common | recipe))
        shutil.rmtree(folder / "mixed", ignore_errors=True)
        command = ["mix", str(folder / "solved.yml"), str(folder / "mixed")]
        took, printed = timed([sys.executable, "-c", MEASURE, *command])
        peak = int(printed.splitlines()[-1])
        above = (peak - imports) / 1024
        print(f"{kind:18} {took:7.1f} s, {above:6.0f} MiB above the imports", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mergekit", help="the mergekit-moe executable, in an environment of its own"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "btx_jax_mix_benchmark"
    )
    parser.add_argument("--solved", action="store_true", help="time regmean and ridge instead")
    args = parser.parse_args()
    folder: Path = args.folder
    write_models(folder)
    if args.solved:
        measure_solved(folder)
        return
    experts = [{"source_model": str(folder / name), "positive_prompts": [name]} for name in SOURCES]
    recipe = {
        "base_model": str(folder / SOURCES[0]),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts": experts,
    }
    for name, extra in (("copy", {}), ("average", {"base": "average"})):
        text = json.dumps(recipe | extra)  # JSON is YAML
        (folder / f"{name}.yml").write_text(text)
        for source in SOURCES:
            text = text.replace(f'"{folder / source}"', f'"{folder / source}-run"')
        (folder / f"{name}, from runs.yml").write_text(text)
    for source in SOURCES:
        run = folder / f"{source}-run"
        if not run.exists():
            timed([sys.executable, "-m", "btx_jax", "convert", str(folder / source), str(run)])
    names = [file.stem for file in sorted(folder.glob("*.yml"))]
    tokenizer = folder / SOURCES[0] / "tokenizer.json"
    if not tokenizer.exists():  # mergekit needs one in the base model
        from tokenizers import Tokenizer, models

        for name in SOURCES:
            Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(
                str(folder / name / tokenizer.name)
            )
            (folder / name / "tokenizer_config.json").write_text(
                '{"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}'
            )

    out, copied, run_of_out = folder / "mixed", folder / "copied", folder / "mixed-run"
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {"imports alone": int(timed([sys.executable, "-c", IMPORTS])[1])}
    read: dict[str, int] = {}
    for _ in range(args.rounds):
        for name in names:
            shutil.rmtree(out, ignore_errors=True)
            took, printed = timed(
                [sys.executable, "-c", MEASURE, "mix", str(folder / f"{name}.yml"), str(out)]
                + ["--format=huggingface"]
            )
            seconds.setdefault(f"btx_jax, base: {name}", []).append(took)
            before, *_, after, peak = printed.splitlines()
            peaks[f"base: {name}"] = int(peak)
            read[f"base: {name}"] = int(after) - int(before)
        for name, source, target in (
            ("convert, from Hugging Face", out, run_of_out),
            ("convert, from a run", run_of_out, copied),
        ):
            shutil.rmtree(target, ignore_errors=True)
            took, printed = timed([sys.executable, "-c", MEASURE, "convert", source, target])
            seconds.setdefault(name, []).append(took)
            before, *_, after, peak = printed.splitlines()
            peaks[name], read[name] = int(peak), int(after) - int(before)
        shutil.rmtree(run_of_out)
        shutil.rmtree(copied)
        took, _ = timed(["sh", "-c", f"cp -r {out} {copied} && sync {copied}/*"])
        seconds.setdefault("cp -r and sync", []).append(took)
        if args.mergekit:
            shutil.rmtree(copied, ignore_errors=True)
            took, _ = timed(
                [args.mergekit, str(folder / "copy.yml"), str(copied), "--device", "cpu"],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
            seconds.setdefault("mergekit-moe", []).append(took)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"\n{size / 1e9:.2f} GB written; seconds, median of {args.rounds} rounds (min to max)")
    for name, times in seconds.items():
        print(f"{name:34} {statistics.median(times):6.1f} ({min(times):.1f} to {max(times):.1f})")
    for name, count in read.items():
        print(f"{name}: {count / 1e9:.2f} GB read")
    for name in names:
        for peer in ("cp -r and sync", "mergekit-moe"):
            if peer in seconds:
                ratios = [
                    b / a
                    for a, b in zip(seconds[peer], seconds[f"btx_jax, base: {name}"], strict=True)
                ]
                print(
                    f"base: {name} / {peer:16} {statistics.median(ratios):5.2f} ({min(ratios):.2f}"
                    f" to {max(ratios):.2f})"
                )
    print(
        "peak resident memory, MiB: "
        + ", ".join(f"{name} {peak / 1024:.0f}" for name, peak in peaks.items())
    )


if __name__ == "__main__":
    main()
