"""Where a sweep's trials are kept: one SQLite file, an optuna study for each model and for all that made its trials.

A study's name ends in the fingerprint of what decides the loss (model, data, steps, batch, dtype …), and a trial says
its own seed and hyperparameters as numbers. So one file may hold trials of any grid: those that the sweep wants now
are counted, wherever they came from, and the others are kept.

The file carries its format as SQLite's user_version, and each finished trial a digest of itself, compared when it is
read: SQLite's own check finds damaged pages, not a digit that has changed. Files of 0.1.0 have neither.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from crystal.errors import RunError
from crystal.files import dangling, locked, open_regular, reason, write_whole, writing
from crystal.sweeps.sweep import Range, Sweep, points

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as OptunaTrial

WAIT = 60  # seconds for another process's write to end
FORMAT = 1  # of trials.sqlite, as its user_version; 0.1.0 wrote none, and the same tables
_DIGEST = "sha256"  # of a finished trial, among what it says of itself
_OUTCOME = {
    "loss": (float, type(None)), "diverged": (bool,), "first_loss": (float, type(None)), "steps": (int,),
    "seconds": (float,), "cpu_seconds": (float,),
}  # fmt: skip


class Claim(NamedTuple):
    """A trial that this process is to run: its model, its seed, and its hyperparameters by name."""

    shape: tuple[str, int, int]
    seed: int
    values: dict[str, float]
    trial: OptunaTrial


@dataclass(frozen=True)
class Trials:
    """The trials of one sweep, and those of others in the same file. Every method raises ConfigError, one line, for
    a file that is damaged, full or closed to us."""

    sweep: Sweep
    file: Path
    storage: BaseStorage
    studies: dict[tuple[str, int, int], Study] = field(default_factory=dict)

    def give_up_running(self) -> None:
        """Mark what a killed process left running, so that it is run again. Only for who holds the directory."""
        from optuna.trial import TrialState

        with _one_line(self.file):
            for study in self.studies.values():
                for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    study.tell(trial.number, state=TrialState.FAIL)

    def claim(self) -> Claim | None:
        """The next trial that nobody has run or is running, or None. Handed out once."""
        from optuna.trial import TrialState

        taken_states = (TrialState.RUNNING, TrialState.COMPLETE)
        with _one_line(self.file), _turn(self.file.parent):  # SQLite cannot lock a row: two could take the same trial
            for shape, study in self.studies.items():
                taken = {_key(t) for t in study.get_trials(deepcopy=False, states=taken_states)}
                for point in points(self.sweep.config):
                    if json.dumps(point, sort_keys=True) not in taken:
                        trial = study.ask()
                        trial.set_user_attr("point", point)
                        search = self.sweep.config.search
                        values = point.get("values") or {name: _suggest(trial, name, search[name]) for name in search}
                        return Claim(shape, point["seed"], values, trial)
        return None

    def finish(self, claim: Claim, outcome: dict) -> None:
        """Keep what a trial gave."""
        told = {k: _json_number(v) for k, v in outcome.items()}
        with _one_line(self.file):
            study = self.studies[claim.shape]
            claim.trial.set_user_attr("outcome", told)
            claim.trial.set_user_attr(
                _DIGEST, _digest(study.study_name, claim.trial.user_attrs["point"], claim.values, told)
            )
            study.tell(claim.trial, _value(told))

    def wanted(self) -> int:
        """How many trials the sweep has in all."""
        return len(self.studies) * len(points(self.sweep.config))

    def finished(self) -> list[dict]:
        """Every finished trial that the sweep wants, in its order: parametrization, width, depth, seed,
        hyperparameters, loss (None: not finite), diverged, first_loss, steps, seconds, cpu_seconds."""
        rows = []
        with _one_line(self.file):
            for (parametrization, width, depth), study in self.studies.items():
                done = {_key(trial): trial for trial in _complete(study)}
                model = {"parametrization": parametrization, "width": width, "depth": depth}
                for point in points(self.sweep.config):
                    trial = done.get(json.dumps(point, sort_keys=True))
                    if trial is not None:
                        values = point.get("values") or trial.params
                        _expect_whole(study.study_name, trial, values)
                        rows.append(model | {"seed": point["seed"], **values, **trial.user_attrs["outcome"]})
        return rows

    def stale(self) -> int:
        """How many finished trials in the file the sweep does not want."""
        from optuna import get_all_study_names, load_study

        with _one_line(self.file):
            names = get_all_study_names(self.storage)
            kept = sum(len(_complete(load_study(study_name=n, storage=self.storage))) for n in names)
        return kept - len(self.finished())


def open_trials(sweep: Sweep) -> Trials:
    """Open a sweep's file, or make it. Raises RunError."""
    import optuna
    from sqlalchemy.pool import QueuePool

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    file = sweep.directory / "trials.sqlite"
    kind = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}.get(sweep.config.sampler)

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(file, timeout=WAIT, check_same_thread=False)

    _expect_file(file)
    if _is_new(file):
        with _turn(file.parent), writing(file):
            if _is_new(file):
                _make(file)
    with _one_line(file):
        with closing(connect()) as connection:
            _expect_ours(file, connection)
        # a connection of our own: in the text of a URL, a path with ?, #, % or { means something else
        engine = {"creator": connect, "poolclass": QueuePool}
        trials = Trials(sweep, file, optuna.storages.RDBStorage("sqlite://", engine_kwargs=engine))
        for shape in sweep.shapes():
            parametrization, width, depth = shape
            trials.studies[shape] = optuna.create_study(
                study_name=f"{parametrization}-w{width}-l{depth}-{sweep.fingerprint(shape)[:16]}",
                storage=trials.storage,
                sampler=kind and kind(),
                load_if_exists=True,
            )
    return trials


