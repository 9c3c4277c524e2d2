"""Upload a Hugging Face directory to a repository on the Hub."""

import logging
import os
from pathlib import Path

from btx_jax import __version__, hub
from btx_jax.buckets import local_copy
from btx_jax.checkpoints import adapter, peft_config
from btx_jax.checkpoints.checkpoint import find_checkpoint, open_reader
from btx_jax.checkpoints.checksums import SUMS, check_sums
from btx_jax.checkpoints.huggingface import is_huggingface
from btx_jax.checkpoints.safetensors_files import SafetensorsFile
from btx_jax.checkpoints.training_state import DIRECTORY
from btx_jax.errors import UserError
from btx_jax.hub_errors import told
from btx_jax.hub_names import PROTOCOL, Name, named
from btx_jax.output import read_json
from btx_jax.paths import refuse_links_out, to_path
from btx_jax.terminal import counted

log = logging.getLogger(__name__)

CARD = "README.md"
ENDINGS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")


def push(
    directory: str,
    repository: str,
    *,
    is_private: bool = False,
    revision: str = "",
    message: str = "",
) -> str:
    """Upload a directory. Returns a line with its address. is_private: whether to create a private
    repository; an existing public one is refused. revision: a branch, "" for main.

    Raises UserError, and commits nothing, when transformers or peft could not read the directory,
    when it is damaged, and when the Hub refuses it.
    """
    source = local_copy(to_path(directory, "DIR"))
    name = named(PROTOCOL + repository.removeprefix(PROTOCOL), "ORG/NAME")
    if name is None or name.type != "model" or name.path or name.revision:
        raise UserError(f"ORG/NAME: {repository!r}: write org/name (a branch goes to --revision)")
    name = name._replace(revision=revision)
    files = _checked(source)
    with told(name, "ORG/NAME"):
        url = _upload(name, source, files, is_private, message or f"Upload {source.resolve().name}")
    left = sorted({path.name for path in source.iterdir()} - {file.split("/")[0] for file in files})
    left_out = f"; left out: {', '.join(left)}" if left else ""
    return f"wrote {url} ({counted(len(files), 'file')}{left_out})"


def _upload(name: Name, source: Path, files: list[str], is_private: bool, message: str) -> str:
    """Upload all files in one commit. Returns its address."""
    from huggingface_hub import CommitOperationAdd

    api = hub.api()
    api.create_repo(name.repo, private=is_private or None, exist_ok=True)
    if is_private and not api.model_info(name.repo).private:
        raise UserError(
            f"ORG/NAME: {name.repo} exists and is public; choose another name, or make it"
            " private first"
        )
    branch = name.revision or None
    if branch:
        api.create_branch(name.repo, branch=branch, exist_ok=True)
    added = [CommitOperationAdd(file, source / file) for file in files]
    if CARD not in files and not api.file_exists(name.repo, CARD, revision=branch):
        added.append(CommitOperationAdd(CARD, _card(source, name.repo).encode()))
    commit = api.create_commit(name.repo, added, commit_message=message, revision=branch)
    return str(commit.commit_url)


def _checked(directory: Path) -> list[str]:
    """Files to upload, relative to the directory. Raises UserError when they are damaged."""
    if not directory.is_dir():
        raise UserError(f"DIR: {directory} is not a directory")
    if (directory / adapter.ABOUT).is_file():
        raise UserError(
            f"DIR: {directory} is an adapter in btx_jax's own format; export it for peft first:"
            f" btx adapter export {directory} PEFT_DIR --format=peft"
        )
    is_run = (directory / DIRECTORY).is_dir() or (directory / "params").is_dir()
    if is_run or not is_huggingface(directory):
        cure = f"btx convert {directory} HF_DIR"
        raise UserError(f"DIR: {directory} is not a Hugging Face directory; make one: {cure}")
    refuse_links_out(directory)
    check_sums(directory)
    if (directory / peft_config.CONFIG).is_file():
        if not (directory / peft_config.TENSORS).is_file():
            raise UserError(
                f"DIR: {directory} has no {peft_config.TENSORS}; save it again with peft"
            )
        SafetensorsFile(directory / peft_config.TENSORS)
        if os.path.isabs(base := _base(directory)):
            log.warning(
                "base %s is a path on this machine; write the base's name on the Hub instead", base
            )
    else:
        open_reader(find_checkpoint(directory, "DIR"))
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    names = (str(path.relative_to(directory)) for path in found)
    return [n for n in names if (n.endswith(ENDINGS) or n == SUMS) and not n.startswith(".")]


def _base(directory: Path) -> str:
    """The base named by a peft LoRA; "" for a whole model."""
    config = directory / peft_config.CONFIG
    return str(read_json(config).get("base_model_name_or_path")) if config.is_file() else ""


def _card(directory: Path, name: str) -> str:
    """A model card for a directory without one."""
    base = _base(directory)
    if not base or os.path.isabs(base):
        return f"# {name}\n\nUploaded by btx_jax {__version__}.\n"
    head = f"---\nbase_model: {base}\nlibrary_name: peft\n---\n\n"
    return f"{head}# {name}\n\nA LoRA on {base}, uploaded by btx_jax {__version__}.\n"
