"""Small tokenizer directories of all published shapes, made from a few lines of text."""

import io
import json

import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXT = (
    """def add(a, b):
    return a + b
    for x in range(10):
        total = total + x
    return total
The quick brown fox jumps over the lazy dog. Hello world, how are you today? Don't we'll I've.
user and assistant say hello. What is two plus two? It is four. system prompt here
INST yes no maybe the answer is here and there, numbers 1 2 3 4 5 6 7 8 9 0 12 345 2024
# heading ## smaller ### and #### more # # a ## b
é ü ß ñ 漢字 かな 한국어 привет العربية
""".splitlines()
    * 5
)
LLAMA_2_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' +"
    " m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token"
    " }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)
MARKED = (
    "{%- for m in messages %}\n    {%- if m.role == 'assistant' %}\n        {{-"
    " '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n'"
    " }}\n    {%- else %}\n        {{- '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n'"
    " }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n'"
    " }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content ="
    " '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim +"
    " '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{"
    " content }}{% endfor %}{% if add_generation_prompt %}{{"
    " '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
RICH = (  # uses features that templates may use
    "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- if m.role == 'system' -%}{%- continue"
    " -%}{%- endif -%}{%- set ns.n = ns.n + 1 -%}{{ ns.n }}:{{ m | tojson }}{{ dict(a=1) | tojson(indent=2)"
    " }}{{ strftime_now('%') | length }}{%- endfor -%}{{ eos_token }}{{ pad_token is defined }}"
)


def sp_model(**options) -> bytes:
    import sentencepiece

    out = io.BytesIO()
    settings = {
        "vocab_size": 460, "model_type": "bpe", "byte_fallback": True, "character_coverage": 1.0,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True, "hard_vocab_limit": False, "minloglevel": 2,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=out, **(settings | options)
    )
    return out.getvalue()


def byte_level(special: list[str], split=None, normalizer=None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split else level
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return made


def template(token: str, made: tokenizers.Tokenizer) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, made.token_to_id(token))],
    )


