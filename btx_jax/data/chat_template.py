"""Render chats with a tokenizer's own chat template, as transformers does."""

import json
import os
import re
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from btx_jax.data.tokenizers import Tokenizer
from btx_jax.errors import UserError

Message = Mapping[str, Any]
SECONDS = 10.0  # time limit for one chat
PIPE = 32_768  # bytes that fit a pipe without blocking
_REASONING = ("reasoning_content", "thinking", "reasoning")  # alternative names of one field


class Rendered(NamedTuple):
    """A rendered chat. spans: [start, stop) characters of text inside the template's `generation`
    tags."""

    text: str
    spans: list[tuple[int, int]]


class TemplateError(UserError):
    """A chat that the template cannot render; the message says why."""


class ChatTemplate:
    """A tokenizer's chat template. source: the jinja template. marks_answers: whether it marks the
    assistant's text with `generation` tags. Raises UserError for a source that is not a
    template."""

    def __init__(self, source: str, named: Mapping[str, str]):
        self.source, self._named = source, dict(named)
        if "error" in (found := _WORKER.ask({"source": source})):
            raise UserError(f"chat template: {found['error']}")
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables: Any
    ) -> Rendered:
        """Render messages. Raises TemplateError, in one line, for a template that cannot render
        these messages or uses something that the sandbox forbids; UserError for one that loops or
        needs too much memory."""
        told = {
            "messages": [_aliased(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        request = {"source": self.source, "variables": self._named | told | variables}
        found = _WORKER.ask(request)
        if "error" in found:
            kind = UserError if found.get("ends") else TemplateError
            raise kind(f"chat template: {found['error']}")
        return Rendered(found["text"], [(start, stop) for start, stop in found["spans"]])

    def end_of_turn(self, tokenizer: Tokenizer) -> int | None:
        """The special token that ends an assistant's turn in this template, or None."""
        asked = [{"role": "user", "content": "question"}]
        said = [*asked, {"role": "assistant", "content": "answer"}]
        try:
            text = self.render(said).text
        except TemplateError:
            return None
        behind = tokenizer.encode(text[text.rfind("answer") + len("answer") :])
        return next((i for i in behind[:2] if i in tokenizer.special_ids), None)


def chat_template(tokenizer: Tokenizer, cure: str, name: str = "default") -> ChatTemplate:
    """The tokenizer's chat template of this name. cure: what to do where there is none. Raises
    UserError when there is none."""
    if name not in tokenizer.templates:
        if tokenizer.templates:
            told = f"has chat templates {', '.join(sorted(tokenizer.templates))}, but not {name!r}"
        else:
            told = f"the tokenizer has no chat template (chat_template.jinja); {cure}"
        raise UserError(f"{tokenizer.path.parent}: {told}")
    try:
        return ChatTemplate(tokenizer.templates[name], tokenizer.named)
    except UserError as error:
        raise UserError(f"{tokenizer.path.parent}: {error}") from error


def _aliased(message: Message) -> dict[str, Any]:
    """The message without null values, which templates would print, and with its reasoning under
    every name that templates use."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    if reasoning is None:
        return kept
    return {"thinking": reasoning, **kept, "reasoning_content": reasoning}


class _Worker:
    """The rendering process. It is started by the first request, and restarted after a template had
    to be killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            process = self._started()
            assert process.stdin and process.stdout
            try:
                return self._exchange(process, json.dumps(request).encode() + b"\n")
            except (OSError, TypeError, ValueError) as error:
                self._stop()
                return {"error": f"cannot be rendered: {' '.join(str(error).split())[:200]}"}

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, Any]:
        assert process.stdin and process.stdout
        deadline = time.monotonic() + SECONDS
        if len(line) < PIPE:
            _send(process.stdin, line)
        else:  # blocks until the other side reads
            threading.Thread(target=_send, args=(process.stdin, line), daemon=True).start()
        told = bytearray()
        while not told.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self._stop()
                return {"error": f"ran longer than {SECONDS:.0f} seconds", "ends": True}
            part = os.read(process.stdout.fileno(), 1 << 20)
            if not part:
                self._stop()
                return {"error": "takes too much memory", "ends": True}
            told += part
        return json.loads(told)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            command = [sys.executable, "-I", str(Path(__file__).with_name("chat_worker.py"))]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is handled by this process
            )
            weakref.finalize(self, self._process.kill)
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _send(pipe: Any, line: bytes) -> None:
    try:
        pipe.write(line)
        pipe.flush()
    except OSError:
        return  # the pipe is closed: the reader reports it


_WORKER = _Worker()
