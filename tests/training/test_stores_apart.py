"""Several executors' stores that a death left at different steps: no run goes on from two steps at once."""

import pytest

from crystal import checkpoint
from crystal.errors import CheckpointError
from crystal.training.loop import Trainer


class Store:
    """Of a durable backend, what resuming asks: where its own store stands, and where the other process' does."""

    def __init__(self, own, other):
        self.own, self.other = own, other

    def position(self):
        return self.own

    def result(self):
        return None

    def seal(self):
        return None

    def agree(self, *numbers):
        other = -1 if self.other is None else self.other
        return tuple(max(pair) for pair in zip(numbers, (other, -other), strict=True))


def held(tmp_path, own, other):
    trainer = Trainer.__new__(Trainer)
    trainer.backend, trainer.directory, trainer.checkpoints = Store(own, other), tmp_path, tmp_path / "checkpoints"
    return trainer._held()


def test_stores_at_one_step_are_gone_on_from(tmp_path):
    assert held(tmp_path, 4, 4) == 4
    assert held(tmp_path, 0, 0) == 0
    assert held(tmp_path, None, None) is None


@pytest.mark.parametrize(("own", "other"), [(4, 3), (3, 4), (None, 2), (2, None), (0, None)])
def test_stores_apart_go_back_to_a_checkpoint_or_are_refused_by_all(tmp_path, monkeypatch, own, other):
    first, last = sorted(-1 if step is None else step for step in (own, other))
    message = f"expected the stores of all processes at one step, they stand at {first} to {last}"
    with pytest.raises(CheckpointError, match=message):
        held(tmp_path, own, other)
    monkeypatch.setattr(checkpoint, "steps", lambda directory: [2])
    assert held(tmp_path, own, other) is None
