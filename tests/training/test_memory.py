"""What `remat='auto'` and `accumulate=0` become, on slices whose memory the TPU compiler has told
(docs/tpu.md, docs/models.md)."""

import jax
import pytest

from btx_jax.config.config import ComputeConfig, TrainConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.errors import ConfigError
from btx_jax.parallel.sharding import make_mesh
from btx_jax.planning.compile_check import topology_devices
from btx_jax.presets.config_file import read_config
from btx_jax.training.memory import chosen
from btx_jax.training.start import checked_mesh, trained_model
from btx_jax.training.step import decided, shard_bytes, state_shardings


def choices(preset, devices, *overrides):
    """(remat, sequences of a device in a micro-batch)."""
    name, _, size = preset.partition(":")
    if size == "ragged":
        size, overrides = "", ("--config.compute.dispatch=ragged", *overrides)
    config = read_config(f"configs/{name}.py:{size or 'llama2_7b'}", overrides)
    model = trained_model(config, config.model)
    mesh = checked_mesh(config, model, devices)
    length = config.data.sequence_length
    compute, train = decided(model, config.compute, config.train, mesh, length)
    return compute.remat, train.batch_size / train.accumulate / len(devices)


@pytest.mark.parametrize(
    ("preset", "topology", "remat", "rows"),
    [
        ("math_expert", "v5p:2x2x2", "ffn", 4),
        ("math_expert", "v6e:4x4", "attention", 2),  # ffn fits, and is slower
        ("math_expert", "v5e:4x4", "full", 1),  # takes 14.5 GiB of 15.8 so
        ("moe_finetune", "v5p:2x2x4", "ffn", 2),
        ("moe_finetune", "v5e:8x8", "full", 1),
        ("moe_finetune", "v6e:8x8", "full", 4),  # 22.4 GiB
        ("moe_finetune:ragged", "v6e:8x8", "full", 4),  # 24.6 GiB of 31.3
        ("moe_finetune:ragged", "v5p:2x2x4", "attention", 4),  # 66.4 GiB of 95.7
        ("moe_finetune:granite3_8b", "v6e:8x8", "full", 2),
        ("moe_finetune:olmo2_7b", "v6e:8x8", "full", 2),
        ("moe_finetune:gemma3_4b", "v6e:8x8", "attention", 2),  # ffn: 41.3 GiB, one row 18.8
    ],
)
def test_as_much_is_kept_as_the_chip_holds(preset, topology, remat, rows):
    assert choices(preset, topology_devices(topology, 1)) == (remat, rows)


def test_more_rows_a_chip_leave_less_room():
    devices = topology_devices("v6e:4x4", 1)
    kept = [
        choices("math_expert", devices, f"--config.train.accumulate={count}")
        for count in (64, 32, 16, 8)
    ]
    assert kept == [("attention", 1), ("attention", 2), ("full", 4), ("full", 8)]


def test_where_the_memory_is_not_known_little_is_kept_and_each_device_has_one_row():
    assert choices("math_expert", jax.devices("cpu")[:1]) == ("full", 1)
    assert choices("math_expert", jax.devices("cpu")[:8]) == ("full", 1)


def test_what_is_chosen_by_hand_stays():
    devices = topology_devices("v5e:4x4", 1)
    assert choices("math_expert", devices, "--config.compute.remat=ffn") == ("ffn", 1)
    by_hand = choices("math_expert", devices, "--config.train.accumulate=8")
    assert by_hand == ("full", 8)
    for remat in ("none", "offload"):  # whose memory is not estimated
        assert choices("math_expert", devices, f"--config.compute.remat={remat}") == (remat, 1)


def test_a_batch_that_no_device_count_divides_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size=1000: not divisible .*multiple of 16"):
        choices("math_expert", topology_devices("v5e:4x4", 1), "--config.train.batch_size=1000")


def test_a_gpu_tells_how_much_of_its_memory_xla_has_reserved(monkeypatch):
    """Llama 3.2 1B, two rows of 4,096 tokens. On an H200 they took 25.6 GiB with ffn. The scores of
    XLA's attention take 1.7 GiB per row."""
    device = jax.devices("cpu")[0]
    mesh = make_mesh((1, 1, 1, 1), [device])
    model = ModelConfig(
        vocab_size=128_256, layers=16, d_model=2048, d_ff=8192, heads=32, kv_heads=8, head_dim=64,
        context=4096, tied_head=True,
    )  # fmt: skip
    train = TrainConfig(steps=1000, batch_size=2)
    state, _ = state_shardings(model, train, mesh)
    sizes = shard_bytes(state), shard_bytes(state.params)

    def remat(gibibytes, kernels, dtype="bfloat16", mesh=mesh):
        class Device:
            device_kind = device.device_kind
            memory_stats = staticmethod(lambda: {"bytes_limit": int(gibibytes * 2**30)})

        monkeypatch.setattr(jax, "local_devices", lambda: [Device])
        compute = ComputeConfig(kernels=kernels, dtype=dtype)
        return chosen(model, compute, train, mesh, 4096, *sizes)[0]

    assert [remat(size, "cuda") for size in (30, 43.7, 48)] == ["full", "attention", "ffn"]
    assert [remat(size, "xla") for size in (43.7, 48, 53)] == ["full", "attention", "ffn"]
    assert remat(60, "cuda", "float32") == remat(60, "xla", "float32") == "attention"
    shared = make_mesh((1, 1, 1, 1, 2), jax.devices("cpu")[:2])  # each row over two devices
    for size in range(30, 60):
        assert remat(size, "cuda", mesh=shared) == remat(size, "xla", mesh=shared)
