"""The paper's runs as functions that config files call: at Llama-2-7B scale (BTX section 4), and
`tiny`, the same recipe at a size for a laptop CPU on the demo corpora. What differs between the two
is data, size and steps, never the method."""

import dataclasses

import ml_collections

from btx_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    MeshConfig,
    MixConfig,
    PipelineStage,
    ReportConfig,
    TaskConfig,
    TrainConfig,
)
from btx_jax.config_dict import from_config_dict, to_config_dict
from btx_jax.costs.model import train_flops
from btx_jax.errors import ConfigError
from btx_jax.experiments import GROUPS, Setting
from btx_jax.experiments import comparison as arms
from btx_jax.model_config import LORA_TARGETS, ModelConfig, MoEConfig, RopeScaling

LLAMA2_7B = ModelConfig(
    vocab_size=32_000,
    layers=32,
    d_model=4096,
    d_ff=11_008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    context=4096,
)
MODELS = {
    "llama2_7b": LLAMA2_7B,
    "llama3_8b": ModelConfig(
        vocab_size=128_256, layers=32, d_model=4096, d_ff=14_336, heads=32, kv_heads=8, head_dim=128, rope_theta=500_000.0, context=8192
    ),
    "llama31_8b": ModelConfig(
        vocab_size=128_256, layers=32, d_model=4096, d_ff=14_336, heads=32, kv_heads=8, head_dim=128, rope_theta=500_000.0,
        rope_scaling=RopeScaling("llama3", factor=8.0), context=131_072,
    ),
    # v0.1: its window of 4096 is the context, see `convert`.
    "mistral_7b": ModelConfig(vocab_size=32_000, layers=32, d_model=4096, d_ff=14_336, heads=32, kv_heads=8, head_dim=128, context=4096),
    "tiny": ModelConfig(vocab_size=2048, layers=4, d_model=128, d_ff=352, heads=4, kv_heads=4, head_dim=32, tied_head=True, context=256),
}  # fmt: skip
TINY, FROM_INIT = "tiny", "from_init"

# The paper's domains; the shares inside a domain are its Table 7 (normalised, they sum to 102.98
# and 99.01 there).
PAPER_DOMAINS = {
    "math": (
        "$BTX_DATA_DIR/proof-pile-2/algebraic-stack/*.jsonl.zst:13.57,$BTX_DATA_DIR/proof-pile-2/open-web-math/*.jsonl.zst:54.27,"
        "$BTX_DATA_DIR/proof-pile-2/arxiv/*.jsonl.zst:27.14,$BTX_DATA_DIR/github/*.jsonl.zst:2.99,$BTX_DATA_DIR/common-crawl/*.jsonl.zst:5.01"
    ),
    "code": (
        "$BTX_DATA_DIR/code/*.jsonl.zst:82.18,$BTX_DATA_DIR/code-text/*.jsonl.zst:9.90,$BTX_DATA_DIR/common-crawl/*.jsonl.zst:6.93"
    ),
    "wiki": "$BTX_DATA_DIR/wikipedia/*.parquet:90.91,$BTX_DATA_DIR/common-crawl/*.jsonl.zst:9.09",
    "general": "$BTX_DATA_DIR/common-crawl/*.jsonl.zst",
}
# The corpora stand in for the paper's: world for Wikipedia, prose for CommonCrawl and for the
# seed's own text.
TINY_DOMAINS = {name: f"demo:{name}" for name in ("math", "code", "world", "prose")}

# domain name of an expert -> what it trains on, tiny, and its tokens in the paper
EXPERTS = {
    "math": ("math:94.99,prose:5.01", 201e9),
    "code": ("code:93.07,prose:6.93", 210e9),
    "wiki": ("world:90.91,prose:9.09", 42e9),
}
MIX_PAPER = "math:30.16,code:40.31,wiki:10.30,general:19.23"
MIX_TINY = "math:30.16,code:40.31,world:10.30,prose:19.23"
SEED_TINY = "prose:70,math:10,code:10,world:10"

