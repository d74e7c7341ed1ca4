"""Damaged checkpoints and run directories: files deleted, cut, flipped, swapped; seals that say something else.

Beds are the run that crystal 0.1.0 left in tests/samples (`old`: its seals have no digest), the same sealed by today's
code (`new`), its weights in parts (`parts`). A case damages a copy and reads all of the checkpoint, or goes on
training for a step. Right is one line, or just what the undamaged one gives.
"""

import functools
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile.case import Case, Outcome, judged
from rich.console import Console

from crystal import checkpoint
from crystal.checkpoint.seal_file import DIGEST, KINDS, SEAL, with_digest
from crystal.inference.load import model_config_of, tokenizer_of
from crystal.run import load_run
from crystal.training.metrics import read_metrics
from crystal.training.start import start

SAMPLE = Path(__file__).parents[1] / "samples" / "run-0.1.0"
STEP = "step-0000008"
WHERE = {"old": f"run/checkpoints/{STEP}", "new": f"run/checkpoints/{STEP}", "parts": f"parts/{STEP}"}


@functools.cache
def bed(name: str) -> Path:
    """A directory with run/, parts/ and what the run was made from, not to be changed; shared by all cases."""
    copy = Path(shutil.copytree(SAMPLE, Path(tempfile.mkdtemp(prefix="crystal-checkpoints-")) / "bed"))
    if name != "old":
        for where in (WHERE["new"], WHERE["parts"]):
            seal = json.loads((copy / where / SEAL).read_text())
            file = copy / where / seal["state"]["tokenizer"]
            seal["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": checkpoint.sha256_of(file)}}
            (copy / where / SEAL).write_text(json.dumps(with_digest(seal), indent=1))
    return copy


# --- what is done with a damaged one


def read_all(directory: Path) -> str:
    """A digest of every tensor, of the model and of what the tokenizer makes of an id."""
    saved, total = checkpoint.read(directory), hashlib.sha256()
    for kind in KINDS:
        for name, tensor in sorted(saved.tensors(kind), key=lambda pair: pair[0]):
            total.update(f"{kind}.{name}".encode() + tensor.numpy().tobytes())
    total.update(model_config_of(saved).model_dump_json().encode())
    tokenizer = tokenizer_of(saved)
    total.update(str([tokenizer and tokenizer.decode([i]) for i in (265, 289, 292, 330)]).encode())
    return total.hexdigest() + f" {saved.state.get('step')} {saved.state.get('stage_ended')} {saved.state.get('bos')}"


def train_on(directory: Path) -> str:
    """The step gone on from, and the loss of the next."""
    os.environ["CRYSTAL_CACHE"] = str(directory / "cache")
    before = Path.cwd()
    os.chdir(directory)
    try:
        start(load_run("run.yaml"), None, 9, Console(quiet=True, stderr=True))
        last = [r for r in read_metrics(Path("run")) if r["step"] == 9]
        return f"{[r['loss'] for r in last]}"
    finally:
        os.chdir(before)


