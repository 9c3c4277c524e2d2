import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from btx_jax.checkpoints.adapter import (
    ABOUT,
    PEFT_CONFIG,
    PEFT_TENSORS,
    TENSORS,
    from_tensors,
    to_tensors,
    write_directory,
)
from btx_jax.checkpoints.checkpoint import (
    adapter_tensors,
    base_of,
    digest,
    find_checkpoint,
    load_params,
)
from btx_jax.checkpoints.training_state import About
from btx_jax.config import ComputeConfig
from btx_jax.errors import UserError
from btx_jax.mixing.lora import mix_lora
from btx_jax.model_config import LoRAConfig
from btx_jax.models.llama import Llama, init_params, logits
from btx_jax.stages import adapter, convert

GOLDEN = Path(__file__).parent / "golden"
BASE = GOLDEN / "llama"


def logits_of(path, tokens):
    found = find_checkpoint(path)
    params, model = load_params(found), found.about.model
    llama = Llama(model, ComputeConfig(dtype="float32", remat="none"))
    return np.asarray(
        jax.jit(lambda p: logits(p, llama.apply({"params": p}, tokens, np.ones_like(tokens))[0]))(
            params
        )
    )


def mola_directory(folder, seed=0, base=BASE, **lora):
    """An adapter directory with random experts."""
    under = find_checkpoint(base)
    model = dataclasses.replace(
        under.about.model, lora=LoRAConfig(**({"allocation": "2,3,2", "rank": (4,)} | lora))
    )
    tensors = to_tensors(model, init_params(model, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    tensors = {
        name: rng.normal(0, 0.2, x.shape).astype(np.float32) if name.endswith(".b") else x
        for name, x in tensors.items()
    }
    folder.mkdir()
    write_directory(folder, About(model, 0, {}, base_of(under)), tensors)
    return folder


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
            found.about.model, lora=dataclasses.replace(found.about.model.lora, **lora)
        )
        (tmp_path / f"as_{name}").mkdir()
        write_directory(
            tmp_path / f"as_{name}", dataclasses.replace(found.about, model=model), tensors
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
    with pytest.raises(UserError, match=r"its base .* is gone"):
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
    with pytest.raises(UserError, match="other weights"):
        logits_of(tmp_path / "lora", tokens)
    with pytest.raises(UserError, match="other weights"):
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
    adapter.adapter.write_directory(folder, find_checkpoint(folder).about, tensors)
    with pytest.raises(UserError, match=told):
        adapter_tensors(find_checkpoint(folder))


def test_files_that_are_cut_off_are_refused(tmp_path):
    folder = mola_directory(tmp_path / "mola")
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        adapter_tensors(find_checkpoint(folder))
    (folder / ABOUT).write_text((folder / ABOUT).read_text()[:50])
    with pytest.raises(UserError, match="damaged"):
        find_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "changed the base itself"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"r": 3}, "not "),
    ],
)
def test_what_lora_here_cannot_be_is_refused(tmp_path, change, told):
    shutil.copytree(GOLDEN / "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())
    (tmp_path / "peft" / PEFT_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=told):
        adapter.import_peft(str(tmp_path / "peft"), str(BASE), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_file_that_lacks_what_its_config_speaks_of_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "peft", tmp_path / "peft")
    held = load_file(tmp_path / "peft" / PEFT_TENSORS)
    save_file(
        {name: array for name, array in held.items() if ".layers.0." not in name},
        tmp_path / "peft" / PEFT_TENSORS,
    )
    with pytest.raises(UserError, match=r"missing layers\.0\."):
        adapter.import_peft(str(tmp_path / "peft"), str(BASE), str(tmp_path / "out"))


def test_what_cannot_be_exported_or_merged_is_refused(tmp_path):
    folder = str(mola_directory(tmp_path / "mola"))
    out = str(tmp_path / "out")
    for call, told in (
        (lambda: adapter.export(folder, out, "peft"), "one expert without a gate"),
        (lambda: adapter.merge(folder, out), "fix them with --expert"),
        (
            lambda: adapter.merge(folder, out, expert=2),
            "some layers have 2 experts, numbered from 0",
        ),
        (
            lambda: adapter.merge(folder, out, gates="1,0"),
            "2 numbers, but some layers have 3 experts",
        ),
        (lambda: adapter.merge(folder, out, gates="a,b"), "must be `mean`"),
        (lambda: adapter.merge(folder, out, expert=0, gates="mean"), "one of the two"),
        (lambda: adapter.merge(str(BASE), out), "no LoRA experts"),
        (
            lambda: adapter.merge(folder, out, base=str(GOLDEN / "mistral"), expert=0),
            "another model",
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
    with pytest.raises(ValueError, match=r"branch 1 adapts other maps than branch 0: layers\.1\.q"):
        mix_lora(
            [branch(False), branch(False) | {"layers.1.q.a": rng.normal(size=(1, 2, 4))}], 0.02, rng
        )


def test_the_tree_and_the_tensors_are_each_others_inverse():
    model = dataclasses.replace(
        find_checkpoint(BASE).about.model, lora=LoRAConfig("2,2,1", k=(2, 2, 1), rank=(4, 2, 2))
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
