"""MoLA's runs as functions that config files call: LoRA experts on a frozen Hugging Face Llama that
learn the answers of test sets."""

import dataclasses

from btx_jax.config.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    FormatConfig,
    MeshConfig,
    PipelineStage,
    ReportConfig,
    TrainConfig,
)
from btx_jax.config.model_config import LoRAConfig
from btx_jax.errors import ConfigError, suggest
from btx_jax.presets.recipes import EVALS, SMALL, TASKS, TINY, expert

HELDOUT = 0.1
# How test-set items become text; only the answers are learnt.
FORMATS = {
    "arc_easy": FormatConfig("{query}\nAnswer:", " {choice}"),
    "piqa": FormatConfig("{query}Answer:", " {choice}"),
    "openbook_qa": FormatConfig("{query}", " {choice}"),
    "commonsense_qa": FormatConfig("{query}", " {choice}"),
    "gsm8k": FormatConfig("Question: {context}\nAnswer:", " {chain_of_thought}\n#### {answer}"),
}


def _data(task: str) -> DataConfig:
    domains = {name: f"{EVALS}/{name}.jsonl.gz#@{name}" for name in FORMATS}
    return DataConfig(
        task, domains=domains, formats=FORMATS, sequence_length=256, heldout_fraction=HELDOUT
    )


def _mola(task: str, init: str) -> Config:
    """MoLA's settings (section 4.1), with a sixteenth of its batch size."""
    return Config(
        "train",
        init=init,
        lora=LoRAConfig("2468"),
        compute=ComputeConfig(dtype="float32", remat="attention", loss_chunk=512),
        train=TrainConfig(
            steps=300,
            batch_size=8,
            learning_rate=3e-4,
            warmup_steps=20,
            weight_decay=0.0,
            balance_weight=0.0,
            eval_every=50,
            frozen="base",
        ),
        data=_data(task),
        mesh=MeshConfig(),
        checkpoint=CheckpointConfig(every=100),
    )


def mola(task: str = "arc_easy") -> Config:
    """LoRA experts trained on the answers of a test set. `tiny` and `from_init` train on the demo's
    mathematics instead: `tiny` from the tiny seed, `from_init` from an existing checkpoint."""
    if task.partition(",")[0] in SMALL:
        config = expert("math", task)
        assert config.train
        train = dataclasses.replace(config.train, balance_weight=0.0, frozen="base")
        init = "runs/seed_tiny" if task == TINY else config.init
        return dataclasses.replace(config, init=init, lora=LoRAConfig("2468"), train=train)
    if task not in FORMATS:
        raise ConfigError(f"{task}: no such task; {suggest(task, FORMATS)}")
    return _mola(task, "$BTX_DATA_DIR/seed")


def continual(names: str = "arc_easy,openbook_qa,commonsense_qa") -> Config:
    """Train one task after another on the same LoRA experts and evaluate all tasks after each
    (MoLA, section 4.4). names: comma-separated."""
    order = names.split(",")
    choices = [name for name in FORMATS if TASKS[name].kind == "multiple_choice"]
    for task in order:
        if task not in choices:
            raise ConfigError(f"{names}: no task {task!r}; {suggest(task, choices)}")
    stages: dict[str, PipelineStage] = {}
    before = "$BTX_DATA_DIR/seed"
    for task in order:
        stages[task] = PipelineStage(
            _mola(task, before), needs=(before[1:],) if before.startswith("@") else ()
        )
        before = f"@{task}"
    tried = {task: dataclasses.replace(TASKS[task], heldout_fraction=HELDOUT) for task in order}
    evaluate = EvaluateConfig({task: f"@{task}" for task in order}, tasks=tried, shown_tokens=0)
    config = dataclasses.replace(
        _mola(order[0], ""),
        stage="evaluate",
        lora=None,
        train=None,
        checkpoint=None,
        evaluate=evaluate,
    )
    config = dataclasses.replace(
        config, data=dataclasses.replace(_data(order[0]), heldout=",".join(order))
    )
    stages["evaluate"] = PipelineStage(config, needs=tuple(order))
    runs = {name: f"@{name}" for name in stages}
    report = ReportConfig("@evaluate", runs, continual=tuple(f"{task}:{task}" for task in order))
    stages["report"] = PipelineStage(Config("report", report=report), needs=tuple(runs))
    return Config("pipeline", pipeline=stages)
