import dataclasses
import functools
import gzip
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from btx_jax.config.config import ComputeConfig, TaskConfig
from btx_jax.data import files
from btx_jax.data.sources import read_json_lines
from btx_jax.errors import UserError
from btx_jax.evaluation import tasks
from btx_jax.evaluation.likelihood import Scorer, encode_pair
from btx_jax.models.llama import Llama, init_params, logits
from tests.models.test_llama import MOE, TINY

COMPUTE = ComputeConfig(dtype="float32", remat="none", loss_chunk=32)
CHOICE = TaskConfig("multiple_choice", "f", "{q}")


@functools.cache
def whole(model):
    llama = Llama(model, dataclasses.replace(COMPUTE, dispatch="ragged"))
    return jax.jit(
        lambda params, ids_BT: logits(
            params, llama.apply({"params": params}, ids_BT, jnp.ones_like(ids_BT))[0]
        )
    )


def log_p(model, params, front, behind):
    """Log-probability of one pair, without padding."""
    ids = [*front, *behind]
    table = jax.nn.log_softmax(whole(model)(params, np.array([ids[:-1]]))[0])
    places = range(len(front) - 1, len(ids) - 1)
    return sum(float(table[i, ids[i + 1]]) for i in places), all(
        int(table[i].argmax()) == ids[i + 1] for i in places
    )


@pytest.mark.parametrize("model", [TINY, MOE], ids=["dense", "moe"])
def test_likelihoods_do_not_depend_on_batch_or_padding(model, one_device):
    params = jax.tree.map(
        lambda x: x * 5 if x.ndim > 2 else x, init_params(model, jax.random.key(0))
    )
    rng = np.random.default_rng(0)
    pairs = [
        (
            rng.integers(0, 64, rng.integers(1, 30)).tolist(),
            rng.integers(0, 64, rng.integers(1, 6)).tolist(),
        )
        for _ in range(7)
    ]
    greedy = int(np.argmax(whole(model)(params, np.array([pairs[0][0]]))[0, -1]))
    pairs.append((pairs[0][0], [greedy]))
    got = Scorer(model, params, COMPUTE, one_device, 3)(pairs)
    for pair, found in zip(pairs, got, strict=True):
        want, is_greedy = log_p(model, params, *pair)
        assert found.log_p == pytest.approx(want, abs=2e-5)
        assert found.is_greedy == is_greedy
    assert got[-1].is_greedy


def test_a_long_context_loses_its_front_and_an_empty_one_is_refused(one_device):
    params = init_params(TINY, jax.random.key(0))
    score = Scorer(TINY, params, COMPUTE, one_device, 2)
    long = np.random.default_rng(0).integers(0, 64, TINY.context + 40).tolist()
    (found,) = score([(long, [3, 4])])
    assert found.log_p == pytest.approx(
        log_p(TINY, params, long[-(TINY.context - 1) :], [3, 4])[0], abs=2e-5
    )
    with pytest.raises(ValueError, match="needs a token in front"):
        score([([], [3])])


def test_pairs_are_cut_where_the_context_ends_and_spaces_go_to_the_continuation(tokenizer):
    front, behind = encode_pair(tokenizer, "the river ", "mountain")
    assert front == tokenizer.encode_prompt("the river")
    assert front + behind == tokenizer.encode_prompt("the river mountain")
    front, behind = encode_pair(tokenizer, "", "mountain")
    assert front == [tokenizer.bos if tokenizer.bos is not None else tokenizer.eos]
    assert tokenizer.decode(behind) == "mountain"