def _is_new(file: Path) -> bool:
    return not file.exists() or not file.stat().st_size


def _make(file: Path) -> None:
    """Write the file without a trial, whole or not at all: optuna makes a table after the other, and a kill between two
    would leave what nobody knows."""
    from optuna.storages import RDBStorage
    from sqlalchemy.pool import StaticPool

    with closing(sqlite3.connect(":memory:", check_same_thread=False)) as connection:
        connection.execute(f"pragma user_version = {FORMAT:d}")
        RDBStorage("sqlite://", engine_kwargs={"creator": lambda: connection, "poolclass": StaticPool})
        write_whole(file, connection.serialize())


def _expect_file(file: Path) -> None:
    """Raise RunError where something that SQLite must not open stands in the file's place: it would wait for a pipe,
    and begin anew on a file of a few bytes."""
    what = dangling(file)
    try:
        with open_regular(file) as opened:
            head = opened.read(512)
        if head and (len(head) < 512 or not head.startswith(b"SQLite format 3\0")):
            what = "no SQLite file"
    except FileNotFoundError:
        pass
    except OSError as error:
        what = what or reason(error)
    if what:
        raise RunError(f"{file}: damaged, or not a sweep's trials: {what}; move it away", file=file)


def _expect_ours(file: Path, connection: sqlite3.Connection) -> None:
    """Raise RunError, or sqlite3.Error, for a damaged file, a newer crystal's, or another program's; mark a new one."""
    (health,) = connection.execute("pragma quick_check").fetchone()
    if health != "ok":
        raise sqlite3.DatabaseError(health)
    tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    if tables and not {"studies", "trials", "version_info"} <= tables:
        raise RunError(f"{file}: expected a sweep's trials, it is another program's database; move it away", file=file)
    (version,) = connection.execute("pragma user_version").fetchone()
    if not 0 <= version <= FORMAT:
        said = f"expected format {FORMAT}, got {version}: another crystal wrote it"
        raise RunError(f"{file}: {said}; use that one, or another --out", file=file)
    if version != FORMAT:
        connection.execute(f"pragma user_version = {FORMAT:d}")


def finished(sweep: Sweep) -> list[dict]:
    """`Trials.finished` of a sweep's file."""
    return open_trials(sweep).finished()


@contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """Turn what SQLite and optuna say of a file into one line."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (sqlite3.Error, SQLAlchemyError, StorageInternalError) as error:
        while error.__cause__ is not None:  # SQLite's own words are at the bottom
            error = error.__cause__
        raise RunError(f"{file}: {_advice(getattr(error, 'orig', None) or error)}") from None
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, AssertionError) as error:
        raise RunError(f"{file}: {_advice(error)}") from None


def _advice(error: BaseException) -> str:
    """What SQLite says, and what to do about it."""
    said = " ".join(str(error).split())
    if "full" in said or "disk I/O" in said:
        return f"cannot be written: {said}; what was finished is kept, and the same command goes on when there is room"
    if "readonly" in said or "unable to open" in said:
        return f"cannot be written: {said}"
    if "locked" in said:
        return f"held by another process for {WAIT} seconds: {said}"
    return f"damaged, or not a sweep's trials: {said}; move it away to run the trials again"


def _complete(study: Study) -> list[FrozenTrial]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _value(outcome: dict) -> float:
    """What optuna is told of a trial: the loss; that at the start, of one that diverged."""
    value = outcome["first_loss"] if outcome["diverged"] else outcome["loss"]
    return math.inf if value is None else value


def _digest(study: str, point: dict, values: dict, outcome: dict) -> str:
    return hashlib.sha256(json.dumps([study, point, values, outcome], sort_keys=True).encode()).hexdigest()


def _expect_whole(study: str, trial: FrozenTrial, values: dict) -> None:
    """Raise ValueError unless a finished trial is as it was written. Those of 0.1.0 have no digest."""
    outcome, named = trial.user_attrs["outcome"], f"trial {trial.number} of {study}"
    for key, kinds in _OUTCOME.items():
        if type(outcome[key]) not in kinds:
            raise ValueError(f"{named}: {key}: expected a number, got {outcome[key]!r:.40}")
    expected = trial.user_attrs.get(_DIGEST)
    if expected is not None and expected != _digest(study, trial.user_attrs["point"], values, outcome):
        raise ValueError(f"{named}: expected another sha256, it has changed")
    if trial.value != _value(outcome):
        raise ValueError(f"{named}: value: expected {_value(outcome)}, got {trial.value}")


def _key(trial: FrozenTrial) -> str:
    return json.dumps(trial.user_attrs.get("point"), sort_keys=True)


@contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """One process at a time; a killed one's turn ends with it."""
    lock = directory / "turn.lock"
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock))
        except OSError as error:
            raise RunError(f"{lock}: {reason(error)}", file=lock) from None
        yield


def _suggest(trial: OptunaTrial, name: str, space: Range) -> float:
    """A sampler's choice. Its study has the whole search in its fingerprint, so a space never changes."""
    if space.values is not None:
        return trial.suggest_categorical(name, space.grid())
    low, high = space.log2
    return trial.suggest_float(name, 2.0**low, 2.0**high, log=True)


def _json_number(value: float) -> float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
