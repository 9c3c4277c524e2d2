import io
import json
import math
import os
import re

import numpy as np
import pytest
from rich.console import Console

from btx_jax import buckets, terminal
from btx_jax.reporting.compare import compare, interval, markdown, verdict
from btx_jax.reporting.metrics import MetricsWriter, bad_lines, read_metrics
from btx_jax.reporting.page import render
from btx_jax.reporting.page import verdict as page_verdict
from btx_jax.reporting.summary import COSTS, gains, print_tables, summarise, tables, task_table

NAMES = ("seed", "expert_math", "btx_untuned", "btx")
ROLES = {"seed": "seed", "experts": ["expert_math"], "mixture": "btx"}
DOMAINS = ["math", "<script>alert(1)</script>"]


def routing(share):
    found = {
        "load": [[share, 1 - share]],
        "gate_load": [[share, 1 - share]],
        "pairs": [[[0.0, share], [1 - share, 0.0]]],
        "entropy": [0.5],
        "dead": [[]],
    }
    text = {"pieces": ["a", "</span><script>alert(2)</script>"], "layers": [0]}
    text |= {"experts": [[[1, 0], [0, 1]]], "gates": [[[0.75, 0.25], [0.6, 0.4]]]}
    overlap = {
        "cosine": [[1, 0.9], [0.9, 1]],
        "deviation_cosine": [[1, -1], [-1, 1]],
        "norm_ratio": [1.0, 1.0],
    }
    return {
        "domains": dict.fromkeys(DOMAINS, found),
        "mutual_information": [0.1],
        "redundancy": [overlap],
        "texts": {"own": text},
    }


def results(shift=0.0):
    return {
        "domains": DOMAINS,
        "roles": ROLES,
        "models": {
            name: {
                "nats_per_token": {"math": 3.0 - i / 2 + shift, DOMAINS[1]: 2.0 + i / 10},
                "bits_per_byte": {"math": 2.0, DOMAINS[1]: 1.0},
                "heldout_tokens": {},
                "tokens": 1000 * (i + 1),
                "flops": 1e9 * (i + 1),
                "chip_seconds": 2.0 * (i + 1),
                "critical_seconds": 1.0 * (i + 1),
                "peak_bytes": 1 << 20,
                "params_total": 10,
                "params_active": 5,
                **({"routing": routing(0.1 * i)} if name.startswith("btx") else {}),
            }
            for i, name in enumerate(NAMES)
        },
    }


RESULTS = results()
CURVES = {
    "seed": [{"step": s, "lm_loss": 5 - s / 50} for s in range(1, 40)],
    "finetune": [
        {"step": s, "lm_loss": 4.0, "routing": {"dropped": [0.1, 0.3]}} for s in range(1, 30)
    ]
    + [{"step": 29, "heldout": {}}],
}


def test_metrics_of_lost_steps_are_removed_on_resume_and_a_torn_line_is_ignored(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"loss": 1.0 * step, "routing": {"load": [[0.5, 0.5]]}})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    MetricsWriter(tmp_path, 3).close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("kind", ["fuse.gcsfuse", "ext4"])
def test_on_a_mounted_bucket_what_is_synced_is_closed(tmp_path, monkeypatch, kind):
    """A mounted bucket stores a file as it was when closed, and nothing of one that never was."""
    mounts = tmp_path / "mounts"
    point = str(tmp_path / "my bucket").replace(" ", r"\040")
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nbucket {point} {kind} rw 0 0\n")
    monkeypatch.setattr(buckets, "MOUNTS", mounts)
    workdir = tmp_path / "my bucket" / "run"
    workdir.mkdir(parents=True)
    is_mounted = kind != "ext4"
    assert buckets.is_mounted(workdir) == is_mounted
    assert not buckets.is_mounted(tmp_path)
    writer = MetricsWriter(workdir, 0)
    for step in range(1, 5):
        writer.write(step, {"loss": 1.0 * step})
        if step % 2 == 0:
            writer.sync()
            open_files = {
                os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
            }
            files = {str(path) for path in (workdir / "tensorboard").iterdir()}
            assert len(files & open_files) == 1
            assert len(files - open_files) == (step // 2 if is_mounted else 0)
    writer.close()
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"step": 2, "lo\x00s": 1.0',
        b"\xff\xfe",
        b"",
        b"7",
        b'{"loss": 1.0}',
        b'{"step": "2"}',
        b"[" * 10**5,
    ],
)
def test_a_damaged_line_of_metrics_is_set_aside_and_all_others_are_kept(tmp_path, damage, caplog):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(1, 6)]
    lines[1] = damage
    file.write_bytes(b"\n".join(lines) + b"\n")
    assert bad_lines(file.parent) == [2]
    MetricsWriter(tmp_path, 4).close()
    assert [line["step"] for line in read_metrics(file.parent)] == [1, 3, 4]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damage + b"\n"
    assert "moved damaged lines (2) to" in caplog.text
    MetricsWriter(tmp_path, 4).close()
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damage + b"\n", "once"


