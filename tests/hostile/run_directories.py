"""Damaged run directories: config.yaml, metrics.jsonl, events.jsonl, manifest.json, evals/ and lock, and what each
command that reads one makes of it.

The bed is the run that crystal 0.1.0 left in tests/samples, with results of evaluations. Damaged checkpoints, and going
on training from a damaged directory, are hostile/checkpoints.py's. Right is one line, or what the undamaged one gives
of all that was not damaged: `crystal runs` and `crystal compare` show what they can read of a run that is half-written.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from unittest.mock import patch

from hostile.case import Case, Outcome, command, judged
from hostile.checkpoints import SAMPLE
from rich.console import Console

from crystal.evaluation import results
from crystal.run import load_run
from crystal.training.start import start

EITHER, REFUSED, FINE = ("fine", "refused"), ("refused",), ("fine",)
RUN = "run"
STEP = "step-0000008"


@functools.cache
def bed() -> Path:
    """A directory with run/ and what it was made from, not to be changed."""
    there = Path(shutil.copytree(SAMPLE, Path(tempfile.mkdtemp(prefix="crystal-runs-")) / "bed"))
    shutil.rmtree(there / "parts")
    about = {"checkpoint": STEP, "facts": {}}
    answers = {str(i): {"id": str(i), "nll": 1.5} for i in range(3)}
    metric = {"bits_per_byte": results.Metric(1.25, 0.1, None)}
    results.write(there / RUN / "evals", results.Result(8, "bpb-english", metric, 3, answers, about))
    (there / RUN / ".lock").touch()
    shutil.copytree(there / RUN, there / "twin")
    return there


# --- commands: what they print of the run, as far as it must not change


def _command(*words: str) -> Callable[[Path], object]:
    return lambda directory: command(*words)()


def _resume(directory: Path) -> object:
    """One step more; its loss comes with the right state alone."""
    return start(load_run("run.yaml"), None, 9, Console(quiet=True, stderr=True)).step


def _results(directory: Path) -> object:
    return [(r.step, r.task, r.n, r.metrics) for r in results.all_of(directory / RUN / "evals")]


COMMANDS: dict[str, Callable[[Path], object]] = {
    "runs": _command("runs", ".", "--json"),
    "compare": _command("compare", RUN, "twin", "--json"),
    "config": _command("config", RUN, "train.seed", "--json"),
    "generate": _command("generate", RUN, "--prompt", "the", "--max-new-tokens", "2", "--json"),
    "where": _command(
        "data", "where", f"{RUN}/config.yaml", "data.corpus=corpus.yaml", "data.dir=stores", "--step", "3"
    ),
    "train": _resume,
    "results": _results,
}


def _same(name: str, out: str, result: object) -> bool:
    """Whether a command's result is the undamaged run's. `runs` and `compare` say what they could not read."""
    if name in ("runs", "compare"):
        json.loads(out)
        return True
    return (out, result) == undamaged(name)


@functools.cache
def undamaged(name: str) -> tuple[str, object]:
    """Not judged: what it imports and compiles may take long."""
    out, result = io.StringIO(), None
    with tempfile.TemporaryDirectory(dir=bed().parent) as scratch, contextlib.redirect_stdout(out):
        copy = shutil.copytree(bed(), Path(scratch) / "copy")
        with contextlib.suppress(SystemExit):  # a command's end
            result = _in(copy, lambda: COMMANDS[name](copy))
    return out.getvalue(), result


def _in(directory: Path, call: Callable[[], object]) -> object:
    before = Path.cwd()
    os.chdir(directory)
    try:
        with patch.dict(os.environ, CRYSTAL_CACHE=str(bed().parent / "cache")):
            return call()
    finally:
        os.chdir(before)


# --- damages: (the file, random numbers)


def _cut(file: Path, rng: Random) -> None:
    os.truncate(file, rng.choice([0, 1, rng.randrange(file.stat().st_size)]))


def _flipped(file: Path, rng: Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _nul(file: Path, rng: Random) -> None:
    content = file.read_bytes()
    at = rng.randrange(len(content))
    file.write_bytes(content[:at] + bytes(rng.choice([1, 600])) + content[at:])


def _garbage(file: Path, rng: Random) -> None:
    file.write_bytes(rng.choice([b"null", b"[]", b"{}", b"7", b"\xff\xfe", b'"x"', rng.randbytes(5000)]))


def _deep(file: Path, rng: Random) -> None:
    levels = rng.choice([40, 900, 100_000])
    file.write_text(rng.choice(["[" * levels, "[" * levels + "]" * levels, '{"a":' * levels, "- " * levels]))


def _bomb(file: Path, rng: Random) -> None:
    """Aliases of aliases, a name of a megabyte, a number of 5,000 digits."""
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9))
    file.write_text(rng.choice([f"a0: &a0 [x]\n{levels}\n", f"name: {'x' * (1 << 20)}\n", f"name: {'9' * 5000}\n"]))


def _huge_line(file: Path, rng: Random) -> None:
    line = b'{"step": 9, "x": "' + b"y" * (4 << 20) + rng.choice([b'"}\n', b""])
    file.write_bytes(rng.choice([line + file.read_bytes(), file.read_bytes() + line]))


_LINES = (
    "7", "[]", "null", "{}", '{"step": 1e999}', '{"step": "8"}', '{"step": true}', '{"step": -1}', '{"event": []}',
    '{"step": %s}', '{"step": 3, "loss": %s}', '{"step": 3, "tokens": %s}', '{"step": 3, "tokens_per_second": %s}',
    '{"step": 3, "loss": NaN}', '{"step": 3, "val_loss": {"a": %s}}', '{"step": 3, "val_loss": [1]}',
    '{"event": "start", "stop": %s}', '{"event": "start", "backend": 7}', '{"event": {"a": 1}, "step": []}',
    '{"step": 3, "tokens": "x", "loss": {"a": 1}, "tokens_per_second": []}', "\x1b[2J", '{"step": 3, "loss": 1e400}',
)  # fmt: skip


def _line(file: Path, rng: Random) -> None:
    """A line of other types, or of numbers that no double holds."""
    line = rng.choice(_LINES).replace("%s", rng.choice(["1" + "0" * 400, "1" + "0" * 4000, "-1", "1e308", '"x"']))
    lines = file.read_text().splitlines(keepends=True)
    lines.insert(rng.randrange(len(lines) + 1), line + "\n")
    file.write_text("".join(lines))


def _other_type(file: Path, rng: Random) -> None:
    """A value of JSON that is another."""
    content = json.loads(file.read_text())
    places = [(content, key) for key in content]
    places += [(v, key) for v in content.values() if isinstance(v, dict) for key in v]
    places += [(v, i) for v in content.values() if isinstance(v, list) for i in range(len(v))]
    node, key = rng.choice(places)
    node[key] = rng.choice([v for v in ("x", None, [], {}, 7, -1, 1.5, [[]]) if type(v) is not type(node[key])])
    file.write_text(json.dumps(content))


def _other_value(file: Path, rng: Random) -> None:
    """A key of config.yaml with another type's value."""
    lines = file.read_text().splitlines()
    at = rng.choice([i for i, line in enumerate(lines) if ": " in line])
    key = lines[at].split(": ")[0]
    lines[at] = f"{key}: {rng.choice(['[]', '{}', 'x', '-1', '.nan', '1e400', '!!python/name:os.system x', '&a [*a]'])}"
    file.write_text("\n".join(lines) + "\n")


