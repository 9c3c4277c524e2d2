import json
import re

from btx_jax.reporting.metrics import MetricsWriter, read_metrics
from btx_jax.reporting.page import render
from btx_jax.reporting.summary import summarise, table

NAMES = ("seed", "expert_math", "btx_untuned", "btx")
RESULTS = {
    "domains": ["math", "<script>alert(1)</script>"],
    "models": {
        name: {
            "nats_per_token": {"math": 3.0 - i / 2, "<script>alert(1)</script>": 2.0 + i / 10},
            "bits_per_byte": {"math": 2.0, "<script>alert(1)</script>": 1.0},
            "heldout_tokens": {},
            "train_tokens": 1000 * (i + 1),
            "train_flops": 1e9,
            "params_total": 10,
            "params_active": 5,
            "load": {"math": [[0.1 * i, 1 - 0.1 * i]], "<script>alert(1)</script>": [[0.5, 0.5]]} if name.startswith("btx") else {},
        }
        for i, name in enumerate(NAMES)
    },
}
CURVES = {
    "seed": [{"step": s, "lm_loss": 5 - s / 50} for s in range(1, 40)],
    "finetune": [{"step": s, "lm_loss": 4.0, "routing": {"dropped": [0.1, 0.3]}} for s in range(1, 30)] + [{"step": 29, "heldout": {}}],
}


def test_metrics_of_lost_steps_are_removed_on_resume_and_a_torn_line_is_ignored(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.write(step, {"loss": 1.0 * step, "routing": {"load": [[0.5, 0.5]]}})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    MetricsWriter(tmp_path, 3).close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert list((tmp_path / "tensorboard").iterdir())


def test_summary_has_the_promised_keys_and_the_longest_trained_mixtures_routing():
    summary = summarise(RESULTS, CURVES, {"seed": 1.5})
    assert set(summary) == {"domains", "models", "routing", "wall_seconds"}
    assert set(summary["models"]["btx"]) == {
        "nats_per_token", "bits_per_byte", "train_tokens", "train_flops", "params_total", "params_active",
    }  # fmt: skip
    assert summary["routing"]["load"] == RESULTS["models"]["btx"]["load"]
    assert abs(summary["routing"]["dropped_fraction"] - 0.2) < 1e-12
    json.dumps(summary)
    assert table(summary).row_count == 4


def test_page_is_self_contained_and_escapes_text():
    summary = summarise(RESULTS, CURVES, {"seed": 1.5})
    page = render("a <b> title", summary, CURVES, ["math", "seed"], {"seed": '{"x": "</pre><script>"}'})
    assert "<script" not in page
    assert page.count("<svg") == 3
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*', page), "the page asks for something"
    assert "btx has the lowest mean held-out loss" in page
