"""Time of tokenising a text on one core and on several, alternating, from the demo corpora's
documents in random order.

    python benchmarks/prepare.py [--megabytes=200] [--cores=1,2] [--rounds=3] [--length=4096]

For each number of cores, prints wall-clock seconds and processor seconds of the process that reads,
packs and writes and of its workers, each the minimum of all rounds, and the speed-up over the first
number. Other programs on these cores affect wall-clock but not processor time, so the load is
printed. The resulting sets must be identical.
"""

import argparse
import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def write_text(folder: Path, megabytes: float) -> tuple[Path, Path]:
    """Write the benchmark's text; returns (text, tokenizer)."""
    from btx_jax.data import demo

    tokenizer = demo.tokenizer(folder)
    corpora = [demo.corpus(name, folder) for name in ("math", "code", "world", "prose")]
    lines = [
        line
        for corpus in corpora
        for line in gzip.decompress(corpus.read_bytes()).decode().splitlines(keepends=True)
    ]
    rng, left, text = random.Random(0), megabytes * 1e6, folder / "text.jsonl"
    with text.open("w", encoding="utf-8") as file:
        while left > 0:
            left -= file.write(rng.choice(lines))
    return text, tokenizer


def prepare(text: Path, tokenizer: Path, length: int) -> dict[str, float | str]:
    """Prepare the text in this process; returns its measurements."""
    from btx_jax.config.config import DataConfig
    from btx_jax.data import prepare
    from btx_jax.data.tokenizers import load_tokenizer

    cache = text.parent / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    config = DataConfig(train=str(text), sequence_length=length, cache=str(cache))
    loaded = load_tokenizer(tokenizer)
    before, start = processor(), time.monotonic()
    prepare.prepare(config.train, config, loaded, "config.data.train")
    seconds = time.monotonic() - start
    own, workers = (now - then for now, then in zip(processor(), before, strict=True))
    (manifest,) = cache.glob("packed/*/manifest.json")
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    shutil.rmtree(cache)
    return {"clock": seconds, "own": own, "workers": workers, "digest": digest}


def processor() -> tuple[float, float]:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, children = (usage.ru_utime + usage.ru_stime for usage in usages)
    return own, children


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--cores", default="1,2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--tokenizer", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.text:
        print(json.dumps(prepare(args.text, args.tokenizer, args.length)))
        return
    counts = [int(count) for count in args.cores.split(",")]
    all_cores = sorted(os.sched_getaffinity(0))
    folder = Path(tempfile.mkdtemp(prefix="btx_jax-prepare-"))
    taken: dict[int, list[dict]] = {count: [] for count in counts}
    try:
        text, tokenizer = write_text(folder, args.megabytes)
        command = [sys.executable, __file__, f"--text={text}", f"--tokenizer={tokenizer}"]
        for _ in range(args.rounds):
            for count in counts:
                os.sched_setaffinity(0, all_cores[:count])
                done = subprocess.run(
                    [*command, f"--length={args.length}"],
                    env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
                    stdout=subprocess.PIPE,
                    check=True,
                )
                taken[count].append(json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(folder)
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{args.megabytes:g} MB, rows of {args.length}; load {load} on {len(all_cores)} cores")
    print(f"{'cores':>6}{'clock':>9}{'own':>9}{'workers':>9}{'times':>7}")
    least = {
        count: [min(each[key] for each in of) for key in ("clock", "own", "workers")]
        for count, of in taken.items()
    }
    for count, (clock, own, workers) in least.items():
        times = least[counts[0]][0] / clock
        print(f"{count:6}{clock:9.1f}{own:9.1f}{workers:9.1f}{times:7.2f}")
    digests = {each["digest"] for of in taken.values() for each in of}
    print("the same files" if len(digests) == 1 else "other files each time")


if __name__ == "__main__":
    main()
