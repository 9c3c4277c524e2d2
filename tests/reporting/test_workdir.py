import dataclasses

import pytest

from btx_jax.config import Config
from btx_jax.config_dict import from_config_dict
from btx_jax.errors import UserError
from btx_jax.recipes import expert
from btx_jax.reporting.workdir import claim


@pytest.mark.parametrize("result", ["metrics.jsonl", "expert_math/checkpoints/10/about/metadata"])
def test_a_directory_is_a_configs_own_once_it_holds_more_than_that(tmp_path, result):
    config: Config = from_config_dict(expert("math", "tiny"))
    other = dataclasses.replace(config, rng_seed=1)
    claim(tmp_path, config)
    for file in ("tokenizer/tokenizer.model", "expert_math/config.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    claim(tmp_path, other)  # the run before did not get far: nothing would be lost
    (tmp_path / result).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / result).write_text("")
    claim(tmp_path, other)
    with pytest.raises(UserError, match="another config: rng_seed: 1 -> 0; choose another --workdir or undo the change"):
        claim(tmp_path, config)
