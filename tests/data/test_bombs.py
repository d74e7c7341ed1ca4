"""Small files that hold much: refused by name, in bounded memory and time; and links, followed or refused by name."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from crystal.data.corpus import lines, packages, user_files
from crystal.data.corpus.links import files_under
from crystal.data.corpus.recipe import Entry
from crystal.data.corpus.sniff import sources_of
from crystal.errors import ConfigError, DataError

A_LINE = 256 << 20
KINDS = {".zst": zstandard.compress, ".gz": lambda content: gzip.compress(content, 9)}


def texts(file: Path, **keys) -> list[str]:
    return [text for _, text, _ in user_files.rows(Entry(license="MIT", files=str(file), **keys))]


@pytest.fixture(scope="module")
def bombs(tmp_path_factory) -> Path:
    """Each of a few hundred KB at most; the first of 8 KB."""
    folder = tmp_path_factory.mktemp("bombs")
    line, short = b'{"text": "' + b"a" * A_LINE, b"\n" * A_LINE
    for suffix, pack in {".zst": KINDS[".zst"], ".gz": lambda content: gzip.compress(content, 1)}.items():
        (folder / f"line.jsonl{suffix}").write_bytes(pack(line))
        (folder / f"short.jsonl{suffix}").write_bytes(pack(short))
    (folder / "good.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "good"}\n' + line))
    (folder / "field.csv.zst").write_bytes(zstandard.compress(b'text\ngood\n"' + b"a,b\n" * (A_LINE // 4)))
    (folder / "plain.txt.zst").write_bytes(zstandard.compress(b"a" * A_LINE))
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("line.jsonl.zst", r":1: expected a line of at most 67,108,864 bytes, found more"),
        ("line.jsonl.gz", r":1: expected a line of at most 67,108,864 bytes, found more"),
        ("good.jsonl.zst", r":2: expected a line of at most 67,108,864 bytes, found more"),
        ("short.jsonl.zst", r":\d+: expected a packed file that holds at most 1,024 times its size, or 67,108,864"),
        ("field.csv.zst", r"expected a packed file that holds at most 1,024 times its size, or 67,108,864"),
        ("plain.txt.zst", r":1: expected a packed file that holds at most 1,024 times its size, or 67,108,864"),
    ],
)
def test_a_bomb_is_refused_by_file_line_and_cap(bombs, name, message):
    began = time.process_time()
    for skip_bad in (False, True):
        with pytest.raises(DataError, match=re.escape(str(bombs / name)) + f".*({message})"):
            for _ in user_files.rows(Entry(license="MIT", files=str(bombs / name), skip_bad=skip_bad)):
                pass
    assert time.process_time() - began < 8
    assert (bombs / name).stat().st_size < 2_000_000


def test_a_bomb_takes_little_memory(bombs):
    assert (bombs / "line.jsonl.zst").stat().st_size < 9000
    code = f"""
import resource
from crystal.data.corpus import lines
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from pathlib import Path
from crystal.errors import DataError
for name in ("line.jsonl.zst", "short.jsonl.zst", "plain.txt.zst"):
    try:
        for _ in lines.lines(Path({str(bombs)!r}) / name, lines.Reading()):
            pass
    except DataError:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(grown) == 3
    assert max(map(int, grown)) < 300_000  # KB: a line of the cap, twice, and what is being unpacked


