"""A Hub server on 127.0.0.1 that supports what huggingface_hub 2.4 requests: repositories with
commits, private and gated ones, files behind redirects and by ranges, uploads. It logs all
requests, and can cut connections."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

GOOD, READ = "hf_good", "hf_read"  # tokens with and without write permission
LARGE = (".safetensors", ".parquet", ".bin", ".gz", ".model")  # extensions stored in LFS


@dataclasses.dataclass
class Repository:
    """A repository. refs: branch or tag -> commit. commits: commit -> path -> bytes."""

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit these files on top of the branch, or of main for a new branch."""
        parent = self.refs.get(branch) or self.refs.get("main", "")
        held = {**self.commits.get(parent, {}), **files}
        told = [len(self.commits), *sorted((path, _sha1(data)) for path, data in held.items())]
        sha = hashlib.sha1(repr(told).encode()).hexdigest()
        self.commits[sha] = held
        self.refs[branch] = sha
        return sha


@dataclasses.dataclass
class Request:
    method: str
    path: str
    range: str
    token: str
    status: int = 0
    sent: int = 0  # bytes of the body


class Hub:
    """The server's state. repos: (model or dataset, org/name) -> repository. cuts: part of an
    address -> numbers of bytes after which its next bodies end. status: of every answer, 0 for the
    correct one. after: called after every answer."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repository] = {}
        self.log: list[Request] = []
        self.cuts: dict[str, list[int]] = {}
        self.status = 0
        self.after: Callable[[Request], None] = lambda request: None
        self.stored: dict[str, bytes] = {}  # LFS: sha256 -> bytes
        self.url = self.cdn = ""

    def add(
        self, name: str, files: Mapping[str, bytes], kind: str = "model", **options: Any
    ) -> Repository:
        repo = self.repos[kind, name] = Repository(**options)
        repo.commit(files)
        return repo

    def asked(self, part: str, method: str = "") -> list[Request]:
        return [r for r in self.log if part in r.path and method in ("", r.method)]

    def bodies(self, part: str = "/cdn/") -> int:
        """Bytes of files sent."""
        return sum(r.sent for r in self.log if r.method == "GET" and part in r.path)


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """Run a server. Files in LFS come from another port, as the real Hub's come from another
    host."""
    hub = Hub()
    handler = type("Bound", (_Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_large(path: str) -> bool:
    return path.endswith(LARGE)


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message
        self.body: dict[str, Any] = {}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size) if size else self._chunks()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        wanted = self.headers.get("Range", "")
        self.request_ = Request(self.command, self.path, wanted, token)
        self.hub.log.append(self.request_)
        try:
            if self.hub.status:
                raise _Refused(self.hub.status)
            if token and token not in (GOOD, READ):
                raise _Refused(401, message="Invalid credentials in Authorization header")
            self._route(url.path)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            body = json.dumps(refused.body).encode()
            self._send(refused.status, body, {k: v for k, v in headers.items() if v})
        self.hub.after(self.request_)

    def _chunks(self) -> bytes:
        """Read a body without a length."""
        held = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                held += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return held

    def _send(self, status: int, body: bytes = b"", headers: Mapping[str, str] = {}) -> None:
        self.request_.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = next((c for part, c in self.hub.cuts.items() if part in self.path and c), None)
        part = body[: cut.pop(0)] if cut else body
        self.request_.sent = len(part)
        with contextlib.suppress(OSError):
            self.wfile.write(part)
        if len(part) < len(body):
            self.close_connection = True

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _route(self, path: str) -> None:
        if match := re.fullmatch(r"/cdn/(\w+)", path):
            return self._file(self.hub.stored[match[1]], match[1])
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            assert hashlib.sha256(self.body).hexdigest() == match[1]
            self.hub.stored[match[1]] = self.body
            return self._send(200)
        if match := re.fullmatch(r"/api/(model|dataset)s", path):
            return self._list(match[1])
        if path == "/api/repos/create":
            return self._create()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(/.*)?", path):
            return self._api(match[1], match[2], unquote(match[3] or ""))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(match[1])
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind = "dataset" if match[1] else "model"
            return self._resolve(kind, match[2], unquote(match[3]), unquote(match[4]))
        raise _Refused(404)

    def _repo(self, kind: str, name: str) -> Repository:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and self.request_.token != GOOD):
            raise _Refused(404 if self.request_.token else 401, "RepoNotFound")
        return repo

    def _sha(self, repo: Repository, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _list(self, kind: str) -> None:
        author, search = (self.query.get(key, [""])[0] for key in ("author", "search"))
        names = [name for of, name in self.hub.repos if of == kind]
        found = [n for n in names if n.startswith(f"{author}/" if author else "") and search in n]
        self._json([{"id": name, "_id": name, "modelId": name} for name in found])

    def _api(self, kind: str, name: str, rest: str) -> None:
        repo = self._repo(kind, name)
        verb, _, behind = rest.strip("/").partition("/")
        if self.command == "POST" and verb in ("branch", "preupload", "commit"):
            self._require_writer(name)
        if verb in ("", "revision"):
            sha = self._sha(repo, behind or "main")
            return self._json(
                {"id": name, "_id": "1", "sha": sha, "private": repo.private, "siblings": []}
            )
        if verb == "refs":
            refs = [{"name": r, "ref": r, "targetCommit": sha} for r, sha in repo.refs.items()]
            return self._json({"branches": refs, "tags": [], "converts": []})
        if verb == "branch":
            sha = repo.refs["main"]
            repo.refs.setdefault(behind, sha)
            return self._json({})
        if verb == "preupload":
            asked = json.loads(self.body)["files"]
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in asked
            ]
            return self._json({"files": files})
        if verb == "commit":
            return self._commit(repo, name, behind)
        revision, _, inside = behind.partition("/")
        files = repo.commits[self._sha(repo, revision)]
        if verb == "paths-info":
            wanted = parse_qs(self.body.decode())["paths"]
            return self._json([self._entry(p, files[p]) for p in wanted if p in files])
        if verb == "tree":
            return self._tree(files, inside)
        raise _Refused(404)

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(data), "oid": _sha1(data)}
        if _is_large(path):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return entry

    def _tree(self, files: Mapping[str, bytes], inside: str) -> None:
        prefix = f"{inside}/" if inside else ""
        if inside and not any(path.startswith(prefix) for path in files):
            raise _Refused(404, "EntryNotFound")
        found = {p: d for p, d in files.items() if p.startswith(prefix)}
        if self.query.get("recursive", ["False"])[0].lower() == "true":
            return self._json([self._entry(path, data) for path, data in found.items()])
        own = [self._entry(p, d) for p, d in found.items() if "/" not in p.removeprefix(prefix)]
        below = {p.removeprefix(prefix).partition("/")[0] for p in found if "/" in p[len(prefix) :]}
        folders = [{"type": "directory", "path": prefix + f, "oid": "0" * 40} for f in below]
        return self._json(own + folders)

    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self._repo(kind, name)
        if repo.gated and self.request_.token != GOOD:
            raise _Refused(403 if self.request_.token else 401, "GatedRepo")
        sha = self._sha(repo, revision)
        if path not in repo.commits[sha]:
            raise _Refused(404, "EntryNotFound")
        data = repo.commits[sha][path]
        headers = {"X-Repo-Commit": sha}
        if not _is_large(path):
            return self._file(data, _sha1(data), headers)
        oid = hashlib.sha256(data).hexdigest()
        self.hub.stored[oid] = data
        self._send(
            302,
            headers={
                **headers,
                "Location": f"{self.hub.cdn}/cdn/{oid}",
                "X-Linked-Etag": f'"{oid}"',
                "X-Linked-Size": str(len(data)),
            },
        )

    def _file(self, data: bytes, etag: str, headers: Mapping[str, str] = {}) -> None:
        told = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **headers}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_.range)
        if match is None:
            return self._send(200, data, {**told, "Content-Length": str(len(data))})
        first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
        part = data[first : last + 1]
        self._send(206, part, {**told, "Content-Range": f"bytes {first}-{last}/{len(data)}"})

    # Uploads

    def _require_writer(self, name: str) -> None:
        if not self.request_.token:
            raise _Refused(401, message="Invalid username or password.")
        if self.request_.token != GOOD or not name.startswith("me/"):
            raise _Refused(403, message=f"You have no right to write to {name}")

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        self._require_writer(name)
        if ("model", name) in self.hub.repos:
            there = _Refused(409, message="You already created this model repo")
            there.body = {"url": f"{self.hub.url}/{name}"}
            raise there
        self.hub.add(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _batch(self, name: str) -> None:
        self._require_writer(name)
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: Repository, name: str, branch: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        sha = repo.commit(files, branch)
        url = f"{self.hub.url}/{name}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url, "pullRequestUrl": None})
