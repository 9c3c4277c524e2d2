import re

import pytest

from btx_jax.reporting.plots import (
    LABEL,
    loss_against_compute,
    loss_curves,
    loss_matrix,
    mixing_probes,
    redundancy_maps,
    routing_maps,
    running_mean,
    short,
)


def texts(svg):
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_curves_name_every_run_that_trained_and_skip_lines_without_a_loss():
    curves = {
        "seed": [{"step": s, "lm_loss": 5.0 - s} for s in range(1, 4)],
        "mix": [{"step": 1, "heldout": {}}],
        "finetune": [{"step": 1, "lm_loss": 2.0}, {"step": 1, "heldout": {}}],
    }
    shown = texts(loss_curves(curves))
    assert "seed" in shown and "finetune" in shown and "mix" not in shown


def test_probes_name_every_branch_and_both_losses():
    points = [(0, 2.0, 2.0, 0.0), (50, 1.5, 1.8, 0.05)]
    shown = texts(mixing_probes({"expert_math": points, "$code$": points}))
    assert {"expert_math", "$code$", "branch", "averaged with the seed"} <= set(shown)
    assert "barrier, nats per token" in shown
    assert mixing_probes({}) == ""


def test_the_matrix_shows_every_loss():
    summary = {
        "domains": ["math", "code"],
        "models": {
            n: {"nats_per_token": {"math": a, "code": b}}
            for n, a, b in [("x", 1.234, 5), ("y", 2, 3)]
        },
    }
    shown = texts(loss_matrix(summary))
    assert {"1.23", "5.00", "2.00", "3.00", "math", "code", "x", "y"} <= set(shown)


def test_routing_shows_every_share_by_domain_layer_and_expert():
    shown = texts(
        routing_maps(
            {"math": [[0.25, 0.75], [1.0, 0.0]], "code": [[0.5, 0.5], [0.1, 0.9]]}, ["a", "b"]
        )
    )
    assert {
        "25%",
        "75%",
        "100%",
        "0%",
        "50%",
        "10%",
        "90%",
        "math",
        "code",
        "layer 1",
        "a",
        "b",
    } <= set(shown)


def test_names_are_no_mathematics():
    names = [r"$\frac$", "$x$", "a_{b}^", "[/red]"]
    curves = {name: [{"step": s, "lm_loss": 2.0} for s in (1, 2)] for name in names}
    assert set(names) <= set(texts(loss_curves(curves)))
    models = {name: {"nats_per_token": {"$d$": 1.0, r"$\sum": 2.0}} for name in names}
    shown = texts(loss_matrix({"domains": ["$d$", r"$\sum"], "models": models}))
    assert {*names, "$d$", r"$\sum"} <= set(shown)


def test_a_run_shorter_than_the_window_has_a_curve_too():
    assert list(running_mean([4.0, 2.0, 3.0])) == [4.0, 3.0, 3.0]
    assert list(running_mean(range(30)))[-1] == pytest.approx(24.5), "of ten"
    one = loss_curves({"a": [{"step": 1, "lm_loss": 2.0}]})
    many = loss_curves({"a": [{"step": s, "lm_loss": 5.0 - s} for s in range(1, 4)]})
    points = [len(re.findall("<use [^>]*#1f77b4", svg)) for svg in (one, many)]
    assert points == [2, 4], "every step is marked, and the legend"
    assert loss_curves({}) == loss_curves({"mix": [{"step": 1, "heldout": {}}]}) == ""


def test_compute_is_drawn_where_it_is_known_and_differs():
    models = {
        name: {"flops": flops, "nats_per_token": {"a": 1.0}}
        for name, flops in (("x", 0.0), ("y", 1e9), ("z", None))
    }
    shown = texts(loss_against_compute(models, "x"))
    assert "x" in shown and "y" in shown and "z" not in shown
    assert "training FLOPs after the seed" in shown
    assert loss_against_compute({name: models[name] for name in "xz"}, "") == ""


@pytest.mark.parametrize("name", [r"$\frac$", r"$\frac{1}{2}$", "a_b^c $x$", "[/red]"])
def test_names_are_no_formulas(name):
    assert name in texts(
        loss_matrix({"domains": [name], "models": {"m": {"nats_per_token": {name: 1.0}}}})
    )


def test_a_long_name_keeps_its_ends():
    assert short("expert_math") == "expert_math"
    assert len(short("a" * 100)) == LABEL
    assert short("beginning" + "x" * 90 + "end").startswith("beginning")
    assert short("beginning" + "x" * 90 + "end").endswith("end")


def test_opposite_experts_do_not_look_alike():
    layer = {"deviation_cosine": [[1.0, -1.0], [-1.0, 1.0]]}
    alike = {"deviation_cosine": [[1.0, 1.0], [1.0, 1.0]]}
    images = [
        re.search(r'base64,([^"]*)', redundancy_maps({7: x}, ["a", "b"]))[1] for x in (layer, alike)
    ]
    assert images[0] != images[1]
    assert "layer 7" in texts(redundancy_maps({7: layer}, ["a", "b"])), "its own number"
