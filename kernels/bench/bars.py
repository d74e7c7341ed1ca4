"""The ten bars: what fused kernels should reach that needs no GPU to be seen, ours beside the peers installed.

`crystal bench kernels --bars`. Each bar counts from the compiler's output or runs the kernels on the CPU; none
reads a figure from a file, and none is a time. A bar passes or fails for ours alone; the peers' values, where a peer
has the operator, are what these bars were chosen against.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch

from crystal.kernels.bench.compiled import examine, table_of, unsafe, variants
from crystal.kernels.bench.peers import installed
from crystal.kernels.bench.verified import errors_on_cpu
from crystal.kernels.catalog import OPERATORS
from crystal.kernels.proof.behaviour import bits_fixed, gradients_repeat, inputs_kept, rest_untouched, right_beyond_2_31

NAMED = {operator.name: operator for operator in OPERATORS}
NORMS = ("layer_norm", "rms_norm")
WIDTHS = (1024, 2048, 4096, 8192)
ALIGNED = (1000, 1024, 2008, 4096, 11008)  # whole numbers of 16 bytes in bf16, not all of 32
HALF = {"batch": 2, "seq": 2048, "heads": 32, "kv_heads": 8, "head_dim": 128, "rotary_dim": 64}


@dataclass
class Bar:
    """One line of the table: values are text, by provider."""

    number: int
    what: str
    want: str
    passed: bool
    ours: str
    peers: dict[str, str] = field(default_factory=dict)

    def record(self) -> dict:
        return asdict(self) | {"verdict": "PASS" if self.passed else "FAIL"}


@functools.cache
def _table(arch: int, provider: str) -> dict[str, Callable]:
    return table_of(arch, provider)


@functools.cache
def _examined(arch: int, provider: str, name: str, sizes: tuple, count: bool) -> dict[str, dict]:
    """By direction the record of a call in bf16; {} where a peer has not the operator or refuses the shape."""
    function = _table(arch, provider).get(name)
    if function is None:
        return {}
    found = examine(arch, NAMED[name], provider, function, dict(sizes), torch.bfloat16, count)
    return {row["direction"]: row for row in found if "failed" not in row}


def _look(arch: int, provider: str, name: str, direction: str, count: bool = False, **sizes: int) -> dict | None:
    return _examined(arch, provider, name, tuple(sizes.items()), count).get(direction)


def _range(values: list) -> str:
    if not values:
        return "-"
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _each(providers: tuple[str, ...], value: Callable[[str], str]) -> dict[str, str]:
    return {p: value(p) for p in providers if p != "ours"}


def _residency(arch: int, providers: tuple[str, ...]) -> Bar:
    def seen(p: str, widths: tuple[int, ...]) -> list[dict]:
        looked = (_look(arch, p, name, "backward", rows=8192, width=n) for name in NORMS for n in widths)
        return [row for row in looked if row]

    def text(p: str) -> str:
        warps = [row["warps_resident"] for row in seen(p, WIDTHS)]
        return f"{_range(warps)} warps, {sum(row['spills'] for row in seen(p, (*WIDTHS, 16384)))} spills"

    ours = seen("ours", WIDTHS)
    passed = min(row["warps_resident"] for row in ours) >= 16
    passed &= not any(row["spills"] for row in seen("ours", (*WIDTHS, 16384)))
    want = ">= 16 warps/SM, 0 spills"
    return Bar(1, "norm backward, width 1,024 to 8,192 (spills: to 16,384)", want, passed, text("ours"),
               _each(providers, text))  # fmt: skip


def _norm_traffic(arch: int, providers: tuple[str, ...]) -> Bar:
    def ratios(p: str) -> list[float]:
        looked = (_look(arch, p, "layer_norm", "backward", True, rows=m, width=4096) for m in (8192, 2048))
        return [row["bytes_ratio"] for row in looked if row and row["bytes_ratio"]]

    def text(p: str) -> str:
        return ", ".join(f"{r:.3f}" for r in ratios(p)) or "-"

    large, small = ratios("ours")
    want = "<= 1.05, <= 1.15 of the least"
    return Bar(2, "bytes of LayerNorm's backward at [8192, 4096], [2048, 4096]", want, large <= 1.05 and small <= 1.15,
               text("ours"), _each(providers, text))  # fmt: skip


def _launch_counts(arch: int, providers: tuple[str, ...]) -> Bar:
    def seen(p: str) -> tuple[list[int], list[int], int, int]:
        """Launches of norm backwards and of forwards, host syncs, copies and fills of torch."""
        rows = [
            (name, direction, row)
            for name in NAMED for direction in ("forward", "backward")
            if (row := _look(arch, p, name, direction, **NAMED[name].shapes["amber-7b"]))
        ]  # fmt: skip
        backwards = [row["launches"] for name, d, row in rows if "norm" in name and d == "backward"]
        forwards = [row["launches"] for name, d, row in rows if d == "forward" and name != "cross_entropy_full"]
        syncs, torch_launches = (sum(row[key] for *_, row in rows) for key in ("syncs", "torch_launches"))
        return backwards, forwards, syncs, torch_launches

    def text(p: str) -> str:
        backwards, forwards, syncs, others = seen(p)
        return f"{_range(backwards)}, {_range(forwards)}, {syncs} syncs, {others} of torch"

    backwards, forwards, syncs, others = seen("ours")
    mean = _look(arch, "ours", "cross_entropy_full", "forward", **NAMED["cross_entropy_full"].shapes["amber-7b"])
    passed = max(backwards) <= 2 and max(forwards) == 1 and syncs == others == 0 and mean["launches"] <= 2
    want = "2, 1, 0, 0 (a mean loss: 2)"
    return Bar(3, "launches: norm backward, forwards; host syncs; torch kernels beside", want, passed, text("ours"),
               _each(providers, text))  # fmt: skip


def _widths(arch: int, providers: tuple[str, ...]) -> Bar:
    def seen(p: str) -> list[int]:
        rows = [
            _look(arch, p, name, direction, rows=8192, width=n)
            for name in (*NORMS, "add_layer_norm", "swiglu") for n in ALIGNED for direction in ("forward", "backward")
        ]  # fmt: skip
        rows += [
            _look(arch, p, "rope_half_packed_inplace", "forward", **HALF | {"rotary_dim": rot}) for rot in (32, 64, 128)
        ]
        return [row["width"] for row in rows if row and row["width"]]

    def text(p: str) -> str:
        return f"{_range(seen(p))} bytes"

    want = "16 bytes throughout"
    return Bar(4, "access width: norms, SwiGLU at widths % 8 = 0, rope at 32, 64, 128", want, min(seen("ours")) == 16,
               text("ours"), _each(providers, text))  # fmt: skip


def _partial_rope(arch: int, providers: tuple[str, ...]) -> Bar:
    def seen(p: str) -> dict | None:
        return _look(arch, p, "rope_half_packed_inplace", "forward", True, **HALF)

    def text(p: str) -> str:
        row = seen(p)
        if row is None or row["bytes"] is None:
            return "-"
        turned = HALF["batch"] * HALF["seq"] * (HALF["heads"] + HALF["kv_heads"]) * HALF["head_dim"]
        return f"{row['bytes'] / turned:.2f} bytes an element, {row['launches']} launches"

    kept = rest_untouched(NAMED["rope_half_packed_inplace"], HALF | {"seq": 64})
    row = seen("ours")
    passed = kept and row["launches"] == 1 and row["bytes_ratio"] <= 1.01
    return Bar(5, "rope in place, 64 of 128, packed q/k/v", "the turned bytes alone (2.0 + tables), 1 launch; v kept",
               passed, text("ours") + (", v and the rest kept" if kept else ", MORE WRITTEN"),
               _each(providers, text))  # fmt: skip


def _recompiles(arch: int, providers: tuple[str, ...]) -> Bar:
    def worst(p: str) -> int:
        table = _table(arch, p)
        found = [0]
        for name in (n for n in NAMED if n in table):
            found += variants(arch, NAMED[name], table[name], NAMED[name].shapes["amber-7b"], torch.bfloat16).values()
        return max(found)

    ours = worst("ours")
    return Bar(6, "kernels compiled over ten batch sizes, the worst operator", "<= 2", ours <= 2, str(ours),
               _each(providers, lambda p: str(worst(p))))  # fmt: skip


def _offsets(arch: int, providers: tuple[str, ...]) -> Bar:
    def total(p: str) -> int:
        table = _table(arch, p)
        return sum(
            sum(unsafe(arch, NAMED[n], table[n], NAMED[n].shapes["amber-7b"], torch.bfloat16).values())
            for n in NAMED if n in table
        )  # fmt: skip

    ours, right = total("ours"), right_beyond_2_31()
    text = f"{ours}, {'right' if right else 'WRONG'} with rows 2^30 apart"
    return Bar(7, "32-bit offsets that reach a pointer; rows 2^30 elements apart", "0, right", ours == 0 and right,
               text, _each(providers, lambda p: str(total(p))))  # fmt: skip


def _behaviour(arch: int, providers: tuple[str, ...]) -> Bar:
    checks = {"inputs kept": inputs_kept, "second backward equal": gradients_repeat, "bits fixed": bits_fixed}
    failed = [
        f"{operator.name}: not {what}"
        for operator in OPERATORS if not operator.inplace
        for what, check in checks.items()
        if not check(operator, operator.shapes["small"], torch.bfloat16)
    ]  # fmt: skip
    return Bar(8, "inputs kept, second backward equal, same bits in any order of programs", "every operator",
               not failed, "; ".join(failed) or "every operator")  # fmt: skip


def _fused_add(arch: int, providers: tuple[str, ...]) -> Bar:
    elements = 8192 * 4096

    def seen(p: str) -> dict | None:
        return _look(arch, p, "add_layer_norm", "forward", True, rows=8192, width=4096)

    def text(p: str) -> str:
        row = seen(p)
        return f"{row['bytes'] / elements:.3f}" if row and row["bytes"] else "-"

    passed = seen("ours")["bytes"] / elements <= 8.01
    return Bar(9, "add + LayerNorm forward, bytes an element at [8192, 4096] bf16", "8.0 + O(width)", passed,
               text("ours"), _each(providers, text))  # fmt: skip


def _accuracy(arch: int, providers: tuple[str, ...]) -> Bar:
    ratios = {f"{name} {error.output}": error.ratio for name, *_, found in errors_on_cpu() for error in found}
    name = max(ratios, key=ratios.get)
    # two roundings of the same exact value differ in a few of 16 million elements
    text = f"{ratios[name]:.5f} x ({name})"
    return Bar(10, "bf16 error beside torch's own at [4096, 4096], worst of all operators", "<= 1 x (+ 0.1 %)",
               ratios[name] <= 1.001, text, _each(providers, lambda _: "not run"))  # fmt: skip


BARS = (
    _residency, _norm_traffic, _launch_counts, _widths, _partial_rope,
    _recompiles, _offsets, _behaviour, _fused_add, _accuracy,
)  # fmt: skip


def bars(arch: int, providers: tuple[str, ...] = ("ours", "liger", "flash-attn")) -> Iterator[Bar]:
    """The ten, one at a time; peers that are not installed are left out."""
    present = tuple(p for p in providers if p == "ours" or installed(p))
    for bar in BARS:
        yield bar(arch, present)
