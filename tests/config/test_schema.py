"""Every number of every config states its range, and all mistakes in a config are reported at
once."""

import copy
import dataclasses
import math
import time
import typing
from collections.abc import Mapping
from typing import Annotated

import pytest

from btx_jax.config.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EnsembleConfig,
    EvaluateConfig,
    FormatConfig,
    MeshConfig,
    MixConfig,
    OracleConfig,
    PipelineStage,
    ReportConfig,
    TaskConfig,
    TrainConfig,
)
from btx_jax.config.config_dict import to_dict
from btx_jax.config.merges import MERGE_SETTINGS, READ_BASE
from btx_jax.config.model_config import LoRAConfig, ModelConfig, MoEConfig, RopeScaling
from btx_jax.config.schema import Range, Section, from_dict
from btx_jax.errors import ConfigError

LONGROPE = RopeScaling("longrope", short_factors=(1.0,) * 8, long_factors=(2.0,) * 8)
MODEL = ModelConfig(
    320, 4, 32, 64, 2, 2, 16, rope_scaling=LONGROPE, moe=MoEConfig((4,) * 4, shared_d_ff=8),
    nope_layers=(1,), window_layers=(2,),
)  # fmt: skip
WHOLE = to_dict(
    Config(
        "train",
        init="scratch",
        model=MODEL,
        lora=LoRAConfig(),
        compute=ComputeConfig(),
        train=TrainConfig(1000, 8),
        data=DataConfig("a.txt", formats={"f": FormatConfig("{q}", "{a}")}),
        mesh=MeshConfig(fsdp=1),
        checkpoint=CheckpointConfig(),
        mix=MixConfig(("a", "b"), router="ridge", text=("c", "d")),
        evaluate=EvaluateConfig(
            {"m": "a", "n": "b"},
            tasks={"t": TaskConfig("exact_match", "t.jsonl", "{q}")},
            ensembles={"e": EnsembleConfig({"m": "x", "n": "y"})},
            oracles={"o": OracleConfig("m", {"x": 0})},
        ),
        report=ReportConfig("a"),
        pipeline={"s": PipelineStage(Config("report", report=ReportConfig("a")))},
    )
)
ODD = [math.nan, math.inf, -math.inf, -1, 0, 10**30, 10**6000, 1.5, True, "1", [1], None]

# What of ODD is meant to be possible; all else is refused.
ZERO = {
    "CountOrZero": ("warmup_steps", "eval_every", "limit", "rows", "rng_seed"),
    "test sets": ("eval_tasks_every", "eval_tasks_limit"),
    "off": (
        "cutoff",
        "every_minutes",
        "shots",
        "shown_tokens",
        "heldout_fraction",
        "dropout",
        "t.temperature",
    ),
    "by what it starts from": ("learning_rate",),
    "by the memory": ("accumulate",),
    "weights": ("weight_decay", "balance_weight", "z_loss_weight"),
    "others": ("final_lr_fraction", "beta1", "beta2", "norm_eps", "experts", "penalty"),
    "none": ("window", "shared_d_ff", "reinit", "scale", "mix.t", "mix.alpha"),
    "that of a dense layer": ("moe.d_ff",),
    "the first": ("nope_layers", "window_layers"),
    "the usual": ("window_theta", "attention_scale", "attention_cap", "logits_cap"),
    "none of it": ("query_growth",),
}
POSSIBLE = {
    0: {name for names in ZERO.values() for name in names},
    -1: {
        "data",
        "fsdp",
        "expert",
        "tensor",
        "mesh.context",
        "scale",
    },  # all remaining devices, but scale
    1.5: {
        *("capacity_factor", "learning_rate", "eps", "clip_norm", "weight_decay", "temperature"),
        *("balance_weight", "z_loss_weight", "router_std", "lora.alpha", "rope_theta", "factor"),
        *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"),
        *("short_factors", "long_factors", "penalty", "scale", "window_theta", "attention_cap"),
        *("logits_divisor", "logits_cap", "query_growth", "embed_scale", "residual_scale"),
        *("attention_scale", "every_minutes"),
    },
    10**30: {
        *("learning_rate", "eps", "clip_norm", "rope_theta", "factor", "high_freq_factor"),
        *("beta_fast", "beta_slow", "attention_factor", "short_factors", "long_factors"),
        *("penalty", "scale", "window_theta"),
    },
}


