"""`crystal data contamination`: planted items are found, where they were seen is the ledger's answer, and what says
nothing is not counted."""

import functools
import json
import random
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import yaml
from runs import write_run

from crystal.cli.contamination import contamination_text
from crystal.data import pack
from crystal.data.store import TokenStore
from crystal.errors import ConfigError, DataError
from crystal.evaluation import contamination as room
from crystal.evaluation import results
from crystal.evaluation.contamination import contamination, opened
from crystal.evaluation.ngrams import words
from crystal.evaluation.stored_text import parts, row_of_word
from crystal.evaluation.task import Metric
from crystal.run import load_run, prepare_run
from crystal.training.ledger import Ledger

RNG = random.Random(7)
BOILERPLATE = "Licensed under these terms you may copy share and sell it as long as this very notice stays with it."
FUNCTION = '''def has_close_elements(numbers: List[float], threshold: float) -> bool:
    """Check if in given list of numbers, are any two numbers closer to each other than given threshold."""
    for idx, elem in enumerate(numbers):
        if abs(elem - numbers[idx + 1]) < threshold:
            return True
'''
REFORMATTED = FUNCTION.replace("    ", "\t").replace("numbers: List[float]", "numbers:List[ float ]").replace('"', "'")
ACCENTS = "Où est passé l\u2019élève français qui a déjà mangé le gâteau près de l\u2019hôtel, naïf et très âgé ?"
IDEOGRAPHS = "我们在北京大学学习中文已经三年了"
STORY = ("Seven grey whales swam slowly past Quebec while forty hungry sailors counted their copper coins and sang of "
         "distant harbours where nobody pays for bread, salt, rope or candles after the long winter ends.")  # fmt: skip
ALTERED = (STORY.replace("hungry", "tired").replace("sang", "dreamt").replace("bread", "cheese")
           .replace("winter", "summer"))  # fmt: skip
REWRITTEN = ALTERED.replace("slowly", "quickly")  # 20 of its 34 words are in 5-grams of the story
ALIEN = "zqa zqb zqc zqd zqe zqf zqg zqh zqi zqj zqk zql zqm zqn zqo zqp"


class Task:
    """A stand-in: items, and accuracy over answers."""

    def __init__(self, name, items):
        self.name, self.items = name, dict(items)

    def texts(self):
        return iter(self.items.items())

    def metrics(self, answers):
        right = [a["right"] for a in answers]
        return {"accuracy": Metric(sum(right) / len(right), float("nan") if len(right) < 2 else 0.1, 0.5)}


