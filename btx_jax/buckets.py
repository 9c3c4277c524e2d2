"""Buckets of Cloud Storage and S3, by URL: gs://BUCKET/PATH and s3://BUCKET/PATH.

A path in a bucket is a `upath.UPath`, which behaves like pathlib.Path and is typed as one here.
Objects appear completely or not at all; nothing can be renamed, appended to or locked. Therefore a
directory is filled on the local disk and then uploaded (`upload`), and one that only local
libraries can read is copied to the local disk first (`local_copy`).
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, cast

from btx_jax.errors import UserError
from btx_jax.progress import bar

LIBRARIES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> the library with which fsspec reads it
UNFINISHED = ".unfinished"  # marks a directory that is incomplete
LOG_IN = (
    "run `gcloud auth application-default login`, or name a key's file in"
    " GOOGLE_APPLICATION_CREDENTIALS"
)
MOUNTS = Path("/proc/self/mounts")
LARGE = 2**26  # bytes from which a progress bar is shown
AT_ONCE = 8  # objects sent or fetched concurrently
_URL = re.compile(r"(?P<scheme>\w+)://(?P<bucket>[^/]*)/?(?P<path>.*)", re.DOTALL)

_required: set[str] = set()  # buckets that this process has found to exist


def is_url(text: str) -> bool:
    """Whether a text is a URL of any scheme, such as one of a bucket."""
    return re.match(r"\w+://", text) is not None


def is_on_bucket(path: Path) -> bool:
    return not isinstance(path, PurePath)


def is_mounted(path: Path) -> bool:
    """Whether a local path is on a mounted bucket (such as by Cloud Storage FUSE), where only files
    that have been closed survive a kill of the process."""
    with contextlib.suppress(OSError):
        lines = [line.split(" ") for line in MOUNTS.read_text(encoding="utf-8").splitlines()]
        points = {point.replace(r"\040", " "): kind for _, point, kind, *_ in lines}
        above = [str(parent) for parent in (path.absolute(), *path.absolute().parents)]
        return next((points[p] for p in above if p in points), "").startswith("fuse.")
    return False


def at(url: str, key: str) -> Path:
    """The path of a URL. Raises UserError for a scheme other than gs and s3, a URL that names no
    bucket or is not normalised, and when its library is not installed."""
    match = _URL.match(url)
    if match is None or match["scheme"] not in LIBRARIES:
        raise UserError(f"{key}={url!r}: not a path, gs:// or s3://; check the spelling")
    names = [match["bucket"], *match["path"].rstrip("/").split("/")]
    if not names[0] or any(name in (".", "..") for name in names) or "" in names[1:-1]:
        raise UserError(f"{key}={url!r}: write {match['scheme']}://BUCKET/PATH, without . or ..")
    try:
        _configure()
        __import__(LIBRARIES[match["scheme"]])
        from upath import UPath
    except ImportError as error:
        extra = {"gs": "gcs", "s3": "s3"}[match["scheme"]]
        raise UserError(f"{key}={url!r}: {error}; pip install 'btx_jax[{extra}]'") from error
    return cast(Path, UPath(f"{match['scheme']}://{'/'.join(filter(None, names))}"))


def _configure() -> None:
    """Configure the libraries before they are imported: caches must not hide what other processes
    write."""
    import fsspec.config

    for library in ("fsspec", "gcsfs"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what they log, they also raise
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # needs more permissions
    for scheme in ("gcs", *LIBRARIES):
        fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False


def require(path: Path, key: str) -> None:
    """Raise UserError when a path is in a bucket that does not exist or cannot be read."""
    if not is_on_bucket(path):
        return
    where = _URL.match(str(path))
    assert where
    bucket = f"{where['scheme']}://{where['bucket']}"
    if bucket in _required:
        return
    few = {"max_results": 1} if where["scheme"] == "gs" else {}
    try:
        _files(path).ls(where["bucket"], detail=False, **few)
    except FileNotFoundError as error:
        raise UserError(f"{key}: bucket {bucket} does not exist or is not accessible") from error
    except Exception as error:
        raise UserError(f"{key}: {told(error) or error}") from error
    _required.add(bucket)


def _files(path: Path) -> Any:
    """fsspec's file system of a path."""
    return cast(Any, path).fs


def key_of(path: Path) -> str:
    """The path in the notation of fsspec's file system: BUCKET/PATH."""
    return str(path).split("://", 1)[1]


def told(error: BaseException) -> str:
    """A bucket library's error in one line; "" for other errors."""
    kind, text = type(error), " ".join(str(error).split())[:300]
    library = kind.__module__.partition(".")[0]
    status = getattr(error, "code", None) or getattr(error, "status", None)
    if kind.__module__.startswith("google.auth"):
        return f"no credentials: {LOG_IN} ({text})"
    if kind.__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return f"no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({text})"
    if library in ("gcsfs", "aiohttp", "botocore", "aiobotocore", "s3fs"):
        return f"the bucket cannot be reached: {status or ''} {text}".replace("  ", " ")
    refusals = ("Forbidden", "Invalid Credentials")
    if isinstance(error, OSError) and (text.startswith(refusals) or "/storage/v1/b/" in text):
        return f"the bucket refused: {text}"
    return ""


