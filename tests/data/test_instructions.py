import json

import numpy as np
import pytest

from btx_jax.config.config import DataConfig, FormatConfig
from btx_jax.data.documents import is_heldout, pack, text_document
from btx_jax.data.instructions import Formatter, Piece, Unusable, encode_pieces
from btx_jax.data.mixture import heldout_rows, training_batches
from btx_jax.data.prepare import prepare
from btx_jax.data.tokenizers import copy_tokenizer, load_tokenizer
from btx_jax.errors import ConfigError, UserError
from btx_jax.training.losses import next_token_targets

CHATML = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer, tmp_path):
    copy_tokenizer(tokenizer, tmp_path / "chat")
    (tmp_path / "chat" / "chat_template.jinja").write_text(CHATML)
    return load_tokenizer(tmp_path / "chat")


def test_a_prompt_is_read_and_an_answer_learnt(tokenizer):
    formatter = Formatter(FormatConfig("{query}", " {choice}"), tokenizer, 64)
    pieces = formatter.pieces({"query": "the river", "choices": ["paper", "city"], "gold": 1})
    assert pieces == [Piece("the river", False), Piece(" city", True)]
    ids, learnt = encode_pieces(pieces, tokenizer)
    assert ids == tokenizer.encode("the river city"), "encoded as one text, as a model is asked"
    assert (
        tokenizer.decode([i for i, of_answer in zip(ids, learnt, strict=True) if of_answer]).strip()
        == "city"
    )
    assert Formatter(FormatConfig("{a}?", "{b[x]}"), tokenizer, 64).pieces({"a": 1, "b": {"x": 2}})[
        1
    ] == Piece("2", True)


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ({}, "no field 'query'"),
        ({"query": "x", "choices": ["a"], "gold": 3}, "not the number of a choice"),
        ({"query": "x", "choices": ["a", "b"], "gold": -1}, "not the number of a choice"),
        ({"query": "x", "choices": ["a", "b"], "gold": True}, "not the number of a choice"),
        ({"query": "x", "choices": [["a"]], "gold": 0}, "not text; name a part of it"),
        ({"query": "x", "choices": [" "], "gold": 0}, "empty"),
    ],
)
def test_items_that_do_not_fit_say_why(item, why, tokenizer):
    with pytest.raises(Unusable, match=why):
        Formatter(FormatConfig("{query}", "{choice}"), tokenizer, 64).pieces(item)


def test_a_chat_s_assistant_is_learnt_turn_by_turn(chat_tokenizer):
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "one"},
        {"role": "user", "content": "v"}, {"role": "assistant", "content": "two"},
    ]  # fmt: skip
    pieces = Formatter(FormatConfig(messages="m"), chat_tokenizer, 64).pieces({"m": messages})
    assert [piece.text for piece in pieces if piece.learnt] == ["one<end>", "two<end>"]
    assert (
        "".join(piece.text for piece in pieces)
        == "<system>s<end><user>u<end><assistant>one<end><user>v<end><assistant>two<end>"
    )
    for wrong, why in (
        ([{"role": "user", "content": "u"}], "no assistant"),
        ("text", "not a list"),
        ([{"role": "user"}], "without content"),
    ):
        with pytest.raises(Unusable, match=why):
            Formatter(FormatConfig(messages="m"), chat_tokenizer, 64).pieces({"m": wrong})


def test_a_template_that_looks_ahead_is_refused(chat_tokenizer):
    (chat_tokenizer.path.parent / "chat_template.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    again = load_tokenizer(chat_tokenizer.path)
    with pytest.raises(Unusable, match="does not begin with its prompt"):
        Formatter(FormatConfig(messages="m"), again, 64).pieces({"m": messages})


def test_a_template_that_drops_what_it_said_is_refused(chat_tokenizer):
    (chat_tokenizer.path.parent / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}<{{ m.content }}>{% endif %}"
        "{% endfor %}"
    )
    formatter = Formatter(FormatConfig(messages="m"), load_tokenizer(chat_tokenizer.path), 64)
    messages = [{"role": role, "content": role} for role in ("user", "assistant")]
    assert [piece.text for piece in formatter.pieces({"m": messages})] == ["<user>", "<assistant>"]
    with pytest.raises(Unusable, match="changes earlier turns"):
        formatter.pieces({"m": messages * 2})