def parts(hint):
    """A type and all types within it."""
    inner = () if typing.get_origin(hint) is Annotated else typing.get_args(hint)
    return [hint, *(part for each in inner for part in parts(each))]


def hints(section):
    return typing.get_type_hints(section, include_extras=True)


def sections(section, found=()):
    """Every dataclass that a section can hold, itself first."""
    found = [*found, section]
    for part in (part for hint in hints(section).values() for part in parts(hint)):
        if dataclasses.is_dataclass(part) and part not in found:
            found = sections(part, found)
    return found


def numbers(hint):
    """The numbers within a type, as (kind, bounds)."""
    if typing.get_origin(hint) is Annotated:
        return [(hint.__origin__, hint.__metadata__)] if hint.__origin__ in (int, float) else []
    if hint in (int, float):
        return [(hint, ())]
    return [found for inner in typing.get_args(hint) for found in numbers(inner)]


def leaves(values, section, key=()):
    """(path, class, field) of every number of a section's values; of several, the first."""
    for name, value in values.items():
        hint = hints(section)[name]
        within = [part for part in parts(hint) if dataclasses.is_dataclass(part)]
        if numbers(hint):
            places = [*value] if isinstance(value, dict) else [0] * isinstance(value, list)
            yield (*key, name, *places[:1]), section, name
        elif within and any(typing.get_origin(part) is Mapping for part in parts(hint)):
            for entry, inner in value.items():
                yield from leaves(inner, within[0], (*key, name, entry))
        elif within:
            yield from leaves(value, within[0], (*key, name))


def changed(*changes):
    values = copy.deepcopy(WHOLE)
    for path, value in changes:
        *parents, leaf = path
        target = values
        for name in parents:
            target = target[name]
        target[leaf] = value
    return values


LEAVES = list(leaves(WHOLE, Config))


def test_every_number_states_its_range():
    every = set()
    for section in sections(Config):
        assert issubclass(section, Section), f"{section.__name__} does not check itself"
        for name, hint in hints(section).items():
            for kind, bounds in numbers(hint):
                assert [type(bound) for bound in bounds] == [Range], (
                    f"{section.__name__}.{name}: {kind.__name__} without a Range"
                )
                every.add((section, name))
    assert {(section, name) for _, section, name in LEAVES} == every, "numbers that no test tries"


def mistakes(values):
    try:
        from_dict(Config, values)
    except ConfigError as error:
        return error.args
    return ()


def read_by(path):
    """What must be changed besides, for a setting to be read."""
    readers = [
        name for name, keys in MERGE_SETTINGS.items() if path[0] == "mix" and path[1] in keys
    ]
    yield from ((("mix", "merge"), name) for name in readers[:1])
    yield from ((("mix", "base"), "seed") for name in readers[:1] if name in READ_BASE)


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, _, name in LEAVES], ids=lambda x: str(x)
)
def test_a_number_is_in_its_range_or_refused_by_its_key(path, name):
    key = "config." + ".".join(str(part) for part in path if part != 0)
    for value in ODD:
        is_plain = isinstance(value, int | float) and value is not True
        possible = is_plain and {name, ".".join(map(str, path[-2:]))} & {*POSSIBLE.get(value, ())}
        told = mistakes(changed((path, value), *read_by(path)))
        assert len(told) == (0 if possible else 1), f"{key}={str(value)[:40]}: {told}"
        for line in told:
            assert line.startswith(key) and "\n" not in line and len(line) < 400
            assert any(word in line for word in ("must be", "must lie", "must not", ": missing"))


