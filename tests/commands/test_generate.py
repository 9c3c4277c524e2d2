"""`btx generate`: what cannot be asked of a model."""

import pytest

from btx_jax.cli.program import run as btx
from btx_jax.data.tokenizers import load_tokenizer
from tests.stages.test_evaluate import DENSE, checkpoint


def test_a_model_without_a_chat_template_is_told_with_the_cure(tmp_path, tokenizer_file, capsys):
    seed = checkpoint(tmp_path / "seed", DENSE, 1, load_tokenizer(tokenizer_file))
    with pytest.raises(SystemExit):
        btx(["generate", seed, "--chat", "--prompt=hello"])
    assert capsys.readouterr().err.strip() == (
        f"btx_jax: error: {tmp_path}/seed/tokenizer: the tokenizer has no chat template"
        " (chat_template.jinja); a model not trained on chats has none: leave --chat out, name"
        " its chat version, or add the template"
    )