@functools.cache
def undamaged(name: str, use: str) -> str:
    """What the bed gives."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(shutil.copytree(bed(name), Path(scratch) / "copy"))
        return read_all(copy / WHERE[name]) if use == "read" else train_on(copy)


# --- damages of files: (file, random numbers)


def _deleted(path: Path, rng: random.Random) -> None:
    path.unlink()


def _cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.choice([0, 1, rng.randrange(path.stat().st_size)]))


def _longer(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + bytes([rng.randrange(33, 256)]) * rng.choice([1, 4096]))


def _flipped(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _zeroed(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at, length = rng.randrange(len(data)), rng.choice([16, 512, len(data)])
    data[at : at + length] = bytes(len(data[at : at + length]))
    path.write_bytes(data)


def _not_utf8(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    at = rng.randrange(len(data))
    path.write_bytes(
        data[:at] + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", "ü".encode("utf-16")]) + data[at + 1 :]
    )


def _directory(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path, rng: random.Random) -> None:
    """To nowhere, itself, a device, another file, or where the file was moved to, which is fine."""
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(rng.choice([moved.name, "nowhere", path.name, "/dev/zero", "/dev/null", "/etc/passwd", "."]))


FILE_DAMAGES = {
    "deleted": _deleted, "cut": _cut, "longer": _longer, "flipped": _flipped, "zeroed": _zeroed,
    "not UTF-8": _not_utf8, "a directory": _directory, "a link": _link,
}  # fmt: skip


def _of_a_file(damage: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], str]:
    def on(directory: Path, rng: random.Random) -> str:
        path = rng.choice(sorted(p for p in directory.iterdir() if p.is_file()))
        damage(path, rng)
        return path.name

    return on


def _swapped(directory: Path, rng: random.Random) -> str:
    """Two files change places, or one has the content of a file of its kind that lies elsewhere."""
    if rng.random() < 0.5:
        a, b = rng.sample(sorted(directory.iterdir()), 2)
        a.rename(directory / "aside")
        b.rename(a)
        (directory / "aside").rename(b)
        return f"{a.name} and {b.name}"
    mine = rng.choice(sorted(path for path in directory.iterdir() if path.is_file()))
    elsewhere = [p for p in SAMPLE.rglob("*") if p.suffix == mine.suffix and p.read_bytes() != mine.read_bytes()]
    path = rng.choice(sorted(elsewhere or [SAMPLE / "corpus.yaml"]))
    shutil.copyfile(path, mine)
    return f"{mine.name} is now {path.relative_to(SAMPLE)}"


def _other_step(directory: Path, rng: random.Random) -> str:
    named = directory.with_name(rng.choice(["step-0000009", "step-0000080", "step-0000000"]))
    directory.rename(named)
    directory.symlink_to(named.name)
    return named.name


# --- damages of the seal: changed, and sealed again or not


def _places(node: object, at: tuple = ()) -> list[tuple]:
    """All key paths inside a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, value in items for place in [(*at, key), *_places(value, (*at, key))]]


def _some_place(seal: dict, rng: random.Random, number: bool = False) -> tuple:
    """A key path, those near the top more often."""

    def value(place: tuple) -> object:
        return functools.reduce(lambda node, key: node[key], place, seal)

    places = [p for p in _places(seal) if p != (DIGEST,) and (not number or type(value(p)) in (int, float))]
    return rng.choice([p for p in places if len(p) <= rng.randint(1, 5)] or places)


def _put(seal: dict, place: tuple, value: object) -> None:
    functools.reduce(lambda node, key: node[key], place[:-1], seal)[place[-1]] = value


_OTHERS = (None, True, 7, -1, 0.5, "x", "", [], {}, [1], {"a": 1}, [[]], "\ud800", "a\nb", "0" * 64)
_NUMBERS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "1" + "0" * 400,
    "1" + "0" * 5000,
    "-1",
    "1e300",
    "9223372036854775808",
)


def _other_type(seal: dict, rng: random.Random) -> str:
    place = _some_place(seal, rng)
    old = functools.reduce(lambda node, key: node[key], place, seal)
    value = rng.choice([other for other in _OTHERS if type(other) is not type(old)])
    _put(seal, place, value)
    return f"{place} = {value!r}"


def _number(seal: dict, rng: random.Random) -> str:
    place, text = _some_place(seal, rng, number=True), rng.choice(_NUMBERS)
    _put(seal, place, f"<<{text}>>")
    return f"{place} = {text[:30]}"


def _deep(seal: dict, rng: random.Random) -> str:
    place, depth = _some_place(seal, rng), rng.choice([300, 3000, 100_000])
    open_, close = rng.choice([("[", "]"), ('{"a":', "}")])
    _put(seal, place, f"<<{open_ * depth}1{close * depth}>>")
    return f"{place}, {open_} x {depth}"


def _gone(seal: dict, rng: random.Random) -> str:
    place = _some_place(seal, rng)
    node = functools.reduce(lambda node, key: node[key], place[:-1], seal)
    del node[place[-1]]
    return f"without {place}"


