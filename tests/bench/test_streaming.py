"""What `crystal bench stream` measures is what a run would do."""

import pytest
from rich.console import Console

from crystal.backends.config import WeightStreamingConfig
from crystal.bench import streaming
from crystal.cli.bench import stream_text
from crystal.run import load_run


class _Seen(Exception):
    pass


@pytest.mark.parametrize("model", ["amber-7b", "crystalcoder-7b"])
def test_it_is_benched_under_the_plan_of_the_published_run(monkeypatch, tmp_path, model):
    """Amber decays its norms too, which the bench once forgot."""
    config = load_run(model).config

    def backend(setup, *others):
        assert setup.model == config.model
        assert setup.optimizer == config.optimizer
        assert setup.plan == config.plan()
        raise _Seen

    monkeypatch.setattr(streaming, "WeightStreamingBackend", backend)
    settings = WeightStreamingConfig(name="weight_streaming", path=tmp_path)
    with pytest.raises(_Seen):
        streaming.bench_stream(model, 16, 1, 1, settings, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def rounds_of(*steps: float) -> tuple[list[dict], int]:
    """What `measured_rounds` makes of steps of so many seconds over floors of 1 and 2 s; two are wanted."""
    given = iter(steps)
    return streaming.measured_rounds(
        lambda number: {"step_s": next(given), "compute_s": 1.0, "io_s": 2.0}, 2, Console(quiet=True, stderr=True)
    )


def test_a_round_whose_step_took_less_than_its_parts_is_made_again():
    rounds, impossible = rounds_of(2.5, 1.5, 2.0)
    assert ([each["step_s"] for each in rounds], impossible) == ([2.5, 2.0], 0)


def test_where_no_quiet_moment_comes_the_overlap_is_not_measured_and_the_line_says_so(monkeypatch, tmp_path):
    rounds, impossible = rounds_of(2.5, 1.5, 1.5, 1.5, 1.9, 1.5)
    assert (len(rounds), impossible) == (6, 5)
    monkeypatch.setattr(streaming, "_round", lambda *_: {"step_s": 1.0, "compute_s": 2.0, "io_s": 0.5})
    settings = WeightStreamingConfig(name="weight_streaming", path=tmp_path, dtype="fp32")
    result = streaming.bench_stream("crystalcoder-w64-l3", 16, 1, 1, settings, Console(quiet=True, stderr=True))
    assert result["overlap_efficiency"] is result["step_over_floor"] is None
    assert "overlap not measured, for in 3 rounds of 3" in stream_text(result)
