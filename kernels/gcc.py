"""C compiled once for this machine: shared objects lie in crystal's cache under the hash of source and compiler.

They are on the disk before they have their names, and their bytes are compared with their names before they are loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

FLAGS = (
    "-O3 -mprefer-vector-width=512 -fopenmp -fwrapv -fno-math-errno -fno-trapping-math "
    "-fno-signed-zeros -ffp-contract=fast -shared -fPIC -w"
).split()

ANSWERS_WITHIN, COMPILES_WITHIN = 20, 120  # seconds, on machines that do much else; one or two are usual
_hung: list[str] = []  # what to say of a compiler that was waited for: it is not asked again


def march() -> str:
    """The processor to compile for: this one, or what CRYSTAL_MARCH says, such as x86-64-v3, an older one's set."""
    return os.environ.get("CRYSTAL_MARCH") or "native"


def cache(kind: str) -> Path:
    """Where compiled objects of a kind are kept: in $CRYSTAL_CACHE, else ~/.cache/crystal."""
    return Path(os.environ.get("CRYSTAL_CACHE") or Path.home() / ".cache" / "crystal") / kind


def put(path: Path, content: str | bytes) -> None:
    """Write a file of the cache, whole or not at all: it is on the disk before it has its name. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@functools.cache
def compiler() -> tuple[str, str]:
    """(gcc's path, its version and this processor). Raises RuntimeError, one line, where there is no gcc."""
    path = shutil.which("gcc")
    if path is None:
        raise RuntimeError("no gcc on PATH: C kernels are compiled with it (apt install gcc)")
    code, out, _ = _run([path, "--version"], ANSWERS_WITHIN)
    if code or not out.strip():
        raise RuntimeError(f"{path}: expected gcc to tell its version, it ended with {code}")
    version = out.splitlines()[0]
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")][:1]
    return path, version + "".join(cpu)


def _run(command: list[str], seconds: float) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a compiler, whatever bytes it prints. Raises RuntimeError where it does not
    start, or is not done in time: then it is ended with all that it started."""
    if _hung:
        raise RuntimeError(_hung[0])
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
        )
    except OSError as error:
        raise RuntimeError(f"{command[0]}: cannot be started: {error.strerror}") from None
    try:
        out, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        _hung.append(f"{command[0]}: expected to be done within {seconds:g} s, it was ended")
        raise RuntimeError(_hung[0]) from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, out.decode(errors="replace"), said.decode(errors="replace")


def build(source: str, kind: str, *options: str) -> ctypes.CDLL:
    """Compile C, once for all processes that share the cache. Raises RuntimeError, a line: gcc's error, or the disk's.

    An object lies there as HASH-DIGEST.so: of source, compiler and options, and of its own bytes. One whose bytes are
    not those (a cut one would be mapped, and end the process where it is first called) or that does not load is made
    again, with a word about it.
    """
    gcc, version = compiler()
    flags = (*FLAGS, f"-march={march()}", *options)
    name = hashlib.sha256("\n".join((source, version, *flags)).encode()).hexdigest()[:24]
    found = sorted(cache(kind).glob(f"{name}-*.so"))
    for path in found:
        if (library := _loaded(path)) is not None:
            return library
    try:
        target = _compiled(source, [gcc, *flags], cache(kind) / name)
    except OSError as error:
        raise RuntimeError(f"{cache(kind)}: what gcc makes cannot be kept there: {error.strerror}") from None
    for path in found:
        print(f"crystal: {path}: damaged, compiled again", file=sys.stderr)
        if path != target:
            with contextlib.suppress(OSError):
                path.unlink()
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:  # of a gcc for other machines, or none at all
        target.unlink(missing_ok=True)
        raise RuntimeError(f"what {gcc} made cannot be loaded: {error}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _loaded(path: Path) -> ctypes.CDLL | None:
    """A compiled object; None where its bytes are not those of its name, or it does not load."""
    try:
        if _digest(path.read_bytes()) == path.stem.rpartition("-")[2]:
            return ctypes.CDLL(str(path))
    except OSError:
        pass
    return None


def _compiled(source: str, command: list[str], stem: Path) -> Path:
    """Where the object is that gcc makes of `source`, which lies beside it as STEM.c. Raises RuntimeError, OSError."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=stem.parent) as scratch:
        text, made = Path(scratch) / "kernel.c", Path(scratch) / "kernel.so"
        text.write_text(source, encoding="utf-8")
        command = [*command, str(text), "-o", str(made), "-lmvec", "-lm"]
        code, _, said = _run(command, COMPILES_WITHIN)
        if code:
            lines = said.splitlines() or [f"ended with {code}, without a word"]
            raise RuntimeError(f"{command[0]}: {next((line for line in lines if 'error' in line), lines[0])}")
        if not made.is_file():
            raise RuntimeError(f"{command[0]}: expected an object, it made none and said nothing")
        content = made.read_bytes()
    target = stem.with_name(f"{stem.name}-{_digest(content)}.so")
    put(stem.with_suffix(".c"), source)
    put(target, content)
    return target
