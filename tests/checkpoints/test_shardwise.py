"""Loading of checkpoints by the processes of a run, each only the data of its own devices."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from btx_jax.architectures.tensors import slots
from btx_jax.checkpoints.checkpoint import (
    base_of,
    find_checkpoint,
    load_params,
    open_reader,
    write_checkpoint,
)
from btx_jax.checkpoints.safetensors_files import SafetensorsFile
from btx_jax.checkpoints.shardwise import _blocks, assemble
from btx_jax.commands import convert
from btx_jax.config.model_config import ModelConfig, MoEConfig
from btx_jax.errors import UserError
from btx_jax.models.llama import abstract_params
from btx_jax.parallel.sharding import make_mesh, param_shardings
from tests.architectures import goldens
from tests.conftest import ROOT

NAMES = ("llama_plain", "mixtral_plain", "phi3", "qwen2_moe")
MESHES = ((1, 2, 4, 1), (1, 2, 1, 2), (2, 1, 2, 2), (1, 4, 1, 2), (1, 8, 1, 1), (8, 1, 1, 1))
LARGE = ModelConfig(
    vocab_size=256, layers=1, d_model=1024, d_ff=512, heads=16, kv_heads=8, head_dim=64, context=512,
    moe=MoEConfig((4,), k=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The golden checkpoints, two mixtures also with the experts of a layer in one tensor, and a
    larger one."""
    home = tmp_path_factory.mktemp("stored")
    for name in NAMES:
        shutil.copytree(goldens.FOLDER / name, home / name)
    for name in ("mixtral_plain", "qwen2_moe"):
        shutil.copytree(goldens.FOLDER / name, home / f"{name}_fused")
        file = home / f"{name}_fused" / "model.safetensors"
        save_file(fused(load_file(file)), file, {"format": "pt"})
    places, rng = slots(LARGE), np.random.default_rng(0)
    write_checkpoint(
        home / "large",
        True,
        LARGE,
        dict.fromkeys(places, np.dtype(ml_dtypes.bfloat16)),
        lambda t: rng.normal(size=places[t].shape).astype(np.float32),
        None,
        history={},
        huggingface={},
        card="",
        check=lambda: None,
        verb="writing",
    )
    return home


def fused(tensors):
    """Experts as kept by transformers 5: gate_up_proj and down_proj with all experts of a layer."""
    result, experts = {}, {}
    for name, tensor in tensors.items():
        layer, found, rest = name.partition(".experts.")
        if not found:
            result[name] = tensor
            continue
        number, part = rest.removesuffix(".weight").split(".")
        part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(part, part)
        layer = layer.replace("block_sparse_moe", "mlp")
        experts.setdefault(layer, {}).setdefault(int(number), {})[part] = tensor
    for layer, held in experts.items():
        several = [held[number] for number in sorted(held)]
        result[f"{layer}.experts.gate_up_proj"] = np.stack(
            [np.concatenate([parts["gate_proj"], parts["up_proj"]]) for parts in several]
        )
        result[f"{layer}.experts.down_proj"] = np.stack([parts["down_proj"] for parts in several])
    return result


def abstract_of(path, mesh):
    boxed = abstract_params(find_checkpoint(path).metadata.model)
    shardings = param_shardings(boxed, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings
    )


def fitting(path, meshes=MESHES):
    """The meshes that divide the model."""
    for shape in meshes:
        try:
            yield shape, abstract_of(path, make_mesh(shape, jax.devices()[: math.prod(shape)]))
        except UserError:
            continue


def want(path):
    """Our tree, built from whole tensors."""
    reader = open_reader(find_checkpoint(path))
    tree = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), nn.unbox(abstract_params(reader.model))
    )
    for tensor, slot in reader.slots.items():
        leaf = tree
        for key in slot.path:
            leaf = leaf[key]
        leaf[slot.indices] = slot.to_ours(reader.read(tensor))
    return tree


