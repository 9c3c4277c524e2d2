"""Declarations are strict: every tensor of a model occurs in exactly one place, and every key of
config.json is read, fixed or known to have no effect."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from btx_jax.architectures.family import KEYS, Family, tensor
from btx_jax.architectures.layout import constants, rows
from btx_jax.architectures.registry import family_for, known_families
from btx_jax.architectures.tensors import TensorId, slots
from btx_jax.checkpoints.checkpoint import find_checkpoint, open_reader
from btx_jax.checkpoints.huggingface_config import config_from_model, model_from_config
from btx_jax.commands import convert
from btx_jax.config.model_config import ModelConfig, MoEConfig
from btx_jax.errors import UserError
from tests.architectures import goldens

NAMES = goldens.names()
DECLARED = json.loads((goldens.FOLDER.parent / "config_keys.json").read_text())
# Training and generation settings, which do not affect anything computed here.
HARMLESS = {
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "initializer_range", "use_cache"),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "eod_token_id",
        "sep_token_id",
        "pretraining_tp",
        "output_router_logits",
    ),
    *("router_aux_loss_coef", "router_jitter_noise"),
}
COMMON = {*KEYS.values(), "rope_parameters"}
WINDOW = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


def golden_model(name):
    return find_checkpoint(goldens.FOLDER / name).metadata.model


@pytest.mark.parametrize("kind", DECLARED)
def test_every_key_that_transformers_declares_is_read_or_changes_nothing(kind):
    family = known_families()[kind]
    read = {*COMMON, *family.biases, *family.fixed, "original_max_position_embeddings"}
    read |= {*family.numbers.values(), family.query_scalar, family.activation_key}
    read |= {family.nope, family.nope_every_key, family.full_every_key}
    read |= WINDOW if family.window else set()
    read |= set(family.moe.all()) if family.moe else set()
    assert set(DECLARED[kind]) <= read | HARMLESS


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_a_model_lies_in_exactly_one_of_its_files(name):
    model = golden_model(name)
    config = json.loads((goldens.FOLDER / name / "config.json").read_text())
    family = known_families()[config["model_type"]]
    held = [part for row in rows(family, model) for parts in row.tensors for part in parts]
    assert sorted(held, key=str) == sorted(slots(model), key=str)
    names = {row.name for row in rows(family, model)} | set(constants(family, model))
    assert names == set(goldens.tensors(goldens.FOLDER / name))


def test_a_declaration_with_a_gap_or_an_overlap_is_refused():
    model, llama = golden_model("llama_plain"), known_families()["llama"]
    less = dataclasses.replace(llama, tensors=llama.tensors[:-2])
    with pytest.raises(ValueError, match=r"not declared: model\.layers\.0\.mlp\.down_proj"):
        rows(less, model)
    more = dataclasses.replace(llama, tensors=(*llama.tensors, tensor("x", "ffn/down")))
    with pytest.raises(ValueError, match=r"declared twice: model\.layers\.0\.mlp\.down_proj"):
        rows(more, model)


def test_names_are_what_published_digests_were_taken_over():
    model = dataclasses.replace(golden_model("mixtral_plain"), layers=1, moe=MoEConfig((2,)))
    assert [str(part) for part in slots(model)][:9] == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    ]
    assert str(TensorId("ffn/down", 3)) == "model.layers.3.mlp.down_proj.weight"


LLAMA = ModelConfig(61, 2, 32, 48, 4, 2, 8)
TWO = MoEConfig((3, 3))
OLMO = {"norms": "after", "qk_norm": True, "qk_norm_kind": "width"}
EXAONE = {
    "norms": "after",
    "qk_norm": True,
    "window": 8,
    "window_layers": (0,),
    "nope_layers": (1,),
}


@pytest.mark.parametrize(
    ("origin", "changes", "written"),
    [
        ("", {}, "llama"),
        ("", {"d_model": 30}, "mistral"),
        ("", {"window": 8}, "mistral"),
        ("", {"moe": TWO}, "mixtral"),
        ("llama", {"moe": TWO}, "mixtral"),
        ("mistral", {}, "mistral"),
        ("qwen2", {"biases": ("q", "k", "v")}, "qwen2"),
        ("qwen2", {"biases": ("q", "k", "v"), "moe": TWO}, "qwen2_moe"),
        ("qwen3", {"qk_norm": True, "moe": TWO}, "qwen3_moe"),
        ("qwen2", {"biases": ("q", "k", "v"), "window": 8, "window_layers": (1,)}, "qwen2"),
        ("exaone4", EXAONE, "exaone4"),
        ("exaone4", EXAONE | {"window": 0, "window_layers": (), "nope_layers": ()}, "exaone4"),
        ("olmo2", OLMO, "olmo2"),
        ("olmo2", OLMO | {"moe": TWO}, "flex_olmo"),
        ("olmo", {"norm": "layer"}, "olmo"),
        ("olmo", {"norm": "layer", "moe": TWO}, "mixtral"),
        ("mixtral", {"norm": "layer"}, "olmo"),
        ("phi3", {}, "phi3"),
        ("phi3", {"moe": TWO}, "mixtral"),
        ("internlm3", {"moe": TWO}, "mixtral"),
        ("mixtral", {}, "llama"),
        ("qwen3_moe", {"qk_norm": True}, "qwen3"),
        ("deepseek", {"moe": TWO}, "deepseek"),
        ("llama", {"moe": MoEConfig((3, 3), shared_d_ff=96)}, "deepseek"),
        ("llama", {"moe": MoEConfig((3, 3), shared_d_ff=16, shared_gate=True)}, "qwen2_moe"),
        ("llama", {"moe": MoEConfig((0, 3))}, "qwen2_moe"),
        ("llama", {"moe": TWO, "biases": ("q", "k", "v", "o")}, "deepseek"),
        ("llama", {"moe": MoEConfig((3, 3), renormalise=False)}, "qwen2_moe"),
    ],
)
def test_a_model_is_written_as_what_it_came_from_its_home_or_what_holds_it(
    origin, changes, written
):
    assert family_for(dataclasses.replace(LLAMA, **changes), origin).model_type == written


@pytest.mark.parametrize(
    ("origin", "changes", "told"),
    [
        (
            "phi3",
            {"rotary": 0.75, "moe": TWO},
            r"MixtralForCausalLM cannot hold heads of which 0\.75 rotates",
        ),
        ("llama", {"biases": ("down",)}, "LlamaForCausalLM cannot hold a bias on down and none on"),
        ("qwen3", {"qk_norm": True, "moe": MoEConfig((3, 3), shared_d_ff=8)}, "a shared expert"),
        ("llama", {"biases": ("q", "k", "v"), "qk_norm": True}, "norms on queries and keys"),
        (
            "exaone4",
            EXAONE | {"nope_layers": ()},
            "Exaone4ForCausalLM cannot hold other layers without RoPE than those without a window",
        ),
        ("glm", {"rotary": 0.5, "moe": TWO}, r"cannot hold heads of which 0\.5 rotates"),
        (
            "olmo2",
            OLMO | {"moe": MoEConfig((3, 3), anchor=True, renormalise=False)},
            "FlexOlmoForCausalLM cannot hold an anchor, beside which the router adds a bias to each",
        ),
        (
            "deepseek",
            {"moe": MoEConfig((3, 3), k=1, shared_d_ff=48)},
            "one expert for a token with a gate of one",
        ),
    ],
)
def test_a_model_that_nothing_holds_is_refused_with_what_is_lacking(origin, changes, told):
    with pytest.raises(UserError, match=told) as refused:
        family_for(dataclasses.replace(LLAMA, **changes), origin)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        (
            "qwen3",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping=50.0: is not supported",
        ),
        ("qwen2", {"logit_scale": 0.0625}, "logit_scale=0.0625: is not supported"),
        ("phi3", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new' is not supported"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window='yes': must be true or false"),
        ("qwen2_window", {"layer_types": ["full_attention"]}, "must name the kind of each of 2"),
        ("qwen3_moe", {"mlp_only_layers": "1"}, "mlp_only_layers='1': must be a list of layers"),
        (
            "qwen3_moe",
            {"num_local_experts": 10**6},
            "num_experts=1000000: larger than in any model",
        ),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob=1: must be true or false"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0: must be a whole number"),
        ("qwen2_moe", {"num_experts_per_tok": 9}, "k=9: more than the 5 experts"),
        (
            "qwen2_moe",
            {"decoder_sparse_step": 9},
            "decoder_sparse_step: no layer has experts",
        ),
        (
            "qwen2_moe",
            {"shared_expert_intermediate_size": 0},
            "size=0: must be a whole number of at",
        ),
        ("phi35", {"rope_parameters": {"rope_type": "longrope"}}, "longrope without short_factor"),
        (
            "phi4_mini",
            {"partial_rotary_factor": 0.5, "rope_parameters": None},
            "original_max_position_embeddings|short_factor|rotary",
        ),
    ],
)
def test_a_key_that_changes_the_function_is_read_or_refused_by_name(name, change, told):
    config = json.loads((goldens.FOLDER / name / "config.json").read_text())
    if name == "phi4_mini":  # its value is applied
        assert model_from_config(config | change, "config.json").rotary == 0.5
        return
    with pytest.raises(UserError, match=told) as refused:
        model_from_config(config | change, "config.json")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["qwen3", "phi3", "qwen2_moe"])
def test_an_unmapped_a_missing_and_a_misshapen_tensor_are_told_together(name, tmp_path):
    shutil.copytree(goldens.FOLDER / name, tmp_path / name)
    tensors = goldens.tensors(tmp_path / name)
    first, second, *_ = sorted(key for key in tensors if ".layers.1." in key)
    del tensors[first]
    tensors[second] = tensors[second][:-1].copy()
    tensors["model.layers.1.mlp.surprise.weight"] = np.zeros(3, np.float32)
    save_file(tensors, tmp_path / name / "model.safetensors")
    with pytest.raises(UserError) as refused:
        open_reader(find_checkpoint(tmp_path / name))
    told = str(refused.value)
    assert "3 problems" in told and "\n" not in told
    assert (
        f"missing {first}" in told and f"{second} is" in told and "unknown model.layers.1" in told
    )


def test_a_mixture_without_a_home_is_refused_before_anything_is_written(tmp_path):
    source = goldens.FOLDER / "phi4_mini"
    convert.run(str(source), str(tmp_path / "ours"))
    model = dataclasses.replace(golden_model("phi4_mini"), moe=MoEConfig((2, 2)))
    with pytest.raises(UserError, match=r"MixtralForCausalLM cannot hold heads of which 0\.75"):
        family_for(model, "phi3")
    assert isinstance(known_families()["phi3"], Family)


def test_what_one_class_ignores_another_reads():
    """transformers reads num_local_experts in Qwen3Moe, but not in Qwen2Moe."""
    for name, experts in (("qwen2_moe", 5), ("qwen3_moe_norm", 3)):
        config = json.loads((goldens.FOLDER / name / "config.json").read_text())
        model = model_from_config(config | {"num_local_experts": 3}, name)
        assert max(model.moe.experts) == experts


def test_deepseek_never_renormalises_the_gate_of_one_expert():
    family = known_families()["deepseek"]
    model = dataclasses.replace(LLAMA, moe=MoEConfig((3, 3), k=1, renormalise=False))
    assert not family.lacks(model)
    written = config_from_model(model, family, "float32", {})
    assert (written["norm_topk_prob"], written["num_experts_per_tok"]) == (True, 1)
    assert model_from_config(written, "x") == model


@pytest.mark.parametrize("context", [64, 8])
def test_layers_without_rope_are_known_by_their_kind_whatever_the_window_sees(context):
    """A window may cover the whole context; layers that have it still use RoPE."""
    family = known_families()["exaone4"]
    model = dataclasses.replace(LLAMA, **EXAONE, context=context)
    if context == 8:
        model = dataclasses.replace(model, window=0, window_layers=())
    written = config_from_model(model, family, "float32", {})
    assert written["layer_types"] == ["sliding_attention", "full_attention"]
    assert model_from_config(written, "x") == model


def test_the_last_layer_with_experts_is_the_last():
    config = json.loads((goldens.FOLDER / "ernie_moe" / "config.json").read_text())
    assert config["moe_layer_end_index"] == 2
    model = model_from_config(config, "x")
    assert model.moe.experts == (0, 5, 5)
    assert model_from_config(config | {"moe_layer_end_index": -1}, "x") == model
    with pytest.raises(UserError, match="moe_layer_end_index=1: must be the last layer, or -1"):
        model_from_config(config | {"moe_layer_end_index": 1}, "x")


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "smollm3"])
def test_a_window_in_some_layers_is_written_as_it_was_read(kind):
    family = known_families()[kind]
    biases = family.always_biased()
    model = dataclasses.replace(LLAMA, window=8, window_layers=(1,), biases=biases)
    assert family_for(model, kind) == family
    written = config_from_model(model, family, "float32", {})
    assert model_from_config(written, "x") == model
    other = dataclasses.replace(model, window_layers=(0,))
    held = [not known_families()[name].lacks(other) for name in ("mistral", "qwen2", "phi3")]
    assert held == [not biases, False, False]


@pytest.mark.parametrize(
    ("name", "kind", "fixed", "open_"),
    [
        ("granitemoe_swa", "sinks", -1e30, 0.5),
        ("ernie_moe", "e_score_correction_bias", 0.0, 0.01),
    ],
)
def test_a_constant_is_known_in_every_dtype_and_another_value_is_refused(
    name, kind, fixed, open_, tmp_path
):
    shutil.copytree(goldens.FOLDER / name, tmp_path / name)
    tensors = goldens.tensors(tmp_path / name)
    keys = [key for key in tensors if key.endswith(kind)]
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        for key in keys:
            with np.errstate(over="ignore"):
                tensors[key] = np.full(tensors[key].shape, fixed, np.float32).astype(dtype)
        save_file(tensors, tmp_path / name / "model.safetensors")
        open_reader(find_checkpoint(tmp_path / name))
    # The bfloat16 rounding of the constant, in float32.
    tensors |= {key: tensors[key].astype(ml_dtypes.bfloat16).astype(np.float32) for key in keys}
    save_file(tensors, tmp_path / name / "model.safetensors")
    open_reader(find_checkpoint(tmp_path / name))
    tensors[keys[-1]][..., 0] = open_
    save_file(tensors, tmp_path / name / "model.safetensors")
    with pytest.raises(UserError, match=rf"{kind} is not \S+ everywhere") as refused:
        open_reader(find_checkpoint(tmp_path / name))
    assert "\n" not in str(refused.value)