EVALS = "$BTX_DATA_DIR/evals"
# Test sets with the prompts that lm-evaluation-harness gives them.
TASKS = {
    "arc_easy": TaskConfig("multiple_choice", f"{EVALS}/arc_easy.jsonl.gz", "{query}\nAnswer:"),
    "piqa": TaskConfig("multiple_choice", f"{EVALS}/piqa.jsonl.gz", "{query}Answer:"),
    "openbook_qa": TaskConfig("multiple_choice", f"{EVALS}/openbook_qa.jsonl.gz", "{query}"),
    "commonsense_qa": TaskConfig("multiple_choice", f"{EVALS}/commonsense_qa.jsonl.gz", "{query}"),
    "gsm8k": TaskConfig(
        "exact_match",
        f"{EVALS}/gsm8k.jsonl.gz",
        "Question: {context}\nAnswer:",
        stop=("\n\n", "\nQuestion:"),
    ),
    "humaneval": TaskConfig(
        "code",
        f"{EVALS}/humaneval.jsonl.gz",
        "{prompt}",
        max_tokens=384,
        stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("),
    ),
}

MOE_TOKENS = 80e9
TOKENS_PER_STEP = 1024 * 4096


def _model(size: str) -> ModelConfig:
    if size not in MODELS:
        raise ConfigError(f"--config=...:{size}: no such size; known: {', '.join(MODELS)}")
    return MODELS[size]


def _compute(size: str, is_moe: bool = False) -> ComputeConfig:
    """At 7B: what a 95 GiB chip holds at one sequence of 4096. Einsum dispatch computes a quarter
    more than it must already."""
    if size == TINY:
        return ComputeConfig(dtype="float32", remat="none", unroll=4, group_size=64, loss_chunk=512)
    return ComputeConfig(remat="ffn" if is_moe else "full")


def _data(size: str, train: str, **kwargs) -> DataConfig:
    if size == TINY:
        return DataConfig(
            train, domains=TINY_DOMAINS, sequence_length=256, heldout_fraction=0.05, **kwargs
        )
    return DataConfig(
        train, domains=PAPER_DOMAINS, sequence_length=4096, heldout_fraction=0.0005, **kwargs
    )


def _train(
    size: str,
    tokens: float,
    tiny_steps: int,
    tiny_rate: float,
    rate: float = 1e-4,
    warmup: int = 100,
) -> TrainConfig:
    if size == TINY:
        return TrainConfig(
            tiny_steps,
            batch_size=8,
            learning_rate=tiny_rate,
            warmup_steps=20,
            eval_every=50,
            eval_rows=16,
        )
    steps = round(tokens / TOKENS_PER_STEP)
    return TrainConfig(
        steps,
        batch_size=1024,
        accumulate=64,
        learning_rate=rate,
        warmup_steps=warmup,
        eval_every=1000,
        eval_rows=1024,
    )


def _checkpoint(size: str) -> CheckpointConfig:
    return CheckpointConfig(every=50 if size == TINY else 500)


def _training(
    size: str,
    train: TrainConfig,
    data: DataConfig,
    init: str = "",
    mesh: MeshConfig | None = None,
    is_moe: bool = False,
) -> Config:
    """A tiny run takes its model from `init`; the others must find the model they name there."""
    model = _model(size) if init == "scratch" or size != TINY else None
    if model and is_moe:
        model = dataclasses.replace(model, moe=MoEConfig((4,) * model.layers))
    return Config(
        "train",
        init=init,
        model=model,
        compute=_compute(size, is_moe),
        train=train,
        data=data,
        mesh=mesh or MeshConfig(),
        checkpoint=_checkpoint(size),
    )


def _seed(size: str) -> Config:
    tiny = size == TINY
    data = _data(
        size,
        SEED_TINY if tiny else "general",
        tokenizer="demo:" if tiny else "$BTX_DATA_DIR/tokenizer.model",
    )
    return _training(
        size, _train(size, 2e12, 400, 3e-3, rate=3e-4, warmup=2000), data, init="scratch"
    )


def _expert(domain: str, size: str) -> Config:
    tiny_text, tokens = EXPERTS[domain]
    return _training(
        size, _train(size, tokens, 130, 2e-3), _data(size, tiny_text if size == TINY else domain)
    )


def _finetune(size: str) -> Config:
    """FROM_INIT: at 7B scale, with whatever mixture `init` holds; the others must find the paper's,
    4 experts in every layer and Top-2."""
    if size == FROM_INIT:
        return dataclasses.replace(_finetune("llama2_7b"), model=None)
    mesh = MeshConfig(expert=1 if size == TINY else 4)
    return _training(
        size,
        _train(size, MOE_TOKENS, 200, 2e-3),
        _data(size, MIX_TINY if size == TINY else MIX_PAPER),
        mesh=mesh,
        is_moe=True,
    )


def _dense(size: str) -> Config:
    """The seed continued on what BTX saw in all: 453B domain tokens and 80B of the mix, in the
    proportions of the two phases."""
    tokens = sum(tokens for _, tokens in EXPERTS.values()) + MOE_TOKENS
    shares = {
        "math": 201 + 80 * 0.3016,
        "code": 210 + 80 * 0.4031,
        "wiki": 42 + 80 * 0.1030,
        "general": 80 * 0.1923,
    }
    names = dict(
        zip(shares, ("math", "code", "world", "prose") if size == TINY else shares, strict=True)
    )
    text = ",".join(f"{names[name]}:{share:.2f}" for name, share in shares.items())
    return _training(size, _train(size, tokens, 3 * 130 + 200, 2e-3), _data(size, text))


def _mix(sources: tuple[str, ...], copies: int = 1) -> Config:
    return Config("mix", mix=MixConfig(sources, copies=copies), mesh=MeshConfig())


def _evaluate(size: str, models: dict[str, str]) -> Config:
    data = _data(size, MIX_TINY if size == TINY else MIX_PAPER)
    if size == TINY:
        data = dataclasses.replace(data, heldout="math,code,world,prose")
    evaluate = EvaluateConfig(models, rows=48 if size == TINY else 1024)
    return Config(
        "evaluate", evaluate=evaluate, data=data, compute=_compute(size), mesh=MeshConfig()
    )


def _with_init(config: Config, init: str) -> Config:
    return dataclasses.replace(config, init=init)


def seed(size: str) -> ml_collections.ConfigDict:
    return to_config_dict(_seed(size))


def expert(domain: str, size: str) -> ml_collections.ConfigDict:
    return to_config_dict(_expert(domain, size))


def mix(size: str) -> ml_collections.ConfigDict:
    """The default sources are where the seed and expert configs leave their runs; the seed itself
    is the last expert."""
    suffix = "" if size == "llama2_7b" else f"_{size}"
    return to_config_dict(
        _mix(
            tuple(
                f"runs/{name}{suffix}"
                for name in ("math_expert", "code_expert", "wiki_expert", "seed")
            )
        )
    )


def sparse_upcycling(size: str) -> ml_collections.ConfigDict:
    suffix = "" if size == "llama2_7b" else f"_{size}"
    return to_config_dict(_mix((f"runs/seed{suffix}",), copies=4))


def moe_finetune(size: str) -> ml_collections.ConfigDict:
    return to_config_dict(_finetune(size))


def dense(size: str) -> ml_collections.ConfigDict:
    return to_config_dict(_dense(size))


def evaluate(size: str) -> ml_collections.ConfigDict:
    suffix = "" if size == "llama2_7b" else f"_{size}"
    names = ("seed", "math_expert", "code_expert", "wiki_expert", "mix", "moe_finetune")
    return to_config_dict(_evaluate(size, {name: f"runs/{name}{suffix}" for name in names}))


def tasks(
    models: dict[str, str], names: tuple[str, ...], limit: int, dtype: str, batch_size: int
) -> Config:
    """Test sets alone, on any checkpoints; `names` among TASKS."""
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"--tasks: no test set {name!r}; known: {', '.join(TASKS)}")
    chosen = {name: dataclasses.replace(TASKS[name], limit=limit) for name in names}
    evaluate = EvaluateConfig(models, tasks=chosen, batch_size=batch_size)
    return Config(
        "evaluate",
        evaluate=evaluate,
        compute=ComputeConfig(dtype=dtype, remat="none"),
        mesh=MeshConfig(),
    )


