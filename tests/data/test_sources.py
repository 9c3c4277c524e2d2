import pytest

from btx_jax.data.sources import Source, expand_files, parse_domains, read_json_lines
from btx_jax.errors import UserError


def test_a_word_is_a_domain_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    domains = {"math": "m.txt", "code": "c.txt"}
    with pytest.raises(UserError, match="k: 'cod' is neither a domain nor a file; did you mean"):
        parse_domains("math,cod:2", domains, "k")
    (tmp_path / "cod").write_text("a file")
    assert [d.name for d in parse_domains("math,cod:2", domains, "k")] == ["math", "text"]
    assert [d.name for d in parse_domains("cod", {}, "k")] == ["text"]


def test_a_directory_is_told_from_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"k: '.*' is a directory; name its files, such as"):
        expand_files(Source(str(tmp_path) + "/"), "k")
    with pytest.raises(UserError, match="k: no file matches"):
        expand_files(Source(str(tmp_path / "*")), "k")


def test_test_sets_are_read_from_every_kind_with_fields_and_all_or_not(tmp_path):
    file = tmp_path / "x"
    for ending, content in (
        ("jsonl", b'\xef\xbb\xbf{"q": "x"}\n{"q": "y"}\n'),
        ("json", b'[{"q": "x"},\n {"q": "y"}]'),
        ("csv", b"q\nx\ny\n"),
    ):
        file = tmp_path / f"x.{ending}"
        file.write_bytes(content)
        assert read_json_lines(str(file), "k") == [{"q": "x"}, {"q": "y"}]
        assert read_json_lines(str(file), "k", 1) == [{"q": "x"}]
    for name, content, message in (
        ("x.jsonl", b'{"q": "x"}\n{"q": "\\ud800"}\n', "k: .*line 2: not valid Unicode"),
        ("x.jsonl", b'{"q": "x"}\n{"q": \n', "k: .*line 2: line skipped: not JSON"),
        ("x.jsonl", b'{"q": "\xff"}', "k: .*line 1: .*invalid UTF-8"),
        ("x.txt", b"text", "is plain text; give it as JSON lines"),
        ("x.zip", b"PK", "unpack it"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_json_lines(str(tmp_path / name), "k")
