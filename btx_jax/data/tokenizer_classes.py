"""Classes of transformers 5.23 that rebuild a tokenizer from its vocabulary, ignoring the pipeline
in its tokenizer.json, and how the class for a directory is chosen."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from btx_jax.data import sentencepiece_models
from btx_jax.data.sentencepiece_models import SPACE

# Classes that use tokenizer.json as it is.
AS_IT_IS = ("", "PreTrainedTokenizer", "TokenizersBackend")
# Model families (`model_type` of config.json) whose tokenizer.json is used as it is, whatever class
# their files name.
_FAMILIES_AS_THEY_ARE = """
    EvollaModel aria beam bigbird_pegasus canary flex_olmo glm glm4 glm4_moe glm4_moe_lite glm4v
    glm4v_moe glm_image glmasr got_ocr2 gpt_bigcode gradium_phonon_tts granite granitemoe
    granitemoehybrid granitemoeshared kimi_k25 kimi_linear kosmos-2 mimo_v2_flash minicpm_ocr
    minicpmv4_6 minicpmv4_7 ministral ministral3 mistral mistral3 mistral_large4 mixtral
    nemo_speechlm nystromformer olmo2 olmo3 olmo_hybrid pegasus_x persimmon pix2struct pixtral
    pocket_tts stablelm umt5 voxtral voxtral_realtime xlm-roberta-xl fuyu opencua ernie4_5 jamba
    openvla arctic smolvlm internlm2 hyperclovax_vlm camembertv2-base vipllava paddleocr_vl phi3_v
    chatlm minimax_m2 nvfp4 hyperclovax nemotron modernbert cohere_asr llava h2ovl_chat phimoe phi3
    molmo2 minicpm3 modernbert-decoder ernie4_5_moe molmo llava_next internlm3 minicpmv step3_vl
    iquestcoder
"""
# The default class of a family whose files name none.
_FAMILY_CLASS = {
    family: name
    for name, families in {
        "CodeLlamaTokenizer": "code_llama",
        "GemmaTokenizer": "gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma"
        " shieldgemma2 t5gemma zaya diffusion_gemma",
        "GPT2Tokenizer": "gpt2 gpt_neo gptj opt phi codegen dbrx emu3 jais2 starcoder2",
        "GPTNeoXTokenizer": "gpt_neox olmo olmoe mamba mamba2 falcon_mamba mpt rwkv xlstm",
        "Qwen2Tokenizer": "qwen2 qwen2_moe qwen2_vl qwen2_5_vl qwen2_audio qwen2_5_omni qwen3"
        " qwen3_moe qwen3_next qwen3_vl qwen3_vl_moe qwen3_omni_moe internvl ovis2",
    }.items()
    for family in families.split()
}
_FAMILIES_DECLARED_WRONGLY = ("qwen2",)  # the family's class takes precedence


def class_of(family: str, declared: str, is_byte_level: bool) -> str:
    """Name of the class, without `Fast`, that AutoTokenizer would choose. family: `model_type`.
    declared: `tokenizer_class`, "" for none."""
    if family in _FAMILIES_AS_THEY_ARE.split():
        return ""
    if family in _FAMILIES_DECLARED_WRONGLY:
        return _FAMILY_CLASS[family]
    if declared == "LlamaTokenizer" and is_byte_level:
        return ""
    return declared or _FAMILY_CLASS.get(family, "")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a class of transformers rebuilds its pipeline. build: (vocab, merges, flags) -> pipeline
    without added tokens. named: default special tokens where the files name none."""

    build: Callable[
        [dict[str, int], list[tuple[str, str]], Mapping[str, Any]], tokenizers.Tokenizer
    ]
    named: Mapping[str, str | None]
    adds_bos: bool | None = None  # the class's default; None to ask the files
    updates_frame: bool = False


def _bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))


def _metaspace(made: tokenizers.Tokenizer, scheme: str, strips: bool) -> tokenizers.Tokenizer:
    made.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    made.decoder = sentencepiece_models.decoder(strips=strips)
    return made


def _llama(vocab: Any, merges: Any, flags: Mapping[str, Any]) -> tokenizers.Tokenizer:
    prefix = flags.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if flags.get("legacy", False) else "first"
    return _metaspace(_bpe(vocab, merges, fuse_unk=True, byte_fallback=True), scheme, prefix)


def _code_llama(vocab: Any, merges: Any, flags: Mapping[str, Any]) -> tokenizers.Tokenizer:
    prefix = flags.get("add_prefix_space")
    scheme = "never" if prefix is not None and not prefix else "first"
    unknown = str(flags.get("unk_token") or "<unk>")
    made = _bpe(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token=unknown)
    return _metaspace(made, scheme, strips=True)


def _gemma(vocab: Any, merges: Any, flags: Mapping[str, Any]) -> tokenizers.Tokenizer:
    unknown = str(flags.get("unk_token") or "<unk>")
    made = _bpe(vocab, merges, fuse_unk=True, byte_fallback=True, unk_token=unknown)
    made.normalizer = normalizers.Replace(" ", SPACE)
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous", invert=False)
    made.decoder = sentencepiece_models.decoder(strips=False)
    return made


def _byte_level(vocab: Any, merges: Any, fuse_unk: bool = False) -> tokenizers.Tokenizer:
    made = _bpe(
        vocab, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=fuse_unk
    )
    made.decoder = decoders.ByteLevel()
    return made


def _gpt2(vocab: Any, merges: Any, flags: Mapping[str, Any]) -> tokenizers.Tokenizer:
    made = _byte_level(vocab, merges)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=bool(flags.get("add_prefix_space", False))
    )
    return made


def _gpt_neox(vocab: Any, merges: Any, flags: Mapping[str, Any]) -> tokenizers.Tokenizer:
    made = _gpt2(vocab, merges, flags)
    made.normalizer = normalizers.NFC()
    return made


_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen2(vocab: Any, merges: Any, flags: Mapping[str, Any]) -> tokenizers.Tokenizer:
    made = _byte_level(vocab, merges)
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(
                add_prefix_space=bool(flags.get("add_prefix_space") or False), use_regex=False
            ),
        ]
    )
    return made


_END_OF_TEXT = "<|endoftext|>"
_LLAMA_NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_GPT_NAMED = {f"{role}_token": _END_OF_TEXT for role in ("unk", "bos", "eos")}
CLASSES = {
    "LlamaTokenizer": Recipe(_llama, _LLAMA_NAMED),
    "CodeLlamaTokenizer": Recipe(
        _code_llama,
        _LLAMA_NAMED
        | {
            "prefix_token": "▁<PRE>",
            "middle_token": "▁<MID>",
            "suffix_token": "▁<SUF>",
            "eot_token": "▁<EOT>",
            "fill_token": "<FILL_ME>",
        },
        adds_bos=True,
    ),
    "GemmaTokenizer": Recipe(
        _gemma,
        {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
        | {"pad_token": "<pad>", "mask_token": "<mask>"},
    ),
    "GPT2Tokenizer": Recipe(_gpt2, _GPT_NAMED),
    "GPTNeoXTokenizer": Recipe(
        _gpt_neox, _GPT_NAMED | {"pad_token": "<|padding|>"}, updates_frame=True
    ),
    "Qwen2Tokenizer": Recipe(
        _qwen2, {f"{role}_token": _END_OF_TEXT for role in ("unk", "eos", "pad")}
    ),
}
