"""Broken checkpoints and recipes through the real command line: one clear line, exit status 2, and
nothing that looks like a result.

Each row of the table damages a copy of four small models in one way, and gives what the line must
contain.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from btx_jax.cli.program import run
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "mixing" / "golden"
GATE = "model.layers.1.mlp.gate_proj.weight"


def edit(model, change):
    """Rewrite model.safetensors with changed tensors, unchecked."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def edit_config(model, **values):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


def edit_recipe(home, change):
    recipe = yaml.safe_load((home / "recipe.yml").read_text())
    change(recipe)
    (home / "recipe.yml").write_text(yaml.safe_dump(recipe))


def truncate(home):
    file = home / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def set_value(value):
    def change(tensors):
        tensors[GATE][0, 0] = value

    return change


def shards(
    home, *, names=("model-1.safetensors", "model-2.safetensors"), twice=False, without=None
):
    """Store b as two shards with an index."""
    model = home / "b"
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    keys = sorted(tensors)
    parts = [keys[:10], keys[9 if twice else 10 :]]
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        if name != without and not name.startswith(".."):
            save_file({key: tensors[key] + (i if twice else 0) for key in part}, model / name)
    weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def pickle_only(home):
    (home / "b" / "model.safetensors").rename(home / "b" / "pytorch_model.bin")


def lora(home):
    shutil.rmtree(home / "b")
    (home / "b").mkdir()
    (home / "b" / "adapter_config.json").write_text("{}")


def misspell(recipe):
    recipe["gate_mod"] = recipe.pop("gate_mode")


def drop_prompts(recipe):
    del recipe["experts"][1]["positive_prompts"]


def other_tokenizer(home):
    path = home / "b" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))


TABLE = [
    ("truncated file", truncate, "b/model.safetensors: truncated"),
    ("not a safetensors file", lambda home: (home / "b" / "model.safetensors").write_bytes(b"hello, world"), "truncated or not a safetensors"),
    ("wrong shape", lambda home: edit(home / "b", lambda t: t.update({GATE: t[GATE][:-1].copy()})), f"{GATE} is (23, 16), not (24, 16)"),
    ("missing tensor", lambda home: edit(home / "b", lambda t: t.pop(GATE)), f"missing {GATE}"),
    ("missing shard", lambda home: shards(home, without="model-2.safetensors"), "missing shard model-2.safetensors"),
    ("NaN", lambda home: edit(home / "b", set_value(np.nan)), f"NaN or infinity in {GATE}"),
    ("infinity", lambda home: edit(home / "b", set_value(-np.inf)), f"NaN or infinity in {GATE}"),
    ("extra tensor", lambda home: edit(home / "b", lambda t: t.update(extra=t[GATE].copy())), "unknown extra"),
    ("duplicate", lambda home: shards(home, twice=True), "in two shards with different values"),
    ("wrong dtype", lambda home: edit(home / "b", lambda t: t.update({GATE: t[GATE].astype(np.int8)})), f"{GATE} is I8, not one of F32"),
    ("other heads", lambda home: edit_config(home / "b", num_key_value_heads=4), "kv_heads: 2 against 4"),
    ("other rope", lambda home: edit_config(home / "b", rope_parameters={"rope_theta": 5e5}), "rope_theta: 10000.0 against 500000.0"),
    ("other vocabulary", lambda home: edit_config(home / "b", vocab_size=300), "vocab_size: 259 against 300"),
    ("other depth", lambda home: edit_config(home / "b", num_hidden_layers=2), "layers: 3 against 2"),
    ("other width", lambda home: edit_config(home / "b", hidden_size=32), "d_model: 16 against 32"),
    ("other norm epsilon", lambda home: edit_config(home / "b", rms_norm_eps=1e-6), "norm_eps: 1e-05 against 1e-06"),
    ("other tokenizer", other_tokenizer, "tokenizer: "),
    ("misspelt recipe key", lambda home: edit_recipe(home, misspell), "recipe.gate_mod: unknown key; did you mean 'gate_mode'?"),
    ("k > E", lambda home: edit_recipe(home, lambda r: r.update(experts_per_token=4)), "experts_per_token=4: more than the 3 experts"),
    ("missing prompts", lambda home: edit_recipe(home, drop_prompts), "experts[1]: no positive_prompts"),
    ("missing source", lambda home: shutil.rmtree(home / "b"), "experts[1].source_model: "),
    ("index that leaves the directory", lambda home: shards(home, names=("../a/model.safetensors", "x.safetensors")), "refusing to read"),
    ("pickle", pickle_only, "pytorch_model.bin is a pickle"),
    ("LoRA directory", lora, "is a LoRA adapter, not a model; merge it into its base first"),
    ("wrong architecture", lambda home: edit_config(home / "b", model_type="gpt2", architectures=["GPT2LMHeadModel"]), "GPT2LMHeadModel"),
    ("damaged config.json", lambda home: (home / "b" / "config.json").write_text('{"model_type": '), "b/config.json: Expecting value"),
    ("damaged recipe", lambda home: (home / "recipe.yml").write_text("experts: [a"), "recipe.yml: while parsing"),
    ("existing target", lambda home: (home / "out").mkdir(), "out exists; delete it or choose another name"),
]  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("base", "a", "b", "c"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    recipe = json.loads((GOLDEN / "recipe.yml").read_text()) | {"gate_mode": "cheap_embed"}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        run([str(argument) for argument in arguments])
    error = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("btx_jax: error: ")
    ]
    assert stopped.value.code == 2 and len(error) == 1
    return error[0]


