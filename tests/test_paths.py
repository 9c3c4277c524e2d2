from pathlib import Path

import pytest

from btx_jax.errors import UserError
from btx_jax.paths import expand


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
    with pytest.raises(
        UserError, match=r"--workdir='gs://b/run': gs:// is not read; mount the bucket"
    ):
        expand("gs://b/run", "--workdir")
