"""Mixing by a recipe, end to end, compared with mergekit-moe's output and with mixing by hand."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from btx_jax.architectures.tensors import EMBEDDING, HEAD, TensorId
from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params, open_reader
from btx_jax.checkpoints.checksums import SUMS
from btx_jax.checkpoints.safetensors_files import CHECKSUMS
from btx_jax.checkpoints.training_state import (
    CheckpointMetadata,
    Checkpoints,
    TrainingRun,
    elsewhere,
)
from btx_jax.commands import convert, experts
from btx_jax.commands import mix as mix_recipe
from btx_jax.config.config import CheckpointConfig, ComputeConfig
from btx_jax.config.merges import MERGE_SETTINGS
from btx_jax.config.model_config import MoEConfig
from btx_jax.errors import UserError
from btx_jax.mixing.merge import MERGES, ulp
from btx_jax.mixing.mix import mix_params
from btx_jax.mixing.recipe_file import expert_sources
from btx_jax.mixing.states import layer_states
from btx_jax.models.llama import Llama, logits
from tests.conftest import ROOT

TENSORS = {str(tensor): tensor for tensor in (EMBEDDING, HEAD)}
GOLDEN = ROOT / "tests" / "mixing" / "golden"


@pytest.fixture(autouse=True)
def _in_golden(monkeypatch):
    monkeypatch.chdir(GOLDEN)


def mix(tmp_path, name="out", *, output_format="", **changes):
    recipe = json.loads((GOLDEN / "recipe.yml").read_text()) | changes
    path = tmp_path / f"{name}.yml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in recipe.items() if value is not None})
    )
    mix_recipe.run(str(path), str(tmp_path / name), verify=True, output_format=output_format)
    return open_reader(find_checkpoint(tmp_path / name))


def sources():
    return {name: open_reader(find_checkpoint(GOLDEN / name)) for name in ("base", "a", "b", "c")}


def gates(reader):
    return np.stack([reader.read(tensor) for tensor in reader.slots if tensor.is_router])


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden", "hidden_avg"])
def test_gates_are_those_of_mergekit(tmp_path, mode):
    ours, theirs = gates(mix(tmp_path, gate_mode=mode)), np.load(GOLDEN / "gates.npz")[mode]
    if mode == "cheap_embed":
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    cosine = (
        (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    )
    assert cosine.min() >= 0.999, (
        "mergekit runs its forward pass in bfloat16; anything below is another place or another"
        " pooling"
    )


def test_a_frankenmoe_holds_the_bases_and_the_experts_bits(tmp_path):
    mixed, dense = mix(tmp_path), sources()
    assert [Path(source).name for source in expert_sources(tmp_path / "out")] == ["a", "b", "c"]
    for name in mixed.slots:
        if name.expert is not None:
            source = dense["abc"[name.expert]]
            part = TensorId(name.part, name.layer)
            assert mixed.read(name).tobytes() == source.read(part).tobytes(), name
        elif not name.is_router:
            assert mixed.read(name).tobytes() == dense["base"].read(name).tobytes(), name


def test_branch_train_mix_equals_mix_params_and_a_float64_mean(tmp_path):
    mixed = mix(tmp_path, base="average", gate_mode="normal")
    models = [load_params(find_checkpoint(GOLDEN / name)) for name in "abc"]
    streamed = load_params(find_checkpoint(tmp_path / "out"))
    expected = mix_params(models, {"layers_0": streamed["layers_0"]["ffn"]["router"]})
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(streamed), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-7, rtol=0, err_msg=str(path))
    for name in mixed.slots:
        if name.expert is None and not name.is_router:
            exact = np.mean(
                [sources()[source].read(name).astype(np.float64) for source in "abc"], axis=0
            )
            np.testing.assert_allclose(mixed.read(name), exact, atol=2e-7, rtol=0)
    router = streamed["layers_0"]["ffn"]["router"]
    assert 0.015 < float(np.std(router)) < 0.025


def test_a_repeated_source_counts_once_in_the_mean(tmp_path):
    experts = [{"source_model": name} for name in ("a", "a", "b")]
    mixed = mix(tmp_path, experts=experts, base="average", gate_mode="normal")
    name = TensorId("attention/query", 0)
    expected = (sources()["a"].read(name).astype(np.float64) + sources()["b"].read(name)) / 2
    np.testing.assert_allclose(mixed.read(name), expected, atol=2e-7, rtol=0)


def float64(name, tensor):
    return sources()[name].read(tensor).astype(np.float64)


def test_task_arithmetic_and_slerp_reach_every_tensor_that_is_merged(tmp_path):
    pair = [{"source_model": "a"}, {"source_model": "b"}]
    average = {"base": "average", "gate_mode": "normal", "experts": pair}
    added = mix(tmp_path, "added", **average, merge="task_arithmetic", scale=0.4)
    arc = mix(tmp_path, "arc", **average, merge="slerp", t=0.25)
    for tensor in sources()["base"].slots:
        if tensor.part.startswith("ffn/"):
            continue
        base, a, b = (float64(name, tensor) for name in ("base", "a", "b"))
        np.testing.assert_allclose(
            added.read(tensor), base + 0.4 * (a + b - 2 * base), rtol=1e-6, atol=1e-9
        )
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        angle = np.arccos(min(cosine, 1.0))
        weights = np.array([0.75, 0.25])
        if cosine <= 0.9995:
            weights = np.sin(weights * angle) / np.sin(angle)
        expected = weights[0] * a + weights[1] * b
        np.testing.assert_allclose(arc.read(tensor), expected, rtol=1e-6, atol=1e-9)


def test_changes_of_one_model_are_merged_into_base_model_too(tmp_path):
    tensor = TensorId("attention/query", 0)
    one = {"experts": [{"source_model": "a"}] * 2, "base": "average", "gate_mode": "normal"}
    half = mix(tmp_path, **one, merge="task_arithmetic", scale=0.5)
    expected = (float64("base", tensor) + float64("a", tensor)) / 2
    np.testing.assert_allclose(half.read(tensor), expected, rtol=1e-6, atol=1e-9)


def run_logits(path):
    found = find_checkpoint(path)
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 250)
    params = load_params(found)
    llama = Llama(
        found.metadata.model, ComputeConfig(dtype="float32", remat="none", dispatch="ragged")
    )
    hidden, _ = jax.jit(llama.apply)({"params": params}, tokens, tokens * 0 + 1)
    return np.asarray(logits(params, hidden))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_four_copies_compute_what_the_dense_model_computes(tmp_path, k):
    copies = [{"source_model": "a"}] * 4
    mix(tmp_path, base_model="a", experts=copies, gate_mode="random", experts_per_token=k)
    np.testing.assert_allclose(run_logits(tmp_path / "out"), run_logits(GOLDEN / "a"), atol=1e-4)


def test_all_chunks_of_a_split_add_up_to_the_feed_forward(tmp_path):
    mixed = mix(
        tmp_path,
        method="split",
        chunks=2,
        gate_mode="normal",
        experts=[{"source_model": "a"}, {"source_model": "b"}],
    )
    assert mixed.model.d_ff == 12 and mixed.model.moe == MoEConfig((4, 4, 4))
    for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
        whole = sources()["b"].read(TensorId(f"ffn/{part}", 1))
        halves = [mixed.read(TensorId(f"ffn/{part}", 1, expert)) for expert in (2, 3)]
        np.testing.assert_array_equal(np.concatenate(halves, axis), whole)


def test_a_feed_forward_that_cannot_be_cut_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"recipe\.method='split': d_ff=24 is not divisible into 5 chunks"
    ):
        mix(tmp_path, method="split", chunks=5, gate_mode="normal")


def test_a_blend_gives_every_expert_a_chunk_of_every_source(tmp_path):
    mixed = mix(tmp_path, method="blend", gate_mode="normal")
    name = TensorId("ffn/down", 2, 1)
    expected = [sources()[s].read(TensorId("ffn/down", 2))[:, 8:16] for s in "abc"]
    np.testing.assert_array_equal(mixed.read(name), np.concatenate(expected, axis=1))


def test_mixtures_in_some_layers_need_our_format_or_another_class(tmp_path):
    with pytest.raises(UserError, match="dense layers among the mixtures"):
        mix(tmp_path, layers=[0, 2], architecture="mixtral")
    assert not (tmp_path / "out").exists()
    mixed = mix(tmp_path, layers=[0, 2], output_format="btx_jax")
    assert mixed.model.moe == MoEConfig((3, 0, 3)) and not mixed.model.biases
    name = TensorId("ffn/up", 1)
    assert mixed.read(name).tobytes() == sources()["base"].read(name).tobytes()
    found = mix(tmp_path, "qwen", layers=[0, 2])
    assert found.model.moe.experts == (3, 0, 3)
    config = json.loads((tmp_path / "qwen" / "config.json").read_text())
    assert (config["model_type"], config["mlp_only_layers"]) == ("qwen2_moe", [1])
    np.testing.assert_allclose(
        run_logits(tmp_path / "qwen"), run_logits(tmp_path / "out"), atol=1e-5
    )


def test_noise_and_residual_scale(tmp_path):
    noisy = {"source_model": "a", "positive_prompts": ["x"], "noise_scale": 0.5}
    scaled = {"source_model": "b", "positive_prompts": ["y"], "residual_scale": 0.25}
    mixed = mix(tmp_path, experts=[noisy, scaled])
    noise = mixed.read(TensorId("ffn/gate", 0, 0)) - sources()["a"].read(TensorId("ffn/gate", 0))
    assert abs(noise.std() - 0.5) < 0.1
    np.testing.assert_array_equal(
        mixed.read(TensorId("ffn/down", 0, 1)),
        sources()["b"].read(TensorId("ffn/down", 0)) * 0.25,
    )
    np.testing.assert_array_equal(
        mixed.read(TensorId("ffn/gate", 0, 1)),
        sources()["b"].read(TensorId("ffn/gate", 0)),
    )


@pytest.mark.parametrize("merge", ["ties", "dare"])
def test_other_merges_pass_verification_and_keep_what_did_not_change(tmp_path, merge):
    mixed = mix(
        tmp_path,
        base="average",
        merge=merge,
        gate_mode="normal",
        experts=[{"source_model": "base"}, {"source_model": "a"}],
    )
    name = TensorId("attention/key", 0)
    assert not np.array_equal(mixed.read(name), sources()["base"].read(name))
    same = mix(
        tmp_path,
        "same",
        base="average",
        merge=merge,
        gate_mode="normal",
        experts=[{"source_model": "base"}] * 2,
        seed=1,
    )
    np.testing.assert_array_equal(same.read(name), sources()["base"].read(name))


def test_a_mean_that_does_not_fit_float16_is_refused(tmp_path):
    for name in ("a", "b"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.norm.weight"][0] = 1e6
        save_file(tensors, tmp_path / name / "model.safetensors")
    experts = [{"source_model": str(tmp_path / name)} for name in ("a", "b")]
    with pytest.raises(UserError, match=r"model\.norm\.weight holds values beyond float16's range"):
        mix(
            tmp_path,
            base_model=str(tmp_path / "a"),
            base="average",
            gate_mode="normal",
            dtype="float16",
            experts=experts,
        )
    assert not (tmp_path / "out").exists()


def test_states_are_what_the_model_computes_layer_by_layer():
    """The last layer's input, continued by a one-layer model, gives the whole model's output; and
    so does its router's input, with the last feed-forward silenced and its norm in place of the
    final norm."""
    reader, found = sources()["a"], find_checkpoint(GOLDEN / "a")
    params, model = load_params(found), found.metadata.model
    compute = ComputeConfig(dtype="float32", remat="none")
    last = jax.tree.map(lambda leaf: leaf[-1:], params["layers_0"])
    silent = last | {"ffn": last["ffn"] | {"down": last["ffn"]["down"] * 0}}
    prompts = [[0, 5, 9, 200, 31], [0, 7]]
    *_, (inputs, router_inputs) = layer_states(reader, prompts)
    for prompt, x, h in zip(prompts, inputs, router_inputs, strict=True):
        table = np.zeros((model.vocab_size, model.d_model), np.float32)
        table[: len(prompt)] = x  # token i embeds to state i
        top = params | {"layers_0": last, "embed": {"embedding": table}}
        router = top | {"layers_0": silent, "final_norm": {"scale": last["ffn_norm"]["scale"][0]}}
        tokens, ones = np.arange(len(prompt))[None], np.ones((1, len(prompt)), np.int32)
        one_layer = Llama(dataclasses.replace(model, layers=1), compute)
        whole = Llama(model, compute).apply({"params": params}, np.array([prompt]), ones)[0]
        np.testing.assert_allclose(
            one_layer.apply({"params": top}, tokens, ones)[0], whole, atol=1e-5
        )
        np.testing.assert_allclose(
            one_layer.apply({"params": router}, tokens, ones)[0][0], h, atol=1e-5
        )


def test_router_input_rows_have_the_asked_length_and_choose_their_own_prompts(tmp_path, capsys):
    mixed = mix(tmp_path, gate_mode="router_input", gate_scale=3.0)
    np.testing.assert_allclose(np.linalg.norm(gates(mixed), axis=-1), 3.0, rtol=1e-5)
    assert "top-1 expert of the prompts' tokens" in capsys.readouterr().out


def test_similar_prompts_are_warned_of(tmp_path, capsys):
    experts = [
        {"source_model": s, "positive_prompts": [p]}
        for s, p in (("a", "hello there A"), ("b", "hello there B"))
    ]
    mix(tmp_path, experts=experts, gate_mode="cheap_embed")
    assert "rows are nearly equal in all layers" in " ".join(capsys.readouterr().out.split())


def test_our_checkpoints_mix_like_hugging_face_directories(tmp_path):
    for name in ("base", "a", "b", "c"):
        convert.run(name, str(tmp_path / name))
    recipe = json.loads((GOLDEN / "recipe.yml").read_text())
    recipe["base_model"] = str(tmp_path / "base")
    recipe["experts"] = [
        expert | {"source_model": str(tmp_path / expert["source_model"])}
        for expert in recipe["experts"]
    ]
    ours, theirs = mix(tmp_path, "ours", **recipe), mix(tmp_path, "theirs")
    assert find_checkpoint(tmp_path / "ours").is_huggingface is False
    for name in theirs.slots:
        assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name


def test_verify_notices_a_single_changed_bit(tmp_path, monkeypatch):
    real = mix_recipe.verified

    def damaged(mixture, reader):
        written = reader.directory
        file = written / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        for checksums in (CHECKSUMS, SUMS):  # they would report it first
            (written / checksums).unlink()
        return real(mixture, open_reader(find_checkpoint(written)))

    monkeypatch.setattr(mix_recipe, "verified", damaged)
    with pytest.raises(
        UserError, match=r"1 tensor that differ from what the recipe makes: lm_head.weight"
    ):
        mix(tmp_path)
    assert not (tmp_path / "out").exists(), (
        "a mixture that failed verification must not look like a result"
    )


def trained(folder, name, run, like="a"):
    """A run's checkpoint with the weights of a golden model."""
    found = find_checkpoint(GOLDEN / like)
    checkpoints = Checkpoints(folder / name, CheckpointConfig())
    checkpoints.save(CheckpointMetadata(found.metadata.model, 1, run), load_params(found))
    checkpoints.close()
    shutil.copytree(found.tokenizer, folder / name / "tokenizer")
    return str(folder / name)


