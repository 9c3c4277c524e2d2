"""Recipes whose shared weights are solved from text."""

import itertools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from btx_jax.architectures.tensors import EMBEDDING, HEAD
from btx_jax.checkpoints.checkpoint import find_checkpoint, find_own_tokenizer, open_reader
from btx_jax.checkpoints.router_statistics import FILE
from btx_jax.commands import experts
from btx_jax.errors import UserError
from tests.commands.test_ridge import GOLDEN, TOKENS, _in_golden, gates, mix, rms, text, turned

__all__ = ["_in_golden", "text"]  # fixtures
ALPHA = 0.7
UNTAUGHT = [{"source_model": name} for name in "abc"]


def regmean(tmp_path, text, name="out", names="abc", **changes):
    given = {"merge": "regmean", "alpha": ALPHA, "tokens": TOKENS, "gate_mode": "normal"}
    return mix(tmp_path, text, name, names=names, **given | changes)


def read_all(path):
    reader = open_reader(find_checkpoint(path))
    return {tensor: reader.read(tensor) for tensor in reader.slots}


# The slow twin: float64, one document at a time, sharing no code.


def forward(model, merged, ids, places):
    """Forward pass of one document: yields (names of linear layers, their input [tokens, width])
    and continues with the weights that `merged` then contains for them."""
    x = merged["model.embed_tokens.weight"][ids]
    for layer in range(3):
        p = f"model.layers.{layer}"
        names = [f"{p}.self_attn.{part}_proj.weight" for part in "qkv"]
        h = rms(x, merged[f"{p}.input_layernorm.weight"])
        yield names, h
        q, k, v = ((h @ merged[name].T).reshape(len(ids), -1, 4).swapaxes(0, 1) for name in names)
        q, k, v = turned(q, places), np.repeat(turned(k, places), 2, 0), np.repeat(v, 2, 0)
        scores = np.where(np.tri(len(ids)), q @ k.swapaxes(1, 2) / 2, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y = (weights / weights.sum(-1, keepdims=True)) @ v
        y = y.swapaxes(0, 1).reshape(len(ids), -1)
        yield [f"{p}.self_attn.o_proj.weight"], y
        x = x + y @ merged[f"{p}.self_attn.o_proj.weight"].T
        h = rms(x, merged[f"{p}.post_attention_layernorm.weight"])
        gate, up, down = (model[f"{p}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        a = h @ gate.T
        x = x + (a / (1 + np.exp(-a)) * (h @ up.T)) @ down.T
    yield ["lm_head.weight"], rms(x, merged["model.norm.weight"])


def twin(tmp_path, names="abc"):
    """Shared parameters by name, float64."""
    models = [
        {key: array.astype(np.float64) for key, array in loaded.items()}
        for loaded in (load_file(GOLDEN / name / "model.safetensors") for name in names)
    ]
    merged = {key: np.mean([model[key] for model in models], axis=0) for key in models[0]}
    tokenizer = find_own_tokenizer(find_checkpoint(GOLDEN / "base"))
    share, passing = [], []
    for model, name in zip(models, names, strict=True):
        documents = [
            tokenizer.encode_prompt(json.loads(line)["body"])
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        ]
        every = list(itertools.chain(*documents))
        # Counted: all text except the last eighth. Read: the first TOKENS.
        counted = every[: len(every) - len(every) // 8]
        share.append(np.bincount(counted, minlength=259) / len(counted))
        stream = [(i, n) for n, ids in enumerate(documents) for i in ids][:TOKENS]
        of_model = []
        for start in range(0, TOKENS, 128):
            row = stream[start : start + 128]
            for number in dict.fromkeys(n for _, n in row):
                places = np.array([place for place, (_, n) in enumerate(row) if n == number])
                of_model.append((model, [row[place][0] for place in places], places))
        passing.append(of_model)
    for token in range(259):
        weights = np.array([counts[token] for counts in share])
        if weights.any():
            rows = np.stack([model["model.embed_tokens.weight"][token] for model in models])
            merged["model.embed_tokens.weight"][token] = weights @ rows / weights.sum()
    running = [[forward(m, merged, *rest) for m, *rest in of_model] for of_model in passing]
    for _ in range(7):  # twice in each of three layers, and once for the head
        asked = [[next(document) for document in of_model] for of_model in running]
        grams = []
        for of_model in asked:
            used = np.concatenate([x for _, x in of_model])[: TOKENS - TOKENS // 8]
            gram = used.T @ used / len(used)
            grams.append(ALPHA * gram + (1 - ALPHA) * np.diag(np.diag(gram)))
        for name in asked[0][0][0]:
            right = sum(g @ model[name].T for g, model in zip(grams, models, strict=True))
            merged[name] = np.linalg.solve(sum(grams), right).T
    return merged


def is_shared(tensor):
    return tensor.expert is None and not tensor.is_router


def test_what_experts_share_is_that_of_a_twin_in_float64(tmp_path, text):
    made, expected = read_all(regmean(tmp_path, text)), twin(tmp_path)
    shared = [tensor for tensor in made if is_shared(tensor)]
    assert len(shared) == 3 + 3 * 6
    for tensor in shared:
        np.testing.assert_allclose(made[tensor], expected[str(tensor)], atol=2e-5, err_msg=tensor)
    plain = read_all(mix(tmp_path, text, "plain", gate_mode="normal", experts=UNTAUGHT))
    for tensor in made:
        same = made[tensor].tobytes() == plain[tensor].tobytes()
        assert same is not (tensor in (EMBEDDING, HEAD) or "attention/" in tensor.part), tensor


def test_routers_and_what_experts_share_are_solved_in_one_pass(tmp_path, text):
    """Statistics stored with the mixture belong to the weights that were written."""
    both = regmean(tmp_path, text, gate_mode="ridge")
    made, alone = read_all(both), read_all(regmean(tmp_path, text, "alone"))
    for tensor in made:
        same = made[tensor].tobytes() == alone[tensor].tobytes()
        assert same is not tensor.is_router, tensor
    again = tmp_path / "again"
    experts.drop(str(both), 1, str(tmp_path / "dropped"))
    experts.add(str(tmp_path / "dropped"), str(GOLDEN / "b"), str(again), text=text("b"))
    found = read_all(again)
    order = {0: 0, 1: 2, 2: 1}
    for tensor, array in found.items():
        if tensor.is_router:
            theirs = made[tensor][[0, 2, 1]]
            np.testing.assert_allclose(array, theirs, atol=1e-5)
        elif tensor.expert is None:
            assert array.tobytes() == made[tensor].tobytes()
        else:
            whose = tensor._replace(expert=order[tensor.expert])
            assert array.tobytes() == made[whose].tobytes()


def test_fitted_routers_come_from_the_same_pass(tmp_path, text):
    """They identify the domains, and leave no statistics."""
    out = regmean(tmp_path, text, gate_mode="logistic")
    made, alone = read_all(out), read_all(regmean(tmp_path, text, "alone"))
    for tensor in made:
        same = made[tensor].tobytes() == alone[tensor].tobytes()
        assert same is not tensor.is_router, tensor
    assert not (out / FILE).exists()
    ridge = regmean(tmp_path, text, "ridge", gate_mode="ridge")
    cosine = np.einsum("led,led->le", *(unit(gates(path)) for path in (out, ridge)))
    assert cosine.min() > 0.5


def unit(rows):
    """Rows without their common component, which affects no choice, normalised."""
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_one_model_in_several_places_counts_once(tmp_path, text):
    """Its texts count together, as one text that contains both."""
    named = [{"source_model": n, "text": text(t)} for n, t in ("aa", "ab", "cc")]
    made = read_all(regmean(tmp_path, text, experts=named))
    same = read_all(regmean(tmp_path, text, "same", experts=named[:2] * 2))
    dense = load_file(GOLDEN / "a" / "model.safetensors")
    for tensor in filter(is_shared, made):
        assert same[tensor].tobytes() == dense[str(tensor)].tobytes(), "of one model, that model"
    embedding = made[EMBEDDING]
    theirs = load_file(GOLDEN / "c" / "model.safetensors")["model.embed_tokens.weight"]
    own = dense["model.embed_tokens.weight"]
    tokenizer = find_own_tokenizer(find_checkpoint(GOLDEN / "base"))
    shares = []
    for name in "abc":
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        ids = [i for line in lines for i in tokenizer.encode_prompt(json.loads(line)["body"])]
        ids = ids[: len(ids) - len(ids) // 8]
        shares.append(np.bincount(ids, minlength=259) / len(ids))
    of_a, of_c = (shares[0] + shares[1]) / 2, shares[2]
    of_a = np.where(of_a + of_c == 0, 1, of_a)
    of_c = np.where((shares[0] + shares[1] + shares[2]) == 0, 1, of_c)
    expected = (of_a[:, None] * own + of_c[:, None] * theirs) / (of_a + of_c)[:, None]
    np.testing.assert_allclose(embedding, expected, atol=1e-6)


def test_a_shared_experts_model_is_one_of_them(tmp_path, text):
    shared = [{"source_model": "c", "text": text("c")}]
    beside = regmean(tmp_path, text, names="ab", shared_experts=shared, architecture="qwen")
    made = read_all(beside)
    without = read_all(regmean(tmp_path, text, "without", names="ab"))
    assert not np.allclose(made[EMBEDDING], without[EMBEDDING])
    # The first ones are solved before any feed-forward is read: as with three routed experts.
    among = read_all(regmean(tmp_path, text, "among"))
    np.testing.assert_array_equal(made[EMBEDDING], among[EMBEDDING])
    for part in ("query", "key", "value", "out"):
        tensor = next(t for t in made if t.layer == 0 and t.part == f"attention/{part}")
        np.testing.assert_allclose(made[tensor], among[tensor], atol=1e-6)


def test_inputs_that_determine_nothing_are_told_and_leave_nothing(tmp_path, text):
    (tmp_path / "few").write_text("sum number plus minus")
    named = [{"source_model": name, "text": str(tmp_path / "few")} for name in "abc"]
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        UserError, match=r"layers\.0\.self_attn\.q_proj.*does not determine.*alpha=1"
    ):
        regmean(tmp_path, text, experts=named, alpha=1)
    (tmp_path / "out.yml").unlink()
    assert sorted(tmp_path.iterdir()) == before
    assert regmean(tmp_path, text, experts=named, alpha=0.9).exists()


def test_what_is_not_finite_in_a_source_is_told_as_that(tmp_path, text):
    broken = dict(load_file(GOLDEN / "b" / "model.safetensors"))
    key = "model.layers.1.self_attn.q_proj.weight"
    broken[key] = np.where(np.arange(16) == 3, np.nan, broken[key]).astype(np.float32)
    (tmp_path / "b").mkdir()
    for file in (GOLDEN / "b").iterdir():
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    save_file(broken, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    named = [{"source_model": n, "text": text(n)} for n in "ac"]
    named.append({"source_model": str(tmp_path / "b"), "text": text("b")})
    with pytest.raises(UserError, match=r"(?s)tmp.*b.*layers\.1\.self_attn\.q_proj"):
        regmean(tmp_path, text, experts=named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"experts": UNTAUGHT}, "experts.0.: no text, and merge='regmean' reads it"),
        ({"base": "copy"}, "merge='regmean': only used with base: average"),
        (
            {"method": "blend"},
            "merge='regmean': experts of method 'blend' come from no single source",
        ),
        ({"shared_experts": [{"source_model": "c"}]}, "shared_experts.0.: no text, and merge="),
        ({"alpha": 1.5}, "alpha=1.5: must lie in"),
        ({"merge": "mean"}, "alpha=0.7: only used with merge regmean; remove it or set merge"),
        (
            {"merge": "mean", "alpha": 0.99},
            "tokens=800: only used with gate_mode='ridge' or 'logistic' and merge='regmean'",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(tmp_path, text, changes, told):
    with pytest.raises(UserError, match=told):
        regmean(tmp_path, text, **changes)
