"""TriviaQA, GSM8K and DROP as lm-eval asks and judges them."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_subject import run, subject  # noqa: F401

import crystal.evaluation.question_answering as question_answering
from crystal.errors import DataError
from crystal.evaluation.multiple_choice import encoded
from crystal.evaluation.question_answering import drop, drop_score, gsm8k, gsm8k_score, trivia_score, triviaqa
from crystal.evaluation.scorer import score_tokens
from crystal.evaluation.suites import suite_of
from crystal.evaluation.writing import Written
from crystal.output.progress import Bar


def trivia(number, question="Who is it", value="Bacall", aliases=("Lauren Bacall", "Bacall")):
    return {"question": question, "question_id": f"q{number}", "answer": {"value": value, "aliases": list(aliases)}}


def sum_of(number):
    return {"question": f"What is {number} and 1?", "answer": f"It is {number + 1}.\n#### {number + 1}"}


def passage(number, answers=(("the Lions",), ("Lions", "Bears"))):
    return {"passage": f"Passage {number}.", "question": "Who won?", "answers": [list(a) for a in answers]}


ROWS = {"triviaqa": trivia, "gsm8k": sum_of, "drop": passage}
MAKE = {"triviaqa": triviaqa, "gsm8k": gsm8k, "drop": drop}


@pytest.fixture
def says(monkeypatch):
    """says(texts) → the model writes these in their order; returns the prompts' ids and stop strings it was given."""

    def install(texts):
        asked = []

        def write(decoder, tokenizer, prompts, stops, ends, sampling):
            asked.append((prompts, stops, sampling))
            yield [(number, Written(text, "stop", [5], 0)) for number, text in reversed(list(enumerate(texts)))]

        monkeypatch.setattr(question_answering, "write", write)
        return asked

    return install


def bar(total=None):
    return Bar(Console(quiet=True), "", total)


# judging


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        (" Lauren Bacall", 1),
        ("  lauren bacall\t", 1),
        (" St Louis", 1),  # the alias has a full stop
        (" BACALL!", 1),
        (" Bacall, who", 0),
        (" the Bacall", 0),  # articles count
        (" Lauren  Bacall", 0),  # spaces inside count
        ("", 0),
    ],
)
def test_trivia_takes_any_alias_whatever_its_case_and_punctuation(text, exact):
    assert trivia_score(text, ("Lauren Bacall", "Bacall", "St. Louis")) == {"exact_match": exact}


@pytest.mark.parametrize(
    ("text", "right", "strict", "flexible"),
    [
        (" 9 * 2 = 18\n#### 18\n\n", "#### 18", 1, 1),
        (" so #### 18.", "#### 18", 1, 1),
        (" The answer is $1,800.", "#### 1,800", 0, 1),
        (" #### 1800", "#### 1,800", 1, 1),
        (" #### 3 and then #### 4", "#### 3", 1, 0),  # the first strictly, the last flexibly
        (" #### 3 and then #### 4", "#### 4", 0, 1),
        (" #### -5", "#### -5", 1, 1),
        (" #### $5", "#### 5", 0, 1),  # a dollar sign is not what the strict form looks for
        ("####18", "#### 18", 0, 1),
        (" eighteen", "#### 18", 0, 0),
        (" 18 ...", "#### 18", 0, 0),  # the flexible form takes '...' for a number
        (" 18.0", "#### 18", 0, 0),
        ("", "#### 18", 0, 0),
        (" 7", "1 #### 5\n#### 7", 0, 1),
    ],
)
def test_gsm8k_takes_the_number_that_lm_eval_takes(text, right, strict, flexible):
    assert gsm8k_score(text, (right,)) == {"exact_match": strict, "flexible_extract": flexible}


@pytest.mark.parametrize(
    ("text", "right", "exact", "f1"),
    [
        (" The Lions", [["Lions"]], 1, 1),
        (" Detroit Lions", [["Lions"]], 0, 0.67),  # P 1/2, R 1
        (" Lions", [["Lions", "Bears"]], 0, 0.5),  # one of two spans
        (" Lions Bears", [["Lions", "Bears"]], 0, 0.33),  # F1 2/3 with either, of two
        (" 4", [["4"]], 1, 1),
        (" 4.0", [["4"]], 1, 1),
        (" 4 yards", [["4"]], 0, 0.67),
        (" 5 yards", [["4 yards"]], 0, 0),  # its number was not said
        (" yards", [["4 yards"]], 0, 0),
        (" 5 yards", [["yards"]], 0, 0.67),  # a number too many is a word too many
        (" 23-yard", [["23 yard"]], 1, 1),
        (" 5", [["4"], ["5"]], 1, 1),  # the best of several
        ("", [["Lions"]], 0, 0),
        ("", [["the"]], 1, 1),  # an article is nothing
        (" Smith's", [["smiths"]], 1, 1),
    ],
)
def test_drop_by_hand(text, right, exact, f1):
    scores = drop_score(text, tuple(map(tuple, right)))
    assert (scores["exact_match"], scores["f1"]) == (exact, f1)


