"""The pipeline of one's own domains: what stages it has and what they read."""

import dataclasses
import json

import pytest

from btx_jax.config.config import Config
from btx_jax.data.tokenizers import load_tokenizer
from btx_jax.errors import ConfigError, UserError
from btx_jax.presets import project as projects
from btx_jax.presets.project import COMPARISONS, METHODS, STEP_TOKENS, project, schedule
from btx_jax.rundir import claim, look_up
from btx_jax.stages.pipeline import check_stages, resolved_stages
from tests.conftest import sentences
from tests.stages.test_evaluate import DENSE, checkpoint

TOKENS = {"a": 4_000, "b": 8_000}


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer_file):
    home = tmp_path_factory.mktemp("project")
    checkpoint(home / "seed", DENSE, 1, load_tokenizer(tokenizer_file))
    for number, name in enumerate((*TOKENS, "general")):
        lines = (json.dumps({"text": text}) + "\n" for text in sentences(60, seed=number))
        (home / f"{name}.jsonl").write_text("".join(lines))
    return home


@pytest.fixture
def fields(home):
    return {
        "seed": str(home / "seed"),
        "domains": {
            name: {"text": str(home / f"{name}.jsonl"), "tokens": tokens}
            for name, tokens in TOKENS.items()
        },
        "finetune_tokens": 2_000,
        "sequence_length": 32,
    }


def stages_of(config: Config):
    assert config.pipeline
    return {name: stage.config for name, stage in config.pipeline.items()}


def tokens_of(config: Config):
    assert config.train and config.data
    return config.train.steps * config.train.batch_size * config.data.sequence_length


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("general", [False, True])
def test_every_method_makes_a_pipeline_that_is_right(fields, home, tmp_path, method, general):
    if general:
        fields["general"] = str(home / "general.jsonl")
    made = project(**fields, method=method)
    assert made.pipeline
    check_stages(resolved_stages(made, tmp_path), tmp_path)
    configs = stages_of(made)
    has_generalist = general and method != "flexolmo"
    experts = ["@expert_a", "@expert_b", *([fields["seed"]] if has_generalist else [])]
    assert list(configs["mix"].mix.experts) == experts
    if METHODS[method].mix:
        assert configs["mix"].mix.text == ("a", "b", "general")[: len(experts)]
    assert ("export" in configs) == (method != "flexolmo")
    assert configs["expert_a"].data.train == ("a:95,general:5" if general else "a")
    assert set(configs["evaluate"].evaluate.models) == {
        *("seed", "expert_a", "expert_b", "mixture_untuned", "mixture")
    }
    for name, stage in made.pipeline.items():
        assert set(stage.needs) <= set(configs), name


def test_runs_are_as_long_as_they_were_asked_to_be(fields):
    configs = stages_of(project(**fields, compare=list(COMPARISONS)))
    wanted = {"expert_a": 4_000, "expert_b": 8_000, "finetune": 2_000}
    wanted |= dict.fromkeys(COMPARISONS, sum(wanted.values()))
    for name, tokens in wanted.items():
        step = configs[name].train.batch_size * 32
        assert abs(tokens_of(configs[name]) - tokens) <= step / 2, name
    shares = dict(word.split(":") for word in configs["dense"].data.train.split(","))
    assert float(shares["b"]) == pytest.approx(100 * (8_000 + 1_000) / 14_000, abs=0.01)


def test_a_change_after_a_run_began_is_named_as_the_file_names_it(fields, home, tmp_path):
    begun = project(**fields)
    claim(tmp_path, begun)
    (tmp_path / "prepare").mkdir()
    (tmp_path / "prepare" / "done.json").write_text("{}")
    fields["domains"]["a"]["tokens"] = 5_000
    fields["sequence_length"] = 16
    with pytest.raises(UserError) as error:
        look_up(tmp_path, project(**fields))
    assert str(error.value) == (
        f"{tmp_path} belongs to a run with a different config:"
        " project.domains.a.tokens: 4000 -> 5000;"
        " project.sequence_length: 32 -> 16; choose another --workdir or undo the change"
    )
    overridden = begun.pipeline["finetune"].config
    train = dataclasses.replace(overridden.train, learning_rate=1e-5)
    stage = dataclasses.replace(
        begun.pipeline["finetune"], config=dataclasses.replace(overridden, train=train)
    )
    other = dataclasses.replace(begun, pipeline={**begun.pipeline, "finetune": stage})
    with pytest.raises(UserError, match=r"finetune\.config\.train\.learning_rate: 0\.0 -> 1e-"):
        look_up(tmp_path, other)


@pytest.mark.parametrize("length", [32, 512, 4096])
@pytest.mark.parametrize("tokens", [1e4, 3e6, 1e9, 2e11])
def test_steps_are_of_a_sensible_size(tokens, length):
    train = schedule(int(tokens), length)
    step = train.batch_size * length
    assert step <= max(STEP_TOKENS, 8 * length)
    assert train.batch_size % train.accumulate == 0
    assert abs(train.steps * step - tokens) <= step / 2 or train.steps == 1
    assert train.steps >= 500 or train.batch_size == 8
    assert train.steps <= 2000 or step == STEP_TOKENS
    # What is measured on the way costs little beside what is trained, but for the shortest runs.
    measured = train.steps / train.eval_every * train.eval_rows * length
    assert measured <= 0.05 * tokens or train.eval_rows == 4