def test_choices_are_judged_by_sum_and_per_character(tokenizer):
    items = [
        {"q": "a", "choices": ["xx", "yyyyyyyy"], "gold": 1},
        {"q": "b", "choices": ["xx", "yyyyyyyy"], "gold": 0},
    ]
    said = iter([-4.0, -8.0, -4.0, -30.0])  # per character: -2 and -1; -2 and -3.75

    def score(pairs, name):
        from btx_jax.evaluation.likelihood import Likelihood

        return [Likelihood(next(said), False) for _ in pairs]

    found = tasks.multiple_choice(items, [], CHOICE, tokenizer, score, "t")
    assert (found["accuracy"], found["accuracy_normalised"]) == (0.5, 1.0)
    assert found["accuracy_stderr"] == pytest.approx(0.5)
    assert found["items"][0]["log_p"] == [-4.0, -8.0]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("so 3 + 4 = 7.", "7"),
        ("#### 1,234", "1234"),
        ("-2.50 dollars", "-2.5"),
        ("Paris \n", "Paris"),
        ("1 then 2.0", "2"),
        ("", ""),
        ("about .5", "0.5"),
        ("pages 3-4", "4"),
        ("is \N{MINUS SIGN}5", "-5"),
        ("(-3)", "-3"),
        ("$-.50", "-0.5"),
        ("-0.0", "0"),
        ("1.2.3", "3"),
    ],
)
def test_the_last_number_is_the_answer(text, want):
    assert tasks.answer(text) == want


class Parrot:
    """A generator with prescribed answers."""

    context = 500

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.prompts = tokenizer, texts, []

    def generate(self, rows, new_tokens, sampling, seed, is_finished):
        prompts = [self.tokenizer.decode(row) for row in rows]
        self.prompts += prompts
        return [
            self.tokenizer.encode(next(t for q, t in self.texts.items() if p.endswith(q)))
            for p in prompts
        ]


def test_exact_match_with_solved_examples_in_front(tokenizer):
    task = TaskConfig("exact_match", "f", "Q: {q} A:", shots=1, shots_file="g", stop=("\n",))
    parrot = Parrot(tokenizer, {"1+1 A:": "x 2\nQ: 9", "2+2 A:": "5"})
    items = [{"q": "1+1", "answer": "2"}, {"q": "2+2", "answer": "4"}]
    found = tasks.exact_match(
        items,
        [{"q": "0+0", "chain_of_thought": "it is 0", "answer": "0"}],
        task,
        tokenizer,
        parrot,
        3,
    )
    assert found["exact_match"] == 0.5
    assert found["items"][0]["text"] == "x 2"
    assert parrot.prompts[0].startswith("Q: 0+0 A: it is 0\n\nQ: ")


def test_a_long_prompt_loses_its_front_and_a_full_context_is_refused(tokenizer):
    task = TaskConfig("exact_match", "f", "{q}", max_tokens=490)
    parrot = Parrot(tokenizer, {"city": "1"})
    tasks.exact_match(
        [{"q": "river " * 40 + "city", "answer": "1"}], [], task, tokenizer, parrot, 1
    )
    assert len(tokenizer.encode(parrot.prompts[0])) <= 10
    with pytest.raises(UserError, match="max_tokens=500: the model's context is 500"):
        tasks.exact_match(
            [{"q": "city", "answer": "1"}],
            [],
            dataclasses.replace(task, max_tokens=500),
            tokenizer,
            parrot,
            1,
        )


def test_code_runs_against_its_tests(tokenizer):
    task = TaskConfig(
        "code", "f", "{prompt}", samples=2, pass_at=(1, 2), temperature=0.5, seconds=5
    )
    item = {
        "prompt": "def f(x):\n",
        "test": "def check(g):\n    assert g(2) == 3",
        "entry_point": "f",
    }
    found = tasks.code(
        [item, item | {"prompt": "def f(y):\n"}],
        task,
        tokenizer,
        Parrot(tokenizer, {"(x):\n": " return x+1", "(y):\n": " return 0"}),
        4,
    )
    assert found["pass@1"] == found["pass@2"] == 0.5
    assert found["items"][0]["passed"] == 2
    assert "AssertionError" in found["items"][1]["samples"][0]["why"]