def _names(seal: dict, rng: random.Random) -> str:
    """A tensor or moment that is missing, is another, stands twice, or is one too many."""
    shard = rng.choice(sorted(seal["shards"]))
    tensors = seal["shards"][shard]["tensors"]
    at = rng.randrange(len(tensors))
    name, how = tensors[at], rng.choice(["missing", "twice", "renamed", "more", "kind", "all of a kind"])
    if how == "missing":
        del tensors[at]
    elif how == "twice":
        tensors.append(name)
    elif how == "renamed":
        tensors[at] = name + "2"
    elif how == "more":
        tensors.insert(
            at, rng.choice(["model.blocks.7.attn.q.weight", "optimizer.foo.embed.weight", "x", "", "model."])
        )
    elif how == "kind":
        tensors[at] = "optimizer.exp_avg." + name.removeprefix("model.")
    else:
        kind = rng.choice(KINDS)
        seal["shards"][shard]["tensors"] = [n for n in tensors if not n.startswith(kind + ".")] or ["x"]
    return f"{how}: {name}"


_PATHS = (
    "../x", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\nb", "\ud800", "x" * 300, SEAL, "a\\b",
    "./shard-00001.safetensors", "../step-0000008/shard-00001.safetensors",
)  # fmt: skip


def _paths(seal: dict, rng: random.Random) -> str:
    """A shard, a file or the tokenizer by a path."""
    path = rng.choice(_PATHS)
    where = rng.choice(["shards", "files" if seal.get("files") else "shards", "tokenizer"])
    if where == "tokenizer":
        seal["state"]["tokenizer"] = path
    else:
        name = rng.choice(sorted(seal[where]))
        seal[where][path] = seal[where].pop(name)
    return f"{where}: {path!r}"


def _shapes(seal: dict, rng: random.Random) -> str:
    """Another model, or other parts of a tensor."""
    parts = [p for p in _places(seal) if "parts" in p and len(p) == 6]
    if parts and rng.random() < 0.8:
        place = rng.choice(parts)
        old = functools.reduce(lambda node, key: node[key], place, seal)
        _put(seal, place, rng.choice([n for n in (0, 1, 2, 8, 16, 176, 352, 353, 1 << 40) if n != old]))
        return str(place)
    key, value = rng.choice([("d_ff", 24), ("vocab_size", 384), ("n_layers", 2), ("d_model", 16), ("norm", "rmsnorm"),
                             ("bias", False), ("tie_embeddings", False), ("n_layers", 100_000)])  # fmt: skip
    seal["state"]["model"][key] = value
    return f"{key}={value}"


def _other_number(seal: dict, rng: random.Random) -> str:
    seal["state"]["step"] = rng.choice([0, 7, 9, 1 << 40])
    return str(seal["state"]["step"])


SEAL_DAMAGES = {
    "another type": _other_type, "no number": _number, "deep": _deep, "key gone": _gone, "names": _names,
    "paths": _paths, "shapes": _shapes, "of another step": _other_number,
}  # fmt: skip


def _in_seal(change: Callable[[dict, random.Random], str], sealed_again: bool) -> Callable[[Path, random.Random], str]:
    def on(directory: Path, rng: random.Random) -> str:
        path = directory / SEAL
        seal = json.loads(path.read_text())
        done = change(seal, rng)
        if sealed_again and DIGEST in seal:  # as if somebody had meant it
            seal = with_digest(seal)
        text = (
            json.dumps(seal, indent=1).replace('"<<', "").replace('>>"', "").replace('\\":', '":').replace('{\\"', '{"')
        )
        path.write_text(text)
        return done

    return on


# --- damages of the run directory


def _metrics(directory: Path, rng: random.Random) -> str:
    path = directory / "run" / rng.choice(["metrics.jsonl", "events.jsonl"])
    how = rng.choice(["line", "line", "cut", "gone", "flipped", "zeroed", "not UTF-8", "again"])
    lines = path.read_bytes().splitlines(keepends=True)
    if how == "line":
        lines[rng.randrange(len(lines))] = rng.choice(
            [b"\xff\xfe\n", b"[\n", b"7\n", b"[" * 9000 + b"\n", b'{"step": 1e999}\n', b'{"step": "8"}\n', b"{}\n",
             b"\n", b'{"step": 3, "loss": {"a": 1}}\n', b'{"step": 3, "val_loss": {"a": "b"}}\n',
             b'{"step": -1, "loss": 1}\n',
             b'{"step": 4, "loss": 1' + b"0" * 400 + b"}\n", b'{"step": 4, "tokens": 1' + b"0" * 5000 + b"}\n"]
        )  # fmt: skip
        path.write_bytes(b"".join(lines))
    elif how == "again":
        path.write_bytes(b"".join(lines + lines[rng.randrange(len(lines)) :]))
    else:
        FILE_DAMAGES[{"gone": "deleted"}.get(how, how)](path, rng)
    return f"{path.name}: {how}"


