"""Two processes with four simulated devices each, through the real command line, as on a slice with
two hosts."""

import json
import time

import jax
import pytest

from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
from btx_jax.models.llama import abstract_params
from btx_jax.parallel.sharding import make_mesh, param_shardings

pytestmark = pytest.mark.cli

MESH = ("--config.mesh.fsdp=2", "--config.mesh.expert=4")


@pytest.fixture
def mixture(cli):
    """Four copies of a seed of three steps, as one MoE."""
    cli.run(*cli.seed("seed", steps=3))
    source = f"--config.mix.experts=('{cli.home / 'seed'}',)"
    cli.run("--config=configs/sparse_upcycling.py:tiny", f"--workdir={cli.home / 'mix'}", source)
    return cli.home / "mix"


def finetune(cli, mixture, workdir, *more, steps=24):
    return (
        "--config=configs/moe_finetune.py:tiny", f"--config.init={mixture}", f"--workdir={cli.home / workdir}",
        f"--config.data.train={cli.text}", f"--config.data.cache={cli.home / 'cache'}", "--config.data.sequence_length=64",
        f"--config.train.steps={steps}", "--config.train.warmup_steps=2", "--config.train.eval_every=12", "--config.train.eval_rows=8",
        "--config.checkpoint.every=5", *more,
    )  # fmt: skip


def losses(cli, workdir):
    lines = [
        json.loads(line) for line in (cli.home / workdir / "metrics.jsonl").read_text().splitlines()
    ]
    heldout = [line["heldout"]["text"]["nats_per_token"] for line in lines if "heldout" in line]
    return [line["loss"] for line in lines if "loss" in line], heldout


def finish(processes, statuses=(0, 0)):
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert tuple(process.returncode for process in processes) == statuses, "\n".join(
        text[-3000:] for text in told
    )
    return told


RIDGE = """
from btx_jax.config.config import *
from btx_jax.config.config_dict import to_config_dict
def get_config():
    data = DataConfig('text', domains={{'text': {text!r}, 'other': {other!r}}}, cache={cache!r},
                      sequence_length=64, heldout_fraction=0.2)
    mix = MixConfig(({seed!r}, {seed!r}), router='ridge', text=('text', 'other'))
    return to_config_dict(Config('mix', mix=mix, data=data, mesh=MeshConfig(fsdp=4, expert=2)))
"""