def test_summary_leaves_the_seeds_own_costs_out_and_shows_btx():
    summary = summarise(RESULTS, CURVES, {"seed": 1.5})
    assert summary["shown"] == "btx"
    assert list(summary["models"]) == list(NAMES)
    assert summary["models"]["seed"]["tokens"] == 0, "of the seed, too"
    assert summary["before"]["tokens"] == 1000
    assert summary["models"]["btx"]["tokens"] == 3000
    assert summary["models"]["btx"]["critical_seconds"] == 3.0
    assert summary["routing"]["btx"] == RESULTS["models"]["btx"]["routing"]
    assert abs(summary["dropped_fraction"] - 0.2) < 1e-12
    assert summary["comparison"] is None
    assert summary["curves"]["seed"][-1] == (39, pytest.approx(5 - 34.5 / 50))
    assert len(summary["curves"]["finetune"]) == 6
    json.dumps(summary)
    assert [table.row_count for table in tables(summary)] == [4, 4]


def test_what_was_spent_elsewhere_is_unknown_and_not_zero():
    held = results()
    for name, unknown in (("seed", ["S"]), ("btx_untuned", ["S"]), ("btx", ["S", "L"])):
        held["models"][name]["unknown"] = unknown
    summary = summarise(held, CURVES, {})
    assert {name: model["tokens"] for name, model in summary["models"].items()} == {
        "seed": None,
        "expert_math": 1000,
        "btx_untuned": 2000,  # costs unknown for the seed are subtracted with it
        "btx": None,
    }
    assert summary["models"]["btx"]["critical_seconds"] is None
    console = Console(width=200, file=io.StringIO())
    console.print(tables(summary)[1])
    lines = {line.split()[1]: line for line in console.file.getvalue().splitlines() if "│" in line}
    assert "unknown" in lines["seed"] and lines["btx"].count("unknown") == 5
    assert "unknown" not in lines["btx_untuned"]
    page = render("t", summary, CURVES, [], {})
    assert "<td>btx</td><td>unknown</td>" in page and "<td>btx_untuned</td><td>2,000</td>" in page
    table = markdown(compare([held["models"], held["models"]]), summary["models"])
    assert table.count("unknown") == 10


def test_gains_by_hand():
    models = {
        "seed": {"nats_per_token": {"a": 4.0, "b": 3.0}},
        "expert_a": {"nats_per_token": {"a": 3.0, "b": 3.5}},
        "btx": {"nats_per_token": {"a": 3.25, "b": 3.1}},
    }
    found = gains(models, ["a", "b"], "seed", ["expert_a"])
    assert found["general"] == "b"
    btx = found["models"]["btx"]
    assert btx["over_seed"] == pytest.approx({"a": 0.75, "b": -0.1})
    assert btx["specialist_gap"] == pytest.approx({"a": 0.25, "b": -0.4})
    assert btx["recovered"] == {"a": pytest.approx(0.75), "b": None}
    assert btx["forgetting"] == pytest.approx(0.1)
    assert found["models"]["expert_a"]["forgetting"] == pytest.approx(0.5)
    models["btx"]["nats_per_token"]["b"] = 2.8
    better = gains(models, ["a", "b"], "seed", ["expert_a"])
    assert better["models"]["btx"]["forgetting"] == pytest.approx(-0.2), "better than the seed"
    assert gains(models, ["a", "b"], "", []) == gains(models, ["a", "b"], "seed", []) == {}


def renamed(**names):
    """RESULTS with other names for models, also in the roles."""
    new = lambda name: names.get(name, name)  # noqa: E731
    models = {new(name): model for name, model in RESULTS["models"].items()}
    roles = {
        "seed": new("seed"),
        "experts": [new("expert_math")],
        "mixture": new("btx"),
    }
    return RESULTS | {"models": models, "roles": roles}


