"""Tokenises in a separate process: `python -m btx_jax.data.tokenise_worker`.

Reads pickles from standard input, each preceded by its length in 8 bytes: first (source, tokenizer,
config), then (file, rows) repeatedly. It writes the result of `Tokeniser` to the file and answers
with its counts, or with the error. It exits at the end of its input.
"""

import os
import pickle
import sys
from typing import IO, Any

from btx_jax.data.tokenised import Tokeniser, save
from btx_jax.errors import UserError


def send(stream: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """The next message of the stream. Raises EOFError when the other side has exited."""
    head = stream.read(8)
    size = int.from_bytes(head, "little")
    data = stream.read(size) if len(head) == 8 else b""
    if len(head) < 8 or len(data) < size:
        raise EOFError
    return pickle.loads(data)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep output of libraries out of the answers
    try:
        tokenise = Tokeniser(*receive(sys.stdin.buffer))
        while True:
            file, rows = receive(sys.stdin.buffer)
            try:
                tokenised = tokenise(rows)
                save(tokenised, file)
                send(answers, tokenised.counts)
            except (UserError, OSError) as error:
                send(answers, error)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)


if __name__ == "__main__":
    main()
