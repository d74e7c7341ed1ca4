"""A file of what was found is taken again undamaged alone: measured anew, or refused where no file can be."""

import json
import os

import pytest

from crystal.analysis.kept import kept_or_made

ABOUT = {"checkpoint_sha256": "ab", "window": 8}
FOUND = {"step": 14, "nats": [1.5, 2.5], "stage": "web"}


@pytest.fixture
def file(tmp_path):
    kept_or_made(tmp_path / "found.json", ABOUT, lambda: FOUND)
    return tmp_path / "found.json"


def _with(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _without(file, key):
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != key}))


DAMAGES = {
    "gone": os.remove,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "a digit": lambda file: file.write_text(file.read_text().replace("2.5", "2.6")),
    "a number as text": lambda file: _with(file, step="x"),
    "a whole number as a float": lambda file: _with(file, step=14.0),
    "a key gone": lambda file: _without(file, "stage"),
    "a key more": lambda file: _with(file, more=1),
    "a key twice": lambda file: file.write_text('{"step": 15, ' + file.read_text()[1:-1] + ', "step": 16}'),
    "no digest": lambda file: _without(file, "sha256"),
    "a digest of another kind": lambda file: _with(file, sha256=[1]),
    "infinite": lambda file: file.write_text(file.read_text().replace("2.5", "1e999")),
    "a list": lambda file: file.write_text("[]"),
    "no text": lambda file: file.write_bytes(b"\xff\xfe"),
    "of terabytes": lambda file: os.truncate(file, 2 << 40),
}


def test_what_is_there_is_not_made_again(file):
    assert kept_or_made(file, ABOUT, lambda: pytest.fail("made again")) == {"about": ABOUT} | FOUND


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_it_is_made_again(file, damage):
    whole = file.read_bytes()
    DAMAGES[damage](file)
    assert kept_or_made(file, ABOUT, lambda: FOUND) == {"about": ABOUT} | FOUND
    assert file.read_bytes() == whole


def test_another_question_is_asked(file):
    assert kept_or_made(file, ABOUT | {"window": 9}, lambda: {"step": 1})["step"] == 1


@pytest.mark.parametrize("put", [os.mkdir, os.mkfifo, lambda file: os.symlink("/dev/zero", file)],
                         ids=["directory", "pipe", "device"])  # fmt: skip
def test_what_is_no_file_is_refused_before_anything_is_made(file, put):
    file.unlink()
    put(file)
    with pytest.raises(OSError, match="expected a file") as caught:
        kept_or_made(file, ABOUT, lambda: pytest.fail("made"))
    assert caught.value.filename == str(file)
