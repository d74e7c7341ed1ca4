"""Every checkpoint of a run, shared, resumed and refused: what is on the disk is what was asked."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from command import crystal, crystal_process
from runs import write_run

from crystal import checkpoint
from crystal.errors import CheckpointError, ConfigError, DataError
from crystal.evaluation import evaluate as module
from crystal.evaluation.evaluate import Evaluation, chosen, evaluate, where
from crystal.evaluation.multiple_choice import MultipleChoice, Question
from crystal.evaluation.results import read

pytest_plugins = ["tiny_subject"]


def questions(count):
    return [
        Question(f"q{i}", (("the of", f" and{i}"), ("the of", " for")), (i % 2,), (4, 3), f"the of and{i}")
        for i in range(count)
    ]


class Asked(MultipleChoice):
    """Small parts, and a record of what was asked."""

    part = 4

    def __init__(self, count=10, name="t", **details):
        super().__init__(name, questions(count), "acc", 0, details)
        self.asked = []

    def answer(self, subject, chosen, bar):
        self.asked.append(list(chosen))
        return super().answer(subject, chosen, bar)


@pytest.fixture
def places(run, tmp_path):
    """The run's checkpoints, with results in a directory of the test's own."""
    found = where(run, 3)
    found.evals = tmp_path / "evals"
    return found


def only(places, step=30):
    places.checkpoints = {step: places.checkpoints[step]}
    return places


def test_every_kth_checkpoint_and_all_ends_of_stages(run):
    steps = checkpoint.steps(run / "checkpoints")
    assert steps == [4, 8, 10, 14, 18, 22, 26, 30]
    assert list(where(run).checkpoints) == steps
    assert list(where(run, 3).checkpoints) == [10, 22, 30]
    assert list(where(run, 5).checkpoints) == [10, 18, 22, 30]
    one = where(run / "checkpoints" / "step-0000014")
    assert (list(one.checkpoints), one.evals, one.run) == ([14], run / "evals", run)
    with pytest.raises(ConfigError, match="--every"):
        where(run, 0)
    with pytest.raises(CheckpointError, match="expected a checkpoint, or a run directory"):
        where(run / "checkpoints")


def test_results_say_what_they_are_of(places):
    (found,) = evaluate(only(places), [Asked(seed_of_prompts=3)])
    saved = read(places.evals / "step-0000030" / "t.json")
    assert saved.metrics == found.metrics
    assert list(saved.answers) == [f"q{i}" for i in range(10)]
    about = saved.about
    assert (about["tokens"], about["stage"], about["stage_ended"]) == (30 * 8 * 32, "web", 3)
    assert about["facts"]["seed_of_prompts"] == 3
    assert about["dtype"] == "float32"
    assert len(about["checkpoint_sha256"]) == 64
    assert sorted(p.name for p in (places.evals / "step-0000030").iterdir() if "lock" not in p.name) == ["t.json"]


def test_what_is_there_is_not_asked_again_and_more_items_are_added(places):
    task = Asked()
    only(places)
    evaluate(places, [task], limit=5)
    first, task.asked = task.asked, []
    assert sum(map(len, first)) == 5
    evaluate(places, [task], limit=5)
    assert task.asked == []
    (whole,) = evaluate(places, [task])
    assert sorted(i for part in first + task.asked for i in part) == list(range(10))
    assert whole.n == 10
    task.asked = []
    (some,) = evaluate(places, [task], limit=5)
    assert (some.n, task.asked) == (5, [])
    assert read(places.evals / "step-0000030" / "t.json").n == 10  # fewer items take nothing away


def test_another_prompt_checkpoint_or_dtype_is_asked_anew(places):
    only(places)
    evaluate(places, [Asked()])
    for task, dtype in ((Asked(shots_from="elsewhere"), "fp32"), (Asked(), "bf16")):
        evaluate(places, [task], dtype=dtype)
        assert sum(map(len, task.asked)) == 10
    task = Asked()
    evaluation = Evaluation(places.checkpoints[30], places, "bf16")
    assert evaluation.known(task) is not None
    evaluation.digest = "another"
    assert evaluation.known(task) is None


def test_killed_and_given_again_it_goes_on(places, run, tmp_path):
    """SIGKILL after the second part; the parts that were written are not asked again."""
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = {[os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]!r}
        from test_evaluate import Asked, evaluate, where
        from pathlib import Path
        places = where(Path({str(run)!r}), 3)
        places.evals, places.checkpoints = Path({str(places.evals)!r}), {{30: places.checkpoints[30]}}
        class Dying(Asked):
            def answer(self, *rest):
                if len(self.asked) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().answer(*rest)
        evaluate(places, [Dying()])
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    task = Asked()
    (found,) = evaluate(only(places), [task])
    assert task.asked == [[8, 9]]
    assert found.n == 10
    assert list(found.answers) == [f"q{i}" for i in range(10)]


def test_a_part_that_another_process_holds_is_waited_for(places, monkeypatch):
    """The other one finishes it meanwhile; each item is asked once."""
    only(places)
    task, other = Asked(), Asked()
    evaluation = Evaluation(places.checkpoints[30], places)
    held = {"part-00001.lock"}

    def not_now(path, wait=True):
        if path.name in held:
            raise BlockingIOError
        return locked(path, wait)

    def while_it_waits(_):
        held.clear()
        job = evaluation.finish(other, list(range(10)), module.Bar(None))
        assert next(job).n == 10  # the other process: it takes what is left, and joins

    locked = module.locked
    monkeypatch.setattr(module, "locked", not_now)
    monkeypatch.setattr(module.time, "sleep", while_it_waits)
    (found,) = evaluate(places, [task])
    assert found.n == 10
    assert task.asked == [[0, 1, 2, 3], [8, 9]]
    assert other.asked == [[4, 5, 6, 7]]


def test_two_processes_share_the_items(run, tmp_path):
    """The real command, twice at once."""
    rows = [{"context": f"the of {i}", "choices": ["and", "for", "was"], "gold": i % 3} for i in range(600)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "crystal.cli", "eval", str(run), "--suite", "items", "--items", str(tmp_path)]
    both = [subprocess.Popen([*command, "--every", "3", "--json"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [json.loads(process.communicate()[0]) for process in both]
    assert [p.returncode for p in both] == [0, 0]
    assert results[0]["checkpoints"] == results[1]["checkpoints"]
    assert [at["step"] for at in results[0]["checkpoints"]] == [10, 22, 30]
    assert all(at["tasks"]["mine"]["n"] == 600 for at in results[0]["checkpoints"])


@pytest.mark.parametrize("content", ["", "{", '{"format": 9}', "[]", '{"format": 1, "step": 3}'])
def test_a_damaged_result_is_named_and_not_written_over(places, content):
    only(places)
    path = places.evals / "step-0000030" / "t.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(DataError, match=r"t\.json: expected an evaluation's result .* remove it to evaluate again"):
        evaluate(places, [Asked()])
    assert path.read_text() == content


def test_the_draw_of_items_is_the_seeds():
    task = Asked(50)
    assert chosen(task, 10, 1) == chosen(task, 10, 1) != chosen(task, 10, 2)
    assert chosen(task, 10, 1) == sorted(set(chosen(task, 10, 1)))
    assert set(chosen(task, 10, 1)) < set(chosen(task, 20, 1))  # more items are more of the same draw
    assert chosen(task, None) == chosen(task, 99) == list(range(50))


def own_items(directory):
    rows = [{"id": f"i{i}", "context": f"the of {i}", "choices": ["and", "for"], "gold": i % 2} for i in range(40)]
    (directory / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_the_command_prints_a_table_and_draws(run, tmp_path):
    words = ("eval", run, "--suite", "items", "--items", own_items(tmp_path), "--every", 3)
    done = crystal(*words)
    assert done.returncode == 0, done.stderr
    assert "step 10" in done.stdout
    assert "bits_per_byte" in done.stdout
    assert "at chance" in done.stdout
    for picture in ("items.png", "mine.png"):
        assert (run / "evals" / picture).read_bytes()[:4] == b"\x89PNG"
    answer = json.loads(crystal(*words, "--json").stdout)
    at = answer["checkpoints"][-1]
    assert (at["step"], at["stage"]) == (30, "web")
    mine = at["tasks"]["mine"]
    assert {"acc_norm", "acc", "bits_per_byte", "n", "stderr", "chance", "at_chance"} <= set(mine)
    assert (mine["n"], mine["chance"]) == (40, 0.5)
    one = crystal("eval", run / "checkpoints" / "step-0000014", "--suite", "items", "--items", tmp_path)
    assert "chance 0.5000" in one.stdout
    assert "n 40" in one.stdout


@pytest.mark.parametrize(("words", "said"), [
    (["--suite", "nothing"], "--suite: expected open-llm-leaderboard"),
    (["--suite", "proxy", "--items", "nowhere"], "nowhere: expected a directory of evaluation items"),
    (["--suite", "items"], "expected --items DIR"),
])  # fmt: skip
def test_mistakes_are_one_line(run, words, said):
    done = crystal("eval", run, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_not_a_run(tmp_path):
    done = crystal("eval", tmp_path, "--suite", "proxy")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "expected a checkpoint, or a run directory" in done.stderr


def test_interrupted_it_ends_with_130_and_goes_on(run, tmp_path):
    rows = [{"context": f"the of {i} " * 5, "choices": [f"and {c}" for c in range(60)], "gold": 0} for i in range(3000)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [sys.executable, "-m", "crystal.cli", "eval", str(run), "--suite", "items", "--items", str(tmp_path)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    evals = run / "evals" / "step-0000004"
    deadline = time.monotonic() + 60
    while not list(evals.glob(".mine-*/part-*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert not list(evals.glob("mine.json"))


def test_a_run_scores_its_checkpoints_while_it_trains(corpus, tmp_path, monkeypatch, train):
    """And comes to the same weights and losses as without."""
    monkeypatch.setenv("CRYSTAL_CACHE", str(corpus / "cache"))
    own_items(tmp_path)
    losses = {}
    for name, evaluate_ in (("with", {"suite": "items", "limit": 10, "items": str(tmp_path)}), ("without", None)):
        (directory := tmp_path / name).mkdir()
        path = write_run(corpus, directory, **{"train.evaluate": evaluate_})
        from crystal.cli.train import train as command

        command(str(path), [], None, 8, False, False)
        lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line).get("loss") for line in lines]
    assert losses["with"] == losses["without"]
    run = tmp_path / "with" / "run"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    scored = [event for event in events if event["event"] == "evaluation"]
    assert [event["step"] for event in scored] == [4, 8]
    found = read(run / "evals" / "step-0000008" / "mine.json")
    assert found.n == 10
    assert scored[-1]["scores"] == {"mine": found.first[1].value}
    assert not (tmp_path / "without" / "run" / "evals").exists()


@pytest.mark.parametrize(("wanted", "said"), [
    ({"suite": "nothing"}, "train.evaluate.suite: expected open-llm-leaderboard"),
    ({"suite": "swag"}, "train.evaluate.suite: no items"),
    ({"suite": "proxy", "limit": 0}, "train.evaluate.limit"),
    ({"siute": "proxy"}, "train.evaluate.siute"),
])  # fmt: skip
def test_a_run_that_cannot_be_scored_says_so_before_it_trains(make_run, wanted, said):
    path = make_run(**{"train.evaluate": wanted})
    done = crystal("train", path, "--until", 2)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr
    assert not (path.parent / "run").exists()


def test_it_needs_no_terminal_and_says_how_far_it_is(run, tmp_path):
    done = crystal_process("eval", run, "--suite", "items", "--items", own_items(tmp_path), "--every", 5)
    assert done.returncode == 0
    assert "items" in done.stderr


@pytest.mark.parametrize("content", [b"", b"[", b"[1]", b"{}x", b'[{"i": 1}]', b"[" * 100_000, b"\xff", b'["a"]'])
def test_a_damaged_part_has_no_answers_and_is_taken_away_to_be_asked_again(tmp_path, content):
    part = tmp_path / "part-00000.json"
    part.write_bytes(content)
    assert module._answers(part) == {}
    assert not part.exists()
