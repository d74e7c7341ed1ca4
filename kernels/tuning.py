"""Choices that depend on the machine, made by measuring it: which library makes a product, which path attention takes.

A matrix library that is fast on one maker's processors may run at half of its speed on another's (docs/cpu-speed.md),
so no choice is written down here. The candidates are timed once per machine and number of threads, in a second or so
and at most five (measuring.py), and the result is cached under what it depends on: processor, torch, threads, and the
environment variables that limit the libraries. A run records the choices that it began with and keeps them (`use`),
for another library's sums differ in their last bits.

CRYSTAL_TUNING=FILE.json reads the choices from a file that `save` wrote, and measures nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import crystal.kernels.thread_waiting as waiting
from crystal.kernels.dispatch import KernelModeError
from crystal.kernels.gcc import cache, put

UNSETTLED_FOR = 3600.0  # seconds that a result is used which a busy machine kept from settling
SIZES = (128, 256, 512, 1024)  # of a product's narrower side: those a choice is made for
HEADS = (256, 512)  # the same where the wider side is a vocabulary, WIDE times the narrower or more
WIDE = 8
HEAD_SIZES, LONG = (32, 64, 128), 512  # of attention: sizes of a head, and tokens beyond which a sequence is long
FEW = 64  # rows below which a product is bound by memory, in generation: torch's
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "CRYSTAL_MARCH")
INSTRUCTIONS = (
    "avx2 fma f16c avx512f avx512bw avx512vl avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8 neon asimd bf16 sve"
).split()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Candidates = dict[str, Callable[[], object]]  # by name, the one to prefer first


@dataclass(frozen=True)
class Case:
    """One choice. rates: work a second of each candidate; spread: how far the chosen one's best timings lie apart."""

    chosen: str
    rates: dict[str, float]
    spread: float
    settled: bool


@dataclass(frozen=True)
class Tuning:
    """All choices of one machine and number of threads.

    dtype: what `auto` means, the compute dtype whose products are the faster here. cases: by key, such as
    "fp32 forward 256", rates in FLOP/s. seconds: that measuring took; measured: when, in Unix time (0: from a file).
    """

    identity: dict
    dtype: str
    cases: dict[str, Case]
    seconds: float = 0.0
    measured: float = 0.0

    @property
    def settled(self) -> bool:
        return all(case.settled for case in self.cases.values())

    def choices(self) -> dict[str, str]:
        """key → chosen candidate: what a run records."""
        return {key: case.chosen for key, case in self.cases.items()}

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


def processor() -> str:
    """The processor's own name, as its maker gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def instructions() -> tuple[str, ...]:
    """The instruction sets that matter to products, of those the processor has; () where it cannot be asked."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                have = set(line.partition(":")[2].split())
                return tuple(name for name in INSTRUCTIONS if name in have)
    return ()


def identity(threads: int) -> dict:
    """What measured rates depend on."""
    return {
        "processor": processor(),
        "instructions": list(instructions()),
        "torch": torch.__version__,
        "threads": threads,
        "limits": {name: os.environ[name] for name in LIMITS if name in os.environ},
    }


_tunings: dict[int, Tuning] = {}  # by number of threads
_kept: dict[int, dict[str, str]] = {}  # the choices that a run began with, in force until it ends
_made: dict[tuple, str] = {}  # looked up before
# set by the package to measuring.py's, which times the very operators that ask here who is to make them
measure: Callable[[int], Tuning] | None = None


def tuning(threads: int | None = None) -> Tuning:
    """The choices for this machine: measured by this process, by one before it, or read from CRYSTAL_TUNING.

    Raises KernelModeError for a file in CRYSTAL_TUNING that does not hold choices.
    """
    threads = threads or torch.get_num_threads()
    if threads not in _tunings:
        _tunings[threads] = _from_file() or _cached(threads) or remeasured(threads)
    return _tunings[threads]