def test_a_mixture_has_the_histories_of_all_its_sources(tmp_path):
    seed = {"s": TrainingRun(1000, 1e6, 1.0, 1, 1)}
    branch = {"m": TrainingRun(300, 1e5, 2.0, 1, 1, ("s",))}
    experts_of = [
        {"source_model": trained(tmp_path, "math", seed | branch)},
        {"source_model": trained(tmp_path, "seed", seed, like="b")},
        {"source_model": "c"},
    ]
    mix(tmp_path, experts=experts_of, gate_mode="normal", experts_per_token=1)
    expected = seed | branch | elsewhere(GOLDEN / "base") | elsewhere(GOLDEN / "c")
    found = find_checkpoint(tmp_path / "out")
    assert found.is_huggingface and found.metadata.history == expected
    assert found.metadata.costs()["tokens"] == 1300
    card = (tmp_path / "out" / "README.md").read_text()
    assert "frankenMoE: 3 experts of 3 models" in card
    assert "Trained here on 1,300 tokens in all, seed included." in card
    assert "Training elsewhere is unknown: base (" in card and ", c (" in card

    convert.run(str(tmp_path / "out"), str(tmp_path / "ours"))
    convert.run(str(tmp_path / "ours"), str(tmp_path / "back"))
    experts.add(str(tmp_path / "back"), "a", str(tmp_path / "more"))
    experts.drop(str(tmp_path / "more"), 0, str(tmp_path / "less"))
    for name in ("ours", "back"):
        assert find_checkpoint(tmp_path / name).metadata.history == expected, name
    for name in ("more", "less"):
        grown = find_checkpoint(tmp_path / name).metadata.history
        assert grown == expected | elsewhere(GOLDEN / "a"), name
    assert "1,300 tokens" in (tmp_path / "back" / "README.md").read_text()