def test_roles_decide_what_is_told_and_names_do_not():
    usual = summarise(RESULTS, {}, {})
    other = summarise(renamed(seed="SmolLM2", expert_math="maths", btx="all together"), {}, {})
    assert list(other["gains"]["models"].values()) == list(usual["gains"]["models"].values())
    assert (other["seed"], other["shown"]) == ("SmolLM2", "all together")
    assert other["models"]["maths"]["tokens"] == usual["models"]["expert_math"]["tokens"]
    nameless = summarise({key: RESULTS[key] for key in ("domains", "models")}, {}, {})
    assert nameless["gains"] == {}
    assert nameless["models"]["expert_math"]["tokens"] == 2000, "nothing is taken off"
    assert nameless["shown"] == "btx", "the longest trained"
    told = page_verdict(other)
    assert told.startswith("all together has the lowest mean held-out loss")
    assert "all together gains" in told and "its experts 0.100 above it" in told


def test_models_stand_in_the_order_of_their_roles_and_then_as_named():
    models = dict(reversed(RESULTS["models"].items()))
    summary = summarise(RESULTS | {"models": models}, {}, {})
    assert list(summary["models"]) == ["seed", "expert_math", "btx", "btx_untuned"]


def test_a_mixture_below_its_seed_is_said_to_be_below():
    better = json.loads(json.dumps(RESULTS))
    better["models"]["btx"]["nats_per_token"][DOMAINS[1]] = 1.9
    assert f"on {DOMAINS[1]} it is 0.100 below seed" in page_verdict(summarise(better, {}, {}))
    assert f"on {DOMAINS[1]} it is 0.300 above seed" in page_verdict(summarise(RESULTS, {}, {}))


def test_costs_that_are_not_known_are_said_to_be_so(capsys):
    unknown = json.loads(json.dumps(RESULTS))
    for cost in COSTS:
        unknown["models"]["btx"][cost] = None
    summary = summarise(unknown, {}, {}, [results(0.1)])
    assert summary["models"]["btx"]["tokens"] is None
    page = render("t", summary, {}, [], {})
    assert "<tr><td>btx</td>" + "<td>unknown</td>" * 5 in page
    assert "| btx | " in markdown(summary["comparison"], summary["models"])
    print_tables(tables(summary))
    assert capsys.readouterr().out.count("unknown") >= 5


def test_names_are_printed_whole_and_as_they_are(capsys):
    names = {"seed": "[/red]", "btx": "b" * 120, "expert_math": "[bold]m[/bold]"}
    print_tables(tables(summarise(renamed(**names), {}, {})))
    out = capsys.readouterr().out
    assert all(name in out for name in names.values())
    assert "…" not in out


def test_a_page_of_test_sets_alone():
    model = RESULTS["models"]["seed"] | {
        "nats_per_token": {}, "bits_per_byte": {}, "tasks": {"piqa": {"accuracy": 0.5}},
    }  # fmt: skip
    summary = summarise({"domains": [], "models": {"a": model, "b": model}}, {}, {})
    page = render("t", summary, {}, [], {})
    assert "2 models on test sets alone" in page and "<svg" not in page


def test_intervals_are_students_and_verdicts_need_them_to_exclude_the_other_sign():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / math.sqrt(3), rel=1e-6))
    assert interval([1.0]) == (1.0, math.inf)
    assert [verdict("<", -0.2, half) for half in (0.1, 0.3)] == ["held", "undecided"]
    assert verdict("<", 0.2, 0.1) == "not held"
    assert [verdict("=", 0.0, half) for half in (0.01, 0.1)] == ["held", "undecided"]
    assert verdict("=", 0.1, 0.05) == "not held"


def test_arms_are_compared_in_pairs_over_seeds():
    seeds = [results(shift)["models"] for shift in (0.0, 0.5, 1.0)]
    found = compare(seeds)
    assert found["seeds"] == 3
    assert found["arms"]["btx"]["losses"] == pytest.approx(
        [np.mean([1.5 + s, 2.3]) for s in (0.0, 0.5, 1.0)]
    )
    (claim,) = [c for c in found["claims"] if (c["left"], c["right"]) == ("btx", "seed")]
    assert claim["mean"] == pytest.approx(-0.6), "what all seeds share cancels"
    assert claim["half_width"] == pytest.approx(0, abs=1e-9)
    assert claim["verdict"] == "held"
    one = compare(seeds[:1])
    assert {c["verdict"] for c in one["claims"]} == {"undecided"}
    text = markdown(one, summarise(RESULTS, {}, {})["models"])
    assert "| btx | 1.900 one seed | 1 | 3k |" in text, "after the seed"
    models = {"a|b": seeds[0]["btx"], "c": seeds[0]["seed"]}
    piped = markdown(compare([models]), models)
    assert r"| a\|b | 1.900" in piped