def btx(size: str) -> ml_collections.ConfigDict:
    """The paper's method from a released seed: three branches, mix with the seed as generalist,
    finetune, evaluate, report."""
    if size == TINY:
        return demo()
    seed = "$BTX_DATA_DIR/seed"
    experts = {f"expert_{domain}": domain for domain in EXPERTS}
    models = {
        "seed": seed,
        **{name: f"@{name}" for name in experts},
        "btx_untuned": "@mix",
        "btx": "@finetune",
    }
    stages = {
        **{
            name: PipelineStage(_with_init(_expert(domain, size), seed))
            for name, domain in experts.items()
        },
        "mix": PipelineStage(_mix((*(f"@{name}" for name in experts), seed)), needs=tuple(experts)),
        "finetune": PipelineStage(_with_init(_finetune(size), "@mix"), needs=("mix",)),
        "evaluate": PipelineStage(_evaluate(size, models), needs=(*experts, "mix", "finetune")),
    }
    runs = {name: f"@{name}" for name in stages}
    stages["report"] = PipelineStage(
        Config("report", report=ReportConfig("@evaluate", runs)), needs=tuple(runs)
    )
    return to_config_dict(Config("pipeline", pipeline=stages))


def comparison(size: str, group: str) -> ml_collections.ConfigDict:
    """The paper's method beside its baselines and ablations. At 7B, from a released seed in
    $BTX_DATA_DIR/seed; `tiny`, from nothing."""
    if group not in GROUPS:
        raise ConfigError(
            f"--config=...:{group}: no such group of arms; known: {', '.join(GROUPS)}"
        )
    tiny = size == TINY
    is_lora = group == "lora"
    dense = _model(size)
    mixture = dataclasses.replace(dense, moe=MoEConfig((4,) * dense.layers))
    expert, finetune, before = _expert("math", size), _finetune(size), {}
    if tiny:
        expert, finetune = (
            _with_steps(config, steps) for config, steps in ((expert, 80), (finetune, 100))
        )
        prepared = dataclasses.replace(_data(TINY, "math,code,world,prose"), tokenizer="demo:")
        before = {
            "prepare": PipelineStage(Config("prepare", data=prepared)),
            "seed": PipelineStage(_seed(TINY), needs=("prepare",)),
        }
    setting = Setting(
        seed="@seed" if tiny else "$BTX_DATA_DIR/seed",
        texts={domain: text if tiny else domain for domain, (text, _) in EXPERTS.items()},
        domains={"math": "math", "code": "code", "wiki": "world" if tiny else "wiki"},
        general="prose" if tiny else "general",
        mixed=MIX_TINY if tiny else MIX_PAPER,
        expert=expert,
        finetune=finetune,
        moe_cost=train_flops(mixture, 1) / train_flops(dense, 1),
        rows=64 if tiny else 1024,
        before=before,
        # Plain LoRA's rank is the nearest with as many parameters, a router of 8 logits counting as
        # its share of a rank.
        lora=(20, 42, LORA_TARGETS) if tiny else (160, 42, LORA_TARGETS),
    )
    if is_lora:
        assert finetune.train
        lora_train = dataclasses.replace(
            finetune.train, frozen="base", balance_weight=0.0, learning_rate=5e-3 if tiny else 3e-4
        )
        setting = dataclasses.replace(
            setting, finetune=dataclasses.replace(finetune, train=lora_train, mesh=MeshConfig())
        )
    return to_config_dict(arms(setting, group))


