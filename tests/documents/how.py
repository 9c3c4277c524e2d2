"""How each command in the documents is tested: patterns, of which every command matches exactly
one."""

import fnmatch

# Run by test_commands.py in this process, in a directory with small models.
QUICK = (
    'btx generate runs/demo/finetune --prompt "def fibonacci(n):"',
    "btx digest *",
    "btx convert models/*",
    "btx convert runs/*",
    "btx new my_btx.py --seed=models/seed *",
    "btx new smol.py --seed=models/SmolLM2-135M *",
    "btx verify exported",
    "btx mix *",
    "btx expert add mixture *",
    "btx expert add smaller *",
    "btx expert drop mixture *",
    "btx expert drop larger *",
    "btx tokenizer 'text/*",
    "btx submit * --dry-run",
)
# Run by test_commands.py as a reader would, in order, with two steps per stage.
SLOW = (
    "btx run demo*",
    "btx generate runs/demo/finetune * --seed=1",
    "btx evaluate *",
    "btx run btx:from_init,models/seed *",
    "btx run seed:tiny*",
    "btx run my.py *",
    "btx run my_btx.py",
    "btx plan my_btx.py",
    "btx plan smol.py",
    "btx plan demo *",
    "btx run smol.py",
    "btx generate runs/smol/* *",
    "btx generate runs/my_btx/* *",
    "btx run *_expert:tiny *",
    "btx run *_expert:from_init --config.init=models/seed *",
    "btx run mix *",
    "btx run mix:tiny",
    "btx run sparse_upcycling:tiny",
    "btx run moe_finetune:* --config.init=*",
    "btx run evaluate:tiny*",
    "btx run comparison:tiny,main *",
    "btx run mola:arc_easy *",
    "btx run continual:*",
    "btx adapter *",
    "btx expert * *anchored_* *",
    "btx report runs/demo *",
    "btx report runs/first *",
    "btx verify runs/demo",
    "btx submit --pipeline=btx:tiny --backend=local *",
)
# Not run. Commands of btx are parsed, and their configs made and checked; for `python FILE`, the
# file must exist, and its arguments are parsed if it has a parser.
ELSEWHERE = {
    "git clone *": "needs the network",
    "cd *": "of the reader's shell",
    ". .venv/*": "of the reader's shell",
    "export *": "of the reader's shell",
    "apt-get *": "needs the network",
    "dpkg *": "needs what that fetches",
    "mkdir *": "of the reader's shell",
    "cp *": "of the reader's shell",
    "zcat *": "of the reader's shell",
    "echo *": "of the reader's shell",
    "wc *": "of the reader's shell",
    "grep *": "of the reader's shell; tests/architectures/test_one_file.py looks for the same",
    "make *": ".ci/run makes demo (with two steps a stage) and test",
    "pip install *": "needs the network; tests/test_wheel.py installs the package without",
    "gcloud *": "needs an account of Google Cloud",
    "kubectl *": "needs a cluster",
    "docker *": "needs Docker and the network",
    "sky check *": "needs SkyPilot and an account",
    "btx convert gs://*": "needs a bucket; tests/stages/test_on_bucket.py has one of its own",
    "btx run btx:tiny --workdir=gs://*": "the same",
    "btx run * --config.init=gs://*": "the same",
    "btx generate HuggingFaceTB/*": "needs the Hub; tests/test_hub.py has one of its own",
    "btx run *_expert:from_init,HuggingFaceTB/*": "the same",
    "btx push *": "the same",
    "btx new my_btx.py --seed=HuggingFaceTB/*": "the same; QUICK has one from a directory",
    "btx tokenizer foldoc.txt *": "reads text of Debian's packages; QUICK has one of its own text",
    "btx new my_btx.py --seed=tiny *": "the same",
    "btx run my_btx.py --config.*": "changes a key of what is run without",
    "btx watch *": "serves until it is stopped; tests/reporting/test_live.py asks it",
    "btx lm-eval *": "reads data sets of the Hub; tests/evaluation/test_lm_eval.py has its own",
    "btx compile *": "minutes each; tests/planning/test_compile_check.py has small ones",
    "btx plan * --slice=*": "the same",
    "python -m btx_jax.launch * --compile_topology=*": "the same",
    "btx plan paper_small:*": "needs the text that takes a minute to make; plans of demo are run",
    "btx run paper_small:*": "an hour; tests/presets/test_study_run.py runs it with few steps",
    "btx report runs/my_btx runs/my_ffn *": "of two projects, as in tests/stages/test_report.py",
    "btx run mola_small*": "half an hour; tests/presets/test_registry.py makes its config",
    "python -m btx_jax.data.corpora": "a minute, 88 MB; tests/data/test_corpora.py has its parts",
    "python benchmarks/*": "measures for minutes, some beside torch",
    "python tests/*": "needs torch and transformers",
    "python -m tests.*": "the same, or writes what is read there",
    "*python -m pytest *": "is how this is run",
}
# What is run in place of one of those, since later commands read what it writes.
INSTEAD = {
    "btx new my_btx.py --seed=HuggingFaceTB/*": "btx new my_btx.py --seed=models/seed"
    " --domain math='text/math.jsonl.gz' --domain code='text/code.jsonl.gz'"
    " --general='text/general.jsonl.gz'",
}


def how(command: str) -> list[str]:
    """The patterns that a command matches: exactly one, unless the table is wrong."""
    patterns = (*QUICK, *SLOW, *ELSEWHERE)
    return [pattern for pattern in patterns if fnmatch.fnmatchcase(command, pattern)]


def stand_in(command: str) -> str:
    """The command that is run in its place, or itself."""
    found = [made for pattern, made in INSTEAD.items() if fnmatch.fnmatchcase(command, pattern)]
    return found[0] if found else command


def is_run(command: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(command, pattern) for pattern in patterns)
