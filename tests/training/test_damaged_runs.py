"""Run directories that are damaged, and 0.1.0's: what does not count is noted, what counts is one line."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from crystal import checkpoint
from crystal.data.store import TokenStore
from crystal.errors import CheckpointError, CrystalError, RunError
from crystal.inference.generate import generate
from crystal.inference.load import load_decoder, load_tokenizer
from crystal.run import load_run, prepare_run
from crystal.training import metrics
from crystal.training.ledger import Ledger
from crystal.training.metrics import Metrics, event, read_metrics
from crystal.training.start import start

SAMPLE = Path(__file__).parents[1] / "samples" / "run-0.1.0"


@pytest.fixture
def sample(tmp_path, monkeypatch):
    """A copy of 0.1.0's run directory and what it was made from, where the command runs."""
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path / "cache"))
    copy = Path(shutil.copytree(SAMPLE, tmp_path / "sample"))
    monkeypatch.chdir(copy)
    metrics._note_damaged.cache_clear()
    return copy


def go_on(until=12):
    return start(load_run("run.yaml"), None, until, Console(quiet=True, stderr=True))


def losses():
    return {r["step"]: r["loss"] for r in read_metrics(Path("run")) if "loss" in r}


EXPECTED = json.loads((SAMPLE / "expected.json").read_text())
NEXT = {int(step): pytest.approx(loss, rel=1e-4) for step, loss in EXPECTED["next_losses"].items()}


def test_a_run_of_0_1_0_goes_on_to_the_same_losses(sample):
    before = Path("run/metrics.jsonl").read_bytes()
    assert go_on().step == 12
    assert {step: loss for step, loss in losses().items() if step > 8} == NEXT
    assert Path("run/metrics.jsonl").read_bytes().startswith(before), "what was recorded stays byte for byte"


@pytest.mark.parametrize("path", ["run", "run/checkpoints/step-0000008", "parts/step-0000008"])
def test_a_checkpoint_of_0_1_0_generates_the_same(sample, path):
    model, opened = load_decoder(Path(path))
    ids = [*generate(model, EXPECTED["prompt_ids"], len(EXPECTED["greedy_ids"]))]
    assert ids == EXPECTED["greedy_ids"]
    assert load_tokenizer(opened).decode(ids) == EXPECTED["greedy_text"]


DAMAGED = [b"\x00\xff\xfe{\n", b"5\n", b"[" * 5000 + b"\n", b'{"step": NaN}\n', b'{"step": 7, "loss": "x"}\n', b"\n",
           b'{"step": 7, "val_loss": [1]}\n', b'{"step": true, "loss": 1}\n', b'{"step": 1e999}\n']  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED)
def test_a_damaged_line_of_metrics_is_left_out_noted_and_kept(sample, line, capsys):
    path = Path("run/metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = line
    path.write_bytes(b"".join(lines))
    assert go_on(10).step == 10
    assert losses().keys() == {1, 2, 4, 5, 6, 7, 8, 9, 10}
    assert path.read_bytes().splitlines(keepends=True)[: len(lines)] == lines
    assert "crystal: run/metrics.jsonl: line 4: expected a step's record; left out, and kept as it is" in (
        capsys.readouterr().err
    )


def test_every_line_may_be_damaged(sample, capsys):
    for name in ("metrics", "events"):
        Path(f"run/{name}.jsonl").write_bytes(b"\xff\xff\n" * 9 + b"\xff")
    assert go_on(10).step == 10
    assert losses().keys() == {9, 10}
    assert "line 1 and 8 more" in capsys.readouterr().err
    events = Path("run/events.jsonl").read_bytes().split(b"\n")
    assert events[:10] == [b"\xff\xff"] * 9 + [b"\xff"]
    assert next(json.loads(line)["event"] for line in events[10:] if line) == "start"


def test_records_that_are_gone_do_not_keep_a_run_from_going_on(sample):
    for name in ("metrics", "events"):
        Path(f"run/{name}.jsonl").unlink()
    assert go_on(10).step == 10


def test_resuming_drops_what_is_made_again_and_a_damaged_line_in_it(tmp_path):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 7)]
    lines[1] = lines[1][:9]  # damaged in the middle
    lines[4] = "{" + lines[4]  # of a step that is made again
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 7, "lo']))
    Metrics(tmp_path, 4).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:4]


def test_an_event_after_a_torn_line_is_on_a_line_of_its_own(tmp_path):
    event(tmp_path, "start", step=0)
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"time": "20')
    event(tmp_path, "stop", step=1)
    assert json.loads(path.read_bytes().splitlines()[-1])["event"] == "stop"