def _instead(*kinds: str) -> Callable[[Path, Random], None]:
    def damage(file: Path, rng: Random) -> None:
        kind = rng.choice(kinds)
        if kind == "elsewhere":
            file.rename(file.with_name("moved"))
            file.symlink_to("moved")
            return
        file.unlink()
        if kind == "directory":
            file.mkdir()
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind != "gone":
            file.symlink_to({"nowhere": "/nowhere/at/all", "circle": file.name, "device": "/dev/zero"}[kind])

    return damage


_instead_all = _instead("directory", "pipe", "nowhere", "circle", "device", "gone")
_elsewhere = _instead("elsewhere")
_shared = {"cut": _cut, "flipped": _flipped, "NUL": _nul, "garbage": _garbage, "deep": _deep, "no file": _instead_all}
_RESULT = f"evals/{STEP}/bpb-english.json"
# kind → (file, damage, commands)
_READERS = ("runs", "compare", "config", "where")
KINDS: dict[str, tuple[str, Callable[[Path, Random], None], tuple[str, ...]]] = {
    **{f"config {k}": ("config.yaml", d, _READERS) for k, d in _shared.items()},
    "config of other values": ("config.yaml", _other_value, ("runs", "compare", "train")),
    "config bomb": ("config.yaml", _bomb, ("runs", "compare", "config")),
    **{f"metrics {k}": ("metrics.jsonl", d, ("runs", "compare", "train", "generate")) for k, d in _shared.items()},
    "metrics line": ("metrics.jsonl", _line, ("runs", "compare", "train")),
    "metrics huge line": ("metrics.jsonl", _huge_line, ("runs", "compare", "train")),
    **{f"events {k}": ("events.jsonl", d, ("runs", "train")) for k, d in _shared.items()},
    "events line": ("events.jsonl", _line, ("runs", "train")),
    **{f"manifest {k}": ("manifest.json", d, ("runs", "generate", "train")) for k, d in _shared.items()},
    **{f"result {k}": (_RESULT, d, ("results",)) for k, d in _shared.items() if d is not _instead_all},
    "result no file": (_RESULT, _instead("directory", "pipe", "nowhere", "circle", "device"), ("results",)),
    "result of other types": (_RESULT, _other_type, ("results",)),
    "lock no file": (".lock", _instead_all, ("runs", "generate", "train")),
    "all elsewhere": ("metrics.jsonl", _elsewhere, ("runs", "compare", "train", "generate")),
    "config elsewhere": ("config.yaml", _elsewhere, ("runs", "compare", "config", "train", "where")),
}
# what says a number that no check can know to be another: a digit of config.yaml
MAY_DIFFER = {
    ("config flipped", "config"), ("config flipped", "where"), ("config NUL", "where"), ("config cut", "config"),
}  # fmt: skip


def cases(seed: int, count: int) -> Iterator[Case]:
    """The first `count` damaged run directories of a seed, all kinds in turn, each read by one command."""
    for number in range(count):
        kind, rng = list(KINDS)[number % len(KINDS)], Random(f"{seed}:{number}")
        _, _, commands = KINDS[kind]
        name, own = commands[number // len(KINDS) % len(commands)], rng.randrange(1 << 30)
        expected = FINE if kind.endswith("elsewhere") else EITHER
        if (kind, name) in MAY_DIFFER:
            expected = (*expected, "silent")
        yield Case(kind, f"{kind}, {name}, {seed}:{number}", functools.partial(_judge, kind, name, own), expected)


def _judge(kind: str, name: str, own: int, scratch: Path) -> Outcome:
    file, damage, _ = KINDS[kind]
    undamaged(name)
    with tempfile.TemporaryDirectory(dir=bed().parent) as own_place:
        copy = shutil.copytree(bed(), Path(own_place) / "copy")
        damage(copy / RUN / file, Random(own))
        return _in(
            copy, lambda: judged(lambda: COMMANDS[name](copy), lambda out, result: _same(name, out, result))
        )
