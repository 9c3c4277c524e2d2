"""Hugging Face directories as other tools and people write them, derived from the golden ones.

Each row of TABLE is a kind: the golden directory it starts from, the change, and what our refusal
must name ("" where the directory loads). transformers' own logits are in golden/directories.npz
(made by transformers_peer.py).
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclasses.dataclass
class Directory:
    """A directory that is modified in memory, then written. files: name -> names of the tensors in
    it."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    files: dict[str, list[str]] | None = None
    index: dict[str, Any] | None = None
    others: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def write(self, path: Path) -> None:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(self.config))
        files = self.files or {"model.safetensors": list(self.tensors)}
        held = {name: {key: self.tensors[key] for key in keys} for name, keys in files.items()}
        for name, tensors in {**held, **self.others}.items():
            (path / name).parent.mkdir(exist_ok=True)
            save_file(tensors, path / name)
        if self.index is not None:
            (path / "model.safetensors.index.json").write_text(json.dumps(self.index))

    def shard(self, *names: str) -> None:
        """Distribute its tensors over files, with an index."""
        keys = list(self.tensors)
        self.files = {name: keys[i :: len(names)] for i, name in enumerate(names)}
        weight_map = {key: name for name, keys in self.files.items() for key in keys}
        self.index = {"metadata": {"total_size": 0, "note": "x"}, "weight_map": weight_map}

    def cast(self, dtype: Any, *names: str) -> None:
        for name in names or list(self.tensors):
            self.tensors[name] = self.tensors[name].astype(dtype)

    def rename(self, change: Callable[[str], str]) -> None:
        self.tensors = {change(name): tensor for name, tensor in self.tensors.items()}


def read(name: str) -> Directory:
    files = sorted((GOLDEN / name).glob("*.safetensors"))
    config = json.loads((GOLDEN / name / "config.json").read_text())
    return Directory(config, {k: v for file in files for k, v in load_file(file).items()})


class Kind(NamedTuple):
    start: str
    change: Callable[[Directory], Any]
    refusal: str = ""


def config(start: str = "llama", refusal: str = "", **values: Any) -> Kind:
    return Kind(start, lambda d: d.config.update(values), refusal)


def without(*keys: str, start: str = "llama", **values: Any) -> Kind:
    def change(d: Directory) -> None:
        for key in keys:
            del d.config[key]
        d.config.update(values)

    return Kind(start, change)


def rope(refusal: str = "", **values: Any) -> Kind:
    """rope_scaling and rope_theta as written by transformers 4."""
    return without("rope_parameters", rope_theta=5e5, rope_scaling=values)._replace(refusal=refusal)


def biases(*parts: str) -> Callable[[Directory], None]:
    def change(d: Directory) -> None:
        d.config["attention_bias" if "self_attn" in parts[0] else "mlp_bias"] = True
        for name in list(d.tensors):
            if any(part in name for part in parts):
                bias = np.full(len(d.tensors[name]), 0.1, np.float32)
                d.tensors[name.replace(".weight", ".bias")] = bias

    return change


def own_head(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Directory], None]:
    return lambda d: d.tensors.update({HEAD: change(d.tensors[EMBEDDING])})


def head_in_bfloat16(d: Directory) -> None:
    d.cast(ml_dtypes.bfloat16)
    d.tensors[HEAD] = d.tensors[EMBEDDING]
    d.cast(np.float32, EMBEDDING)


def head_without_embedding(d: Directory) -> None:
    d.tensors[HEAD] = d.tensors.pop(EMBEDDING)


