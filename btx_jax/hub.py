"""Models, tokenizers and data sets by name on the Hugging Face Hub, with the cache, token and
offline rules of huggingface_hub.

    org/name[@REVISION][/FOLDER]            a model, wherever a checkpoint or a tokenizer is named
    hf://org/name[@REVISION][/FOLDER]       the same, even if a local path has that name
    hf://datasets/org/name[@REVISION]/GLOB  text and test sets

No code of a repository is run: weights must be safetensors, and of other files only those needed
are downloaded.
"""

import contextlib
import functools
import glob
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from logging import getLogger
from pathlib import Path, PurePosixPath
from typing import Any

from btx_jax.errors import UserError
from btx_jax.hub_errors import told
from btx_jax.hub_names import Name, matches, named
from btx_jax.paths import to_path

MODEL, TOKENIZER = "model", "tokenizer"  # kinds of content to download
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "config.json", "generation_config.json",
)  # fmt: skip
_MODEL_FILES = (
    "*.json", "*.txt", "*.model", "*.jinja", "additional_chat_templates/*.jinja", "SHA256SUMS",
    "README.md",
)  # fmt: skip
_NEVER_READ = ("trainer_state.json",)  # megabytes in size
_SMALL = (".json", ".txt", ".model", ".jinja", ".md", "SHA256SUMS")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5", ".gguf", ".onnx")
_TRIES = 3  # attempts at a download; huggingface_hub itself resumes after most interruptions

_pins: dict[str, str] = {}  # in this process: name without its path -> commit


def resolve(name: str, key: str, kind: str = MODEL) -> Path:
    """Resolve a path, which is expanded, or a name on the Hub: the directory of its contents, at
    the same commit for the lifetime of the process.

    kind: MODEL downloads the files of a model or an adapter, TOKENIZER those of a tokenizer. Raises
    UserError, naming the key, when it does not exist on the Hub or cannot be downloaded.
    """
    found = named(name, key)
    if found is None:
        return to_path(name, key)
    if found.type != "model":
        raise UserError(f"{key}: {name} is a data set; name a model instead, org/name")
    if kind == TOKENIZER:
        return _download(found, key, TOKENIZER_FILES)
    folder = _download(found, key, _MODEL_FILES)
    return _download(found, key, map(glob.escape, _weights(found, key, folder)))


def commit(name: Name, key: str) -> str:
    """The commit that a name's revision refers to. It is looked up once per process, and stays the
    same from then on (`pin`)."""
    if re.fullmatch("[0-9a-f]{40}", name.revision):
        return name.revision
    pinned = f"{name.type}/{name.repository}"
    if pinned not in _pins:
        with told(name, key):
            revision = name.revision or None
            found = api().resolve_revision(name.repo, repo_type=name.type, revision=revision)
        _pins[pinned] = found.resolved
    return _pins[pinned]


def pin(commits: Mapping[str, str]) -> None:
    """From now on resolve these names to these commits, as returned by `pins`."""
    _pins.update(commits)


def pins() -> dict[str, str]:
    """The commits used by this process: `TYPE/org/name@REVISION` -> commit."""
    return dict(_pins)


