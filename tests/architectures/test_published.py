"""Published config.json files (published.json, reduced to what a model depends on): parameter
counts as stated by their makers, and the same model after writing and reading."""

import json
from pathlib import Path

import pytest

from btx_jax.architectures.registry import family_for
from btx_jax.checkpoints.huggingface_config import config_from_model, kept_config, model_from_config
from btx_jax.models.llama import parameter_counts
from btx_jax.presets.recipes import MODELS

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
# Billions of parameters: (total, active per token).
SIZES = {
    "qwen2.5-0.5b": (0.494, 0.494),
    "qwen2.5-7b-yarn": (7.616, 7.616),
    "qwen3-8b": (8.191, 8.191),
    "qwen3-30b-a3b": (30.532, 3.353),
    "qwen1.5-moe": (14.316, 2.689),
    "phi3-mini-4k": (3.821, 3.821),
    "phi3.5": (3.821, 3.821),
    "phi4-mini": (3.836, 3.836),
    "phi4": (14.660, 14.660),
    "mistral-0.1": (7.242, 7.242),
    "deepseek-moe-16b": (16.376, 2.829),
    "internlm3": (8.804, 8.804),
    "olmo2-7b": (7.299, 7.299),
    "gemma3-4b": (3.880, 3.880),
    "granite3-8b": (8.171, 8.171),
    "smollm3-3b": (3.075, 3.075),
    "mixtral-8x22b": (140.621, 39.152),
    "flex-olmo-7x7b": (33.271, 24.614),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_models_have_their_size_and_come_back_as_they_are(name):
    config = PUBLISHED[name]
    model = model_from_config(config, name)
    total, active = parameter_counts(model)
    assert (round(total / 1e9, 3), round(active / 1e9, 3)) == SIZES[name]
    family = family_for(model, config["model_type"])
    assert family.model_type == config["model_type"] and family.filled(model) == model
    written = config_from_model(model, family, "bfloat16", kept_config(config))
    assert model_from_config(written, name) == model
    for key in ("bos_token_id", "eos_token_id", "initializer_range"):
        assert written.get(key) == config.get(key)


def test_presets_are_what_was_published():
    assert MODELS["qwen3_8b"] == model_from_config(PUBLISHED["qwen3-8b"], "qwen3-8b")
    for ours, theirs in (
        ("olmo2_7b", "olmo2-7b"),
        ("gemma3_4b", "gemma3-4b"),
        ("granite3_8b", "granite3-8b"),
    ):
        assert MODELS[ours] == model_from_config(PUBLISHED[theirs], theirs)
    assert MODELS["mistral_7b"] == model_from_config(PUBLISHED["mistral-0.1"], "mistral-0.1")
