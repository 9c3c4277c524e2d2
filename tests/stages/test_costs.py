"""The training costs recorded in a run's history."""

import pytest

from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.costs.model import train_flops
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.models.leaves import is_feed_forward
from tests.stages.test_evaluate import DENSE, checkpoint

pytestmark = pytest.mark.usefixtures("one_device_only")


def test_no_gradient_of_what_is_frozen_is_counted(training, run, tmp_path, tokenizer_file):
    seed = checkpoint(tmp_path / "seed", DENSE, 1, load_tokenizer(tokenizer_file))
    run(training(seed, 2, frozen="shared", eval_every=0), tmp_path / "branch")
    history = find_checkpoint(tmp_path / "branch").metadata.history
    (own,) = (one for name, one in history.items() if name != "run1")
    needed = train_flops(DENSE, own.tokens, is_feed_forward)
    assert own.flops == pytest.approx(needed) and needed < 0.9 * train_flops(DENSE, own.tokens)