class Shapes:
    """NAME -> files of a directory: str or bytes; dictionaries become JSON."""

    def __init__(self):
        import sentencepiece

        self.sp = sp_model()
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.sp)
        self.all = {
            name.removeprefix("shape_"): getattr(self, name)()
            for name in dir(self)
            if name.startswith("shape_")
        }

    def files(self, family: str, config: dict | None, **more) -> dict:
        named = {"config.json": {"model_type": family, "vocab_size": 512}}
        if config is not None:
            named["tokenizer_config.json"] = config
        return named | {name.replace("__", "."): value for name, value in more.items()}

    def llama_2_json(self) -> str:
        """Llama 2's tokenizer.json as saved by transformers 4: a normalizer that prepends, Strip in
        the decoder."""
        vocab = {self.pieces.id_to_piece(i): i for i in range(self.pieces.vocab_size())}
        merges = [
            (p[:k], p[k:])
            for p in vocab
            for k in range(1, len(p))
            if p[:k] in vocab and p[k:] in vocab
        ]
        made = tokenizers.Tokenizer(
            models.BPE(
                vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
            )
        )
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
        made.add_special_tokens([AddedToken(t, normalized=False) for t in ("<unk>", "<s>", "</s>")])
        made.post_processor = template("<s>", made)
        spec = json.loads(made.to_str())
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
        return json.dumps(spec, ensure_ascii=False)

    def llama(self, **more) -> dict:
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        return named | {"tokenizer_class": "LlamaTokenizer", "chat_template": LLAMA_2_CHAT} | more

    def shape_llama_2(self):
        told = self.llama(legacy=False, add_bos_token=True, add_eos_token=False)
        return self.files(
            "llama", told, tokenizer__json=self.llama_2_json(), tokenizer__model=self.sp
        )

    def shape_llama_2_fast(self):
        told = self.llama(
            tokenizer_class="LlamaTokenizerFast", legacy=True, chat_template=LLAMA_2_CHAT
        )
        return self.files("llama", told, tokenizer__json=self.llama_2_json())

    def shape_llama_2_model(self):
        told = self.llama(legacy=None, add_bos_token=True, add_eos_token=False)
        return self.files("llama", told, tokenizer__model=self.sp)

    def shape_llama_2_model_without_flags(self):
        return self.files("llama", self.llama(), tokenizer__model=self.sp)

    def shape_llama_2_legacy_model(self):
        told = self.llama(legacy=True, add_bos_token=True, add_eos_token=True)
        return self.files("llama", told, tokenizer__model=self.sp)

    def shape_llama_3(self):
        special = [
            "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
        ]  # fmt: skip
        split = pre_tokenizers.Split(
            tokenizers.Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            behavior="isolated",
        )
        made = byte_level(special, split)
        made.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=True), template(special[0], made)]
        )
        told = {
            "bos_token": special[0], "eos_token": special[4], "chat_template": LLAMA_3,
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True,
        }  # fmt: skip
        return self.files("llama", told, tokenizer__json=made.to_str())

    def shape_mistral(self):
        told = self.llama(add_bos_token=True, legacy=False)
        return self.files(
            "mistral", told, tokenizer__json=self.llama_2_json(), tokenizer__model=self.sp
        )

    def shape_mistral_model(self):
        told = self.llama(add_bos_token=True, legacy=False, sp_model_kwargs={})
        return self.files("mistral", told, tokenizer__model=self.sp)

    def shape_yi(self):
        sp = sp_model(
            add_dummy_prefix=False,
            user_defined_symbols=["<|im_start|>", "<|im_end|>", "\t\t"],
            unk_piece="<unk>", bos_piece="<|startoftext|>", eos_piece="<|endoftext|>",
        )  # fmt: skip
        told = self.llama(
            bos_token="<|startoftext|>", eos_token="<|endoftext|>", add_bos_token=False, legacy=True,
            add_eos_token=False, chat_template=CHATML, add_prefix_space=False,
        )  # fmt: skip
        return self.files("llama", told, tokenizer__model=sp)

    def shape_qwen(self):
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        split = pre_tokenizers.Split(
            tokenizers.Regex(r"\p{N}| ?[^\s\p{N}]+|\s+"), behavior="isolated"
        )
        made = byte_level(special, split, normalizers.NFC())
        told = {
            "add_prefix_space": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "additional_special_tokens": special[1:], "chat_template": CHATML, "errors": "replace",
            "tokenizer_class": "Qwen2Tokenizer", "unk_token": None, "split_special_tokens": False,
            "added_tokens_decoder": {
                str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False,
                         "single_word": False, "special": True} for i, t in enumerate(special)
            },
        }  # fmt: skip
        return self.files("qwen2", told, tokenizer__json=made.to_str())

    def shape_smollm2(self):
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        made = byte_level(special, pre_tokenizers.Digits(individual_digits=True))
        told = {
            "add_prefix_space": False, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer",
            "chat_template": CHATML, "clean_up_tokenization_spaces": False, "model_max_length": 8192,
        }  # fmt: skip
        return self.files("llama", told, tokenizer__json=made.to_str())

    def shape_byte_level_alone(self):
        made = byte_level(["<s>", "</s>"])
        return self.files("llama", None, tokenizer__json=made.to_str())

    def shape_llama_class_over_byte_level(self):
        """As in DeepSeek."""
        made = byte_level(["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])
        made.post_processor = template("<｜begin▁of▁sentence｜>", made)
        told = self.llama(
            bos_token={"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>", "lstrip": False,
                       "normalized": True, "rstrip": False, "single_word": False},
            eos_token="<｜end▁of▁sentence｜>", tokenizer_class="LlamaTokenizerFast", unk_token=None,
            add_bos_token=False, chat_template=LLAMA_2_CHAT,
        )  # fmt: skip
        return self.files("llama", told, tokenizer__json=made.to_str())

    def chatml(self, **more) -> dict:
        last = self.pieces.vocab_size()
        added = {
            str(last + i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False,
                            "single_word": False, "special": True}
            for i, t in enumerate(("<|im_start|>", "<|im_end|>"))
        }  # fmt: skip
        told = {"eos_token": "<|im_end|>", "chat_template": CHATML, "added_tokens_decoder": added}
        return self.llama(**(told | more))

    def shape_chatml_on_model(self):
        last = self.pieces.vocab_size()
        return self.files(
            "llama",
            self.chatml(legacy=True, add_bos_token=True),
            tokenizer__model=self.sp,
            added_tokens__json={"<|im_start|>": last, "<|im_end|>": last + 1},
            special_tokens_map__json={"bos_token": "<s>", "eos_token": "<|im_end|>"},
        )

    def shape_chatml_on_mistral(self):
        return self.files(
            "mistral",
            self.chatml(chat_template=MARKED, add_bos_token=True),
            tokenizer__json=self.llama_2_json(),
            tokenizer__model=self.sp,
        )

    def shape_added_tokens_file_only(self):
        """Saved before added_tokens_decoder existed: a plain and a special token."""
        last = self.pieces.vocab_size()
        told = self.llama(legacy=False, add_bos_token=True, chat_template=RICH)
        token = {
            "content": "</s>",
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }
        return self.files(
            "llama",
            told,
            tokenizer__model=self.sp,
            added_tokens__json={"<think>": last, "[PAD]": last + 1},
            special_tokens_map__json={"eos_token": token, "bos_token": "<s>", "pad_token": "[PAD]"},
        )

    def shape_strips_around(self):
        """Added tokens that absorb surrounding spaces, or match whole words only."""
        made = byte_level(["<s>", "</s>"])
        made.add_tokens(
            [AddedToken("<mask>", lstrip=True), AddedToken("word", single_word=True), "user"]
        )
        made.add_special_tokens([AddedToken("<sep>", rstrip=True)])
        told = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
        return self.files("llama", told, tokenizer__json=made.to_str())

    def shape_unigram(self):
        made = tokenizers.Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
        )
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        made.train_from_iterator(
            TEXT,
            trainers.UnigramTrainer(
                vocab_size=300,
                special_tokens=["<unk>", "<s>", "</s>"],
                unk_token="<unk>",
                show_progress=False,
            ),
        )
        made.post_processor = template("<s>", made)
        told = {
            "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": True,
            "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": LLAMA_2_CHAT,
        }  # fmt: skip
        return self.files("llama", told, tokenizer__json=made.to_str())

    def shape_metaspace_always(self):
        made = tokenizers.Tokenizer.from_str(self.llama_2_json())
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        made.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
        told = {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        return self.files("llama", told, tokenizer__json=made.to_str())

    def shape_metaspace_first(self):
        made = tokenizers.Tokenizer.from_str(self.llama_2_json())
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        named = {"bos_token": "<s>", "eos_token": "</s>"}
        several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": RICH}]
        told = named | {"tokenizer_class": "TokenizersBackend", "chat_template": several}
        return self.files("mixtral", told, tokenizer__json=made.to_str())

    def shape_cuts_and_pads(self):
        """Truncation and padding for a classifier, not for text."""
        made = byte_level(["<s>", "</s>", "[PAD]"])
        made.enable_truncation(5)
        made.enable_padding(pad_token="[PAD]", pad_id=2, length=8)
        told = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}
        files = self.files("llama", told, tokenizer__json=made.to_str())
        return files | {"chat_template.jinja": CHATML, "additional_chat_templates/rag.jinja": RICH}

    def shape_code_llama(self):
        told = self.llama(tokenizer_class="CodeLlamaTokenizer")
        return self.files("llama", told, tokenizer__model=self.sp)

    def shape_gemma(self):
        sp = sp_model(
            add_dummy_prefix=False,
            bos_piece="<bos>",
            eos_piece="<eos>",
            pad_id=3,
            pad_piece="<pad>",
        )
        told = {
            "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "bos_token": "<bos>", "eos_token": "<eos>",
            "unk_token": "<unk>", "pad_token": "<pad>", "chat_template": CHATML,
        }  # fmt: skip
        return self.files("llama", told, tokenizer__model=sp)

    def digits(self, family: str, told: dict | None, special=("<|endoftext|>",), **more) -> dict:
        """A tokenizer.json that differs from the pipeline of every class."""
        made = byte_level(list(special), pre_tokenizers.Digits(individual_digits=True))
        made.post_processor = template(special[0], made)
        return self.files(family, told, tokenizer__json=made.to_str(), **more)

    def shape_starcoder(self):
        """A family whose tokenizer.json is used as it is, whatever class it names."""
        return self.digits("gpt_bigcode", {"tokenizer_class": "GPT2Tokenizer"})

    def shape_qwen_distilled(self):
        """A family whose class is used whatever its files name."""
        told = self.llama(bos_token="<a>", eos_token="<b>", unk_token=None)
        return self.digits("qwen2", told, ("<a>", "<b>"))

    def shape_gpt_neox_unnamed(self):
        return self.digits("gpt_neox", None)

    def shape_class_in_config(self):
        files = self.digits("llama", {"eos_token": "<|endoftext|>"})
        files["config.json"]["tokenizer_class"] = "GPT2Tokenizer"
        return files

    def plain(self, **told) -> dict:
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        return self.digits("llama", named | told)

    def shape_named_unsorted(self):
        roles = ("bos", "cls", "eos", "image", "mask", "pad", "sep", "unk")  # sorted, as in JSON
        return self.plain(**{f"{role}_token": f"[{role.upper()}]" for role in roles})

    def shape_named_freely(self):
        return self.plain(extra_special_tokens={"image": "<image>", "audio_token": "<audio>"})

    def shape_named_twice(self):
        flags = {"lstrip": True, "rstrip": True, "normalized": False, "__type": "AddedToken"}
        return self.plain(eos_token={"content": "[E]", **flags}, pad_token="[E]")

    def shape_chatml_special_map(self):
        names = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
        return self.plain(chat_template=CHATML) | {"special_tokens_map.json": names}

    def shape_special_split(self):
        return self.plain(split_special_tokens=True)

    def shape_vocabulary_and_merges(self):
        made = byte_level(["<|endoftext|>"])
        spec = json.loads(made.to_str())
        merges = "\n".join(" ".join(pair) for pair in spec["model"]["merges"])
        assert "\n# #" in merges, "a merge that looks like a comment"
        told = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
        return self.files(
            "llama",
            told,
            vocab__json=spec["model"]["vocab"],
            merges__txt="#version: 0.2\n" + merges + "\n",
        )
