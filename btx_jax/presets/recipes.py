"""The paper's runs as functions that config files call: at Llama-2-7B scale (BTX section 4), and
`tiny`, the same recipe for a laptop CPU on the demo corpora. They differ in data, size and steps,
never in method.

`from_init` is the recipe for one machine and an existing model of any size: `from_init` with
--config.init, or `from_init,CHECKPOINT`.
"""

import dataclasses
from collections.abc import Mapping

from btx_jax.checkpoints.checkpoint import find_checkpoint
from btx_jax.config.config import (
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
from btx_jax.config.merges import REGMEAN
from btx_jax.config.model_config import LORA_TARGETS, ModelConfig, MoEConfig, RopeScaling
from btx_jax.config.ridge import RIDGE
from btx_jax.costs.model import train_flops
from btx_jax.errors import ConfigError
from btx_jax.presets.experiments import GROUPS, Setting, mixed_text
from btx_jax.presets.experiments import comparison as arms

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
        vocab_size=128_256, layers=32, d_model=4096, d_ff=14_336, heads=32, kv_heads=8,
        head_dim=128, rope_theta=500_000.0, context=8192,
    ),
    "llama31_8b": ModelConfig(
        vocab_size=128_256, layers=32, d_model=4096, d_ff=14_336, heads=32, kv_heads=8,
        head_dim=128, rope_theta=500_000.0, rope_scaling=RopeScaling("llama3", factor=8.0),
        context=131_072,
    ),
    "mistral_7b": ModelConfig(
        vocab_size=32_000, layers=32, d_model=4096, d_ff=14_336, heads=32, kv_heads=8,
        head_dim=128, window=4096, context=32_768,
    ),
    "qwen3_8b": ModelConfig(
        vocab_size=151_936, layers=36, d_model=4096, d_ff=12_288, heads=32, kv_heads=8,
        head_dim=128, rope_theta=1e6, qk_norm=True, norm_eps=1e-6, context=40_960,
    ),
    "olmo2_7b": ModelConfig(
        vocab_size=100_352, layers=32, d_model=4096, d_ff=11_008, heads=32, kv_heads=32,
        head_dim=128, rope_theta=500_000.0, qk_norm=True, qk_norm_kind="width", norms="after",
        norm_eps=1e-6, context=4096,
    ),
    "gemma3_4b": ModelConfig(
        vocab_size=262_208, layers=34, d_model=2560, d_ff=10_240, heads=8, kv_heads=4,
        head_dim=256, rope_theta=1e6, rope_scaling=RopeScaling("linear", factor=8.0), qk_norm=True,
        window=1024, window_layers=tuple(layer for layer in range(34) if layer % 6 != 5),
        window_theta=10_000.0, norm="rms_plus_one", norms="both", norm_eps=1e-6,
        activation="gelu_tanh", embed_scale=2560**0.5, tied_head=True, context=131_072,
    ),
    "granite3_8b": ModelConfig(
        vocab_size=49_155, layers=40, d_model=4096, d_ff=12_800, heads=32, kv_heads=8,
        head_dim=128, rope_theta=1e7, embed_scale=12.0, residual_scale=0.22,
        attention_scale=0.0078125, logits_divisor=16.0, tied_head=True, context=131_072,
    ),
    "tiny": ModelConfig(
        vocab_size=2048, layers=4, d_model=128, d_ff=352, heads=4, kv_heads=4, head_dim=32,
        tied_head=True, context=256,
    ),
}  # fmt: skip
LLAMA2, TINY, FROM_INIT = "llama2_7b", "tiny", "from_init"
SMALL = (TINY, FROM_INIT)  # sizes that use the demo corpora
RELEASED = "$BTX_DATA_DIR/seed"  # the model that pipelines start from
FROM_INIT_LENGTH = 512  # tokens; less for a model with a shorter context