@pytest.mark.parametrize("name", ["[/red]", "[bold]x", "[/]", "\x1b[2Jx"])
def test_tables_show_names_that_look_like_markup(name):
    columns = ["math", name]
    model = results()["models"]["btx"]
    model = {k: v for k, v in model.items() if k != "routing"} | {
        "nats_per_token": dict.fromkeys(columns, 1.0),
        "bits_per_byte": dict.fromkeys(columns, 1.0),
    }
    models = {name: model | {"tasks": {name: {"accuracy": 0.5}}}, "other": model}
    summary = summarise({"domains": columns, "models": models}, {}, {})
    for console in (Console, terminal.Console):
        stream = io.StringIO()
        for table in (*tables(summary), task_table(models)):
            console(file=stream, width=250).print(table)
        assert stream.getvalue().count(terminal.plain(name)) == 5
        assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("others", [(), (results(0.1), results(0.2))])
def test_page_is_self_contained_and_escapes_text(others):
    summary = summarise(RESULTS, CURVES, {"seed": 1.5}, others)
    page = render(
        "a <b> title",
        summary,
        CURVES,
        ["math", "seed"],
        {"seed": {"config": '{"x": "</pre><script>"}', "sha256": "0" * 64}},
    )
    assert page.count("<script") == 2, "its own data and its own code"
    assert "alert(2)" in page
    assert page.count("<svg") == (6 if others else 5)
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*', page), "the page asks for something"
    assert "btx has the lowest mean held-out loss" in page
    data = json.loads(re.search(r'<script id="choices"[^>]*>(.*?)</script>', page, re.S)[1])
    assert data["texts"]["own"]["experts"] == [[[1, 0], [0, 1]]]
    assert re.search(r'<span data-experts="1 0" title="seed 0.75, math 0.25"[^>]*>a</span>', page)


def test_probes_of_branches_are_drawn_and_told_and_other_pages_show_nothing_of_them():
    def line(step, own, mixed, barrier):
        domains = lambda x: {d: {"nats_per_token": x + i} for i, d in enumerate(DOMAINS)}  # noqa: E731
        probed = {"heldout_mixed": domains(mixed), "barrier": barrier}
        return {"step": step, "heldout": domains(own)} | probed

    branch = [line(0, 2.0, 2.0, 0.0), {"step": 1, "lm_loss": 1.0}, line(9, 1.0, 1.25, -0.25)]
    summary = summarise(RESULTS, CURVES | {"<i>expert": branch}, {})
    points = [(0, 2.5, 2.5, 0.0), (9, 1.5, 1.75, -0.25)]
    assert summary["probes"] == {"<i>expert": points}
    page, plain = (render("t", x, {}, [], {}) for x in (summary, summarise(RESULTS, CURVES, {})))
    assert page.count("<svg") == plain.count("<svg") + 1
    assert "<td>&lt;i&gt;expert</td><td>9</td><td>1.500</td><td>1.750</td><td>-0.250</td>" in page
    assert 'href="#probes"' in page and 'id="probes"' in page
    assert "#probes" not in plain and 'id="probes"' not in plain and "basin" not in plain


def test_a_page_without_mixtures_has_no_routing():
    dense = {"domains": DOMAINS, "models": {"seed": RESULTS["models"]["seed"]}}
    page = render("t", summarise(dense, {}, {}), {}, [], {})
    assert page.count("<svg") == 1, "one model has no compute to compare, and nothing trained"
    assert "<script" not in page
    assert 'href="#curves"' not in page


def test_a_page_without_shown_texts_has_routing_alone():
    mixture = RESULTS["models"]["btx"]
    silent = mixture | {"routing": mixture["routing"] | {"texts": {}}}
    found = RESULTS | {"models": RESULTS["models"] | {"btx": silent}}
    page = render("t", summarise(found, {}, {}), {}, [], {})
    assert 'id="routing"' in page and "#tokens" not in page and 'id="tokens"' not in page