def test_test_sets_with_faults_are_refused(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"q": "x", "choices": ["a"], "gold": 1}) + "\n")
    items = read_json_lines(str(file), "k.file")
    with pytest.raises(
        UserError, match=r"k.file: item 0 .*gold=1 of 1 choices; must be a number from 0"
    ):
        tasks.check_items(items, CHOICE, "k")
    with pytest.raises(UserError, match=r"k.prompt='\{query\}': k.file: item 0 .* has no 'query'"):
        tasks.check_items(
            [items[0] | {"gold": 0}], dataclasses.replace(CHOICE, prompt="{query}"), "k"
        )
    with pytest.raises(UserError, match="gold='A' of 1 choices"):
        tasks.check_items([items[0] | {"gold": "A"}], CHOICE, "k")
    with pytest.raises(UserError, match="has no field 'gold'; it has choices, q"):
        tasks.check_items([{"q": "x", "choices": []}], CHOICE, "k")
    with pytest.raises(UserError, match="contains no items"):
        tasks.check_items([], CHOICE, "k")
    file.write_text('{"q": 1}\n{"q":')
    with pytest.raises(UserError, match=r"k.file: .*line 2"):
        read_json_lines(str(file), "k.file")
    with pytest.raises(UserError, match=r"k\.file: no file"):
        read_json_lines(str(tmp_path / "no"), "k.file")


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("multiple_choice", {"choices": "abc"}, "choices='abc': must be a list of texts"),
        ("multiple_choice", {"choices": {"a": 1}}, "must be a list of texts"),
        ("multiple_choice", {"choices": ["a", None]}, "must be a list of texts"),
        ("multiple_choice", {"choices": ["a", 3]}, "must be a list of texts"),
        ("multiple_choice", {"choices": None}, "choices=None: must be a list of texts"),
        ("multiple_choice", {"choices": []}, "gold=0 of 0 choices"),
        ("multiple_choice", {"gold": True}, "gold=True of 2 choices; must be a number from 0"),
        ("multiple_choice", {"gold": 1.0}, "gold=1.0 of 2 choices"),
        ("multiple_choice", {"gold": "0"}, "gold='0' of 2 choices"),
        ("multiple_choice", {"gold": -1}, "gold=-1 of 2 choices"),
        ("multiple_choice", {"gold": [0]}, "gold=[0] of 2 choices"),
        ("multiple_choice", {"q": None}, "q is null"),
        ("exact_match", {"answer": None}, "answer=None: must be a text or a number"),
        ("exact_match", {"answer": ["4"]}, "answer=['4']: must be a text or a number"),
        ("exact_match", {"answer": True}, "answer=True: must be a text or a number"),
        ("code", {"test": 3}, "test=3: must be a text"),
        ("code", {"entry_point": None}, "entry_point=None: must be a text"),
    ],
)
def test_fields_of_another_type_are_refused(kind, change, told):
    item = {"q": "x", "choices": ["a", "b"], "gold": 0, "answer": "4"}
    item |= {"prompt": "p", "test": "t", "entry_point": "e"}
    task = TaskConfig(kind, "f", "{q}")
    tasks.check_items([item], task, "k")
    with pytest.raises(UserError) as error:
        tasks.check_items([item, item | change], task, "k")
    assert told in str(error.value) and "item 1 of f" in str(error.value)


def test_test_sets_without_end_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in ("/dev/zero", tmp_path, tmp_path / "pipe.jsonl"):
        with pytest.raises(UserError, match=r"k\.file: no file"):
            read_json_lines(str(path), "k.file")
    bomb = tmp_path / "bomb.jsonl.gz"
    with gzip.open(bomb, "wb") as packed:
        packed.write(b" " * 3000 + b"\n" + b'{"q": 1}\n' * 1000)
    assert len(read_json_lines(str(bomb), "k.file")) == 1000
    with pytest.raises(UserError, match=r"k\.file: .*bomb\.jsonl\.gz is larger than 0 MiB"):
        read_json_lines(str(bomb), "k.file", max_bytes=5000)
    monkeypatch.setattr(files, "MAX_LINE", 2000)
    with pytest.raises(UserError, match=r"bomb\.jsonl\.gz: a line is longer than .* MiB; split it"):
        read_json_lines(str(bomb), "k.file")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    monkeypatch.setattr(files, "MAX_LINE", 2**20)
    with pytest.raises(UserError, match=r"k\.file: .*line 1: "):
        read_json_lines(str(tmp_path / "deep.jsonl"), "k.file")