# The paper's domains; shares within a domain are from its Table 7 (normalised: there they sum to
# 102.98 and 99.01).
PAPER_DOMAINS = {
    "math": (
        "$BTX_DATA_DIR/proof-pile-2/algebraic-stack/*.jsonl.zst:13.57,"
        "$BTX_DATA_DIR/proof-pile-2/open-web-math/*.jsonl.zst:54.27,"
        "$BTX_DATA_DIR/proof-pile-2/arxiv/*.jsonl.zst:27.14,"
        "$BTX_DATA_DIR/github/*.jsonl.zst:2.99,$BTX_DATA_DIR/common-crawl/*.jsonl.zst:5.01"
    ),
    "code": (
        "$BTX_DATA_DIR/code/*.jsonl.zst:82.18,$BTX_DATA_DIR/code-text/*.jsonl.zst:9.90,"
        "$BTX_DATA_DIR/common-crawl/*.jsonl.zst:6.93"
    ),
    "wiki": "$BTX_DATA_DIR/wikipedia/*.parquet:90.91,$BTX_DATA_DIR/common-crawl/*.jsonl.zst:9.09",
    "general": "$BTX_DATA_DIR/common-crawl/*.jsonl.zst",
}
# The demo corpora that stand in for the paper's: world for Wikipedia, prose for CommonCrawl and for
# the text that the seed was trained on.
TINY_DOMAINS = {name: f"demo:{name}" for name in ("math", "code", "world", "prose")}

# expert's domain -> (its training text at `tiny`, its tokens in the paper)
EXPERTS = {
    "math": ("math:94.99,prose:5.01", 201e9),
    "code": ("code:93.07,prose:6.93", 210e9),
    "wiki": ("world:90.91,prose:9.09", 42e9),
}
MIX_PAPER = "math:30.16,code:40.31,wiki:10.30,general:19.23"
MIX_TINY = "math:30.16,code:40.31,world:10.30,prose:19.23"
SEED_TINY = "prose:70,math:10,code:10,world:10"

EVALS = "$BTX_DATA_DIR/evals"
# Test sets with the prompts of lm-evaluation-harness.
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


def _split(what: str) -> tuple[str, str]:
    """Parse `SIZE` or `from_init,CHECKPOINT` into (size, checkpoint or "")."""
    size, _, init = what.partition(",")
    if size not in (*MODELS, FROM_INIT) or (init and size != FROM_INIT):
        known = ", ".join([*MODELS, FROM_INIT, f"{FROM_INIT},CHECKPOINT"])
        raise ConfigError(f"{what}: no such size; known: {known}")
    return size, init


def _compute(size: str) -> ComputeConfig:
    """Compute settings. At 7B, with the dispatch that sends the fewest bytes between TPUs."""
    if size == TINY:
        return ComputeConfig(dtype="float32", remat="none", unroll=4, group_size=64, loss_chunk=512)
    if size == FROM_INIT:
        return ComputeConfig()
    return ComputeConfig(dispatch="einsum")


def _data(size: str, train: str, **kwargs) -> DataConfig:
    if size in SMALL:
        return DataConfig(
            train,
            domains=TINY_DOMAINS,
            sequence_length=256 if size == TINY else FROM_INIT_LENGTH,
            heldout_fraction=0.05,
            **kwargs,
        )
    return DataConfig(
        train, domains=PAPER_DOMAINS, sequence_length=4096, heldout_fraction=0.0005, **kwargs
    )


def _train(
    size: str,
    tokens: float,
    tiny_steps: int,
    tiny_rate: float = 0.0,
    rate: float = 1e-4,
    warmup: int = 100,
) -> TrainConfig:
    """Training settings. tiny_rate: peak learning rate at `tiny`; 0 to choose by the model that the
    run starts from."""
    if size in SMALL:
        return TrainConfig(
            tiny_steps,
            batch_size=8,
            learning_rate=tiny_rate if size == TINY else 0.0,
            warmup_steps=20 if size == TINY else 10,
            eval_every=50,
            eval_rows=16,
        )
    steps = round(tokens / TOKENS_PER_STEP)
    return TrainConfig(
        steps,
        batch_size=1024,
        accumulate=0,
        learning_rate=rate,
        warmup_steps=warmup,
        eval_every=1000,
        eval_rows=1024,
    )


def _checkpoint(size: str) -> CheckpointConfig:
    return CheckpointConfig(50) if size in SMALL else CheckpointConfig(500, every_minutes=15.0)


def _training(
    size: str,
    train: TrainConfig,
    data: DataConfig,
    init: str = "",
    mesh: MeshConfig | None = None,
    is_moe: bool = False,
) -> Config:
    """A training run. Small sizes take the model of `init`; at other sizes `init` must hold the
    model of that size."""
    model = MODELS[size] if init == "scratch" or size not in SMALL else None
    if model and is_moe:
        model = dataclasses.replace(model, moe=MoEConfig((4,) * model.layers))
    return Config(
        "train",
        init=init,
        model=model,
        compute=_compute(size),
        train=train,
        data=data,
        mesh=mesh or MeshConfig(),
        checkpoint=_checkpoint(size),
    )