def test_drop_says_beside_it_what_the_first_line_is_worth():
    scores = drop_score(" 4\n\nComing off their win 3 ", (("4",),))
    assert (scores["exact_match"], scores["f1"]) == (0, 0)  # "4\n\nComing" is one word to lm-eval
    assert (scores["exact_match_first_line"], scores["f1_first_line"]) == (1, 1)


words = st.lists(
    st.sampled_from(
        ["the", "a", "Lions", "23-yard", "4", "4.0", "1,000", "$5", "St.", "O'Hare", "\n\n", "nan", "", "é"]
    ),
    max_size=5,
).map(" ".join)


@given(
    text=words | st.text(max_size=30), right=st.lists(st.lists(words, min_size=1, max_size=3), min_size=1, max_size=3)
)
def test_drop_agrees_with_lm_eval(text, right):
    theirs = pytest.importorskip("lm_eval.tasks.drop.utils")
    pytest.importorskip("scipy")
    right = [spans for spans in right if spans[0].strip()] or [["x"]]
    scores = drop_score(text, tuple(map(tuple, right)))
    expected = theirs.process_results({"answers": right}, [text])
    assert scores["exact_match"] == expected["em"]
    assert scores["f1"] == pytest.approx(expected["f1"])


@given(text=st.text("#### 0123456789.,$-\nab", max_size=40), right=st.text("0123456789.,$-", min_size=1, max_size=6))
def test_gsm8k_agrees_with_lm_eval(text, right):
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    theirs = pytest.importorskip("lm_eval.api.metrics").exact_match_hf_evaluate
    right = f"It is 5.\n#### {right}"
    scores = gsm8k_score(text, (right,))
    for name, pattern, group in (
        ("exact_match", r"#### (\-?[0-9\.\,]+)", 0),
        ("flexible_extract", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    ):
        found = extraction.RegexFilter(pattern, group).apply([[text]], [{}])[0][0]
        ignored = [",", r"\$", r"(?s).*#### ", r"\.$"]
        expected = theirs([found], [right], regexes_to_ignore=ignored, ignore_case=True)["exact_match"]
        assert scores[name] == expected


@given(text=words, aliases=st.lists(words, min_size=1, max_size=3))
def test_trivia_agrees_with_lm_eval(text, aliases):
    theirs = pytest.importorskip("lm_eval.api.metrics").exact_match_hf_evaluate
    several = theirs([text.strip()] * len(aliases), aliases, ignore_case=True, ignore_punctuation=True)
    assert trivia_score(text, tuple(aliases))["exact_match"] == (several["exact_match"] > 0)


@pytest.mark.parametrize(
    ("name", "task"), [("triviaqa", "triviaqa/default"), ("gsm8k", "gsm8k/gsm8k"), ("drop", "drop/default")]
)
def test_stop_strings_and_prompts_are_those_of_lm_eval(own, name, task):
    lm_eval = pytest.importorskip("lm_eval")
    text = (Path(lm_eval.__file__).parent / "tasks" / f"{task}.yaml").read_text()
    config = yaml.safe_load(re.sub(r"!function \S+", "null", text))
    row = ROWS[name](0)
    made = MAKE[name](own(name, [row]), shots=0)
    assert list(made.stops) == config["generation_kwargs"]["until"]
    prompt = re.sub(r"\{\{(\w+)\}\}", lambda match: row[match[1]], config["doc_to_text"])
    assert made.questions[0].prompt == prompt
    assert made.questions[0].shown.startswith(config.get("target_delimiter", " "))


# items and examples


def test_prompts_have_the_last_items_as_examples_and_these_are_not_asked(own):
    task = triviaqa(own("triviaqa", [trivia(0), trivia(1, "Where"), trivia(2, "When")]), shots=2)
    assert task.ids() == ["q0"]
    assert task.front == ("Question: Where?\nAnswer: Lauren Bacall\n\nQuestion: When?\nAnswer: Lauren Bacall\n\n")
    assert task.questions[0].gold == " Bacall"
    assert list(task.texts()) == [("q0", "Question: Who is it?\nAnswer: Bacall")]
    assert "last of the file, which are not asked: not the leaderboard's" in task.facts()["exemplars"]


def test_examples_of_drop_show_the_answer_right_behind_the_question(own):
    task = drop(own("drop", [passage(0), passage(1, [["A", "B"]])]), shots=1)
    assert task.front == "Passage 1. Who won?A,B\n\n"


def test_the_users_examples_come_first_and_all_items_are_asked(own):
    own("gsm8k", [sum_of(1), sum_of(2)])
    task = gsm8k(own("gsm8k-shots", [sum_of(7), sum_of(8)]), shots=1)
    assert task.ids() == ["0", "1"]
    assert task.front == "Question: What is 7 and 1?\nAnswer: It is 8.\n#### 8\n\n"
    assert task.facts()["exemplars"] == "of the user's"
    assert task.facts()["exemplars_source"]["file"].endswith("gsm8k-shots.jsonl")


def test_gsm8k_goes_by_its_published_file_name_too(own):
    assert gsm8k(own("gsm8k_test", [sum_of(1)]), shots=0).ids() == ["0"]


def test_no_examples(own):
    task = drop(own("drop", [passage(0)]), shots=0)
    assert task.front == ""
    assert "exemplars" not in task.facts()


def test_drop_as_it_is_published(own):
    date = {"day": "", "month": "", "year": ""}
    row = {
        "passage": "P.", "question": "Q?", "query_id": "x",
        "answer": {"number": "", "date": {"day": "3", "month": "May", "year": "1542"}, "spans": []},
        "validated_answers": {
            "number": ["", "", "4"], "date": [date, date, date], "spans": [["Nice", "Polin"], ["Nice", "Polin"], []],
        },
    }  # fmt: skip
    question = drop(own("drop", [row]), shots=0).questions[0]
    assert question.right == (("3 May 1542",), ("Nice", "Polin"), ("4",))
    theirs = pytest.importorskip("lm_eval.tasks.drop.utils")
    assert tuple(theirs.get_answers(row)) == question.right


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("triviaqa", {"answer": {"aliases": ["x"]}}, "no key 'question'"),
        ("triviaqa", trivia(0, aliases=()), "answer.aliases: expected text"),
        ("triviaqa", {"question": "Q", "answer": "x"}, "answer: expected an object"),
        ("triviaqa", trivia(0, value="  "), "expected an answer that is not empty"),
        ("gsm8k", {"question": "Q", "answer": "18"}, "expected '#### ' and a number"),
        ("gsm8k", {"question": 3, "answer": "#### 18"}, "question: expected text"),
        ("drop", passage(0, [[""]]), "expected one at least that is not empty"),
        ("drop", {"passage": "P", "question": "Q", "answers": "x"}, "answers: expected a list"),
        ("drop", {"passage": "P", "question": "Q", "answers": [[3]]}, "answers: expected text"),
        ("drop", {"passage": "P", "question": "Q"}, "no key 'validated_answers'"),
        ("drop", {"passage": "P", "question": "Q", "answer": 3, "validated_answers": []}, "not an item of this set"),
    ],
)
def test_a_row_of_another_form_is_named(own, name, row, said):
    with pytest.raises(DataError) as caught:
        MAKE[name](own(name, [ROWS[name](7), row]), shots=0)
    assert f"{name}.jsonl: line 2" in str(caught.value)
    assert said in str(caught.value)


