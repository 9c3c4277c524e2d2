"""Errors of the Hugging Face Hub, each in one line with its cure."""

import contextlib
import difflib
import errno
import re
from collections.abc import Iterator
from typing import Any

from btx_jax.errors import UserError, one_line
from btx_jax.hub_names import Name

_LOGIN = "hf auth login (or HF_TOKEN)"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def told(name: Name, key: str) -> Iterator[None]:
    """Context in which anything that huggingface_hub raises becomes a UserError that begins with
    the key."""
    from huggingface_hub import errors

    known = (
        OSError, ValueError, errors.HTTPError, errors.EntryNotFoundError,
        errors.RevisionResolutionError,
    )  # fmt: skip
    try:
        yield
    except UserError:
        raise
    except known as error:
        raise UserError(f"{key}: {_why(error, name)}") from error


def _why(error: BaseException, name: Name) -> str:
    from huggingface_hub import constants, errors

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)

    def find(*kinds: type[BaseException]) -> Any:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    repo, cache = name.repo, constants.HF_HUB_CACHE
    place = f"{constants.ENDPOINT}/{'datasets/' if name.type == 'dataset' else ''}{repo}"
    if found := find(errors.GatedRepoError):
        logged_in = _has_token() and found.response.status_code != 401
        login = "with the account of your token" if logged_in else f"then: {_LOGIN}"
        return f"{repo} is gated: accept its licence at {place}, {login}"
    if found := find(errors.RepositoryNotFoundError):
        return _not_found(name)
    if find(errors.RevisionNotFoundError):
        return f"{repo} has no revision {name.revision or 'main'!r}{_revisions(name)}"
    if find(errors.OfflineModeIsEnabled):
        return (
            f"{repo} does not exist here and is not (completely) in {cache}, but HF_HUB_OFFLINE"
            " is set; unset it, or run once with network access"
        )
    if (found := find(OSError)) and found.errno in _FULL:
        return (
            f"no space left in {cache} for {repo}: free some space, or set HF_HOME to a larger disk"
        )
    if found := find(errors.HfHubHTTPError):
        return _answer(found, repo)
    if found := find(errors.HTTPError):
        return _transport(found, repo)
    if "onsistency check" in str(error):
        return f"the download of {repo} ended early: {_AGAIN}"
    if (found := find(OSError)) and found.errno:
        return f"{found.filename or cache} cannot be written for {repo}: {found.strerror}"
    return f"{repo} cannot be loaded: {one_line(error)}"


_AGAIN = "run the same command again; complete files are kept"


def _transport(error: BaseException, repo: str) -> str:
    from huggingface_hub import constants

    kind, said = type(error).__name__, one_line(error)
    if kind.startswith(("Connect", "Proxy", "UnsupportedProtocol", "Pool")):
        return (
            f"{repo} does not exist here, and there is no connection to {constants.ENDPOINT}"
            f" ({said}): check the network, its proxies and HF_ENDPOINT, or name a directory"
        )
    return f"the download of {repo} was interrupted repeatedly ({said}): {_AGAIN}"


def _answer(error: Any, repo: str) -> str:
    from huggingface_hub import constants

    status = error.response.status_code
    said = one_line(error.server_message or re.sub(r"\(Request ID.*?\)", "", str(error)))
    if status == 401:
        return (
            f"{constants.ENDPOINT} rejected your token ({said}): create a new one at"
            f" {constants.ENDPOINT}/settings/tokens, then: {_LOGIN}"
        )
    if status == 403:
        return f"your token lacks permission for {repo} ({said}); use one that has it"
    if status == 429 or status >= 500:
        return f"{constants.ENDPOINT} returned {status} for {repo} ({said}); try again later"
    return f"{constants.ENDPOINT} returned {status} for {repo}: {said}"


def _not_found(name: Name) -> str:
    login = "with this token" if _has_token() else f"without a token; if it is private: {_LOGIN}"
    what = "data set" if name.type == "dataset" else "model"
    near = f"; did you mean {found!r}?" if (found := _near(name)) else ""
    here = "" if name.type == "dataset" else f"{name.repo} does not exist here, and "
    return f"{here}the Hub has no {what} {name.repo} that you can see {login}{near}"


def _near(name: Name) -> str:
    """The repository that may have been meant; "" for none."""
    from huggingface_hub import HfApi

    org, _, own = name.repo.partition("/")
    ask: Any = HfApi().list_datasets if name.type == "dataset" else HfApi().list_models
    found: list[str] = []
    for asked in ({"author": org}, {"search": own}):
        with contextlib.suppress(Exception):  # only a suggestion
            found += [each.id for each in ask(limit=100, **asked)]
    return next(iter(difflib.get_close_matches(name.repo, found, n=1)), "")


def _revisions(name: Name) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(name.repo, repo_type=name.type)
    except Exception:  # only a suggestion
        return "; its page lists them"
    known = [ref.name for ref in (*refs.branches, *refs.tags)]
    near = difflib.get_close_matches(name.revision, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{meant} it has {', '.join(known[:8])}{', ...' if known[8:] else ''}"


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