@pytest.mark.parametrize("left", [("checkpoints",), ("metrics.jsonl",), ("events.jsonl",), ()])
def test_a_manifest_that_is_gone_is_not_replaced(sample, left):
    for path in Path("run").iterdir():
        if path.name not in ("config.yaml", "checkpoints", *left):
            path.unlink()
    if "checkpoints" not in left:
        shutil.rmtree("run/checkpoints/step-0000008")
    if not left:  # killed before it was made
        assert go_on(1).step == 1
        return
    with pytest.raises(
        RunError, match=r"run/manifest\.json: expected the manifest .* not there; .* restore it, or set"
    ):
        go_on()
    assert not Path("run/manifest.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"tuning": 7},
        {"tuning": [{"identity": 1}]},
        {"data": [1]},
        {"format": 2},
        {"format": "1"},
        {"data": {"store": 5}},
    ],
)
def test_a_damaged_manifest_is_one_line(sample, change):
    path = Path("run/manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError, match=r"run/manifest\.json: "):
        go_on()


def test_a_checkpoint_whose_seal_is_gone_is_named_by_all_who_look_for_one(sample):
    seal = Path("run/checkpoints/step-0000008") / checkpoint.SEAL
    seal.unlink()
    for look in (go_on, lambda: checkpoint.locate(Path("run")), lambda: checkpoint.locate(seal.parent)):
        with pytest.raises(CheckpointError, match=r"step-0000008/checkpoint\.json: expected the checkpoint's seal"):
            look()
    seal.parent.rename("elsewhere")
    assert go_on(1).step == 1


def test_a_seal_of_0_1_0_is_compared_with_its_run(sample):
    """It has no digest and its tokenizer no sum; the run directory tells the model and the sum."""
    directory = Path("run/checkpoints/step-0000008")
    tokenizer = directory / "tokenizer.model"
    data = tokenizer.read_bytes()
    tokenizer.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: expected sha256 a7ba80a9334c515f…"):
        load_tokenizer(checkpoint.read(directory))
    seal = json.loads((directory / checkpoint.SEAL).read_text())
    del seal["state"]["model"]["rotary_fraction"]
    (directory / checkpoint.SEAL).write_text(json.dumps(seal))
    with pytest.raises(CheckpointError, match=r"state\.model: expected the model of .*config\.yaml"):
        checkpoint.read(directory)


def test_a_run_goes_on_only_with_its_own_model(sample):
    other = Path(shutil.copytree("run/checkpoints/step-0000008", "other"))
    seal = json.loads((other / checkpoint.SEAL).read_text())
    seal["state"]["model"]["mup"]["output_alpha"] = 1.5
    (Path("run/checkpoints/step-0000008") / checkpoint.SEAL).write_text(json.dumps(seal))
    with pytest.raises(CheckpointError, match=r"step-0000008.*expected the model of "):
        go_on()


@pytest.fixture
def twice(sample):
    """The ledger of a run whose sources hold one document twice, and once more in the other source."""
    store = prepare_run(load_run("run.yaml"))
    manifest = json.loads((store / "manifest.json").read_text())
    for source, numbers in (("english", (0, 3)), ("python", (1,))):
        file = store / source / "documents.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for number in numbers:
            lines[number]["id"] = "twice"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        manifest["sources"][source]["documents_sha256"] = checkpoint.sha256_of(file)
    (store / "manifest.json").write_text(json.dumps(manifest))
    return Ledger(load_run("run.yaml"), store=TokenStore.open(store))


def test_when_of_an_id_that_several_documents_have_is_all_of_theirs(twice):
    seen: dict[str, set] = {"english": set(), "python": set()}
    for step in range(1, 13):
        for row in twice.where(step)["rows"]:
            if row["document"] == "twice":
                seen[row["source"]].add((step, row["index"]))
    answer = twice.when("twice")
    assert answer["steps"] == sorted({step for own in seen.values() for step, _ in own})
    assert [found["source"] for found in answer["occurrences"]] == ["english", "python"]
    for found in answer["occurrences"]:
        assert {index for _, index in seen[found["source"]]} <= set(found["rows"])
    documents = [d for d in twice.store.documents("english") if d["id"] == "twice"]
    assert len(documents) == 2
    assert "occurrences" not in twice.when(next(twice.store.documents("python").__iter__())["id"])


def test_a_document_that_is_there_twice_is_left_out_twice(twice):
    run = load_run("run.yaml", ["train.without=[twice]"])
    own = Ledger(run, store=twice.store).batches
    for source, rows in twice.store.occurrences("twice"):
        assert rows
        assert all(own.left_out(source, row) for row in rows)


def test_no_damage_is_a_programs_error(sample):
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "events.jsonl"):
        path = Path("run") / name
        content = path.read_bytes()
        path.unlink()
        path.mkdir()
        with pytest.raises(CrystalError, match=name.partition(".")[0]):
            go_on(9)
        path.rmdir()
        path.write_bytes(content)
    assert go_on(9).step == 9
