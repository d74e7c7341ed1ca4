"""What the compiler says of every operator and its peers, without a GPU: `crystal bench kernels --offline`.

A row is one operator, provider, shape, dtype and direction: what it launches, what each launch needs of a
multiprocessor, the bytes it moves beside the least it must move, how many kernels a sweep of ten batch sizes
compiles, and whether its 32-bit offsets hold past 2^31 elements. Counts from the compiler's own output, never a
time: `measured` is false. The best of these numbers do not prove a speed; bad ones disprove it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from crystal.kernels.bench.peers import functions, installed
from crystal.kernels.catalog import Operator, operators
from crystal.kernels.dispatch import MULTIPROCESSORS
from crystal.kernels.proof.accuracy import outputs_and_gradients
from crystal.kernels.proof.offline import Launch, TorchCall, offline
from crystal.kernels.proof.offsets import unsafe_offsets
from crystal.kernels.proof.resources import access_widths, preference, resources
from crystal.kernels.proof.traffic import traffic
from crystal.kernels.proof.ttir import Unsupported, parse

DIRECTIONS = ("forward", "backward")
SWEEP = (1, 3, 17, 100, 512, 1000, 1024, 2048, 4099, 8192)
DEVICES = {80: "A100 (sm_80)", 90: "H100/H200 (sm_90)"}
HUGE = 1 << 32  # elements of the launch whose offsets are audited


def launches(
    arch: int, operator: Operator, function: Callable, shape: dict, dtype: torch.dtype, frontend: bool = False
) -> dict[str, list[Launch | TorchCall]]:
    """What a call launches forward and backward, on meta tensors of that shape."""
    with offline(arch, frontend, preference=preference(arch)) as log:
        arguments = operator.make_inputs(shape, dtype, "meta", None)
        seen = []

        def watched(*given):
            del log[:]
            results = function(*given)
            seen.extend(log)
            return results

        outputs_and_gradients(watched, arguments, None, not operator.inplace)
        ran = log[len(seen) :]
    return {"forward": seen, "backward": [x for x in ran if not _fill(x)]}


def _fill(record: Launch | TorchCall) -> bool:
    """Our own uninitialised gradients, and sums over nothing."""
    return isinstance(record, TorchCall) and not record.written and not record.sync


def describe(launch: Launch, arch: int, count: bool) -> dict:
    """One launch as a plain record; bytes are None where the kernel could not be translated."""
    used = resources(launch.compiled, arch)
    parameters = parse(launch.compiled.asm["ttir"]).parameters
    pointers = {name[1:] for name, kind in parameters if kind.pointer}
    widths = access_widths(launch.compiled.asm["ptx"], [name[1:] for name, _ in parameters], pointers)
    sizes = {name: x.numel() * x.element_size() for name, x in launch.tensors.items()}
    large = [name for name in widths if name in sizes and sizes[name] * 4 >= max(sizes.values())]
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    resident = min(used.blocks_resident, -(-programs // MULTIPROCESSORS[arch])) * used.warps  # of those there are
    record = {"kernel": launch.name, "grid": list(launch.grid), **used.record(), "warps_resident": resident}
    record["tensor_bytes"] = sum(sizes.values())
    # the width that moves most of a tensor's bytes, of the large tensors the worst
    record["width"] = min((max(widths[n], key=lambda w, n=n: w * widths[n][w]) for n in large), default=0)
    if count:
        try:
            moved = traffic(launch)
        except Unsupported as unknown:
            return record | {"bytes": None, "asked_bytes": None, "outside": None, "note": str(unknown)}
        record |= {
            "bytes": moved.read + moved.written, "asked_bytes": moved.asked_read + moved.asked_written,
            "outside": moved.outside, "misaligned": moved.misaligned,
        }  # fmt: skip
    return record


def _resized(shape: dict, rows: int) -> dict:
    return shape | ({"rows": rows} if "rows" in shape else {"batch": rows})


def _elements(shape: dict) -> int:
    n = 1
    for key, size in shape.items():
        n *= size if key not in ("pitch", "kv_heads", "rotary_dim") else 1
    return n


def variants(arch: int, operator: Operator, function: Callable, shape: dict, dtype: torch.dtype) -> dict[str, int]:
    """By direction, the most kernels that one Triton function compiles to over ten numbers of rows."""
    found: dict[str, dict[str, set[int]]] = {d: {} for d in DIRECTIONS}
    kept = []  # so that no two compiled kernels share an id
    for rows in SWEEP:
        for direction, log in launches(arch, operator, function, _resized(shape, rows), dtype, frontend=True).items():
            for launch in (x for x in log if isinstance(x, Launch)):
                kept.append(launch)
                found[direction].setdefault(launch.name, set()).add(id(launch.compiled))
    return {d: max(map(len, names.values()), default=0) for d, names in found.items()}


def unsafe(arch: int, operator: Operator, function: Callable, shape: dict, dtype: torch.dtype) -> dict[str, int]:
    """By direction, pointer additions that wrap in 32 bits on tensors of over 2^32 elements."""
    rows = -(-HUGE // _elements(_resized(shape, 1)))
    found = launches(arch, operator, function, _resized(shape, rows), dtype, frontend=True)
    return {
        d: sum(len(unsafe_offsets(x.compiled.asm["ttir"], x.grid, x.arguments)) for x in log if isinstance(x, Launch))
        for d, log in found.items()
    }


def table_of(arch: int, provider: str) -> dict[str, Callable]:
    """A provider's operators; flash-attention's import looks for a GPU, so it is given one."""
    with offline(arch, preference=preference(arch)):
        return functions(provider)


def rows(
    arch: int,
    names: tuple[str, ...] | None = None,
    providers: tuple[str, ...] = ("ours", "liger", "flash-attn"),
    shapes: Callable[[str], bool] = lambda name: not name.startswith("small"),
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
    count: bool = True,
    sweep: bool = True,
) -> Iterator[dict]:
    """The table, a record at a time. `count`: bytes (slow); `sweep`: variants and offsets, of the first shape."""
    for provider in providers:
        if provider != "ours" and installed(provider) is None:
            continue
        table = table_of(arch, provider)
        for operator in (o for o in operators(names) if o.name in table):
            function = table[operator.name]
            swept, checked = {}, {}
            for name in filter(shapes, operator.shapes):
                shape = operator.shapes[name]
                for dtype in dtypes:
                    if sweep and not swept:
                        swept, checked = _swept(arch, operator, provider, function, shape, dtype)
                    for row in examine(arch, operator, provider, function, shape, dtype, count):
                        direction = row["direction"]
                        found = {"variants": swept.get(direction), "unsafe_offsets": checked.get(direction)}
                        yield row | {"shape": name} | found


def _swept(
    arch: int, operator: Operator, provider: str, function: Callable, shape: dict, dtype: torch.dtype
) -> tuple[dict[str, int], dict[str, int]]:
    """(variants, unsafe offsets), empty where a peer refuses."""
    try:
        what = arch, operator, function, shape, dtype
        return variants(*what), unsafe(*what)
    except Exception:
        if provider == "ours":
            raise
        return {}, {}


def examine(
    arch: int, operator: Operator, provider: str, function: Callable, shape: dict, dtype: torch.dtype, count: bool
) -> Iterator[dict]:
    """The records of one call: forward and, where there is one, backward. A peer's refusal is a record too."""
    key = {"op": operator.name, "provider": provider, "shape": "", "sizes": shape, "dtype": str(dtype).split(".")[1]}
    try:
        found = launches(arch, operator, function, shape, dtype)
    except Exception as refused:  # a peer's own limits, such as Liger's 65,536 columns
        if provider == "ours":
            raise
        yield key | {"direction": "forward", "failed": f"{type(refused).__name__}: {refused}".splitlines()[0][:160]}
        return
    for direction, log in found.items():
        if not log:
            continue
        kernels = [describe(x, arch, count) for x in log if isinstance(x, Launch)]
        calls = [x for x in log if isinstance(x, TorchCall)]
        minimum = operator.compulsory_bytes(shape, dtype, direction)
        moved = None
        if count and all(k["bytes"] is not None for k in kernels):
            moved = sum(k["bytes"] for k in kernels) + sum(c.read + c.written for c in calls)
        main = max(kernels, key=lambda k: k["tensor_bytes"], default={})
        yield key | {
            "direction": direction,
            "launches": len(kernels) + sum(not c.sync for c in calls),
            "torch_launches": sum(not c.sync for c in calls),
            "syncs": sum(c.sync for c in calls),
            "registers": main.get("registers"),
            "spills": sum(k["spills"] for k in kernels),
            "warps_resident": main.get("warps_resident"),
            "width": main.get("width"),
            "bytes": moved,
            "minimum_bytes": minimum,
            "bytes_ratio": None if moved is None else round(moved / minimum, 4),
            "kernels": kernels,
            "torch_calls": [c.name for c in calls],
        }
