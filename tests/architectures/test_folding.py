"""Parameterless LayerNorms read as RMSNorms."""

import numpy as np

from btx_jax.architectures.folding import Folded
from btx_jax.architectures.tensors import EMBEDDING
from btx_jax.checkpoints.checkpoint import find_checkpoint, open_reader
from tests.architectures import goldens


def test_what_is_added_to_the_stream_has_no_mean_and_all_else_is_as_it_was():
    plain = open_reader(find_checkpoint(goldens.FOLDER / "olmo"))
    read = Folded(plain)
    assert (plain.model.norm, read.model.norm) == ("layer", "rms")
    moved = set()
    for tensor in read.slots:
        array = read.read(tensor)
        assert not array.flags.writeable
        if tensor.part.endswith("norm/scale"):
            assert tensor not in plain.slots and (array == 1).all()
            continue
        before = plain.read(tensor)
        if array.tobytes() == before.tobytes():
            continue
        moved.add(tensor.part)
        axis = 1 if tensor == EMBEDDING else 0
        assert array.dtype == np.float32 and np.abs(array.mean(axis)).max() < 1e-7
        offset = before.astype(np.float32) - array
        assert np.ptp(offset, axis=axis).max() < 1e-6, tensor
    assert moved == {"embed/embedding", "attention/out", "ffn/down"}


def test_a_region_is_a_part_of_the_whole():
    read = Folded(open_reader(find_checkpoint(goldens.FOLDER / "olmo")))
    for tensor, slot in read.slots.items():
        region = tuple((size // 3, size) for size in slot.part)
        whole = slot.to_ours(read.read(tensor))
        wanted = whole[tuple(slice(start, stop) for start, stop in region)]
        assert read.read_region(tensor, region).tobytes() == wanted.tobytes(), tensor
