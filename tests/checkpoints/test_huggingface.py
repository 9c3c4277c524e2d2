"""Reading and writing Hugging Face directories, compared with checkpoints and logits made by
transformers (golden/, see transformers_peer.py)."""

import dataclasses
import functools
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from btx_jax.architectures.tensors import slots
from btx_jax.checkpoints.checkpoint import (
    digest,
    find_checkpoint,
    load_for_inference,
    load_params,
    open_reader,
)
from btx_jax.checkpoints.huggingface import written_as
from btx_jax.checkpoints.huggingface_config import (
    config_from_model,
    model_from_config,
)
from btx_jax.checkpoints.safetensors_files import SafetensorsFile, ShardWriter
from btx_jax.checkpoints.training_state import (
    CheckpointMetadata,
    metadata_from_json,
    metadata_to_json,
)
from btx_jax.commands import convert
from btx_jax.config.config import ComputeConfig
from btx_jax.config.model_config import ModelConfig, MoEConfig, RopeScaling
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import UserError
from btx_jax.models.llama import Llama, init_params, logits
from btx_jax.presets.recipes import MODELS
from tests.checkpoints import directories
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "checkpoints" / "golden"
NAMES = ("llama", "llama_gqa_llama3", "llama_linear_tied", "mistral", "mixtral", "mixtral_fused")


def tensors(directory):
    """All tensors of a directory, read by the safetensors library."""
    return {
        name: array
        for file in sorted(directory.glob("*.safetensors"))
        for name, array in load_file(file).items()
    }


def our_logits(directory):
    golden = (
        np.load(GOLDEN / directory.name / "golden.npz")
        if (GOLDEN / directory.name).exists()
        else None
    )
    tokens = golden["tokens"].astype(np.int32)
    found = find_checkpoint(directory)
    model = Llama(
        found.metadata.model, ComputeConfig(dtype="float32", remat="none", dispatch="ragged")
    )
    params = load_params(found)
    hidden, _ = jax.jit(model.apply)({"params": params}, tokens, np.ones_like(tokens))
    return np.asarray(logits(params, hidden))[0, ::37], golden["logits"]


@pytest.mark.parametrize("name", NAMES)
def test_our_logits_are_those_of_transformers_at_512_positions(name):
    ours, theirs = our_logits(GOLDEN / name)
    assert np.abs(theirs).max() > 1, "golden logits are too flat to notice a wrong layout"
    np.testing.assert_allclose(
        ours,
        theirs,
        atol=1e-4,
        rtol=0,
        err_msg="RoPE layout, head order or norm epsilon differ from transformers",
    )