def _seed(size: str) -> Config:
    """A seed from scratch, or for FROM_INIT an existing model trained further."""
    text = SEED_TINY if size in SMALL else "general"
    train = _train(size, 2e12, 400, 3e-3, rate=3e-4, warmup=2000)
    if size == FROM_INIT:
        return _training(size, train, _data(size, text))
    tokenizer = "demo:" if size == TINY else "$BTX_DATA_DIR/tokenizer.model"
    return _training(size, train, _data(size, text, tokenizer=tokenizer), init="scratch")


def _expert(domain: str, size: str) -> Config:
    tiny_text, tokens = EXPERTS[domain]
    train = dataclasses.replace(_train(size, tokens, 130), mixing_probe=True)
    return _training(size, train, _data(size, tiny_text if size in SMALL else domain))


def _finetune(size: str) -> Config:
    """Finetuning of the mixture. At the paper's sizes, the mixture must have 4 experts in every
    layer and Top-2 routing."""
    mesh = MeshConfig(expert=1 if size in SMALL else 4)
    return _training(
        size,
        _train(size, MOE_TOKENS, 200),
        _data(size, MIX_TINY if size in SMALL else MIX_PAPER),
        mesh=mesh,
        is_moe=True,
    )


def _dense(size: str) -> Config:
    """The seed trained further on as many tokens as BTX in total: 453B of domains and 80B of the
    mix, in the proportions of the two phases."""
    tokens = sum(tokens for _, tokens in EXPERTS.values()) + MOE_TOKENS
    shares = {
        "math": 201 + 80 * 0.3016,
        "code": 210 + 80 * 0.4031,
        "wiki": 42 + 80 * 0.1030,
        "general": 80 * 0.1923,
    }
    names = dict(
        zip(shares, ("math", "code", "world", "prose") if size in SMALL else shares, strict=True)
    )
    text = ",".join(f"{names[name]}:{share:.2f}" for name, share in shares.items())
    return _training(size, _train(size, tokens, 3 * 130 + 200), _data(size, text))


def _mix(sources: tuple[str, ...], copies: int = 1) -> Config:
    return Config("mix", mix=MixConfig(sources, copies=copies), mesh=MeshConfig())


def _evaluate(
    size: str, models: dict[str, str], seed: str, experts: tuple[str, ...], mixture: str
) -> Config:
    data = _data(size, MIX_TINY if size in SMALL else MIX_PAPER)
    if size in SMALL:
        data = dataclasses.replace(data, heldout="math,code,world,prose")
    rows = {TINY: 48, FROM_INIT: 16}.get(size, 1024)
    evaluate = EvaluateConfig(models, seed, experts, mixture, rows=rows)
    return Config(
        "evaluate", evaluate=evaluate, data=data, compute=_compute(size), mesh=MeshConfig()
    )


def _starting(config: Config, init: str) -> Config:
    """The config with this init, and with rows no longer than its context."""
    if not init:
        return config
    return _within_context(dataclasses.replace(config, init=init), init)


def _within_context(config: Config, init: str) -> Config:
    if config.data is None or config.model is not None or not init or init.startswith("@"):
        return config
    context = find_checkpoint(init, FROM_INIT).metadata.model.context
    length = min(config.data.sequence_length, context)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, sequence_length=length)
    )


def seed(what: str = LLAMA2) -> Config:
    size, init = _split(what)
    return _starting(_seed(size), init)


def expert(domain: str, what: str = LLAMA2) -> Config:
    size, init = _split(what)
    return _starting(_expert(domain, size), init)


def _left_by(size: str, names: tuple[str, ...], seed: str = "") -> dict[str, str]:
    """Config name -> the directory of its run. seed: a released model to use in place of the seed
    config's run."""
    suffix = "" if size == "llama2_7b" else f"_{size}"
    released = {"seed": seed or RELEASED} if size == FROM_INIT else {}
    return {name: f"runs/{name}{suffix}" for name in names} | (released if "seed" in names else {})


BRANCHES = ("math_expert", "code_expert", "wiki_expert")  # names of configs


def mix(what: str = LLAMA2) -> Config:
    """Mix the runs of the expert configs and the seed config; the seed is the last expert."""
    size, init = _split(what)
    return _mix(tuple(_left_by(size, (*BRANCHES, "seed"), init).values()))


def sparse_upcycling(what: str = LLAMA2) -> Config:
    size, init = _split(what)
    return _mix(tuple(_left_by(size, ("seed",), init).values()), copies=4)


def moe_finetune(what: str = LLAMA2) -> Config:
    size, init = _split(what)
    return _starting(_finetune(size), init)