@pytest.mark.parametrize(
    ("damage", "message"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_mixing_broken_inputs(home, capsys, damage, message):
    damage(home)
    before = sorted(path.name for path in home.iterdir())
    assert message in fails(capsys, "mix", "recipe.yml", "out")
    assert sorted(path.name for path in home.iterdir()) == before, "something was left behind"
    assert not (home / "out").exists() or not any((home / "out").iterdir())


@pytest.mark.parametrize(
    ("damage", "message"), [row[1:] for row in TABLE[:10]], ids=[row[0] for row in TABLE[:10]]
)
def test_converting_broken_inputs(home, capsys, damage, message):
    damage(home)
    assert message in fails(capsys, "convert", "b", "out")
    assert not (home / "out").exists() and not list(home.glob(".out*"))


@pytest.mark.parametrize("command", [("mix", "recipe.yml"), ("convert", "b")])
def test_a_target_that_cannot_be_written(home, capsys, command):
    assert "cannot write" in fails(capsys, *command, home / "recipe.yml" / "out")


def test_a_header_that_lies_is_not_believed(home, capsys):
    file = home / "b" / "model.safetensors"
    data = bytearray(file.read_bytes())
    file.write_bytes(bytes(data).replace(b'"F32"', b'"F16"', 1))
    assert "is not where its shape" in fails(capsys, "convert", "b", "out")


def big(home, directory="big"):
    """A model whose conversion takes long enough to be interrupted."""
    config = json.loads((home / "a" / "config.json").read_text()) | {
        "intermediate_size": 200_000,
        "num_hidden_layers": 12,
    }
    (home / directory).mkdir()
    (home / directory / "config.json").write_text(json.dumps(config))
    small = load_file(home / "a" / "model.safetensors")
    tensors = {name: tensor for name, tensor in small.items() if ".layers." not in name}
    rng = np.random.default_rng(0)
    for layer in range(12):
        for name, tensor in small.items():
            if ".layers.0." in name:
                shape = tuple(200_000 if size == 24 else size for size in tensor.shape)
                tensors[name.replace(".0.", f".{layer}.", 1)] = rng.standard_normal(
                    shape, np.float32
                ).astype(ml_dtypes.bfloat16)
    save_file(tensors, home / directory / "model.safetensors")


def start(*arguments, **kwargs):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "btx_jax", *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


@pytest.mark.cli
def test_killed_midway_leaves_nothing_that_looks_finished_and_the_next_try_succeeds(home):
    big(home)
    process = start("convert", "big", "out")
    while process.poll() is None and not list(home.glob(".out.partial-*/checkpoints/0/params/*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, (
        "finished before it could be killed: make the model larger"
    )
    assert not (home / "out").exists() and list(home.glob(".out.partial-*"))
    again = start("convert", "big", "out")
    assert again.wait(120) == 0
    assert (home / "out").exists() and not list(home.glob(".out.partial-*"))


@pytest.mark.cli
@pytest.mark.parametrize("to", [pytest.param("huggingface", marks=pytest.mark.slow), "btx_jax"])
def test_a_full_disk_is_one_line_and_leaves_nothing(home, to):
    """No file may exceed 1 MB, which simulates a full disk."""
    big(home)
    if to == "huggingface":
        assert start("convert", "big", "ours").wait(120) == 0
    source = "ours" if to == "huggingface" else "big"
    limited = start(
        "convert",
        source,
        "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
    )
    _, error = limited.communicate(timeout=120)
    lines = [
        line for line in error.splitlines() if line.startswith("btx_jax: error: cannot write out")
    ]
    assert limited.returncode == 2 and len(lines) == 1, error[-2000:]
    assert "File too large" in lines[0] and "Traceback" not in error
    assert not (home / "out").exists() and not list(home.glob(".out*"))


CONFIGS = [
    ({"num_attention_heads": 0}, "num_attention_heads=0: must be a whole number"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: larger than in any model"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads='2': must be a whole number"),
    ({"max_position_embeddings": 128.0}, "max_position_embeddings=128.0: must be a whole number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be a positive number"),
    ({"rope_parameters": "linear"}, "rope_parameters='linear': must be an object"),
    ({"rope_parameters": {"rope_type": "linear"}}, "rope scaling linear without factor"),
    ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, "config.json: "),
    ({"model_type": ["llama"]}, "config.json: "),
]


@pytest.mark.parametrize(("values", "message"), CONFIGS)
def test_impossible_values_in_config_json(home, capsys, values, message):
    edit_config(home / "b", **values)
    assert message in fails(capsys, "convert", "b", "out")
    assert not (home / "out").exists()


@pytest.mark.parametrize("damage", ["about", "params/_METADATA", "params/manifest.ocdbt"])
def test_a_damaged_checkpoint_of_ours(home, capsys, damage):
    run(["convert", "b", "ours"])
    path = home / "ours" / "checkpoints" / "0" / damage
    for file in path.iterdir() if path.is_dir() else [path]:
        file.write_bytes(b"{")
    assert "is damaged" in fails(capsys, "convert", "ours", "out")
    assert "is damaged" in fails(capsys, "digest", "ours")
    assert not (home / "out").exists()


@pytest.mark.parametrize(
    "line", ["1: 2", "seed: -1", "gate_scale: .inf", "on: true", "noise: .nan", "&a [*a]"]
)
def test_odd_yaml(home, capsys, line):
    (home / "recipe.yml").write_text(
        yaml.safe_dump(json.loads((home / "recipe.yml").read_text())) + line + "\n"
    )
    fails(capsys, "mix", "recipe.yml", "out")


def test_weights_that_would_not_be_finite_are_not_written(home, capsys):
    edit_recipe(home, lambda r: r["experts"][0].update(noise_scale=float("nan")))
    assert "noise_scale=nan" in fails(capsys, "mix", "recipe.yml", "out")
    edit_recipe(
        home,
        lambda r: (
            r["experts"][0].update(noise_scale=0.0, residual_scale=1e30)
            or r.update(dtype="float16")
        ),
    )
    assert "float16" in fails(capsys, "mix", "recipe.yml", "out")
    edit(home / "base", lambda t: t["model.embed_tokens.weight"].fill(np.nan))
    edit_recipe(home, lambda r: r.update(gate_mode="hidden"))
    assert "NaN or infinity in model.embed_tokens.weight" in fails(
        capsys, "mix", "recipe.yml", "out"
    )
    assert not list(home.glob("*out*"))


def test_an_index_beside_a_single_file_that_it_does_not_name(home, capsys):
    shutil.copyfile(home / "b" / "model.safetensors", home / "kept")
    shards(home)
    shutil.move(home / "kept", home / "b" / "model.safetensors")
    run(["convert", "b", "out"])
    assert (home / "out").exists()
    assert "delete the outdated one" in capsys.readouterr().err
