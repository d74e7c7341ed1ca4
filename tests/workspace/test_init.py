"""`crystal init`: sources found by looking at files, and three files that train as they stand."""

import gzip
import json
import random
import re
import shlex
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from crystal.data.corpus.build import load_recipe
from crystal.data.corpus.sniff import _name, sources_of
from crystal.errors import ConfigError, DataError
from crystal.run import load_run
from crystal.workspace.project import FILES, SMALLEST, _weights, init

DOC = Path(__file__).parents[2] / "docs" / "own-data.md"
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have".split()


def prose(seed: int, words: int = 300) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@pytest.fixture
def texts(tmp_path) -> Path:
    """Prose in four formats and two directories, programs, and files that are no text."""
    docs, web, code = tmp_path / "texts" / "docs", tmp_path / "texts" / "web", tmp_path / "programs"
    for folder in (docs, web, code / "deep"):
        folder.mkdir(parents=True)
    lines = [json.dumps({"id": f"d{i}", "text": prose(i), "meta": {"lang": "en"}}) for i in range(40)]
    (docs / "part-0000.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    table = {"content": [prose(100 + i) for i in range(40)], "path": [f"p{i}" for i in range(40)], "n": list(range(40))}
    pq.write_table(pa.table(table), web / "all.parquet")
    for i in range(30):
        (code / "deep" / f"m{i}.py").write_text("".join(f"def f{j}(x):\n    return x + {j}\n\n" for j in range(40)))
    (code / "logo.png").write_bytes(b"\x89PNG\0")
    (code / ".hidden.py").write_text("secret = 1\n")
    (code / "empty.py").write_text("")
    return tmp_path


def test_sources_keys_and_languages_are_found_by_looking(texts):
    sources, passed_over = sources_of([texts / "texts", texts / "programs"])
    assert list(sources) == ["docs", "python", "web"]
    assert sources["docs"][0].keys == {"text_key": "text", "id_key": "id"}
    assert sources["web"][0].keys == {"text_key": "content", "id_key": "path"}
    assert sources["python"][0].count == 30
    assert passed_over == {".png": 1}


def test_it_trains_as_it_stands_word_for_word_as_the_page_says(texts, monkeypatch):
    from typer.testing import CliRunner

    from crystal.cli.main import app

    monkeypatch.chdir(texts)
    monkeypatch.setenv("CRYSTAL_CACHE", str(texts / "cache"))
    commands = re.findall(r"^crystal (.*?)(?: {2,}#.*)?$", DOC.read_text(), re.MULTILINE)
    assert [c.split()[0] for c in commands] == ["init", "train", "train", "generate", "train"]
    for command in commands[:4]:
        command = command.replace("--until 60", "--until 4")
        done = CliRunner().invoke(app, shlex.split(command))
        assert done.exit_code == 0, (command, done.output, done.exception)
    assert (texts / "runs" / "mine" / "checkpoints").is_dir()
    config = yaml.safe_load((texts / "runs" / "mine" / "config.yaml").read_text())
    assert isinstance(config["model"]["vocab_size"], int)
    assert config["backend"]["dtype"] in ("fp32", "bf16")


def test_the_pages_yaml_is_what_is_read(texts):
    corpus, run = re.findall(r"```yaml\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert corpus.count("\n") + run.count("\n") <= 25
    init(texts, [texts / "texts", texts / "programs"], None)
    (texts / "corpus.yaml").write_text(corpus)
    assert set(load_recipe(str(texts / "corpus.yaml")).sources) == {"docs", "python"}
    (texts / "run.yaml").write_text(run)
    assert load_run(texts / "run.yaml").config.name == "mine"


def test_nothing_is_overwritten_and_nothing_is_left_of_a_mistake(texts):
    for file in FILES:
        home = texts / file.removesuffix(".yaml")
        home.mkdir()
        (home / file).write_text("mine")
        with pytest.raises(ConfigError, match=rf"{re.escape(file)}: is there already"):
            init(home, [texts / "texts"], None)
        assert [p.name for p in home.iterdir()] == [file]
    for wrong, message in (
        (texts / "nowhere", "does not exist"),
        (texts / "programs" / "logo.png", r"expected files of rows .*found 1 \.png"),
        (texts / "programs" / "empty.py", "found 1 empty"),
        (texts / "programs" / "deep" / "m1.py", f"expected {SMALLEST:,} bytes"),
    ):
        with pytest.raises(ConfigError, match=message):
            init(texts / "new", [wrong], None)
        assert not (texts / "new").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"n": 1}\n{"n": 2}\n', "expected a column of text, found n"),
        ("a.jsonl", "[1]\n[2]\n", "expected rows with named values, found others"),
        ("a.csv", "x,y\n1,\n", "expected a column of text, found x, y"),
        ("a.parquet", "no parquet", "expected Parquet data, found a file that begins with"),
        ("a.jsonl.zst", "no zst", "expected zstandard data"),
        ("a.jsonl.gz", "no gzip", "expected gzip data"),
    ],
)
def test_files_of_rows_without_text_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        sources_of([tmp_path])
    assert "\n" not in str(error.value)


def test_the_text_is_the_longest_column_where_no_name_tells(tmp_path):
    rows = [{"title": "t", "story_html": prose(i), "lang": "en"} for i in range(20)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"data": row}) + "\n" for row in rows)
    assert sources_of([tmp_path])[0][_name(tmp_path.name)][0].keys == {"text_key": "data.story_html"}


def test_without_data_it_starts_on_the_sample_corpus(tmp_path):
    init(tmp_path / "first", [], None)
    run = load_run(tmp_path / "first" / "run.yaml")
    assert run.config.data.corpus == "sample"
    assert len(run.config.curriculum.stages) == 3


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 10**12), min_size=1, max_size=8))
def test_weights_add_up_and_leave_none_out(sizes):
    weights = _weights(sizes)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-9)
    assert all(0 < weight <= 1 for weight in weights.values())


@given(st.text(min_size=1, max_size=20))
def test_a_sources_name_is_one_that_recipes_take(text):
    assert re.fullmatch(r"[A-Za-z0-9._-]+", _name(text))