def planted(corpus, source, *texts):
    """Put each text into the middle of a document of its own, which is then read."""
    file = corpus / f"{source}.jsonl"
    lines = file.read_text().splitlines()
    for number, text in enumerate(texts):
        host = json.loads(lines[number])["text"].split(" ")
        half = len(host) // 2
        lines.append(json.dumps({"text": f"{' '.join(host[:half])}\n{text}\n{' '.join(host[half:])} {number}"}))
    file.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory as `crystal train` leaves it at its last step, its corpus with what is planted in it."""
    corpus = tmp_path_factory.mktemp("planted")
    changes = {"data.tokenizer.train.vocab_size": 480, "model.vocab_size": 512, "data.val_fraction": 0.3}
    path = write_run(corpus, corpus, **changes, **{"data.val_rows": 100000})
    common = [f"{BOILERPLATE} {RNG.random()}" for _ in range(40)]
    planted(corpus, "english", *[STORY] * 5, *[ACCENTS] * 5, *[IDEOGRAPHS] * 5, *common)
    planted(corpus, "python", *[REFORMATTED] * 5)
    with patch.dict("os.environ", CRYSTAL_CACHE=str(corpus / "cache")):
        run = load_run(path)
        store = TokenStore.open(prepare_run(run))
    directory = run.config.directory
    (directory / "evals").mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json", by_alias=True)))
    (directory / "manifest.json").write_text(json.dumps({"data": {"store": store.manifest["fingerprint"]}}))
    (directory / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(31)))
    return directory


@pytest.fixture(scope="module")
def store(trained):
    return TokenStore.open(next((trained.parent / "stores").glob("tiny-*")))


def only_in(store, split):
    """20 words out of a document of a split."""
    part = next(p for p in parts(store, "english", split) if len(p.tokens) > 100)
    found = words(store.tokenizer().decode(part.tokens.tolist()))
    return part.document, " ".join(found[20:40])


@pytest.fixture(scope="module")
def tasks(store):
    english = {
        "story": STORY.upper(), "altered": ALTERED, "rewritten": REWRITTEN, "accents": ACCENTS,
        "ideographs": IDEOGRAPHS, "alien": ALIEN,
        "short": "Who sang?", "eight": "seven grey whales swam slowly past quebec while",
        "other eight": "seven grey whales swam slowly past quebec when", "boilerplate": BOILERPLATE,
        "mixed": f"{BOILERPLATE} {ALIEN} {ALIEN[::-1]}", "held out": only_in(store, "val")[1],
        "learnt": only_in(store, "train")[1],
    }  # fmt: skip
    return [Task("qa", english), Task("code", {"close": FUNCTION, "alien": f"def f(x):\n    return {ALIEN}"})]


@pytest.fixture(scope="module")
def report(trained, tasks):
    return contamination(tasks, *opened(str(trained)), "own")


def by_id(report, task):
    return {item["id"]: item for item in report["items"][task]}


def test_every_item_is_what_it_was_planted_as(report):
    kinds = {id: item["kind"] for id, item in by_id(report, "qa").items()}
    assert kinds == {
        "story": "exact", "altered": "near", "rewritten": "clean", "accents": "exact", "ideographs": "exact",
        "alien": "clean",
        "short": "too_short", "eight": "exact", "other eight": "clean", "boilerplate": "too_common", "mixed": "clean",
        "held out": "clean", "learnt": "exact",
    }  # fmt: skip
    assert report["tasks"]["qa"] | {"ignored_ngrams": None} == {
        "items": 13, "exact": 5, "near": 1, "too_short": 1, "too_common": 1, "clean": 5, "ignored_ngrams": None,
        "held_out": report["tasks"]["qa"]["held_out"],
    }  # fmt: skip


def test_code_is_found_however_it_is_laid_out(report):
    close = by_id(report, "code")["close"]
    assert (close["kind"], close["coverage"], close["longest"]) == ("exact", 1.0, len(words(FUNCTION)))
    assert by_id(report, "code")["alien"]["kind"] == "clean"
    assert "has_close_elements" in close["excerpt"]


def test_an_exact_copy_says_how_much_of_it_is_there(report):
    items = by_id(report, "qa")
    assert items["story"]["coverage"] == items["accents"]["coverage"] == 1.0
    assert items["story"]["longest"] == len(words(STORY))
    assert items["story"]["excerpt"] == " ".join(words(STORY))
    altered = items["altered"]
    assert 0.6 <= altered["coverage"] < 1.0
    assert altered["longest"] == 0
    assert "…" in altered["excerpt"]
    assert "tired" not in altered["excerpt"]


def test_what_stands_in_many_documents_is_ignored_and_counted(report):
    boilerplate = len(words(BOILERPLATE)) - 12
    assert report["tasks"]["qa"]["ignored_ngrams"] == boilerplate
    assert by_id(report, "qa")["mixed"]["kind"] == "clean", "its own words are nowhere"


def test_held_out_documents_are_reported_apart(report, store):
    item, document = by_id(report, "qa")["held out"], only_in(store, "val")[0]
    assert item["held_out"]["kind"] == "exact"
    assert document["id"] in [d["document"] for d in item["held_out"]["documents"]]
    assert "documents" not in item
    assert report["documents"] == {
        split: sum(len([*store.documents(source, split)]) for source in store.sources) for split in ("train", "val")
    }


def test_documents_and_steps_are_those_of_the_ledger(report, trained, store):
    ledger = Ledger(load_run(trained / "config.yaml"), store=store)
    listed = [(item, d) for items in report["items"].values() for item in items for d in item.get("documents", ())]
    assert len(listed) > 10
    some_partly = False
    for item, document in listed:
        when = ledger.when(document["document"])
        assert document["source"] == when["source"]
        assert (document["count"], document["steps"]) == (len(when["steps"]), when["steps"][:5])
        assert set(document["passage"]["rows"]) <= set(when["rows"])
        sightings = ledger.sightings(when["source"], document["passage"]["rows"])
        steps = sorted({step for step, _, _ in sightings})
        assert document["passage"]["steps"] == steps[:5]
        assert set(steps) <= set(when["steps"])
        some_partly |= len(steps) < len(when["steps"])
        stages = {ledger.curriculum.stage_at(step - 1).name for step in when["steps"]}
        assert {stage["stage"] for stage in document["stages"]} == stages
        assert not steps or item["first_step"] <= steps[0]
    assert some_partly, "a passage is seen less often than its document"


def test_the_rows_of_a_passage_hold_its_words(report, store):
    tokenizer = store.tokenizer()
    for item in report["items"]["code"] + report["items"]["qa"]:
        for document in item.get("documents", ()):
            rows = document["passage"]["rows"]
            tokens = [t for row in rows for t in store.row(document["source"], row)[:-1].tolist()]
            shown = words(tokenizer.decode(tokens))
            inner = item["excerpt"].split(" … ")[0].split(" ")
            assert " ".join(inner[:-1]) in " ".join(shown), "the last word may go on in the next row"


def test_no_step_behind_the_last_one_trained_counts(trained, tasks, tmp_path):
    file, _ = opened(str(trained))
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / name).write_text((trained / name).read_text())
    untrained = contamination(tasks, file, tmp_path, "own")
    story = by_id(untrained, "qa")["story"]
    assert untrained["trained_to"] == 0
    assert story["kind"] == "exact"
    assert story["first_step"] is None
    assert [d["count"] for d in story["documents"]] == [0] * story["document_count"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 12}\n')
    half = by_id(contamination(tasks, file, tmp_path, "own"), "qa")
    assert all(step <= 12 for item in half.values() for d in item.get("documents", ()) for step in d["steps"])


def test_documents_cut_into_parts_and_small_chunks_give_the_same(report, trained, tasks, monkeypatch):
    monkeypatch.setattr(room, "parts", functools.partial(parts, most=600))
    monkeypatch.setattr(room, "_CHUNK_TOKENS", 1000)
    again = contamination(tasks, *opened(str(trained)), "parts")
    assert again["items"] == report["items"]
    assert again["tasks"] == report["tasks"]
    assert again["documents"] == report["documents"]


def test_parts_are_the_stored_text_of_each_document(store):
    step = pack.stride(store.seq_len, store.overlap)
    for source in store.sources:
        rows = [store.row(source, r).tolist() for r in range(store.rows(source))]
        stream = [t for row in rows for t in row[:step]] + rows[-1][step:]
        for most in (1 << 20, 150):
            rebuilt = list(stream)
            for part in parts(store, source, most=most):
                piece = part.tokens.tolist()
                assert piece == stream[part.start : part.start + len(piece)]
                assert part.begins == (part.start == part.document["start"])
                rebuilt[part.start : part.start + len(piece)] = [None] * len(piece)
            assert set(rebuilt) == {None}, "every token is in a document"


def test_a_word_lies_in_the_row_in_which_it_begins(store):
    tokenizer = store.tokenizer()
    part = max(parts(store, "english"), key=lambda p: len(p.tokens))
    every = words(tokenizer.decode(part.tokens.tolist()))
    found = [row_of_word(store, tokenizer, part, k) for k in range(len(every))]
    assert found == sorted(found)
    assert len(set(found)) > 3
    for k, row in enumerate(found):
        before = part.tokens[: max(row * store.seq_len + 1 - part.start, 0)].tolist()
        assert len(words(tokenizer.decode(before))) <= k


def test_scores_are_given_with_and_without(trained, tasks, tmp_path):
    file, _ = opened(str(trained))
    for name in ("config.yaml", "manifest.json", "metrics.jsonl"):
        (tmp_path / name).write_text((trained / name).read_text())
    right = {"story", "altered", "alien", "eight"}
    answers = {id: {"id": id, "right": id in right} for id in tasks[0].items}
    for step in (1, 30):
        results.write(tmp_path / "evals", results.Result(step, "qa", {}, len(answers), answers, {}))
    result = contamination(tasks, file, tmp_path, "own")
    assert [entry["step"] for entry in result["scores"]] == [1, 30]
    last = result["scores"][-1]["tasks"]["qa"]
    items = by_id(result, "qa").values()
    seen = sum(i["kind"] in ("exact", "near") and (i["first_step"] or 99) <= 30 for i in items)
    assert last["n"] == {"all": 13, "clean": 5, "found": 6, "seen": seen}
    accuracy = last["metrics"]["accuracy"]
    assert accuracy["all"]["value"] == pytest.approx(4 / 13)
    assert accuracy["clean"] == {"value": 0.2, "stderr": 0.1, "chance": 0.5}
    assert accuracy["found"]["value"] == pytest.approx(3 / 6)
    assert result["scores"][0]["tasks"]["qa"]["n"]["seen"] <= seen
    json.dumps(result, allow_nan=False)
    damaged = tmp_path / "evals" / "step-0000030" / "qa.json"
    whole = damaged.read_text()
    for text in ('{"items": [{}]}', whole.replace("true", "false"), whole.replace('"right": true', '"rite": true')):
        damaged.write_text(text)
        with pytest.raises(DataError, match=r"step-0000030/qa.json: expected an evaluation's result of format 1"):
            contamination(tasks, file, tmp_path, "own")
    damaged.write_text((tmp_path / "evals" / "step-0000001" / "qa.json").read_text())
    with pytest.raises(DataError, match=r"step-0000030/qa.json: expected the result of qa at step 30, .* got qa at 1"):
        contamination(tasks, file, tmp_path, "own")


def test_the_command_prints_a_table_and_writes_the_whole_report(trained, tasks, crystal, monkeypatch):
    monkeypatch.setitem(sys.modules, "crystal.evaluation.suites", SimpleNamespace(tasks_of=lambda suite, items: tasks))
    code, out, _ = crystal("data", "contamination", trained, "--suite", "mine")
    assert code == 0
    assert out.splitlines()[0].split() == ["task", "items", "exact", "near", "too", "short", "too", "common", "clean"]
    assert f"qa story: exact, 100%, {len(words(STORY))} words in a row; english" in out
    written = json.loads((trained / "evals" / "contamination-mine.json").read_text())
    code, out, _ = crystal("data", "contamination", trained, "--suite", "mine", "--json")
    assert code == 0
    shown = json.loads(out)
    assert shown | {"seconds": 0} == written | {"seconds": 0}


@pytest.mark.parametrize("spoil", ["directory", "store", "manifest", "n", "name"])
def test_a_mistake_is_one_line(trained, tasks, crystal, monkeypatch, tmp_path, spoil):
    monkeypatch.setitem(sys.modules, "crystal.evaluation.suites", SimpleNamespace(tasks_of=lambda suite, items: tasks))
    for name in ("config.yaml", "manifest.json"):
        (tmp_path / name).write_text((trained / name).read_text())
    more, run = [], tmp_path
    if spoil == "directory":
        (tmp_path / "config.yaml").unlink()
        expected = "expected a run directory"
    elif spoil == "store":
        (tmp_path / "manifest.json").write_text('{"data": {"store": "00ff00ff00ff00ff00"}}')
        expected = "expected the run's token store, 00ff00ff00ff00ff, it is gone"
    elif spoil == "manifest":
        (tmp_path / "manifest.json").write_text('{"data": {"store": "*/../.."}}')
        expected = "manifest.json: data.store: expected the token store of the run"
    elif spoil == "n":
        more, expected = ["--n", "7"], "--n"
    else:
        run, expected = "no-such-run", "no-such-run"
    code, out, err = crystal("data", "contamination", run, "--suite", "mine", *more)
    assert (code, out, err.strip().count("\n")) == (2, "", 0)
    assert expected in err
    assert not (tmp_path / "evals").exists()


def test_the_corpus_may_be_gone(report, trained, tasks):
    for file in trained.parent.glob("*.jsonl"):
        file.rename(file.with_suffix(".gone"))
    try:
        assert contamination(tasks, *opened(str(trained)), "gone")["items"] == report["items"]
    finally:
        for file in trained.parent.glob("*.gone"):
            file.rename(file.with_suffix(".jsonl"))


def test_a_run_file_will_do_before_there_is_a_run_directory(report, trained, tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("CRYSTAL_CACHE", str(trained.parent / "cache"))
    file = tmp_path / "run.yaml"
    file.write_text((trained.parent / "run.yaml").read_text())
    assert opened(str(file))[1] == trained
    mapping = yaml.safe_load(file.read_text()) | {"run_dir": str(tmp_path / "new")}
    file.write_text(yaml.safe_dump(mapping))
    run, directory = opened(str(file))
    assert directory is None
    result = contamination(tasks, run, directory, "own")
    assert result["tasks"] == report["tasks"]
    assert (result["file"], result["trained_to"]) == (None, 0)
    assert not (tmp_path / "new").exists()
    assert "not trained yet, so documents and no steps" in contamination_text(result)
    assert "not written" in contamination_text(result)


def test_fewer_words_than_an_ngram_needs_are_refused(trained, tasks):
    with pytest.raises(ConfigError, match="--n: expected at least 8 words, got 5"):
        contamination(tasks, *opened(str(trained)), "own", n=5)


def test_no_items_are_no_error(trained):
    result = contamination([Task("none", {})], *opened(str(trained)), "none")
    assert result["tasks"]["none"]["items"] == 0
