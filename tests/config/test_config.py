import dataclasses
import importlib.util
import json
import re

import pytest
from absl import flags
from safetensors.numpy import save_file

from btx_jax.cli.runs import default_workdir
from btx_jax.config.config import (
    Config,
    DataConfig,
    EnsembleConfig,
    EvaluateConfig,
    MeshConfig,
    MixConfig,
    PipelineStage,
    ReportConfig,
    TaskConfig,
)
from btx_jax.config.config_dict import (
    Difference,
    differences,
    from_config_dict,
    from_dict,
    to_config_dict,
    to_dict,
)
from btx_jax.config.model_config import MoEConfig
from btx_jax.errors import ConfigError
from btx_jax.parallel.sharding import make_mesh
from btx_jax.presets import lora_recipes, recipes
from btx_jax.presets.config_file import define_config
from btx_jax.stages.pipeline import in_order, resolve
from btx_jax.training.start import checked_mesh
from tests.conftest import ROOT

CONFIGS = sorted(file.stem for file in (ROOT / "configs").glob("*.py"))


def get_config(name, *args):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.get_config(*args)


def seed_dict(**changes):
    values = to_dict(recipes.seed("tiny"))
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        target = values
        for section in sections:
            target = target[section]
        target[leaf] = value
    return values


def test_every_config_the_users_rely_on_is_there():
    names = (
        "demo",
        "seed",
        "math_expert",
        "code_expert",
        "wiki_expert",
        "mix",
        "moe_finetune",
        "dense",
        "sparse_upcycling",
        "evaluate",
    )
    assert set(names) <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_parse_unadorned_and_tiny_and_say_command_cost_and_result(name):
    module, config = get_config(name)
    assert from_config_dict(to_config_dict(config)) == config
    if name not in ("demo", "continual"):  # demo is tiny already, continual learns test sets
        tiny = module.get_config("tiny")
        assert tiny.stage == config.stage
    for word in (f"btx run {name}", "Cost:", "Expected"):
        assert word in module.__doc__, f"configs/{name}.py does not say {word!r}"


def test_the_paper_run_has_the_papers_numbers():
    config = recipes.moe_finetune("llama2_7b")
    train = config.train
    assert (train.batch_size, config.data.sequence_length) == (1024, 4096)
    assert (
        train.learning_rate,
        train.warmup_steps,
        train.final_lr_fraction,
        train.weight_decay,
    ) == (1e-4, 100, 0.1, 0.1)
    assert train.balance_weight == 0.01
    assert train.steps * 1024 * 4096 == pytest.approx(80e9, rel=1e-4)
    assert config.data.train == "math:30.16,code:40.31,wiki:10.30,general:19.23"
    for domain, tokens in (("math", 201e9), ("code", 210e9), ("wiki", 42e9)):
        assert recipes.expert(domain, "llama2_7b").train.steps * 1024 * 4096 == pytest.approx(
            tokens, rel=1e-3
        )


