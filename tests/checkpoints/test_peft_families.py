"""LoRAs on every family of models, under the names of its modules in peft; those on Llama are in
test_adapter. For peft's own files and results in golden/peft_* see peft_peer."""

import dataclasses
import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from btx_jax.architectures.modules import modules_of_layer
from btx_jax.architectures.registry import known_families
from btx_jax.checkpoints import peft, peft_export
from btx_jax.checkpoints.checkpoint import adapter_tensors, find_checkpoint
from btx_jax.checkpoints.peft_config import CONFIG, TENSORS
from btx_jax.commands import adapter, convert
from btx_jax.config.model_config import LoRAConfig
from btx_jax.errors import UserError
from tests.architectures import goldens
from tests.checkpoints.adapters import GOLDEN, logits_of, mola_directory

MODELS = {name: find_checkpoint(goldens.FOLDER / name).metadata.model for name in goldens.names()}
DENSE = [name for name, model in MODELS.items() if not model.moe]
MIXTURES = [name for name, model in MODELS.items() if model.moe]
FAST = ("phi3", "qwen2", "qwen3_moe")  # fused modules, biases, experts
ATTENTION, ALL = ("q", "k", "v", "o"), ("q", "k", "v", "o", "gate", "up", "down")


def base(name):
    return str(goldens.FOLDER / name)


def lora_on(folder, name, targets, under=None):
    """An adapter directory with a different rank in every layer."""
    layers = MODELS[name].layers
    return mola_directory(
        folder,
        base=under or base(name),
        allocation=",".join("1" * layers),
        k=(1,),
        rank=tuple(range(2, 2 + layers)),
        targets=targets,
    )


def changed(tmp_path, name, config=None, tensors=None):
    """The golden LoRA of a family with changed settings or tensors."""
    folder = tmp_path / "peft"
    shutil.copytree(GOLDEN / f"peft_{name}", folder)
    told = json.loads((folder / CONFIG).read_text()) | (config or {})
    (folder / CONFIG).write_text(json.dumps(told))
    if tensors:
        held = load_file(folder / TENSORS)
        tensors(held)
        save_file(held, folder / TENSORS)
    return str(folder)


