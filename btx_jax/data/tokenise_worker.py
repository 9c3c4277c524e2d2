"""Tokenises in a process of its own: `python -m btx_jax.data.tokenise_worker`.

It reads pickles from standard input, each behind its length in 8 bytes: (source, tokenizer,
config) first, then (file, rows) again and again. What `Tokeniser` makes of the rows it writes into
the file, and answers with its counts, or with the error. It ends with its input.
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
    """The next message of the stream. Raises EOFError when the other side has ended."""
    head = stream.read(8)
    size = int.from_bytes(head, "little")
    data = stream.read(size) if len(head) == 8 else b""
    if len(head) < 8 or len(data) < size:
        raise EOFError
    return pickle.loads(data)


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
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
