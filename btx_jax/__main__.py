"""The program `btx`, also available as python -m btx_jax; see btx --help."""

import os
import sys

from btx_jax import interrupts


def main(words: list[str] | None = None) -> None:
    """Run a command. words: the arguments after the program's name; None to read the command
    line."""
    interrupts.end_at_once("run the same command again")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's messages about the CPU
    from btx_jax.cli.program import run

    run(sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    main()