def test_round_trip_and_differences():
    config = recipes.demo()
    assert from_dict(Config, to_dict(config)) == config
    assert from_config_dict(to_config_dict(config)) == config
    changed = dataclasses.replace(config, rng_seed=3)
    (difference,) = differences(to_dict(config), to_dict(changed))
    assert difference == Difference("rng_seed", 0, 3)
    assert str(difference) == "rng_seed: 0 -> 3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train__stepz": 5}, r"config\.train\.stepz: unknown key; did you mean 'steps'\?"),
        ({"modle": {}}, r"config\.modle: unknown key; did you mean 'model'\?"),
        ({"train__steps": "many"}, r"config\.train\.steps='many': must be int, not str"),
        ({"train__steps": True}, r"config\.train\.steps=True: must be int, not bool"),
        ({"train__steps": 0}, r"config\.train\.steps=0: must be at least 1"),
        ({"train__beta1": 1.5}, r"config\.train\.beta1=1\.5: must lie in \[0, 1\)"),
        (
            {"train__learning_rate": float("inf")},
            r"config\.train\.learning_rate=inf: must be finite",
        ),
        ({"train__accumulate": 3}, r"config\.train\.accumulate=3: does not divide batch_size=8"),
        ({"train__warmup_steps": 10_000}, r"config\.train\.warmup_steps=10000: more than steps"),
        ({"model__heads": 6}, r"config\.model\.heads=6: not divisible by kv_heads=4"),
        ({"model__head_dim": 7}, r"config\.model\.head_dim=7: must be even"),
        (
            {"model__moe": {"experts": [2] * 4, "k": 3}},
            r"config\.model\.moe\.k=3: more than the 2 experts of layer 0",
        ),
        (
            {"model__moe": {"experts": [4] * 3}},
            r"config\.model\.moe\.experts: 3 counts for layers=4",
        ),
        (
            {"model__moe": {"experts": [4] * 4, "routing": "topk"}},
            r"config\.model\.moe\.routing='topk': did you mean 'top_k'\?",
        ),
        ({"mesh__fsdp": 0}, r"config\.mesh\.fsdp=0: must be at least 1, or -1"),
        ({"mesh__data": -1}, r"config\.mesh\.data, fsdp: at most one may be -1"),
        (
            {"compute__dispatch": "dense"},
            r"config\.compute\.dispatch='dense': known: auto, einsum, ragged",
        ),
        (
            {"data__heldout_fraction": 1.0},
            r"config\.data\.heldout_fraction=1\.0: must lie in \[0, 1\)",
        ),
        ({"stage": "trian"}, r"config\.stage='trian': did you mean 'train'\?"),
        ({"train": None}, r"config\.train: missing, but stage 'train' needs it"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_key_and_cure(change, message):
    with pytest.raises(ConfigError, match=message) as error:
        from_dict(Config, seed_dict(**change))
    assert "\n" not in str(error.value)


def test_impossible_shapes_fail_before_any_compile():
    config = recipes.seed("tiny")
    check = lambda mesh, **train: checked_mesh(  # noqa: E731
        dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, **train)),
        config.model,
    )
    assert check(MeshConfig()).devices.shape == (1, 8, 1, 1, 1)
    with pytest.raises(
        ConfigError,
        match=(
            r"batch_size=12: its micro-batches of 12 are not divisible by the 8 devices.*multiple"
            r" of 8"
        ),
    ):
        check(MeshConfig(), batch_size=12)
    with pytest.raises(ConfigError, match=r"config\.mesh: data=1 fsdp=3 .* does not fit 8 devices"):
        check(MeshConfig(fsdp=3))
    with pytest.raises(
        Exception, match=r"config\.mesh: .*kv_heads.* not divisible by the 8 devices of tensor"
    ):
        check(MeshConfig(fsdp=1, tensor=8))
    long = dataclasses.replace(config.data, sequence_length=512)
    with pytest.raises(
        ConfigError, match=r"sequence_length=512: longer than config\.model\.context=256"
    ):
        checked_mesh(dataclasses.replace(config, data=long), config.model)


def test_what_does_not_cut_into_pieces_is_refused():
    config = recipes.seed("tiny")
    model = dataclasses.replace(config.model, moe=MoEConfig((4,) * config.model.layers))

    def check(length, mesh, model=config.model, **compute):
        data = dataclasses.replace(config.data, sequence_length=length)
        compute = dataclasses.replace(config.compute, **compute)
        changed = dataclasses.replace(config, data=data, compute=compute, mesh=mesh)
        return checked_mesh(changed, model).shape["context"]

    cut = MeshConfig(context=8)
    assert check(256, cut) == 8
    with pytest.raises(ConfigError, match=r"sequence_length=248: .* two pieces .* multiple of 16"):
        check(248, cut)
    assert check(256, cut, model, dispatch="einsum", group_size=16) == 8
    for size in (32, 512):
        with pytest.raises(ConfigError, match=f"group_size={size}: does not divide .*256 / 16"):
            check(256, cut, model, dispatch="einsum", group_size=size)
    with pytest.raises(ConfigError, match=r"mesh\.context=2: only used by stage 'train'"):
        Config("mix", mix=MixConfig(("a", "b")), mesh=MeshConfig(context=2))
    train = dataclasses.replace(config.train, eval_every=1, eval_tasks=("gsm8k",))
    with pytest.raises(ConfigError, match=r"mesh\.context=8: test sets are not split over devices"):
        dataclasses.replace(config, train=train, mesh=cut)


