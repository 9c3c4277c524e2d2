"""Test sets: multiple choice by log-likelihood, generation with exact match, code with pass@k.

A test set is a file of JSON lines (.gz and .zst are decompressed). Tasks treat dense models,
mixtures and checkpoints of any format alike; each returns its metrics and the result of every item.
"""

import functools
import re
import statistics
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.sharding import Mesh

from btx_jax.config.config import ComputeConfig, TaskConfig
from btx_jax.config.model_config import ModelConfig
from btx_jax.config.schema import shown
from btx_jax.data.documents import is_heldout
from btx_jax.data.sources import read_json_lines
from btx_jax.data.tokenizers import Tokenizer
from btx_jax.errors import ConfigError, UserError
from btx_jax.evaluation.continuation import continuation
from btx_jax.evaluation.generation import Generator, Sampling
from btx_jax.evaluation.likelihood import Scorer, encode_pair
from btx_jax.evaluation.sandbox import Limits, UnitTests, pass_at_k, run_programs
from btx_jax.models.llama import Params
from btx_jax.parallel.hosts import is_first
from btx_jax.progress import bar
from btx_jax.terminal import counted

MAX_TEST_SET = 2**28  # bytes, decompressed

Item = dict[str, Any]
FIELDS = {
    "multiple_choice": ("choices", "gold"),
    "exact_match": ("answer",),
    "code": ("prompt", "test", "entry_point"),
}


class TestSet(NamedTuple):
    """The items of a test set, and the solved examples that precede every question."""

    items: list[Item]
    examples: list[Item]


def read_test_set(task: TaskConfig, key: str) -> TestSet:
    """Read a task's test set. key: of the task, for error messages. Raises UserError when a file
    cannot be read or its items do not fit the task."""
    limit = 0 if task.heldout_fraction else task.limit
    items = read_json_lines(task.file, f"{key}.file", limit, MAX_TEST_SET)
    if task.heldout_fraction:
        check_items(items, task, key)
        kept = [item for item in items if is_heldout(solved(item, task), task.heldout_fraction)]
        if not kept:
            raise ConfigError(
                f"{key}.heldout_fraction={task.heldout_fraction}: holds out none of"
                f" {counted(len(items), 'item')} of {task.file}; raise it"
            )
        items = kept[: task.limit or None]
    examples = (
        read_json_lines(task.shots_file, f"{key}.shots_file", task.shots, MAX_TEST_SET)
        if task.shots
        else []
    )
    for each in (items, examples) if task.shots else (items,):
        check_items(each, task, key)
    return TestSet(items, examples)


def too_long(task: TaskConfig, context: int) -> bool:
    """Whether the task generates so many tokens that a model with this context has no room for a
    prompt."""
    return task.kind != "multiple_choice" and task.max_tokens >= context


class Candidate:
    """One model, to be scored on test sets.

    params: as trained, or as returned by `load_for_inference`; copied only for generation. stops:
    ids that end a text. batch_size must be divisible by the mesh's data, fsdp and expert axes;
    results do not depend on it.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Params,
        compute: ComputeConfig,
        mesh: Mesh,
        tokenizer: Tokenizer,
        stops: Sequence[int],
        batch_size: int,
    ):
        self._tokenizer, self._batch_size = tokenizer, batch_size
        self._scorer = Scorer(model, params, compute, mesh, batch_size)
        self._generator = functools.cache(lambda: Generator(model, params, compute, mesh, stops))

    def try_on(self, test_set: TestSet, task: TaskConfig, name: str) -> dict[str, Any]:
        """Score the model on a test set: its metrics, and `items`: the result of each item. name:
        for the progress bar."""
        items, examples = test_set
        if task.kind == "multiple_choice":
            return multiple_choice(items, examples, task, self._tokenizer, self._scorer, name)
        generator, size = self._generator(), self._batch_size
        if task.kind == "exact_match":
            return exact_match(items, examples, task, self._tokenizer, generator, size)
        return code(items, task, self._tokenizer, generator, size)


def scores(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of a test set's result, without its items."""
    return {metric: value for metric, value in result.items() if metric != "items"}


