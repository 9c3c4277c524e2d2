"""lm-evaluation-harness on our checkpoints, without torch: its command line with tasks of its own
kinds from local files, and our model class compared with the answers of its own
(golden/lm_eval.json, by lm_eval_peer.py)."""

import functools
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tokenizers

from btx_jax.checkpoints.training_state import CheckpointMetadata, Checkpoints
from btx_jax.config.config import CheckpointConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import UserError
from btx_jax.models.llama import init_params
from tests.conftest import ROOT
from tests.evaluation.lm_eval_peer import write_model

GOLDEN = Path(__file__).parent / "golden"
TOLD = json.loads((GOLDEN / "lm_eval.json").read_text(encoding="utf-8"))

# One token per byte; byte 0 ends documents.
BYTES = ModelConfig(
    vocab_size=256, layers=1, d_model=16, d_ff=16, heads=2, kv_heads=2, head_dim=8, context=128
)
TEXTS = ["Plain words.", "Ünïcödé: 𝄞 and a longer line, to need more than one window. " * 4]

COMMAND = """
import atexit, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec  # torch, where it is installed, is hidden: lm_eval takes it when it can
PathFinder.find_spec = lambda name, *where: None if name == "torch" else find(name, *where)
from btx_jax.cli.program import run
atexit.register(lambda: print("torch was imported:", "torch" in sys.modules))
run(sys.argv[1:])
"""


@pytest.fixture
def uniform(tmp_path):
    """A checkpoint that gives every byte probability 1 / 256."""
    params = init_params(BYTES, jax.random.key(0))
    params["head"]["kernel"] = jnp.zeros_like(params["head"]["kernel"])
    checkpoints = Checkpoints(tmp_path / "uniform", CheckpointConfig())
    checkpoints.save(CheckpointMetadata(BYTES, 0, {}), params)
    checkpoints.close()
    letters = {
        letter: i for i, letter in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    (tmp_path / "uniform" / "tokenizer").mkdir()
    tokenizer.save(str(tmp_path / "uniform" / "tokenizer" / "tokenizer.json"))
    end = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\0")[0][0]
    (tmp_path / "uniform" / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": end})
    )
    return tmp_path / "uniform"


ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}


def write_task(folder, name, rows, **settings):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loading = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(
        json.dumps({"task": name, **loading, **settings}), encoding="utf-8"
    )