@pytest.mark.parametrize("suffix", ["", *KINDS])
def test_long_lines_below_the_cap_are_read_in_a_time_that_grows_as_they_do(tmp_path, suffix):
    pack = KINDS.get(suffix, lambda content: content)
    seconds = []
    for size in (2 << 20, 16 << 20):
        file = tmp_path / f"{size}.jsonl{suffix}"
        text = "".join(f"{i:x} " for i in range(size // 7))  # it packs to a third
        file.write_bytes(pack(json.dumps({"text": text}).encode() + b"\n" + b'{"text": "next"}\n'))
        began = time.process_time()
        assert texts(file) == [text, "next"]
        seconds.append(time.process_time() - began)
    assert seconds[1] < 8 * 4 * seconds[0] + 0.5


def test_the_cap_is_the_line_s_and_not_the_file_s(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 1000)
    assert len(texts(tmp_path / "a.jsonl")) == 1000
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' + '{"text": "' + "x" * 90 + '"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: expected a line of at most 100 bytes"):
        texts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("suffix", KINDS)
def test_packed_lines_are_the_plain_ones(tmp_path, suffix):
    content = b"".join(bytes([97 + i % 26]) * (i * 37 % 3000) + b"\n" for i in range(2000)) + b"no end"
    (tmp_path / "plain").write_bytes(content)
    frames = content[:70_000], content[70_000:70_001], content[70_001:]
    (tmp_path / f"packed{suffix}").write_bytes(b"".join(map(KINDS[suffix], frames)))
    plain = list(lines.lines(tmp_path / "plain", lines.Reading()))
    assert b"".join(plain) == content
    assert list(lines.lines(tmp_path / f"packed{suffix}", lines.Reading())) == plain


def test_a_long_line_of_a_table_is_one_row(tmp_path):
    """0.1.0 cut lines of CSV above 65,536 bytes, and took what followed for another row."""
    text = "word " * 40_000
    (tmp_path / "a.csv").write_text(f"text,id\n{text},1\nshort,2\n")
    assert texts(tmp_path / "a.csv") == [text, "short"]


@pytest.mark.parametrize("content", ['"a\nb",' * 30, '"' + "a\n" * 80])
def test_a_row_of_a_table_that_goes_on_over_many_lines(tmp_path, monkeypatch, content):
    monkeypatch.setattr(user_files, "MAX_LINE", 100)
    (tmp_path / "a.csv").write_text(f"text\ngood\n{content}")
    with pytest.raises(DataError, match=r"a\.csv(:2: expected a row of at most 100|.*field larger than field limit)"):
        texts(tmp_path / "a.csv")


# --------------------------------------------------------------------------------------------------- tables


def test_a_table_that_stores_a_value_once_for_many_rows(tmp_path, monkeypatch):
    """12 GB, a few rows of which are unpacked at a time."""
    monkeypatch.setattr(user_files, "_BATCH_BYTES", 1 << 24)
    text = "a" * (4 << 20)
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays([0] * 3000, [text])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="none", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 5_000_000
    rows = user_files.rows(Entry(license="MIT", files=str(tmp_path / "a.parquet")))
    assert all(found == text for _, found, _ in itertools.islice(rows, 20))


def test_a_table_that_holds_more_than_its_size_allows(tmp_path):
    table = pyarrow.table({"text": ["a" * (80 << 20)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 50_000
    with pytest.raises(DataError, match=r"a\.parquet:1: expected a packed file that holds at most 1,024 times"):
        texts(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet", compression="none", use_dictionary=False)
    with pytest.raises(DataError, match=r"b\.parquet:1: expected values of at most 67,108,864 bytes"):
        texts(tmp_path / "b.parquet")


# ------------------------------------------------------------------------------------------------- archives


def test_a_member_that_is_too_large_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(packages, "MAX_MEMBER", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("small.txt", "text")
        archive.writestr("large.txt", b"a" * (2 << 20))
    assert packages.members(tmp_path / "a.whl", "small", []) == [("small.txt", b"text")]
    with pytest.raises(DataError, match=r"a\.whl: member 'large\.txt': expected at most 1,048,576 bytes, got 2"):
        packages.members(tmp_path / "a.whl", "txt", [])
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for i in range(20):
            info = tarfile.TarInfo(f"top/{i}.txt")
            info.size = 1 << 20
            archive.addfile(info, io.BytesIO(bytes(1 << 20)))
    monkeypatch.setattr(packages, "MAX_EXPANSION", 100)
    with pytest.raises(DataError, match=r"a\.tar\.gz: expected members of at most [\d,]+ bytes in all"):
        packages.members(tmp_path / "a.tar.gz", "19", [])


# ---------------------------------------------------------------------------------------------------- links


@pytest.fixture
def linked(tmp_path) -> Path:
    """data/ with a file of its own, a linked one, and a linked directory that has a link back."""
    (tmp_path / "data").mkdir()
    (tmp_path / "other" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_text('{"text": "own"}\n')
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "other" / "deep" / "b.jsonl").write_text('{"text": "other"}\n')
    (tmp_path / "other" / "deep" / "up").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "home").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c.jsonl").symlink_to("../one.jsonl")
    (tmp_path / "data" / "more").symlink_to("../other")
    (tmp_path / "data" / ".#a.jsonl").symlink_to("user@host.1234")  # an editor's lock
    return tmp_path / "data"


@pytest.mark.parametrize("glob", ["", "/**/*.jsonl"])
def test_links_are_followed_and_each_file_is_read_once(linked, glob):
    found = user_files.files(Entry(license="MIT", files=f"{linked}{glob}"))
    assert [name for name, _ in found] == ["a.jsonl", "c.jsonl", "more/deep/b.jsonl"]
    assert texts(Path(f"{linked}{glob}")) == ["own", "one", "other"]


def test_what_init_finds_follows_links_too(linked):
    found, _ = sources_of([linked])
    assert sum(f.count for entries in found.values() for f in entries) == 3
    assert len(files_under(linked)) == 3


@pytest.mark.parametrize("glob", ["", "/*.jsonl", "/**/*.jsonl"])
def test_a_link_to_nothing_is_refused_by_name(linked, glob):
    (linked / "gone.jsonl").symlink_to("/nowhere/gone.jsonl")
    with pytest.raises(DataError, match=r"gone\.jsonl: expected a file, found a link to /nowhere/gone\.jsonl, which"):
        texts(Path(f"{linked}{glob}"))
    with pytest.raises(DataError, match=r"gone\.jsonl: expected a file, found a link to /nowhere"):
        sources_of([linked])


def test_a_link_to_nothing_that_is_named_itself(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "b.jsonl").symlink_to("b.jsonl")  # to itself
    for name in ("a", "b"):
        with pytest.raises((DataError, ConfigError), match=rf"{name}\.jsonl: expected a file, found a link to"):
            texts(tmp_path / f"{name}.jsonl")


@pytest.mark.parametrize("content", [b"", b'{"text": "good"}\n'], ids=["empty", "behind a row"])
def test_a_file_of_terabytes_that_were_never_written_is_named(tmp_path, content):
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    assert packages.sha256(file, tmp_path / "cache") == hashlib.sha256(content).hexdigest()
    os.truncate(file, 2 << 40)
    with pytest.raises(DataError, match=r"x\.jsonl: expected data, found 2,19\d,\d+,\d+,\d+ bytes from [\d,]+ on"):
        packages.sha256(file, tmp_path / "cache")


def test_a_hole_between_rows_is_named(tmp_path):
    file = tmp_path / "x.jsonl"
    with file.open("wb") as out:
        out.write(b'{"text": "good"}\n')
        out.seek(1 << 30)
        out.write(b'{"text": "good"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl: expected data, .* never written"):
        packages.sha256(file, tmp_path / "cache")


def test_a_hash_is_not_remembered_over_a_file_of_the_same_size_and_time(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"a" * (1 << 18))
    before = packages.sha256(file, tmp_path / "cache")
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(b"b" * (1 << 18))
    os.utime(file, ns=times)
    assert packages.sha256(file, tmp_path / "cache") != before
