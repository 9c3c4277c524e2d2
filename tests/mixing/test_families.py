"""Mixtures of every family by a recipe: in the class that is their home, or refused in one line."""

import json
import shutil

import numpy as np
import pytest

from btx_jax.architectures.registry import known_families
from btx_jax.architectures.tensors import TensorId
from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params, open_reader
from btx_jax.commands import convert, experts
from btx_jax.commands import mix as mix_recipe
from btx_jax.config.config import Config, MeshConfig, MixConfig
from btx_jax.errors import Mistakes, UserError
from btx_jax.stages import mix as mix_stage
from tests.architectures import goldens
from tests.architectures.exports import (
    dense_names,
    load,
    our_logits,
    our_tokens,
    write_mixture,
    write_variant,
)
from tests.conftest import ROOT

LAYOUTS = ROOT / "tests" / "mixing" / "golden_layouts" / "sources"
BIASED = ("ernie", "internlm3", "llama_bias")  # their feed-forwards too; no mixture has such
FAST = ("gemma2", "glm4")  # of the homeless
HOMELESS = {
    "phi4_mini": "heads of which 0.75 rotates",
    "gemma": "norms of kind rms_plus_one; the activation gelu_tanh; embed_scale=4.89898",
    "gemma2": "norms before and after its blocks; the activation gelu_tanh; embed_scale=4.89898;"
    " attention_scale=0.408248; attention_cap=2; logits_cap=3; a window in layers 0, 2 alone",
    "gemma3": "a window in layers 0, 1, 3 alone;"
    " a RoPE base of 10000 in layers with a window alone",
    "exaone4": "norms after its blocks; attention with norms on queries and keys; a window in layers"
    " 0, 2, 3 alone; layers without RoPE (1, 4)",
    "exaone4_full": "norms after its blocks; attention with norms on queries and keys",
    "glm": "a bias on q; a bias on k; a bias on v; RoPE of neighbours; heads of which 0.5 rotates",
    "glm4": "norms before and after its blocks; RoPE of neighbours; heads of which 0.5 rotates",
    "vaultgemma": "norms of kind rms_plus_one; the activation gelu_tanh; embed_scale=4.89898;"
    " attention_scale=0.408248; attention_cap=2; logits_cap=3; a window in layers 0, 2 alone",
    "ministral3": "queries that grow with their position",
    "olmo3": "a window of 100; a RoPE base of 500000 in layers with a window alone",
}
FOLDED = ("olmo",)  # their home lacks these norms
# One for every home, and for what its mixtures must keep; the others in slow runs.
KINDS = (
    "llama_bias",
    "ernie",
    "granite",
    "hunyuan",
    "olmo",
    "olmo2",
    "phi35",
    "qwen2",
    "qwen3",
    "smollm3",
)
AT_HOME = [name for name in dense_names() if name not in (*BIASED, *HOMELESS, *FOLDED)]


def kind(directory):
    return json.loads((directory / "config.json").read_text())["model_type"]


def dense_logits(path, tokens):
    return our_logits(*load(path), tokens)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in KINDS else pytest.mark.slow)
        for n in (*AT_HOME, *BIASED, *FOLDED)
    ],
)
def test_four_equal_experts_compute_what_the_dense_model_computes(name, tmp_path):
    """In their home class, whatever the router chooses, after reading back Hugging Face's files;
    within the context of a home without windows."""
    without = ("mlp", "self_attn") if name in BIASED else ()
    dense = write_variant(name, tmp_path / "dense", without=without)
    dtype = "float32" if name in FOLDED else ""
    made = write_mixture([dense] * 4, tmp_path / "mixture", dtype=dtype)
    assert kind(made) == known_families()[kind(tmp_path / "dense")].home
    model, params = load(made)
    assert model.moe.experts == (4,) * model.layers and model.moe.k == 2
    tokens = goldens.expected(name)["tokens"]
    wanted = our_logits(*load(tmp_path / "dense"), tokens)
    ours = our_logits(model, params, tokens)
    seen = goldens.positions(tokens.shape[1]) < model.context
    np.testing.assert_allclose(ours[seen], wanted[seen], atol=goldens.TOLERANCE, rtol=0)