def test_mesh_shape_takes_what_remains():
    assert MeshConfig().shape(8) == (1, 8, 1, 1, 1)
    assert MeshConfig(expert=4).shape(8) == (1, 2, 4, 1, 1)
    assert MeshConfig(fsdp=2, expert=4).shape(8) == (1, 2, 4, 1, 1)
    assert MeshConfig(context=4).shape(8) == (1, 2, 1, 1, 4)
    sizes = {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1, "context": 1}
    assert make_mesh((1, 2, 4, 1)).shape == sizes


def test_pipeline_order_references_and_circles(tmp_path):
    config = recipes.demo()
    order = in_order(config.pipeline)
    for name, stage in config.pipeline.items():
        assert all(order.index(need) < order.index(name) for need in stage.needs)
    resolved = resolve(
        "expert_math",
        config.pipeline["expert_math"],
        dataclasses.replace(config, rng_seed=7),
        tmp_path,
    )
    assert resolved.init == str(tmp_path / "seed")
    assert resolved.rng_seed == 7
    lonely = dataclasses.replace(config.pipeline["mix"], needs=("seed",))
    with pytest.raises(
        ConfigError,
        match=r"config\.pipeline\.mix: uses @expert_math, which is not listed in its needs"
        r" \(seed\); add it",
    ):
        resolve("mix", lonely, config, tmp_path)
    circle = {
        "a": dataclasses.replace(lonely, needs=("b",)),
        "b": dataclasses.replace(lonely, needs=("a",)),
    }
    with pytest.raises(ConfigError, match="a, b depend on each other in a cycle"):
        in_order(circle)


@pytest.mark.parametrize(
    "name", ["../../x", "/abs", "a/b", "", ".", "..", "a\nb", "\x1b[2J", "x" * 101]
)
def test_names_that_become_files_stay_in_their_directory(name):
    task = TaskConfig("multiple_choice", "f", "p")
    ensemble = EnsembleConfig({"a": "x", "b": "x"})
    stage = PipelineStage(Config(stage="report", report=ReportConfig("e")))
    for make, key in (
        (lambda: EvaluateConfig({name: "a"}), "models"),
        (lambda: EvaluateConfig({"a": "a"}, tasks={name: task}), "tasks"),
        (lambda: EvaluateConfig({"a": "a", "b": "b"}, ensembles={name: ensemble}), "ensembles"),
        (lambda: ReportConfig("e", runs={name: "a"}), "runs"),
        (lambda: DataConfig("t", domains={name: "a"}), "domains"),
        (lambda: Config(stage="pipeline", pipeline={name: stage}), "pipeline"),
    ):
        told = f"(?s)^{key}[:.].*(is used as a file name|is not a name|not a valid stage name)"
        with pytest.raises(ConfigError, match=told):
            make()


@pytest.mark.parametrize(
    "name", ["seed", "[red]", r"$\frac$", "a b", "Llama-3.2 1B", ".x", "é", "x|y"]
)
def test_other_names_are_names(name):
    assert name in EvaluateConfig({name: "a"}).models


def test_a_task_cannot_take_the_file_of_its_model_s_result():
    with pytest.raises(ConfigError, match=r"tasks\.result: the name is reserved"):
        EvaluateConfig({"a": "a"}, tasks={"result": TaskConfig("multiple_choice", "f", "p")})


def test_the_command_line_adds_domains_and_evaluated_models():
    def parsed(file, *words):
        argv, values = ["x", f"--config={ROOT}/configs/{file}", *words], flags.FlagValues()
        define_config(values, argv)
        values(argv)
        return from_config_dict(values["config"].value)

    new = "--config.data.domains.mine=mine/*.jsonl:0.5,notes.txt"
    config = parsed("math_expert.py:tiny", new, "--config.data.domains.math=m.txt")
    assert config.data.domains["mine"] == "mine/*.jsonl:0.5,notes.txt"
    assert config.data.domains["math"] == "m.txt"
    config = parsed("evaluate.py:tiny", "--config.evaluate.models.mine=runs/mine")
    assert config.evaluate.models["mine"] == "runs/mine"
    for wrong in ("--config.data.domain.x=1", "--config.train.stepz=1"):
        with pytest.raises((KeyError, AttributeError)):
            parsed("math_expert.py:tiny", wrong)


RECIPES = {
    "seed": recipes.seed,
    "math_expert": lambda what: recipes.expert("math", what),
    "dense": recipes.dense,
    "moe_finetune": recipes.moe_finetune,
    "mola": lora_recipes.mola,
}


