"""The program `btx`, also as python -m btx_jax: btx --help."""

import os
import sys

from btx_jax import interrupts


def main(words: list[str] | None = None) -> None:
    """words: those after the program's name; None for the command line's."""
    interrupts.end_at_once("run the same command again")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's notes about the CPU
    from btx_jax.cli.program import run

    run(sys.argv[1:] if words is None else words)


if __name__ == "__main__":
    main()
