"""The real command line with every path on a bucket: the same weights as on a disk, whatever is
killed in between."""

import random
import signal
import time

import pytest

from btx_jax import buckets
from tests.stages.command_line import CLI
from tests.stages.storm import PIPELINE, SMALL

pytestmark = pytest.mark.cli

RECIPE = """
base_model: {home}/seed
gate_mode: random
experts:
  - source_model: {home}/seed
  - source_model: {home}/seed
"""


class Home:
    """The root of a test's paths: a directory on the disk or in a bucket."""

    def __init__(self, cli, home):
        self.cli, self.home = cli, home

    def seed(self, workdir, *more, steps=6):
        return self.cli.seed(
            "unused", *more, f"--workdir={self.home}/{workdir}", f"--config.data.train={self.home}/text.jsonl",
            f"--config.data.tokenizer={self.home}/small.model", f"--config.data.cache={self.home}/cache", steps=steps,
        )  # fmt: skip

    def btx(self, *arguments):
        return self.cli.run(*arguments, module="btx_jax")[0].strip()

    def digest(self, path):
        return self.btx("digest", f"{self.home}/{path}").splitlines()[-1]


@pytest.fixture
def homes(tmp_path, tokenizer_file, bucket, bucket_server, tmp_path_factory):
    cli = CLI(tmp_path, tokenizer_file)
    disk = tmp_path / "disk"
    disk.mkdir()
    for home in (disk, bucket):
        (home / "text.jsonl").write_bytes(cli.text.read_bytes())
        (home / "small.model").write_bytes(tokenizer_file.read_bytes())
    return Home(cli, disk), Home(cli, bucket)


@pytest.mark.slow
def test_all_that_runs_on_a_disk_runs_on_a_bucket_and_gives_the_same(homes):
    def everything(home):
        at = home.home
        home.cli.run(
            *home.seed("seed", "--config.train.eval_every=3", "--config.train.eval_rows=4")
        )
        (at / "mix.yml").write_text(RECIPE.format(home=at))
        home.btx("mix", f"{at}/mix.yml", f"{at}/mixed")
        home.btx("convert", f"{at}/seed", f"{at}/huggingface")
        home.btx("convert", f"{at}/huggingface", f"{at}/back")
        home.cli.run(
            "--config=configs/mola.py:tiny", f"--workdir={at}/lora", f"--config.init={at}/seed",
            f"--config.data.train={at}/text.jsonl", f"--config.data.cache={at}/cache",
            "--config.train.steps=2", "--config.train.eval_every=0", "--config.train.warmup_steps=1",
            "--config.data.sequence_length=64", "--config.data.tokenizer=", "--config.lora.allocation=22",
        )  # fmt: skip
        home.btx("adapter", "export", f"{at}/lora", f"{at}/adapter")
        home.btx("adapter", "merge", f"{at}/adapter", f"{at}/merged", "--expert", "0")
        assert "DAMAGED" not in home.btx("verify", f"{at}/seed") + home.btx(
            "verify", f"{at}/huggingface"
        )
        told = [home.digest(name) for name in ("seed", "mixed", "huggingface", "back", "merged")]
        return [*told, home.btx("generate", f"{at}/huggingface", "--prompt", "the river")]

    disk, bucket = homes
    assert everything(bucket) == everything(disk)
    on_bucket = buckets.objects(bucket.home)
    on_disk = [str(path.relative_to(disk.home)) for path in disk.home.rglob("*") if path.is_file()]

    def kept(names):
        """The names that are the same in either place."""
        own = ("/params/", "opt_state/", "tfevents", "cache/packed")
        return {name for name in names if not any(part in name for part in own)}

    assert kept(on_bucket) == kept(on_disk)


@pytest.mark.slow
def test_two_runs_do_not_share_a_directory_of_a_bucket(homes):
    _, bucket = homes
    run = bucket.seed("run", steps=4000)
    first = bucket.cli.start(*run)
    try:
        wait(lambda: (bucket.home / "run" / "config.json").exists(), first)
        assert "another process is using it" in bucket.cli.fails(*run)
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()


def wait(condition, process, seconds=180):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_a_pipeline_on_a_bucket_survives_kills_at_random_moments(homes, tmp_path):
    """Ten kills; their partial results are never mistaken for finished ones."""
    outcomes, seconds = [], 0.0
    for home, kills in zip(homes, (0, 10), strict=True):
        at, rng = home.home, random.Random(3)
        config = tmp_path / f"pipeline_{kills}.py"
        config.write_text(
            PIPELINE.format(
                small=[s for s in SMALL if "eval_every" not in s],
                text=f"{at}/text.jsonl",
                tokenizer=f"{at}/small.model",
                cache=f"{at}/cache",
            )
        )
        command = (f"--config={config}", f"--workdir={at}/pipeline")
        start = time.monotonic()
        for _ in range(kills):
            process = home.cli.start(*command)
            time.sleep(rng.uniform(2, 2 + seconds))
            process.kill()
            process.communicate()
            if (at / "pipeline" / "done.json").exists():
                buckets.remove(at / "pipeline")
                buckets.remove(at / "cache")
        home.cli.run(*command)
        seconds = min(time.monotonic() - start, 30)
        outcomes.append([home.digest("pipeline/seed"), home.digest("pipeline/mix")])
        assert "DAMAGED" not in home.btx("verify", f"{at}/pipeline")
    assert outcomes[0] == outcomes[1]


@pytest.mark.slow
def test_a_bucket_that_is_overloaded_for_a_while_costs_a_run_nothing(homes, bucket_server):
    _, bucket = homes
    until = []

    def fault(line):
        if "checkpoints" in line and not until:
            until.append(time.monotonic() + 5)
        return 503 if until and time.monotonic() < until[0] and not len(line) % 3 else 0

    bucket_server.fault = fault
    bucket.cli.run(*bucket.seed("run"))
    assert until
    bucket_server.fault = lambda line: 0
    assert (bucket.home / "run" / "done.json").exists()


@pytest.mark.slow
def test_rights_that_are_taken_away_in_the_middle_are_one_line_and_lose_nothing(
    homes, bucket_server
):
    disk, bucket = homes
    bucket_server.fault = lambda line: (
        403 if "checkpoints%2F6" in line or "checkpoints/6" in line else 0
    )
    told = bucket.cli.fails(*bucket.seed("run", "--config.checkpoint.every=3"))
    assert "cannot save to" in told or "refuses" in told
    assert "step 3 there is intact" in told
    bucket_server.fault = lambda line: 0
    bucket.cli.run(*bucket.seed("run", "--config.checkpoint.every=3"))
    disk.cli.run(*disk.seed("run", "--config.checkpoint.every=3"))
    assert bucket.digest("run") == disk.digest("run")


@pytest.mark.slow
def test_two_processes_run_on_a_bucket_as_one(homes):
    disk, bucket = homes
    mesh = ("--config.mesh.fsdp=4", "--config.train.batch_size=4")
    for home in (disk, bucket):
        for process in home.cli.start_several(2, 2, *home.seed("run", *mesh)):
            assert process.wait(timeout=300) == 0, process.communicate()[1][-3000:]
    assert bucket.digest("run") == disk.digest("run")