def same_tensors(one, other):
    a, b = (adapter_tensors(find_checkpoint(path)) for path in (one, other))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "llama_bias",
            r"left out, as they equal those of the base: model.layers.0.mlp.down_proj.bias, ",
        ),
        (
            "qwen2",
            r"left out, as they equal those of the base: model.layers.0.self_attn.q_proj.bias, ",
        ),
        ("qwen3", "12 maps of lower rank .*; 2 maps of another scale: taken into B, 2 rounded"),
        ("phi3", "; 3 maps of lower rank than .*; 7 maps of another scale: taken into B, every"),
    ],
)
def test_pefts_lora_computes_the_same_here_and_goes_back_to_the_bit(tmp_path, name, told):
    folder = GOLDEN / f"peft_{name}"
    held = np.load(folder / "expected.npz")
    line = adapter.import_peft(str(folder), base(name), str(tmp_path / "imported"))
    assert re.search(told, line), line
    ours = logits_of(tmp_path / "imported", held["tokens"])
    np.testing.assert_allclose(ours, held["logits"], atol=1e-4, rtol=0)
    assert np.abs(logits_of(base(name), held["tokens"]) - held["logits"]).max() > 1e-2
    adapter.export(str(tmp_path / "imported"), str(tmp_path / "back"), "peft")
    theirs, back = (load_file(path / TENSORS) for path in (folder, tmp_path / "back"))
    lora = {key: x.shape for key, x in theirs.items() if "lora_" in key}
    assert {key: x.shape for key, x in back.items()} == lora
    adapter.import_peft(str(tmp_path / "back"), base(name), str(tmp_path / "again"))
    same_tensors(tmp_path / "imported", tmp_path / "again")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
        for name in (*DENSE, *MIXTURES)
    ],
)
def test_lora_on_any_family_goes_to_peft_and_back_and_into_the_weights(tmp_path, name):
    """In float32, where merging does not round."""
    shutil.copytree(base(name), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
    wide = {key: x.astype(np.float32) for key, x in weights.items()}
    save_file(wide, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    targets = ATTENTION if MODELS[name].moe else ALL
    folder = lora_on(tmp_path / "lora", name, targets, under=tmp_path / "base")
    adapter.export(str(folder), str(tmp_path / "peft"), "peft")
    found = {
        re.fullmatch(r"base_model\.model\.model\.layers\.\d+\.(.+)\.lora_[AB]\.weight", key)[1]
        for key in load_file(tmp_path / "peft" / TENSORS)
    }
    family = known_families()[find_checkpoint(base(name)).metadata.huggingface["model_type"]]
    assert found == {
        module for module, held in modules_of_layer(family).items() if set(held) <= set(targets)
    }
    adapter.import_peft(str(tmp_path / "peft"), str(tmp_path / "base"), str(tmp_path / "again"))
    same_tensors(folder, tmp_path / "again")
    adapter.merge(str(folder), str(tmp_path / "merged"))
    tokens = goldens.expected(name)["tokens"][:, :64]
    alone, ours, merged = (logits_of(tmp_path / x, tokens) for x in ("base", "lora", "merged"))
    assert np.abs(ours - alone).max() > 1e-2
    np.testing.assert_allclose(ours, merged, atol=1e-4, rtol=0)
    kept = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert kept["model_type"] == family.model_type


def test_maps_of_a_fused_module_keep_their_own_a_and_what_is_not_adapted_takes_no_rank(tmp_path):
    folder = lora_on(tmp_path / "lora", "phi3", ("q", "v", "up"))
    adapter.export(str(folder), str(tmp_path / "peft"), "peft")
    found = find_checkpoint(folder)
    model, ours = found.metadata.model, adapter_tensors(found)
    theirs = load_file(tmp_path / "peft" / TENSORS)
    config = json.loads((tmp_path / "peft" / CONFIG).read_text())
    width, hidden = model.head_dim * model.kv_heads, model.d_ff
    for layer, spec in enumerate(model.lora.specs(model.layers)):
        a, b = (
            {target: ours[f"layers.{layer}.{target}.{x}"][0] for target in ("q", "v", "up")}
            for x in "ab"
        )
        for module, rank, rows in (
            ("self_attn.qkv_proj", 2 * spec.rank, (b["q"] @ a["q"], width, b["v"] @ a["v"])),
            ("mlp.gate_up_proj", spec.rank, (hidden, b["up"] @ a["up"])),
        ):
            name = f"model.layers.{layer}.{module}"
            theirs_a, theirs_b = (
                theirs[f"base_model.model.{name}.lora_{x}.weight"] for x in ("A", "B")
            )
            assert len(theirs_a) == config["rank_pattern"].get(name, config["r"]) == rank
            alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
            inputs = theirs_a.shape[1]
            wanted = [np.zeros((x, inputs)) if isinstance(x, int) else x for x in rows]
            np.testing.assert_allclose(
                alpha / rank * theirs_b @ theirs_a,
                spec.scale * np.concatenate(wanted),
                rtol=1e-5,
                atol=1e-6,
            )
    adapter.import_peft(str(tmp_path / "peft"), base("phi3"), str(tmp_path / "again"))
    same_tensors(folder, tmp_path / "again")


def test_a_run_of_a_family_is_adapted_by_the_familys_names(tmp_path):
    convert.run(base("phi3"), str(tmp_path / "run"))
    folder = lora_on(tmp_path / "lora", "phi3", ALL, under=tmp_path / "run")
    adapter.export(str(folder), str(tmp_path / "peft"), "peft")
    assert json.loads((tmp_path / "peft" / CONFIG).read_text())["target_modules"] == [
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
    ]
    adapter.import_peft(str(tmp_path / "peft"), str(tmp_path / "run"), str(tmp_path / "again"))
    same_tensors(folder, tmp_path / "again")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("phi3", {"target_modules": "all-linear"}),
        ("phi3", {"target_modules": ["qkv_proj", "o_proj", "mlp.gate_up_proj", "down_proj"]}),
        ("phi3", {"target_modules": r".*\.(qkv|o|gate_up|down)_proj"}),
        ("phi3", {"target_modules": "all-linear", "exclude_modules": ["q_proj", "lm_head"]}),
        ("qwen3", {"target_modules": "all-linear"}),
        ("qwen2", {"target_modules": None}),
        ("llama_bias", {"target_modules": "all-linear", "bias": "lora_only"}),
    ],
)
def test_settings_go_by_the_familys_own_names(tmp_path, name, change):
    adapter.import_peft(changed(tmp_path, name, change), base(name), str(tmp_path / "out"))
    adapter.import_peft(str(GOLDEN / f"peft_{name}"), base(name), str(tmp_path / "plain"))
    same_tensors(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (
            "phi3",
            {"target_modules": ["q_proj", "v_proj"]},
            "exclude modules that the file has .*qkv",
        ),
        (
            "phi3",
            {"exclude_modules": ["qkv_proj"]},
            r"exclude modules that the file has LoRA for: .*layers.0.self_attn.qkv_proj",
        ),
        (
            "phi3",
            {"layers_to_transform": [1], "target_modules": ["o_proj"]},
            "exclude modules that",
        ),
        ("phi3", {"target_modules": None}, "names no target_modules.*no default for phi3: list"),
        ("phi3", {"rank_pattern": {"qkv_proj": 3}}, "qkv_proj has rank 4, but r and rank_pattern"),
        ("qwen2", {"target_modules": "all-linear"}, "file lacks: model.layers.0.self_attn.k_proj"),
        ("qwen2", {"lora_bias": True}, "lora_bias=True.*B has no bias here; .*, else train one"),
        ("qwen2", {"modules_to_save": ["norm"]}, "modules_to_save: norm is missing"),
    ],
)
def test_settings_that_do_not_fit_the_family_are_told(tmp_path, name, change, told):
    folder = changed(tmp_path, name, change)
    with pytest.raises(UserError, match=told) as caught:
        adapter.import_peft(folder, base(name), str(tmp_path / "out"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


QKV = "base_model.model.model.layers.0.self_attn.qkv_proj"


def added(key, array):
    return lambda held: held.update({key: array})


def moved_bias(held):
    key = "base_model.model.model.layers.1.self_attn.v_proj.base_layer.bias"
    held[key] = held[key] + 1


@pytest.mark.parametrize(
    ("name", "tensors", "told"),
    [
        (
            "qwen2",
            moved_bias,
            r"\(modules_to_save, bias, .*layers.1.self_attn.v_proj.bias differs from the",
        ),
        (
            "qwen2",
            added("base_model.model.model.layers.0.self_attn.o_proj.bias", np.ones(24, "f4")),
            r"bias: the base has none there: base_model.*o_proj.bias",
        ),
        (
            "phi3",
            added(f"{QKV}.base_layer.weight", np.ones((48, 24), "f4")),
            r"layers.0.self_attn.qkv_proj.weight (is|differs from)",
        ),
        (
            "phi3",
            added(f"{QKV}.lora_B.weight", np.ones((24, 4), "f4")),
            r"0.self_attn.qkv_proj: A is \(4, 24\), B \(24, 4\), and the base .* 24 inputs and 48 ",
        ),
        ("phi3", added(f"{QKV}.lora_B.bias", np.ones(48, "f4")), "lora_bias: B has no bias here"),
    ],
)
def test_tensors_that_do_not_fit_are_told_by_the_files_names(tmp_path, name, tensors, told):
    folder = changed(tmp_path, name, tensors=tensors)
    with pytest.raises(UserError, match=told) as caught:
        adapter.import_peft(folder, base(name), str(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_a_model_that_hugging_face_has_not_is_told(tmp_path):
    under = find_checkpoint(base("mixtral_plain")).metadata
    moe = dataclasses.replace(under.model.moe, routing="switch")
    model = dataclasses.replace(under.model, moe=moe)
    for call in (
        lambda: peft.read(GOLDEN / "peft_qwen2", model, "mixtral"),
        lambda: peft_export.write(
            tmp_path,
            dataclasses.replace(model, lora=LoRAConfig("1,1", k=(1,), targets=("q",))),
            {},
            "base",
            "mixtral",
        ),
    ):
        with pytest.raises(
            UserError, match=r"peft adapts Hugging Face.s models, .*Mixtral.* switch"
        ):
            call()


def test_a_lora_of_another_family_is_one_line(tmp_path):
    for name, on, told in (
        (
            "llama_bias",
            "phi3",
            r"peft_llama_bias: a LoRA of another family: it is on mlp.gate_proj, .*q_proj, .*, as"
            r" llama has them, and BASE is a Phi3ForCausalLM with self_attn.qkv_proj, .*; name the"
            r" base that it was trained on \(its config says 'llama_bias'\)$",
        ),
        ("phi3", "qwen3", "on mlp.gate_up_proj, self_attn.qkv_proj, as phi3 has .*a Qwen3ForCausa"),
        ("qwen3", "mixtral_plain", "on mlp.down_proj, .*a MixtralForCausalLM with self_attn.q_pr"),
        (
            "qwen3",
            "qwen3_moe",
            "target_modules: LoRA on a module that cannot have it here; merge it with peft",
        ),
        ("qwen3", "qwen2", r"self_attn.q_proj: A is .*, and the base has a map of 24 inputs"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            adapter.import_peft(str(GOLDEN / f"peft_{name}"), base(on), str(tmp_path / "out"))
        assert "\n" not in str(caught.value)
