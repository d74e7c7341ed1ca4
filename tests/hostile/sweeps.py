"""Damaged sweeps: trials.sqlite, sweep.json and trials.json cut, flipped, of other programs, of other types, held.

Beds are the sweep that crystal 0.1.0 left in tests/samples (`old`: its trials have no digest) and the same trials
written by today's code (`new`). A case damages a copy and opens it as `crystal transfer` does, or judges its
trials.json again. Right is one line, or trials that are those of the undamaged one: one that is not found any more
would be run again and give the same.
"""

import dataclasses
import functools
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from unittest.mock import patch

from hostile.case import Case, Outcome, judged

from crystal.sweeps import store, transfer
from crystal.sweeps.sweep import Sweep, load_sweep
from crystal.sweeps.workers import held

SAMPLES = Path(__file__).parents[1] / "samples"
EITHER, REFUSED, FINE = ("fine", "refused"), ("refused",), ("fine",)
Damage = Callable[[Path, Random], None]


# --- beds


@functools.cache
def sample() -> Sweep:
    """The sweep of tests/samples, copied with the run that it reads; its directory is `old`."""
    there = Path(tempfile.mkdtemp(prefix="crystal-sweeps-"))
    for name in ("run-0.1.0", "sweep-0.1.0"):
        shutil.copytree(SAMPLES / name, there / name)
    run = there / "run-0.1.0" / "run.yaml"  # its store lies beside it, wherever the test runs
    run.write_text(run.read_text().replace("dir: stores", f"dir: {run.parent / 'stores'}"))
    with patch.dict(os.environ, CRYSTAL_CACHE=str(there / "cache")):
        sweep = load_sweep(str(there / "sweep-0.1.0" / "sweep.yaml"), (), there / "sweep-0.1.0" / "out")
        _ = sweep.data  # prepared once
    return sweep


def at(directory: Path) -> Sweep:
    """The same sweep with another directory."""
    sweep = dataclasses.replace(sample(), directory=directory)
    sweep.__dict__["data"] = sample().data
    return sweep


@functools.cache
def rows() -> list[dict]:
    return json.loads((SAMPLES / "sweep-0.1.0" / "out" / "trials.json").read_text())


@functools.cache
def bed(name: str) -> Path:
    """A sweep's directory, not to be changed."""
    if name == "old":
        return sample().directory
    sweep = at(sample().directory.with_name("new"))
    with held(sweep):
        trials = store.open_trials(sweep)
        while (claim := trials.claim()) is not None:
            row = next(r for r in rows() if _made_by(r) == (*claim.shape, claim.seed, claim.values["lr"]))
            trials.finish(claim, {key: row[key] for key in store._OUTCOME})
    (sweep.directory / "trials.json").write_text((sample().directory / "trials.json").read_text())
    return sweep.directory


def _made_by(row: dict) -> tuple:
    return row["parametrization"], row["width"], row["depth"], row["seed"], row["lr"]


# --- what is done with a damaged one


def open_it(directory: Path) -> bool:
    """Open as `crystal transfer` does before it runs what is left; whether all that is found is the sample's."""
    sweep = at(directory)
    with held(sweep):
        trials = store.open_trials(sweep)
        trials.give_up_running()
        found = trials.finished()
        if len(found) < trials.wanted():
            assert trials.claim() is not None
    return all(row in rows() for row in found)


def judge_it(directory: Path) -> bool:
    """`crystal transfer trials.json`; whether the verdict is the sample's."""
    with patch.object(transfer, "_draw", lambda results, file: file.write_bytes(b"")):
        result = transfer.judge_again(directory / "trials.json", [], None)
    return {key: result[key] for key in ("verdict", "widths", "best", "fingerprint")} == verdict()


@functools.cache
def verdict() -> dict:
    with tempfile.TemporaryDirectory() as scratch, patch.object(transfer, "_draw", lambda *_: None):
        copy = shutil.copytree(bed("old"), sample().directory.with_name(Path(scratch).name))
        result = transfer.judge_again(copy / "trials.json", [], None)
    return {key: result[key] for key in ("verdict", "widths", "best", "fingerprint")}


# --- damages: (directory, random numbers)


def bytes_of(name: str, change: Callable[[bytes, Random], bytes]) -> Damage:
    def damage(directory: Path, rng: Random) -> None:
        file = directory / name
        file.write_bytes(change(file.read_bytes(), rng))

    return damage


def cut(content: bytes, rng: Random) -> bytes:
    return content[: rng.choice([1, 15, 16, 100, rng.randrange(len(content)), len(content) - 1])]


def flipped(content: bytes, rng: Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 100])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zeroed(content: bytes, rng: Random) -> bytes:
    start, size = rng.randrange(len(content)), rng.choice([1, 512, 4096, 40_000])
    return content[:start] + bytes(len(content[start : start + size])) + content[start + size :]


