"""SIGKILL, SIGINT and SIGTERM at random moments of train, mix, convert and a pipeline, repeating
the same command until it finishes: digests and metrics must equal those of an undisturbed run, and
no files may be left over.

    python tests/stages/storm.py [--signals=100] [--seed=0] [--home=DIR]

prints a table. Takes about ten seconds per signal.
"""

import argparse
import collections
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from btx_jax.data.sentencepiece_models import train_sentencepiece
from tests.conftest import sentences
from tests.stages.command_line import CLI, SMALL, heed_ctrl_c

SIGNALS = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
LITTER = ("*.partial-*", "*orbax-checkpoint-tmp*", "*.__lock*")
HANG = 180.0  # seconds

PIPELINE = """
from btx_jax.presets import recipes
from btx_jax.config.config import *
from btx_jax.config.config_dict import from_config_dict, to_config_dict
import importlib.util
def get_config():
    spec = importlib.util.spec_from_file_location('seed', 'configs/seed.py')
    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
    seed = to_config_dict(module.get_config('tiny'))
    for override in {small!r}:
        key, _, value = override.removeprefix('--config.').partition('=')
        *sections, last = key.split('.')
        at = seed
        for section in sections: at = at[section]
        at[last] = int(value)
    seed.data.train, seed.data.tokenizer, seed.data.cache = {text!r}, {tokenizer!r}, {cache!r}
    seed.train.steps, seed.checkpoint.every, seed.train.eval_every = 12, 5, 5
    mix = Config('mix', mix=MixConfig(('@seed',), copies=2), mesh=MeshConfig())
    stages = {{'seed': PipelineStage(from_config_dict(seed)), 'mix': PipelineStage(mix, needs=('seed',))}}
    return to_config_dict(Config('pipeline', pipeline=stages))
"""


class Storm:
    def __init__(self, home: Path, seed: int):
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.rng = home, random.Random(seed)
        tokenizer = home / "small.model"
        if not tokenizer.exists():
            train_sentencepiece(sentences(300), 320, tokenizer)
        self.cli = CLI(home, tokenizer)
        small = [s for s in SMALL if "eval_every" not in s]
        train = self.cli.seed(
            "train", "--config.train.eval_every=5", "--config.train.eval_rows=8", steps=60
        )
        (home / "pipeline.py").write_text(
            PIPELINE.format(
                small=small,
                text=str(self.cli.text),
                tokenizer=str(tokenizer),
                cache=str(home / "cache"),
            )
        )
        source = home / "source"
        mix = (
            "--config=configs/mix.py:tiny",
            f"--workdir={home / 'mix'}",
            f"--config.mix.experts=('{source}','{source}')",
        )
        self.commands = {
            "train": (self.launch(*train), "train"),
            "mix": (self.launch(*mix), "mix"),
            "convert": (["btx_jax", "convert", str(source), str(home / "convert")], "convert"),
            "pipeline": (
                self.launch(f"--config={home / 'pipeline.py'}", f"--workdir={home / 'pipeline'}"),
                "pipeline",
            ),
        }
        if not source.exists():
            self.cli.run(*self.cli.seed("source", steps=3))

    @staticmethod
    def launch(*arguments):
        return ["btx_jax.launch", *arguments]

    def start(self, kind: str) -> subprocess.Popen:
        command, _ = self.commands[kind]
        heed_ctrl_c()
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            env=self.cli.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def outcome(self, kind: str) -> dict[str, str]:
        """Everything that must not depend on interruptions."""
        out = self.home / self.commands[kind][1]
        found = {}
        for file in sorted(out.rglob("*")):
            name = str(file.relative_to(out))
            if file.name == "metrics.jsonl":
                lines = [json.loads(line) for line in file.read_text().splitlines()]
                kept = [
                    {key: x[key] for key in ("step", "loss", "heldout") if key in x} for x in lines
                ]
                found[name] = json.dumps(kept)
            elif file.name == "about" and int(file.parent.name) < max(
                int(step.name) for step in file.parents[1].iterdir() if step.name.isdigit()
            ):
                pass  # a step saved by a signal may displace another one
            elif file.name == "about" or file.name.endswith(".safetensors"):
                found[name] = (
                    self.cli.digest(file.parent)
                    if file.is_dir()
                    else hashlib.sha256(file.read_bytes()).hexdigest()
                )
        return found

    def litter(self) -> list[str]:
        return [str(p) for pattern in LITTER for p in self.home.rglob(pattern)]

    def clear(self, kind: str) -> None:
        shutil.rmtree(self.home / self.commands[kind][1], ignore_errors=True)

    def run(self, signals: int) -> collections.Counter:
        """Run the test. Raises AssertionError for any violation."""
        table: collections.Counter = collections.Counter()
        want, seconds = {}, {}
        for kind in self.commands:
            self.clear(kind)
            start = time.monotonic()
            told = self.start(kind).communicate(timeout=HANG)[1]
            seconds[kind] = time.monotonic() - start
            want[kind] = self.outcome(kind)
            assert want[kind], (kind, told[-2000:])
            self.clear(kind)
        progress = tqdm(total=signals, unit="signal")
        while progress.n < signals:
            kind = self.rng.choice(list(self.commands))
            for _ in range(1 + 2 * (kind in ("train", "pipeline"))):
                number = self.rng.choice(SIGNALS)
                process = self.start(kind)
                try:
                    process.wait(self.rng.uniform(0.2, 1.0) * seconds[kind])
                except subprocess.TimeoutExpired:
                    process.send_signal(number)
                told = process.communicate(timeout=HANG)[1]
                ended = process.returncode
                progress.update()
                table[kind, number.name, ended] += 1
                # Killed by the signal itself: before our first line, or after our last one.
                assert ended in (0, -number, 128 + number), (kind, number, ended, told)
                assert "Traceback" not in told, (kind, number, told)
                if number != signal.SIGKILL and kind == "convert" and ended:
                    whole = not (self.home / "convert").exists() or self.outcome(kind) == want[kind]
                    assert whole, "a part of what it would have written"
                    assert not self.litter()
            process = self.start(kind)
            told = process.communicate(timeout=HANG)[1]
            exists = kind == "convert" and "exists; delete it" in told  # it had finished before
            assert process.returncode == 0 or exists, (kind, told)
            assert self.outcome(kind) == want[kind], f"{kind}: another outcome"
            assert not self.litter(), self.litter()
            self.clear(kind)
        return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, default=None)
    args = parser.parse_args()
    home = args.home or Path(tempfile.mkdtemp(prefix="btx_jax-storm-"))
    table = Storm(home, args.seed).run(args.signals)
    for (kind, name, status), count in sorted(table.items()):
        print(f"{kind:10} {name:8} exit status {status:4}: {count}")
    print(f"{sum(table.values())} signals: same digests, same metrics, no litter")


if __name__ == "__main__":
    main()