def remeasured(threads: int) -> Tuning:
    """Measure now, and cache it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = measure(threads)
    finally:
        torch.set_num_threads(before)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second at every start
        save(found, _file(found.identity))
    with contextlib.suppress(OSError, RuntimeError):
        waiting.remember(waiting.measure())
    _made.clear()
    _tunings[threads] = found
    return found


def use(choices: dict[str, str], threads: int | None = None) -> None:
    """Keep to the choices that a run began with; {} ends that. A key that is not among them is decided as ever."""
    _kept[threads or torch.get_num_threads()] = dict(choices)
    _made.clear()


def choices() -> dict[str, str]:
    """What is in force for this number of threads."""
    return tuning().choices() | _kept.get(torch.get_num_threads(), {})


def chosen(key: str, default: str = "torch") -> str:
    """The candidate that a case's choice fell on."""
    kept = _kept.get(torch.get_num_threads(), {})
    if key in kept:
        return kept[key]
    case = tuning().cases.get(key)
    return case.chosen if case else default


def product_key(operation: str, dtype: torch.dtype, features_in: int, features_out: int) -> str:
    """The case that decides a product: its class is its narrower side, apart where the other is a vocabulary.

    A weight gradient with fewer rows than columns has a case of its own, for there the better side to begin with is
    the other one.
    """
    narrow, wide = sorted((features_in, features_out))
    head = wide >= WIDE * narrow
    size = min(HEADS if head else SIZES, key=lambda s: max(s, narrow) / min(s, narrow))
    down = operation == "weight_gradient" and features_out < features_in
    return f"{NAMES[dtype]} {operation} {size}{' head' if head else ' down' if down else ''}"


def attention_key(dtype: torch.dtype, tokens: int, d_head: int) -> str:
    """The case that decides attention's path: long sequences, or short ones by the heads' size."""
    if tokens > LONG:
        return f"{NAMES[dtype]} attention long"
    for size in HEAD_SIZES:  # the nearest, by comparisons alone: in a compiler's graph d_head may be a symbol
        if d_head * d_head <= 2 * size * size:
            break
    return f"{NAMES[dtype]} attention heads of {size}"


def product_choice(operation: str, dtype: torch.dtype, rows: int, features_in: int, features_out: int) -> str:
    """Who makes a product: looked up once for each shape."""
    asked = (operation, dtype, rows, features_in, features_out, torch.get_num_threads())
    found = _made.get(asked)
    if found is None:
        few = rows < FEW
        found = _made[asked] = "torch" if few else chosen(product_key(operation, dtype, features_in, features_out))
    return found


def fastest_dtype() -> str:
    """What `dtype: auto` means here: bf16 where its products are faster than those of fp32, else fp32."""
    return tuning().dtype


def save(found: Tuning, path: Path) -> None:
    """Write choices to a file, whole or not at all."""
    put(path, json.dumps(found.as_dict(), indent=1))


def load(path: Path) -> Tuning:
    """Read what `save` wrote. Raises ValueError, OSError."""
    try:
        read = json.loads(path.read_text())
        cases = {key: Case(**case) for key, case in read.pop("cases").items()}
        found = Tuning(cases=cases, **read)
        if found.dtype not in DTYPES or not all(isinstance(case.chosen, str) for case in cases.values()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path}: expected measured choices") from None
    return found


def _from_file() -> Tuning | None:
    path = os.environ.get("CRYSTAL_TUNING")
    if not path:
        return None
    try:
        return load(Path(path))
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "expected choices as `crystal.kernels.tuning.save` writes them"
        raise KernelModeError(f"CRYSTAL_TUNING={path}: {problem}") from None


def _file(identity: dict) -> Path:
    candidates = Path(__file__).with_name("candidates.py").read_text(encoding="utf-8")
    # measured again when they change
    depends = json.dumps([identity, candidates], sort_keys=True)
    return cache("tuning") / f"{hashlib.sha256(depends.encode()).hexdigest()[:24]}.json"


def _cached(threads: int) -> Tuning | None:
    try:
        found = load(_file(identity(threads)))
    except (OSError, ValueError):
        return None
    return found if found.settled or time.time() - found.measured < UNSETTLED_FOR else None
