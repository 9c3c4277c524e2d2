"""`btx submit`, from a checkout: python launch/submit.py --help."""

import sys

from btx_jax.__main__ import main

if __name__ == "__main__":
    main(["submit", *sys.argv[1:]])