def check_items(items: Sequence[Item], task: TaskConfig, key: str) -> None:
    """Raise UserError, naming the item, when a field is missing or has the wrong type, or a gold
    choice does not exist."""
    if not items:
        raise UserError(f"{key}.file: {task.file} contains no items; name another file")
    for number, item in enumerate(items):
        where = f"{key}.file: item {number} of {task.file}"
        for name in FIELDS[task.kind]:
            if name not in item:
                raise UserError(f"{where} has no field {name!r}; it has {', '.join(sorted(item))}")
        if wrong := _wrong_field(item, task.kind):
            raise UserError(f"{where}: {wrong}")
        for _, field, _, _ in string.Formatter().parse(task.prompt):
            if field in item and item[field] is None:
                raise UserError(f"{key}.prompt={task.prompt!r}: {where}: {field} is null")
        try:
            task.prompt.format_map(item)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{key}.prompt={task.prompt!r}: {where} has no {error}") from error


def _wrong_field(item: Item, kind: str) -> str:
    """The problem with the types of an item's fields; "" for none."""
    if kind == "multiple_choice":
        choices, gold = item["choices"], item["gold"]
        if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
            return f"choices={shown(choices)}: must be a list of texts"
        if type(gold) is not int or gold not in range(len(choices)):
            return f"gold={shown(gold)} of {len(choices)} choices; must be a number from 0"
    elif kind == "exact_match":
        if not isinstance(item["answer"], str | int | float) or isinstance(item["answer"], bool):
            return f"answer={shown(item['answer'])}: must be a text or a number"
    else:
        for name in FIELDS["code"]:
            if not isinstance(item[name], str):
                return f"{name}={shown(item[name])}: must be a text"
    return ""


def solved(item: Item, task: TaskConfig) -> str:
    """An item's prompt followed by its right answer."""
    answer = (
        item["choices"][int(item["gold"])]
        if "choices" in item
        else str(item.get("chain_of_thought") or item["answer"])
    )
    return f"{task.prompt.format_map(item)} {answer}"


def few_shot(examples: Sequence[Item], task: TaskConfig) -> str:
    """The solved examples that precede every question."""
    return "".join(f"{solved(item, task)}\n\n" for item in examples)


def multiple_choice(
    items: Sequence[Item],
    examples: Sequence[Item],
    task: TaskConfig,
    tokenizer: Tokenizer,
    score: Scorer,
    name: str,
) -> dict[str, Any]:
    """accuracy: by the most likely choice. accuracy_normalised: by the most likely per character of
    the choice (lm-evaluation-harness's acc_norm)."""
    shots = few_shot(examples, task)
    pairs = [
        encode_pair(tokenizer, shots + task.prompt.format_map(item), f" {choice}")
        for item in items
        for choice in item["choices"]
    ]
    found = iter(score(pairs, name))
    results = []
    for item in items:
        log_p = [next(found).log_p for _ in item["choices"]]
        normalised = [
            value / max(len(choice), 1)
            for value, choice in zip(log_p, item["choices"], strict=True)
        ]
        results.append(
            {
                "log_p": log_p,
                "right": _best(log_p) == item["gold"],
                "right_normalised": _best(normalised) == item["gold"],
            }
        )
    return _with_error("accuracy", [r["right"] for r in results]) | {
        **_with_error("accuracy_normalised", [r["right_normalised"] for r in results]),
        "items": results,
    }


def exact_match(
    items: Sequence[Item],
    examples: Sequence[Item],
    task: TaskConfig,
    tokenizer: Tokenizer,
    generator: Generator,
    batch_size: int,
) -> dict[str, Any]:
    """Share of items whose generated answer matches: compared by the last number of both texts if
    both have one, otherwise as text."""
    shots = few_shot(examples, task)
    texts = continuations(
        tokenizer,
        generator,
        [shots + task.prompt.format_map(item) for item in items],
        task,
        batch_size,
    )
    results: list[dict[str, Any]] = [
        {"text": text, "right": answer(text) == answer(str(item["answer"]))}
        for item, text in zip(items, texts, strict=True)
    ]
    return _with_error("exact_match", [r["right"] for r in results]) | {"items": results}