def test_weights_that_another_tool_wrote_have_no_history_of_ours(tmp_path):
    convert.run(
        trained(tmp_path, "run", {"m": TrainingRun(300, 1e5, 2.0, 1, 1)}), str(tmp_path / "x")
    )
    file = tmp_path / "x" / "model.safetensors"
    assert find_checkpoint(tmp_path / "x").metadata.history.keys() == {"m"}
    shutil.copytree(tmp_path / "x", tmp_path / "copied")
    assert find_checkpoint(tmp_path / "copied").metadata.history.keys() == {"m"}
    held = load_file(file)
    save_file(held, file, metadata={"format": "pt"})
    assert find_checkpoint(tmp_path / "x").metadata.history == elsewhere(tmp_path / "x")
    save_file(held, file, metadata={"format": "pt", "btx_jax.history": "{"})
    with pytest.raises(UserError, match=r"model.safetensors: damaged history"):
        find_checkpoint(tmp_path / "x")


def test_sources_as_mergekit_names_them_are_told_what_to_do_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named = ["a+lora", "org/model@main", "org/other+org/lora", "a"]
    with pytest.raises(UserError) as caught:
        mix(tmp_path, experts=[{"source_model": name} for name in named], gate_mode="random")
    for told in (
        "3 mistakes", "experts[0].source_model", "/lora does not exist",
        "experts[1].source_model: org/model does not exist here and is not (completely) in",
        "experts[2].source_model: org/other does not exist here", "HF_HUB_OFFLINE is set",
    ):  # fmt: skip
        assert told in str(caught.value)
    shutil.copytree(GOLDEN / "a", tmp_path / "a+b@c")
    mix(tmp_path, experts=[{"source_model": str(tmp_path / "a+b@c")}] * 2, gate_mode="random")


