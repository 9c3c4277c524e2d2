import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from btx_jax.checkpoints import peft_config
from btx_jax.checkpoints.adapter import (
    ABOUT,
    TENSORS,
    from_tensors,
    to_tensors,
    write_directory,
)
from btx_jax.checkpoints.checkpoint import (
    adapter_tensors,
    digest,
    find_checkpoint,
)
from btx_jax.checkpoints.peft_config import CONFIG as PEFT_CONFIG
from btx_jax.checkpoints.peft_config import TENSORS as PEFT_TENSORS
from btx_jax.checkpoints.training_state import elsewhere
from btx_jax.commands import adapter, convert
from btx_jax.config.model_config import LoRAConfig
from btx_jax.errors import UserError
from btx_jax.mixing.lora import mix_lora
from btx_jax.models.llama import init_params
from tests.checkpoints.adapters import BASE, GOLDEN, logits_of, mola_directory

SLOW = r"(\w+[._]?)+!"


@pytest.fixture(scope="module")
def golden():
    held = np.load(GOLDEN / "peft" / "expected.npz")
    return held["tokens"], held["logits"]


def test_pefts_lora_computes_the_same_here_merged_and_back_again(tmp_path, golden):
    tokens, expected = golden
    adapter.import_peft(str(GOLDEN / "peft"), str(BASE), str(tmp_path / "imported"))
    np.testing.assert_allclose(logits_of(tmp_path / "imported", tokens), expected, atol=1e-4)
    assert np.abs(logits_of(BASE, tokens) - expected).max() > 1e-2
    adapter.merge(str(tmp_path / "imported"), str(tmp_path / "merged"))
    np.testing.assert_allclose(logits_of(tmp_path / "merged", tokens), expected, atol=1e-4)
    adapter.export(str(tmp_path / "imported"), str(tmp_path / "back"), "peft")
    there, back = (
        load_file(folder / PEFT_TENSORS) for folder in (GOLDEN / "peft", tmp_path / "back")
    )
    assert there.keys() == back.keys()
    assert all(np.array_equal(there[name], back[name]) for name in there)
    configs = [
        json.loads((folder / PEFT_CONFIG).read_text())
        for folder in (GOLDEN / "peft", tmp_path / "back")
    ]
    for key in ("r", "lora_alpha", "peft_type", "task_type"):
        assert configs[0][key] == configs[1][key]
    assert set(configs[0]["target_modules"]) == set(configs[1]["target_modules"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("uneven", "3 maps without LoRA in adapted layers: zeros"),
        ("exclude", "4 maps without LoRA in adapted layers: zeros"),
        ("patterns", "18 maps of lower rank .* 8 maps of another scale: taken into B, every bit"),
        ("rslora_patterns", "18 maps of lower rank .*, 6 rounded to float32 by it"),
        ("some_layers", r"rank 4\); its config names the base .llama."),
        (
            "carried",
            "left out, as they equal those of the base: model.embed_tokens.weight, model.l",
        ),
    ],
)
def test_what_differs_between_maps_computes_what_peft_computes(tmp_path, name, told):
    folder = GOLDEN / f"peft_{name}"
    held = np.load(folder / "expected.npz")
    line = adapter.import_peft(str(folder), str(BASE), str(tmp_path / "imported"))
    assert re.search(told, line), line
    merged_line = adapter.merge(str(tmp_path / "imported"), str(tmp_path / "merged"))
    adapter.export(str(tmp_path / "imported"), str(tmp_path / "back"), "peft")
    adapter.import_peft(str(tmp_path / "back"), str(BASE), str(tmp_path / "again"))
    for made in ("imported", "merged"):
        np.testing.assert_allclose(
            logits_of(tmp_path / made, held["tokens"]), held["logits"], atol=1e-5
        )
    assert np.abs(logits_of(BASE, held["tokens"]) - held["logits"]).max() > 1e-2
    theirs, back = (load_file(path / PEFT_TENSORS) for path in (folder, tmp_path / "back"))
    lora = {key: x.shape for key, x in theirs.items() if "lora_" in key}
    assert {key: x.shape for key, x in back.items()} == lora, "zeros were written, or LoRA was not"
    assert f", {len(lora) // 2} of 30 tensors changed)" in merged_line
    ours, again = (
        adapter_tensors(find_checkpoint(tmp_path / made)) for made in ("imported", "again")
    )
    assert ours.keys() == again.keys()
    assert all(np.array_equal(ours[key], again[key]) for key in ours)
    untouched = load_file(BASE / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    changed = {key for key in untouched if untouched[key].tobytes() != merged[key].tobytes()}
    assert changed == {
        key.removeprefix("base_model.model.").replace("lora_A.", "")
        for key in lora
        if "lora_A" in key
    }


def renamed(folder, target, rename, extra=None):
    """The golden LoRA with renamed tensors."""
    shutil.copytree(folder, target)
    held = {rename(key): x for key, x in load_file(folder / PEFT_TENSORS).items()}
    save_file(held | (extra or {}), target / PEFT_TENSORS)
    return str(target)


def test_names_that_peft_loads_are_loaded_and_others_named(tmp_path, golden):
    tokens, expected = golden
    out = tmp_path / "out"
    slot = renamed(
        GOLDEN / "peft", tmp_path / "slot", lambda key: key.replace(".weight", ".default.weight")
    )
    adapter.import_peft(slot, str(BASE), str(out))
    np.testing.assert_allclose(logits_of(out, tokens), expected, atol=1e-5)
    shutil.rmtree(out)
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj"
    one = np.ones((4, 32), np.float32)
    for number, (rename, extra, told) in enumerate(
        (
            (lambda key: key.replace(".weight", ".sft.weight"), {}, "adapter's name 'sft'"),
            (lambda key: key.removeprefix("base_model.model."), {}, "names without base_model"),
            (lambda key: key.replace("model.model.", "model."), {}, "a model without a head"),
            (lambda key: key.replace("layers.2", "layers.7"), {}, "the base has 3 layers"),
            (str, {f"{q_proj}.lora_A.default.weight": one}, "twice"),
            (str, {f"{q_proj}.lora_magnitude_vector": one[0]}, "use_dora"),
            (str, {f"{q_proj}.lora_B.bias": one[:, 0]}, "lora_bias"),
            (str, {f"{q_proj}.base_layer.bias": one[:, 0]}, "bias: the base has none there"),
            (
                str,
                {"base_model.model.lm_head.lora_A.weight": one},
                "target_modules: LoRA on a module",
            ),
            (str, {"base_model.model.model.embed_tokens.lora_embedding_A": one}, "on an embedding"),
            (str, {"base_model.model.model.embed_tokens.token_adapter.x": one}, "trainable_token"),
            (str, {"base_model.model.score.weight": one}, r"unknown: base_model.model.score"),
            (str, {"base_model.model.lm_head.weight": one}, r"lm_head.*\(4, 32\), the base's \(61"),
        )
    ):
        folder = renamed(GOLDEN / "peft", tmp_path / str(number), rename, extra)
        with pytest.raises(UserError, match=told) as caught:
            adapter.import_peft(folder, str(BASE), str(out))
        assert "\n" not in str(caught.value) and not out.exists()


def test_a_base_tensor_that_was_trained_is_told_with_the_way_out(tmp_path):
    embedding = load_file(BASE / "model.safetensors")["model.embed_tokens.weight"].copy()
    embedding[3, 5] += 1e-3
    folder = renamed(
        GOLDEN / "peft_carried",
        tmp_path / "peft",
        str,
        {"base_model.model.model.embed_tokens.weight": embedding},
    )
    with pytest.raises(
        UserError, match=r"embed_tokens.weight differs from the base.*merge_and_unload"
    ):
        adapter.import_peft(folder, str(BASE), str(tmp_path / "out"))


def test_pickles_and_folders_of_adapters_are_told_as_such(tmp_path):
    shutil.copytree(GOLDEN / "peft", tmp_path / "run" / "sql")
    with pytest.raises(UserError, match="holds adapters in folders; name one: sql"):
        adapter.import_peft(str(tmp_path / "run"), str(BASE), str(tmp_path / "out"))
    shutil.copytree(GOLDEN / "peft", tmp_path / "two")
    shutil.copytree(GOLDEN / "peft", tmp_path / "two" / "second")
    line = adapter.import_peft(str(tmp_path / "two"), str(BASE), str(tmp_path / "out"))
    assert "ignored: the adapters in second" in line
    (tmp_path / "two" / PEFT_TENSORS).rename(tmp_path / "two" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin is a pickle.*save_pretrained"):
        adapter.import_peft(str(tmp_path / "two"), str(BASE), str(tmp_path / "other"))


def test_what_peft_trained_is_an_unknown_cost_of_the_adapter(tmp_path):
    adapter.import_peft(str(GOLDEN / "peft"), str(BASE), str(tmp_path / "lora"))
    history = find_checkpoint(tmp_path / "lora").metadata.history
    assert history == elsewhere(BASE) | elsewhere(GOLDEN / "peft")
    adapter.merge(str(tmp_path / "lora"), str(tmp_path / "merged"))
    assert find_checkpoint(tmp_path / "merged").metadata.history == history
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Training elsewhere is unknown: llama (" in card


def test_ranks_that_differ_by_layer_go_to_peft_and_back(tmp_path):
    folder = mola_directory(
        tmp_path / "lora", allocation="1,1,1", k=(1,), rank=(2, 4, 4), targets=("q", "down")
    )
    adapter.export(str(folder), str(tmp_path / "peft"), "peft")
    config = json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())
    assert config["rank_pattern"] == {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.0.mlp.down_proj": 2,
    }
    assert not config["alpha_pattern"], "alpha / rank says the scale on both sides"
    adapter.import_peft(str(tmp_path / "peft"), str(BASE), str(tmp_path / "back"))
    one, other = (find_checkpoint(path) for path in (folder, tmp_path / "back"))
    ours, again = adapter_tensors(one), adapter_tensors(other)
    assert other.metadata.model.lora.rank == (2, 4, 4)
    assert all(np.array_equal(ours[key], again[key]) for key in ours)


def test_a_directory_says_what_it_is_and_gives_back_every_bit(tmp_path):
    folder = mola_directory(tmp_path / "mola")
    said = json.loads((folder / ABOUT).read_text())
    assert said["experts"] == [2, 3, 2]
    assert (
        said["model"]["lora"]["rank"],
        said["model"]["lora"]["alpha"],
        len(said["base"]["digest"]),
    ) == ([4], 16.0, 64)
    found = find_checkpoint(folder)
    held = load_file(folder / TENSORS)
    assert held["layers.1.down.a"].shape == (3, 4, 48)
    assert held["layers.1.down.b"].shape == (3, 32, 4)
    assert held["layers.1.down.router"].shape == (3, 48)
    again = adapter_tensors(found)
    assert again.keys() == held.keys()
    assert all(np.array_equal(held[name], again[name]) for name in held)
    adapter.export(str(folder), str(tmp_path / "copy"))
    assert (tmp_path / "copy" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()


def test_one_expert_and_fixed_gates_merged_are_what_those_gates_compute(tmp_path, golden):
    tokens, _ = golden
    folder = mola_directory(tmp_path / "mola", allocation="2")
    adapter.merge(str(folder), str(tmp_path / "second"), expert=1)
    adapter.merge(str(folder), str(tmp_path / "mean"), gates="mean")
    found = find_checkpoint(folder)
    held = adapter_tensors(found)
    equal = {name: np.zeros_like(x) if name.endswith("router") else x for name, x in held.items()}
    alone = {name: x[1:] for name, x in held.items() if not name.endswith("router")}
    for name, tensors, lora in (
        ("mean", equal, {"allocation": "2"}),
        ("second", alone, {"allocation": "1", "k": (1,)}),
    ):
        model = dataclasses.replace(
            found.metadata.model, lora=dataclasses.replace(found.metadata.model.lora, **lora)
        )
        (tmp_path / f"as_{name}").mkdir()
        write_directory(
            tmp_path / f"as_{name}", dataclasses.replace(found.metadata, model=model), tensors
        )
        np.testing.assert_allclose(
            logits_of(tmp_path / f"as_{name}", tokens),
            logits_of(tmp_path / name, tokens),
            atol=1e-4,
        )


def test_the_base_may_move_but_not_change(tmp_path, golden):
    tokens, expected = golden
    shutil.copytree(BASE, tmp_path / "base")
    adapter.import_peft(str(GOLDEN / "peft"), str(tmp_path / "base"), str(tmp_path / "lora"))
    convert.run(str(tmp_path / "base"), str(tmp_path / "moved"))
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match=r"its base .* is missing"):
        logits_of(tmp_path / "lora", tokens)
    adapter.merge(
        str(tmp_path / "lora"), str(tmp_path / "merged"), base=str(tmp_path / "moved")
    )  # another format, the same digest
    np.testing.assert_allclose(logits_of(tmp_path / "merged", tokens), expected, atol=1e-4)

    shutil.copytree(BASE, tmp_path / "base")
    weights = dict(load_file(tmp_path / "base" / "model.safetensors"))
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][0, 0] += 1e-3
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the weights differ"):
        logits_of(tmp_path / "lora", tokens)
    with pytest.raises(UserError, match="has different weights from"):
        adapter.merge(str(tmp_path / "lora"), str(tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda t: t.pop("layers.0.q.a"), "missing layers.0.q.a"),
        (lambda t: t.update({"layers.9.q.a": t["layers.0.q.a"]}), "unknown layers.9.q.a"),
        (
            lambda t: t.update({"layers.0.q.a": t["layers.0.q.a"][:, :3]}),
            r"layers.0.q.a is \(2, 3, 32\), not \(2, 4, 32\)",
        ),
        (
            lambda t: t.update({"layers.0.q.a": t["layers.0.q.a"] * np.nan}),
            "NaN or infinity in layers.0.q.a",
        ),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path, break_it, told):
    folder = mola_directory(tmp_path / "mola")
    tensors = dict(load_file(folder / TENSORS))
    break_it(tensors)
    adapter.adapter.write_directory(folder, find_checkpoint(folder).metadata, tensors)
    with pytest.raises(UserError, match=told):
        adapter_tensors(find_checkpoint(folder))


def test_files_that_are_cut_off_are_refused(tmp_path):
    folder = mola_directory(tmp_path / "mola")
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        adapter_tensors(find_checkpoint(folder))
    (folder / TENSORS).unlink()
    os.mkfifo(folder / TENSORS)
    with pytest.raises(UserError, match="not a regular file"):
        adapter_tensors(find_checkpoint(folder))
    (folder / ABOUT).write_text((folder / ABOUT).read_text()[:50])
    with pytest.raises(UserError, match="damaged"):
        find_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias=True.*train one with lora_bias=False"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.*merge it with peft"),
        ({"target_parameters": ["w"]}, "target_parameters=.*merge it with peft"),
        ({"kasa_config": {"beta": 1}}, "kasa_config=.*merge it with peft"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=.*merge it with peft"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj has rank 4, but r and rank_pattern say 2"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: q_proj: r=0: must be"),
        ({"rank_pattern": [1]}, "rank_pattern=.* must map names to numbers"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern: q_proj: lora_alpha=nan"),
        ({"lora_alpha": 0}, "lora_alpha=0: has no effect"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf: must be a number"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head is missing"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000.*: must be a number within float32"),
        ({"alpha_pattern": {"q_proj": 10**400}}, "alpha_pattern: q_proj: lora_alpha=1000"),
        ({"alpha_pattern": {"q_proj": 1e300}}, "alpha_pattern: q_proj: lora_alpha=1e.300: must be"),
        (
            {"lora_alpha": 2e6},
            "adapter_config.json: .*alpha.* give alpha=2000000.0: must be at most",
        ),
        (
            {"alpha_pattern": {"layers.0.self_attn.q_proj": 3e38}, "lora_alpha": 1e-30},
            r"adapter_config.json: lora_alpha and alpha_pattern scale model.layers.0.*q_proj bey",
        ),
        ({"r": 10**400, "use_rslora": True}, "r=1000.*: must be a whole number"),
        ({"modules_to_save": 3}, "modules_to_save=3: must be names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head': must be a list of names"),
        ({"rank_pattern": dict.fromkeys(map(str, range(1001)), 4)}, "rank_pattern: 1001 patterns"),
        ({"exclude_modules": "a" * 10_001}, "exclude_modules: a pattern of 10001 characters"),
        ({"exclude_modules": "(" * 5000}, "exclude_modules: .* is not a regular expression"),
        ({"exclude_modules": "a{99999999999}"}, "exclude_modules: .* is not a regular expression"),
        ({"exclude_modules": "(("}, "is not a regular expression"),
        (
            {"exclude_modules": ["down_proj"]},
            "exclude modules that the file has LoRA for: .*down_proj",
        ),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, "layers_to_transform exclude"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0': must be layers' numbers"),
        (
            {"target_modules": "all-linear"},
            "target_modules names modules that the file lacks: .*k_proj",
        ),
        ({"init_lora_weights": "pissa"}, "changed the base itself"),
        ({"init_lora_weights": "lora_ga"}, "changed the base itself"),
        ({"lora_dropout": 2}, "lora_dropout=2: must lie"),
        ({"peft_type": "IA3"}, "only LORA.*merge it with peft"),
        ({"new_in_peft_9": "yes"}, "new_in_peft_9='yes': not a setting of peft 0.21"),
        ({"use_dora": True, "r": "4"}, "use_dora=True.*r='4': must be a whole number"),
        ({"r": 3}, "q_proj has rank 4, but r and rank_pattern say 3"),
        ({"r": 10**9}, "rank_pattern say 1000000000"),
    ],
)
def test_what_lora_here_cannot_be_is_refused(tmp_path, change, told):
    shutil.copytree(GOLDEN / "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())
    (tmp_path / "peft" / PEFT_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=told):
        adapter.import_peft(str(tmp_path / "peft"), str(BASE), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", SLOW),
        ("exclude_modules", SLOW),
        ("modules_to_save", [SLOW]),
        ("rank_pattern", {SLOW: 4}),
        ("alpha_pattern", {SLOW: 4}),
    ],
)
def test_a_pattern_that_would_match_for_years_is_told(tmp_path, monkeypatch, key, value):
    monkeypatch.setattr(peft_config, "_SECONDS", 0.2)
    shutil.copytree(GOLDEN / "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())
    (tmp_path / "peft" / PEFT_CONFIG).write_text(json.dumps(config | {key: value}))
    with pytest.raises(UserError, match=f"{PEFT_CONFIG}: {key}: .* takes too long to match"):
        adapter.import_peft(str(tmp_path / "peft"), str(BASE), str(tmp_path / "out"))


@pytest.mark.filterwarnings("error")
def test_what_float32_does_not_hold_is_told_by_pefts_name(tmp_path):
    shutil.copytree(GOLDEN / "peft", tmp_path / "peft")
    held = load_file(tmp_path / "peft" / PEFT_TENSORS)
    large = {name: array.astype(np.float64) * 1e300 for name, array in held.items()}
    save_file(large, tmp_path / "peft" / PEFT_TENSORS)
    with pytest.raises(
        UserError, match=r"self_attn.q_proj.lora_A holds NaN, infinity or values outside fl"
    ):
        adapter.import_peft(str(tmp_path / "peft"), str(BASE), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "change",
    [{"init_lora_weights": "MICA"}, {"target_modules": r"(?i).*\.(DOWN|Q|O)_proj|none"}],
    ids=str,
)
def test_what_peft_reads_in_any_case_is_read_so(tmp_path, change):
    shutil.copytree(GOLDEN / "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())
    (tmp_path / "peft" / PEFT_CONFIG).write_text(json.dumps(config | change))
    adapter.import_peft(str(tmp_path / "peft"), str(BASE), str(tmp_path / "out"))


def test_a_file_that_lacks_what_its_config_speaks_of_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "peft", tmp_path / "peft")
    held = load_file(tmp_path / "peft" / PEFT_TENSORS)
    save_file(
        {name: array for name, array in held.items() if ".layers.0." not in name},
        tmp_path / "peft" / PEFT_TENSORS,
    )
    with pytest.raises(UserError, match=r"file lacks: model\.layers\.0\."):
        adapter.import_peft(str(tmp_path / "peft"), str(BASE), str(tmp_path / "out"))


def test_what_cannot_be_exported_or_merged_is_refused(tmp_path):
    folder = str(mola_directory(tmp_path / "mola"))
    out = str(tmp_path / "out")
    for call, told in (
        (lambda: adapter.export(folder, out, "peft"), "one expert and no gate"),
        (lambda: adapter.merge(folder, out), "fix them with --expert"),
        (
            lambda: adapter.merge(folder, out, expert=2),
            "some layers have only 2 experts, numbered from 0",
        ),
        (
            lambda: adapter.merge(folder, out, gates="1,0"),
            "2 numbers, but some layers have 3 experts",
        ),
        (lambda: adapter.merge(folder, out, gates="a,b"), "must be `mean`"),
        (lambda: adapter.merge(folder, out, gates="nan"), "--gates=nan: must be finite"),
        (lambda: adapter.merge(folder, out, gates="1,inf"), "--gates=1,inf: must be finite"),
        (lambda: adapter.merge(folder, out, gates="0,1e39"), "--gates=0,1e39: must be finite"),
        (lambda: adapter.merge(folder, out, expert=0, gates="mean"), "give only one of them"),
        (lambda: adapter.merge(str(BASE), out), "not LoRA experts"),
        (
            lambda: adapter.merge(folder, out, base=str(GOLDEN / "mistral"), expert=0),
            "a different model from",
        ),
        (lambda: convert.run(folder, out), "merge them first"),
        (lambda: adapter.import_peft(str(BASE), str(BASE), out), "no config of a peft LoRA"),
        (lambda: adapter.export(folder, folder), "exists"),
    ):
        with pytest.raises(UserError, match=told):
            call()
        assert not Path(out).exists()


def test_mixed_branches_keep_their_experts_and_gates_their_experts():
    rng = np.random.default_rng(0)
    branch = lambda router: {  # noqa: E731
        "layers.0.q.a": rng.normal(size=(1, 2, 4)), "layers.0.q.b": rng.normal(size=(1, 6, 2)),
    } | ({"layers.0.q.router": rng.normal(size=(1, 4))} if router else {})  # fmt: skip
    branches = [branch(True), branch(True), branch(True)]
    mixed = mix_lora(branches, 0.02, rng)
    for n, one in enumerate(branches):
        for name, tensor in one.items():
            np.testing.assert_array_equal(mixed[name][n], tensor[0])
    fresh = mix_lora([branch(True), branch(False)], 0.02, rng)["layers.0.q.router"]
    assert fresh.shape == (2, 4)
    assert np.abs(fresh).max() < 0.2
    with pytest.raises(
        ValueError, match=r"branch 1 adapts different maps from branch 0: layers\.1\.q"
    ):
        mix_lora(
            [branch(False), branch(False) | {"layers.1.q.a": rng.normal(size=(1, 2, 4))}], 0.02, rng
        )


def test_the_tree_and_the_tensors_are_each_others_inverse():
    model = dataclasses.replace(
        find_checkpoint(BASE).metadata.model, lora=LoRAConfig("2,2,1", k=(2, 2, 1), rank=(4, 2, 2))
    )
    params = init_params(model, jax.random.key(0))
    tensors = to_tensors(model, params)
    tree = from_tensors(model, tensors, Path("here"))
    assert digest(tree) == digest(
        {
            run: {b: {"lora": x["lora"]} for b, x in value.items() if "lora" in x}
            for run, value in params.items()
            if run.startswith("layers_")
        }
    )
