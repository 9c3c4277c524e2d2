"""Cost of checksums: saving and loading a run's parameters, and writing and reading safetensors,
with and without checksums, alternating in one run.

    python benchmarks/checksums.py [--rounds=7] [--megabytes=256]

Prints processor and wall-clock seconds, the minimum of all rounds for each variant, and their ratio
(with / without): 1.02 is an overhead of 2 %. The sha256 of exported files is computed on another
core while writing; processor seconds include it.
"""

import argparse
import hashlib
import shutil
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import xxhash

from btx_jax.checkpoints import safetensors_files, training_state
from btx_jax.config.config import CheckpointConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.models.llama import init_params

CHECKED = training_state.tensorstore_utils._build_zarr3_metadata


def model_of(megabytes: int) -> ModelConfig:
    layers = max(1, round(megabytes * 1e6 / 4 / (4 * 1024**2 + 3 * 1024 * 4096)))
    return ModelConfig(
        vocab_size=256,
        layers=layers,
        d_model=1024,
        d_ff=4096,
        heads=16,
        kv_heads=16,
        head_dim=64,
        context=512,
    )


class Unhashed:
    """Stands in for a sha256 object, without hashing anything."""

    def update(self, data) -> None:
        pass

    def hexdigest(self) -> str:
        return "0"


def set_checksums(wanted: bool) -> None:
    def unchecked(*args):
        metadata = CHECKED(*args)
        metadata["codecs"] = metadata["codecs"][:-1]
        return metadata

    chunks = CHECKED if wanted else unchecked
    training_state.tensorstore_utils._build_zarr3_metadata = chunks
    off = types.SimpleNamespace(sha256=Unhashed, xxh3_64_hexdigest=lambda data: "0")
    for library in (hashlib, xxhash):
        setattr(safetensors_files, library.__name__, library if wanted else off)


def timed(act: Callable[[], object]) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    act()
    return time.process_time() - processor, time.perf_counter() - clock


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=256)
    args = parser.parse_args()
    model = model_of(args.megabytes)
    params = init_params(model, jax.random.key(0))
    metadata = training_state.CheckpointMetadata(model, 1, {})
    tensors = {name: np.asarray(leaf) for name, leaf in training_state.named_leaves(params).items()}
    announced = {name: (leaf.shape, leaf.dtype) for name, leaf in tensors.items()}
    folder = Path(tempfile.mkdtemp(prefix="btx_jax-checksums-"))

    def save() -> None:
        checkpoints = training_state.Checkpoints(folder / "run", CheckpointConfig())
        checkpoints.save(metadata, params)
        checkpoints.close()

    def load() -> None:
        step = folder / "run" / "checkpoints" / "1"
        jax.block_until_ready(training_state.restore_params(step, metadata, params))

    def write() -> None:
        writer = safetensors_files.ShardWriter(folder, announced)
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()

    def read() -> None:
        file = safetensors_files.SafetensorsFile(folder / safetensors_files.SINGLE)
        for name in tensors:
            file.read(name)

    actions = {"save a run": save, "load a run": load, "write safetensors": write}
    actions["read safetensors"] = read
    taken: dict[str, dict[bool, list[tuple[float, float]]]] = {
        name: {True: [], False: []} for name in actions
    }
    try:
        for number in range(args.rounds + 1):  # the first is a warm-up
            for wanted in (True, False) if number % 2 else (False, True):
                set_checksums(wanted)
                shutil.rmtree(folder)
                folder.mkdir()
                for name, act in actions.items():
                    took = timed(act)
                    if number:
                        taken[name][wanted].append(took)
    finally:
        shutil.rmtree(folder)
    size = sum(leaf.nbytes for leaf in tensors.values())
    print(f"{size / 1e6:.0f} MB of float32, {args.rounds} rounds, with checksums / without")
    for name, both in taken.items():
        told = []
        for which, of in enumerate(("processor", "clock")):
            least = {wanted: min(took[which] for took in both[wanted]) for wanted in both}
            told.append(f"{of} {least[True]:.3f} s / {least[False]:.3f} s")
            told[-1] += f" = {least[True] / least[False]:.3f}"
        print(f"{name:18} {', '.join(told)}")


if __name__ == "__main__":
    main()
