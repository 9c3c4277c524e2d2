"""Profile of selected steps (`config.profile.steps`), for TensorBoard and xprof."""

import contextlib
import logging
from pathlib import Path

import jax

from btx_jax.output import filled

DIRECTORY = "profile"
STEP = "train_step"  # name of the step annotations, which also have the number

log = logging.getLogger(__name__)


class Profile:
    """Profiles the selected steps that this start takes. Every process writes its own host's part
    into the same session. As a context manager, it stops a profile that is still running."""

    def __init__(self, steps: range, workdir: Path):
        self._steps, self._directory = steps, workdir / DIRECTORY
        self._runs = contextlib.ExitStack()  # ends with the profile
        self._is_on = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def starts(self, step: int) -> bool:
        """Whether the profile begins with this step."""
        return step in self._steps and not self._is_on

    def ends(self, step: int) -> bool:
        """Whether the profile ends after this step."""
        return self._is_on and step >= self._steps[-1]

    def start(self, step: int) -> None:
        """Start the profile; call when no earlier step is still running."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # tracing Python calls costs more than the step
        options.session_id = f"steps_{step}_to_{self._steps[-1]}"
        local = self._runs.enter_context(filled(self._directory))
        jax.profiler.start_trace(local, profiler_options=options)
        self._is_on = True

    def stop(self) -> None:
        """Stop the profile if it is running; call when the last step has finished."""
        if not self._is_on:
            return
        self._is_on, self._steps = False, range(0)
        with self._runs:
            jax.profiler.stop_trace()
        log.info(
            "wrote a profile; to view it: pip install xprof; xprof --logdir=%s", self._directory
        )


def annotated(step: int) -> jax.profiler.StepTraceAnnotation:
    """A context manager that labels a step in the profile."""
    return jax.profiler.StepTraceAnnotation(STEP, step_num=step)
