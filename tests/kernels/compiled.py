"""What the compiler makes of every operator, in short: the baseline that `test_compiled` holds new kernels to.

`python tests/kernels/compiled.py` writes compiled-triton-VERSION.json beside this file, after a change that is meant.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import triton

from crystal.kernels.bench.compiled import rows

BASELINE = Path(__file__).with_name(f"compiled-triton-{triton.__version__}.json")
ARCHS = (80, 90)
WIDE = {80: ("narrow", "wide", "wide-16384", "wide-65536"), 90: ("wide-65536",)}
MORE_IS_WORSE = ("launches", "torch_launches", "syncs", "variants", "unsafe_offsets", "bytes_ratio")
LESS_IS_WORSE = ("width",)
KERNEL_MORE_IS_WORSE = ("registers", "spills", "shared", "atomics", "doubles", "accesses")
KERNEL_LESS_IS_WORSE = ("warps_resident",)


def _kernel(record: dict) -> dict:
    """Of one launch what is held to the baseline, and the widths in bytes of its accesses to global memory."""
    accesses = sum(record["loads"].values()) + sum(record["stores"].values())  # narrower ones are more
    kept = {key: record[key] for key in (*KERNEL_MORE_IS_WORSE, *KERNEL_LESS_IS_WORSE) if key != "accesses"}
    return kept | {"accesses": accesses, "loads": record["loads"], "stores": record["stores"]}


def found(arch: int) -> Iterator[tuple[str, dict]]:
    """(what, its counts) at CrystalCoder's shapes in bf16, and of RMSNorm at WIDE widths, whose kernels are others.

    What is counted before a kernel's machine code (bytes, recompiles, offsets) no architecture changes: sm_80 alone.
    """
    first, ours = arch == ARCHS[0], {"arch": arch, "providers": ("ours",)}
    every = rows(shapes=lambda name: name == "crystalcoder-7b", count=first, sweep=first, **ours)
    wide = rows(names=("rms_norm",), shapes=lambda name: name in WIDE[arch], count=False, sweep=False, **ours)
    for row in itertools.chain(every, wide):
        counts = {key: row[key] for key in (*MORE_IS_WORSE, *LESS_IS_WORSE) if row.get(key) is not None}
        kernels = {kernel["kernel"]: _kernel(kernel) for kernel in row["kernels"]}
        yield f"sm_{arch} {row['op']} {row['shape']} {row['dtype']} {row['direction']}", counts | {"kernels": kernels}


def worse(before: dict, now: dict) -> list[str]:
    """What of one operator's counts is worse than it was, in words; a kernel that was not there is too."""
    pairs = [("", before, now, MORE_IS_WORSE, LESS_IS_WORSE)]
    lines = []
    for name, kernel in now["kernels"].items():
        if name in before["kernels"]:
            pairs.append((f"{name} ", before["kernels"][name], kernel, KERNEL_MORE_IS_WORSE, KERNEL_LESS_IS_WORSE))
        else:
            lines.append(f"kernel {name}: not in the baseline")
    return lines + [
        f"{kernel}{key}: {new[key]}, was {old[key]}"
        for kernel, old, new, up, down in pairs
        for key in (*up, *down)
        if key in old and (new[key] > old[key] if key in up else new[key] < old[key])
    ]


if __name__ == "__main__":
    table = {what: counts for arch in ARCHS for what, counts in found(arch)}
    lines = ",\n".join(f"{json.dumps(what)}: {json.dumps(counts)}" for what, counts in table.items())
    BASELINE.write_text(f"{{\n{lines}\n}}\n")
    print(f"{BASELINE}: {len(table)} rows")
