import gzip
import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from crystal.data.corpus import user_files
from crystal.data.corpus.recipe import Entry
from crystal.errors import ConfigError, DataError

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
    assert list(user_files.rows(entry(file))) == [
        (f"{name}:1", "one", "CC0-1.0"),
        (f"{name}:2", "two\nlines é", "CC0-1.0"),
        (f"{name}:3", "three", "CC0-1.0"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_keys_of_a_row_can_be_chosen(tmp_path, name):
    keys = {"text_key": "hash", "id_key": "meta.redpajama_set_name", "license_key": "lic"}
    assert list(user_files.rows(entry(write(tmp_path / name), **keys))) == [
        (f"{name}:RedPajamaBook", "aa", "MIT"),
        (f"{name}:RedPajamaC4", "bb", "CC0-1.0"),
        (f"{name}:RedPajamaBook", "cc", "MIT OR ISC"),
    ]


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.parquet"])
def test_where_keeps_rows_with_a_value_and_their_line_numbers(tmp_path, name):
    file = write(tmp_path / name)
    found = user_files.rows(entry(file, where={"meta.redpajama_set_name": "RedPajamaBook"}))
    assert [path for path, _, _ in found] == [f"{name}:1", f"{name}:3"]


def test_a_directory_is_walked_in_order_and_other_files_are_passed_over(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl.gz", "a/b.jsonl"):
        write(tmp_path / name, ROWS[:1])
    (tmp_path / "README.md").write_text("no data")
    paths = [path for path, _, _ in user_files.rows(entry(tmp_path))]
    assert paths == ["a/b.jsonl:1", "a/z.jsonl.gz:1", "b.jsonl:1"]


def test_a_glob_names_files_from_its_fixed_part(tmp_path):
    for name in ("train/1/x.jsonl", "train/2/x.jsonl", "test/1/x.jsonl"):
        write(tmp_path / name, ROWS[:1])
    paths = [path for path, _, _ in user_files.rows(entry(tmp_path / "train/*/x.jsonl"))]
    assert paths == ["1/x.jsonl:1", "2/x.jsonl:1"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_rows_are_streamed(tmp_path, name):
    """A file far larger than what is read of it: only its first part is well-formed."""
    rows = "".join(json.dumps({"text": str(i) * 50}) + "\n" for i in range(20_000)).encode()
    file = tmp_path / name
    packed = gzip.compress(rows) if name.endswith("gz") else zstandard.compress(rows) if "zst" in name else rows
    file.write_bytes(packed[: len(packed) // 2])
    found = list(itertools.islice(user_files.rows(entry(file)), 100))
    assert [text[:2] for _, text, _ in found[:2]] == ["00", "11"]


def fails(files, **keys):
    with pytest.raises((ConfigError, DataError)) as error:
        list(user_files.rows(entry(files, **keys)))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_missing_path_is_named(tmp_path):
    assert fails(tmp_path / "none.jsonl") == f"{tmp_path / 'none.jsonl'}: does not exist"
    assert fails(tmp_path / "*.jsonl") == f"{tmp_path / '*.jsonl'}: matches no file"
    assert "found none" not in fails(tmp_path)
    assert fails(tmp_path).endswith("files, it has no file")


def test_a_directory_without_rows_says_what_it_has(tmp_path):
    for name in ("a.py", "b/c.py", "README.md"):
        write(tmp_path / name)
    assert "it has 2 files of the kind '.py' and 1 others" in fails(tmp_path)
    assert f"such as {tmp_path}/**/*.py" in fails(tmp_path)


def test_a_broken_line_is_named_by_its_number(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"text": \n')
    assert f"{tmp_path / 'a.jsonl'}:4: expected a line of JSON" in fails(tmp_path / "a.jsonl")


def test_a_row_without_its_text_is_named_with_what_it_has(tmp_path):
    message = fails(write(tmp_path / "a.jsonl"), text_key="content")
    assert "a.jsonl:1: expected text under 'content', found the keys text, meta, hash, lic" in message
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
    assert "the file ends too early after row 3: is it cut short?" in fails(tmp_path / "a.jsonl.zst")


BAD_LINES = [
    (b'{"text": null}', "expected text under 'text', found null"),
    (b'{"text": 3}', "expected text under 'text', found 3"),
    (b'{"text": ["a"]}', "expected text under 'text', found a list"),
    (b'{"body": "a", "id": 1}', "expected text under 'text', found the keys body, id"),
    (b"{}", "expected text under 'text', found the keys (none)"),
    (b"[1]", "expected an object with 'text', found a list"),
    (b'"a"', "expected an object with 'text', found text"),
    (b"null", "expected an object with 'text', found null"),
    (b"  ", "expected an object with 'text', found a blank line"),
    (b'{"text": ', "expected a line of JSON (Expecting value at column 9)"),
    (b'{"text": "\xe9"}', "expected UTF-8 text, found the byte 0xe9"),
    (b"[" * 100_000, "expected a line of JSON (nested too deeply"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson.zst"])
def test_a_line_without_text_says_where_and_what_was_found_and_can_be_passed_over(tmp_path, name, line, message):
    content, file = LINES + line + b"\n" + LINES, tmp_path / name
    packers = {".gz": gzip.compress, ".zst": zstandard.compress}
    file.write_bytes(packers.get(file.suffix, bytes)(content))
    assert fails(file).startswith(f"{file}:4: {message}")
    reading = user_files.Reading()
    texts = [text for _, text, _ in user_files.rows(entry(file, skip_bad=True), reading)]
    assert texts == [row["text"] for row in ROWS] * 2
    assert (reading.skipped, reading.first.startswith(f"{file}:4: {message}")) == (1, True)


def test_blank_lines_at_the_end_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b"\n  \n")
    assert len(list(user_files.rows(entry(tmp_path / "a.jsonl")))) == 3


@pytest.mark.parametrize("content", [json.dumps(ROWS), json.dumps(ROWS, indent=1), json.dumps(ROWS[0], indent=1)])
def test_json_that_is_not_a_line_an_object_is_told_apart(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    message = fails(tmp_path / "a.json")
    assert "a.json:1: expected an object" in message
    assert ("over several lines" in message) == ("\n" in content)


def test_csv_and_tsv_are_rows_with_the_columns_of_their_first_line(tmp_path):
    (tmp_path / "a.csv").write_text('\ufeffname,text\nx,"one, ""two""\nthree"\ny,four\n')
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"text\tn\nfive\t5\n"))
    assert list(user_files.rows(entry(tmp_path, id_key="name"))) == [
        ("a.csv:x", 'one, "two"\nthree', "CC0-1.0"),
        ("a.csv:y", "four", "CC0-1.0"),
        ("b.tsv.gz:1", "five", "CC0-1.0"),
    ]
    assert "a.csv: expected a column 'body', found name, text" in fails(tmp_path / "a.csv", text_key="body")
    (tmp_path / "a.csv").write_text("name,text\nx\n")
    assert "a.csv:1: expected text under 'text', found null" in fails(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"")
    assert "a.csv: expected a column 'text', found none" in fails(tmp_path / "a.csv")


# -------------------------------------------------------------------------------------------- plain files


def test_plain_files_are_documents_under_their_path(tmp_path):
    for name, text in (("src/b.py", "b = 1\r\n"), ("src/a/a.py", "\ufeffa = 'é'\n"), ("src/a/a.md", "# a\n")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "src/c.py.gz").write_bytes(gzip.compress(b"c = 3\n"))
    assert list(user_files.rows(entry(tmp_path / "src/**/*.py"))) == [
        ("a/a.py", "a = 'é'\n", "CC0-1.0"),
        ("b.py", "b = 1\n", "CC0-1.0"),
    ]
    assert list(user_files.rows(entry(tmp_path / "src/c.py.gz"))) == [("c.py.gz", "c = 3\n", "CC0-1.0")]
    assert list(user_files.rows(entry(tmp_path / "src/b.py"))) == [("b.py", "b = 1\n", "CC0-1.0")]


def test_a_long_plain_file_is_cut_at_empty_lines_into_documents(tmp_path):
    text = "".join(f"line {i} of a long book\n" + "\n" * (i % 10 == 0) for i in range(5_000))
    (tmp_path / "book.txt").write_text(text)
    found = list(user_files.rows(entry(tmp_path / "book.txt")))
    assert "".join(piece for _, piece, _ in found) == text
    assert len(found) == 4
    assert all(piece.endswith("\n\n") for _, piece, _ in found[:-1])
    names = [name for name, _, _ in found]
    assert names[0] == "book.txt:1"
    number = int(names[1].removeprefix("book.txt:"))
    assert found[1][1].startswith(text.splitlines()[number - 1])


def test_a_file_of_one_endless_line_is_not_held_whole(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 500_000)
    found = list(user_files.rows(entry(tmp_path / "a.txt")))
    assert "".join(piece for _, piece, _ in found) == "é" * 500_000
    assert max(len(piece) for _, piece, _ in found) < 4 * user_files._PIECE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\ncaf\xe9 au lait\n", ":2: expected UTF-8 text, found the byte 0xe9"),
        (b"\xff\xfeo\0n\0", ":1: expected UTF-8 text, found the byte 0xff"),
        (b"one\n\x7fELF\0\0", ":2: expected UTF-8 text, found the byte 0x00: is it a binary file?"),
        (b"one\ntw\xc3", ":2: expected UTF-8 text, found half a character at the end"),
    ],
)
def test_a_plain_file_that_is_no_text_says_so_and_can_be_passed_over(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("good")
    assert fails(tmp_path / "*.txt") == f"{tmp_path / 'a.txt'}{message}"
    reading = user_files.Reading()
    found = list(user_files.rows(entry(tmp_path / "*.txt", skip_bad=True), reading))
    assert found == [("b.txt", "good", "CC0-1.0")]
    assert (reading.skipped, reading.first) == (1, f"{tmp_path / 'a.txt'}{message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", b'{"text": "not packed"}\n', "expected gzip data, found a file that begins with b'{\"text\":'"),
        ("a.jsonl.zst", b'{"text": "not packed"}\n', "expected zstandard data, found a file that begins with"),
        ("a.parquet", b'{"text": "not packed"}\n', "expected Parquet data, found a file that begins with"),
        ("a.parquet", b"", "expected Parquet data, found an empty file"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-12], "the file ends too early"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_told_with_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert fails(tmp_path / name).startswith(f"{tmp_path / name}: {message}")


def test_text_that_is_not_utf_8_is_an_error_not_a_guess(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"text": "\xe9"}\n')
    assert str(tmp_path / "a.jsonl") in fails(tmp_path / "a.jsonl")