def no_database(content: bytes, rng: Random) -> bytes:
    return rng.choice([b"x", b"{}", rng.randbytes(8192), b"\0" * 4096, b"SQLite format 3\0" + rng.randbytes(5000)])


def no_json(content: bytes, rng: Random) -> bytes:
    short = [b"", b"null", b"[]", b"{", b"\xff\xfe", b'"x"', b"{}", b"[1]", b"[{}]"]
    return rng.choice([*short, b"[" * 100_000, b"9" * 5000, b"\0" * 99])


def sql(*choices: str, needs: str = "trials.sqlite") -> Damage:
    """One of some statements."""

    def damage(directory: Path, rng: Random) -> None:
        with closing(sqlite3.connect(directory / needs)) as connection:
            connection.executescript(rng.choice(choices))
            connection.commit()

    return damage


def other_program(directory: Path, rng: Random) -> None:
    (directory / "trials.sqlite").unlink()
    with closing(sqlite3.connect(directory / "trials.sqlite")) as connection:
        connection.execute(rng.choice(["create table bookmarks (x)", "create table studies (x)"]))
        connection.commit()


def beside(directory: Path, rng: Random) -> None:
    """What a killed writer's SQLite leaves, damaged."""
    name = rng.choice(["trials.sqlite-wal", "trials.sqlite-journal", "trials.sqlite-shm"])
    magic = rng.choice([b"", bytes.fromhex("377f0682002de218"), bytes.fromhex("d9d505f920a163d7")])
    (directory / name).write_bytes(magic + rng.randbytes(rng.choice([0, 24, 5000])))


def instead(name: str, *kinds: str) -> Damage:
    """Something else in a file's place."""

    def damage(directory: Path, rng: Random) -> None:
        file = directory / name
        match rng.choice(kinds):
            case "directory":
                file.unlink()
                file.mkdir()
            case "pipe":
                file.unlink()
                os.mkfifo(file)
            case "nowhere":
                file.unlink()
                file.symlink_to("/nowhere/at/all")
            case "circle":
                file.unlink()
                file.symlink_to(file.name)
            case "device":
                file.unlink()
                file.symlink_to("/dev/zero")
            case "elsewhere":
                moved = directory / "moved"
                file.rename(moved)
                file.symlink_to(moved.name)
            case "gone":
                file.unlink()

    return damage


def in_json(name: str, change: Callable[[dict | list, Random], None]) -> Damage:
    def damage(directory: Path, rng: Random) -> None:
        content = json.loads((directory / name).read_text())
        change(content, rng)
        (directory / name).write_text(json.dumps(content))

    return damage


_OTHERS = ("x", None, [], {}, True, -1, 1.5, 10**400, "\ud800", [[]])


def _record_key(record: dict, rng: Random) -> None:
    key = rng.choice(["format", "dtype", "fingerprint", "corpus", "config"])
    record[key] = rng.choice([v for v in (*_OTHERS, 99) if v != record[key]])


def _record_setting(record: dict, rng: Random) -> None:
    key = rng.choice(["widths", "search", "seeds", "max_shift", "parametrization", "base_d_model", "run", "depths"])
    record["config"][key] = rng.choice([v for v in _OTHERS if v != record["config"][key]])


def _row_value(found: list[dict], rng: Random) -> None:
    row = rng.choice(found)
    key = rng.choice(["parametrization", "width", "depth", "seed", "lr", "loss", "diverged", "seconds", "cpu_seconds"])
    row[key] = rng.choice([v for v in ("x", [], {}, 10**400) if v != row[key]])


def _row_key(found: list[dict], rng: Random) -> None:
    del rng.choice(found)[rng.choice(["width", "lr", "loss", "diverged"])]