def stale_index(d: Directory) -> None:
    d.shard("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    d.others = {"model.safetensors": d.tensors}
    d.tensors = {name: np.zeros_like(tensor) for name, tensor in d.tensors.items()}


def duplicates(d: Directory) -> None:
    d.shard("a.safetensors", "b.safetensors")
    assert d.files
    d.files["b.safetensors"].append(d.files["a.safetensors"][0])


def unindexed_tensors(d: Directory) -> None:
    d.shard("a.safetensors", "b.safetensors")
    assert d.index and d.files
    for name in d.files["a.safetensors"][1:]:
        del d.index["weight_map"][name]
    d.index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = "b.safetensors"


def moved_tensors(d: Directory) -> None:
    d.shard("a.safetensors", "b.safetensors")
    assert d.index
    files = d.index["weight_map"]
    d.index["weight_map"] = dict(zip(files, reversed(files.values()), strict=True))


def named_weights(d: Directory) -> None:
    d.others = {"mine.safetensors": d.tensors}
    d.tensors = {name: np.zeros_like(tensor) for name, tensor in d.tensors.items()}
    d.config["transformers_weights"] = "mine.safetensors"


def beside(name: str) -> Callable[[Directory], None]:
    return lambda d: d.others.update({name: {"x": np.zeros(3, np.float32)}})


def one_layer_fused(d: Directory) -> None:
    fused = {k: v for k, v in read("mixtral_fused").tensors.items() if ".layers.1.mlp" in k}
    alone = {k: v for k, v in d.tensors.items() if ".layers.1.block_sparse_moe" not in k}
    d.tensors = alone | fused


def buffers(d: Directory) -> None:
    for layer in range(3):
        d.tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    d.tensors["model.rotary_emb.inv_freq"] = np.ones(4, np.float32)


def mixed(d: Directory) -> None:
    for i, name in enumerate(list(d.tensors)):
        d.cast((np.float32, np.float16, ml_dtypes.bfloat16)[i % 3], name)


QUANTIZED = "quantised weights are not supported"
TABLE = {
    # config.json
    "no architectures": without("architectures"),
    "the class without its head": config(architectures=["LlamaModel"]),
    "a class of somebody's own": config(
        architectures=["MyLlama"], auto_map={"AutoModelForCausalLM": "mine.MyLlama"}
    ),
    "another family's class": config(architectures=["MistralForCausalLM"]),
    "key heads left out": without("num_key_value_heads"),
    "key heads null": config(num_key_value_heads=None),
    "head size null": config(head_dim=None),
    "head size left out, Mixtral": without("head_dim", start="mixtral"),
    "swish": config(hidden_act="swish"),
    "gelu": config(hidden_act="gelu", refusal="hidden_act='gelu' is not supported"),
    "epsilon left out": without("rms_norm_eps"),
    "epsilon left out, Mixtral": without("rms_norm_eps", start="mixtral"),
    "a whole epsilon": config(rms_norm_eps=1e-5, rope_parameters=None, rope_theta=10_000),
    "context left out": without("max_position_embeddings"),
    "tying left out": without("tie_word_embeddings"),
    "RoPE left out": without("rope_parameters"),
    "RoPE left out, Mixtral": without("rope_parameters", start="mixtral"),
    "RoPE null": config(rope_parameters=None, rope_scaling=None, rope_theta=5e5),
    "RoPE without its theta": config(rope_parameters={"rope_type": "default"}, rope_theta=5e5),
    "two thetas": config(rope_parameters={"rope_theta": 5e5}, rope_theta=1e4),
    "a theta that scaling hides": config(
        rope_parameters={"rope_theta": 5e5}, rope_scaling={"type": "linear", "factor": 2.0}
    ),
    "two scalings": config(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5},
        rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
    ),
    "theta beside null": config(rope_theta=None),
    "theta inside scaling": rope(type="linear", factor=4.0, rope_theta=7e4),
    "scaling of no type": rope(factor=2.0),
    "empty scaling": rope(),
    "default scaling": rope(rope_type="default"),
    "linear by type": rope(type="linear", factor=4),
    "linear by both": rope(type="linear", rope_type="linear", factor=4.0),
    "linear by one": rope(type="linear", factor=1.0),
    "linear by a half": rope(type="linear", factor=0.5),
    "llama3": rope(**LLAMA3, original_max_position_embeddings=128),
    "llama3 without its context": rope(**LLAMA3),
    "llama3 with two contexts": Kind(
        "llama",
        lambda d: (
            rope(**LLAMA3, original_max_position_embeddings=128).change(d),
            d.config.update(original_max_position_embeddings=64),
        ),
    ),
    "linear, Mixtral": Kind("mixtral", rope(type="linear", factor=4.0).change),
    "dynamic": rope(type="dynamic", factor=2.0),
    "yarn": rope(rope_type="yarn", factor=2.0),
    "yarn without its factor": rope(
        rope_type="yarn", factor=None, original_max_position_embeddings=128
    ),
    "yarn of no attention": rope(
        "attention_factor=0.0: must be a positive",
        rope_type="yarn",
        factor=2.0,
        attention_factor=0.0,
    ),
    "linear by null": rope("rope scaling linear without factor", type="linear", factor=None),
    "yarn with everything": rope(
        rope_type="yarn",
        factor=4.0,
        original_max_position_embeddings=128,
        beta_fast=16,
        beta_slow=2,
        attention_factor=1.25,
    ),
    "yarn as DeepSeek has it": rope(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5),
    "yarn of unrounded bounds": rope(
        "truncate=False", rope_type="yarn", factor=4.0, truncate=False
    ),
    "longrope": rope(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4),
    "longrope of a shorter origin": rope(
        rope_type="longrope",
        short_factor=[1.0] * 4,
        long_factor=[1.0, 2.0, 4.0, 8.0],
        original_max_position_embeddings=128,
        factor=4.0,
    ),
    "longrope without its factors": rope("longrope without short_factor", rope_type="longrope"),
    "proportional": rope("'proportional' is not supported", rope_type="proportional", factor=2.0),
    "RoPE by kind of layer": config(
        layer_types=["full_attention"] * 3,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 5e5}},
        refusal="a rotary embedding per kind of layer is not supported",
    ),
    "a part of RoPE": config(partial_rotary_factor=0.5, refusal="partial_rotary_factor"),
    "keys of other families": config(
        sliding_window=128,
        use_sliding_window=True,
        max_window_layers=1,
        layer_types=["sliding_attention"] * 3,
        pretraining_tp=2,
        attention_dropout=0.1,
        num_local_experts=8,
    ),
    "settings of a finetune": config(
        use_cache=False, _name_or_path="x", unsloth_version="1", attn_implementation="eager"
    ),
    "null in between": config(pad_token_id=None, eos_token_id=None, quantization_config=None),
    "lists of ids": config(eos_token_id=[2, 5], pad_token_id=0),
    "another dtype than is stored": config(dtype="float64", torch_dtype="bfloat16"),
    "window": config("mistral", sliding_window=700),
    "window left out": without("sliding_window", start="mistral"),
    "window, Mixtral": config("mixtral", sliding_window=700),
    "kinds of layers, Mistral": config(
        "mistral",
        sliding_window=100,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "one kind of layers, Mistral": config(
        "mistral", sliding_window=100, layer_types=["sliding_attention"] * 3
    ),
    "no window by kind, Mistral": config(
        "mistral", sliding_window=100, layer_types=["full_attention"] * 3
    ),
    "ignored biases, Mistral": config("mistral", attention_bias=True, mlp_bias=True),
    "attention biases": Kind("llama", biases("self_attn")),
    "feed-forward biases": Kind("llama", biases("mlp")),
    "biases without their key": Kind(
        "llama",
        lambda d: (biases("self_attn")(d), d.config.update(attention_bias=False)),
        "unknown model.layers.0.self_attn",
    ),
    "what other families compute": config(
        final_logit_softcapping=30.0, refusal="final_logit_softcapping=30.0: is not supported"
    ),
    "what other families compute, switched off": config(
        final_logit_softcapping=None, residual_multiplier=1.0
    ),
    "layers of their own": config(
        per_layer_config={"1": {"intermediate_size": 24}}, refusal="per_layer_config"
    ),
    "experts by another name": Kind(
        "mixtral", lambda d: d.config.update(num_experts=d.config.pop("num_local_experts"))
    ),
    "all experts for a token": config("mixtral", num_experts_per_tok=3),
    "experts of a token left out": without("num_experts_per_tok", start="mixtral"),
    "bitsandbytes": config(
        quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True},
        refusal=QUANTIZED,
    ),
    "gptq": config(quantization_config={"quant_method": "gptq", "bits": 4}, refusal=QUANTIZED),
    "fp8": config(quantization_config={"quant_method": "fp8"}, refusal=QUANTIZED),
    "a family that is not known": config(
        model_type="starcoder2",
        architectures=["Starcoder2ForCausalLM"],
        refusal=r"model_type starcoder2 \(Starcoder2ForCausalLM\) is not supported",
    ),
    "qwen2 without its biases": config(
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        refusal="missing model.layers.0.self_attn.q_proj.bias",
    ),
    # dtypes and names of tensors
    "float64": Kind("llama", lambda d: d.cast(np.float64)),
    "one norm in float64": Kind("llama", lambda d: d.cast(np.float64, "model.norm.weight")),
    "float16": Kind("llama", lambda d: d.cast(np.float16)),
    "8-bit floats": Kind("llama", lambda d: d.cast(ml_dtypes.float8_e4m3fn)),
    "8-bit floats of more range": Kind("llama", lambda d: d.cast(ml_dtypes.float8_e5m2)),
    "three dtypes": Kind("llama", mixed),
    "three dtypes, Mixtral": Kind("mixtral", mixed),
    "whole numbers": Kind("llama", lambda d: d.cast(np.int8), "is I8, not one of"),
    "buffers of early versions": Kind("llama", buffers),
    "no prefix": Kind("llama", lambda d: d.rename(lambda n: n.removeprefix("model."))),
    "a prefix here and there": Kind(
        "llama", lambda d: d.rename(lambda n: n.replace("model.layers.0", "layers.0"))
    ),
    "the head inside the model": Kind(
        "llama", lambda d: d.rename(lambda n: n.replace(HEAD, f"model.{HEAD}"))
    ),
    "prefix twice": Kind("llama", lambda d: d.rename(lambda n: f"model.{n}")),
    "no prefix, tied": Kind(
        "llama_linear_tied", lambda d: d.rename(lambda n: n.removeprefix("model."))
    ),
    "no prefix, fused": Kind(
        "mixtral_fused", lambda d: d.rename(lambda n: n.removeprefix("model."))
    ),
    "tied and stored": Kind("llama_linear_tied", own_head(lambda x: x)),
    "tied and stored in bfloat16": Kind("llama_linear_tied", head_in_bfloat16),
    "tied and different": Kind("llama_linear_tied", own_head(lambda x: x * 0.5)),
    "tied, only the head": Kind("llama_linear_tied", head_without_embedding),
    "experts under mlp": Kind(
        "mixtral", lambda d: d.rename(lambda n: n.replace("block_sparse_moe", "mlp"))
    ),
    "fused under block_sparse_moe": Kind(
        "mixtral_fused", lambda d: d.rename(lambda n: n.replace(".mlp.", ".block_sparse_moe."))
    ),
    "one layer fused": Kind("mixtral", one_layer_fused),
    # files
    "one file and its index": Kind("llama", lambda d: d.shard("model.safetensors")),
    "an index of one file": Kind("llama", lambda d: d.shard("mine.safetensors")),
    "files in folders": Kind("llama", lambda d: d.shard("a/1.safetensors", "b/2.safetensors")),
    "a single file and a stale index": Kind("llama", stale_index),
    "a tensor in two files": Kind("llama", duplicates),
    "tensors not in the index": Kind("llama", unindexed_tensors),
    "tensors in other files than the index says": Kind("llama", moved_tensors),
    "weights named by config.json": Kind("llama", named_weights),
    "a variant beside": Kind("llama", beside("model.fp16.safetensors")),
    "consolidated beside": Kind("llama", beside("consolidated.safetensors")),
    "a shard that no index names": Kind("llama", beside("model-00003-of-00003.safetensors")),
}


def write(name: str, path: Path) -> None:
    kind = TABLE[name]
    directory = read(kind.start)
    kind.change(directory)
    directory.write(path)
