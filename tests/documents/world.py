"""A directory in which the documents' commands can run: small models, text and test sets under the
names used by the pages."""

import gzip
import json
import re
from pathlib import Path

import numpy as np

from btx_jax.architectures.tensors import slots
from btx_jax.checkpoints.checkpoint import write_checkpoint
from btx_jax.cli.program import run
from btx_jax.config.model_config import ModelConfig
from btx_jax.data.tokenizers import load_tokenizer
from tests.conftest import sentences
from tests.documents.pages import files

MODEL = ModelConfig(320, 4, 32, 64, 4, 2, 8, context=512)
DOMAINS = ("math", "code", "law")
SHARED = ("models", "text", "data", "runs")


def make(folder: Path, tokenizer_file: Path) -> None:
    """Make models/seed and finetunes of it, text/ and data/evals/."""
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 0.1, slot.shape) for name, slot in slots(MODEL).items()}
    for number, name in enumerate(("seed", *DOMAINS)):
        _model(folder / "models" / name, base, number, tokenizer_file)
    (folder / "models" / "SmolLM2-135M").symlink_to("seed")
    (folder / "text").mkdir()
    for number, domain in enumerate((*DOMAINS, "general")):
        rows = [{"text": text, "body": text} for text in sentences(300, seed=number)]
        _json_lines(folder / "text" / f"{domain}.jsonl.gz", rows)
    (folder / "text" / "notes.txt").write_text("".join(sentences(100, seed=9)))
    for number, name in enumerate(("foldoc", "bible")):  # long enough to be cut into documents
        text = "\n\n".join(sentences(400, seed=10 + number))
        (folder / "text" / f"{name}.txt").write_text(text * (2**20 // len(text) + 1))
    proofs = folder / "text" / "hol-light"
    proofs.mkdir()
    for number in range(20):
        (proofs / f"{number}.ml").write_text("".join(sentences(20, seed=20 + number)))
    evals = folder / "data" / "evals"
    evals.mkdir(parents=True)
    item = {"query": "Question: which is it?", "choices": ["the river", "the city"], "gold": 1}
    for task in ("arc_easy", "openbook_qa", "piqa"):
        items = [item | {"query": f"Question {i}: which is it?"} for i in range(40)]
        _json_lines(evals / f"{task}.jsonl.gz", items)
    (folder / "runs").mkdir()
    write_files(folder, "config.md")


def stand_ins(folder: Path) -> None:
    """Make stand-ins for runs that quick commands read: an untrained mixture."""
    write_files(folder, "README.md")
    run(["mix", str(folder / "recipe.yml"), str(folder / "mixed")])
    for name in ("demo/finetune", "mine_finetuned"):
        (folder / "runs" / name).parent.mkdir(exist_ok=True)
        run(["convert", str(folder / "mixed"), str(folder / "runs" / name)])


def page_folder(world: Path, page: str, where: Path) -> Path:
    """A directory for one page's commands: the world, and the files that the page tells readers to
    write."""
    where.mkdir()
    for name in SHARED:
        (where / name).symlink_to(world / name)
    write_files(where, page)
    return where


def write_files(folder: Path, page: str) -> None:
    for name, text in files(page).items():
        # Recipes with absolute paths: models and text are in the directory where commands start.
        (folder / name).write_text(re.sub(r"\b(models|text)/", rf"{folder}/\1/", text))


def _model(path: Path, base: dict, number: int, tokenizer_file: Path) -> None:
    """Write the seed with small changes that depend on its number."""
    rng = np.random.default_rng(number)
    write_checkpoint(
        path,
        True,
        MODEL,
        dict.fromkeys(base, np.dtype(np.float32)),
        lambda name: (base[name] + number * rng.normal(0, 0.01, base[name].shape)).astype("f4"),
        load_tokenizer(tokenizer_file),
        history={},
        huggingface={},
        card="",
        check=lambda: None,
        verb="making",
    )


def _json_lines(path: Path, rows: list[dict]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
