"""`btx new`: from text to a config file that runs, and typical mistakes of newcomers."""

import dataclasses
import json

import pytest
from safetensors.numpy import load_file, save_file

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params
from btx_jax.cli.program import run as btx
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.models.llama import parameter_counts
from btx_jax.presets.config_file import read_config
from btx_jax.presets.recipes import MODELS
from tests.conftest import sentences
from tests.stages.test_evaluate import DENSE, checkpoint


@pytest.fixture
def here(tmp_path, tokenizer_file, monkeypatch):
    """An empty directory with a seed and text of three domains."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "seed", DENSE, 1, load_tokenizer(tokenizer_file))
    for number, name in enumerate(("law", "tales", "web")):
        text = "".join(
            json.dumps({"text": text}) + "\n" for text in sentences(150, seed=number + 1)
        )
        (tmp_path / f"{name}.jsonl").write_text(text)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "the river " * 50}))
    (tmp_path / "my.model").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "folder").mkdir()
    return tmp_path


def new(*words):
    btx(["new", "my_btx.py", *words])


SEED = "--seed=seed"
LAW, TALES, WEB = "--domain=law=law.jsonl", "--domain=tales=tales.jsonl", "--general=web.jsonl"


@pytest.mark.slow
def test_what_it_writes_runs_to_a_report(here, capsys):
    new(SEED, LAW, TALES, WEB, "--compare=dense")
    assert "btx run my_btx.py" in capsys.readouterr().out
    made = read_config("my_btx.py", [], "CONFIG")
    stages.run(made, here / "runs")
    results = json.loads((here / "runs/evaluate/results.json").read_text())
    assert set(results["models"]) == {
        *("seed", "expert_law", "expert_tales", "dense", "mixture_untuned", "mixture")
    }
    assert (here / "runs/report.html").stat().st_size > 10_000
    exported = find_checkpoint(here / "runs/export/model")
    assert exported.is_huggingface
    trained = load_params(find_checkpoint(here / "runs/finetune"))
    assert digest(load_params(exported)) == digest(trained)


def test_its_numbers_are_those_of_the_text(here):
    new(SEED, LAW, TALES, "--epochs=2")
    made = read_config("my_btx.py", [], "CONFIG")
    assert made.pipeline
    config = made.pipeline["expert_law"].config
    assert config.train and config.data
    prepared = made.pipeline["prepare"].config
    stages.run(prepared, here / "prepared")
    done = json.loads((here / "prepared/done.json").read_text())
    [law] = done["domains"]["law"]
    # Tokenised once: training uses the tokens that `btx new` counted.
    step = config.train.batch_size * config.data.sequence_length
    tokens = law["splits"]["train"]["tokens"]
    assert f"{2 * tokens:_}," in (here / "my_btx.py").read_text()
    assert abs(config.train.steps * step - 2 * tokens) <= step / 2
    assert law["splits"]["heldout"]["documents"]


def test_a_domain_of_few_documents_has_one_held_out(here):
    few = here / "few.jsonl"
    few.write_text("".join(json.dumps({"text": t * 20}) + "\n" for t in sentences(7, seed=9)))
    new(SEED, LAW, "--domain=few=few.jsonl")
    made = read_config("my_btx.py", [], "CONFIG")
    assert made.pipeline and made.pipeline["evaluate"].config.data
    assert made.pipeline["evaluate"].config.data.heldout_fraction > 0.05
    stages.run(made.pipeline["prepare"].config, here / "prepared")
    done = json.loads((here / "prepared/done.json").read_text())
    assert all(d[0]["splits"]["heldout"]["documents"] for d in done["domains"].values())


def test_a_seed_from_scratch(here):
    new("--seed=tiny", "--tokenizer=my.model", LAW, TALES)
    made = read_config("my_btx.py", [], "CONFIG")
    assert made.pipeline and made.pipeline["seed"].config.model
    assert made.pipeline["seed"].config.model.vocab_size == 320


@pytest.mark.parametrize(
    ("words", "method"),
    [
        (["--seed=exported"], "ffn_only"),  # trained by somebody else
        ([SEED], "btx"),  # trained here, on too little text
        ([SEED, "--method=flexolmo"], "flexolmo"),
        ([SEED, "--branch=law=seed"], "btx"),
        (["--seed=tiny", "--tokenizer=my.model"], "btx"),
        (["--seed=tiny", "--tokenizer=my.model", "--seed-tokens=30000000"], "ffn_only"),
    ],
    ids=str,
)
def test_the_method_suits_the_seed(here, words, method):
    btx(["convert", "seed", "exported"])
    [weights] = (here / "exported").glob("*.safetensors")
    save_file(load_file(weights), weights)  # without the history that ours carry
    new(*words, LAW, TALES)
    assert f'method="{method}"' in (here / "my_btx.py").read_text()


MISTAKES = {
    "no seed": ([LAW, TALES], "--seed: missing; name a checkpoint"),
    "no tokenizer": (["--seed=tiny", LAW, TALES], "--tokenizer: missing, but --seed=tiny is"),
    "a seed that is not there": (
        ["--seed=tny", LAW, TALES],
        "--seed=tny: neither an existing directory nor a size to train from scratch; did you"
        " mean 'tiny'?",
    ),
    "a tokenizer that is not there": (
        ["--seed=tiny", "--tokenizer=other.model", LAW, TALES],
        "error: --tokenizer: other.model does not exist",
    ),
    "a tokenizer that is none": (
        ["--seed=tiny", "--tokenizer=law.jsonl", LAW, TALES],
        "error: --tokenizer: law.jsonl is not a sentencepiece model",
    ),
    "a tokenizer beside a seed that has one": (
        [SEED, "--tokenizer=my.model", LAW, TALES],
        "--tokenizer=my.model: the seed is already trained; leave it out",
    ),
    "no domain": ([SEED], "--domain: missing; give one per domain"),
    "a domain without a name": ([SEED, "--domain=law.jsonl"], "must be NAME=FILES"),
    "a domain twice": ([SEED, LAW, LAW], "law is given twice"),
    "a path that is not there": ([SEED, LAW, "--domain=x=nowhere/*.txt"], "no file matches"),
    "a weight that is no number": (
        [SEED, LAW, "--domain=x=tales.jsonl:abc"],
        "--domain x: no file matches 'tales.jsonl:abc'; 'abc' is not a weight; give a number"
        " above 0, as in tales.jsonl:2",
    ),
    "files with a space between them": (
        [SEED, LAW, "--domain=x=tales.jsonl web.*"],
        "separate files by commas: 'tales.jsonl,web.*'",
    ),
    "a glob that the shell expanded": (
        [SEED, LAW, "--domain", "x=tales.jsonl", "web.jsonl", "one.jsonl"],
        "Got unexpected extra arguments (web.jsonl one.jsonl): quote globs ('*.txt') so that"
        " the shell does not expand them, and separate files by commas; see btx new --help",
    ),
    "a folder": ([SEED, LAW, "--domain=x=folder"], "is a directory; name its files"),
    "an empty file": ([SEED, LAW, "--domain=x=empty.jsonl"], "yields no document to train on"),
    "one document": (
        [SEED, LAW, "--domain=x=one.jsonl"],
        "'x' has no held-out document: its text is a single document",
    ),
    "a field that is not there": ([SEED, LAW, "--domain=x=tales.jsonl#body"], "body"),
    "one domain alone": ([SEED, LAW], "--domain: fewer than two and no general text"),
    "a name that is taken": (
        [SEED, LAW, "--domain=general=tales.jsonl"],
        "--domain general: not a valid name",
    ),
    "a branch without its text": ([SEED, LAW, TALES, "--branch=x=seed"], "--branch=x=...: no such"),
    "a branch that is not there": (
        [SEED, LAW, TALES, "--branch=law=nowhere"],
        "nowhere does not exist",
    ),
    "a method that does not exist": ([SEED, LAW, TALES, "--method=moe"], "'moe' is not one of"),
}


@pytest.mark.parametrize(("words", "told"), MISTAKES.values(), ids=MISTAKES)
def test_what_newcomers_get_wrong_is_one_line(here, capsys, words, told):
    with pytest.raises(SystemExit) as stopped:
        new(*words)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert told in lines[-1]
    assert not (here / "my_btx.py").exists()


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("nowhere/my.py", "FILE: nowhere is not a directory; create it first"),
        ("my.txt", "FILE: my.txt is a config, which must be a Python file; name it my.py"),
    ],
)
def test_where_it_cannot_be_written_is_told_before_text_is_read(here, capsys, file, told):
    with pytest.raises(SystemExit):
        btx(["new", file, SEED, LAW, TALES])
    assert capsys.readouterr().err.strip() == f"btx_jax: error: {told}"
    assert not (here / "runs").exists()


def test_a_file_that_is_there_is_kept(here, capsys):
    (here / "my_btx.py").write_text("mine")
    with pytest.raises(SystemExit):
        new(SEED, LAW, TALES)
    assert "my_btx.py exists already" in capsys.readouterr().err
    assert (here / "my_btx.py").read_text() == "mine"


def test_uneven_and_short_branches_are_warned_of(here, capsys):
    text = "".join(json.dumps({"text": t}) + "\n" for t in sentences(2000, seed=5))
    (here / "tales.jsonl").write_text(text)
    new(SEED, LAW, TALES)
    told = capsys.readouterr().err
    assert "tales: its branch is 1" in told and "times as long as that of law" in told
    assert "law: its branch learns little in" in told and "; give it more text" in told


def test_text_that_two_domains_have_in_common_is_warned_of(here, capsys):
    new(SEED, LAW, TALES, "--general=web.jsonl,law.jsonl")
    told = "law and general share text (law.jsonl), so their experts will be similar"
    [line] = [line for line in capsys.readouterr().err.splitlines() if "share text" in line]
    assert told in line and line.endswith("keep it in one domain only")
    (here / "my_btx.py").unlink()
    (here / "copy.jsonl").write_bytes((here / "law.jsonl").read_bytes())
    (here / "copied.jsonl").write_bytes((here / "tales.jsonl").read_bytes())
    new(SEED, "--domain=old=law.jsonl,tales.jsonl", "--domain=new=cop*.jsonl", WEB)
    assert "old and new share text (tales.jsonl is copied.jsonl and 1 more)," in (
        capsys.readouterr().err
    )
    (here / "my_btx.py").unlink()
    new(SEED, LAW, TALES, WEB)
    assert "share text" not in capsys.readouterr().err


def test_a_seed_too_large_for_its_text_is_warned_of(here, capsys):
    words = ("--tokenizer=my.model", LAW, TALES)
    new("--seed=llama3_8b", *words, "--seed-tokens=2000000")
    told = capsys.readouterr().err.splitlines()[0]
    large, small = (
        parameter_counts(dataclasses.replace(MODELS[name], vocab_size=320))[0]
        for name in ("llama3_8b", "tiny")
    )
    assert told == (
        f"btx_jax: warning: --seed=llama3_8b: {large:,} parameters learn little from 2,000,000"
        f" tokens, {2e6 / large:.2g} per parameter (20 are compute-optimal); use --seed=tiny"
        f" ({small:,}) or a checkpoint, or give more text"
    )
    (here / "my_btx.py").unlink()
    new("--seed=tiny", *words, "--seed-tokens=2000000")
    assert "learn little from" not in capsys.readouterr().err
    (here / "my_btx.py").unlink()
    new("--seed=tiny", *words, "--seed-tokens=20000")
    assert "compute-optimal); use a checkpoint, or give more text" in capsys.readouterr().err


def test_rows_are_as_long_as_asked(here, capsys):
    with pytest.raises(SystemExit):
        new(SEED, LAW, TALES, "--sequence-length=4096")
    assert (
        "--sequence-length=4096: longer than the seed's context; use at most"
        in capsys.readouterr().err
    )
    new(SEED, LAW, TALES, "--sequence-length=16", "--tokens=1000")
    assert "raise --tokens, or shorten rows (--sequence-length, now 16)" in capsys.readouterr().err
    assert "sequence_length=16," in (here / "my_btx.py").read_text()
