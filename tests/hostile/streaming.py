"""Damaged weight-streaming stores: cut, missing, flipped, swapped with another step's or run's; read and trained from.

A bed is a tiny run that stopped after step 3: `settled`, with a checkpoint that refers to its store; `spilled` and
`recomputed`, in which the update of step 3 is due, as kill -9 leaves it. A case damages a copy of it and reads the
checkpoint, or goes on training for two steps. Right is one line, or the very bits that the undamaged one gives:
where the damage lies in what no longer counts.
"""

import functools
import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from hostile.case import Case, Outcome, judged

from crystal import checkpoint
from crystal.backends.base import MicroBatch, Setup
from crystal.backends.config import OptimizerConfig, WeightStreamingConfig
from crystal.backends.weight_streaming.backend import WeightStreamingBackend
from crystal.backends.weight_streaming.lock import LOCK
from crystal.training.saving import Saver
from crystal.zoo.build import plan_for
from crystal.zoo.config import ModelConfig, model_config

BEDS = {"settled": {}, "spilled": {"moments": "int8"}, "recomputed": {"moments": "bf16", "gradients": "recomputed"}}
KINDS = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
PAGE = 4096


def model() -> ModelConfig:
    """16 wide, one block."""
    small = {"d_model": 16, "n_heads": 2, "n_kv_heads": None, "n_layers": 1, "d_ff": 24, "vocab_size": 96}
    return ModelConfig(**model_config("crystalcoder-w64-l3").model_dump(mode="json") | small | {"max_seq_len": 16})


def backend(directory: Path, seed: int = 1, **settings) -> WeightStreamingBackend:
    """The backend of a run directory, fp32, on spilled gradients and fp32 moments unless `settings` say otherwise."""
    optimizer = OptimizerConfig(eps=1e-9)
    plan = plan_for(model(), weight_decay=optimizer.weight_decay, eps=optimizer.eps)
    section = WeightStreamingConfig(name="weight_streaming", dtype="fp32", **settings)
    return WeightStreamingBackend(
        Setup(model(), plan, optimizer, lambda step: 0.01 / step, seed, 2), section, directory
    )


def batches(step: int) -> list[MicroBatch]:
    """One micro-batch, the same for the same step on every machine."""
    tokens = torch.randint(0, 96, (4, 17), generator=torch.Generator().manual_seed(step))
    weights = torch.full((4, 16), 1 / 64)
    weights[:, -step % 16] = 0
    return [MicroBatch(tokens[:, :-1], tokens[:, 1:], weights, torch.arange(4) % 2, (tokens[:, :-1] == 7).cumsum(1))]


def refer(run: Path, made: WeightStreamingBackend) -> Path:
    """The checkpoint of the backend's last step, which refers to its store."""
    state = {"step": made.step, "model": model().model_dump(mode="json")}
    return checkpoint.refer(checkpoint.step_directory(run / "checkpoints", made.step), made.seal(), state)


def stop_at(run: Path, step: int, due: bool, seed: int = 1, **settings) -> None:
    """Train a new run up to a step; due: whose update is left to make, as if it were killed."""
    made = backend(run, seed, **settings)
    made.initialise()
    for number in range(1, step + 1):
        made.train_step(number, batches(number))
    if due:
        made._seal()
    else:
        refer(run, made)
    made.store.close()


@functools.cache
def bed(name: str, seed: int = 1, step: int = 3) -> Path:
    """A run directory that is not to be changed, shared by all cases of a process."""
    run = Path(tempfile.mkdtemp(prefix="crystal-streaming-")) / "run"
    stop_at(run, step, name != "settled", seed, **BEDS[name])
    return run


# --- what is done with a damaged store


def read_all(run: Path) -> str:
    """A digest of every tensor of the checkpoint."""
    saved, total = checkpoint.read(checkpoint.locate(run)), hashlib.sha256()
    for kind in KINDS:
        for name, tensor in saved.tensors(kind):
            total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def train_on(run: Path, **settings) -> str:
    """A digest of two more steps and of the state after them, begun as the training loop begins."""
    made, total = backend(run, **settings), hashlib.sha256()
    try:
        if made.position() is None:  # the loop would look for a checkpoint, and here is none to begin again from
            return "begun anew"
        for step in (made.position() + 1, made.position() + 2):
            Saver(made).move_on(run / "checkpoints")
            total.update(str(made.train_step(step, batches(step)).host()).encode())
        for name, tensor in made.state():
            total.update(name.encode() + tensor.numpy().tobytes())
        return total.hexdigest()
    finally:
        made.store.close()


