"""What `remat='auto'` becomes, on slices whose memory the TPU compiler has told (docs/tpu.md,
docs/models.md)."""

import jax
import pytest

from btx_jax.planning.compile_check import topology_devices
from btx_jax.presets.config_file import read_config
from btx_jax.training.start import checked_mesh, trained_model
from btx_jax.training.step import decided

ROWS = "--config.train.accumulate=16"  # 64 rows a micro-batch, one a chip


def remat_of(preset, devices, *overrides):
    name, _, size = preset.partition(":")
    config = read_config(f"configs/{name}.py:{size or 'llama2_7b'}", overrides)
    model = trained_model(config, config.model)
    mesh = checked_mesh(config, model, devices)
    compute = decided(model, config.compute, config.train, mesh, config.data.sequence_length)
    return compute.remat


@pytest.mark.parametrize(
    ("preset", "topology", "overrides", "remat"),
    [
        ("math_expert", "v5p:2x2x2", (), "ffn"),
        ("math_expert", "v6e:4x4", (), "attention"),  # ffn fits, and is slower
        ("math_expert", "v5e:4x4", (), "full"),  # takes 14.5 GiB of 15.8 so
        ("moe_finetune", "v5p:2x2x4", (), "ffn"),
        ("moe_finetune", "v5e:8x8", (ROWS,), "full"),
        ("moe_finetune:granite3_8b", "v6e:8x8", (ROWS,), "attention"),  # ffn: 32.0 GiB of 31.25
        ("moe_finetune:olmo2_7b", "v6e:8x8", (ROWS,), "attention"),  # ffn: 32.0 GiB
        ("moe_finetune:gemma3_4b", "v6e:8x8", (ROWS,), "attention"),  # ffn: 41.3 GiB
    ],
)
def test_as_much_is_kept_as_the_chip_holds(preset, topology, overrides, remat):
    assert remat_of(preset, topology_devices(topology, 1), *overrides) == remat


def test_more_rows_a_chip_leave_less_room():
    devices = topology_devices("v6e:4x4", 1)
    kept = [
        remat_of("math_expert", devices, f"--config.train.accumulate={count}")
        for count in (64, 32, 16, 8)
    ]
    assert kept == ["attention", "attention", "full", "full"]


def test_where_the_memory_is_not_known_little_is_kept():
    assert remat_of("math_expert", jax.devices("cpu")[:1]) == "full"


def test_what_is_chosen_by_hand_stays():
    devices = topology_devices("v5e:4x4", 1)
    assert remat_of("math_expert", devices, "--config.compute.remat=ffn") == "ffn"
