"""C compiled once for this machine: shared objects lie in crystal's cache under the hash of source and compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = (
    "-O3 -mprefer-vector-width=512 -fopenmp -fwrapv -fno-math-errno -fno-trapping-math "
    "-fno-signed-zeros -ffp-contract=fast -shared -fPIC -w"
).split()


def march() -> str:
    """The processor to compile for: this one, or what CRYSTAL_MARCH says, such as x86-64-v3, an older one's set."""
    return os.environ.get("CRYSTAL_MARCH") or "native"


def cache(kind: str) -> Path:
    """Where compiled objects of a kind are kept: in $CRYSTAL_CACHE, else ~/.cache/crystal."""
    return Path(os.environ.get("CRYSTAL_CACHE") or Path.home() / ".cache" / "crystal") / kind


def put(path: Path, text: str) -> None:
    """Write a file of the cache, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


@functools.cache
def compiler() -> tuple[str, str]:
    """(gcc's path, its version and this processor). Raises RuntimeError, one line, where there is no gcc."""
    path = shutil.which("gcc")
    if path is None:
        raise RuntimeError("no gcc on PATH: C kernels are compiled with it (apt install gcc)")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    return path, version + "".join(cpu)


def build(source: str, kind: str, *options: str) -> ctypes.CDLL:
    """Compile C, once for all processes that share the cache. Raises RuntimeError with gcc's first line."""
    gcc, version = compiler()
    flags = (*FLAGS, f"-march={march()}", *options)
    name = hashlib.sha256("\n".join((source, version, *flags)).encode()).hexdigest()[:24]
    target = cache(kind) / f"{name}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            text, made = Path(scratch) / "kernel.c", Path(scratch) / "kernel.so"
            text.write_text(source, encoding="utf-8")
            command = [gcc, *flags, str(text), "-o", str(made), "-lmvec", "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"gcc: {(done.stderr.splitlines() or ['failed without a word'])[0]}")
            text.replace(target.with_suffix(".c"))
            made.replace(target)
    return ctypes.CDLL(str(target))