def test_two_items_of_one_id_are_refused(own):
    with pytest.raises(DataError, match=r"line 2.*q1 is there twice"):
        triviaqa(own("triviaqa", [trivia(1), trivia(1)]), shots=0)


def test_too_few_items_for_the_examples_are_refused(own):
    with pytest.raises(DataError, match=r"drop.jsonl: expected 2 examples, and items beside them, got 2"):
        drop(own("drop", [passage(0), passage(1)]), shots=2)
    with pytest.raises(DataError, match=r"drop-shots.jsonl: expected 2 examples"):
        drop(own("drop-shots", [passage(2)]), shots=2)


def test_half_a_surrogate_pair_is_no_reason_to_stop(own):
    task = triviaqa(own("triviaqa", [trivia(0, "\ud800 what", "\ud800", ["\ud800"])]), shots=0)
    assert task.questions[0].prompt == "Question: ? what?\nAnswer:"


# answering


def test_answers_are_judged_and_told(own, subject, says):  # noqa: F811
    rows = [sum_of(1), sum_of(2), sum_of(3), sum_of(4)]
    task = gsm8k(own("gsm8k", rows), shots=1)
    asked = says([" #### 2", " It is 3"])
    shown = bar(2)
    answers = task.answer(subject, [0, 1], shown)
    assert shown.completed == 2
    [(prompts, stops, sampling)] = asked
    prompt = task.front + "Question: What is 2 and 1?\nAnswer:"
    assert prompts[1][0] == [*subject.start, *subject.tokenizer.encode(prompt)]
    assert "Question:" in stops
    assert sampling.facts()["greedy"]
    assert [(a["id"], a["exact"], a["scores"]["flexible_extract"]) for a in answers] == [("0", 1, 1), ("1", 0, 1)]
    json.dumps(answers)
    metrics = task.metrics(answers)
    assert list(metrics) == ["exact_match", "flexible_extract", "bits_per_byte"]
    assert metrics["exact_match"].value == 0.5
    assert metrics["exact_match"].stderr == pytest.approx(0.5)
    assert metrics["flexible_extract"].value == 1
    assert task.metrics([]) == {}