@pytest.mark.slow
def test_two_processes_solve_the_routers_that_one_does(cli):
    cli.run(*cli.seed("seed", steps=3))
    other = cli.home / "other.jsonl"
    lines = (json.dumps({"text": f"{n} + {n} = {2 * n}, " * 9}) + "\n" for n in range(300))
    other.write_text("".join(lines))
    places = {
        "text": cli.text,
        "other": other,
        "cache": cli.home / "cache",
        "seed": cli.home / "seed",
    }
    told = RIDGE.format(**{key: str(place) for key, place in places.items()})
    (cli.home / "ridge.py").write_text(told)
    for name, count in (("one", 1), ("two", 2)):
        arguments = (f"--config={cli.home / 'ridge.py'}", f"--workdir={cli.home / name}")
        finish(cli.start_several(count, 8 // count, *arguments), (0,) * count)
    one, two = (load_params(find_checkpoint(cli.home / name)) for name in ("one", "two"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert float(abs(a - b).max()) < 1e-5
    files = [cli.home / name / "router_statistics.safetensors" for name in ("one", "two")]
    assert files[0].stat().st_size == files[1].stat().st_size > 0


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_after_one_is_killed(cli, mixture):
    one = cli.start_several(1, 8, *finetune(cli, mixture, "one", *MESH))
    finish(one, (0,))
    told = finish(cli.start_several(2, 4, *finetune(cli, mixture, "two", *MESH)))
    want, got = losses(cli, "one"), losses(cli, "two")
    assert len(want[0]) == 24
    assert len(want[1]) == 3  # also before the first step
    for a, b in zip(want, got, strict=True):
        assert b == pytest.approx(a, abs=1e-5), (
            "two processes see other rows, or sum other gradients, than one"
        )
    assert "compiling" in told[0]
    assert "compiling" not in told[1], "one process tells, not two"

    killed = cli.start_several(2, 4, *finetune(cli, mixture, "killed", *MESH))
    cli.wait_for_step("killed", 8, killed[0])
    killed[1].kill()
    # The survivor may wait for minutes: a slice's machines are restarted together.
    for process in killed:
        process.kill()
        process.communicate()
    finish(cli.start_several(2, 4, *finetune(cli, mixture, "killed", *MESH)))
    assert losses(cli, "killed") == got
    assert cli.digest("killed") == cli.digest("two")

    found = find_checkpoint(cli.home / "two")
    whole = load_params(found)
    boxed = abstract_params(found.metadata.model)
    for shape in ((1, 1, 1, 1), (1, 2, 1, 1), (1, 2, 4, 1)):
        devices = jax.devices()[: shape[1] * shape[2]]
        shardings = param_shardings(boxed, make_mesh(shape, devices))
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), whole, shardings
        )
        for a, b in zip(
            jax.tree.leaves(load_params(found, abstract)), jax.tree.leaves(whole), strict=True
        ):
            assert a.sharding.num_devices == len(devices)
            assert (jax.device_get(a) == jax.device_get(b)).all()


@pytest.mark.slow
def test_two_processes_probe_mixing_as_one_and_after_both_are_killed(cli):
    cli.run(*cli.seed("seed", steps=3))

    def branch(workdir):
        return (
            "--config=configs/math_expert.py:tiny", f"--config.init={cli.home / 'seed'}", f"--workdir={cli.home / workdir}",
            f"--config.data.train={cli.text}", f"--config.data.cache={cli.home / 'cache'}", "--config.data.sequence_length=64",
            "--config.train.steps=12", "--config.train.warmup_steps=2", "--config.train.eval_every=6", "--config.train.eval_rows=8",
            "--config.checkpoint.every=4", "--config.mesh.fsdp=4", "--config.mesh.tensor=2",
        )  # fmt: skip

    def probed(workdir):
        lines = (cli.home / workdir / "metrics.jsonl").read_text().splitlines()
        found = [line for line in map(json.loads, lines) if "barrier" in line]
        return [
            number
            for line in found
            for number in (line["heldout_mixed"]["text"]["nats_per_token"], line["barrier"])
        ]

    finish(cli.start_several(1, 8, *branch("one")), (0,))
    finish(cli.start_several(2, 4, *branch("two")))
    assert len(probed("one")) == 6 and probed("one")[-1] != 0
    assert probed("two") == pytest.approx(probed("one"), abs=1e-5)
    killed = cli.start_several(2, 4, *branch("killed"))
    cli.wait_for_step("killed", 5, killed[0])
    for process in killed:
        process.kill()
        process.communicate()
    finish(cli.start_several(2, 4, *branch("killed")))
    assert probed("killed") == probed("two")


@pytest.mark.slow
def test_a_directory_that_is_not_shared_is_refused(cli, mixture):
    own = [(f"--workdir={cli.home / name}",) for name in ("own0", "own1")]
    both = cli.start_several(2, 4, *finetune(cli, mixture, "shared"), each=own)
    for text in finish(both, (2, 2)):
        assert "is not shared: process 1 does not see what process 0 writes" in text


def long_steps(cli, workdir, seconds, *more, count=2, accumulate=8, steps=2):
    """A run on two devices whose micro-batches each sleep for this long."""
    return cli.start_several(
        count,
        2 // count,
        seconds,
        *cli.seed(workdir, *more, steps=steps, every=100),
        f"--config.train.batch_size={2 * accumulate}",
        f"--config.train.accumulate={accumulate}",
        "--config.mesh.fsdp=2",
        module="tests.stages.long_steps",
    )


def interrupt(cli, workdir, processes, which):
    """Send SIGTERM to one process in the middle of step 2. Returns seconds until step 1 is saved,
    and until both have ended."""
    cli.wait_for_step(workdir, 1, processes[0])
    start = time.monotonic()
    processes[which].terminate()
    while not (cli.home / workdir / "checkpoints" / "1").is_dir():
        assert processes[0].poll() is None or time.monotonic() - start < 60
        time.sleep(0.05)
    saved = time.monotonic() - start
    told = finish(processes, (143, 143))
    assert "SIGTERM: saved step 1; run the same command to resume" in told[0]
    assert cli.steps_logged(workdir) == [1]
    return saved, time.monotonic() - start


def test_sigterm_to_one_process_drops_the_step_of_both_which_then_train_as_one_does(cli):
    finish(long_steps(cli, "one", 0, count=1), (0,))
    saved, _ = interrupt(cli, "two", long_steps(cli, "two", 2.5), 1)
    assert saved < 15, "a step takes 20 s"
    finish(long_steps(cli, "two", 0))
    want, got = losses(cli, "one"), losses(cli, "two")
    assert len(want[0]) == 2
    assert got[0] == pytest.approx(want[0], abs=1e-5)


@pytest.mark.slow
def test_steps_of_a_minute_survive_a_preemption(cli):
    """Within the 15 s that a preempted machine has."""
    finish(long_steps(cli, "whole", 0, accumulate=16))
    saved, ended = interrupt(cli, "run", long_steps(cli, "run", 3.75, accumulate=16), 0)
    assert saved < ended < 15
    finish(long_steps(cli, "run", 0, accumulate=16))
    assert cli.digest("run") == cli.digest("whole")


@pytest.mark.slow
def test_a_kill_loses_no_more_than_the_minutes_between_two_saves(cli):
    """Two steps of 2 s fit into this interval."""
    minutes, seconds = 0.15, 0.25
    every = f"--config.checkpoint.every_minutes={minutes}"
    both = long_steps(cli, "run", seconds, every, steps=1000)
    saved, directory = [0], cli.home / "run" / "checkpoints"
    cli.wait_for_step("run", 20, both[0])
    for process in both:
        process.kill()
        process.communicate()
    saved = max(int(path.name) for path in directory.iterdir() if path.name.isdigit())
    lines = [
        json.loads(line)
        for line in (cli.home / "run" / "metrics.jsonl").read_text().splitlines()
        if line.endswith("}")
    ]
    at = {line["step"]: line["wall_seconds"] for line in lines}
    assert saved > 2, "more than once"
    assert max(at.values()) - at[saved] <= 60 * minutes


EVALUATE = """
from btx_jax.config.config import *
from btx_jax.config.config_dict import to_config_dict
def get_config():
    models = {{'seed': '{home}/seed', 'again': '{home}/seed', 'mix': '{home}/mix'}}
    tasks = {{'choice': TaskConfig('multiple_choice', '{home}/choice.jsonl', '{{q}}'),
             'number': TaskConfig('exact_match', '{home}/choice.jsonl', '{{q}}', max_tokens=8)}}
    evaluate = EvaluateConfig(models, tasks=tasks, ensembles={{'btm': EnsembleConfig({{'seed': 'all', 'again': 'all'}})}}, rows=12)
    data = DataConfig('all', domains={{'all': '{text}'}}, sequence_length=64, heldout_fraction=0.1, cache='{home}/cache')
    compute = ComputeConfig('float32', remat='none')
    return to_config_dict(Config('evaluate', evaluate=evaluate, data=data, compute=compute, mesh=MeshConfig(fsdp=2, expert=4)))
"""


@pytest.mark.slow
def test_two_processes_that_share_their_rows_train_as_one(cli, mixture):
    mesh = ("--config.mesh.fsdp=1", "--config.mesh.context=8")
    for name, count in (("one", 1), ("two", 2)):
        run = finetune(cli, mixture, name, *mesh, steps=4)
        finish(cli.start_several(count, 8 // count, *run), (0,) * count)
    for a, b in zip(losses(cli, "one"), losses(cli, "two"), strict=True):
        assert b == pytest.approx(a, abs=1e-5), "the processes hold different rows"


@pytest.mark.slow
def test_two_processes_mix_and_evaluate_as_one(cli, mixture):
    """Losses, routing, test sets and generated answers; each file is written by one process
    only."""
    source = f"--config.mix.experts=('{cli.home / 'seed'}',)"
    finish(
        cli.start_several(
            2,
            4,
            "--config=configs/sparse_upcycling.py:tiny",
            f"--workdir={cli.home / 'mix2'}",
            source,
            "--config.mesh.fsdp=8",
        )
    )
    assert cli.digest("mix2") == cli.digest("mix")

    rows = [{"q": "the river", "choices": ["city", "paper"], "gold": 0, "answer": "1"}] * 3
    (cli.home / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = cli.home / "evaluate.py"
    file.write_text(EVALUATE.format(home=cli.home, text=cli.text))
    for name, count in (("one", 1), ("two", 2)):
        finish(
            cli.start_several(
                count, 8 // count, f"--config={file}", f"--workdir={cli.home / name}"
            ),
            (0,) * count,
        )
    want, got = (
        json.loads((cli.home / name / "results.json").read_text())["models"]
        for name in ("one", "two")
    )
    assert set(got) == {"seed", "again", "mix", "btm"}
    for name, model in got.items():
        assert model["nats_per_token"] == pytest.approx(want[name]["nats_per_token"], abs=1e-5)
        assert model.get("tasks") == want[name].get("tasks")
    assert got["btm"]["nats_per_token"] == pytest.approx(got["seed"]["nats_per_token"], abs=1e-6), (
        "two equal experts are one"
    )
    assert got["mix"]["routing"]["texts"] == want["mix"]["routing"]["texts"]
    for task in ("choice", "number"):
        one, two = (
            json.loads((cli.home / name / "parts" / "mix" / f"{task}.json").read_text())
            for name in ("one", "two")
        )
        assert one["items"] == two["items"] or task == "choice"


@pytest.mark.slow
def test_two_processes_train_lora_experts_as_one_and_resume(cli):
    cli.run(*cli.seed("seed", steps=3))
    items = cli.home / "items.jsonl"
    rows = [
        {"query": f"Item {i}: the river?", "choices": ["paper", "river"], "gold": 1}
        for i in range(300)
    ]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def lora(workdir, *more):
        return (
            "--config=configs/mola.py", f"--config.init={cli.home / 'seed'}", f"--workdir={cli.home / workdir}",
            f"--config.data.train={items}#@arc_easy", f"--config.data.cache={cli.home / 'cache'}", "--config.data.sequence_length=64",
            "--config.lora.allocation=2,3", "--config.train.steps=12", "--config.train.warmup_steps=2", "--config.train.eval_every=12",
            "--config.train.eval_rows=8", "--config.checkpoint.every=4", "--config.mesh.fsdp=2", "--config.mesh.tensor=2",
            # Masks belong to places in the batch, and processes interleave its rows
            "--config.lora.dropout=0.0", *more,
        )  # fmt: skip

    def told(workdir):
        lines = [
            json.loads(line)
            for line in (cli.home / workdir / "metrics.jsonl").read_text().splitlines()
        ]
        heldout = [
            value["nats_per_token"]
            for line in lines
            if "heldout" in line
            for value in line["heldout"].values()
        ]
        return [line["loss"] for line in lines if "loss" in line], heldout

    finish(cli.start_several(1, 4, *lora("one")), (0,))
    finish(cli.start_several(2, 2, *lora("two")))
    for a, b in zip(told("one"), told("two"), strict=True):
        assert b == pytest.approx(a, abs=1e-5), "other rows, other masks, or other gradients"
    killed = cli.start_several(2, 2, *lora("killed"))
    cli.wait_for_step("killed", 6, killed[0])
    for process in killed:
        process.kill()
        process.communicate()
    finish(cli.start_several(2, 2, *lora("killed")))
    assert cli.digest("killed") == cli.digest("two")
