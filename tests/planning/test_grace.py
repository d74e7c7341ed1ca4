"""--shutdown-timeout: from a checkpoint's bytes, the disk's rate and a step's time; and the warning while training."""

import math

import pytest

from crystal.planning.grace import CHECKPOINT_BYTES, disk_bytes_per_second, grace_seconds
from crystal.training.patience import Patience, needed_seconds


def test_a_step_and_a_save_at_half_of_the_measured_rate_fit_into_it():
    for size in (1e6, 81e9, 1e12):
        for rate in (1e8, 3e9):
            for step in (0.1, 7.9, 300.0):
                seconds = grace_seconds(size, rate, step)
                assert seconds >= step + 2 * size / rate
                assert seconds <= max(30, step + 2 * size / rate + 20)
    assert grace_seconds(0, 1e9, 0.0) == 30  # torchrun's own
    assert grace_seconds(81e9, 1e9, 7.9) > grace_seconds(81e9, 2e9, 7.9) > grace_seconds(40e9, 2e9, 7.9)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match="expected a rate above 0"):
        grace_seconds(1e9, rate, 1.0)


def test_the_disk_is_asked_and_nothing_stays_there(tmp_path):
    assert disk_bytes_per_second(tmp_path / "a" / "run that is not there yet") > 0
    assert list(tmp_path.iterdir()) == []


def test_plan_says_what_it_is(crystal, tmp_path, monkeypatch):
    monkeypatch.setattr("crystal.planning.report.disk_bytes_per_second", lambda directory: 1e9)
    words = ("plan", "amber-7b", "--devices", "8", "--with", "memory_gb=640", f"run_dir={tmp_path / 'run'}")
    code, out, err = crystal(*words)
    assert (code, err) == (0, "")
    parameters = 6_738_415_616
    said = [line for line in out.splitlines() if line.startswith("torchrun --shutdown-timeout")]
    assert len(said) == 1
    assert f"{CHECKPOINT_BYTES * parameters / 1e9:.3g} GB" in said[0]
    monkeypatch.setattr("crystal.planning.report.disk_bytes_per_second", lambda directory: None)
    assert "the disk under run_dir cannot be written" in crystal(*words)[1]


def test_a_run_that_does_not_fit_is_told_once(monkeypatch):
    monkeypatch.setattr("crystal.output.launcher.grace", lambda: 60.0)
    patience = Patience()
    assert patience.warning(500.0, 0.0) is None  # the first step compiles
    assert patience.warning(7.0, 10.0) is None
    said = patience.warning(45.0, 20.0)
    assert said is not None
    assert "a step of 45 s and a save of 20 s" in said
    assert "60 s" in said
    assert f"--shutdown-timeout {needed_seconds(45.0, 20.0)}" in said
    assert patience.warning(500.0, 20.0) is None


def test_a_validation_that_a_stop_waits_for_counts_too(monkeypatch):
    monkeypatch.setattr("crystal.output.launcher.grace", lambda: 60.0)
    patience = Patience()
    assert [patience.warning(5.0, 10.0, 20.0) for _ in range(2)] == [None] * 2
    said = patience.warning(5.0, 10.0, 90.0)
    assert "a step of 5 s and a validation or an evaluation of 90 s and a save of 10 s may not end in the 60 s" in said
    assert f"--shutdown-timeout {needed_seconds(5.0, 10.0, 90.0)}" in said


def test_without_torchrun_there_is_nothing_to_tell(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    patience = Patience()
    assert [patience.warning(1e6, 1e6) for _ in range(3)] == [None] * 3
