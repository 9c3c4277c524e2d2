import gzip
import json

import pytest

from btx_jax.data import corpora, demo
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import UserError


def documents(file):
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        return [json.loads(line)["text"] for line in opened]


@pytest.fixture
def small(monkeypatch):
    """Short corpora of words, in which every third document occurs twice."""

    def texts(domain):
        for number in range(300):
            i = number - number % 3 // 2
            yield f"{domain} {i}: " + " ".join(f"{domain}{j}" for j in range(i % 40))

    monkeypatch.setattr(corpora, "texts", texts)
    monkeypatch.setattr(corpora, "VOCAB_SIZE", 320)


@pytest.mark.usefixtures("small")
def test_every_document_stands_once_in_one_part(tmp_path, capsys):
    corpora.write(tmp_path / "corpora")
    for domain, shares in corpora.SHARES.items():
        parts = [
            documents(tmp_path / "corpora" / part / f"{domain}.jsonl.gz") for part in corpora.PARTS
        ]
        found = [text for part in parts for text in part]
        assert len(set(found)) == len(found)
        assert set(found) == set(corpora.texts(domain))
        for part, share in zip(parts, shares, strict=True):
            assert len(part) / len(found) == pytest.approx(share, abs=0.1)
    assert "seed/math.jsonl.gz: " in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "corpora" / corpora.TOKENIZER)
    assert tokenizer.decode(tokenizer.encode_prompt("math 7: math1")) == "math 7: math1"


@pytest.mark.usefixtures("small")
def test_what_is_there_is_not_overwritten(tmp_path):
    with pytest.raises(UserError, match="exists"):
        corpora.write(tmp_path)


def test_parts_have_all_documents_by_their_shares():
    for shares in corpora.SHARES.values():
        assert sum(shares) == pytest.approx(1)


def test_a_domain_is_the_demos_and_what_the_data_directory_adds(tmp_path, monkeypatch):
    monkeypatch.setitem(demo.CORPORA, "prose", lambda: iter(["help"]))
    monkeypatch.setattr(corpora, "DOCSTRINGS", ("json",))
    monkeypatch.delenv("BTX_DATA_DIR", raising=False)
    without = list(corpora.texts("prose"))
    assert without[0] == "help" and any("JSON" in text for text in without[1:])
    monkeypatch.setenv("BTX_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"BTX_DATA_DIR: .*prose_standardebooks.* does not exist"):
        list(corpora.texts("prose"))
    (tmp_path / "text").mkdir()
    with gzip.open(tmp_path / "text" / "prose_standardebooks.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "a chapter"}) + "\n")
    assert list(corpora.texts("prose")) == [*without, "a chapter"]


def test_no_library_is_in_two_domains():
    assert not set(corpora.CODE) & {"numpy", *corpora.DOCSTRINGS}
