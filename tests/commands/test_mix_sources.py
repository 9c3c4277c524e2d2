"""Sources of a recipe in mergekit's notation MODEL+LORA, merged while they are read."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from btx_jax.architectures.tensors import TensorId
from btx_jax.checkpoints import adapter as adapter_files
from btx_jax.checkpoints.checkpoint import base_of, find_checkpoint, open_reader
from btx_jax.checkpoints.merged import find_source, open_source
from btx_jax.checkpoints.training_state import CheckpointMetadata, TrainingRun, elsewhere
from btx_jax.commands import adapter, convert
from btx_jax.commands import mix as mix_recipe
from btx_jax.config.model_config import LoRAConfig
from btx_jax.errors import UserError
from tests.conftest import ROOT

LAYOUTS = ROOT / "tests" / "mixing" / "golden_layouts"
LLAMA, LORA = LAYOUTS / "sources" / "llama", LAYOUTS / "sources" / "lora"


def mix(tmp_path, *sources, name="out", **changes):
    recipe = {
        "base_model": str(sources[0]),
        "gate_mode": "random",
        "experts": [{"source_model": str(source)} for source in sources],
    }
    path = tmp_path / f"{name}.yml"
    path.write_text(yaml.safe_dump(recipe | changes))
    mix_recipe.run(str(path), str(tmp_path / name), verify=True)
    return open_reader(find_checkpoint(tmp_path / name))


def refused(tmp_path, *sources):
    with pytest.raises(UserError) as caught:
        mix(tmp_path, *sources)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    return str(caught.value)


def own_adapter(directory, experts=1, gating="top_k", history=None):
    """An adapter directory of ours on the golden base."""
    base = find_checkpoint(LLAMA / "base")
    lora = LoRAConfig(str(experts), rank=(2,), k=(1,), targets=("q", "down"), gating=gating)
    model = dataclasses.replace(base.metadata.model, lora=lora)
    rng = np.random.default_rng(0)
    shapes = {"q": (16, 16), "down": (16, 24)}
    tensors = {}
    for layer in range(model.layers):
        for target, (outputs, inputs) in shapes.items():
            prefix = f"layers.{layer}.{target}"
            tensors[f"{prefix}.a"] = rng.standard_normal((experts, 2, inputs), np.float32)
            tensors[f"{prefix}.b"] = rng.standard_normal((experts, outputs, 2), np.float32)
            if experts > 1 or gating == "sigmoid":
                tensors[f"{prefix}.router"] = rng.standard_normal((experts, inputs), np.float32)
    directory.mkdir()
    metadata = CheckpointMetadata(model, 0, history or {}, base_of(base))
    adapter_files.write_directory(directory, metadata, tensors)
    return directory


def test_a_merged_source_has_the_bits_of_one_merged_before(tmp_path):
    """Whatever the format of the LoRA and its model."""
    own = own_adapter(tmp_path / "own")
    adapter.merge(str(own), str(tmp_path / "own_merged"))
    adapter.import_peft(str(LORA), str(LLAMA / "base"), str(tmp_path / "imported"))
    adapter.merge(str(tmp_path / "imported"), str(tmp_path / "peft_merged"))
    convert.run(str(LLAMA / "base"), str(tmp_path / "run"))
    for source, merged in (
        (f"{LLAMA / 'base'}+{own}", "own_merged"),
        (f"{tmp_path / 'run'}+{own}", "own_merged"),
        (f"{LLAMA / 'base'}+{LORA}", "peft_merged"),
        (f"{LLAMA / 'base'}+{tmp_path / 'imported'}", "peft_merged"),
    ):
        ours = open_source(find_source(source, "key"))
        theirs = open_reader(find_checkpoint(tmp_path / merged))
        plain = open_reader(find_checkpoint(LLAMA / "base"))
        assert list(ours.slots) == list(theirs.slots)
        changed = 0
        for tensor in ours.slots:
            array = ours.read(tensor)
            assert array.tobytes() == theirs.read(tensor).tobytes(), (source, tensor)
            assert not array.flags.writeable
            changed += array.tobytes() != plain.read(tensor).tobytes()
        assert changed == {"own_merged": 4, "peft_merged": 8}[merged]


def test_a_model_with_and_without_its_lora_are_two_sources_of_an_average(tmp_path):
    both = LLAMA / "a", f"{LLAMA / 'a'}+{LORA}"
    mixed = mix(tmp_path, *both, base="average", gate_mode="normal")
    query, norm = TensorId("attention/query", 1), TensorId("final_norm/scale")
    with_lora = open_source(find_source(both[1], "key"))
    plain = open_reader(find_checkpoint(both[0]))
    mean = (plain.read(query).astype(np.float64) + with_lora.read(query).astype(np.float64)) / 2
    np.testing.assert_allclose(mixed.read(query).astype(np.float64), mean, rtol=2.0**-8)
    assert mixed.read(norm).tobytes() == plain.read(norm).tobytes()


def test_the_history_of_a_lora_is_that_of_the_mixture_too(tmp_path):
    run = {"lora": TrainingRun(300, 1e5, 2.0, 1, 1)}
    own = own_adapter(tmp_path / "own", history=run)
    mix(tmp_path, LLAMA / "a", f"{LLAMA / 'base'}+{own}", f"{LLAMA / 'b'}+{LORA}")
    history = find_checkpoint(tmp_path / "out").metadata.history
    assert history.items() >= (run | elsewhere(LORA)).items()


@pytest.mark.parametrize(("experts", "gating"), [(2, "top_k"), (1, "sigmoid")])
def test_what_a_router_chooses_cannot_be_merged(tmp_path, experts, gating):
    own = own_adapter(tmp_path / "own", experts, gating)
    told = refused(tmp_path, LLAMA / "a", f"{LLAMA / 'base'}+{own}")
    assert f"experts[1].source_model: the choices of the routers of {own} cannot be merged" in told
    assert f"adapter merge {own} MERGED --gates=mean, and name MERGED" in told


def test_wrong_loras_are_told_all_at_once(tmp_path):
    told = refused(
        tmp_path,
        LLAMA / "a",
        f"{LLAMA / 'a'}+{LLAMA / 'b'}",
        f"{LLAMA / 'a'}+{tmp_path / 'none'}",
        f"{tmp_path / 'nowhere'}+{LORA}",
        f"{LAYOUTS / 'sources' / 'qwen2' / 'a'}+{own_adapter(tmp_path / 'own')}",
    )
    for wanted in (
        f"experts[1].source_model: {LLAMA / 'b'} holds no LoRA",
        f"experts[2].source_model: {tmp_path / 'none'} does not exist",
        f"experts[3].source_model: {tmp_path / 'nowhere'} does not exist",
        f"experts[4].source_model: {tmp_path / 'own'} was trained on a different model from",
    ):
        assert wanted in told


def test_a_lora_of_ours_goes_on_the_weights_that_it_was_trained_on_wherever_they_lie(tmp_path):
    own = own_adapter(tmp_path / "own")
    shutil.copytree(LLAMA / "base", tmp_path / "copied")
    mix(tmp_path, LLAMA / "base", f"{tmp_path / 'copied'}+{own}", name="same")
    told = refused(tmp_path, LLAMA / "a", f"{LLAMA / 'a'}+{own}")
    assert f"{LLAMA / 'a'} has different weights from the model that {own} was trained on" in told


def test_a_plus_in_the_name_of_a_directory_is_no_lora(tmp_path):
    plus = tmp_path / "a+b"
    shutil.copytree(LLAMA / "a", plus)
    shutil.copytree(LORA, tmp_path / "x+lora")
    mixed = mix(tmp_path, LLAMA / "b", plus, f"{plus}+{tmp_path / 'x+lora'}")
    up = TensorId("ffn/up", 0)
    assert (
        mixed.read(up._replace(expert=1)).tobytes() == mixed.read(up._replace(expert=2)).tobytes()
    )
    gate = TensorId("ffn/gate", 0)  # up is not adapted
    assert (
        mixed.read(gate._replace(expert=1)).tobytes()
        != mixed.read(gate._replace(expert=2)).tobytes()
    )


def test_a_lora_beyond_the_range_of_its_model_is_refused(tmp_path):
    for source, target in ((LLAMA / "a", "a"), (LORA, "lora")):
        shutil.copytree(source, tmp_path / target)
    file = tmp_path / "a" / "model.safetensors"
    halves = {name: array.astype(np.float16) for name, array in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: array * 1e4 for name, array in load_file(file).items()}, file)
    told = refused(tmp_path, tmp_path / "a", f"{tmp_path / 'a'}+{tmp_path / 'lora'}")
    assert "merged with it exceeds the range of its dtype" in told


def test_changed_tensors_beside_a_lora_are_refused(tmp_path):
    shutil.copytree(LORA, tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    held = load_file(file)
    held["base_model.model.lm_head.weight"] = np.ones((61, 16), np.float32)
    save_file(held, file)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    said = json.dumps(config | {"modules_to_save": ["lm_head"]})
    (tmp_path / "lora" / "adapter_config.json").write_text(said)
    told = refused(tmp_path, LLAMA / "a", f"{LLAMA / 'a'}+{tmp_path / 'lora'}")
    assert "lm_head.weight differs from the base's" in told