def test_a_home_without_windows_goes_as_far_as_the_window(tmp_path):
    """Beyond the window it would compute something else."""
    source = str(goldens.FOLDER / "olmo3_plain")
    model = find_checkpoint(write_mixture([source] * 2, tmp_path / "mixture")).metadata.model
    assert (model.context, model.window) == (100, 0)


@pytest.mark.parametrize("base", ["copy", "average"])
@pytest.mark.parametrize("name", AT_HOME)
def test_three_different_experts_are_verified_and_read_back(name, base, tmp_path):
    sources = [write_variant(name, tmp_path / f"{i}", i, 0.3) for i in range(3)]
    made = write_mixture(sources, tmp_path / "mixture", base=base)
    mixed = open_reader(find_checkpoint(made))
    dense = [open_reader(find_checkpoint(source)) for source in sources]
    seen = set()
    for tensor in mixed.slots:
        found = mixed.read(tensor)
        seen.add(tensor.part)
        if tensor.expert is not None:
            wanted = dense[tensor.expert].read(tensor.of_dense())
            assert found.tobytes() == wanted.tobytes(), tensor
        elif tensor.is_shared:  # required by Qwen2-MoE
            assert not found.any()
        elif not tensor.is_router and base == "copy":
            assert found.tobytes() == dense[0].read(tensor).tobytes(), tensor
        elif not tensor.is_router:
            mean = np.mean([reader.read(tensor).astype(np.float64) for reader in dense], axis=0)
            np.testing.assert_allclose(
                found.astype(np.float64), mean, rtol=2.0**-8, atol=1e-30, err_msg=str(tensor)
            )
    parts = {tensor.part for tensor in dense[0].slots}
    assert seen - {part for part in seen if part.startswith("shared_expert/")} == {
        *parts,
        "ffn/router",
    }


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in HOMELESS]
)
def test_a_family_without_a_home_mixes_into_our_own_format_alone(name, tmp_path):
    """There it computes what the dense model computes, as the experts are equal."""
    sources = [str(goldens.FOLDER / name)] * 2
    with pytest.raises(UserError) as caught:
        write_mixture(sources, tmp_path / "refused")
    told = str(caught.value)
    assert "ForCausalLM does not have what this mixture needs: " in told and "\n" not in told
    assert HOMELESS[name] in told
    assert "write it in our own format: --format=btx_jax" in told
    assert [path.name for path in tmp_path.iterdir()] == ["refused.yml"]
    recipe = tmp_path / "refused.yml"
    mix_recipe.run(str(recipe), str(tmp_path / "ours"), verify=True, output_format="btx_jax")
    found = find_checkpoint(tmp_path / "ours")
    model, params = found.metadata.model, load_params(found)
    dense = find_checkpoint(goldens.FOLDER / name).metadata.model
    assert not found.is_huggingface and model.dense() == dense
    saved = goldens.expected(name)
    ours = our_logits(model, params, saved["tokens"])
    np.testing.assert_allclose(ours, saved["logits"], atol=goldens.TOLERANCE, rtol=0)
    assert our_tokens(model, params, saved) == [ids for _, ids in goldens.prompts(saved)]
    with pytest.raises(UserError) as caught:
        convert.run(str(tmp_path / "ours"), str(tmp_path / "exported"))
    assert HOMELESS[name] in str(caught.value) and not (tmp_path / "exported").exists()


@pytest.mark.parametrize("name", BIASED)
def test_biases_in_the_feed_forwards_are_refused_in_one_line(name, tmp_path):
    with pytest.raises(UserError) as caught:
        write_mixture([str(goldens.FOLDER / name)] * 2, tmp_path / "refused")
    assert (
        f"{name}: biases: gate, up, down in a mixture's experts cannot have biases; leave them out"
    ) in str(caught.value)
    assert "\n" not in str(caught.value) and not (tmp_path / "refused").exists()


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize("changes", [{}, {"architecture": "qwen moe"}], ids=["routed", "shared"])
def test_layer_norms_are_folded_when_a_mixture_becomes_hugging_faces(
    name, changes, tmp_path, caplog
):
    """By the recipe directly, and by exporting its result in our own format."""
    sources = [write_variant(name, tmp_path / f"{i}", i, 0.3) for i in range(3)]
    if changes:
        changes = changes | {"shared_experts": [{"source_model": sources[0]}]}
    settings = {"base": "average", "dtype": "float32"} | changes
    ours = write_mixture(sources, tmp_path / "ours", output_format="btx_jax", **settings)
    convert.run(str(ours), str(tmp_path / "exported"))
    assert "LayerNorms" not in caplog.text
    made = write_mixture(sources, tmp_path / "made", **settings)
    assert "has no LayerNorms, so they are folded into the weights" in caplog.text
    tokens = goldens.expected(name)["tokens"]
    model, params = load(ours)
    assert model.norm == "layer"
    wanted = our_logits(model, params, tokens)
    for written in (tmp_path / "exported", made):
        model, params = load(written)
        assert model.norm == "rms" and not kind(written).startswith("olmo")
        np.testing.assert_allclose(our_logits(model, params, tokens), wanted, atol=1e-4)