def _manifest(directory: Path, rng: random.Random) -> str:
    path = directory / "run" / "manifest.json"
    how = rng.choice([*FILE_DAMAGES, "type", "type", "number", "deep"])
    if how in FILE_DAMAGES:
        FILE_DAMAGES[how](path, rng)
        return how
    manifest = json.loads(path.read_text())
    done = {"type": _other_type, "number": _number, "deep": _deep}[how](manifest, rng)
    path.write_text(json.dumps(manifest).replace('"<<', "").replace('>>"', "").replace('\\"', '"'))
    return f"{how}: {done}"


def _no_seal(directory: Path, rng: random.Random) -> str:
    path = directory / WHERE["old"]
    how = rng.choice(["seal", "all", "file"])
    if how == "seal":
        (path / SEAL).unlink()
    else:
        shutil.rmtree(path)
        path.mkdir() if how == "all" else path.write_text("x")
    return how


RUN_DAMAGES = {"records": _metrics, "manifest": _manifest, "no seal": _no_seal}
ALWAYS_FINE = ("records",)

DAMAGES: dict[str, Callable[[Path, random.Random], str]] = (
    {f"file {name}": _of_a_file(damage) for name, damage in FILE_DAMAGES.items()}
    | {"files swapped": _swapped, "directory of another step": _other_step}
    | {f"seal {name}": _in_seal(damage, False) for name, damage in SEAL_DAMAGES.items()}
    | {f"sealed again {name}": _in_seal(damage, True) for name, damage in SEAL_DAMAGES.items()}
)


def cases(seed: int, count: int) -> Iterator[Case]:
    """The first `count` damaged checkpoints of a seed, all kinds in turn."""
    for number in range(count):
        kind, rng = list(DAMAGES)[number % len(DAMAGES)], random.Random(f"{seed}:{number}")
        name = rng.choice(
            ["new", "new", "parts"] if kind.startswith("sealed again") else ["old", "new", "new", "parts"]
        )
        own = rng.randrange(1 << 30)
        yield Case(
            kind, f"{kind}, {name}, {own}", functools.partial(_judge, kind, name, "read", own), _right(kind, name)
        )


def run_cases(seed: int, count: int) -> Iterator[Case]:
    """The first `count` damaged run directories of a seed, which training goes on in."""
    for number in range(count):
        kind, rng = list(RUN_DAMAGES)[number % len(RUN_DAMAGES)], random.Random(f"{seed}:{number}")
        words = ("fine",) if kind in ALWAYS_FINE else ("refused", "fine")
        yield Case(
            kind, f"{kind}, {number}", functools.partial(_judge, kind, "new", "train", rng.randrange(1 << 30)), words
        )


def _right(kind: str, name: str) -> tuple:
    """A seal of 0.1.0 has no digest: another value of the same type in it, or a key left out that has a default, is not
    seen. Nor is what somebody meant."""
    unseen = ("file flipped", "seal key gone", "seal another type", "seal no number", "file not UTF-8")
    open_to_it = (name == "old" and kind in unseen) or kind in ("sealed again key gone", "sealed again another type")
    return ("refused", "fine", "silent") if open_to_it else ("refused", "fine")


def _judge(kind: str, name: str, use: str, seed: int, directory: Path) -> Outcome:
    rng = random.Random(seed)
    copy = directory / "copy"
    if use == "read":
        shutil.copytree(bed(name) / WHERE[name], copy / WHERE[name])
        done, call = DAMAGES[kind](copy / WHERE[name], rng), functools.partial(read_all, copy / WHERE[name])
        if kind == "directory of another step":
            call = functools.partial(read_all, copy / Path(WHERE[name]).parent / done)
    else:
        shutil.copytree(bed(name), copy)
        done, call = RUN_DAMAGES[kind](copy, rng), functools.partial(train_on, copy)
    right = undamaged(name, use)
    outcome = judged(call, lambda _, result: result == right)
    return Outcome(outcome.word, f"{done}: {outcome.message}", outcome.cpu_seconds)