def code(
    items: Sequence[Item],
    task: TaskConfig,
    tokenizer: Tokenizer,
    generator: Generator,
    batch_size: int,
) -> dict[str, Any]:
    """pass@k for every k of task.pass_at, from task.samples programs per item, run in the sandbox
    against the item's tests."""
    prompts = [task.prompt.format_map(item) for item in items for _ in range(task.samples)]
    texts = continuations(tokenizer, generator, prompts, task, batch_size)
    owners = [item for item in items for _ in range(task.samples)]
    programs = [item["prompt"] + text for item, text in zip(owners, texts, strict=True)]
    tests = [UnitTests(item["test"], item["entry_point"], item["prompt"]) for item in owners]
    outcomes = run_programs(programs, Limits(task.seconds), tests=tests)
    results: list[dict[str, Any]] = []
    for number in range(len(items)):
        mine = slice(number * task.samples, (number + 1) * task.samples)
        ran = [
            {"text": text, "passed": o.passed, "why": o.why}
            for text, o in zip(texts[mine], outcomes[mine], strict=True)
        ]
        results.append({"passed": sum(o["passed"] for o in ran), "samples": ran})
    metrics = {
        f"pass@{k}": statistics.mean(pass_at_k(task.samples, r["passed"], k) for r in results)
        for k in task.pass_at
    }
    return metrics | {"items": results}


def continuations(
    tokenizer: Tokenizer,
    generator: Generator,
    prompts: Sequence[str],
    task: TaskConfig,
    batch_size: int,
) -> list[str]:
    """The text generated after each prompt, up to the first of task.stop. Prompts of similar length
    share a batch; where a prompt leaves no room for task.max_tokens, its beginning is truncated.
    Raises UserError when the context has no room for a prompt at all."""
    room = generator.context - task.max_tokens
    if room < 1:
        raise UserError(
            f"max_tokens={task.max_tokens}: the model's context is {generator.context}; lower it"
        )
    ids = [tokenizer.encode_prompt(prompt)[-room:] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    texts = [""] * len(ids)
    batches = range(0, len(order), batch_size)
    for start in bar(batches, desc="generate", unit="batch", shown=is_first()):
        chosen = order[start : start + batch_size]
        rows = [ids[i] for i in chosen] + [ids[chosen[-1]]] * (batch_size - len(chosen))

        def stops(row: int, new: list[int], rows: list[list[int]] = rows) -> bool:
            return continuation(tokenizer, rows[row], new, task.stop)[1]

        found = generator.generate(
            rows,
            task.max_tokens,
            Sampling(task.temperature, task.top_p),
            seed=start,
            is_finished=stops,
        )
        for i, new in zip(chosen, found, strict=False):
            texts[i], _ = continuation(tokenizer, ids[i], new, task.stop)
    return texts


def answer(text: str) -> str:
    """The last number of a text, without thousands separators and trailing zeros, or the stripped
    text if it has none."""
    numbers = re.findall(
        r"(?:(?<![\w.)])-)?(?:\d[\d,]*(?:\.\d+)?|(?<!\d)\.\d+)", text.replace("\N{MINUS SIGN}", "-")
    )
    if not numbers:
        return text.strip()
    number = numbers[-1].replace(",", "").replace("-.", "-0.")
    number = f"0{number}" if number.startswith(".") else number
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return "0" if number == "-0" else number


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _with_error(name: str, right: Sequence[bool]) -> dict[str, float]:
    """The mean over items and its standard error."""
    mean = statistics.mean(right)
    return {name: mean, f"{name}_stderr": (mean * (1 - mean) / max(len(right) - 1, 1)) ** 0.5}
