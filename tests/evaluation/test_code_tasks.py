"""HumanEval and MBPP as bigcode-evaluation-harness asks them; programs run confined or not at all."""

import json
from dataclasses import replace

import pytest
from confined import needs_confinement
from programs_run import plainly, unconfined  # noqa: F401
from rich.console import Console
from tiny_subject import run, subject  # noqa: F401

import crystal.evaluation.code_tasks as code_tasks
from crystal.errors import ConfigError, DataError
from crystal.evaluation.code_tasks import MBPP, HumanEval
from crystal.evaluation.items import Items
from crystal.evaluation.writing import Written
from crystal.output.progress import Bar

ADD = {
    "task_id": "HumanEval/0",
    "prompt": '\n\ndef add(a, b):\n    """ Sum. """\n',
    "canonical_solution": "    return a + b\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
}
SUB = ADD | {
    "task_id": "HumanEval/1",
    "prompt": "def sub(a, b):\n",
    "canonical_solution": "    return a - b\n",
    "test": "def check(candidate):\n    assert candidate(5, 3) == 2\n",
    "entry_point": "sub",
}
SQUARE = {
    "task_id": 11,
    "text": "Write a function to square.",
    "code": "def square(x):\r\n    return x * x",
    "test_list": ["assert square(2) == 4", "assert square(3) == 9"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MBXP_SQUARE = {
    "task_id": "MBPP/11",
    "prompt": "def square(x):\n    ''' candidate '''\n",
    "canonical_solution": "    return x * x",
    "description": "Write a function to square.",
    "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9\n",
    "entry_point": "square",
}


@pytest.fixture
def says(monkeypatch):
    """says(texts) → the model writes these, one after the other, whatever it is asked; returns what it was asked."""

    def install(texts):
        asked = []

        def write(decoder, tokenizer, prompts, stops, ends, sampling):
            asked.extend(prompts)
            yield [(number, Written(text, "stop", [5], 0)) for number, text in enumerate(texts)]

        monkeypatch.setattr(code_tasks, "write", write)
        return asked

    return install


def bar(total=None):
    return Bar(Console(quiet=True), "", total)


def test_humaneval_asks_with_the_stripped_prompt_and_runs_prompt_answer_and_check(own, says, subject, plainly):  # noqa: F811
    task = HumanEval(own("humaneval", [ADD, SUB]), samples=2)
    asked = says(["\n    return a + b", "\n    return a * b", "\n    return a - b", "\n    return b"])
    shown = bar()
    answers = task.answer(subject, [0, 1], shown)
    assert shown.completed == 2
    prompt = 'def add(a, b):\n    """ Sum. """'
    assert asked[0][0] == asked[1][0] == [subject.tokenizer.bos_id, *subject.tokenizer.encode(prompt)]
    assert len({seed for _, seed in asked}) == 4
    assert plainly[0] == f"{prompt}\n    return a + b\n\n{ADD['test']}\ncheck(add)\n"
    assert [(a["id"], a["n"], a["passed"]) for a in answers] == [("HumanEval/0", 2, 1), ("HumanEval/1", 2, 1)]
    assert [s["status"] for a in answers for s in a["samples"]] == ["passed", "failed", "passed", "failed"]
    assert answers[0]["samples"][1]["detail"] == "AssertionError"
    assert json.loads(json.dumps(answers)) == answers
    assert list(task.texts()) == [(r["task_id"], r["prompt"] + r["canonical_solution"]) for r in (ADD, SUB)]


def test_mbpp_asks_with_a_docstring_of_text_and_first_test(own, says, subject, plainly):  # noqa: F811
    task = MBPP(own("mbpp", [SQUARE]), samples=1, temperature=0)
    asked = says(["def square(x):\n    return x * x\n"])
    answers = task.answer(subject, [0], bar())
    prompt = '"""\nWrite a function to square.\nassert square(2) == 4\n"""\n'
    assert asked[0][0] == [subject.tokenizer.bos_id, *subject.tokenizer.encode(prompt)]
    tests = "assert square(2) == 4\nassert square(3) == 9"
    assert plainly == [f"{prompt}def square(x):\n    return x * x\n\n{tests}\n"]
    assert (answers[0]["id"], answers[0]["passed"]) == ("MBPP/11", 1)
    assert dict(task.texts()) == {"MBPP/11": "Write a function to square.\ndef square(x):\r\n    return x * x"}


def test_both_published_forms_of_mbpp_are_the_same_questions(own, says, subject, plainly):  # noqa: F811
    says(["def square(x):\n    return x * x\n"])
    MBPP(own("mbpp", [MBXP_SQUARE]), samples=1, temperature=0).answer(subject, [0], bar())
    MBPP(own("mbpp", [SQUARE]), samples=1, temperature=0).answer(subject, [0], bar())
    assert plainly[0] == plainly[1]


def test_of_a_whole_mbpp_file_the_test_split_is_asked(own):
    rows = [SQUARE | {"task_id": i} for i in range(1, 975)]
    assert MBPP(own("mbpp", rows)).ids() == [f"MBPP/{i}" for i in range(11, 511)]
    assert len(MBPP(own("mbpp", rows[:20])).ids()) == 20  # a file of one's own is taken as it is


def test_the_published_settings_are_the_defaults(own, plainly):  # noqa: F811
    human = HumanEval(own("humaneval", [ADD])).facts()
    assert [human[key] for key in ("samples", "temperature", "top_p", "max_new_tokens")] == [20, 0.2, 0.95, 512]
    assert human["stops"] == ["\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>"]
    mbpp = MBPP(own("mbpp", [SQUARE])).facts()
    assert [mbpp[key] for key in ("samples", "temperature", "top_p", "max_new_tokens")] == [16, 0.1, 0.95, 512]
    assert mbpp["stops"] == ["\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"]
    for facts in (human, mbpp):
        assert json.loads(json.dumps(facts)) == facts
        assert facts["confined"] is True
        assert "0.8" in facts["published"]
        assert len(facts["source"]["sha256"]) == 64


def test_greedy_results_do_not_depend_on_a_seed(own, plainly):  # noqa: F811
    items = own("humaneval", [ADD])
    one, other = (HumanEval(items, samples=1, temperature=0, seed=seed).facts() for seed in (0, 1))
    assert one == other
    assert one["greedy"]
    assert HumanEval(items, seed=1).facts() != HumanEval(items).facts()


def test_an_answer_is_the_same_whichever_part_it_is_asked_in(own, subject, plainly):  # noqa: F811
    rows = [ADD | {"task_id": f"t{i}", "prompt": f"def add(a, b):{' ' * i}\n"} for i in range(4)]
    task = HumanEval(own("humaneval", rows), samples=3, temperature=0.9, max_new_tokens=12)
    whole = task.answer(subject, [0, 1, 2, 3], bar())
    parts = task.answer(subject, [3], bar()) + task.answer(subject, [1, 0], bar()) + task.answer(subject, [2], bar())
    assert sorted(parts, key=lambda answer: answer["id"]) == whole
    assert [answer["id"] for answer in task.answer(subject, [2, 0], bar())] == ["t2", "t0"]
    assert len({sample["text"] for sample in whole[0]["samples"]}) > 1


def test_without_confinement_nothing_is_written_and_nothing_run(own, subject, monkeypatch, unconfined):  # noqa: F811
    monkeypatch.setattr(code_tasks, "write", lambda *args: pytest.fail("it wrote"))
    for task in (HumanEval(own("humaneval", [ADD])), MBPP(own("mbpp", [SQUARE]))):
        for ask in (task.facts, lambda task=task: task.answer(subject, [0], bar())):
            with pytest.raises(ConfigError, match=r"^programs cannot be confined here: .*the network") as caught:
                ask()
            assert "\n" not in str(caught.value)
        assert list(task.texts())  # what only reads items needs no confinement
    facts = HumanEval(own("humaneval", [ADD]), unsafe=True).facts()
    assert facts["confined"] is False  # who asks for it gets it, and it is said


def test_really_confined_programs_pass_and_fail(own, says, subject):  # noqa: F811
    needs_confinement()
    task = HumanEval(own("humaneval", [ADD]), samples=3)
    says(["\n    return a + b", "\n    return 4", "\n    return open('/etc/passwd')"])
    (answer,) = task.answer(subject, [0], bar())
    assert [sample["status"] for sample in answer["samples"]] == ["passed", "failed", "failed"]
    assert task.facts()["confined"]


def test_what_confines_is_tried_out_once_a_task_and_parts_are_of_about_as_many_texts(own, monkeypatch, plainly):  # noqa: F811
    task = HumanEval(own("humaneval", [ADD]))
    first = task.facts()
    monkeypatch.setattr(code_tasks, "run_programs", lambda *args: pytest.fail("it looked again"))
    assert task.facts() == first
    parts = [HumanEval(own("humaneval", [ADD]), samples=n).part for n in (1, 20, 200)]
    assert parts == [128, 6, 1]


def test_metrics_are_pass_at_1_and_10_without_chance(own):
    task = HumanEval(own("humaneval", [ADD]))
    answers = [{"id": str(c), "n": 20, "passed": c} for c in (0, 5, 20)]
    metrics = task.metrics(answers)
    assert list(metrics) == ["pass@1", "pass@10"]
    assert metrics["pass@1"].value == pytest.approx(25 / 60)
    assert metrics["pass@1"].chance is None
    assert not metrics["pass@1"].at_chance
    assert metrics["pass@10"].value > metrics["pass@1"].value
    assert list(task.metrics([{"id": "a", "n": 1, "passed": 1}])) == ["pass@1"]


def test_what_is_stored_of_a_sample_is_bounded(own, says, subject, monkeypatch, plainly):  # noqa: F811
    long = "\n    return a + b  # " + "x" * 100_000
    says([long])
    real = code_tasks.run_programs

    def chatty(*args):
        return [replace(outcome, detail="y" * 10_000) for outcome in real(*args)]

    monkeypatch.setattr(code_tasks, "run_programs", chatty)
    (answer,) = HumanEval(own("humaneval", [ADD]), samples=1, temperature=0).answer(subject, [0], bar())
    assert answer["passed"] == 1
    assert long in plainly[0]  # what is run is all of it
    assert len(json.dumps(answer)) < 6000


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("humaneval", ADD | {"prompt": 3}, "item 2: prompt: expected a text"),
        ("humaneval", {k: v for k, v in ADD.items() if k != "test"}, "item 2: test: expected a text"),
        ("humaneval", ADD, "item 2: task_id: expected each once, HumanEval/0 is there twice"),
        ("mbpp", SQUARE | {"task_id": None}, "item 2: task_id: expected a number or a name"),
        ("mbpp", SQUARE, "item 2: task_id: expected each once, MBPP/11 is there twice"),
        ("mbpp", SQUARE | {"task_id": 12, "test_list": []}, "item 2: test_list: expected a list of assertions"),
        ("mbpp", SQUARE | {"task_id": 12, "test_list": [1]}, "item 2: test_list: expected a list of assertions"),
        ("mbpp", SQUARE | {"task_id": 12, "text": None}, "item 2: text: expected a text"),
        ("mbpp", {"task_id": 12, "text": "x"}, "item 2: test_list: expected a list of assertions, or MBXP's test"),
        ("mbpp", MBXP_SQUARE | {"task_id": "12", "test": "def ("}, "item 2: test: expected Python"),
        ("mbpp", MBXP_SQUARE | {"task_id": "12", "test": "pass"}, "item 2: test_list: expected a list of assertions"),
    ],
)
def test_a_damaged_row_is_one_line_with_file_and_key(own, name, row, message):
    items = own(name, [ADD if name == "humaneval" else SQUARE, row])
    with pytest.raises(DataError) as caught:
        (HumanEval if name == "humaneval" else MBPP)(items)
    assert f"{name}.jsonl: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_packages_items_are_the_published_ones():
    human, mbpp = HumanEval(Items()), MBPP(Items())
    assert (len(human.ids()), len(mbpp.ids())) == (164, 500)
    assert (human.ids()[0], mbpp.ids()[0], mbpp.ids()[-1]) == ("HumanEval/0", "MBPP/11", "MBPP/510")
    assert all(text.strip() for task in (human, mbpp) for _, text in task.texts())