def assert_equal(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", [*NAMES, "mixtral_plain_fused", "qwen2_moe_fused", "large"])
def test_shards_on_eight_devices_are_those_of_whole_tensors(stored, name):
    whole, meshes = want(stored / name), list(fitting(stored / name))
    assert len(meshes) >= 2
    for _, abstract in meshes:
        assert_equal(load_params(find_checkpoint(stored / name), abstract), whole)


def in_pieces(reader, tensor):
    """Yield our part of the leaf: read in halves along each axis, then without the first third of
    all axes."""
    part = reader.slots[tensor].part
    result = np.empty(part, np.float32)
    for axis, size in enumerate(part):
        result[:] = np.nan
        for along in ((0, size // 2), (size // 2, size)):
            region = tuple(along if i == axis else (0, n) for i, n in enumerate(part))
            result[tuple(slice(*r) for r in region)] = reader.read_region(tensor, region)
        yield result
    region = tuple((size // 3, size) for size in part)
    result[tuple(slice(*r) for r in region)] = reader.read_region(tensor, region)
    yield result


@pytest.mark.parametrize("form", ["huggingface", "ours"])
@pytest.mark.parametrize("name", [*NAMES, "qwen2_moe_fused"])
def test_regions_along_every_axis_are_those_of_the_whole(stored, name, form, tmp_path):
    path = stored / name
    if form == "ours":
        convert.run(str(path), str(tmp_path / "ours"))
        path = tmp_path / "ours"
    reader = open_reader(find_checkpoint(path))
    for tensor in reader.slots:
        whole = reader.slots[tensor].to_ours(reader.read(tensor)).astype(np.float32)
        for got in in_pieces(reader, tensor):
            np.testing.assert_array_equal(got, whole)


def test_columns_are_cut_row_by_row_or_from_blocks(stored, monkeypatch):
    file = SafetensorsFile(stored / "large" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = file.read(name)
    for worth, block in ((1, 1), (10**9, 1), (10**9, 5000), (10**9, 10**9)):
        monkeypatch.setattr("btx_jax.checkpoints.safetensors_files._OnDisk.worth_a_call", worth)
        monkeypatch.setattr("btx_jax.checkpoints.safetensors_files._BLOCK", block)
        got = file.read(name, rows=(3, 90), columns=(7, 801))
        np.testing.assert_array_equal(got, whole[3:90, 7:801])


def test_a_tensor_is_read_once_whatever_the_devices_that_hold_it(stored):
    path = stored / "mixtral_plain"
    for _, abstract in fitting(path, ((8, 1, 1, 1), (1, 2, 1, 2))):
        counted = open_reader(find_checkpoint(path))
        times = dict.fromkeys(counted.slots, 0)
        read = counted.read

        def count(tensor, read=read, times=times):
            times[tensor] += 1
            return read(tensor)

        counted.read = count
        assemble(counted, abstract, counted.slots)
        assert set(times.values()) == {1}


def test_what_adjoins_is_read_at_once_and_nothing_between():
    """A host's devices need not be adjacent in the mesh."""
    regions = [((0, 4), (0, 2)), ((0, 4), (2, 4)), ((0, 4), (8, 10)), ((0, 4), (0, 2))]
    assert _blocks(regions, 2) == {((0, 4), (0, 4)), ((0, 4), (8, 10))}
    assert _blocks([], 2) == set()


PROGRAM = """
import json, re, sys
from pathlib import Path
import numpy as np
from btx_jax.parallel import hosts
hosts.start()
import jax
from btx_jax.architectures.tensors import slots
from btx_jax.checkpoints.checkpoint import base_of, find_checkpoint, load_base, load_params
from btx_jax.checkpoints.training_state import Base
from btx_jax.errors import UserError
from btx_jax.parallel.sharding import make_mesh
from tests.checkpoints.test_shardwise import abstract_of, want

jax.config.update("jax_num_cpu_devices", 4)  # of each process

def read_so_far():
    return int(re.search(r"rchar: (\\d+)", Path("/proc/self/io").read_text())[1])

def same(params, whole):
    return all(
        np.array_equal(shard.data, leaf[shard.index])
        for array, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True)
        for shard in array.addressable_shards
    )

told = []
for path, shape, how in json.loads(sys.argv[1]):
    found, abstract = find_checkpoint(path), abstract_of(path, make_mesh(shape))
    before = read_so_far()
    try:
        if how == "base":
            params, base = load_base(Base(path, ""), found.metadata.model, abstract, "x")
        else:
            params, base = load_params(found, abstract), None
    except UserError as error:
        told.append(str(error))
        continue
    told.append([read_so_far() - before, base and base.digest])
    assert same(params, want(path)), (path, shape)
print(json.dumps(told))
"""


def in_two(*cases):
    """The results of each case in two processes with four devices each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
    }  # fmt: skip
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(cases)],
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    out = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(e[-2000:] for _, e in out)
    return [json.loads(text.splitlines()[-1]) for text, _ in out]


@pytest.mark.slow
def test_two_processes_read_half_each_and_hash_a_base_together(stored, tmp_path):
    cases = [
        (str(stored / name), shape, "model")
        for name in (*NAMES, "mixtral_plain_fused", "qwen2_moe_fused")
        for shape, _ in fitting(stored / name)
        if math.prod(shape) == 8
    ]
    large = str(stored / "large")
    cut = [
        (large, shape, "model")
        for shape in ((1, 8, 1, 1), (1, 2, 4, 1), (1, 1, 2, 4), (2, 1, 1, 4))
    ]
    bases = [(large, (1, 2, 4, 1), "base"), (str(stored / "phi3"), (8, 1, 1, 1), "base")]
    damaged = tmp_path / "damaged"
    shutil.copytree(large, damaged)
    (damaged / "SHA256SUMS").unlink()
    (damaged / "model.xxh3.json").unlink()
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, -1] = np.nan  # in the half of one process
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    bad = [(str(damaged), (1, 8, 1, 1), "model")]
    told = in_two(*cases, *cut, *bases, *bad)
    sizes = {"large": os.path.getsize(stored / "large" / "model.safetensors")}
    for one in told:
        read = one[len(cases) : len(cases) + len(cut)]
        for (_, shape, _), (count, _) in zip(cut[:3], read, strict=False):
            assert count <= 0.6 * sizes["large"], (shape, count, sizes)
        assert read[3][0] <= 1.1 * sizes["large"], "replicated, and read once"
        hashed = one[-3:-1]
        assert hashed[0][0] <= 0.8 * sizes["large"], "its share, and half of the other's"
        for (path, _, _), (_, digest) in zip(bases, hashed, strict=True):
            assert digest == base_of(find_checkpoint(path)).digest
        assert one[-1].endswith("NaN or infinity in model.embed_tokens.weight")
