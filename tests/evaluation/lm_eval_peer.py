"""lm-evaluation-harness's own Hugging Face model compared with ours; run manually, as it needs
torch.

    python tests/evaluation/lm_eval_peer.py make tests/evaluation/golden
    python tests/evaluation/lm_eval_peer.py ask hf HF_DIRECTORY THEIRS.json FILE ... [--items=50]
    python tests/evaluation/lm_eval_peer.py ask btx_jax HF_DIRECTORY OURS.json FILE ... [--items=50]
    python tests/evaluation/lm_eval_peer.py compare THEIRS.json OURS.json

`make` and `ask hf` need torch, transformers, accelerate, sentencepiece and lm_eval 0.4.13; `ask
btx_jax` needs btx_jax. FILE: JSON lines, each a task of its kind: {query, choices, gold}
(log-likelihoods), {context, answer} (as gsm8k) or {prompt, test, entry_point} (as HumanEval), the
latter two generated greedily.

lm_eval's model decodes a continuation separately, so that a tokenizer that strips a text's first
space (Llama 2's) strips the continuation's, and right answers to HumanEval no longer compile.
Golden texts are those it would give after the prompt; `compare` counts differences in that space
separately.
"""

import argparse
import gzip
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TOLERANCE = 1e-3
GSM8K = {"until": ["Question:", "\n\n"], "do_sample": False, "temperature": 0.0}
HUMANEVAL = {"until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "do_sample": False}
TEXT = """def add(a, b):
    return a + b
for x in range(10):
    total = total + x
The quick brown fox jumps over the lazy dog. How are you today?
Question: What is two plus two? Answer: It is four, not 5.
"""


def write_model(directory: Path, vocab: int, twins: dict[int, int], **more) -> None:
    """Write a Llama with random weights, the same on every machine. twins: token -> the token that
    it predicts instead."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32", **more,
    }  # fmt: skip
    rng = np.random.default_rng(17)

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.5).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": weights(vocab, 32),
        "lm_head.weight": weights(vocab, 32),
    }
    for token, other in twins.items():
        tensors["lm_head.weight"][token] = tensors["lm_head.weight"][other] * 1.1
    for layer in range(2):
        name = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}{norm}.weight"] = np.ones(32, np.float32)
        shapes = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
        for part, shape in shapes.items():
            tensors[f"{name}self_attn.{part}_proj.weight"] = weights(*shape)
        for part, shape in {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}.items():
            tensors[f"{name}mlp.{part}_proj.weight"] = weights(*shape)
    tensors["model.norm.weight"] = np.ones(32, np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_llama_tokenizer(directory: Path) -> None:
    """As Llama 2's: byte fallback, BOS, a leading space that decoding strips."""
    import io

    import sentencepiece
    from transformers import AutoTokenizer

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 5), model_writer=written, vocab_size=340, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        character_coverage=1.0, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        (source / "tokenizer.model").write_bytes(written.getvalue())
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
        source.joinpath("tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "LlamaTokenizer",
                    "legacy": False,
                    "add_bos_token": True,
                    **names,
                }
            )
        )
        AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
        "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
        "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    (directory / "chat_template.jinja").write_text(template)


def write_chat_tokenizer(directory: Path) -> None:
    """As SmolLM2's or Qwen's: bytes, no BOS, ChatML, two templates."""
    import tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|tool|>"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(TEXT.splitlines() * 5, trainer)
    made.save(str(directory / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        "{% endif %}"
    )
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **names}
        )
    )
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))


MODELS = {  # name -> (tokenizer writer, (token, its twin), further config.json values)
    "llama": (write_llama_tokenizer, {"</s>": "<0xA0>"}, {"bos_token_id": 1, "eos_token_id": 2}),
    "chat": (
        write_chat_tokenizer,
        {"<|tool|>": "Ē", "<|endoftext|>": "al"},
        {"bos_token_id": None, "eos_token_id": 2},
    ),
}

# For each: a method of lm_eval's model classes, --model_args, and its requests.
PROMPTS = [
    "The quick brown",
    "def add(a, b):\n",
    "Question: What is two plus two?\nAnswer:",
    " leading and trailing ",
    "Ünïcödé 𝄞 text",
    "x",
]
LONG = "The quick brown fox jumps over the lazy dog. " * 6
PAIRS = [
    ("The quick brown", " fox"),
    ("The quick brown ", "fox jumps"),
    ("Question:  \n", "four"),
    ("", "The lazy dog"),
    ("", " 𝄞 over"),
    (LONG, " How are you today?"),
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is two plus two? "},
    {"role": "assistant", "content": "It is four."},
    {"role": "user", "content": "How are you today?"},
]
BEGUN = [*CHAT[1:], {"role": "assistant", "content": "I am \n"}]