@functools.cache
def undamaged(name: str, use: str) -> str:
    """What the bed gives."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(shutil.copytree(bed(name), Path(scratch) / "run"))
        return read_all(run) if use == "read" else train_on(run, **BEDS[name])


# --- damages: (store directory, bed's name, random numbers) → what was done


def _some_file(store: Path, rng: random.Random) -> Path:
    files = [path for path in store.iterdir() if path.is_file() and path.name != LOCK]
    return rng.choice(sorted([*files, store.with_name("store.id")]))


def _cut(store: Path, name: str, rng: random.Random) -> str:
    path = _some_file(store, rng)
    size = rng.choice([0, path.stat().st_size // PAGE // 2 * PAGE, rng.randrange(path.stat().st_size)])
    with path.open("r+b") as file:
        file.truncate(size)
    return f"{path.name} to {size}"


def _missing(store: Path, name: str, rng: random.Random) -> str:
    path = _some_file(store, rng)
    path.unlink()
    return path.name


def _longer(store: Path, name: str, rng: random.Random) -> str:
    path = _some_file(store, rng)
    with path.open("ab") as file:
        file.write(bytes(rng.choice([1, PAGE])))
    return path.name


def _flipped(store: Path, name: str, rng: random.Random) -> str:
    path = _some_file(store, rng)
    at, bit = rng.randrange(path.stat().st_size), rng.randrange(8)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0] ^ 1 << bit
        file.seek(at)
        file.write(bytes([byte]))
    return f"{path.name} at {at}, bit {bit}"


def _zeroed(store: Path, name: str, rng: random.Random) -> str:
    path = rng.choice(sorted(store.glob("*.bin")))
    at = rng.randrange(path.stat().st_size // PAGE) * PAGE
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(PAGE))
    return f"{path.name} at {at}"


def _pages(store: Path, name: str, rng: random.Random) -> str:
    path = store / "store.bin"
    a, b = (rng.randrange(path.stat().st_size // PAGE) * PAGE for _ in range(2))
    data = bytearray(path.read_bytes())
    data[a : a + PAGE], data[b : b + PAGE] = data[b : b + PAGE], data[a : a + PAGE]
    path.write_bytes(data)
    return f"{a} and {b}"


def _digit(store: Path, name: str, rng: random.Random) -> str:
    """Another digit in the record: a step, a slot, a learning rate, a sum."""
    path = rng.choice([store / "store.json", store / "store.json", store.with_name("store.id")])
    text = path.read_text()
    at = rng.choice([i for i, c in enumerate(text) if c.isdigit()])
    other = rng.choice([c for c in "0123456789" if c != text[at]])
    path.write_text(text[:at] + other + text[at + 1 :])
    return f"{path.name}: {text[max(at - 12, 0) : at + 1]} with {other}"


def _other(of: Callable[[str], Path]) -> Callable[[Path, str, random.Random], str]:
    """One file, or several, from elsewhere."""

    def swap(store: Path, name: str, rng: random.Random) -> str:
        source = of(name) / "store"
        names = sorted(path.name for path in source.iterdir() if path.name != LOCK)
        chosen = rng.sample(names, rng.choice([1, 1, 1, 2, len(names)]))
        for file in chosen:
            shutil.copyfile(source / file, store / file)
        return ", ".join(chosen)

    return swap


def _wrong_kind(store: Path, name: str, rng: random.Random) -> str:
    path = _some_file(store, rng)
    path.unlink()
    path.mkdir()
    return path.name


DAMAGES: dict[str, Callable[[Path, str, random.Random], str]] = {
    "cut": _cut,
    "missing": _missing,
    "longer": _longer,
    "bit flipped": _flipped,
    "page zeroed": _zeroed,
    "pages swapped": _pages,
    "digit changed": _digit,
    "of another step": _other(lambda name: bed(name, step=2)),
    "of another run": _other(lambda name: bed(name, seed=2)),
    "a directory": _wrong_kind,
}


def cases(seed: int, count: int) -> Iterator[Case]:
    """`count` damaged stores, the same for the same seed; every kind comes in turn."""
    rng = random.Random(seed)
    for number in range(count):
        kind = list(DAMAGES)[number % len(DAMAGES)]
        name, use = rng.choice(
            [("settled", "read"), ("settled", "train"), ("spilled", "train"), ("recomputed", "train")]
        )
        own = rng.randrange(1 << 30)
        yield Case(kind, f"{kind}, {name}, {use}, {own}", functools.partial(_judge, kind, name, use, own), WORDS)


WORDS = ("refused", "fine")


def _judge(kind: str, name: str, use: str, seed: int, directory: Path) -> Outcome:
    run = directory / "run"
    shutil.copytree(bed(name), run)
    done = DAMAGES[kind](run / "store", name, random.Random(seed))
    before, right = _look(run), undamaged(name, use)
    call = functools.partial(read_all, run) if use == "read" else functools.partial(train_on, run, **BEDS[name])
    outcome = judged(call, lambda _, result: result == right)
    if use == "read" and _look(run) != before:
        return Outcome("silent", f"{done}: the reader wrote", outcome.cpu_seconds)
    return Outcome(outcome.word, f"{done}: {outcome.message}", outcome.cpu_seconds)


def _look(run: Path) -> list[tuple]:
    """What is in a directory, and when it was written."""
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(run.rglob("*"))]
