"""The export stage: a checkpoint as a Hugging Face directory."""

import pytest

from btx_jax import stages
from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params
from btx_jax.config.config import Config, ExportConfig
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import ConfigError
from tests.stages.test_evaluate import MIXTURE, checkpoint


@pytest.fixture
def mixture(tmp_path, tokenizer_file):
    checkpoint(tmp_path / "mixture", MIXTURE, 1, load_tokenizer(tokenizer_file))
    return tmp_path / "mixture"


@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_the_model_is_the_same(mixture, tmp_path, dtype):
    config = Config("export", export=ExportConfig(str(mixture), dtype))
    stages.run(config, tmp_path / "export")
    exported = load_params(find_checkpoint(tmp_path / "export/model"))
    same = digest(exported) == digest(load_params(find_checkpoint(mixture)))
    assert same == (not dtype)
    assert (tmp_path / "export/model/tokenizer.model").exists()


def test_what_a_kill_left_is_written_anew(mixture, tmp_path, run):
    config = Config("export", export=ExportConfig(str(mixture)))
    run(config, tmp_path / "export")
    (tmp_path / "export/done.json").unlink()
    weights = tmp_path / "export/model/model.safetensors"
    weights.write_bytes(b"cut")
    run(config, tmp_path / "export")
    assert digest(load_params(find_checkpoint(tmp_path / "export/model"))) == digest(
        load_params(find_checkpoint(mixture))
    )
    assert run(config, tmp_path / "export") == [f"{tmp_path / 'export'}: already finished"]


def test_what_cannot_be_exported_is_refused_before_anything_is_written(mixture, tmp_path):
    stages.run(Config("export", export=ExportConfig(str(mixture))), tmp_path / "export")
    for source, told in (
        (tmp_path / "nowhere", "config.export.model: .*nowhere does not exist"),
        (tmp_path / "export/model", "is already a Hugging Face directory"),
    ):
        with pytest.raises(ConfigError, match=told):
            stages.run(Config("export", export=ExportConfig(str(source))), tmp_path / "again")
        assert not (tmp_path / "again").exists()