def test_a_branch_that_is_there_is_not_trained(fields, home):
    fields["domains"]["b"] = {"text": str(home / "b.jsonl"), "branch": str(home / "seed")}
    configs = stages_of(project(**fields, method="btx", compare=["dense"]))
    assert "expert_b" not in configs
    assert configs["mix"].mix.experts == ("@expert_a", str(home / "seed"))
    assert configs["evaluate"].evaluate.models["expert_b"] == str(home / "seed")
    assert abs(tokens_of(configs["dense"]) - 6_000) <= 128


def test_a_seed_from_scratch_has_the_table_of_its_tokenizer(fields, tokenizer_file):
    fields |= {"seed": "tiny", "seed_tokens": 9_000, "tokenizer": str(tokenizer_file)}
    made = project(**fields)
    configs = stages_of(made)
    assert configs["seed"].init == "scratch" and configs["seed"].model.vocab_size == 320
    assert configs["seed"].data.train == "a:50.00,b:50.00"
    assert configs["expert_a"].init == "@seed" and "seed" in made.pipeline["expert_a"].needs


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": ""}, "project.seed: missing; name a checkpoint"),
        ({"seed": "tiny"}, "project.tokenizer: missing, but seed='tiny' is trained from scratch"),
        ({"tokenizer": "x.model"}, "project.tokenizer='x.model': the seed is already trained"),
        (
            {"seed": "tiny", "seed_tokens": 9_000, "tokenizer": "no.model"},
            "project.tokenizer: no.model does not exist",
        ),
        ({"domains": {}}, "project.domains: fewer than two"),
        ({"domains": {"a b": {"text": "x"}}}, "project.domains.a b.tokens: missing"),
        ({"method": "btm"}, "project.method='btm': did you mean 'btx'?"),
        ({"compare": ["dens"]}, "project.compare='dens': did you mean 'dense'?"),
        ({"finetune_token": 3}, "project.finetune_token: unknown key; did you mean"),
        ({"finetune_tokens": 0}, "project.finetune_tokens=0: must"),
        ({"heldout_fraction": 1.0}, "project.heldout_fraction=1.0: must lie in [0, 1)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_told_by_its_key(fields, changes, told):
    with pytest.raises(ConfigError) as error:
        project(**fields | changes)
    assert told in str(error.value)


def test_all_that_is_wrong_is_told_at_once(fields, home):
    fields["domains"]["general"] = {"text": "x", "tokens": 3, "branch": str(home / "seed")}
    with pytest.raises(ConfigError) as error:
        project(**fields | {"seed": "", "method": "flexolmo"})
    told = str(error.value)
    assert "project.seed: missing" in told
    assert "project.domains.general.tokens=3: the domain already has a branch" in told


def test_what_is_trained_on_all_domains_has_a_lower_rate(fields, tokenizer_file):
    scratch = fields | {"seed": "tiny", "tokenizer": str(tokenizer_file), "seed_tokens": 10**6}
    configs = stages_of(project(**scratch, compare=("dense", "upcycling")))
    rates = {name: config.train.learning_rate for name, config in configs.items() if config.train}
    later = pytest.approx(0.3 * 2e-3)
    assert rates == {
        **dict.fromkeys(("seed", "expert_a", "expert_b"), 0.0),
        **dict.fromkeys(("finetune", "dense", "upcycling"), later),
    }
    finetune = stages_of(project(**fields))["finetune"].train
    assert finetune and finetune.learning_rate == 0, "of a seed that is there the peak is not known"


def test_a_foreign_branch_does_not_mix_exactly(fields, home):
    fields["domains"]["b"] = {"text": "x", "branch": str(home / "seed")}
    with pytest.raises(ConfigError, match=r"domains\.b\.branch: with method='ffn_only'"):
        project(**fields, method="ffn_only")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"heldout_fraction": 0.0}, "project.heldout_fraction=0: no text would be left"),
        ({"sequence_length": 10**6}, r"sequence_length=1000000: longer than .*; use at most \d+"),
        (
            {"seed": "tny"},
            "project.seed='tny': neither an existing directory nor a size .*did you mean 'tiny'",
        ),
    ],
)
def test_what_would_be_found_late_is_told_by_the_name_of_its_field(fields, changes, told):
    with pytest.raises(ConfigError, match=told) as error:
        project(**fields | changes)
    assert len(error.value.args) == 1


def test_domains_have_names_of_files(fields):
    fields["domains"] = {"seed": {"text": "x", "tokens": 3}, "../b": {"text": "x", "tokens": 3}}
    with pytest.raises(ConfigError) as error:
        project(**fields)
    assert str(error.value).count("not a valid name for a domain") == 2


def test_methods_and_comparisons_are_those_of_the_command_line():
    from btx_jax.cli.new import new

    options = {option.name: option for option in new.params}
    assert list(options["method"].type.choices) == list(METHODS)
    assert list(options["compare"].type.choices) == list(projects.COMPARISONS)