@pytest.mark.parametrize("name", RECIPES)
def test_every_training_takes_a_model_that_is_there(name):
    config = RECIPES[name]("from_init")
    assert config.model is None and config.data.tokenizer == "" and config.init == ""
    assert config.train.learning_rate == 0.0, "what suits the model"
    assert config.compute.dispatch == "auto"
    assert config.train.warmup_steps <= 10 <= config.train.steps, "ten steps need no other key"


def released(tmp_path, context=4096):
    """A Hugging Face directory of which only the config is read."""
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": context,
        "rms_norm_eps": 1e-5, "hidden_act": "silu",
    }  # fmt: skip
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file({}, tmp_path / "model.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize(("context", "length"), [(4096, 512), (128, 128)])
def test_pipelines_take_a_released_model_by_its_path(tmp_path, context, length):
    seed = released(tmp_path / "seed", context)
    for made in (recipes.btx(f"from_init,{seed}"), recipes.compared(f"from_init,{seed}", "all")):
        config = made
        for name in in_order(config.pipeline):
            resolve(name, config.pipeline[name], config, tmp_path)
        stages = {name: stage.config for name, stage in config.pipeline.items()}
        assert stages["expert_math"].init == seed
        assert stages["evaluate"].evaluate.models["seed"] == seed
        assert {each.data.sequence_length for each in stages.values() if each.data} == {length}
    module, _ = get_config("comparison")
    for group in ("", ",ablations"):
        arms = module.get_config(f"from_init,{seed}{group}").pipeline
        assert ("no_balance" in arms) == bool(group)
    one = recipes.expert("code", f"from_init,{seed}")
    assert (one.init, one.data.sequence_length) == (seed, length)
    upcycled = recipes.sparse_upcycling(f"from_init,{seed}")
    assert upcycled.mix.experts == (seed,)
    assert recipes.mix(f"from_init,{seed}").mix.experts[-1] == seed
    assert recipes.evaluate(f"from_init,{seed}").evaluate.models["seed"] == seed


@pytest.mark.parametrize("what", ["from_int", "llama2_7b,somewhere", "7b"])
def test_an_unknown_size_is_told_with_those_that_are_known(what):
    for recipe in (recipes.seed, recipes.btx, recipes.mix, recipes.evaluate):
        with pytest.raises(ConfigError, match=r"no such size; known: .*from_init,CHECKPOINT"):
            recipe(what)


def test_runs_of_the_papers_size_keep_the_dispatch_that_was_measured():
    assert recipes.moe_finetune("llama2_7b").compute.dispatch == "einsum"
    assert recipes.moe_finetune("tiny").compute.dispatch == "auto"
    arms = recipes.compared("tiny", "ablations").pipeline
    assert arms["switch"].config.compute.dispatch == "einsum", "dropping is part of Switch"


@pytest.mark.parametrize(
    ("config", "directory"),
    [
        ("configs/demo.py", "runs/demo"),
        ("configs/math_expert.py:tiny", "runs/math_expert_tiny"),
        ("configs/comparison.py:llama2_7b,all", "runs/comparison_llama2_7b,all"),
        ("configs/btx.py:from_init,/models/a:b", "runs/btx_from_init"),
        ("configs/btx.py:from_init,../a/b", "runs/btx_from_init"),
    ],
)
def test_a_run_lies_where_its_config_says_and_no_path_leads_it_away(config, directory):
    assert str(default_workdir(config)) == directory


def test_sections_keep_the_order_in_which_they_were_written():
    config = recipes.demo()
    assert list(config.pipeline)[:3] == ["prepare", "seed", "expert_math"]
    assert list(config.pipeline["evaluate"].config.evaluate.models)[-2:] == ["btx_untuned", "btx"]


@pytest.mark.parametrize(
    ("roles", "told"),
    [
        ({"seed": "sed"}, "seed: no model 'sed'; did you mean 'seed'?"),
        ({"experts": ("seed", "maths")}, "experts: no model 'maths'"),
        ({"mixture": "x"}, "mixture: no model 'x'"),
    ],
)
def test_a_role_must_be_a_model(roles, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        EvaluateConfig({"seed": "a", "math": "b"}, **roles, tasks={})
