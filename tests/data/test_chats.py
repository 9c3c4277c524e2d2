import json

import pyarrow
import pyarrow.parquet
import pytest

from btx_jax.config.config import FormatConfig
from btx_jax.data.chats import Chats, Unusable
from btx_jax.data.files import read_rows
from btx_jax.data.instructions import Formatter
from btx_jax.data.sources import Problems
from btx_jax.data.tokenizers import copy_tokenizer, load_tokenizer

PLAIN = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
PRINTS = PLAIN.replace("+ m['content'] +", "}}{{ m['content'] }}{{")
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}"
    "[{{ part.text }}]{% endif %}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% if not m.content %}{% for c in m.tool_calls %}"
    "CALL {{ c.function.name }}{% endfor %}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]


@pytest.fixture
def read(tokenizer, tmp_path):
    def pieces(template, messages, field="messages"):
        if not (tmp_path / "chat").exists():
            copy_tokenizer(tokenizer, tmp_path / "chat")
        (tmp_path / "chat" / "chat_template.jinja").write_text(template)
        formatter = Formatter(FormatConfig(messages=field), load_tokenizer(tmp_path / "chat"), 64)
        found = formatter.pieces({field: messages})
        return "".join(p.text for p in found), [p.text for p in found if p.learnt]

    return pieces


def chat(question, answer, **more):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]


def text(*words):
    return [{"type": "text", "text": word} for word in words]


@pytest.mark.parametrize("template", [PLAIN, PRINTS])
def test_content_parts_become_text_where_a_template_knows_none(template, read):
    """Joined by one space, as in transformers' server."""
    whole, learnt = read(template, chat(text("say", "it"), text("four")))
    assert whole == "<user>say it<end><assistant>four<end>"
    assert learnt == ["four<end>"]
    said = {"type": "output_text", "text": "four"}
    assert read(template, chat("x", [said]))[1] == ["four<end>"]


def test_content_parts_reach_a_template_that_takes_them(read):
    whole, _ = read(PARTS, chat(text("say", "it"), text("four")))
    assert whole == "<user>[say][it]<end><assistant>[four]<end>"


@pytest.mark.parametrize("template", [PLAIN, PRINTS])
def test_null_is_the_empty_text_where_a_template_does_not_know_it(template, read):
    """An empty assistant's turn is read but not learnt."""
    messages = [*chat("hello", None), {"role": "assistant", "content": "four"}]
    whole, learnt = read(template, messages)
    assert whole == "<user>hello<end><assistant><end><assistant>four<end>"
    assert learnt == ["four<end>"]
    for empty in (None, "", []):
        with pytest.raises(Unusable, match="no assistant turn"):
            read(template, chat("hello", empty))


def test_a_tool_call_is_learnt_where_the_template_has_a_place_for_it(read):
    whole, learnt = read(CALLS, chat("hello", None, tool_calls=CALL))
    assert whole == "<user>hello<end><assistant>CALL weather<end>"
    assert learnt == ["CALL weather<end>"]
    no_content = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": CALL}]
    with pytest.raises(Unusable, match="does not render tool calls"):
        read(PLAIN, no_content)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ("no JSON", "not a list of messages"),
        ({"role": "user"}, "not a list of messages"),
        (["hello"], "not a list of messages"),
        ([{"content": "x"}], "a message without a role"),
        (chat(None, "x"), "without content"),
        (chat(5, "x"), "content is not text"),
        (chat([{"type": "image_url", "image_url": "x"}], "x"), "parts that are not text"),
        (chat(["x"], "x"), "parts that are not text"),
        (chat("\ud800", "x"), "not valid Unicode"),
        (chat("x", text("\udfff")), "not valid Unicode"),
        (chat("x", "y", tool_calls=["z"]), "without the function's name"),
        (chat("x", "y", tool_calls=True), "tool calls that are not a list"),
        ([{"from": ["human"], "value": "x"}], "a message without a role"),
        ([{"from": {}, "value": "x"}], "a message without a role"),
        ("[" * 100_000, "not a list of messages"),
    ],
)
def test_chats_that_cannot_be_read_say_why(messages, why, read):
    with pytest.raises(Unusable, match=why):
        read(PLAIN, messages)


def test_sharegpt_and_json_in_a_field(read):
    said = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "four"}]
    expected = ("<user>hello<end><assistant>four<end>", ["four<end>"])
    assert read(PLAIN, said, "conversations") == expected
    assert read(PLAIN, json.dumps(chat("hello", "four"))) == expected


def test_what_parquet_fills_with_nulls_is_absent(tmp_path):
    messages = [*chat("x", "y"), *chat("z", None, tool_calls=CALL)]
    pyarrow.parquet.write_table(pyarrow.table({"m": [messages]}), tmp_path / "x.parquet")
    (row,) = read_rows(tmp_path / "x.parquet")
    chats = Chats(lambda messages: messages[-1]["content"] or "")
    found = chats.messages(row.value["m"])
    assert [sorted(message) for message in found] == [["content", "role"]] * 3 + [
        ["content", "role", "tool_calls"]
    ]


@pytest.mark.parametrize(
    ("item", "why"),
    [
        ({"q": "x", "a": None}, "a field of the answer is null"),
        ({"q": "x", "a": "\ud800"}, "not valid Unicode"),
        ({"q": "\udfff", "a": "x"}, "not valid Unicode"),
        ({"q": "x", "a": b"\xff"}, "does not fit"),
        ({"q": "x"}, "no field 'a'"),
        ({"q": "x", "a": ["b"]}, "not text; name a part of it"),
        ({"q": "x", "a": {"text": "b"}}, "not text; name a part of it"),
    ],
)
def test_fields_that_hold_no_text_say_why(item, why, tokenizer):
    with pytest.raises(Unusable, match=why):
        Formatter(FormatConfig("{q}", "{a}"), tokenizer, 64).pieces(item)


def test_null_in_a_prompt_is_nothing_and_bytes_are_text(tokenizer):
    formatter = Formatter(FormatConfig("{q}|{input}|", "{a}"), tokenizer, 64)
    pieces = formatter.pieces({"q": "x", "input": None, "a": "é".encode()})
    assert [piece.text for piece in pieces] == ["x||", "é"]


def test_a_bad_item_is_one_bad_item(tokenizer, tmp_path):
    good = json.dumps({"q": "x", "a": "y"})
    lines = [good, "not json", '{"q": "\\ud83d", "a": "y"}', '{"q": 1}', "[]", good]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    problems = Problems()
    formatter = Formatter(FormatConfig("{q}", "{a}"), tokenizer, 64)
    items = list(formatter.items(read_rows(tmp_path / "x.jsonl"), problems))
    assert [place.rpartition(" ")[2] for place, _ in items] == ["1", "6"]
    assert sum(problems.counts.values()) == 4 and len(problems.counts) == 4