def listing(name: Name, key: str) -> dict[str, tuple[int, str]]:
    """All files of a repository: path -> (bytes, git's hash of the content). Cached after the first
    request."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    at = commit(name, key)
    for _ in range(2):
        with contextlib.suppress(CachedRepoTreeNotFoundError), told(name, key):
            files = get_cached_repo_tree(name.repo, repo_type=name.type, revision=at)
            return {file.path: (file.size, file.blob_id) for file in files}
        folder = _snapshot(name, key, [])  # caches the listing
    # Offline, with a cache that was written by an older version of the library.
    held = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, "") for path in held}


def download_file(name: Name, key: str) -> Path:
    """The file at name.path, downloaded to the cache."""
    return _snapshot(name, key, [name.path]) / name.path


def _download(name: Name, key: str, patterns: Iterable[str]) -> Path:
    """Download the files that match; returns the directory that a name refers to."""
    inside = f"{glob.escape(name.path)}/" if name.path else ""
    wanted = [inside + pattern for pattern in patterns]
    files = [path for path in listing(name, key) if any(matches(path, each) for each in wanted)]
    files = [file for file in files if not file.endswith(_NEVER_READ)]
    return _snapshot(name, key, files) / name.path


def _snapshot(name: Name, key: str, files: Sequence[str]) -> Path:
    """Download these files; returns the repository's directory in the cache."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.utils import disable_progress_bars

    _quiet()
    at = commit(name, key)
    with told(name, key):
        held = [
            try_to_load_from_cache(name.repo, file, revision=at, repo_type=name.type)
            for file in files
        ]
    if held and all(isinstance(path, str) for path in held):
        return Path(str(held[0]).removesuffix(files[0]))
    is_small = all(file.endswith(_SMALL) for file in files)
    wanted = [glob.escape(file) for file in files]
    with told(name, key), disable_progress_bars() if is_small else contextlib.nullcontext():
        for left in reversed(range(_TRIES)):
            try:
                folder = snapshot_download(
                    name.repo, repo_type=name.type, revision=at, allow_patterns=wanted
                )
                break
            except HTTPError as error:  # a broken connection
                if isinstance(error, HfHubHTTPError) or not left:
                    raise
    return Path(folder)


def _weights(name: Name, key: str, folder: Path) -> list[str]:
    """The files that contain the tensors of a model or an adapter, depending on what exists. Raises
    UserError where there are only pickles, or none."""
    inside = f"{name.path}/" if name.path else ""
    tree = listing(name, key)
    files = {path.removeprefix(inside) for path in tree if path.startswith(inside)}
    if name.path and not files:
        raise UserError(f"{key}: {name} has no folder {name.path}; {_folders(set(tree))}")
    if "adapter_config.json" in files:
        wanted = {"adapter_model.safetensors"}
    elif "adapter.json" in files:
        wanted = {"adapter.safetensors"}
    elif "config.json" not in files:
        raise UserError(f"{key}: {name} holds no model (config.json); {_folders(files)}")
    else:
        wanted = _of_model(folder, files)
    if found := sorted(file for file in wanted & files if file.endswith(".safetensors")):
        return found
    others = sorted(file for file in files if file.endswith(_PICKLES))
    if not others:
        raise UserError(f"{key}: {name} holds no safetensors; name a repository that does")
    raise UserError(
        f"{key}: {name} holds no safetensors, only {', '.join(others[:3])}, and nothing else is"
        " loaded, as pickles can run arbitrary code; take a revision with safetensors, such as"
        " refs/pr/NUMBER, ask for one at https://huggingface.co/spaces/safetensors/convert, or"
        " save it where you trust it (transformers: model.save_pretrained(DIR)) and name DIR"
    )


def _of_model(folder: Path, files: set[str]) -> set[str]:
    named = _field(folder / "config.json", "transformers_weights")
    single = named if isinstance(named, str) else _SINGLE
    if single in files and not single.endswith(".index.json"):
        return {single}
    index = single if single.endswith(".index.json") else _INDEX
    weight_map = _field(folder / index, "weight_map")
    return set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {_SINGLE}


def _field(path: Path, key: str) -> object:
    """A field of the JSON object in a file; None if missing. Damage is reported by whoever reads
    the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def _folders(files: set[str]) -> str:
    parents = {
        str(PurePosixPath(file).parent)
        for file in files
        if file.endswith(("/config.json", "/adapter_config.json"))
    }
    if not parents:
        return "name a repository of safetensors that transformers loads"
    return f"append one of its folders: {', '.join(sorted(parents)[:8])}"


@functools.cache
def _quiet() -> None:
    """Show progress bars on terminals only, and leave error messages to this package."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    for noisy in ("httpx", "httpx2"):  # these log a line per request
        getLogger(noisy).setLevel("WARNING")
    if not sys.stderr.isatty():
        disable_progress_bars()


def without_bars() -> None:
    """Disable progress bars, in a process whose parent reports for it."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()


def api() -> Any:
    """huggingface_hub's API, silenced by `_quiet`."""
    from huggingface_hub import HfApi

    _quiet()
    return HfApi()