@pytest.mark.parametrize("name", NAMES)
def test_hugging_face_to_ours_and_back_gives_every_tensor_byte_for_byte(name, tmp_path):
    source = GOLDEN / name
    convert.run(str(source), str(tmp_path / "ours"))
    convert.run(str(tmp_path / "ours"), str(tmp_path / name))
    before, after = tensors(GOLDEN / name.removesuffix("_fused")), tensors(tmp_path / name)
    assert set(before) == set(after)
    for key in before:
        assert (
            before[key].dtype == after[key].dtype and before[key].tobytes() == after[key].tobytes()
        ), key
    assert digest(load_params(find_checkpoint(tmp_path / "ours"))) == digest(
        load_params(find_checkpoint(source))
    )
    written = json.loads((tmp_path / name / "config.json").read_text())
    assert model_from_config(written, "written") == find_checkpoint(source).metadata.model
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    of_source = {"generation_config.json"} & {path.name for path in source.iterdir()}
    assert {"README.md"} | of_source <= {path.name for path in (tmp_path / name).iterdir()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_checkpoints_keep_their_dtype_and_bytes(tmp_path, dtype):
    halves = tmp_path / "half"
    shutil.copytree(GOLDEN / "mistral", halves)
    stored = {name: array.astype(np.dtype(dtype)) for name, array in tensors(halves).items()}
    save_file(stored, halves / "model.safetensors")
    convert.run(str(halves), str(tmp_path / "ours"))
    convert.run(str(tmp_path / "ours"), str(tmp_path / "back"))
    back = tensors(tmp_path / "back")
    assert all(
        back[name].dtype == stored[name].dtype and back[name].tobytes() == stored[name].tobytes()
        for name in stored
    )
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == dtype
    loaded = jax.tree.leaves(load_params(find_checkpoint(tmp_path / "ours")))
    assert {str(leaf.dtype) for leaf in loaded} == {"float32"}, (
        "training keeps float32 master weights whatever the file holds"
    )


def test_a_dtype_asked_for_rounds_to_nearest_even_and_refuses_overflow(tmp_path):
    convert.run(str(GOLDEN / "llama"), str(tmp_path / "bf16"), "bfloat16")
    convert.run(str(tmp_path / "bf16"), str(tmp_path / "hf"))
    for name, array in tensors(GOLDEN / "llama").items():
        assert (
            tensors(tmp_path / "hf")[name].tobytes() == array.astype(ml_dtypes.bfloat16).tobytes()
        )
    large = tmp_path / "large"
    shutil.copytree(GOLDEN / "llama", large)
    save_file(
        {name: array * 1e6 for name, array in tensors(large).items()}, large / "model.safetensors"
    )
    with pytest.raises(
        UserError, match=r"model.embed_tokens.weight holds values beyond float16's range"
    ):
        convert.run(str(large), str(tmp_path / "no"), "float16")
    assert not (tmp_path / "no").exists()


def test_what_is_loaded_for_inference_in_bfloat16_keeps_routers_norms_and_embedding_exact(
    one_device,
):
    found = find_checkpoint(GOLDEN / "mixtral")
    exact, loaded = load_params(found), load_for_inference(found, one_device, "bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(loaded):
        kept = path[-1].key in ("router", "scale", "embedding")
        assert leaf.dtype == (np.float32 if kept else ml_dtypes.bfloat16), path
    assert np.array_equal(loaded["layers_0"]["ffn"]["router"], exact["layers_0"]["ffn"]["router"])


def test_mixtures_that_hugging_face_cannot_hold_are_refused_and_those_it_can_are_not(tmp_path):
    model = ModelConfig(61, 2, 32, 48, 4, 2, 8)

    def moe(experts, **kwargs):
        return ModelConfig(61, 2, 32, 48, 4, 2, 8, moe=MoEConfig(experts, **kwargs))

    def written(model):
        family, model = written_as(model, {})
        return config_from_model(model, family, "float32", {})

    assert written(moe((4, 4), routing="soft"))["num_experts_per_tok"] == 4
    assert written(moe((4, 4), routing="sample_top1"))["num_experts_per_tok"] == 1
    for refused in (
        moe((4, 2)),
        moe((4, 4), routing="switch"),
        moe((4, 4), routing="sample_top1", first_routing="soft"),
    ):
        with pytest.raises(UserError, match="other than the same top-k mixture in every layer"):
            written(refused)
    assert written(moe((4, 0)))["mlp_only_layers"] == [1], "Qwen2Moe has dense layers, Mixtral none"
    assert "num_local_experts" not in written(model)


def test_config_json_of_either_age_is_read_and_what_we_lack_is_named():
    base = json.loads((GOLDEN / "llama" / "config.json").read_text())
    base.pop("rope_parameters")
    old = base | {
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "torch_dtype": "bfloat16",
    }
    new = base | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert model_from_config(old, "old") == model_from_config(new, "new")
    assert model_from_config(new, "new").rope_scaling == RopeScaling("linear", 2.0)
    for bad, message in (
        (base | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (base | {"rope_scaling": {"rope_type": "linear"}}, "rope scaling linear without factor"),
        (base | {"rope_theta": None}, "rope_theta=None: must be a positive number"),
        (base | {"rope_theta": 10**400}, "rope_theta=an integer of 1329 bits: must be a positive"),
        (base | {"rms_norm_eps": 10**400}, "rms_norm_eps=an integer of 1329 bits: must be a"),
        (base | {"max_position_embeddings": 10**400}, "max_position_embeddings=an integer of 1329"),
        (base | {"rope_scaling": {"rope_type": ["linear"]}}, r"rope scaling \['linear'\] is not"),
        (base | {"model_type": ["llama"]}, r"model_type \['llama'\]"),
        (base | {"model_type": None, "architectures": 5}, "model_type None is not supported"),
        (base | {"num_hidden_layers": None}, "num_hidden_layers is null; give a number"),
        (base | {"tie_word_embeddings": None}, "tie_word_embeddings=None: must be true or false"),
        (
            base | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            r"model_type gpt2 \(GPT2LMHeadModel\) is not supported;"
            " supported: .*deepseek, ernie4_5, .*llama",
        ),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"model_type None \(GPT2LMHeadModel\) is not supported",
        ),
    ):
        with pytest.raises(UserError, match=message):
            model_from_config(bad, "config.json")
    windowed = json.loads((GOLDEN / "mistral" / "config.json").read_text()) | {
        "sliding_window": 256
    }
    assert model_from_config(windowed, "x").window == 256
    assert model_from_config(windowed | {"use_sliding_window": False}, "x").window == 256, (
        "no key of Mistral's: transformers windows"
    )
    absent = {key: value for key, value in windowed.items() if key != "sliding_window"} | {
        "max_position_embeddings": 8192
    }
    assert model_from_config(absent, "x").window == 4096, "transformers' default"


@functools.cache
def _forward(model):
    llama = Llama(model, ComputeConfig(dtype="float32", remat="none", dispatch="ragged"))

    @jax.jit
    def forward(params, tokens):
        hidden, _ = llama.apply({"params": params}, tokens, jax.numpy.ones_like(tokens))
        return logits(params, hidden)

    return forward


@pytest.mark.parametrize("name", directories.TABLE)
def test_a_directory_that_transformers_loads_gives_its_logits_or_names_what_is_missing(
    name, tmp_path
):
    directories.write(name, tmp_path / "model")
    refusal = directories.TABLE[name].refusal
    if refusal:
        with pytest.raises(UserError, match=refusal) as caught:
            open_reader(find_checkpoint(tmp_path / "model"))
        assert "\n" not in str(caught.value)
        return
    found = find_checkpoint(tmp_path / "model")
    expected = np.load(GOLDEN / "directories.npz")[name]
    tokens = np.load(GOLDEN / "llama" / "golden.npz")["tokens"].astype(np.int32)
    params = load_params(found)
    model = dataclasses.replace(found.metadata.model, context=1024)
    ours = np.asarray(_forward(model)(params, tokens))[0, ::128]
    np.testing.assert_allclose(ours, expected, atol=2e-4, rtol=0)


def test_what_a_directory_contradicts_itself_in_is_told(tmp_path, caplog):
    for name, said in (
        ("two thetas", "says rope_theta 500000.0 and 10000.0; 500000.0 is used"),
        ("a theta that scaling hides", "says rope_theta 10000.0 and 500000.0; 10000.0 is used"),
        ("two scalings", "says factor 2.0 and 4.0; 2.0 is used"),
        ("llama3 with two contexts", "says original_max_position_embeddings 64 and 128; 64 is"),
        ("tied and different", "lm_head.weight differs from the embedding"),
        ("a single file and a stale index", "delete the outdated one"),
        ("float64", "float64 is rounded to float32, 30 tensors"),
    ):
        caplog.clear()
        directories.write(name, tmp_path / name)
        open_reader(find_checkpoint(tmp_path / name))
        assert said in caplog.text and len(caplog.records) == 1, (name, caplog.text)


@pytest.mark.parametrize(
    ("name", "context", "window"),
    [
        ("window", 1024, 700),
        ("window, Mixtral", 1024, 700),
        ("window left out", 1024, 4096),
        ("context left out", 2048, 0),
        ("keys of other families", 1024, 0),
    ],
)
def test_a_window_is_kept_beside_the_context(name, context, window, tmp_path):
    directories.write(name, tmp_path / "model")
    model = find_checkpoint(tmp_path / "model").metadata.model
    assert (model.context, model.window) == (context, window)


def test_a_directory_in_several_dtypes_comes_to_ours_with_every_value(tmp_path):
    directories.write("three dtypes", tmp_path / "model")
    convert.run(str(tmp_path / "model"), str(tmp_path / "ours"))
    ours, theirs = (
        jax.tree.leaves(load_params(find_checkpoint(tmp_path / name))) for name in ("ours", "model")
    )
    assert all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_there_and_back_keeps_what_is_not_understood(tmp_path, tokenizer_file):
    generation = {"eos_token_id": [2, 5], "temperature": 0.6, "of_tomorrow": {"x": [None]}}
    said = {
        "eos_token_id": [2, 5],
        "pad_token_id": 3,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.1,
        "output_router_logits": True,
        "attention_dropout": 0.1,
        "use_cache": False,
        "of_tomorrow": [1, {"a": None}],
    }
    for name in ("bare", "with_tokenizer"):
        source = tmp_path / name
        shutil.copytree(GOLDEN / "mixtral", source)
        config = json.loads((source / "config.json").read_text()) | said
        del config["bos_token_id"]
        (source / "config.json").write_text(json.dumps(config))
        (source / "generation_config.json").write_text(json.dumps(generation))
        if name == "with_tokenizer":
            shutil.copyfile(tokenizer_file, source / "tokenizer.model")
        convert.run(str(source), str(tmp_path / f"{name}_ours"))
        convert.run(str(tmp_path / f"{name}_ours"), str(tmp_path / f"{name}_back"))
        for place in (source, tmp_path / f"{name}_ours", tmp_path / f"{name}_back"):
            kept = find_checkpoint(place).metadata.huggingface
            assert kept["config"].items() >= said.items() and "bos_token_id" not in kept["config"]
            assert kept["generation_config"] == generation
        back = json.loads((tmp_path / f"{name}_back" / "config.json").read_text())
        assert back.items() >= said.items() and "bos_token_id" not in back


def test_a_mixtral_that_names_no_router_settings_keeps_those_that_transformers_takes(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "mixtral", source)
    config = json.loads((source / "config.json").read_text())
    del config["router_aux_loss_coef"], config["router_jitter_noise"]
    (source / "config.json").write_text(json.dumps(config))
    convert.run(str(source), str(tmp_path / "ours"))
    convert.run(str(tmp_path / "ours"), str(tmp_path / "back"))
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (back["router_aux_loss_coef"], back["router_jitter_noise"]) == (0.001, 0.0)


def test_a_checkpoint_says_what_it_keeps_only_when_there_is_something():
    plain = CheckpointMetadata(ModelConfig(61, 2, 32, 48, 4, 2, 8), 0, {})
    assert "huggingface" not in metadata_to_json(plain)
    assert metadata_from_json(metadata_to_json(plain), GOLDEN) == plain
    kept = dataclasses.replace(plain, huggingface={"config": {"eos_token_id": [1, 2]}})
    assert metadata_from_json(json.loads(json.dumps(metadata_to_json(kept))), GOLDEN) == kept


LINEAR = RopeScaling("linear", 4.0)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
MOE = MoEConfig((4, 4))


@pytest.mark.parametrize(
    ("change", "kind", "version", "theta"),
    [
        ({}, "llama", "4.42.0", 1e4),
        ({"rope_scaling": LINEAR}, "llama", "4.42.0", 1e4),
        ({"rope_scaling": LLAMA3}, "llama", "4.43.0", 1e4),
        ({"head_dim": 16}, "llama", "4.45.0", 1e4),
        ({"d_model": 30}, "mistral", "4.43.0", 1e4),
        ({"moe": MOE}, "mixtral", "4.42.0", 1e4),
        ({"moe": MOE, "head_dim": 16}, "mixtral", "4.47.0", 1e4),
        ({"moe": MOE, "rope_scaling": LINEAR}, "mixtral", "5.0.0", None),
        ({"moe": MOE, "rope_scaling": LLAMA3}, "mixtral", "5.0.0", None),
    ],
)
def test_an_export_says_which_transformers_it_needs(change, kind, version, theta):
    """Older releases fail to load these, as was tried (exports.py, transformers_peer.py releases).
    A null rope_theta makes them fail: some would otherwise silently compute another model."""
    model = dataclasses.replace(ModelConfig(61, 2, 32, 48, 4, 2, 8), **change)
    family, written = written_as(model, {})
    config = config_from_model(written, family, "float32", {})
    assert (config["model_type"], config["transformers_version"], config["rope_theta"]) == (
        kind,
        version,
        theta,
    )
    if theta is None:
        assert config["rope_scaling"] is None, "read by 4.48 and newer, not by those before"
    assert model_from_config(config, "x") == model


BIG = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
META3 = BIG | {
    "vocab_size": 128_256,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "rope_theta": 5e5,
}
ROPE31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("name", "kind", "published"),
    [
        (
            "llama2_7b",
            "llama",
            BIG
            | {
                "vocab_size": 32_000,
                "intermediate_size": 11_008,
                "max_position_embeddings": 4096,
            },
        ),
        ("llama3_8b", "llama", META3 | {"max_position_embeddings": 8192}),
        (
            "llama31_8b",
            "llama",
            META3 | {"max_position_embeddings": 131_072, "rope_scaling": ROPE31},
        ),
        (
            "mistral_7b",
            "mistral",
            BIG
            | {
                "vocab_size": 32_000,
                "intermediate_size": 14_336,
                "num_key_value_heads": 8,
                "rope_theta": 1e4,
            }
            | {"max_position_embeddings": 32_768, "sliding_window": 4096},
        ),
    ],
)
def test_the_recipes_models_are_those_that_were_published(name, kind, published):
    assert model_from_config(published | {"model_type": kind}, name) == MODELS[name]


def test_every_leaf_has_a_name_and_every_layout_survives_the_round_trip():
    model = ModelConfig(61, 3, 32, 48, 4, 2, 8, moe=MoEConfig((0, 2, 2), first_routing="soft"))
    params = init_params(model, jax.random.key(0))
    seen = {}
    for name, slot in slots(model).items():
        leaf = params
        for key in slot.path:
            leaf = leaf[key]
        theirs = slot.to_theirs(np.asarray(leaf[slot.indices]))
        assert theirs.shape == slot.shape and np.array_equal(
            slot.to_ours(theirs), leaf[slot.indices]
        ), name
        seen[slot.path] = seen.get(slot.path, 0) + theirs.size
    assert sum(seen.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_writers_shards_are_what_the_safetensors_library_reads(tmp_path):
    arrays = {f"t{i}": np.arange(i * 10, dtype=np.float32).reshape(i, 10) for i in range(1, 6)}
    arrays["half"] = np.ones((3,), ml_dtypes.bfloat16)
    writer = ShardWriter(
        tmp_path,
        {name: (array.shape, array.dtype) for name, array in arrays.items()},
        shard_bytes=250,
    )
    for name, array in arrays.items():
        writer.write(name, array)
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        assert np.array_equal(load_file(tmp_path / file)[name], arrays[name])
        assert np.array_equal(SafetensorsFile(tmp_path / file).read(name), arrays[name])


def test_the_tokenizer_and_its_chat_template_travel_both_ways(tmp_path, tokenizer_file):
    source = tmp_path / "hf"
    shutil.copytree(GOLDEN / "llama", source)
    shutil.copyfile(tokenizer_file, source / "tokenizer.model")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 5], "temperature": 0.6}')
    convert.run(str(source), str(tmp_path / "ours"))
    convert.run(str(tmp_path / "ours"), str(tmp_path / "back"))
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 5], "temperature": 0.6}
    for file in ("tokenizer.model", "chat_template.jinja"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    told = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert told["chat_template"] == "x" and told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_tokenizer(tmp_path / "back").sha256 == load_tokenizer(source).sha256


def test_a_conversion_copies_nothing_from_outside_its_source(tmp_path, tokenizer_file):
    secret = tmp_path / "secret"
    secret.write_text('{"key": "secret"}')
    source = tmp_path / "hf"
    shutil.copytree(GOLDEN / "llama", source)
    shutil.copyfile(tokenizer_file, source / "tokenizer.model")
    convert.run(str(source), str(tmp_path / "ours"))
    for directory, file in (
        (source, "tokenizer_config.json"),
        (source, "model-00002-of-00002.safetensors"),
        (tmp_path / "ours" / "tokenizer", "chat_template.jinja"),
    ):
        (directory / file).symlink_to(secret)
        root = directory.parent if directory.name == "tokenizer" else directory
        with pytest.raises(UserError, match=f"{file}: a link to .*secret, outside the directory"):
            convert.run(str(root), str(tmp_path / "out"))
        assert not (tmp_path / "out").exists()
        (directory / file).unlink()


def test_a_snapshot_of_the_hub_s_cache_converts(tmp_path, tokenizer_file):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    files = [*(GOLDEN / "llama").glob("*.json"), *(GOLDEN / "llama").glob("*.safetensors")]
    for number, file in enumerate([*files, tokenizer_file]):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copyfile(file, blob)
        name = "tokenizer.model" if file == tokenizer_file else file.name
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    convert.run(str(snapshot), str(tmp_path / "ours"))
    convert.run(str(tmp_path / "ours"), str(tmp_path / "back"))
    back, original = tensors(tmp_path / "back"), tensors(GOLDEN / "llama")
    assert back.keys() == original.keys()
    assert all(np.array_equal(back[name], original[name]) for name in original)


def test_values_are_checked_and_a_failed_conversion_leaves_nothing(tmp_path):
    source = tmp_path / "nan"
    shutil.copytree(GOLDEN / "llama", source)
    stored = tensors(source)
    stored["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    stored["model.norm.weight"][0] = np.inf
    save_file(stored, source / "model.safetensors")
    with pytest.raises(
        UserError,
        match=(
            r"2 problems: NaN or infinity in model.layers.1.mlp.up_proj.weight; .* in"
            r" model.norm.weight"
        ),
    ):
        convert.run(str(source), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan"]
    with pytest.raises(UserError, match="NaN or infinity"):
        load_params(find_checkpoint(source))


@pytest.mark.parametrize("named", [5, [["a"]], "LlamaForCausalLM", None])
def test_architectures_that_are_no_names_say_nothing(tmp_path, named):
    shutil.copytree(GOLDEN / "llama", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"architectures": named}))
    stored = tensors(tmp_path / "odd")
    del stored["model.norm.weight"]
    save_file(stored, tmp_path / "odd" / "model.safetensors")
    with pytest.raises(UserError, match=r"odd: missing model\.norm\.weight$"):
        open_reader(find_checkpoint(tmp_path / "odd"))


def test_a_model_without_its_head_is_told_as_such(tmp_path):
    shutil.copytree(GOLDEN / "llama", tmp_path / "base")
    stored = {name.removeprefix("model."): x for name, x in tensors(tmp_path / "base").items()}
    del stored["lm_head.weight"]
    save_file(stored, tmp_path / "base" / "model.safetensors")
    told = (
        r"missing lm_head.weight \(the base model was saved without its head"
        r".*AutoModelForCausalLM.*tie_word_emb"
    )
    with pytest.raises(UserError, match=told):
        open_reader(find_checkpoint(tmp_path / "base"))


DEEP = "[" * 100_000


def deep_history(directory):
    save_file(
        tensors(directory), directory / "model.safetensors", metadata={"btx_jax.history": DEEP}
    )


def pipe(directory):
    (directory / "model.safetensors").unlink()
    os.mkfifo(directory / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (deep_history, "model.safetensors: damaged history: maximum recursion"),
        (lambda d: (d / "model.xxh3.json").write_text(DEEP), "model.xxh3.json is damaged: maximum"),
        (pipe, "model.safetensors: not a regular file"),
    ],
    ids=["history", "checksums", "pipe"],
)
def test_what_cannot_be_read_to_its_end_is_told(tmp_path, change, told):
    shutil.copytree(GOLDEN / "llama", tmp_path / "odd")
    change(tmp_path / "odd")
    with pytest.raises(UserError, match=told):
        open_reader(find_checkpoint(tmp_path / "odd"))