@pytest.mark.parametrize("merge", [name for name in MERGES if MERGES[name].models is None])
def test_rows_of_a_vocabulary_are_averaged_over_the_models_that_have_them(tmp_path, merge, capsys):
    sizes = {"a": 261, "b": 257, "c": 259}  # base_model: 259
    (tmp_path / "text").write_text("a b c " * 20)
    for name, rows in sizes.items():
        shutil.copytree(GOLDEN / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
        held = dict(load_file(tmp_path / name / "model.safetensors"))
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            held[key] = np.resize(held[key], (rows, held[key].shape[1]))
        save_file(held, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    changes = {"density": 0.9} if "density" in MERGE_SETTINGS[merge] else {}
    made = mix(
        tmp_path,
        experts=[
            {"source_model": str(tmp_path / name)}
            | ({"text": str(tmp_path / "text")} if merge == "regmean" else {})
            for name in sizes
        ],
        base="average",
        gate_mode="normal",
        allow=["vocab_size", "tokenizer"],
        merge=merge,
        **changes,
    )
    assert made.model.vocab_size == 259
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 more tokens than base_model; they are left out" in printed
    assert "2 fewer tokens than base_model; it does not contribute to those rows" in printed
    if merge == "mean":
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            a, b, c = (
                np.asarray(
                    open_reader(find_checkpoint(tmp_path / name)).read(TENSORS[key]), np.float64
                )
                for name in sizes
            )
            expected = np.concatenate([(a[:257] + b + c[:257]) / 3, (a[257:259] + c[257:]) / 2])
            np.testing.assert_allclose(
                np.asarray(made.read(TENSORS[key]), np.float64), expected, rtol=2.0**-7, atol=1e-6
            )


def test_an_expert_added_and_dropped_again_leaves_every_other_bit(tmp_path):
    before = mix(tmp_path)
    message = experts.add(str(tmp_path / "out"), "base", str(tmp_path / "more"))
    assert "4 experts" in message
    more = open_reader(find_checkpoint(tmp_path / "more"))
    assert more.model.moe == MoEConfig((4, 4, 4))
    for name in before.slots:
        if not name.is_router:
            assert more.read(name).tobytes() == before.read(name).tobytes(), name
        else:
            np.testing.assert_array_equal(more.read(name)[:3], before.read(name))
    added = more.read(TensorId("ffn/up", 1, 3))
    np.testing.assert_array_equal(added, sources()["base"].read(TensorId("ffn/up", 1)))
    experts.drop(str(tmp_path / "more"), 3, str(tmp_path / "again"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    experts.drop(str(tmp_path / "more"), 0, str(tmp_path / "less"))
    less = open_reader(find_checkpoint(tmp_path / "less"))
    gate = TensorId("ffn/gate", 0, 0)
    assert less.read(gate).tobytes() == more.read(gate._replace(expert=1)).tobytes()
    np.testing.assert_array_equal(gates(less), gates(more)[:, 1:])


def test_dropping_below_k_or_adding_a_stranger_is_refused(tmp_path):
    mix(tmp_path, experts_per_token=3)
    with pytest.raises(UserError, match="k=3: more than the 2 experts"):
        experts.drop(str(tmp_path / "out"), 0, str(tmp_path / "x"))
    with pytest.raises(UserError, match="no expert 7 in layer 0, which has experts 0 to 2"):
        experts.drop(str(tmp_path / "out"), 7, str(tmp_path / "x"))
    with pytest.raises(UserError, match="is a dense model"):
        experts.add("base", "a", str(tmp_path / "x"))
    for wrong in (-1.0, float("nan"), float("inf"), 1e300):
        with pytest.raises(
            UserError, match=rf"--router-std={re.escape(str(wrong))}: must.*--seed=-1: must not be"
        ):
            experts.add(str(tmp_path / "out"), "a", str(tmp_path / "x"), router_std=wrong, seed=-1)
    with pytest.raises(UserError, match="--seed=9223372036854775808: must be at most"):
        experts.add(str(tmp_path / "out"), "a", str(tmp_path / "x"), seed=2**63)
    other = str(ROOT / "tests" / "checkpoints" / "golden" / "llama")
    with pytest.raises(UserError, match="vocab_size: 259 against 61"):
        experts.add(str(tmp_path / "out"), other, str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    mix_recipe.run(str(GOLDEN / "recipe.yml"), str(tmp_path / "out"), dry_run=True)
    printed = capsys.readouterr().out
    assert "3 in 3 of 3 layers, top-2" in printed and "copied from base_model" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_source_spelt_in_two_ways_counts_once(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(GOLDEN / "a")
    experts = [{"source_model": source} for source in ("a", "./a", str(link), "b")]
    mixed = mix(tmp_path, experts=experts, base="average", gate_mode="normal")
    name = TensorId("final_norm/scale")
    np.testing.assert_allclose(
        mixed.read(name), (sources()["a"].read(name) + sources()["b"].read(name)) / 2, atol=2e-7
    )


def test_blended_pieces_get_their_own_noise(tmp_path):
    experts = [{"source_model": source, "noise_scale": 0.5} for source in "ab"]
    mixed = mix(tmp_path, experts=experts, method="blend", gate_mode="normal")
    gate = mixed.read(TensorId("ffn/gate", 0, 0))
    clean = [sources()[s].read(TensorId("ffn/gate", 0))[:12] for s in "ab"]
    noise = [(gate[12 * i : 12 * i + 12] - clean[i]).ravel() for i in range(2)]
    assert abs(np.corrcoef(noise)[0, 1]) < 0.3


def test_one_ulp_at_zero_is_the_smallest_one():
    for dtype in ("float32", "bfloat16", "float16"):
        assert ulp(np.zeros(1), np.dtype(dtype))[0] < 1e-7


def test_a_base_of_two_dtypes_must_say_which(tmp_path):
    shutil.copytree(GOLDEN / "a", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype("bfloat16")
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(
        UserError, match="holds bfloat16, float32; choose one for the mixture with `dtype`"
    ):
        mix(tmp_path, base_model=str(tmp_path / "a"), dtype=None)
