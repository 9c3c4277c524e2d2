"""Recipes whose routers are solved from text, and exact addition and removal of experts."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from btx_jax.checkpoints.checkpoint import find_checkpoint, find_own_tokenizer, open_reader
from btx_jax.checkpoints.router_statistics import FILE, RouterStatistics, Writer
from btx_jax.commands import experts
from btx_jax.commands import mix as mix_recipe
from btx_jax.commands.verify import verify
from btx_jax.config.ridge import RidgeConfig
from btx_jax.errors import UserError
from btx_jax.mixing.ridge import Moments, solve
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "mixing" / "golden"
WORDS = {
    "a": "sum number plus minus equals two three",
    "b": "river tree stone bird cloud rain",
    "c": "def return class import self yield",
}
TOKENS = 800
UNTAUGHT = [{"source_model": name} for name in WORDS]


@pytest.fixture(autouse=True)
def _in_golden(monkeypatch):
    monkeypatch.chdir(GOLDEN)


@pytest.fixture
def text(tmp_path):
    """A function from a domain to the file of its text."""
    rng = random.Random(0)
    for name, words in WORDS.items():
        lines = (" ".join(rng.choices(words.split(), k=20)) for _ in range(60))
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"body": line}) + "\n" for line in lines)
        )
    return lambda name: f"{tmp_path / name}.jsonl#body"


def mix(tmp_path, text, name="out", *, names="abc", output_format="", ridge=None, **changes):
    recipe = {
        "base_model": "base",
        "base": "average",
        "gate_mode": "ridge",
        "experts": [{"source_model": n, "text": text(n)} for n in names],
    } | changes
    if ridge is not None or recipe["gate_mode"] == "ridge":
        recipe |= {"tokens": TOKENS, "ridge": {"temperature": 1.0} | (ridge or {})}
    (tmp_path / f"{name}.yml").write_text(yaml.safe_dump(recipe))
    out = str(tmp_path / name)
    mix_recipe.run(str(tmp_path / f"{name}.yml"), out, verify=True, output_format=output_format)
    return tmp_path / name


def gates(path):
    reader = open_reader(find_checkpoint(path))
    return np.stack([reader.read(tensor) for tensor in reader.slots if tensor.is_router])


def all_moments(path):
    found = RouterStatistics(path / FILE)
    return [Moments(*found.read(layer)) for layer in found.about.layers]


# The slow twin: float64, one document at a time, sharing no code.


def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def turned(x_HTK, places_T):
    half = x_HTK.shape[-1] // 2
    angle = places_T[:, None] * 10000.0 ** (-np.arange(half) / half)
    first, second = x_HTK[..., :half], x_HTK[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def twin_states(models, expert, ids, places, shared=None):
    """Router inputs of one document, [layers, tokens, D]. models: tensors by name. shared: of the
    shared expert, with a gate of one half."""

    def mean(name):
        return np.mean([model[name].astype(np.float64) for model in models], axis=0)

    def swiglu(model, prefix, x):
        gate, up, down = (
            model[f"{prefix}.mlp.{part}_proj.weight"].astype(np.float64)
            for part in ("gate", "up", "down")
        )
        a = x @ gate.T
        return (a / (1 + np.exp(-a)) * (x @ up.T)) @ down.T

    x, seen = mean("model.embed_tokens.weight")[ids], []
    for layer in range(3):
        p = f"model.layers.{layer}"
        h = rms(x, mean(f"{p}.input_layernorm.weight"))
        q, k, v = (
            (h @ mean(f"{p}.self_attn.{part}_proj.weight").T)
            .reshape(len(ids), -1, 4)
            .swapaxes(0, 1)
            for part in "qkv"
        )
        q, k, v = turned(q, places), np.repeat(turned(k, places), 2, 0), np.repeat(v, 2, 0)
        scores = np.where(np.tri(len(ids)), q @ k.swapaxes(1, 2) / 2, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ v
        x = x + out.swapaxes(0, 1).reshape(len(ids), -1) @ mean(f"{p}.self_attn.o_proj.weight").T
        seen.append(rms(x, mean(f"{p}.post_attention_layernorm.weight")))
        x = x + swiglu(models[expert], p, seen[-1])
        if shared is not None:
            x = x + swiglu(shared, p, seen[-1]) / 2
    return np.stack(seen)


def twin_rows(tmp_path, names="abc", shared=None):
    """Router rows, [layers, experts, D], float64."""
    models = [load_file(GOLDEN / name / "model.safetensors") for name in names]
    tokenizer = find_own_tokenizer(find_checkpoint(GOLDEN / "base"))
    grams, totals = [], []
    averaged = models if shared is None else [*models, shared]
    for expert, name in enumerate(names):
        documents = [
            tokenizer.encode_prompt(json.loads(line)["body"])
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
        ]
        stream = [(i, n) for n, ids in enumerate(documents) for i in ids][:TOKENS]
        states = []
        for start in range(0, TOKENS, 128):  # rows of the model's context length
            row = stream[start : start + 128]
            for number in dict.fromkeys(n for _, n in row):
                places = np.array([place for place, (_, n) in enumerate(row) if n == number])
                ids = [row[place][0] for place in places]
                states.append(twin_states(averaged, expert, ids, places, shared))
        used = np.concatenate(states, axis=1)[:, : TOKENS - TOKENS // 8]
        grams.append(np.einsum("lti,ltj->lij", used, used))
        totals.append(used.sum(1))
    a = sum(grams) + 1e-2 * np.eye(16)
    rows = np.stack([np.linalg.solve(a, total[..., None])[..., 0] for total in totals], axis=1)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_rows_are_those_of_a_twin_in_float64(tmp_path, text, capsys):
    out = mix(tmp_path, text)
    np.testing.assert_allclose(gates(out), twin_rows(tmp_path), atol=2e-4)
    told = capsys.readouterr().out
    assert "share of held-out tokens whose top-1 expert is their own" in " ".join(told.split())
    shares = [float(word.rstrip("%")) for word in told.split() if word.endswith("%")]
    assert len(shares) == 9 and np.mean(shares[3:]) > 60, "of 3 layers and 3 experts; chance is 33"
    assert (out / FILE).stat().st_size < 20_000


def test_a_shared_expert_answers_too(tmp_path, text):
    out = mix(tmp_path, text, shared_experts=[{"source_model": "base"}], architecture="qwen2_moe")
    shared = load_file(GOLDEN / "base" / "model.safetensors")
    np.testing.assert_allclose(gates(out), twin_rows(tmp_path, shared=shared), atol=2e-4)


def test_dense_layers_between_have_no_statistics(tmp_path, text):
    out = mix(tmp_path, text, layers=[0, 2], output_format="btx_jax")
    assert RouterStatistics(out / FILE).about.layers == (0, 2)
    whole = twin_rows(tmp_path)[0]
    np.testing.assert_allclose(gates(out)[0], whole, atol=2e-4)


def test_an_expert_that_goes_and_comes_back_changes_nothing(tmp_path, text):
    """From its text and from the statistics alone, in both formats."""
    whole = mix(tmp_path, text)
    ours = mix(tmp_path, text, "ours", output_format="btx_jax")
    for name, start in (("theirs", whole), ("ours", ours)):
        dropped = tmp_path / f"{name}_without"
        experts.drop(str(start), 1, str(dropped))
        for how in ("text", "statistics"):
            again = tmp_path / f"{name}_{how}"
            given = {"text": text("b"), "statistics": str(whole / FILE)}[how]
            experts.add(str(dropped), "b", str(again), **{how: given})
            order = [0, 2, 1]
            np.testing.assert_allclose(gates(again), gates(whole)[:, order], atol=1e-6)
            for one, other in zip(all_moments(again), all_moments(whole), strict=True):
                other = Moments(*(part[order] for part in other))
                joint = solve(other, RidgeConfig())
                np.testing.assert_allclose(solve(one, RidgeConfig()), joint, atol=1e-10)


def test_dropping_gives_the_rows_of_a_solution_without_it(tmp_path, text):
    ridge = {"penalty": 0.5, "temperature": 0.25, "weights": "share"}
    whole = mix(tmp_path, text, ridge=ridge)
    experts.drop(str(whole), 0, str(tmp_path / "less"))
    about = RouterStatistics(tmp_path / "less" / FILE).about
    assert (about.ridge, about.tokens) == (RidgeConfig(**ridge), TOKENS)
    assert [expert.name for expert in about.experts] == ["b", "c"]
    for layer, sums in enumerate(all_moments(whole)):
        expected = solve(sums.without(0), RidgeConfig(**ridge))
        np.testing.assert_allclose(gates(tmp_path / "less")[layer], expected, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 4)


def test_prompts_are_text_where_there_is_none(tmp_path, text):
    prompts = [{"source_model": name, "positive_prompts": [WORDS[name]] * 4} for name in "abc"]
    out = mix(tmp_path, text, experts=prompts)
    assert all((sums.count_E > 16).all() for sums in all_moments(out))


def test_a_statistics_file_is_told_from_that_of_other_experts(tmp_path, text):
    whole = mix(tmp_path, text)
    experts.drop(str(whole), 1, str(tmp_path / "less"))
    with pytest.raises(
        UserError, match="does not cover base: none of its experts has the same feed-forwards"
    ):
        experts.add(
            str(tmp_path / "less"), "base", str(tmp_path / "x"), statistics=str(whole / FILE)
        )
    with pytest.raises(
        UserError, match="give either --text or --statistics of the new expert's domain, or"
    ):
        experts.add(str(tmp_path / "less"), "b", str(tmp_path / "x"))
    mix(tmp_path, text, "plain", gate_mode="normal", experts=UNTAUGHT)
    with pytest.raises(UserError, match=r"--text: .* has no router_statistics\.safetensors"):
        experts.add(str(tmp_path / "plain"), "b", str(tmp_path / "x"), text=text("b"))
    assert not (tmp_path / "x").exists()


def rewritten(path, change=lambda *sums: sums, **about):
    """Rewrite the file with other sums or metadata, and a correct checksum."""
    found = RouterStatistics(path)
    with path.with_suffix(".new").open("wb") as file:
        writer = Writer(file, dataclasses.replace(found.about, **about))
        for layer in found.about.layers:
            writer.write(layer, *change(*found.read(layer)))
        writer.finish(found.about.base, [expert.digest for expert in found.about.experts])
    path.with_suffix(".new").replace(path)


def nan(gram, total, count):
    gram[0, 0, 0] = np.nan
    return gram, total, count


def no_tokens(gram, total, count):
    return gram, total, count * 0


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), "truncated"),
        (lambda file: file.write_bytes(b"not safetensors"), "not a safetensors file"),
        (lambda file: flip(file, -3), "is damaged .checksum."),
        (lambda file: shutil.copy(GOLDEN / "a" / "model.safetensors", file), "not router statis"),
        (lambda file: rewritten(file, nan), "NaN, infinity or no token in layer 0"),
        (lambda file: rewritten(file, no_tokens), "NaN, infinity or no token in layer 0"),
        (lambda file: tell(file, '"layers": [0, 1, 2]', '"layers": [0, 1, 9]'), "is damaged"),
        (lambda file: tell(file, '"width": 16', '"width": 17'), "is damaged"),
        (lambda file: tell(file, '"penalty": 0.01', '"penalty": -1.1'), "is damaged: .*penalty"),
        (lambda file: tell(file, '"experts": [', '"e*perts": ['), "is damaged"),
    ],
)
def test_damaged_statistics_are_one_line_and_nothing_is_written(tmp_path, text, damage, told):
    out = mix(tmp_path, text)
    damage(out / FILE)
    for make in (
        lambda: experts.drop(str(out), 0, str(tmp_path / "x")),
        lambda: experts.add(str(out), "base", str(tmp_path / "x"), text=text("b")),
    ):
        with pytest.raises(UserError, match=told) as error:
            make()
        assert "\n" not in str(error.value) and str(out / FILE) in str(error.value)
    assert not (tmp_path / "x").exists()


def test_verify_reads_the_statistics_too(tmp_path, text):
    out = mix(tmp_path, text)
    assert (FILE, "checksum: 3 experts in 3 layers", True) in [*verify(str(out))]
    flip(out / FILE, -3)
    (bad,) = (finding for finding in verify(str(out)) if not finding.good)
    assert bad.name == FILE and "is damaged (checksum)" in bad.told


def test_experts_come_and_go_in_bfloat16(tmp_path, text):
    """Sums are of the weights as written, although additions are in float32."""
    whole = mix(tmp_path, text, dtype="bfloat16")
    experts.drop(str(whole), 2, str(tmp_path / "less"))
    for how, given in (("text", text("c")), ("statistics", str(whole / FILE))):
        experts.add(str(tmp_path / "less"), "c", str(tmp_path / how), **{how: given})
        again = gates(tmp_path / how)
        assert again.dtype.name == "bfloat16"
        assert again.tobytes() == gates(whole).tobytes()


def test_nan_in_a_source_is_told_as_such(tmp_path, text):
    folder = tmp_path / "broken"
    shutil.copytree(GOLDEN / "b", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    named = [{"source_model": n, "text": text(n)} for n in "ac"]
    broken = [*named, {"source_model": str(folder), "text": text("b")}]
    with pytest.raises(UserError, match=r"NaN .* model\.layers\.1\.mlp\.up_proj\.weight"):
        mix(tmp_path, text, experts=broken)
    less = mix(tmp_path, text, "less", experts=named)
    with pytest.raises(UserError, match=r"NaN .* model\.layers\.1\.mlp\.up_proj\.weight"):
        experts.add(str(less), str(folder), str(tmp_path / "out"), text=text("b"))
    assert not (tmp_path / "out").exists()


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def tell(file, old, new):
    """Replace text in its metadata, which is JSON within JSON."""
    old, new = (text.replace('"', '\\"').encode() for text in (old, new))
    data = file.read_bytes()
    assert old in data and len(old) == len(new)
    file.write_bytes(data.replace(old, new))


def test_statistics_of_other_weights_are_refused(tmp_path, text):
    """Statistics of a mixture that was trained since, with other layers, or with another
    tokenizer."""
    out = mix(tmp_path, text)
    other = mix(tmp_path, text, "other", base="copy")
    less = mix(tmp_path, text, "less", names="ac")
    partly = mix(tmp_path, text, "partly", layers=[0, 2], output_format="btx_jax")
    for place, told in (
        (other, "different weights outside the experts"),
        (less, "is for 2 experts, but .* has 3"),
        (partly, "mixtures in different layers"),
    ):
        shutil.copytree(out, tmp_path / "mixed")
        shutil.copy(place / FILE, tmp_path / "mixed" / FILE)
        for make in (
            lambda: experts.drop(str(tmp_path / "mixed"), 0, str(tmp_path / "x")),
            lambda: experts.add(
                str(tmp_path / "mixed"), "base", str(tmp_path / "x"), text=text("b")
            ),
        ):
            with pytest.raises(UserError, match=told):
                make()
        shutil.rmtree(tmp_path / "mixed")
    rewritten(out / FILE, tokenizer="f" * 64)
    with pytest.raises(UserError, match="a different tokenizer"):
        experts.drop(str(out), 0, str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


def test_text_that_is_none_is_told_before_anything_is_done(tmp_path, text, monkeypatch):
    monkeypatch.setattr(mix_recipe, "solve_routers", None)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "short.jsonl").write_text('{"body": "two"}\n')
    for name, told in (
        ("nowhere", "experts.1..text: no file matches"),
        ("empty", "experts.1..text: .* yields no text: 1 x file without documents"),
        ("short", "experts.1..text: . tokens in total; give at least 16"),
    ):
        named = [{"source_model": n, "text": text(name if n == "b" else n)} for n in "abc"]
        with pytest.raises(UserError, match=told):
            mix(tmp_path, text, experts=named)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"experts": [{"source_model": "a"}]}, "experts.0.: no text, and gate_mode='ridge'"),
        ({"experts": [{"source_model": n, "text": "x"} for n in "ab"]}, "all have the same text"),
        (
            {"gate_mode": "normal"},
            "experts.0..text: only used with gate_mode='ridge' or 'logistic' and merge='regmean'",
        ),
        (
            {"gate_mode": "normal", "experts": UNTAUGHT, "ridge": {"penalty": 1}},
            "ridge: only used with gate_mode ridge",
        ),
        ({"method": "blend"}, "experts of method 'blend' come from no single source"),
        ({"ridge": {"penalty": -1}}, "ridge.penalty=-1"),
        ({"ridge": {"penalties": 1}}, "penalties"),
        (
            {"shared_experts": [{"source_model": "c", "text": "x"}]},
            "shared_experts.0..text: only used with merge='regmean'",
        ),
        (
            {"experts": [{"source_model": "a", "text": "x", "negative_prompts": ["y"]}]},
            "negative_prompts: not used by gate_mode='ridge'",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(tmp_path, text, changes, told):
    with pytest.raises(UserError, match=told):
        mix(tmp_path, text, **changes)


def test_numbers_may_be_text_as_yaml_reads_them(tmp_path, text):
    out = mix(tmp_path, text, ridge={"penalty": "1e-1"})
    assert RouterStatistics(out / FILE).about.ridge.penalty == 0.1


def test_a_singular_layer_is_named(tmp_path, text):
    """Only one repeated token: a single state is ever seen."""
    named = [
        {"source_model": name, "positive_prompts": [letter * 40]}
        for name, letter in (("a", "e"), ("b", "f"))
    ]
    with pytest.raises(
        UserError, match=r"the router of layer 0: .* tokens do not determine its rows .* raise it"
    ):
        mix(tmp_path, text, ridge={"penalty": 0}, experts=named)
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from btx_jax.commands import mix
from btx_jax.mixing import closed_form
real = closed_form.solved
def slow(layer, *rest):
    if layer == 1:
        print("ready", flush=True)
        time.sleep(600)
    return real(layer, *rest)
closed_form.solved = slow
mix.run(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("merge", ["mean", "regmean"])  # the latter has solved two layers by then
def test_a_kill_during_the_pass_leaves_nothing(tmp_path, text, merge):
    mix(tmp_path, text, merge=merge)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "tmp").mkdir()
    before = sorted(tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "out.yml"), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert any(line == "ready\n" for line in process.stdout)
    process.kill()
    process.communicate()
    assert sorted(tmp_path.iterdir()) == before and not list((tmp_path / "tmp").iterdir())


def test_one_experts_layer_is_in_memory_at_a_time(tmp_path, text, monkeypatch):
    """Parameters requested together belong to one layer and at most one expert."""
    asked = []
    real = mix_recipe.make_tensor

    def noting(mixture, tensor):
        asked.append(tensor)
        return real(mixture, tensor)

    monkeypatch.setattr(mix_recipe, "make_tensor", noting)
    monkeypatch.setattr(mix_recipe, "write_checkpoint", lambda *_, **__: None)
    mix(tmp_path, text)
    layers = [tensor.layer for tensor in asked if tensor.layer is not None]
    assert layers == sorted(layers), "one layer after another"
    assert len(asked) == len(set(asked)), "each tensor is read once"
    for layer in range(3):
        numbers = [t.expert for t in asked if t.layer == layer and t.expert is not None]
        assert numbers == sorted(numbers) and set(numbers) == {0, 1, 2}


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, text):
    """Peak size of arrays known to Python, for three layers and for twelve."""

    def peak(layers):
        for name in "abc":
            tensors = load_file(GOLDEN / name / "model.safetensors")
            for key in [*tensors]:
                if key.startswith("model.layers.1."):
                    for layer in range(3, layers):
                        tensors[key.replace(".1.", f".{layer}.", 1)] = tensors[key]
            folder = tmp_path / f"{name}{layers}"
            shutil.copytree(GOLDEN / name, folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        named = [
            {"source_model": str(tmp_path / f"{name}{layers}"), "text": text(name)}
            for name in "abc"
        ]
        recipe = {"base_model": named[0]["source_model"], "experts": named}
        mix(tmp_path, text, f"warm{layers}", **recipe)
        tracemalloc.start()
        mix(tmp_path, text, f"measured{layers}", **recipe)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    states = 3 * 7 * 128 * 16 * 4  # bytes, of one layer of all domains
    assert peak(12) < peak(3) + 2 * states


def test_all_but_the_routers_is_as_with_any_other_mode(tmp_path, text):
    out = mix(tmp_path, text)
    plain = mix(tmp_path, text, "plain", gate_mode="normal", experts=UNTAUGHT)
    one, other = open_reader(find_checkpoint(out)), open_reader(find_checkpoint(plain))
    for tensor in one.slots:
        same = one.read(tensor).tobytes() == other.read(tensor).tobytes()
        assert same is not tensor.is_router, tensor
