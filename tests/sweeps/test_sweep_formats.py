"""A sweep's files say their format: those of 0.1.0 open, newer ones are one line, and a trial that changed is found."""

import json
import shutil
import sqlite3
from contextlib import closing

import pytest
from hostile.sweeps import at, bed, rows, sample

from crystal.errors import RunError
from crystal.sweeps.store import FORMAT, open_trials
from crystal.sweeps.workers import held, read_record


@pytest.fixture(params=["old", "new"])
def sweep(request, tmp_path):
    """A copy of the sweep in tests/samples, as 0.1.0 wrote it and as it is written today."""
    directory = sample().directory.with_name(f"{request.param}-{tmp_path.name}")
    shutil.copytree(bed(request.param), directory)
    yield at(directory)
    shutil.rmtree(directory)


def test_a_sweep_of_0_1_0_opens_with_all_its_trials_and_says_its_format_from_then_on(sweep):
    with held(sweep):
        trials = open_trials(sweep)
        found = trials.finished()
        assert trials.claim() is None
    assert found == rows()
    assert len(found) == 12
    with closing(sqlite3.connect(sweep.directory / "trials.sqlite")) as connection:
        assert connection.execute("pragma user_version").fetchone() == (FORMAT,)
    assert "sha256" in json.loads((sweep.directory / "sweep.json").read_text())


@pytest.mark.parametrize("version", [FORMAT + 1, 1 << 30, -1])
def test_a_newer_format_is_one_line_and_nothing_is_changed(sweep, version):
    file = sweep.directory / "trials.sqlite"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute(f"pragma user_version = {version}")
    before = file.read_bytes()
    with pytest.raises(RunError, match=f"trials.sqlite: expected format {FORMAT}, got {version}"):
        open_trials(sweep)
    assert file.read_bytes() == before


def test_a_record_whose_settings_changed_is_refused_by_its_digest(sweep):
    file = sweep.directory / "sweep.json"
    with held(sweep):  # which writes it as it is written today
        pass
    file.write_text(file.read_text().replace('"steps": 2', '"steps": 3'))
    with pytest.raises(RunError, match=r"sweep\.json: expected what has the sha256 that is in it"):
        read_record(sweep.directory)


def test_a_digit_of_a_loss_that_changed_is_found_where_the_trial_has_a_digest(sweep):
    with closing(sqlite3.connect(sweep.directory / "trials.sqlite")) as connection:
        changed = connection.execute(
            "update trial_user_attributes set value_json = replace(value_json, 'first_loss\": 5', 'first_loss\": 6') "
            "where trial_id = 2 and key = 'outcome'"
        )
        assert changed.rowcount == 1
        connection.commit()
    trials = open_trials(sweep)
    if "new" in sweep.directory.name:
        with pytest.raises(RunError, match=r"trials\.sqlite: .*trial \d+ of .*expected another sha256"):
            trials.finished()
    else:
        assert trials.finished() != rows(), "0.1.0 wrote nothing to compare with"