def test_all_problems_of_a_checkpoint_are_told_at_once(tmp_path):
    source = tmp_path / "bad"
    shutil.copytree(GOLDEN / "llama", source)
    stored = tensors(source)
    stored["model.layers.0.mlp.gate.weight"] = stored.pop("model.layers.0.mlp.gate_proj.weight")
    stored["model.norm.weight"] = stored["model.norm.weight"][:-1].copy()
    stored["model.layers.1.mlp.up_proj.weight"] = stored[
        "model.layers.1.mlp.up_proj.weight"
    ].astype(np.int8)
    save_file(stored, source / "model.safetensors")
    with pytest.raises(UserError) as caught:
        open_reader(find_checkpoint(source))
    message = str(caught.value)
    assert "4 problems" in message and "\n" not in message
    for part in (
        "unknown model.layers.0.mlp.gate.weight",
        "missing model.layers.0.mlp.gate_proj.weight",
        "model.norm.weight is (31,), not (32,)",
        "up_proj.weight is I8",
    ):
        assert part in message


def test_matrices_of_any_size_come_back_as_they_were():
    """Larger than the squares in which they are transposed, and not a multiple of them."""
    model = ModelConfig(
        vocab_size=70, layers=1, d_model=130, d_ff=201, heads=2, kv_heads=1, head_dim=70, context=8
    )
    for name, slot in slots(model).items():
        tensor = np.arange(np.prod(slot.shape), dtype=np.float32).reshape(slot.shape)
        again = slot.to_theirs(slot.to_ours(tensor))
        np.testing.assert_array_equal(again, tensor, err_msg=name)