def test_all_mistakes_are_told_at_once_each_with_its_whole_key():
    values = changed(
        (("train", "stepz"), 5),
        (("train", "steps"), 0),
        (("train", "accumulate"), 3),
        (("train", "batch_size"), "8"),
        (("model", "heads"), 3),
        (("model", "norm_eps"), math.nan),
        (("mix", "experts"), "runs/a"),
        (("evaluate", "tasks", "t", "stop"), "\n"),
        (("evaluate", "models", "m"), 3),
        (("report", "others"), "runs/b"),
        (("compute", "remat"), "fulll"),
        (("lora", "targets"), "q"),
        (("pipeline", "s", "needs"), ["nobody"]),
        (("pipeline", "s", "config", "report", "evaluate"), None),
        (("modle",), {}),
    )
    del values["mesh"]
    with pytest.raises(ConfigError) as error:
        from_dict(Config, values)
    keys = [told.partition(":")[0].partition("=")[0] for told in error.value.args]
    assert keys == [
        "config.modle",
        "config.model.norm_eps",
        "config.model.heads",
        "config.lora.targets",
        "config.compute.remat",
        "config.train.stepz",
        "config.train.steps",
        "config.train.batch_size",
        "config.mix.experts",
        "config.evaluate.models.m",
        "config.evaluate.tasks.t.stop",
        "config.report.others",
        "config.pipeline.s.config.report.evaluate",
        "config.mesh",
    ]
    line = str(error.value)
    assert line.startswith("14 mistakes: (1) config.modle: unknown key; did you mean 'model'?")
    assert "config.mix.experts='runs/a': must be a list; write ('runs/a',)" in line
    assert "did you mean 'steps'?" in line and "did you mean 'full'?" in line
    assert "\n" not in line


def test_rules_over_several_fields_wait_for_the_fields_they_read_and_no_others():
    values = changed(
        (("train", "learning_rate"), -1), (("train", "accumulate"), 3), (("train", "steps"), 7)
    )
    with pytest.raises(ConfigError) as error:
        from_dict(Config, values)
    assert [told.partition("=")[0] for told in error.value.args] == [
        "config.train.learning_rate",
        "config.train.accumulate",
        "config.train.warmup_steps",
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ((("model", "layers"), 10**6), "layers=1000000: must be at most 10000"),
        ((("model", "moe", "experts"), [10**8] * 4), "experts[0]=100000000: must be at most 4096"),
        ((("mix", "copies"), 10**8), "copies=100000000: must be at most 4096"),
        ((("mix", "experts"), ["a"] * 5000), "make 5000 experts per layer; use at most 4096"),
        ((("mix", "experts"), ["a"] * 50_000), "50000 entries, but at most 10000"),
        ((("evaluate", "texts"), {str(i): "a" for i in range(50_000)}), "50000 names"),
        (
            (("evaluate", "texts"), {"a": "b" * 10**7}),
            "has 10000000 characters, but at most 100000",
        ),
        ((("evaluate", "texts"), {5: "b"}), "5 is not a name"),
        ((("lora", "rank"), [10**9]), "rank=1000000000: must be at most 65536"),
        ((("rng_seed",), 2**32), "rng_seed=4294967296: must be at most 4294967295"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_nobody_can_mean_is_refused_before_it_fills_the_memory(change, told):
    began = time.monotonic()
    line = str(ConfigError(*mistakes(changed(change))))
    assert told in line and len(line) < 1000
    assert time.monotonic() - began < 5


def test_50_000_unknown_keys_are_counted_not_listed():
    with pytest.raises(ConfigError, match=r"config\.\*: 49990 more unknown keys") as error:
        from_dict(Config, WHOLE | {f"key{i}": 1 for i in range(50_000)})
    assert len(str(error.value)) < 8000


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "a b", "é/", "x" * 200])
def test_a_stage_is_named_as_its_directory_can_be(name):
    stage = Config("report", report=ReportConfig("a"))
    with pytest.raises(ConfigError, match=r"is not a name|not a valid stage name"):
        Config("pipeline", pipeline={name: PipelineStage(stage)})


