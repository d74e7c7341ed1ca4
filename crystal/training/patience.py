"""Whether what follows a stop signal, the end of the step or of a validation and a save, fits into the time that
torchrun gives for it."""

from __future__ import annotations

import math

from crystal.output import launcher

ENDING = 10.0  # seconds for what comes after: the seal, the plot of the losses, taking the process group apart


def needed_seconds(step_seconds: float, save_seconds: float, judging_seconds: float = 0.0) -> int:
    """From a stop signal to the end, at the worst: a step has just begun, after which held-out rows are judged. Never
    less than torchrun's own 30."""
    seconds = step_seconds + judging_seconds + save_seconds + ENDING
    return max(launcher.TORCHRUN_GRACE, math.ceil(seconds / 10) * 10)


class Patience:
    """torchrun's, held against a run's own steps and saves. It says something once."""

    def __init__(self) -> None:
        self.given = launcher.grace()
        self.steps = 0

    def warning(self, step_seconds: float, save_seconds: float, judging_seconds: float = 0.0) -> str | None:
        """After a step. save_seconds: what the last save took, 0 before there was one. judging_seconds: the same of the
        longest validation or evaluation, which a stop waits for."""
        self.steps += 1
        needed = needed_seconds(step_seconds, save_seconds, judging_seconds)
        if self.given is None or self.steps == 1 or needed <= self.given:  # the first step is slower than others
            return None
        given, self.given = self.given, None
        rest = {"a validation or an evaluation": judging_seconds, "a save": save_seconds}
        parts = [f"a step of {step_seconds:.0f} s", *(f"{what} of {s:.0f} s" for what, s in rest.items() if s >= 0.5)]
        return (
            f"{' and '.join(parts)} may not end in the {given:.0f} s that torchrun waits after a stop "
            f"signal before it kills: start it with --shutdown-timeout {needed}"
        )
