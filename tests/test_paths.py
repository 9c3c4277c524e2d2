from pathlib import Path

import pytest

from btx_jax.errors import UserError
from btx_jax.paths import expand, refuse_links_out


def test_a_path_is_read_as_a_shell_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("BTX_TEST_DIR", str(tmp_path))
    assert (
        expand("$BTX_TEST_DIR/a*.txt", "k")
        == expand("${BTX_TEST_DIR}/a*.txt", "k")
        == f"{tmp_path}/a*.txt"
    )
    assert expand("~/run", "k") == str(Path.home() / "run")
    assert expand("tfds:c4/en:3.0.1", "k") == "tfds:c4/en:3.0.1"
    (tmp_path / "cost in $US").touch()
    assert expand(f"{tmp_path}/cost in $US", "k").endswith("$US"), "a file of that very name"
    with pytest.raises(
        UserError, match=r"--workdir='\$NO_SUCH/x': the environment variable NO_SUCH is not set"
    ):
        expand("$NO_SUCH/x", "--workdir")
    monkeypatch.setenv("BUCKET", "gs://b")
    assert expand("$BUCKET/run", "k") == "gs://b/run"


def hub(tmp_path):
    """A snapshot in huggingface_hub's layout: links to blobs beside it."""
    repository = tmp_path / "hub" / "models--org--name"
    snapshot = repository / "snapshots" / ("1" * 40)
    (snapshot / "onnx").mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name, blob in (("config.json", "a" * 40), ("onnx/model.safetensors", "b" * 64)):
        (repository / "blobs" / blob).write_text(name)
        up = "../" * (name.count("/") + 2)
        (snapshot / name).symlink_to(f"{up}blobs/{blob}")
    return snapshot


def test_links_to_a_hub_s_blobs_and_inside_a_directory_are_followed(tmp_path):
    snapshot = hub(tmp_path)
    refuse_links_out(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    refuse_links_out(tmp_path / "link")
    download = tmp_path / "download"  # with the older layout of --local-dir
    download.mkdir()
    (download / "model.safetensors").symlink_to((snapshot / "config.json").resolve())
    (download / "own.json").write_text("{}")
    (download / "other.json").symlink_to("own.json")
    refuse_links_out(download)


@pytest.mark.parametrize(
    "target",
    ["/etc/passwd", "../secret", "../..", "/nowhere", "../blobs/" + "a" * 40,
     "../models--x/blobs/passwd", "../models--x/blobs/../" + "a" * 40],
)  # fmt: skip
@pytest.mark.parametrize("name", ["tokenizer_config.json", "deeper/chat_template.jinja"])
def test_other_links_out_are_refused(tmp_path, target, name):
    source = tmp_path / "source"
    (source / "deeper").mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir(parents=True)
    (source / name).symlink_to(target if target[0] == "/" else f"{source}/{target}")
    with pytest.raises(
        UserError, match=f"{name}: a link to .*, outside the directory; replace it with a copy"
    ):
        refuse_links_out(source)
