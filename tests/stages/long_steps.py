"""btx_jax.launch with micro-batches that take SECONDS each: python -m tests.stages.long_steps
SECONDS ARGUMENT..."""

import sys
import time

import jax
from absl import app

from btx_jax.training import step

seconds, real = float(sys.argv.pop(1)), step.loss_function


def sleeping(*arguments):
    loss, aux = real(*arguments)
    jax.debug.callback(lambda: time.sleep(seconds))
    return loss, aux


step.loss_function = sleeping

if __name__ == "__main__":
    from btx_jax import interrupts, launch

    interrupts.end_at_once("run the same command to resume from the last checkpoint")
    app.run(launch.main, flags_parser=launch.parse)