def test_models_as_large_as_the_largest_real_ones_are_possible_and_no_larger():
    llama = ModelConfig(128_256, 126, 16_384, 53_248, 128, 8, 128)
    dataclasses.replace(llama, lora=LoRAConfig(",".join(["1024"] * 126)))
    experts = MoEConfig((0,) * 3 + (256,) * 58, k=8)
    ModelConfig(129_280, 61, 7168, 2048, 128, 128, 192, moe=experts)
    ModelConfig(163_840, 61, 7168, 2048, 64, 64, 192, moe=MoEConfig((384,) * 61, k=8))
    with pytest.raises(ConfigError, match=r"1e\+14 parameters; lower one of them, at most 1e\+13"):
        dataclasses.replace(llama, layers=1000, moe=MoEConfig((38,) * 1000))
    with pytest.raises(ConfigError, match="parameters; lower one of them"):
        dataclasses.replace(llama, lora=LoRAConfig(",".join(["4096"] * 126), rank=(4096,)))
    many = MoEConfig((4096,) * 10_000)
    with pytest.raises(ConfigError, match=r"moe\.experts: 40960000 experts over layers=10000"):
        ModelConfig(16, 10_000, 8, 1, 1, 1, 2, moe=many)
    with pytest.raises(ConfigError, match="200 runs of equal layers"):
        ModelConfig(320, 200, 32, 64, 2, 2, 16, moe=MoEConfig((4, 0) * 100))
    with pytest.raises(
        ConfigError, match=r"lora\.allocation=.*experts in layer 0, but at most 4096"
    ):
        dataclasses.replace(llama, lora=LoRAConfig("triangle:99999999"))


def test_a_section_made_directly_checks_itself_too():
    with pytest.raises(ConfigError, match=r"experts='runs/a': must be a list; write \('runs/a',\)"):
        MixConfig("runs/a")
    with pytest.raises(ConfigError) as error:
        TrainConfig(0, 8, learning_rate=math.inf, accumulate=3)
    assert len(error.value.args) == 3
    with pytest.raises(ConfigError, match="steps: missing"):
        TrainConfig(None, 8)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            [(("profile", "steps"), "13:10"), (("checkpoint", "best"), "lowest")],
            [
                "config.checkpoint.best='lowest': must be heldout, heldout/DOMAIN/nats_per_token,"
                " heldout/DOMAIN/bits_per_byte, tasks/NAME/METRIC, or '' for none",
                "config.profile.steps='13:10': must be FIRST:END with 1 <= FIRST < END, such"
                " as 10:13 for steps 10, 11 and 12",
            ],
        ),
        (
            [(("profile", "steps"), "3:5"), (("stage",), "mix")],
            ["config.profile.steps='3:5': only used by"],
        ),
        (
            [(("profile", "steps"), "99:102")],
            ["config.profile.steps='99:102': the last step is train.steps="],
        ),
        (
            [(("checkpoint", "best"), "tasks/arc/accuracy")],
            ["config.checkpoint.best: no 'arc' in train.eval_tasks; none"],
        ),
        ([(("checkpoint", "best"), "tasks/a/b/c")], ["config.checkpoint.best='tasks/a/b/c': must"]),
    ],
    ids=str,
)
def test_what_cannot_be_looked_at_is_told_with_its_whole_key(changes, told):
    steps = [(("train", "steps"), 100), (("train", "warmup_steps"), 1), (("stage",), "train")]
    found = mistakes(changed(*steps, *changes))
    assert len(found) == len(told) and all(map(str.startswith, found, told)), found
