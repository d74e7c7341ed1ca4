"""The learning rate that the traced graph computes is the curriculum's, at every step of any curriculum."""

import pytest
import torch
from cerebras_jobs import curriculum
from hypothesis import given
from hypothesis import strategies as st

from crystal.backends.cerebras.learning_rate import lr_of, pieces
from crystal.curriculum.resolve import resolve
from crystal.run import load_run

RATES = st.floats(1e-6, 0.1)


@st.composite
def stages(draw):
    """Up to three stages of up to three segments, some cut by the stage's end, at any scale of steps."""
    made = []
    for i in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
        values = draw(st.lists(RATES, min_size=len(lengths) + 1, max_size=len(lengths) + 1))
        shapes = draw(
            st.lists(st.sampled_from(["linear", "cosine", "sqrt"]), min_size=len(lengths), max_size=len(lengths))
        )
        lr = [
            {"from": values[j], "to": values[j + 1], "steps": length, "shape": shapes[j]}
            for j, length in enumerate(lengths)
        ]
        begun = sum(lengths[:-1])
        rises = len(lengths) == 1 and values[0] < values[1]  # a warm-up must lie within its stage
        steps = draw(st.integers(lengths[0] if rises else begun + 1, sum(lengths) + 3))
        made.append((steps, lr, ["weights"] if i else []))
    return made


@given(stages(), st.sampled_from([0, 1]))
def test_the_formula_is_the_schedule_at_every_step(stages, counts_from):
    run = curriculum(*stages, counts_from=counts_from)
    cut = pieces(run)
    assert [p.first for p in cut] == [1, *(p.last + 1 for p in cut[:-1])]
    assert cut[-1].last == run.steps
    for step in range(1, run.steps + 1):
        found = lr_of(cut, torch.tensor(step)).item()
        piece = next(p for p in cut if p.first <= step <= p.last)
        slack = 3e-7 * max(piece.start, piece.end) if piece.shape == "sqrt" else 1e-12
        assert found == pytest.approx(run.base_lr(step), rel=1e-6, abs=slack), step


@pytest.mark.parametrize("name", ["crystalcoder-7b", "amber-7b", "demo"])
def test_the_published_runs_rates_come_out_to_fp32(name):
    run = load_run(name)
    whole = resolve(run.config.curriculum, run.source)
    cut = pieces(whole)
    ends = [step for stage in whole.stages for step in (stage.first_step + 1, stage.first_step + stage.steps)]
    for step in [*ends, 2, 43, 86, 87, 500, whole.steps // 3, whole.steps // 2]:
        if step <= whole.steps:
            assert lr_of(cut, torch.tensor(step)).item() == pytest.approx(whole.base_lr(step), rel=5e-7), step