@contextlib.contextmanager
def explained(what: str = "") -> Iterator[None]:
    """Context for work on buckets: errors of their libraries become a UserError of one line. what:
    what was being read or written."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if text := told(error):
            raise UserError(f"{what}: {text}" if what else text) from error
        raise


def create(path: Path, data: bytes) -> bool:
    """Write an object unless it exists; return False, with nothing written, if it does. Of several
    concurrent attempts one succeeds."""
    try:
        _files(path).pipe_file(key_of(path), data, mode="create")
    except FileExistsError:
        return path.read_bytes() == data  # true after a retry whose first answer was lost
    return True


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object."""
    return bytes(_files(path).cat_file(key_of(path), start=start, end=stop))


def objects(directory: Path) -> dict[str, dict[str, Any]]:
    """Everything below a directory: relative name -> information from the store."""
    root = key_of(directory).rstrip("/") + "/"
    found = _files(directory).find(root, detail=True)
    return {name.removeprefix(root): info for name, info in sorted(found.items()) if name != root}


def stamps(directory: Path) -> list[list[Any]]:
    """[relative name, bytes, version] of everything below a directory."""
    found = objects(directory).items()
    return [
        [name, each["size"], each.get("generation") or each.get("ETag")] for name, each in found
    ]


def remove(path: Path) -> None:
    """Delete a directory or an object, if it exists."""
    with contextlib.suppress(FileNotFoundError):
        _files(path).rm(key_of(path), recursive=True)


def is_taken(path: Path) -> bool:
    """Whether an object, or a directory of objects, exists; one that is incomplete, or only claimed
    by a process, does not count."""
    return path.is_file() or (
        any(not name.startswith(".") for name in objects(path)) and not (path / UNFINISHED).exists()
    )


def require_whole(directory: Path, key: str) -> None:
    """Raise UserError for a directory in a bucket that is still being filled, or was left
    incomplete by a killed process."""
    if is_on_bucket(directory) and (directory / UNFINISHED).exists():
        raise _not_whole(directory, key)


def _not_whole(directory: Path, key: str) -> UserError:
    return UserError(
        f"{key}: {directory} is incomplete: another command is still writing it, or was killed;"
        " run that command again, or delete the directory"
    )


def remove_unfinished(directory: Path) -> None:
    """Delete the remains of a killed upload from a directory that only it has written to, except
    claims."""
    if (directory / UNFINISHED).exists():
        for name in objects(directory):
            if name != UNFINISHED and not name.startswith("."):
                remove(directory / name)


def upload(source: Path, target: Path) -> None:
    """Upload a local directory's files, replacing those of the same names, the largest first:
    readers look for the small files that describe the others, so these come last."""
    files = sorted(
        (file for file in source.rglob("*") if file.is_file()),
        key=lambda file: (-file.stat().st_size, file),
    )
    sizes = {file: file.stat().st_size for file in files}
    with _counted(f"upload {target}", sum(sizes.values())) as counted:

        def send(file: Path) -> None:
            _files(target).put_file(str(file), key_of(target / file.relative_to(source).as_posix()))
            counted.update(sizes[file])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(send, files[:-1]))
        for last in files[-1:]:
            send(last)


def _counted(told: str, total: int) -> Any:
    """A progress bar in bytes, for uploads and downloads that may take a while."""
    shown = total > LARGE
    return bar(desc=told, total=total, unit="B", unit_scale=True, leave=False, shown=shown)


def local_copy(directory: Path, is_wanted: Callable[[str], bool] = lambda name: True) -> Path:
    """A copy of a directory in a bucket, as it is now, in the user's local cache; a local directory
    is returned unchanged. is_wanted: selects objects by their relative names. A copy that is cached
    already is not downloaded again. Raises UserError for an incomplete directory."""
    if not is_on_bucket(directory):
        return directory
    found = stamps(directory)
    if any(name == UNFINISHED for name, *_ in found):
        raise _not_whole(directory, "cannot read it")
    wanted = [stamp for stamp in found if is_wanted(stamp[0])]
    if not wanted:
        raise FileNotFoundError(f"{directory} is empty")
    identity = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    place = cache() / str(directory).replace("://", "/") / f"@{identity}"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{place.name}.", dir=place.parent))
    try:
        _fetch(directory, {name: size for name, size, _ in wanted}, partial)
        with contextlib.suppress(OSError):  # another process was faster
            partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place


def _fetch(directory: Path, sizes: Mapping[str, int], target: Path) -> None:
    with _counted(f"fetch {directory}", sum(sizes.values())) as counted:

        def fetch(name: str) -> None:
            file = target / name
            file.parent.mkdir(parents=True, exist_ok=True)
            _files(directory).get_file(key_of(directory / name), str(file))
            counted.update(sizes[name])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(fetch, sizes))


def cache() -> Path:
    """The directory of copies from buckets."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "btx_jax" / "buckets"
