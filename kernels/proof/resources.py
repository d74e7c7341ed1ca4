"""What a compiled kernel needs of a multiprocessor, read from its cubin with the tools in Triton's own wheel.

ptxas has decided everything that is counted here: registers, spills (local loads and stores), shared memory, and
the width of every access to global memory. Occupancy follows from NVIDIA's documented limits by the rules of their
occupancy calculator. All of it is static: loops are counted once, and nothing here is a time.
"""

from __future__ import annotations

import functools
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM (CUDA programming guide, table of compute capabilities). Memory in bytes."""

    shared: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    register_unit: int = 256  # a warp's registers come in these, from one of four partitions
    shared_unit: int = 128
    shared_reserved: int = 1024  # per block, the system's


MULTIPROCESSOR = {80: Multiprocessor(164 * 1024), 90: Multiprocessor(228 * 1024)}


@dataclass
class Resources:
    """Of one kernel on one architecture. loads and stores: global accesses by bytes a thread moves at once."""

    warps: int
    registers: int
    shared: int
    spills: int
    blocks_resident: int
    warps_resident: int
    limit: str  # what keeps more blocks from an SM
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    instructions: int = 0
    barriers: int = 0
    atomics: int = 0
    doubles: int = 0

    def record(self) -> dict:
        return asdict(self) | {"occupancy": round(self.warps_resident / 64, 3)}


def tool(name: str) -> str:
    """Path of ptxas, cuobjdump or nvdisasm in the triton wheel."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resident_blocks(arch: int, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """(blocks that one SM holds at a time, which limit stops there)."""
    sm = MULTIPROCESSOR[arch]
    per_warp = -(-registers * 32 // sm.register_unit) * sm.register_unit
    per_block = -(-(shared + sm.shared_reserved) // sm.shared_unit) * sm.shared_unit
    limits = {
        "warps": sm.warps // warps,
        "blocks": sm.blocks,
        "registers": (sm.registers // 4 // per_warp) * 4 // warps,
        "shared": sm.shared // per_block,
    }
    limit = min(limits, key=limits.get)
    return limits[limit], limit


_USAGE = re.compile(r"REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def _width(instruction: str) -> int:
    parts = instruction.split(".")
    widths = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((widths[p] for p in parts if p in widths), 4)


def _dump(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


@functools.cache
def _usage(cubin: bytes) -> re.Match:
    return _USAGE.search(_dump(cubin, tool("cuobjdump"), "-res-usage"))


@functools.cache
def _instructions(cubin: bytes) -> Counter:
    return Counter(_INSTRUCTION.findall(_dump(cubin, tool("nvdisasm"), "-c")))


def resources(compiled, arch: int) -> Resources:
    """Of a kernel that triton.compile made for sm_{arch}."""
    usage, count = _usage(compiled.asm["cubin"]), _instructions(compiled.asm["cubin"])
    registers, warps = int(usage[1]), compiled.metadata.num_warps
    shared = max(compiled.metadata.shared, int(usage[3]))
    blocks, limit = resident_blocks(arch, registers, shared, warps)

    def total(*heads: str) -> int:
        return sum(n for op, n in count.items() if op.split(".")[0] in heads)

    def by_width(head: str) -> dict[int, int]:
        found: Counter[int] = Counter()
        for op, n in count.items():
            if op.split(".")[0] == head:
                found[_width(op)] += n
        return dict(sorted(found.items()))

    return Resources(
        warps, registers, shared, total("LDL", "STL"), blocks, blocks * warps, limit, by_width("LDG"), by_width("STG"),
        sum(count.values()) - total("NOP"), total("BAR"), total("ATOM", "ATOMG", "RED"),
        total("DADD", "DMUL", "DFMA", "DSETP"),
    )  # fmt: skip


_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]")
_MEMORY = re.compile(r"(ld|st)\.global([\w.:]*?)(?:\.v(\d))?\.\w(\d+)\s+(.*);")


def access_widths(ptx: str, parameters: list[str], pointers: set[str]) -> dict[str, dict[int, int]]:
    """For each pointer parameter, how many global accesses a thread makes by their bytes, loops counted once.

    Which parameter an address comes from is followed through the PTX from register to register.
    """
    origin: dict[str, set[int]] = {}
    steps, memory = [], []
    for line in ptx.splitlines():
        line = line.strip().rstrip(";")
        if (found := _PARAMETER.search(line)) is not None:
            origin.setdefault(found[1], set()).add(int(found[2]))
        elif (found := _MEMORY.search(line + ";")) is not None:
            memory.append((found, re.findall(r"%\w+", found[5].split("[")[1].split("]")[0])))
        elif found := re.match(r"(?:@!?%\w+ )?(?:add|mad|sub|mov|cvta?|selp|shl|mul)[\w.]*\s+(%rd\d+), (.*)", line):
            steps.append((found[1], re.findall(r"%rd\d+", found[2])))
    changed = True
    while changed:  # a loop hands registers back to its start
        changed = False
        for target, sources in steps:
            joined = origin.get(target, set()).union(*(origin.get(s, ()) for s in sources))
            changed |= joined != origin.get(target, set())
            origin[target] = joined
    widths: dict[str, Counter] = {}
    for found, registers in memory:
        for number in set().union(*(origin.get(r, ()) for r in registers)):
            if number < len(parameters) and parameters[number] in pointers:
                widths.setdefault(parameters[number], Counter())[int(found[4]) // 8 * int(found[3] or 1)] += 1
    return {name: dict(sorted(count.items())) for name, count in widths.items()}


def preference(arch: int):
    """An order of compiled kernels for an autotuner with nothing to time: least stack, where registers spill to, then
    most warps resident, then fewest registers. It does not disassemble, which takes seconds for the longest kernels."""

    def score(compiled) -> float:
        usage, warps = _usage(compiled.asm["cubin"]), compiled.metadata.num_warps
        shared = max(compiled.metadata.shared, int(usage[3]))
        resident = resident_blocks(arch, int(usage[1]), shared, warps)[0] * warps
        return int(usage[2]) + int(usage[4]) - resident / 64 + int(usage[1]) / 1e4

    return score


def fingerprint(compiled) -> str:
    """Of the machine code without its debug lines, which move with every edit of a source file."""
    count = _instructions(compiled.asm["cubin"])
    return hashlib.sha256(repr(sorted(count.items())).encode()).hexdigest()[:12]