def test_a_template_whose_prompt_is_no_part_of_its_answer_is_refused(chat_tokenizer):
    (chat_tokenizer.path.parent / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    again = load_tokenizer(chat_tokenizer.path)
    with pytest.raises(Unusable, match="does not begin with its prompt"):
        Formatter(FormatConfig(messages="m"), again, 64).pieces({"m": messages})


def test_what_an_item_gives_its_template_reaches_it(chat_tokenizer):
    (chat_tokenizer.path.parent / "chat_template.jinja").write_text(
        "{{ tools | tojson if tools else '-' }}{{ documents | tojson if documents else '-' }}"
        "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    )
    formatter = Formatter(FormatConfig(messages="m"), load_tokenizer(chat_tokenizer.path), 64)
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant")]

    def prompt(**given):
        return formatter.pieces({"m": messages, **given})[0].text

    tool = {"name": "look", "parameters": {"a": None, "b": [{"c": None, "d": 1}]}}
    bare = '[{"name": "look", "parameters": {"b": [{"d": 1}]}}]'
    assert prompt() == prompt(tools=None, documents=[]) == "--<x>"
    assert prompt(tools=[tool]) == bare + "-<x>", "Parquet's nulls are absent"
    assert prompt(tools=bare) == bare + "-<x>", "as JSON text"
    assert prompt(documents=[{"text": "y"}]) == '-[{"text": "y"}]<x>'
    for bad in ("look", {"name": "look"}, 5):
        with pytest.raises(Unusable, match="tools is not a list"):
            prompt(tools=bad)


def test_a_tokenizer_without_a_template_or_with_a_broken_one_is_refused(tokenizer, chat_tokenizer):
    with pytest.raises(
        UserError, match=r"no chat template .*; set prompt and answer in the format"
    ):
        Formatter(FormatConfig(messages="m"), tokenizer, 64)
    (chat_tokenizer.path.parent / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(UserError, match="chat template"):
        Formatter(FormatConfig(messages="m"), load_tokenizer(chat_tokenizer.path), 64)


def test_rows_carry_what_is_learnt_and_its_bytes(tokenizer, tmp_path):
    rows = [{"q": f"prompt number {i}:", "a": f" paper {i}"} for i in range(60)] + [
        {"q": "no answer"},
        {"q": "long " * 200, "a": " x"},
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(
        f"{tmp_path / 'items.jsonl'}#@qa", formats={"qa": FormatConfig("{q}", "{a}", cutoff=40)}, sequence_length=48, heldout_fraction=0.3,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    (domain,) = prepare(config.train, config, tokenizer, "config.data.train")
    told = " ".join(domain.sources[0].manifest["problems"])
    assert "no field 'a'" in told
    assert "fills the cutoff of 40 tokens" in told
    held = heldout_rows(domain)
    batch = next(training_batches((domain,), 2, 0))
    learnt = []
    for tokens, segments in (
        (held["tokens"], held["segments"]),
        (batch["tokens"], batch["segments"]),
    ):
        _, inputs, targets, mask = next_token_targets(tokens, segments)
        assert (inputs >= 0).all()
        learnt += [
            tokenizer.decode([t for t in row[m] if t != tokenizer.eos])
            for row, m in zip(targets, mask, strict=True)
        ]
    assert all("prompt" not in text and "number" not in text and "paper" in text for text in learnt)
    answers = sum(len(row["a"]) for row in rows[:60] if is_heldout(row["q"] + row["a"], 0.3))
    assert held["bytes"].sum() == answers, "of the answers, to the last byte"

    with pytest.raises(UserError, match="no format 'qb' for"):
        prepare(f"{tmp_path / 'items.jsonl'}#@qb", config, tokenizer, "config.data.train")
    with pytest.raises(ConfigError, match="answer: give either prompt and answer, or messages"):
        FormatConfig("{q}", "{a}", messages="m")


def test_text_without_a_format_is_learnt_whole(tokenizer):
    rows = list(
        pack(
            iter([text_document("the river city", tokenizer), text_document("paper", tokenizer)]),
            tokenizer,
            32,
        )
    )
    assert (np.concatenate([row["segments"] for row in rows]) >= 0).all()