def test_biases_of_attention_have_a_home_though_heads_have_a_size_of_their_own(tmp_path):
    dense = write_variant("llama_bias", tmp_path / "dense", without=("mlp",))
    made = write_mixture([dense] * 3, tmp_path / "mixture")  # heads of 12, 4 in a width of 24
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == "granitemoe" and config["head_dim"] == 12
    tokens = goldens.expected("llama_bias")["tokens"]
    np.testing.assert_allclose(
        dense_logits(made, tokens), dense_logits(tmp_path / "dense", tokens), atol=1e-4
    )


def mixed(tmp_path, family="llama", name="out", *, output_format="", **changes):
    sources = [str(LAYOUTS / family / source) for source in ("base", "a", "b")]
    made = write_mixture(sources, tmp_path / name, output_format=output_format, **changes)
    return open_reader(find_checkpoint(made))


def refused(tmp_path, **changes):
    with pytest.raises(UserError) as caught:
        mixed(tmp_path, **changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    return str(caught.value)


SHARED = [{"source_model": str(LAYOUTS / "llama" / "a"), "residual_scale": 0.5}]
PROMPTED = [SHARED[0] | {"positive_prompts": ["what is 2+2?"]}]


def test_a_shared_expert_where_the_class_has_none_is_refused(tmp_path):
    assert (
        "recipe.architecture='mixtral': Hugging Face's MixtralForCausalLM does not have what this"
        " mixture needs: a shared expert; say architecture: deepseek or qwen2_moe"
    ) in refused(tmp_path, architecture="mixtral", shared_experts=SHARED)
    told = refused(tmp_path, architecture="deepseek", shared_experts=PROMPTED)
    assert "a gate of the shared expert, for its prompts; say architecture: qwen2_moe" in told
    told = refused(tmp_path, architecture="qwen3", shared_experts=SHARED)
    assert "Qwen3MoeForCausalLM does not have" in told and "a shared expert" in told
    own = [{"source_model": str(LAYOUTS / "qwen3" / "a")}]
    told = refused(tmp_path, family="qwen3", shared_experts=own)
    assert "a shared expert; write it in our own format: --format=btx_jax" in told


def test_a_shared_expert_whose_gate_gets_no_row_is_refused(tmp_path):
    prompted = [
        {"source_model": str(LAYOUTS / "llama" / source), "positive_prompts": [source]}
        for source in ("a", "b")
    ]
    told = refused(
        tmp_path,
        experts=prompted,
        gate_mode="hidden",
        architecture="qwen",
        shared_experts=SHARED,
    )
    assert "or give it positive_prompts, which gate_mode='hidden' reads for its gate" in told
    assert told.endswith("say architecture: deepseek")


@pytest.mark.parametrize("output_format", ["huggingface", "btx_jax"])
def test_a_shared_expert_of_a_branch_train_mix_is_half_open(tmp_path, output_format):
    found = mixed(
        tmp_path,
        base="average",
        gate_mode="normal",
        architecture="qwen moe",
        shared_experts=SHARED,
        output_format=output_format,
    )
    moe = found.model.moe
    assert (moe.shared_d_ff, moe.shared_gate, found.model.biases) == (24, True, ("q", "k", "v"))
    assert not found.read(TensorId("shared_expert/router", 1)).any()
    assert not found.read(TensorId("attention/key_bias", 1)).any()
    source = open_reader(find_checkpoint(LAYOUTS / "llama" / "a"))
    for part, scale in (("up", 1), ("down", 0.5)):
        ours = found.read(TensorId(f"shared_expert/{part}", 1))
        wanted = source.read(TensorId(f"ffn/{part}", 1)).astype(np.float32) * scale
        np.testing.assert_array_equal(ours.astype(np.float32), wanted)
    read = find_checkpoint(tmp_path / "out")
    assert read.metadata.huggingface["model_type"] == "qwen2_moe"


def test_a_mixture_of_ours_is_exported_as_the_class_that_its_recipe_named(tmp_path):
    mixed(tmp_path, architecture="deepseek", output_format="btx_jax")
    convert.run(str(tmp_path / "out"), str(tmp_path / "exported"))
    assert kind(tmp_path / "exported") == "deepseek"


def test_a_norm_on_queries_has_a_shared_expert_in_our_own_format(tmp_path):
    own = [{"source_model": str(LAYOUTS / "qwen3" / "a")}]
    found = mixed(tmp_path, "qwen3", shared_experts=own, output_format="btx_jax")
    assert (found.model.moe.shared_d_ff, found.model.moe.shared_gate) == (24, False)


def test_models_of_two_families_are_refused_with_the_names_of_both(tmp_path):
    paths = [str(LAYOUTS / family / "base") for family in ("llama", "qwen2")]
    with pytest.raises(UserError) as caught:
        write_mixture(paths, tmp_path / "out")
    told = str(caught.value)
    assert "qwen2/base (qwen2) is a different kind of model from" in told
    assert "llama/base (llama): " in told and "biases: () against ('q', 'k', 'v')" in told
    assert "\n" not in told and not (tmp_path / "out").exists()


def windowed(directory, name, **config):
    shutil.copytree(goldens.FOLDER / name, directory)
    said = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(said))
    return str(directory)


