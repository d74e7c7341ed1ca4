"""Recipes, packages and documents. pip runs for real, on archives made here and with no index."""

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from crystal.data.corpus import build as corpus
from crystal.data.corpus import extract, packages
from crystal.data.corpus.build import build, documents, fetch, load_recipe
from crystal.errors import ConfigError, DataError

CODE = {
    f"toy/m{i}.py": f"def f{i}(x):\n    return x + {i}\n" * (1 + i) + f"VALUE_{i} = {i * 7}\n" * 8 for i in range(6)
}
PROSE = "Of the making of books there is no end, and this is one that the reader may put by. " * 6


def tar(path: Path, members: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def deb(path: Path, members: dict[str, str]) -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo("./" + name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    parts = [(b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", data.getvalue())]
    content = b"!<arch>\n"
    for name, body in parts:
        content += name.ljust(48) + str(len(body)).encode().ljust(10) + b"`\n" + body + b"\n" * (len(body) % 2)
    path.write_bytes(content)
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, with a wheel and an sdist in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    head = "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n"
    with zipfile.ZipFile(folder / "toy-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in CODE.items():
            wheel.writestr(name, text)
        wheel.writestr("toy-1.0.dist-info/METADATA", head)
        wheel.writestr("toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("toy-1.0.dist-info/RECORD", "")
    run = f"open({str(tmp_path / 'setup_was_run')!r}, 'w')"
    docs = {f"toy-1.0/docs/{i}.txt": f"Page {i}\n======\n\n{PROSE.replace('one', f'book {i}')}\n" for i in range(3)}
    tar(folder / "toy-1.0.tar.gz", {"toy-1.0/PKG-INFO": head, "toy-1.0/setup.py": run, **docs})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


WHEEL = {"package": "pypi:toy==1.0", "license": "MIT", "include": r"\.py$"}
SDIST = {
    "package": "pypi:toy==1.0",
    "archive": "sdist",
    "license": "BSD",
    "include": "^docs/",
    "extract": "rst",
}


def recipe(tmp_path, sources, name="toy.yaml"):
    file = tmp_path / name
    file.write_text(yaml.safe_dump({"name": "toy", "sources": sources}))
    return load_recipe(file)


@pytest.fixture
def toy(tmp_path, index):
    return recipe(tmp_path, {"python": {"filter": "code", "entries": [WHEEL]}, "english": {"entries": [SDIST]}})


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def fails(call, *args):
    with pytest.raises((ConfigError, DataError)) as error:
        list(call(*args) or [])
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------- documents


def test_documents_of_a_wheel_carry_their_place_licence_and_id(tmp_path, toy):
    found = list(documents(toy, "python", tmp_path / "cache"))
    assert [d.path for d in found] == [f"toy==1.0/toy/m{i}.py" for i in range(6)]
    first = found[0]
    assert (first.source, first.license, first.text) == ("python", "MIT", CODE["toy/m0.py"])
    assert first.id == hashlib.sha256(f"python\0{first.path}\0{first.text}".encode()).hexdigest()[:16]


def test_an_sdist_is_read_in_place_and_nothing_of_it_is_run(tmp_path, toy):
    found = list(documents(toy, "english", tmp_path / "cache"))
    assert [d.path for d in found] == [f"toy==1.0/docs/{i}.txt" for i in range(3)]
    assert found[1].text.startswith("Page 1\n\nOf the making")
    assert not (tmp_path / "setup_was_run").exists()


def test_the_same_archives_give_the_same_documents_in_any_cache_with_any_processes(tmp_path, toy):
    build(toy, tmp_path / "two", processes=2)
    for source in toy.sources:
        assert list(documents(toy, source, tmp_path / "one")) == list(documents(toy, source, tmp_path / "two"))
    assert files_in(tmp_path / "one" / "corpora") == files_in(tmp_path / "two" / "corpora")


def test_a_build_goes_on_without_workers_that_cannot_start(tmp_path, toy):
    """A main module read from stdin is one that no worker can import."""
    script = "from crystal.data.corpus.build import build, load_recipe\nfrom pathlib import Path\n"
    script += f"build(load_recipe({str(tmp_path / 'toy.yaml')!r}), Path({str(tmp_path)!r}), processes=2)"
    subprocess.run([sys.executable, "-"], input=script, text=True, check=True, capture_output=True)
    assert len(files_in(tmp_path / "corpora")) == 2


def test_the_second_time_no_client_is_called(tmp_path, toy, monkeypatch):
    first = list(documents(toy, "python", tmp_path / "cache"))
    monkeypatch.setattr(packages, "child", None)
    monkeypatch.setattr(extract, "extract", None)
    assert list(documents(toy, "python", tmp_path / "cache")) == first


def test_near_duplicates_are_dropped(tmp_path, index):
    twice = {"filter": "code", "entries": [WHEEL, WHEEL | {"license": "Apache-2.0"}]}
    found = list(documents(recipe(tmp_path, {"python": twice}), "python", tmp_path / "cache"))
    assert [d.license for d in found] == ["MIT"] * 6


def test_max_bytes_takes_a_part_spread_over_the_package(tmp_path, index):
    total = sum(map(len, CODE.values()))
    part = recipe(tmp_path, {"python": {"filter": "code", "entries": [WHEEL | {"max_bytes": total // 2}]}})
    paths = [d.path for d in documents(part, "python", tmp_path / "cache")]
    assert 0 < sum(len(CODE[path.removeprefix("toy==1.0/")]) for path in paths) <= total // 2
    assert paths != sorted(paths)
    whole = recipe(tmp_path, {"python": {"filter": "code", "max_bytes": 500, "entries": [WHEEL]}})
    assert sum(len(d.text) for d in documents(whole, "python", tmp_path / "cache")) <= 500


def test_an_interrupted_build_leaves_nothing(tmp_path, toy, monkeypatch):
    fetch(toy, tmp_path / "cache")

    def stop_half_way(entry, members):
        yield "a.py", CODE["toy/m1.py"]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extract, "extract", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            build(toy, tmp_path / "cache", ["python"])
    assert files_in(tmp_path / "cache" / "corpora") == []
    assert len(list(documents(toy, "python", tmp_path / "cache"))) == 6


def test_unknown_and_empty_sources_are_named(tmp_path, toy, index):
    assert "did you mean 'python'" in fails(documents, toy, "pyton", tmp_path / "cache")
    empty = recipe(tmp_path, {"english": {"filter": "english", "entries": [WHEEL]}})
    assert "english: none of its 6 documents passes its filter 'english'" in fails(
        documents, empty, "english", tmp_path / "cache"
    )
    nothing = recipe(tmp_path, {"css": {"entries": [WHEEL | {"include": r"\.css$"}]}})
    assert "pypi:toy==1.0: no member matches" in fails(documents, nothing, "css", tmp_path / "cache")


# ----------------------------------------------------------------------------------------------- packages


def test_a_pinned_hash_is_checked_and_both_hashes_are_told(tmp_path, index):
    true = sha256(index / "toy-1.0-py3-none-any.whl")
    fetch(recipe(tmp_path, {"a": {"entries": [WHEEL | {"sha256": true}]}}), tmp_path / "cache")
    message = fails(fetch, recipe(tmp_path, {"a": {"entries": [WHEEL | {"sha256": "0" * 64}]}}), tmp_path / "cache")
    assert "toy-1.0-py3-none-any.whl: expected sha256 " + "0" * 64 in message
    assert true in message


def test_a_package_that_is_not_there_is_named_and_leaves_nothing(tmp_path, index):
    missing = recipe(tmp_path, {"a": {"entries": [WHEEL | {"package": "pypi:toy==2.0"}]}})
    assert fails(fetch, missing, tmp_path / "cache").startswith("pypi:toy==2.0: not downloaded: ")
    assert files_in(tmp_path / "cache") == []


@pytest.mark.parametrize(("package", "client"), [("npm:toy@1.0.0", "npm"), ("deb:toy", "apt-get")])
def test_a_missing_client_is_named(tmp_path, monkeypatch, package, client):
    monkeypatch.setenv("PATH", str(tmp_path))
    wanted = recipe(tmp_path, {"a": {"entries": [WHEEL | {"package": package}]}})
    assert f"{package}: expected the command '{client}'" in fails(fetch, wanted, tmp_path / "cache")


def client(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)


def test_debian_and_npm_packages(tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    deb(made / "toy-doc_1%3a2.0-1_all.deb", {"usr/share/doc/toy/a.txt": PROSE, "usr/bin/toy": "no"})
    tar(
        made / "scope-toy-1.0.0.tgz",
        {"package/lib/a.js": CODE["toy/m3.py"], "package/b.min.js": CODE["toy/m2.py"]},
    )
    client(tmp_path / "bin", "apt-get", f'[ "$1" = download ] && cp {made}/*.deb .')
    client(tmp_path / "bin", "npm", f'[ "$1" = pack ] && cp {made}/*.tgz .')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    both = recipe(
        tmp_path,
        {
            "english": {"entries": [{"package": "deb:toy-doc", "license": "GPL-2.0-only", "include": r"\.txt$"}]},
            "javascript": {
                "exclude": r"\.min\.",
                "entries": [{"package": "npm:@scope/toy@1.0.0", "license": "MIT", "include": r"\.js$"}],
            },
        },
    )
    places = [(d.path, d.license) for source in both.sources for d in documents(both, source, tmp_path / "cache")]
    assert places == [
        ("toy-doc==1:2.0-1/usr/share/doc/toy/a.txt", "GPL-2.0-only"),
        ("@scope/toy==1.0.0/lib/a.js", "MIT"),
    ]


def test_a_client_without_network_gives_one_line(tmp_path, monkeypatch):
    client(tmp_path / "bin", "npm", "echo 'npm error code EAI_AGAIN' >&2; echo 'npm error errno 1' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    wanted = recipe(tmp_path, {"a": {"entries": [WHEEL | {"package": "npm:toy@1.0.0"}]}})
    assert fails(fetch, wanted, tmp_path / "cache") == f"npm:toy@1.0.0: not downloaded: {packages._NO_NETWORK}"


@pytest.mark.parametrize("name", ["toy-1.0-py3-none-any.whl", "toy-1.0.tar.gz"])
def test_a_damaged_archive_is_named(tmp_path, index, name):
    whole = index / name
    (tmp_path / name).write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert str(tmp_path / name) in fails(packages.members, tmp_path / name, ".", [])


# ------------------------------------------------------------------------------------------ recipes, files


def test_files_are_streamed_and_not_copied(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps({"content": PROSE, "lic": "ISC"}) + "\n")
    entry = {"files": "data", "license": "MIT", "text_key": "content", "license_key": "lic"}
    mine = recipe(tmp_path, {"english": {"filter": "english", "entries": [entry]}})
    (found,) = documents(mine, "english", tmp_path / "cache")
    assert (found.path, found.license, found.text) == ("a.jsonl:1", "ISC", PROSE)
    assert not (tmp_path / "cache" / "corpora").exists()


def test_the_fingerprint_tells_content_and_recipe_but_not_place(tmp_path, monkeypatch):
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path / "cache"))

    def fingerprint(folder, text="x", **keys):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
        entry = {"files": "a.jsonl", "license": "MIT", **keys}
        return recipe(tmp_path / folder, {"a": {"entries": [entry]}}).fingerprint

    first = fingerprint("one")
    assert fingerprint("two") == first
    assert fingerprint("two", text="y") != first
    assert fingerprint("two", license="ISC") != first


def test_a_pin_does_not_change_the_fingerprint_of_a_source(tmp_path, index):
    pin = {"sha256": sha256(index / "toy-1.0-py3-none-any.whl")}
    build(recipe(tmp_path, {"a": {"entries": [WHEEL]}}), tmp_path / "cache")
    build(recipe(tmp_path, {"a": {"entries": [WHEEL | pin]}}), tmp_path / "cache")
    assert len(files_in(tmp_path / "cache" / "corpora")) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"licence": "MIT"}, "unknown key; did you mean 'license'?"),
        ({"license": None}, "license"),
        ({"package": "toy==1.0"}, "expected pypi:NAME==VERSION"),
        ({"package": "pypi:toy"}, "expected pypi:NAME==VERSION"),
        ({"include": "("}, "expected a regular expression"),
        ({"include": None}, "expected 'include'"),
        ({"extract": "word"}, "extract"),
        ({"files": "x.jsonl"}, "expected one of 'package' and 'files'"),
        ({"text_key": "content"}, "'text_key' has no meaning beside 'package'"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"sha256": "abc"}, "sha256"),
    ],
)
def test_mistakes_in_a_recipe_are_told_with_their_place(tmp_path, change, told):
    entry = {key: value for key, value in (WHEEL | change).items() if value is not None}
    message = fails(recipe, tmp_path, {"python": {"entries": [entry]}})
    assert message.startswith(str(tmp_path / "toy.yaml") + ": sources.python.entries.0")
    assert told in message


def test_sample_is_permissive_pinned_and_needs_only_pip():
    sample = load_recipe("sample")
    assert list(sample.sources) == ["english", "python", "javascript", "html", "css"]
    permissive = {"LicenseRef-Public-Domain", "BSD-3-Clause", "MIT", "Apache-2.0", "BSD-3-Clause OR AFL-2.1"}
    for entry in (entry for source in sample.sources.values() for entry in source.entries):
        assert entry.package.startswith("pypi:")
        assert entry.sha256
        assert entry.license in permissive


def test_full_has_the_sources_of_sample_and_more_of_each():
    sample, full = load_recipe("sample"), load_recipe("full")
    assert list(full.sources) == list(sample.sources)
    for name, source in full.sources.items():
        assert len(source.entries) > len(sample.sources[name].entries)


def test_documents_are_plain_values():
    document = corpus.Document("0" * 16, "text", "python", "a/b.py", "MIT")
    with pytest.raises(AttributeError):
        document.text = "other"
