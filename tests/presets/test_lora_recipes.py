import pytest

from btx_jax.errors import ConfigError
from btx_jax.presets import lora_recipes


def test_each_task_starts_from_the_one_before_and_all_are_tried():
    pipeline = lora_recipes.continual("piqa,arc_easy").pipeline
    assert pipeline["piqa"].config.init == "$BTX_DATA_DIR/seed"
    assert pipeline["arc_easy"].config.init == "@piqa"
    assert pipeline["arc_easy"].needs == ("piqa",)
    tried = pipeline["evaluate"].config.evaluate.tasks
    shares = {pipeline[task].config.data.heldout_fraction for task in tried} | {
        task.heldout_fraction for task in tried.values()
    }
    assert set(tried) == {"piqa", "arc_easy"}
    assert shares == {lora_recipes.HELDOUT}, "what is tried was held out of training"


@pytest.mark.parametrize(
    ("recipe", "task", "told"),
    [
        (lora_recipes.mola, "arc_eazy", "did you mean 'arc_easy'"),
        (lora_recipes.continual, "piqa,gsm8k", "no task 'gsm8k'"),
    ],
)
def test_an_unknown_task_is_told(recipe, task, told):
    with pytest.raises(ConfigError, match=told):
        recipe(task)
