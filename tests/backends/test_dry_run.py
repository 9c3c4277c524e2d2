"""The requests of each backend to its engine: golden files, and validation by the engines' own
checks.

To accept a change, `python tests/backends/test_dry_run.py` rewrites the golden files; review the
difference, as it is what users will run.
"""

import contextlib
import gzip
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from btx_jax.cli.program import run as btx

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "golden"
COMMON = (
    "--pipeline=configs/btx.py", "--bucket=gs://my-bucket", "--run=paper", "--topology=v5p:2x2x2", "--slice=finetune=v5p:2x2x4",
    "--slice=report=v5e:2x2", "--config.rng_seed=1",
)  # fmt: skip
BACKENDS = {
    "local": (
        "--backend=local",
        "--pipeline=configs/btx.py",
        "--workdir=/data/runs/paper",
        "--config.rng_seed=1",
    ),
    "queued-resources": (
        "--backend=queued-resources",
        *COMMON,
        "--zone=us-east5-a",
        "--source=https://example.org/btx_jax.git",
        "--spot",
    ),
    "gke": (
        "--backend=gke",
        *COMMON,
        "--image=europe-docker.pkg.dev/p/r/btx:1",
        "--queue=tpu-queue",
        "--spot",
    ),
    "skypilot": (
        "--backend=skypilot",
        *COMMON,
        "--source=https://example.org/btx_jax.git",
        "--spot",
    ),
}


def submit(*arguments):
    """Run `btx submit` with a dry run in this process; return its status, stdout and stderr."""
    status, out, err = 0, io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            btx(["submit", *arguments, "--dry-run"])
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def written(backend):
    status, out, err = submit(*BACKENDS[backend])
    assert status == 0, err
    return out.replace(sys.executable, "python")


@pytest.mark.parametrize("backend", BACKENDS)
def test_dry_run_is_the_golden_file(backend):
    assert written(backend) == (GOLDEN / f"{backend}.txt").read_text(), (
        "what users would run has changed; see this file's docstring"
    )


@pytest.mark.parametrize("backend", ["queued-resources", "gke", "skypilot"])
def test_no_shell_stands_between_a_signal_and_the_run(backend):
    """A shell does not forward signals to the process it waits for."""
    lines = (GOLDEN / f"{backend}.txt").read_text().replace("\\\n", " ").splitlines()
    runs = [line.strip() for line in lines if "-m btx_jax.launch" in line]
    assert runs
    directly = re.compile(r"(- )?(exec|systemd-run .*) env BTX_DATA_DIR=")
    assert all(directly.match(line) for line in runs), runs


def files_of(backend, folder):
    assert submit(*BACKENDS[backend], f"--out={folder}")[0] == 0
    return sorted(folder.iterdir())


def test_jobsets_pass_their_schema(tmp_path):
    data = os.environ.get("BTX_DATA_DIR")
    if not data:
        pytest.skip("BTX_DATA_DIR is unset: JobSet's definition lies in its schemas/")
    with gzip.open(Path(data) / "schemas" / "jobset.x-k8s.io_jobsets.yaml.gz", "rt") as file:
        definition = next(
            d
            for d in yaml.load_all(file, yaml.CSafeLoader)
            if d and d.get("kind") == "CustomResourceDefinition"
        )
    schema = next(v for v in definition["spec"]["versions"] if v["name"] == "v1alpha2")["schema"][
        "openAPIV3Schema"
    ]
    files = files_of("gke", tmp_path)
    assert len(files) == 7
    for file in files:
        jobset = yaml.safe_load(file.read_text())
        jsonschema.validate(jobset, strict(schema))
    jobset["spec"]["replicatedJob"] = []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, strict(schema))


def strict(schema):
    """Make unknown fields an error, which the API server prunes silently."""
    if not isinstance(schema, dict):
        return schema
    schema = {
        k: {n: strict(s) for n, s in v.items()} if k == "properties" else strict(v)
        for k, v in schema.items()
    }
    if schema.get("x-kubernetes-int-or-string"):
        return {}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    is_whole_object = "metadata" in schema.get("properties", {}) and "spec" in schema["properties"]
    if "properties" in schema and not is_open and not is_whole_object:
        schema["additionalProperties"] = False
    return schema


def test_the_jobs_in_jobsets_are_jobs(tmp_path):
    """JobSet embeds Kubernetes' own batch/v1 Job: its schema checks pods, containers and
    volumes."""
    validate = pytest.importorskip("kubernetes_validate")
    for file in files_of("gke", tmp_path):
        for replicated in yaml.safe_load(file.read_text())["spec"]["replicatedJobs"]:
            job = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": "x"},
                "spec": replicated["template"]["spec"],
            }
            validate.validate(job, "1.33", strict=True)


@pytest.mark.parametrize("backend", ["local", "queued-resources"])
def test_shell_passes_shellcheck(backend, tmp_path):
    scripts = [f for f in files_of(backend, tmp_path) if f.suffix == ".sh"]
    assert scripts
    checked = subprocess.run(
        [
            Path(sys.executable).with_name("shellcheck"),
            "--shell=bash",
            "--severity=style",
            *scripts,
        ],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout


def test_commands_inside_manifests_pass_shellcheck(tmp_path):
    for backend, dig in (
        (
            "gke",
            lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
                "containers"
            ][0]["command"][2],
        ),
        ("skypilot", lambda m: m["setup"] + m["run"]),
    ):
        for file in files_of(backend, tmp_path / backend):
            script = "#!/bin/bash\nset -e\n" + dig(yaml.safe_load(file.read_text()))
            checked = subprocess.run(
                [Path(sys.executable).with_name("shellcheck"), "--shell=bash", "-"],
                input=script,
                capture_output=True,
                text=True,
            )
            assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--backend=gke", "--pipeline=configs/btx.py", "--bucket=my-bucket"), "must be gs://NAME"),
        (
            ("--backend=gke", "--pipeline=configs/btx.py", "--bucket=gs://b", "--topology=v5p-8"),
            "'v5p-8' is not a TPU topology",
        ),
        (
            (
                "--backend=gke",
                "--pipeline=configs/btx.py",
                "--bucket=gs://b",
                "--slice=fintune=v5p:2x2x4",
            ),
            "--slice=fintune=...: no such stage",
        ),
        (
            ("--backend=local", "--pipeline=configs/seed.py:tiny"),
            "its stage is 'train', not 'pipeline'",
        ),
        (("--backend=local", "--pipeline=configs/none.py"), "no file configs/none.py"),
        (
            ("--backend=queued-resources", "--pipeline=configs/btx.py", "--bucket=gs://b"),
            "needs --zone and --source",
        ),
        (
            ("--backend=local", "--pipeline=configs/btx.py:tiny", "--confg.rng_seed=1"),
            "No such option '--confg.rng_seed'",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments, told):
    status, _, err = submit(*arguments)
    assert status == 2
    assert told in err
    assert len(err.splitlines()) == 1


def test_the_script_of_a_checkout_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "launch/submit.py", *BACKENDS["local"], "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == submit(*BACKENDS["local"])[1] != ""


def test_a_preset_is_submitted_by_its_name_and_found_by_it_elsewhere():
    out = submit("--backend=local", "--pipeline=btx:tiny", "--workdir=/data/x")[1]
    assert "-m btx_jax.launch --config=btx:tiny --workdir=/data/x --only=seed" in out


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in BACKENDS:
        (GOLDEN / f"{name}.txt").write_text(written(name))
