"""Bytes read and held by each process of a pod when it loads a Hugging Face checkpoint: two
processes with four simulated devices each, on a random mixture of experts in bfloat16.

    python benchmarks/read.py [--megabytes=1500] [--mesh=1,2,4,1] [--dtype=bfloat16]

mesh: devices along data, fsdp, expert and tensor. Prints a line for each process: MB read (by
system calls, from disk or page cache), peak resident memory above the level before loading, the
process's share of the checkpoint (the data on its devices, including replicas, which simulated
devices share), and seconds.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

KEYS = ("read", "peak", "share")


def write(target: Path, megabytes: int) -> None:
    """Write a Mixtral with random weights of about this many megabytes; more megabytes give more
    layers."""
    from btx_jax.architectures.tensors import slots
    from btx_jax.checkpoints.checkpoint import write_checkpoint
    from btx_jax.config.model_config import ModelConfig, MoEConfig

    width, hidden, experts = (1024, 512, 4) if megabytes < 400 else (2048, 4096, 8)
    layers = max(1, round(megabytes * 1e6 / (2 * 3 * experts * width * hidden)))
    model = ModelConfig(
        vocab_size=1024,
        layers=layers,
        d_model=width,
        d_ff=hidden,
        heads=16,
        kv_heads=8,
        head_dim=width // 16,
        context=512,
        moe=MoEConfig((experts,) * layers, k=2),
    )
    places, bfloat16 = slots(model), np.dtype(ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)
    write_checkpoint(
        target,
        True,
        model,
        dict.fromkeys(places, bfloat16),
        lambda t: rng.integers(0x3C00, 0x3E00, places[t].shape, np.uint16).view(bfloat16),
        None,
        history={},
        huggingface={},
        card="",
        check=lambda: None,
        verb="writing",
    )


def status(file: str, key: str) -> int:
    """The number after `key` in /proc/self/FILE."""
    found = re.search(rf"^{key}:\s+(\d+)", Path("/proc/self", file).read_text(), re.MULTILINE)
    assert found, key
    return int(found[1])


def load(path: Path, mesh: tuple[int, ...], dtype: str) -> dict[str, float]:
    """Load in this process; returns bytes and seconds."""
    from btx_jax.parallel import hosts

    hosts.start()
    import jax
    from flax import linen as nn
    from jax.experimental import multihost_utils

    from btx_jax.checkpoints.checkpoint import find_checkpoint, load_params
    from btx_jax.models.llama import abstract_params
    from btx_jax.parallel.sharding import make_mesh, param_shardings

    found = find_checkpoint(path)
    boxed = abstract_params(found.metadata.model)
    shardings = param_shardings(boxed, make_mesh(mesh))  # type: ignore[arg-type]
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), nn.unbox(boxed), shardings
    )
    multihost_utils.process_allgather(np.zeros(4096, np.uint8))  # compiled once
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    held, read, start = status("status", "VmRSS"), status("io", "rchar"), time.monotonic()
    params = jax.block_until_ready(load_params(found, abstract))
    share = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
    return {
        "process": jax.process_index(),
        "read": status("io", "rchar") - read,
        "peak": 1024 * (status("status", "VmHWM") - held),
        "share": share,
        "seconds": time.monotonic() - start,
    }


def load_in_two(path: Path, mesh: str, dtype: str) -> list[dict[str, float]]:
    """The results of `load` in two processes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    root = Path(__file__).parent.parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, __file__, f"--load={path}", f"--mesh={mesh}", f"--dtype={dtype}"]
    both = [
        subprocess.Popen(
            command,
            env=environment | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    return [json.loads(process.communicate(timeout=600)[0].splitlines()[-1]) for process in both]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=1500)
    parser.add_argument("--mesh", default="1,2,4,1")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    mesh = tuple(map(int, args.mesh.split(",")))
    if args.load:
        print(json.dumps(load(args.load, mesh, args.dtype)))
        return
    folder = Path(tempfile.mkdtemp(prefix="btx_jax-read-"))
    try:
        write(folder / "model", args.megabytes)
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        print(f"{size / 1e6:.0f} MB, mesh {args.mesh}, held in {args.dtype}; MB:")
        print(f"{'process':>8}" + "".join(f"{key:>8}" for key in (*KEYS, "seconds")))
        for told in load_in_two(folder / "model", args.mesh, args.dtype):
            numbers = "".join(f"{told[key] / 1e6:8.0f}" for key in KEYS)
            print(f"{told['process']:8}{numbers}{told['seconds']:8.1f}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
