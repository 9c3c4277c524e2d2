import gzip
import io
import json
import os
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from btx_jax.checkpoints.training_state import CheckpointMetadata
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.evaluation.continuation import Stream, continuation, stop_ids
from tests.models.test_llama import TINY

TEXT = "def add(a, b):\n    return a + b\nhello world, stop here é 漢 😀\n" * 20


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """As Llama 2's tokenizer: adds a leading space to every text, and strips it when decoding."""
    folder = tmp_path_factory.mktemp("llama")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=out, vocab_size=330,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatty")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<|im_end|>", "<|eot|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT.splitlines(), trainer)
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return load_tokenizer(folder)


def test_a_continuation_keeps_the_space_in_front_of_it(llama):
    prompt = llama.encode_prompt("hello")
    new = llama.encode_prompt("hello world")[len(prompt) :]
    assert llama.decode(new) == "world", "alone it stands at the beginning of a text"
    assert continuation(llama, prompt, new) == (" world", False)
    body = "def add(a, b):\n"
    prompt = llama.encode_prompt(body)
    new = llama.encode_prompt(body + "    return a + b")[len(prompt) :]
    assert continuation(llama, prompt, new) == ("    return a + b", False)


def test_bytes_that_are_no_character_leave_those_of_the_prompt_alone(llama):
    prompt = llama.encode_prompt("a\n")
    assert llama.token_of(prompt[-1]) == "<0x0A>"
    bad, good = llama.id_of("<0xE6>"), [llama.id_of(f"<0x{b:02X}>") for b in "\u6f22".encode()]
    assert llama.decode([bad], prompt) == "\ufffd"
    assert llama.decode(good, prompt) == "\u6f22"
    assert llama.decode([*good, bad], prompt).startswith("\ufffd"), "as the library has it"


def test_a_stop_string_ends_the_text_whatever_it_is_made_of(chatty):
    prompt = chatty.encode_prompt("hello")
    new = chatty.encode(" world, stop<|im_end|>\nhere</s>")
    for stops, text in (
        (["stop"], " world, "),
        (["<|im_end|>"], " world, stop"),  # a token that decoding skips
        (["stop<|im_end|>"], " world, "),  # begins in text and ends in such a token
        (["<|im_end|>\nhe"], " world, stop"),
        (["</s>", "\n"], " world, stop"),
        (["here", "world"], " "),
    ):
        assert continuation(chatty, prompt, new, stops) == (text, True), stops
    assert continuation(chatty, prompt, new, ["never", "<|eot|>"]) == (
        " world, stop\nhere",
        False,
    )


def test_a_stream_gives_the_same_text_and_takes_nothing_back(llama, chatty):
    for tokenizer, stops in (
        (llama, ["stop he"]),
        (chatty, ["stop he", "<|im_end|>"]),
        (llama, []),
    ):
        prompt = tokenizer.encode_prompt("hello")
        new = tokenizer.encode_prompt("hello 漢😀 world, stop there stop here")[len(prompt) :]
        stream, text = Stream(tokenizer, prompt, stops), ""
        for count in range(1, len(new) + 1):
            text += stream.more(new[:count])
            assert "\ufffd" not in text
            if stream.is_finished:
                break
        text += stream.more(new[:count], is_last=True)
        assert (text, stream.is_finished) == continuation(tokenizer, prompt, new, stops)


def test_a_stop_string_that_is_first_a_token_and_then_text_cuts_at_the_first(chatty):
    new = chatty.encode("ab") + [chatty.id_of("</s>")] + chatty.encode("cd</s>")
    assert continuation(chatty, [], new, ["</s>"]) == ("ab", True)
    plain = chatty.encode("ab<|eot|>cd") + [i for part in "<|eot|>" for i in chatty.encode(part)]
    assert chatty.decode(plain) == "abcd<|eot|>"
    assert continuation(chatty, [], plain, ["<|eot|>"]) == ("ab", True)


def test_a_stream_takes_nothing_back_that_decoding_cleans_up(tmp_path):
    words = ["Don", "'", "t", "stop", "n't", "'s", ".", ",", "a", "I", "'m"]
    vocab = {"[UNK]": 0} | {word: i for i, word in enumerate(dict.fromkeys(words), 1)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    tokenizer = load_tokenizer(tmp_path)
    new = tokenizer.encode("Don ' t stop . I 'm a , Don n't ' t 's ' s")
    stream = Stream(tokenizer, [])
    parts = [stream.more(new[: count + 1]) for count in range(len(new))]
    whole = continuation(tokenizer, [], new)[0]
    assert "Don't" in whole
    assert "".join([*parts, stream.more(new, is_last=True)]) == whole


def test_every_end_that_the_files_name_ends_a_text(chatty):
    def metadata(**huggingface):
        return CheckpointMetadata(TINY, 0, {}, huggingface=huggingface)

    assert stop_ids(metadata(), chatty) == [1]
    told = metadata(generation_config={"eos_token_id": [1, 3]}, config={"eos_token_id": 2})
    assert stop_ids(told, chatty) == [1, 3, 2]
    assert stop_ids(metadata(config={"eos_token_id": None}), chatty, [2, None]) == [1, 2]


@pytest.mark.skipif("BTX_DATA_DIR" not in os.environ, reason="HumanEval is read from $BTX_DATA_DIR")
def test_every_reference_solution_is_streamed_as_it_was_written(llama):
    """HumanEval with a tokenizer like Llama 2's, token by token."""
    file = Path(os.environ["BTX_DATA_DIR"]) / "evals" / "humaneval.jsonl.gz"
    items = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    assert len(items) == 164
    for item in items:
        prompt = llama.encode_prompt(item["prompt"])
        whole = llama.encode_prompt(item["prompt"] + item["canonical_solution"])
        assert whole[: len(prompt)] == prompt
        stream, new = Stream(llama, prompt), whole[len(prompt) :]
        parts = [stream.more(new[: count + 1]) for count in range(len(new))]
        assert "".join([*parts, stream.more(new, is_last=True)]) == item["canonical_solution"]