def dense(what: str = LLAMA2) -> Config:
    size, init = _split(what)
    return _starting(_dense(size), init)


def evaluate(what: str = LLAMA2) -> Config:
    size, init = _split(what)
    models = _left_by(size, ("seed", *BRANCHES, "mix", "moe_finetune"), init)
    config = _evaluate(size, models, "seed", BRANCHES, "moe_finetune")
    return _within_context(config, init)


def tasks(
    models: dict[str, str], names: tuple[str, ...], limit: int, dtype: str, batch_size: int
) -> Config:
    """Evaluate checkpoints on test sets only; `names` are keys of TASKS."""
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


def btx(what: str = LLAMA2) -> Config:
    """The paper's method from a released seed: train three branches, mix them with the seed as
    generalist, finetune, evaluate, report."""
    size, init = _split(what)
    if size == TINY:
        return demo()
    seed = init or RELEASED
    experts = {f"expert_{_domain(domain, size)}": domain for domain in EXPERTS}
    stages = {
        name: PipelineStage(
            dataclasses.replace(_within_context(_expert(domain, size), init), init=seed)
        )
        for name, domain in experts.items()
    }
    return _mixed_and_reported(size, stages, seed, init)


def _domain(expert: str, size: str) -> str:
    """The name of an expert's domain at this size."""
    return "world" if expert == "wiki" and size in SMALL else expert


def _mixed_and_reported(
    size: str,
    before: dict[str, PipelineStage],
    seed: str,
    init: str = "",
    mix: Config | None = None,
    peers: Mapping[str, PipelineStage] | None = None,
) -> Config:
    """A pipeline: the stages that train the experts (`expert_*`), then mix, finetune, evaluate,
    report.

    init: a checkpoint whose context limits the rows. mix: the mix stage; None for the paper's.
    peers: further models to evaluate with the mixture.
    """
    peers = peers or {}
    experts = tuple(name for name in before if name.startswith("expert_"))
    branches = tuple(f"@{name}" for name in experts)
    models = {
        "seed": seed,
        **dict(zip(experts, branches, strict=True)),
        **{name: f"@{name}" for name in peers},
        "btx_untuned": "@mix",
        "btx": "@finetune",
    }
    first = ("seed",) if seed.startswith("@") else ()
    finetune = dataclasses.replace(_within_context(_finetune(size), init), init="@mix")
    evaluate = _within_context(_evaluate(size, models, "seed", experts, "btx"), init)
    stages = {
        **before,
        "mix": PipelineStage(mix or _mix((*branches, seed)), needs=(*first, *experts)),
        "finetune": PipelineStage(finetune, needs=("mix",)),
        **peers,
        "evaluate": PipelineStage(evaluate, needs=(*first, *experts, "mix", "finetune", *peers)),
    }
    runs = {name: f"@{name}" for name in stages}
    stages["report"] = PipelineStage(
        Config("report", report=ReportConfig("@evaluate", runs)), needs=tuple(runs)
    )
    return Config("pipeline", pipeline=stages)


def comparison(what: str = LLAMA2) -> Config:
    """The paper's method with its baselines and ablations: at 7B from a released seed in
    $BTX_DATA_DIR/seed; `tiny` from scratch; `from_init,CHECKPOINT` from that checkpoint. A group of
    arms may follow after another comma; `main` by default."""
    size, *rest = what.split(",")
    start = [rest.pop(0)] if size == FROM_INIT and rest else []
    return compared(",".join([size, *start]), ",".join(rest) or "main")


