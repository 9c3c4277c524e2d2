import re

from btx_jax.reporting.plots import loss_curves, loss_matrix, routing_maps


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
