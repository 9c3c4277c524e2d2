"""Results of a conversion, and what it preserves; the formats themselves are tested in
test_huggingface.py."""

import pytest

from btx_jax.checkpoints.checkpoint import digest, find_checkpoint, load_params
from btx_jax.checkpoints.converting import convert
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import UserError
from tests.stages.test_evaluate import MIXTURE, checkpoint


def test_there_and_back_is_the_same_model(tmp_path, tokenizer_file):
    source = find_checkpoint(checkpoint(tmp_path / "a", MIXTURE, 1, load_tokenizer(tokenizer_file)))
    there = convert(source, tmp_path / "there")
    exported = find_checkpoint(tmp_path / "there")
    assert exported.is_huggingface
    assert convert(exported, tmp_path / "back") == there
    back = find_checkpoint(tmp_path / "back")
    assert digest(load_params(back)) == digest(load_params(source))
    assert back.metadata.history == source.metadata.history
    with pytest.raises(UserError, match="back"):
        convert(exported, tmp_path / "back")  # unchanged