def test_bits_are_those_of_the_right_answer(own, subject, says):  # noqa: F811
    task = triviaqa(own("triviaqa", [trivia(0, "Q", "of the")]), shots=0)
    says([""])
    [answer] = task.answer(subject, [0], bar())
    [scored] = score_tokens(subject.decoder, encoded(subject, [("Question: Q?\nAnswer:", " of the")]))
    assert answer["bits"] == pytest.approx(-scored.total / math.log(2), rel=1e-5)
    assert answer["bytes"] == len("of the")
    assert task.metrics([answer])["bits_per_byte"].value == pytest.approx(answer["bits"] / 6)


def test_an_answer_longer_than_the_model_sees_is_scored_whole(own, subject, says):  # noqa: F811
    limit = subject.decoder.config.max_seq_len
    row = {"question": "Q", "answer": "of the and to in " * limit + "#### 1"}
    task = gsm8k(own("gsm8k", [row]), shots=0)
    says([""])
    [answer] = task.answer(subject, [0], bar())
    tokens = len(subject.tokenizer.encode(row["answer"]))
    assert tokens > 2 * limit
    assert 0 < answer["bits"] < 20 * tokens
    assert answer["bytes"] == len(row["answer"])


def test_what_is_stored_of_a_text_is_bounded_and_what_is_judged_is_not(own, subject, says):  # noqa: F811
    task = gsm8k(own("gsm8k", [sum_of(1)]), shots=0)
    says(["x" * 5000 + "#### 2"])
    [answer] = task.answer(subject, [0], bar())
    assert len(answer["text"]) == 1000
    assert answer["exact"] == 1


@pytest.mark.parametrize("name", MAKE)
def test_a_tiny_model_answers_each_set(own, subject, name):  # noqa: F811
    task = MAKE[name](own(name, [ROWS[name](number) for number in range(5)]), shots=2)
    answers = task.answer(subject, [0, 2], bar())
    assert [a["id"] for a in answers] == [task.ids()[0], task.ids()[2]]
    assert all(a["bits"] > 0 and a["exact"] in (0, 1) for a in answers)
    again = task.answer(subject, [2], bar())
    assert again[0]["text"] == answers[1]["text"]
    assert again[0]["bits"] == pytest.approx(answers[1]["bits"], rel=1e-4)


def test_a_prompt_that_the_model_has_no_room_for_is_cut_and_says_so(own, subject):  # noqa: F811
    row = passage(0) | {"passage": "of the and to " * 100}
    [answer] = drop(own("drop", [row]), shots=0).answer(subject, [0], bar())
    assert answer["cut"] > 0


# suites


def test_they_are_tasks_of_their_own_names(own):
    items = own("drop", [passage(number) for number in range(5)])
    [task] = suite_of("drop", items).tasks
    assert (task.name, task.facts()["shots"]) == ("drop-3shot", 3)
    [task] = suite_of("drop-1shot", items).tasks
    assert (task.name, len(task.ids())) == ("drop-1shot", 4)


def test_facts_change_with_whatever_changes_the_numbers(own):
    task = triviaqa(own("triviaqa", [trivia(number) for number in range(5)]), shots=2)
    facts = task.facts()
    assert json.loads(json.dumps(facts)) == facts
    assert {"shots", "stops", "prompt", "normalisation", "exemplars", "source", "max_new_tokens"} <= set(facts)
    assert facts["source"].keys() == {"file", "sha256", "license"}
    fewer = triviaqa(own("triviaqa", [trivia(number) for number in range(5)]), shots=1)
    assert fewer.facts() != facts
