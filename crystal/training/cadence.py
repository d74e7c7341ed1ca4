"""After which of its steps a run validates, and after which it saves: the one place that says so."""

from __future__ import annotations

from dataclasses import dataclass

from crystal.curriculum.stages import Stage


@dataclass(frozen=True)
class Cadence:
    """Steps are counted over the run, cadences inside a stage.

    eval_every, checkpoint_every: steps from one to the next. None: no validation but at the end; the stage's own.
    stop: the last step of this start.
    """

    eval_every: int | None
    checkpoint_every: int | None
    stop: int

    @staticmethod
    def ends(stage: Stage, step: int) -> bool:
        """Whether the stage ends with this step."""
        return step == stage.first_step + stage.steps

    def validates(self, stage: Stage, step: int) -> bool:
        """Whether held-out rows are judged after it."""
        return self._is_last(stage, step) or _due(stage, step, self.eval_every)

    def saves(self, stage: Stage, step: int, applied: bool, interrupted: bool) -> bool:
        """Whether a checkpoint is written after it.

        applied: whether its loss and gradient were finite. Weights that give no finite loss may be ruined: they are
        saved only where a run or a stage ends, and nothing good is replaced by them.
        """
        if self._is_last(stage, step):
            return True
        return applied and (interrupted or _due(stage, step, self.checkpoint_every or stage.checkpoint_every))

    def _is_last(self, stage: Stage, step: int) -> bool:
        return self.ends(stage, step) or step == self.stop


def _due(stage: Stage, step: int, every: int | None) -> bool:
    return every is not None and (step - stage.first_step) % every == 0