@pytest.mark.slow
def test_a_uniform_byte_model_has_eight_bits_per_byte(uniform, tmp_path):
    pytest.importorskip("lm_eval")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    metric = [{"metric": "bits_per_byte"}]
    write_task(
        tasks, "own_text", [{"text": t} for t in TEXTS], output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=metric,
    )  # fmt: skip
    rows = [
        {"q": "1 + 1 =", "choices": ["2", "eleven"], "gold": 0},
        {"q": "The sky is", "choices": ["a long answer", "blue"], "gold": 0},
    ]
    write_task(
        tasks, "own_choice", rows, output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="choices", doc_to_target="gold",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )  # fmt: skip
    write_task(
        tasks, "own_answer", [{"q": "Say a", "a": "b"}], output_type="generate_until", doc_to_text="{{q}}", doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip
    command = [sys.executable, "-c", COMMAND]
    command += [
        "lm-eval",
        "--model",
        "btx_jax",
        "--model_args",
        f"checkpoint={uniform}",
        "--tasks",
        "own_text,own_choice,own_answer",
    ]
    command += [
        "--include_path",
        str(tasks),
        "--output_path",
        str(tmp_path / "out"),
        "--batch_size",
        "4",
    ]
    environment = {**ENVIRONMENT, "HF_HOME": str(tmp_path / "home")}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    assert found["own_text"]["bits_per_byte,none"] == pytest.approx(8.0, abs=1e-6)
    assert found["own_choice"]["acc,none"] == 0.5, "the shorter choice is likelier: right once"
    assert "exact_match,none" in found["own_answer"]
    assert "own_text" in ran.stdout
    assert "torch was imported: False" in ran.stdout


def test_the_heldout_loss_of_that_model_is_eight_bits_too(uniform, one_device):
    from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
    from btx_jax.config.config import ComputeConfig
    from btx_jax.data.documents import pack, text_document
    from btx_jax.data.tokenizers import load_tokenizer
    from btx_jax.evaluation.heldout import make_heldout_step, mean_loss, token_losses

    found = find_checkpoint(uniform)
    tokenizer = load_tokenizer(found.tokenizer)
    packed = list(pack((text_document(text, tokenizer) for text in TEXTS), tokenizer, 32))
    rows = {name: jax.device_get(jnp.stack([row[name] for row in packed])) for name in packed[0]}
    compute = ComputeConfig(dtype="float32", remat="none")
    params = load_params(found)
    losses, *_ = token_losses(
        make_heldout_step(BYTES, compute, one_device), params, rows, 2, one_device
    )
    loss = mean_loss(losses, rows, tokenizer.eos)
    assert loss.nats_per_token == pytest.approx(math.log(256), abs=1e-6)
    assert loss.bytes == sum(len(text.encode()) for text in TEXTS) - 2, (
        "a document's first byte is no target"
    )
    assert loss.bits_per_byte == pytest.approx(8.0, abs=1e-6)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints of the golden answers: name -> Hugging Face directory."""
    folder = tmp_path_factory.mktemp("golden")
    for name, told in TOLD["models"].items():
        shutil.copytree(GOLDEN / f"lm_eval_{name}", folder / name)
        settings = {key: value for key, value in told.items() if key not in ("vocab", "twins")}
        write_model(folder / name, told["vocab"], dict(told["twins"]), **settings)
    return folder


@pytest.fixture(scope="module")
def models(checkpoints):
    """(name, --model_args) -> our model, each created once."""
    pytest.importorskip("lm_eval")
    from btx_jax.evaluation.lm_eval_model import BtxJaxLM

    @functools.cache
    def made(name, arguments="{}"):
        model = BtxJaxLM(pretrained=checkpoints / name, batch_size=4, **json.loads(arguments))
        if arguments != "{}":  # same weights: share compiled programs
            first = made(name)
            model.__dict__.update(_generator=first._generator, _score=first._score)
        return model

    return made


def ask(model, method, asked):
    from lm_eval.api.instance import Instance

    if method == "apply_chat_template":
        return [model.apply_chat_template(*request) for request in asked]
    requests = [Instance(method, {}, tuple(request), i) for i, request in enumerate(asked)]
    return getattr(model, method)(requests)


@pytest.mark.parametrize("number", range(len(TOLD["cases"])))
def test_answers_are_those_of_lm_evals_own_model(number, models):
    case = TOLD["cases"][number]
    model = models(case["model"], json.dumps(case["arguments"]))
    answers = ask(model, case["method"], case["asked"])
    if case["method"] == "loglikelihood":
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in case["answers"]]
        answers, wanted = ([p for p, _ in pairs] for pairs in (answers, case["answers"]))
        assert answers == pytest.approx(wanted, abs=2e-3)
    elif case["method"] == "loglikelihood_rolling":
        assert answers == pytest.approx(case["answers"], rel=1e-5)
    else:
        assert answers == case["answers"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, ["checkpoint=DIR"]),
        ({"checkpoint": "HERE", "pretrained": "HERE"}, ["once", "checkpoint=DIR"]),
        ({"checkpoint": "nowhere/at_all"}, ["checkpoint", "does not exist"]),
        ({"checkpoint": 7}, ["checkpoint", "does not exist"]),
        ({"pretrained": "HERE", "max_lenght": 64}, ["'max_lenght'", "did you mean 'max_length'?"]),
        ({"pretrained": "HERE", "self": 1}, ["'self'", "checkpoint, pretrained"]),
        ({"pretrained": "HERE", "max_length": 0}, ["max_length=0", "from 1 to 128"]),
        ({"pretrained": "HERE", "max_length": 4096}, ["max_length=4096", "from 1 to 128"]),
        ({"pretrained": "HERE", "max_gen_toks": "many"}, ["max_gen_toks=many", "whole number"]),
        ({"pretrained": "HERE", "dtype": "float16"}, ["dtype='float16'", "auto, float32, bfloat16"]),
        ({"pretrained": "HERE", "batch_size": "four"}, ["--batch_size=four"]),
        ({"pretrained": "HERE", "batch_size": "0"}, ["--batch_size=0"]),
        ({"pretrained": "HERE", "add_bos_token": "maybe"}, ["add_bos_token=maybe", "True or False"]),
        ({"pretrained": "HERE", "add_bos_token": True}, ["add_bos_token=True", "no BOS"]),
        ({"pretrained": "HERE", "prefix_token_id": 300}, ["prefix_token_id=300", "from 0 to 299"]),
        ({"pretrained": "HERE", "enable_thinking": True}, ["enable_thinking", "think_end_token"]),
        ({"pretrained": "HERE", "chat_template_args": "x"}, ["chat_template_args=x", "dictionary"]),
        ({"pretrained": "HERE", "device": "mps"}, ["--device mps", "cpu", "JAX_PLATFORMS"]),
        ({"pretrained": "HERE", "revision": "v2"}, ["revision=v2", "org/name@REVISION"]),
        ({"pretrained": "HERE", "peft": "a/b"}, ["peft=a/b", "adapter import"]),
        ({"pretrained": "HERE", "load_in_4bit": True}, ["load_in_4bit=True", "quantised"]),
        ({"pretrained": "HERE", "backend": "seq2seq"}, ["backend=seq2seq", "decoders"]),
        ({"pretrained": "HERE", "tokenizer": "nowhere"}, ["nowhere", "does not exist"]),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_told_in_one_line(arguments, told, checkpoints):
    pytest.importorskip("lm_eval")
    from btx_jax.evaluation.lm_eval_model import BtxJaxLM

    here = {
        key: checkpoints / "chat" if value == "HERE" else value for key, value in arguments.items()
    }
    with pytest.raises(UserError) as caught:
        BtxJaxLM.create_from_arg_obj(here)
    assert "\n" not in str(caught.value)
    for words in told:
        assert words in str(caught.value)


def test_arguments_that_ask_for_nothing_are_taken(checkpoints):
    pytest.importorskip("lm_eval")
    from btx_jax.evaluation.lm_eval_model import BtxJaxLM

    idle = "revision=main,trust_remote_code=True,parallelize=True,backend=causal,truncation=False,peft=None"
    model = BtxJaxLM.create_from_arg_string(
        f"pretrained={checkpoints / 'chat'},dtype=auto,max_length=64,{idle}".replace(
            ",peft=None", ""
        ),
        {"batch_size": "auto:4", "max_batch_size": 2, "device": "cuda:0"},
    )
    assert (model.max_length, model.max_gen_toks, model.batch_size) == (64, 256, 2)
    assert model.batch_sizes == {0: 2}, "what lm_eval reports of auto"
    assert (model.rank, model.world_size, model.eot_token_id) == (0, 1, 2)
    assert model.get_model_info()["model_dtype"] == "float32", "as most of it is stored"
    with pytest.raises(UserError, match="--model_args batch_size: give it as --batch_size"):
        BtxJaxLM.create_from_arg_obj({"batch_size": 4}, {"batch_size": 1})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"top_k": 5, "do_sample": True, "temperature": 1}, "top_k=5: not supported"),
        ({"min_p": 0.1, "temperature": 0.5}, "min_p=0.1: not supported"),
        (
            {"num_beams": 10},
            "num_beams=10: not supported; --gen_kwargs num_beams=1 turns it off",
        ),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2: not supported"),
        ({"suppress_tokens": [1]}, "suppress_tokens=[1]: not supported; leave it out"),
        ({"do_sample": True}, "do_sample=True: needs a temperature"),
        ({"do_sample": "perhaps"}, "do_sample=perhaps: must be True or False"),
        ({"temperature": "warm"}, "temperature=warm: must be a number"),
        ({"temperature": -1}, "temperature=-1: must be a number from 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.5}, "top_p=1.5: must be a number from 0 to 1"),
        ({"top_p": 0, "temperature": 1}, "top_p=0: must be above 0"),
        ({"max_gen_toks": 0}, "max_gen_toks=0: must be a whole number from 1"),
        ({"max_gen_toks": 128}, "max_gen_toks=128: leaves no room for a prompt within 128 tokens"),
        ({"max_length": 9}, "unknown 'max_length': use max_gen_toks"),
        ({"stop": "x"}, "unknown 'stop': give them as until"),
        ({"temprature": 1}, "unknown 'temprature': did you mean 'temperature'?"),
        ({"until": [3]}, "until=[3]: must be a text or a list of texts"),
    ],
)
def test_generation_settings_that_would_be_ignored_are_refused(options, told, models):
    with pytest.raises(UserError) as caught:
        ask(models("chat"), "generate_until", [["x", options]])
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_generation_settings_that_change_nothing_are_taken():
    pytest.importorskip("lm_eval")
    from btx_jax.evaluation.generation import Sampling
    from btx_jax.evaluation.lm_eval_arguments import generation

    idle = {"top_k": 50, "min_p": 0.1, "num_beams": 1, "length_penalty": 2.0, "use_cache": True}
    assert generation({"until": "\n", "max_new_tokens": 9, **idle}, 256) == (9, Sampling(), ("\n",))
    assert (
        generation({"until": None, "do_sample": False, "temperature": 0.7}, 7).sampling
        == Sampling()
    )
    drawn = generation({"temperature": 0.7, "top_p": 0.9, "top_k": 0}, 7)
    assert drawn == (7, Sampling(0.7, 0.9), ()), "a temperature alone asks for sampling"


def test_what_is_drawn_is_decided_by_lm_evals_seed(models):
    import numpy as np

    asked = [["The quick brown", {"temperature": 1.0, "max_gen_toks": 16}]] * 3
    np.random.seed(1234)
    first = ask(models("chat"), "generate_until", asked)
    assert len(set(first)) > 1, "repeats of a request differ"
    np.random.seed(1234)
    assert ask(models("chat"), "generate_until", asked) == first
    assert ask(models("chat"), "generate_until", asked) != first


@pytest.mark.parametrize(
    ("method", "request_", "told"),
    [
        ("loglikelihood", ["x", ""], "nothing to score after 'x'"),
        ("loglikelihood", ["x", "y" * 200], "at most 128 to be scored"),
        ("loglikelihood", ["x", "\ud800"], "Unicode"),
        ("generate_until", ["", {"max_gen_toks": 4}], "empty prompt"),
        ("generate_until", ["\ud800", {"max_gen_toks": 4}], "Unicode"),
    ],
)
def test_requests_that_cannot_be_answered_are_told_in_one_line(method, request_, told, models):
    with pytest.raises(UserError, match=told) as caught:
        ask(models("chat"), method, [request_])
    assert "\n" not in str(caught.value)


def test_a_template_that_changes_a_given_beginning_is_refused(checkpoints, tmp_path):
    pytest.importorskip("lm_eval")
    from btx_jax.evaluation.lm_eval_model import BtxJaxLM

    shutil.copytree(checkpoints / "chat", tmp_path / "shouting")
    template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    (tmp_path / "shouting" / "chat_template.jinja").write_text(template)
    model = BtxJaxLM(tmp_path / "shouting")
    messages = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "I am"}]
    assert model.apply_chat_template(messages) == "SAYI AM"
    with pytest.raises(UserError, match=r"changes the beginning of an answer.*'I am'"):
        model.apply_chat_template(messages, add_generation_prompt=False)


def test_templates_are_chosen_by_name(checkpoints, tmp_path, caplog):
    pytest.importorskip("lm_eval")
    from btx_jax.evaluation.lm_eval_model import BtxJaxLM

    shutil.copytree(checkpoints / "chat", tmp_path / "several")
    named = [
        {"name": name, "template": f"{name}: {{{{ messages[0]['content'] }}}}"}
        for name in ("default", "tools")
    ]
    config = tmp_path / "several" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": named}))
    model, asked = BtxJaxLM(tmp_path / "several"), [{"role": "user", "content": "Say"}]
    first = model.tokenizer_name
    assert model.chat_template(True) == "default: {{ messages[0]['content'] }}"
    assert model.apply_chat_template(asked) == "default: Say"
    assert model.chat_template("tools") and model.apply_chat_template(asked) == "tools: Say"
    assert model.tokenizer_name != first, "prompts that lm_eval has cached are another template's"
    with pytest.raises(UserError, match=r"default, tools.*'none'"):
        model.chat_template("none")
    alone = BtxJaxLM(checkpoints / "chat")
    assert alone.chat_template("tools").startswith("{% for m in messages %}<|im_start|>")
    assert "only one template" in caplog.text, "as lm_eval's own model, which takes it"


def test_answers_in_a_cache_are_of_one_model(checkpoints, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import CachingLM

    from btx_jax.evaluation.lm_eval_model import BtxJaxLM

    asked = [("The quick brown", {"max_gen_toks": 4})]
    first = ask(
        CachingLM(BtxJaxLM(checkpoints / "chat"), str(tmp_path / "a.db")), "generate_until", asked
    )
    again = CachingLM(BtxJaxLM(checkpoints / "chat", batch_size=2), str(tmp_path / "a.db"))
    again.lm.generate_until = None  # answers come from the cache
    assert ask(again, "generate_until", asked) == first
    with pytest.raises(
        UserError, match=r"a\.db holds answers of another model.*choose another file"
    ):
        CachingLM(BtxJaxLM(checkpoints / "chat", max_length=64), str(tmp_path / "a.db"))


def test_settings_of_a_checkpoint_that_are_not_applied_are_told(checkpoints, tmp_path, caplog):
    pytest.importorskip("lm_eval")
    from btx_jax.evaluation.lm_eval_model import BtxJaxLM

    shutil.copytree(checkpoints / "chat", tmp_path / "penalised")
    settings = {"eos_token_id": 2, "repetition_penalty": 1.1, "top_k": 20, "temperature": 0.7}
    (tmp_path / "penalised" / "generation_config.json").write_text(json.dumps(settings))
    model = BtxJaxLM(tmp_path / "penalised")
    ask(model, "generate_until", [["x", {"max_gen_toks": 2}], ["y", {"max_gen_toks": 2}]])
    ask(model, "generate_until", [["z" * 200, {"max_gen_toks": 2}]])
    (told, cut) = [record.getMessage() for record in caplog.records]
    assert told.endswith("generation_config's repetition_penalty=1.1: not applied here"), "once"
    assert cut == "1 of 1 texts are longer than 126 tokens and were truncated at the front"


def test_a_token_without_an_embedding_is_an_error_only_where_a_text_has_it(checkpoints, tmp_path):
    pytest.importorskip("lm_eval")
    from btx_jax.evaluation.lm_eval_model import BtxJaxLM

    shutil.copytree(checkpoints / "chat", tmp_path / "padded")
    file = tmp_path / "padded" / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": 300, "content": "[PAD]", "special": True, **flags})
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    model = BtxJaxLM(tmp_path / "padded")
    ((log_p, _),) = ask(model, "loglikelihood", [["x", " y"]])
    assert log_p < 0
    for method, request in (
        ("loglikelihood", ["x [PAD]", " y"]),
        ("loglikelihood", ["x", " y[PAD]"]),
        ("loglikelihood_rolling", ["x [PAD]"]),
        ("generate_until", ["x [PAD]", {"max_gen_toks": 2}]),
    ):
        with pytest.raises(
            UserError, match=r"'\[PAD\]' has id 300, but the model has only 300 emb"
        ):
            ask(model, method, [request])


@pytest.mark.slow
def test_the_command_line_asks_as_a_chat(checkpoints, tmp_path):
    pytest.importorskip("lm_eval")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_task(
        tasks, "own_chat", [{"q": "1 + 1?", "a": "2"}, {"q": "2 + 2?", "a": "4"}], output_type="generate_until", doc_to_text="{{q}}",
        doc_to_target="{{a}}", generation_kwargs={"until": ["\n"], "max_gen_toks": 4}, metric_list=[{"metric": "exact_match"}],
        fewshot_split="test", fewshot_config={"sampler": "first_n"}, gen_prefix="It is",
    )  # fmt: skip
    arguments = [
        "lm-eval", "--model", "btx_jax", "--model_args", f"pretrained={checkpoints / 'chat'},max_length=120", "--tasks", "own_chat",
        "--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "auto", "--limit", "1",
        "--num_fewshot", "1", "--apply_chat_template", "--system_instruction", "Be brief.", "--fewshot_as_multiturn",
    ]  # fmt: skip
    settings = tasks / "own_chat.yaml"
    told = json.loads(settings.read_text())
    del told["num_fewshot"]
    settings.write_text(json.dumps(told))
    environment = {**ENVIRONMENT, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", COMMAND]
    ran = subprocess.run(
        command + arguments, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("samples_*.jsonl")
    (sample,) = map(json.loads, file.read_text().splitlines())
    turns = [
        ("system", "Be brief."),
        ("user", "2 + 2?"),
        ("assistant", "It is 4"),
        ("user", "1 + 1?"),
    ]
    chat = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    asked = sample["arguments"]["gen_args_0"]["arg_0"]
    assert asked == chat + "<|im_start|>assistant\nIt is"
    assert "torch was imported: False" in ran.stdout


def test_what_lm_eval_cannot_read_is_told_in_its_own_words(monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    from btx_jax.cli.program import run

    def missing():
        raise FileNotFoundError("Unable to find\n '/a/file.jsonl'")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", missing)
    monkeypatch.setattr(sys, "argv", ["btx_jax"])
    with pytest.raises(SystemExit):
        run(["lm-eval", "--tasks", "x"])
    told = capsys.readouterr().err
    assert told == "btx_jax: error: lm_eval: Unable to find '/a/file.jsonl'\n"


def test_extras_have_names_that_every_pip_finds():
    """pip before 23.3 compares the requested name with the normalised one in the metadata."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = config["project"]["optional-dependencies"]
    assert all(name == re.sub(r"[-_.]+", "-", name).lower() for name in extras)
    (asked,) = re.findall(r"btx_jax\[([\w-]+)\]", (ROOT / "btx_jax" / "cli" / "use.py").read_text())
    assert asked in extras


FOUND = """
import sys
import lm_eval.models
from lm_eval.api.registry import get_model, model_registry
model_registry.register("btx_jax", target=sys.argv[1])
assert "btx_jax.evaluation.lm_eval_model" not in sys.modules, "not before it is asked for"
print(get_model("btx_jax").__name__)
"""


def test_the_entry_point_names_what_lm_evals_registry_can_load_when_it_is_asked_for():
    """As lm_eval's plug-ins will: a placeholder that our own registration must match."""
    pytest.importorskip("lm_eval")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (value,) = points["lm_eval.models"].values()
    assert list(points["lm_eval.models"]) == ["btx_jax"]
    told = subprocess.run(
        [sys.executable, "-c", FOUND, value],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert told.stdout == "BtxJaxLM\n", told.stderr[-3000:]


def test_lm_evals_own_command_finds_the_model_where_lm_eval_has_plug_ins(uniform, tmp_path):
    """With an installation's entry points, made here from pyproject.toml."""
    registry = pytest.importorskip("lm_eval.api.registry")
    if not hasattr(registry, "import_plugins"):
        pytest.skip(f"lm_eval {importlib.metadata.version('lm_eval')} has no plug-ins for models")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "site" / "btx_jax-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: btx_jax\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in points["lm_eval.models"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[lm_eval.models]", *lines]) + "\n")
    rows = [{"q": "1 + 1 =", "choices": ["2", "eleven"], "gold": 0}]
    write_task(
        tmp_path, "own_choice", rows, output_type="multiple_choice", doc_to_text="{{q}}",
        doc_to_choice="choices", doc_to_target="gold", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    told = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "btx_jax", "--tasks", "own_choice"),
            *("--model_args", f"checkpoint={uniform}", "--include_path", str(tmp_path)),
        ],
        env={**ENVIRONMENT, "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"},
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert told.returncode == 0 and "own_choice" in told.stdout, told.stderr[-3000:]
