"""Uploads to a local server of the Hub's API."""

from pathlib import Path

import pytest

from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.commands import adapter, convert
from btx_jax.commands.push import push
from btx_jax.errors import UserError
from tests.hub_process import GOLDEN, LLAMA, MIXED, files_of, run_cli
from tests.hub_server import GOOD, READ


@pytest.fixture
def export(server):
    convert.run(str(MIXED / "a"), "run")
    convert.run("run", "export")
    return Path("export")


def test_what_is_pushed_comes_back_byte_for_byte(server, export, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GOOD)
    (export / ".cache").mkdir()
    (export / "notes.pkl").write_bytes(b"")
    line = push("export", "me/model", is_private=True, message="First")
    repo = server.repos["model", "me/model"]
    assert repo.private and f"/me/model/commit/{repo.refs['main']} (" in line
    assert "left out: .cache, notes.pkl" in line
    (export / "notes.pkl").unlink()
    back = find_checkpoint("me/model").path
    assert files_of(back) == files_of(export) and "README.md" in files_of(back)
    push("export", "me/model", revision="v2")
    assert find_checkpoint("me/model@v2")


def test_a_lora_is_pushed_with_a_card_that_names_its_base(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", GOOD)
    server.add("org/base", LLAMA)
    adapter.import_peft(str(GOLDEN / "peft"), "org/base", "imported")
    adapter.export("imported", "lora", "peft")
    push("lora", "me/lora")
    commit = server.repos["model", "me/lora"].refs["main"]
    files = server.repos["model", "me/lora"].commits[commit]
    assert b"base_model: org/base" in files["README.md"]
    adapter.import_peft("me/lora", "org/base", "again")
    with pytest.raises(UserError, match=r"adapter export imported PEFT_DIR --format=peft"):
        push("imported", "me/lora")


def test_what_cannot_be_pushed_is_told(server, export, monkeypatch):
    def told(*arguments, **options):
        with pytest.raises(UserError) as caught:
            push(*arguments, **options)
        return str(caught.value)

    assert "btx convert run HF_DIR" in told("run", "me/model")
    assert "write org/name" in told("export", "me/model@v2")
    assert "hf auth login" in told("export", "me/model")
    monkeypatch.setenv("HF_TOKEN", READ)
    assert "your token lacks permission for me/model" in told("export", "me/model")
    monkeypatch.setenv("HF_TOKEN", GOOD)
    assert "your token lacks permission for org/model" in told("export", "org/model")
    server.add("me/public", {})
    assert "me/public exists and is public" in told("export", "me/public", is_private=True)
    assert not [r for r in server.log if "/commit/" in r.path or "/preupload/" in r.path]
    (export / "config.json").write_text((export / "config.json").read_text() + " ")
    assert "is damaged (sha256, SHA256SUMS)" in told("export", "me/model")
    assert ("model", "me/model") not in server.repos


def test_push_from_the_command_line(server, export, tmp_path):
    done = run_cli(server, tmp_path, "push", "here/export", "me/m", "--private", HF_TOKEN=GOOD)
    assert done.stdout.startswith(f"wrote {server.url}/me/m/commit/"), done.stderr
    assert not done.stderr
