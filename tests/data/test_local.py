import gzip
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from crystal.config import ConfigError
from crystal.data import local
from crystal.data.recipe import Entry

ROWS = [
    {"text": "one", "meta": {"redpajama_set_name": "RedPajamaBook"}, "hash": "aa", "lic": "MIT"},
    {"text": "two\nlines é", "meta": {"redpajama_set_name": "RedPajamaC4"}, "hash": "bb", "lic": None},
    {"text": "three", "meta": {"redpajama_set_name": "RedPajamaBook"}, "hash": "cc", "lic": ["MIT", "ISC"]},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def entry(files, **keys):
    return Entry(files=str(files), license="CC0-1.0", **keys)


def write(path, rows=ROWS):
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines[:40]) + zstandard.compress(lines[40:]))  # two frames
    elif path.suffix == ".parquet":
        plain = [row | {"lic": [row["lic"]] if isinstance(row["lic"], str) else row["lic"]} for row in rows]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), path)
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    file = write(tmp_path / name)
    assert list(local.rows(entry(file))) == [
        (f"{name}:1", "one", "CC0-1.0"),
        (f"{name}:2", "two\nlines é", "CC0-1.0"),
        (f"{name}:3", "three", "CC0-1.0"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_keys_of_a_row_can_be_chosen(tmp_path, name):
    keys = {"text_key": "hash", "id_key": "meta.redpajama_set_name", "license_key": "lic"}
    assert list(local.rows(entry(write(tmp_path / name), **keys))) == [
        (f"{name}:RedPajamaBook", "aa", "MIT"),
        (f"{name}:RedPajamaC4", "bb", "CC0-1.0"),
        (f"{name}:RedPajamaBook", "cc", "MIT OR ISC"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_where_keeps_rows_with_a_value_and_their_line_numbers(tmp_path, name):
    file = write(tmp_path / name)
    found = local.rows(entry(file, where={"meta.redpajama_set_name": "RedPajamaBook"}))
    assert [path for path, _, _ in found] == [f"{name}:1", f"{name}:3"]


def test_a_directory_is_walked_in_order_and_other_files_are_passed_over(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl.gz", "a/b.jsonl"):
        write(tmp_path / name, ROWS[:1])
    (tmp_path / "README.md").write_text("no data")
    paths = [path for path, _, _ in local.rows(entry(tmp_path))]
    assert paths == ["a/b.jsonl:1", "a/z.jsonl.gz:1", "b.jsonl:1"]


def test_a_glob_names_files_from_its_fixed_part(tmp_path):
    for name in ("train/1/x.jsonl", "train/2/x.jsonl", "test/1/x.jsonl"):
        write(tmp_path / name, ROWS[:1])
    paths = [path for path, _, _ in local.rows(entry(tmp_path / "train/*/x.jsonl"))]
    assert paths == ["1/x.jsonl:1", "2/x.jsonl:1"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_rows_are_streamed(tmp_path, name):
    """A file far larger than what is read of it: only its first part is well-formed."""
    rows = "".join(json.dumps({"text": str(i) * 50}) + "\n" for i in range(20_000)).encode()
    file = tmp_path / name
    packed = gzip.compress(rows) if name.endswith("gz") else zstandard.compress(rows) if "zst" in name else rows
    file.write_bytes(packed[: len(packed) // 2])
    found = list(itertools.islice(local.rows(entry(file)), 100))
    assert [text[:2] for _, text, _ in found[:2]] == ["00", "11"]


def fails(files, **keys):
    with pytest.raises(ConfigError) as error:
        list(local.rows(entry(files, **keys)))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_path_is_named(tmp_path):
    assert str(tmp_path / "none") in fails(tmp_path / "none")
    assert "found none" in fails(tmp_path / "*.jsonl")
    assert "found none" in fails(tmp_path)


def test_an_unknown_kind_of_file_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text\n")
    message = fails(tmp_path / "a.csv")
    assert "a.csv" in message
    assert ".jsonl" in message


def test_a_broken_line_is_named_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"text": \n')
    assert f"{tmp_path / 'a.jsonl'}:4: expected a line of JSON" in fails(tmp_path / "a.jsonl")


def test_a_row_without_its_text_is_named_with_what_it_has(tmp_path):
    message = fails(write(tmp_path / "a.jsonl"), text_key="content")
    assert "a.jsonl:1: expected text under 'content', found text, meta, hash, lic" in message
    message = fails(write(tmp_path / "a.parquet"), text_key="content")
    assert "a.parquet: expected a column 'content', found text, meta, hash, lic" in message


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    file = write(tmp_path / name, ROWS * 500)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"garbage" * 100)
    assert str(file) in fails(file)


def test_a_zstandard_file_cut_at_the_end_of_a_line_is_not_taken_for_whole(tmp_path):
    packer = zstandard.ZstdCompressor().compressobj()
    content = packer.compress(LINES) + packer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert "after row 3: the file ends inside a frame" in fails(tmp_path / "a.jsonl.zst")


def test_text_that_is_not_utf_8_is_an_error_not_a_guess(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"text": "\xe9"}\n')
    assert str(tmp_path / "a.jsonl") in fails(tmp_path / "a.jsonl")