PLACES = ("directory", "pipe", "nowhere", "circle", "device")
_ATTR = "update trial_user_attributes set value_json = '{}' where key = 'outcome' and trial_id = 3".format
# kind → (damage, what is done with it, expected, beds)
KINDS: dict[str, tuple[Damage, Callable[[Path], bool], tuple, tuple]] = {
    "database cut": (bytes_of("trials.sqlite", cut), open_it, EITHER, ("old", "new")),
    "database bits flipped": (bytes_of("trials.sqlite", flipped), open_it, EITHER, ("new",)),
    "database zeroed": (bytes_of("trials.sqlite", zeroed), open_it, EITHER, ("new",)),
    "no database": (bytes_of("trials.sqlite", no_database), open_it, REFUSED, ("old", "new")),
    "database longer": (bytes_of("trials.sqlite", lambda c, r: c + r.randbytes(100)), open_it, EITHER, ("old", "new")),
    "database of another program": (other_program, open_it, REFUSED, ("old", "new")),
    "database without a table": (
        sql(*(f"drop table {t}" for t in ("studies", "trials", "version_info", "trial_values"))),
        open_it, REFUSED, ("old", "new"),
    ),
    "database with another column": (
        sql("alter table trials rename column state to status", "alter table studies rename column study_name to n",
            "alter table trial_user_attributes rename column value_json to v"),
        open_it, REFUSED, ("old", "new"),
    ),
    "newer format": (sql("pragma user_version = 2", "pragma user_version = -1"), open_it, REFUSED, ("old", "new")),
    "newer optuna": (sql("update alembic_version set version_num = 'v99.0.0.a'"), open_it, REFUSED, ("old", "new")),
    "outcome of other types": (
        sql(*(_ATTR(v) for v in (
            "[]", "7", "null", "x", "{", "[" * 2000,
            '{"loss": "x", "diverged": false, "first_loss": 1.0, "steps": 2, "seconds": 1.0, "cpu_seconds": 1.0}',
            '{"loss": 1.0, "diverged": 0, "first_loss": 1.0, "steps": 2, "seconds": 1.0, "cpu_seconds": 1.0}',
        ))),
        open_it, REFUSED, ("old", "new"),
    ),
    "outcome of other values": (
        sql("update trial_user_attributes set value_json = replace(value_json, '5', '4') where key = 'outcome'",
            "update trial_user_attributes set value_json = replace(value_json, 'false', 'true') where key = 'outcome'"),
        open_it, REFUSED, ("new",),
    ),
    "values of other types": (
        sql("update trial_values set value = 'x'", "update trial_values set value_type = 'x'",
            "delete from trial_values", "update trials set state = 'DONE'",
            "update trials set number = 'x'",
            "update trial_values set value = 1"),
        open_it, EITHER, ("old", "new"),
    ),
    "trials gone": (
        sql("delete from trials where trial_id > 4", "update trials set state = 'RUNNING'", "delete from studies",
            "update studies set study_name = 'x' || study_id"),
        open_it, EITHER, ("old", "new"),
    ),
    "points of other types": (
        sql(*(_ATTR(v).replace("outcome", "point") for v in
              ("[]", "7", "null", "{}", '{"seed": "x"}', '{"seed": 1, "values": 7}'))),
        open_it, EITHER, ("old", "new"),
    ),
    "journals left": (beside, open_it, EITHER, ("old", "new")),
    "no file": (instead("trials.sqlite", *PLACES), open_it, REFUSED, ("old", "new")),
    "database elsewhere": (instead("trials.sqlite", "elsewhere", "gone"), open_it, FINE, ("old", "new")),
    "database as it is": (lambda *_: None, open_it, FINE, ("old", "new")),
    "lock in place": (instead("turn.lock", *PLACES), open_it, EITHER, ("new",)),
    "record no JSON": (bytes_of("sweep.json", no_json), open_it, REFUSED, ("old", "new")),
    "record cut": (bytes_of("sweep.json", lambda c, r: c[: r.randrange(len(c) - 2)]), open_it, REFUSED, ("old", "new")),
    "record bits flipped": (bytes_of("sweep.json", flipped), judge_it, EITHER, ("new",)),
    "record of other types": (in_json("sweep.json", _record_key), judge_it, REFUSED, ("old", "new")),
    "record of other settings": (in_json("sweep.json", _record_setting), judge_it, REFUSED, ("new",)),
    "record no file": (instead("sweep.json", "directory", "pipe", "device"), open_it, REFUSED, ("old", "new")),
    "record gone": (instead("sweep.json", "gone"), open_it, FINE, ("old", "new")),
    "list no JSON": (bytes_of("trials.json", no_json), judge_it, REFUSED, ("old", "new")),
    "list cut": (bytes_of("trials.json", lambda c, r: c[: r.randrange(len(c) - 2)]), judge_it, REFUSED, ("old", "new")),
    # a trial of another parametrization is another sweep's, and not counted
    "list of other types": (in_json("trials.json", _row_value), judge_it, EITHER, ("old", "new")),
    "list without a key": (in_json("trials.json", _row_key), judge_it, REFUSED, ("old", "new")),
    "list no file": (instead("trials.json", *PLACES, "gone"), judge_it, REFUSED, ("old", "new")),
    "list as it is": (lambda *_: None, judge_it, FINE, ("old", "new")),
}  # fmt: skip


def cases(seed: int, count: int) -> Iterator[Case]:
    """The first `count` damaged sweeps of a seed, all kinds in turn."""
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        _, _, expected, beds = KINDS[kind]
        rng = Random(f"{seed}:{number}")
        name, own = rng.choice(beds), rng.randrange(1 << 30)
        run = functools.partial(_judge, kind, name, own)
        yield Case(kind, f"{kind}, {name}, {seed}:{number}", run, expected)


def _judge(kind: str, name: str, own: int, scratch: Path) -> Outcome:
    damage, use, _, _ = KINDS[kind]
    # beside the run that its sweep.json names
    directory = Path(tempfile.mkdtemp(prefix="case-", dir=sample().directory.parent))
    try:
        shutil.copytree(bed(name), directory, dirs_exist_ok=True)
        verdict()
        damage(directory, Random(own))
        with patch.object(store, "WAIT", 0.2):
            return judged(lambda: use(directory), lambda _, same: same is True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