def small_report(group: str) -> ml_collections.ConfigDict:
    """What configs/experiments/paper_small.py, or mola_small.py, left in runs/NAME_0 (whose curves
    and routing are shown), _1 and _2."""
    stages = from_config_dict(comparison(TINY, group)).pipeline
    assert stages
    name = "mola_small" if group == "lora" else "paper_small"
    runs = {stage: f"runs/{name}_0/{stage}" for stage in stages if stage != "report"}
    evaluates = tuple(f"runs/{name}_{seed}/evaluate" for seed in range(3))
    return to_config_dict(Config("report", report=ReportConfig(evaluates[0], runs, evaluates[1:])))


def _with_steps(config: Config, steps: int) -> Config:
    assert config.train
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=steps, eval_every=0)
    )


def demo() -> ml_collections.ConfigDict:
    """Branch-Train-MiX from nothing, tiny: seed, three experts, mix with the seed as generalist,
    finetune, evaluate, report."""
    experts = {"expert_math": "math", "expert_code": "code", "expert_world": "wiki"}
    prepared = dataclasses.replace(_data(TINY, "math,code,world,prose"), tokenizer="demo:")
    branches = tuple(f"@{name}" for name in experts)
    models = {
        "seed": "@seed",
        **{name: f"@{name}" for name in experts},
        "btx_untuned": "@mix",
        "btx": "@finetune",
    }
    stages = {
        "prepare": PipelineStage(Config("prepare", data=prepared)),
        "seed": PipelineStage(_seed(TINY), needs=("prepare",)),
        **{
            name: PipelineStage(_with_init(_expert(domain, TINY), "@seed"), needs=("seed",))
            for name, domain in experts.items()
        },
        "mix": PipelineStage(_mix((*branches, "@seed")), needs=("seed", *experts)),
        "finetune": PipelineStage(_with_init(_finetune(TINY), "@mix"), needs=("mix",)),
        "evaluate": PipelineStage(
            _evaluate(TINY, models), needs=("seed", *experts, "mix", "finetune")
        ),
    }
    runs = {name: f"@{name}" for name in stages}
    stages["report"] = PipelineStage(
        Config("report", report=ReportConfig("@evaluate", runs)), needs=tuple(runs)
    )
    return to_config_dict(Config("pipeline", pipeline=stages))