def stops_of(texts: list[str]) -> list[str]:
    """Substrings of freely generated texts, within and across tokens."""
    return [text[at : at + 3] for text, at in zip(texts, (4, 7, 11, 2, 9, 5), strict=True)]


def their_model(directory: Path, **arguments):
    """lm_eval's model, one prompt at a time, decoding after the prompt; or separately, as it does
    by default."""
    from lm_eval.models.huggingface import HFLM

    class Behind(HFLM):
        behind: list[int] | None = None

        def _model_generate(self, context, **options):
            self.behind = context[0].tolist()
            return super()._model_generate(context, **options)

        def tok_decode(self, tokens, skip_special_tokens=True):
            if self.behind is None or not isinstance(tokens, list):
                return super().tok_decode(tokens, skip_special_tokens)
            # Consecutive byte tokens are decoded together; the prompt's own must not be among them.
            pieces = self.tokenizer.convert_ids_to_tokens(self.behind)
            ends = [i for i, piece in enumerate(pieces, 1) if not re.fullmatch("<0x..>", piece)]
            behind = self.behind[: ends[-1]]
            before = super().tok_decode(behind, skip_special_tokens)
            whole = super().tok_decode(behind + tokens, skip_special_tokens)
            assert whole.startswith(before)
            return whole.removeprefix(before)

    options = {"dtype": "float32", "batch_size": 1, "device": "cpu", **arguments}
    return Behind(str(directory), **options), HFLM(str(directory), **options)


def ask_theirs(directory: Path, method: str, arguments: dict, asked: list) -> list:
    from lm_eval.api.instance import Instance

    behind, alone = their_model(directory, **arguments)
    if method == "apply_chat_template":
        return [alone.apply_chat_template(*request) for request in asked]
    requests = [Instance(method, {}, tuple(request), i) for i, request in enumerate(asked)]
    answers = [getattr(model, method)(requests) for model in (behind, alone)]
    if method == "generate_until":
        for right, theirs in zip(*answers, strict=True):
            assert theirs in (right, right.removeprefix(" ")), (right, theirs)
    else:
        assert answers[0] == answers[1]
    return answers[0]


def make(folder: Path) -> None:
    models, cases = {}, []
    for name, (write_tokenizer, twins, config) in MODELS.items():
        directory = folder / f"lm_eval_{name}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        write_tokenizer(directory)
        tokenizer = directory / "tokenizer.json"
        written = json.loads(tokenizer.read_text(encoding="utf-8"))
        tokenizer.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
        ids = written["model"]["vocab"]
        pairs = [[ids[token], ids[other]] for token, other in twins.items()]
        models[name] = {"vocab": len(ids), "twins": pairs, **config}
        with tempfile.TemporaryDirectory() as place:
            whole = Path(place) / name
            shutil.copytree(directory, whole)
            write_model(whole, len(ids), dict(pairs), **config)

            def add(method, arguments, asked, name=name, whole=whole):
                answers = ask_theirs(whole, method, arguments, asked)
                case = {"model": name, "method": method, "arguments": arguments}
                cases.append({**case, "asked": asked, "answers": answers})
                return answers

            free = {"until": [], "max_gen_toks": 24, "do_sample": False}
            texts = add("generate_until", {}, [[prompt, free] for prompt in PROMPTS])
            stopped = [
                [p, {**free, "until": [s]}] for p, s in zip(PROMPTS, stops_of(texts), strict=True)
            ]
            add("generate_until", {}, stopped)
            special = ["<s>"] if name == "llama" else ["<|tool|>", "<|im_start|>\n"]
            add("generate_until", {}, [[p, {**free, "until": special}] for p in PROMPTS])
            long = [[LONG + p, {"until": "\n", "max_new_tokens": 12}] for p in PROMPTS]
            add("generate_until", {}, long)
            add("generate_until", {"max_length": 40}, long)
            begins = "<s>" if name == "llama" else "<|im_start|>"
            add("generate_until", {}, [[begins + p, free] for p in PROMPTS])
            think = texts[0][6:8]
            thought = [[p, {**free, "until": stops_of(texts)[:1]}] for p in PROMPTS]
            add("generate_until", {"think_end_token": think}, thought)
            add("generate_until", {"think_end_token": 100}, [[p, free] for p in PROMPTS])
            add("loglikelihood", {}, PAIRS)
            add("loglikelihood", {"max_length": 40}, PAIRS)
            add("loglikelihood", {"prefix_token_id": 7}, PAIRS)
            add("loglikelihood_rolling", {}, [[p] for p in (*PROMPTS, LONG * 3)])
            add("loglikelihood_rolling", {"max_length": 20}, [[LONG]])
            for adds in (False, True) if name == "llama" else (False,):
                add("generate_until", {"add_bos_token": adds}, [[p, free] for p in PROMPTS])
                add("loglikelihood", {"add_bos_token": adds}, PAIRS)
                add("loglikelihood_rolling", {"add_bos_token": adds}, [[LONG]])
            chats = [[CHAT[1:], True], [CHAT, True], [CHAT[1:2], True], [BEGUN, False]]
            rendered = add("apply_chat_template", {}, chats)
            add("generate_until", {}, [[text, free] for text in rendered])
            if name == "chat":
                add("apply_chat_template", {"enable_thinking": False}, chats)
    text = json.dumps({"models": models, "cases": cases}, ensure_ascii=False, indent=0)
    (folder / "lm_eval.json").write_text(text + "\n", encoding="utf-8")


