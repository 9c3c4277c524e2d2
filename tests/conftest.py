"""Provides eight simulated devices to the whole test process; tests that need one device use the
first. Processes started by tests also run on CPUs: where libtpu is installed it would look for
TPUs, and report that there are none."""

import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # tests of the Hub use their own server
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # most programs run for less than they compile
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # shared with the processes started from here
    programs = tempfile.TemporaryDirectory(prefix="btx_jax-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import gc

import jax

# Tracing makes millions of small objects, and collecting them a tenth of the tests' time.
gc.set_threshold(200_000, 20, 50)
# Without XLA's newer emitters of fusions programs compile in half the time; an XLA that does not
# know the flag aborts.
XLA_FLAGS = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
os.environ["XLA_FLAGS"] = XLA_FLAGS
jax.config.update("jax_num_cpu_devices", 8)

from pathlib import Path

import pytest

from btx_jax.data.sentencepiece_models import train_sentencepiece
from btx_jax.data.tokenizers import load_tokenizer

ROOT = Path(__file__).parent.parent
WORDS = [
    "the",
    "a",
    "of",
    "river",
    "mountain",
    "x",
    "y",
    "def",
    "return",
    *"0123456789+-=",
    "print",
    "paper",
    "city",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Small documents of random words, different for every seed."""
    import random

    rng = random.Random(seed)
    return [
        f"Document {seed}-{i}. " + " ".join(rng.choices(WORDS, k=rng.randint(5, 60))) + ".\n"
        for i in range(count)
    ]


MOST_MAPPINGS = 20_000  # per process; Linux permits 65,530, and XLA crashes beyond them


@pytest.fixture(autouse=True, scope="module")
def no_heap_of_programs():
    """Clear jax's caches when needed: every compiled program keeps memory mappings for as long as
    jax remembers it."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def own_log_handlers():
    """Remove log handlers after each test: a command called in a test logs to that test's
    stderr."""
    import logging

    before = logging.root.handlers[:]
    yield
    for handler in logging.root.handlers[:]:
        if handler not in before:
            logging.root.removeHandler(handler)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(sentences(300), 320, target)
    return target


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path):
    return load_tokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def one_device():
    from btx_jax.parallel.sharding import make_mesh

    return make_mesh((1, 1, 1, 1), jax.devices()[:1])


@pytest.fixture
def cli(tmp_path, tokenizer_file):
    from tests.stages.command_line import CLI

    return CLI(tmp_path, tokenizer_file)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub server for this test, whose process is in an empty directory."""
    from tests.hub_process import point_at
    from tests.hub_server import serving

    with serving() as server:
        point_at(server.url, tmp_path, monkeypatch)
        yield server


@pytest.fixture(scope="session")
def bucket_server():
    """Cloud Storage on 127.0.0.1, for this process and those it starts."""
    from tests.bucket_server import running

    with running() as door:
        os.environ.update(door.environment())
        yield door
        for name in door.environment():
            del os.environ[name]


@pytest.fixture
def bucket(bucket_server, tmp_path, monkeypatch):
    """An empty directory in a bucket."""
    import uuid

    from btx_jax import buckets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket_server.fault = lambda request: 0
    bucket_server.requests.clear()
    buckets._required.clear()
    return buckets.at(f"gs://bucket/{uuid.uuid4().hex[:8]}", "bucket")