def test_equal_windows_are_kept_and_unequal_ones_cut_the_context(tmp_path, caplog):
    """In recipes, in the mix stage's plan and in its result, whatever the contexts are."""
    a = windowed(tmp_path / "a", "mistral_window")
    b = windowed(tmp_path / "b", "mistral_window", max_position_embeddings=512)
    c = windowed(tmp_path / "c", "mistral_window", sliding_window=64)
    for name, sources, wanted in (
        ("equal", (a, b), (512, 100)),
        ("unequal", (a, c), (64, 0)),
        ("unequal_base", (c, a), (64, 0)),
    ):
        caplog.clear()
        made = write_mixture(list(sources), tmp_path / name)
        model = find_checkpoint(made).metadata.model
        assert (model.context, model.window) == wanted, name
        assert f"the context is {wanted[0]}, from" in caplog.text
        mistakes = Mistakes()
        config = Config("mix", mix=MixConfig(sources), mesh=MeshConfig())
        planned = mix_stage.check(config, {}, mistakes)
        assert not mistakes.found and (planned.context, planned.window) == wanted, name


def test_experts_come_to_and_leave_a_mixture_with_a_shared_one(tmp_path):
    a, b = (str(LAYOUTS / "qwen2" / name) for name in "ab")
    shared = [{"source_model": b, "positive_prompts": ["x"]}]
    before = mixed(tmp_path, "qwen2", shared_experts=shared)
    experts.add(str(tmp_path / "out"), a, str(tmp_path / "more"))
    experts.drop(str(tmp_path / "more"), 3, str(tmp_path / "again"))
    more, again = (open_reader(find_checkpoint(tmp_path / name)) for name in ("more", "again"))
    assert more.model.moe.experts == (4, 4) and again.model == before.model
    for tensor in before.slots:
        assert again.read(tensor).tobytes() == before.read(tensor).tobytes(), tensor


def test_a_mixture_with_zeros_in_it_comes_back_from_our_own_format(tmp_path):
    """Zero tensors are also written there."""
    source = write_mixture([str(LAYOUTS / "qwen2" / "a")] * 2, tmp_path / "mixture")
    convert.run(str(source), str(tmp_path / "ours"))
    convert.run(str(tmp_path / "ours"), str(tmp_path / "back"))
    before, after = (open_reader(find_checkpoint(path)) for path in (source, tmp_path / "back"))
    assert not before.read(TensorId("shared_expert/up", 0)).any()
    for tensor in before.slots:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