def write_task(folder: Path, file: Path) -> str:
    """Write an lm_eval task for a file of JSON lines. Returns its name."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        fields = json.loads(lines.readline())
    name = "own_" + file.name.split(".")[0]
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test", "num_fewshot": 0, "output_type": "generate_until",
    }  # fmt: skip
    match = [{"metric": "exact_match"}]
    if "choices" in fields:
        task |= {
            "output_type": "multiple_choice", "doc_to_text": "{{query}}\nAnswer:", "doc_to_choice": "choices", "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }  # fmt: skip
    elif "entry_point" in fields:
        task |= {
            "doc_to_text": "{{prompt}}", "doc_to_target": "{{canonical_solution}}", "generation_kwargs": HUMANEVAL, "metric_list": match,
        }  # fmt: skip
    else:
        task |= {
            "doc_to_text": "Question: {{context}}\nAnswer:", "doc_to_target": "{{answer}}",
            "generation_kwargs": GSM8K, "metric_list": match,
        }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return name


def ask(args: argparse.Namespace) -> None:
    """Every sample's answers, as logged by lm_eval."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    if args.model == "btx_jax":
        import btx_jax.evaluation.lm_eval_model  # noqa: F401  registers it
    with tempfile.TemporaryDirectory() as folder:
        tasks = [write_task(Path(folder), Path(file)) for file in args.files]
        found = lm_eval.simple_evaluate(
            model=args.model,
            model_args={"pretrained": args.checkpoint, "dtype": "float32"},
            batch_size=args.batch_size,
            device="cpu",
            tasks=tasks,
            task_manager=TaskManager(include_path=folder),
            limit=args.items,
            gen_kwargs={"max_gen_toks": args.tokens},
            apply_chat_template=args.chat,
        )
    samples = {name: [sample["resps"] for sample in found["samples"][name]] for name in tasks}
    results = {name: found["results"][name] for name in tasks}
    told = json.dumps({"results": results, "samples": samples}, default=str, ensure_ascii=False)
    Path(args.out).write_text(told, encoding="utf-8")


def compare(theirs: dict, ours: dict) -> None:
    for name, samples in theirs["samples"].items():
        pairs = list(zip(samples, ours["samples"][name], strict=True))
        told = {metric: value for metric, value in ours["results"][name].items() if "," in metric}
        if isinstance(samples[0][0][0], str):
            texts = [(a[0][0], b[0][0]) for a, b in pairs]
            equal = sum(a == b for a, b in texts)
            space = sum(a != b and " " + a == b for a, b in texts)
            print(f"{name}: {equal} of {len(texts)} texts equal, {space} but for their first space")
            assert equal + space == len(texts), next((a, b) for a, b in texts if a != b != " " + a)
        else:
            log_p = [
                (float(a[0][0]), float(b[0][0]))
                for x, y in pairs
                for a, b in zip(x, y, strict=True)
            ]
            apart = max(abs(a - b) for a, b in log_p)
            print(f"{name}: {len(log_p)} log-likelihoods, at most {apart:.2e} apart; {told}")
            assert apart <= TOLERANCE
        for metric, value in told.items():
            if not metric.startswith("exact_match"):
                assert value == theirs["results"][name][metric], metric


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("make")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("ask")
    command.add_argument("model", choices=("hf", "btx_jax"))
    command.add_argument("checkpoint")
    command.add_argument("out")
    command.add_argument("files", nargs="+")
    command.add_argument("--items", type=int, default=50)
    command.add_argument("--tokens", type=int, default=64, help="new ones at most")
    command.add_argument("--batch_size", type=int, default=1)
    command.add_argument("--chat", action="store_true", help="--apply_chat_template")
    command = commands.add_parser("compare")
    command.add_argument("theirs", type=Path)
    command.add_argument("ours", type=Path)
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder)
    elif args.command == "ask":
        ask(args)
    else:
        compare(*(json.loads(file.read_text("utf-8")) for file in (args.theirs, args.ours)))


if __name__ == "__main__":
    sys.exit(main())