def compared(what: str, group: str) -> Config:
    """The arms of `group`, one of experiments.GROUPS, with a seed of this size."""
    if group not in GROUPS:
        raise ConfigError(f"{group}: no such group; known: {', '.join(GROUPS)}")
    size, init = _split(what)
    tiny, small = size == TINY, size in SMALL
    is_lora = group == "lora"
    if size == FROM_INIT:
        init = init or RELEASED
        dense = find_checkpoint(init, FROM_INIT).metadata.model
    else:
        dense = MODELS[size]
    mixture = dataclasses.replace(dense, moe=MoEConfig((4,) * dense.layers))
    expert = _within_context(_expert("math", size), init)
    finetune, before = _within_context(_finetune(size), init), {}
    if tiny:
        expert, finetune = (
            _with_steps(config, steps) for config, steps in ((expert, 80), (finetune, 100))
        )
        # As measured for docs/results.md.
        assert finetune.compute
        compute = dataclasses.replace(finetune.compute, dispatch="einsum")
        finetune = dataclasses.replace(finetune, compute=compute)
        prepared = dataclasses.replace(_data(TINY, "math,code,world,prose"), tokenizer="demo:")
        before = {
            "prepare": PipelineStage(Config("prepare", data=prepared)),
            "seed": PipelineStage(_seed(TINY), needs=("prepare",)),
        }
    setting = Setting(
        seed="@seed" if tiny else init or RELEASED,
        texts={domain: text if small else domain for domain, (text, _) in EXPERTS.items()},
        domains={domain: _domain(domain, size) for domain in EXPERTS},
        general="prose" if small else "general",
        mixed=MIX_TINY if small else MIX_PAPER,
        expert=expert,
        finetune=finetune,
        moe_cost=train_flops(mixture, 1) / train_flops(dense, 1),
        rows={TINY: 64, FROM_INIT: 16}.get(size, 1024),
        before=before,
        # As many experts per layer as MoLA's 160 over 32 layers. Plain LoRA's rank is the one whose
        # number of parameters is nearest, counting a router of 8 logits as its share of a rank.
        lora=(5 * dense.layers, 42, LORA_TARGETS),
    )
    if is_lora:
        assert finetune.train
        lora_train = dataclasses.replace(
            finetune.train,
            frozen="base",
            balance_weight=0.0,
            learning_rate=0.0 if small else 3e-4,
        )
        setting = dataclasses.replace(
            setting, finetune=dataclasses.replace(finetune, train=lora_train, mesh=MeshConfig())
        )
    return arms(setting, group)


def mola_small(what: str = "") -> Config:
    """MoLA's shapes at a million parameters. `report` compares three seeds, found in
    runs/mola_small_0 (whose curves and routing are shown), _1 and _2."""
    if what not in ("", "report"):
        raise ConfigError(f"{what}: must be `report`, or nothing after the colon")
    pipeline = compared(TINY, "lora")
    return reported("mola_small", pipeline) if what else pipeline


def reported(name: str, pipeline: Config) -> Config:
    """A report of `pipeline` for three seed values, in runs/NAME_0, NAME_1 and NAME_2. Curves and
    routing are those of the first."""
    assert pipeline.pipeline
    runs = {stage: f"runs/{name}_0/{stage}" for stage in pipeline.pipeline if stage != "report"}
    evaluates = tuple(f"runs/{name}_{value}/evaluate" for value in range(3))
    return Config("report", report=ReportConfig(evaluates[0], runs, evaluates[1:]))


def _with_steps(config: Config, steps: int) -> Config:
    assert config.train
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=steps, eval_every=0)
    )


def demo() -> Config:
    """Branch-Train-MiX from scratch, at the tiny size: train a seed and three experts, mix them
    with the seed as generalist, finetune, compare with dense training on as many tokens of the same
    text, report. The shared parameters and the routers are solved in closed form from text."""
    prepared = dataclasses.replace(_data(TINY, "math,code,world,prose"), tokenizer="demo:")
    stages = {
        "prepare": PipelineStage(Config("prepare", data=prepared)),
        "seed": PipelineStage(_seed(TINY), needs=("prepare",)),
        **{
            f"expert_{_domain(domain, TINY)}": PipelineStage(
                dataclasses.replace(_expert(domain, TINY), init="@seed"), needs=("seed",)
            )
            for domain in EXPERTS
        },
    }
    domains = tuple(_domain(domain, TINY) for domain in EXPERTS)
    solved = Config(
        "mix",
        mix=MixConfig(
            (*(f"@expert_{domain}" for domain in domains), "@seed"),
            merge=REGMEAN,
            router=RIDGE,
            text=(*domains, "prose"),
        ),
        data=_data(TINY, ",".join((*domains, "prose"))),
        mesh=MeshConfig(),
    )
    expert, finetune = _expert("math", TINY), _finetune(TINY)
    assert expert.train and expert.data and finetune.train
    steps = len(EXPERTS) * expert.train.steps, finetune.train.steps
    text = mixed_text(
        {
            mixed_text({text: 1.0 for text, _ in EXPERTS.values()}): steps[0],
            MIX_TINY: steps[1],
        }
    )
    train = dataclasses.replace(expert.train, steps=sum(steps), mixing_probe=False)
    dense = dataclasses.replace(
        expert, init="@seed", train=train, data=dataclasses.replace(expert.data, train=text)
    )
    peers = {"dense": PipelineStage(dense, needs=("seed",))}
    return _mixed_and_reported(TINY, stages, "@seed", mix=solved, peers=peers)
