"""Commands that are killed, stopped, or begun several times at once come out bit for bit: `make proof`.

CRYSTAL_KILL_COUNT asks for more than CI's cases, in the same proportion (124: 69 kills, 16 signals, 39 starts at once),
CRYSTAL_KILL_SEED for others.
"""

import os
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict

import pytest
from command import crystal
from hostile import sweeps
from hostile.killed_commands import JOBS
from hostile.kills import cases, counts, judge
from sqlalchemy import event
from sweep_files import fill

from crystal.files import alone_at
from crystal.sweeps.store import finished, open_trials

pytestmark = pytest.mark.proof
COUNT, SEED = int(os.environ.get("CRYSTAL_KILL_COUNT", "22")), int(os.environ.get("CRYSTAL_KILL_SEED", "1"))
CASES = defaultdict(list)  # of each job: what it leaves undisturbed is found once
for _job, _case in cases(SEED, counts(COUNT)):
    CASES[_job.name].append(_case)


def test_every_way_has_its_share_and_the_same_seed_gives_the_same_cases():
    ways = Counter(case.kind.rpartition(": ")[2] for several in CASES.values() for case in several)
    assert ways == counts(COUNT)
    assert counts(124) == {"kill": 69, "signal": 16, "together": 39}
    first, again = ([case.name for _, case in cases(SEED, counts(COUNT))] for _ in range(2))
    assert first == again
    assert {job.name for job, _ in cases(SEED, counts(124))} == {job.name for job in JOBS}


@pytest.mark.parametrize("name", CASES)
def test_what_is_disturbed_leaves_what_the_undisturbed_one_leaves(name, tmp_path):
    found = [judge(case, tmp_path / str(number)) for number, case in enumerate(CASES[name])]
    assert found
    assert not [str(each) for each in found if not each.right]


def test_a_result_that_another_process_is_writing_is_refused(tmp_path):
    """Both would have their parts in one place beside it."""
    for job in JOBS:
        if not job.once:
            continue
        directory = tmp_path / job.name
        directory.mkdir()
        job.lay(directory)
        with alone_at(directory / "out"):
            before = sorted(directory.iterdir())
            ended = crystal(*job.words(0), cwd=directory)
            assert sorted(directory.iterdir()) == before
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
        assert "out: " in ended.stderr
        assert "another process is writing it" in ended.stderr
        assert not (directory / ".out.lock").exists()
        assert crystal(*job.words(0), cwd=directory).returncode == 0


@pytest.mark.parametrize("place", ["launcher.die_with_torchrun", "streams.open_all", "interrupts.over"])
def test_a_signal_just_before_the_command_or_just_after_it_is_one_line(place):
    code = f"""
        import os, signal, sys
        from crystal.cli.__main__ import main
        from crystal.output import interrupts, launcher, streams

        def struck(*_):
            {place} = before
            os.kill(os.getpid(), signal.SIGTERM)

        before, {place} = {place}, struck
        sys.argv = ["crystal", "models"]
        main()
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "crystal: terminated\n")


def test_a_sweep_stopped_between_two_tables_of_its_file_goes_on(tmp_path):
    """optuna makes them one after the other, each at once on the disk."""
    from optuna.storages._rdb.models import BaseModel  # in the order that they are made

    def stop(*_, **__):
        raise KeyboardInterrupt

    for table in BaseModel.metadata.sorted_tables[::3]:
        sweep = sweeps.at(tmp_path / table.name)
        sweep.directory.mkdir()
        event.listen(table, "after_create", stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                open_trials(sweep)
        finally:
            event.remove(table, "after_create", stop)
        assert open_trials(sweep).wanted() == fill(sweep) == len(finished(sweep)) > 0
