"""lm-evaluation-harness's command line on checkpoints of ours, with tasks of its own kinds from
local files, without torch."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tokenizers

from btx_jax.checkpoints.training_state import About, Checkpoints
from btx_jax.config import CheckpointConfig
from btx_jax.model_config import ModelConfig
from btx_jax.models.llama import init_params

# One token a byte and nothing else; byte 0 ends documents.
BYTES = ModelConfig(
    vocab_size=256, layers=1, d_model=16, d_ff=16, heads=2, kv_heads=2, head_dim=8, context=128
)
TEXTS = ["Plain words.", "Ünïcödé: 𝄞 and a longer line, to need more than one window. " * 4]

COMMAND = """
import atexit, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec  # torch, where it is installed, is hidden: lm_eval takes it when it can
PathFinder.find_spec = lambda name, *where: None if name == "torch" else find(name, *where)
from btx_jax.__main__ import main
atexit.register(lambda: print("torch was imported:", "torch" in sys.modules))
main()
"""


@pytest.fixture
def uniform(tmp_path):
    """A checkpoint that gives every byte the probability 1 / 256."""
    params = init_params(BYTES, jax.random.key(0))
    params["head"]["kernel"] = jnp.zeros_like(params["head"]["kernel"])
    checkpoints = Checkpoints(tmp_path / "uniform", CheckpointConfig())
    checkpoints.save(About(BYTES, 0, {}), params)
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


def write_task(folder, name, rows, **settings):
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    loading = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    # YAML reads JSON.
    (folder / f"{name}.yaml").write_text(
        json.dumps({"task": name, **loading, **settings}), encoding="utf-8"
    )


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
        "lm_eval",
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
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
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
    from btx_jax.config import ComputeConfig
    from btx_jax.data.prepare import pack, text_document
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
