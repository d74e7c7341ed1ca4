"""lm-eval through our decoder: item by item what our own tasks give, and what its own model gives on an export."""

import copy
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import crystal
from crystal.errors import ConfigError, DataError
from crystal.evaluation.choice_sets import mmlu, multiple_choice
from crystal.evaluation.evaluate import drawn
from crystal.evaluation.items import Items
from crystal.evaluation.lm_eval_adapter import CrystalLM, run_lm_eval
from crystal.evaluation.multiple_choice import encoded
from crystal.interop.native import export_native
from crystal.output.progress import Bar

pytest_plugins = ["tiny_subject"]

WINDOW = 512
WORDS = "the of and to in a is that for it as was with be by on not he his but at are this have def return self".split()
TASKS = {"arc_local": "arc/arc_easy.yaml", "hellaswag_local": "hellaswag/hellaswag.yaml"}
TASKS["mmlu_local"] = "mmlu/default/_default_template_yaml"
SUBJECT = "the_of"


def words(seed: int, count: int) -> str:
    return " ".join(WORDS[(seed * 7 + i * (seed + 3)) % len(WORDS)] for i in range(count))


def rows(kind: str, count: int, seed: int = 0) -> list[dict]:
    """Items in the published sets' form."""
    some = range(seed, seed + count)
    if kind == "arc_easy":
        return [
            {"id": f"q{i}", "question": f"{words(i, 5)}?", "answerKey": "ABCD"[i % 4],
             "choices": {"text": [words(i + 3 * j, 1 + (i + j) % 4) for j in range(4)], "label": [*"ABCD"]}}
            for i in some
        ]  # fmt: skip
    if kind == "hellaswag":
        return [
            {"activity_label": "The of", "ctx_a": f"{words(i, 4)}. [step] ", "ctx_b": words(i + 1, 3),
             "label": str(i % 4), "endings": [f"{words(i + 5 * j, 2 + j)} [title]  and." for j in range(4)]}
            for i in some
        ]  # fmt: skip
    return [
        {"question": f" {words(i, 6)} ", "subject": SUBJECT, "choices": [words(i + j, 2) for j in range(4)],
         "answer": i % 4}
        for i in some
    ]  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Our items, and lm-eval's own tasks with these items in them."""
    import lm_eval.tasks

    place = tmp_path_factory.mktemp("tasks")
    published = Path(lm_eval.tasks.__file__).parent
    for name, first in {"arc_easy": 0, "hellaswag": 0, "mmlu": 0, "mmlu-shots": 50}.items():
        lines = [json.dumps(row) for row in rows(name, 5 if first else 12, first)]
        (place / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for name, file in TASKS.items():
        mine = {"arc_local": "arc_easy", "hellaswag_local": "hellaswag", "mmlu_local": "mmlu"}[name]
        files = {"test": str(place / f"{mine}.jsonl")}
        about = f"The following are multiple choice questions (with answers) about {SUBJECT.replace('_', ' ')}.\n\n"
        local = {
            "include": str(published / file), "task": name, "tag": None, "dataset_path": "json", "dataset_name": None,
            "training_split": None, "validation_split": None, "test_split": "test",
        }  # fmt: skip
        if name == "mmlu_local":
            files["dev"] = str(place / "mmlu-shots.jsonl")
            local |= {"description": about, "num_fewshot": 5}
        local["dataset_kwargs"] = {"data_files": files}
        (place / f"{name}.yaml").write_text(yaml.safe_dump(local))
    return place


@pytest.fixture(scope="module")
def wide(subject):
    """The trained model with room for examples."""
    decoder = copy.copy(subject.decoder)
    decoder.config = decoder.config.model_copy(update={"max_seq_len": WINDOW})
    return replace(subject, decoder=decoder)


@pytest.fixture(scope="module")
def theirs(wide, directory):
    return run_lm_eval(wide, list(TASKS), directory)


def ours(subject, directory, name):
    items = Items(directory)
    if name == "mmlu_local":
        task = mmlu(items, 5)
    else:
        task = multiple_choice(items, name.removesuffix("_local").replace("arc", "arc_easy"), 0)
    return task, task.answer(subject, range(len(task.ids())), Bar(None))


@pytest.mark.parametrize("name", TASKS)
def test_our_tasks_and_lm_evals_give_the_same_item_by_item(wide, directory, theirs, name):
    task, answers = ours(wide, directory, name)
    samples = sorted(theirs["items"][name], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(answers) == 12
    for answer, sample in zip(answers, samples, strict=True):
        found = sample["filtered_resps"]
        assert [logprob for logprob, _ in found] == pytest.approx(answer["logprobs"], abs=1e-4)
        assert [greedy for _, greedy in found] == answer["greedy"]
        of_item = task.metrics([answer])
        for metric in ("acc", "acc_norm"):
            if metric in sample:
                assert sample[metric] == of_item[metric].value
    whole, summary = task.metrics(answers), theirs["tasks"][name]
    assert summary["acc"] == pytest.approx(whole["acc"].value)
    assert summary["n"] == 12
    assert summary["stderr"] > 0
    assert ("acc_norm" in summary) == (name != "mmlu_local")


@given(st.lists(st.tuples(st.text("abthe .,\n=()01é", max_size=9), st.text("abthe .,\n=01é", min_size=1)), max_size=5))
def test_texts_become_the_tokens_that_lm_eval_makes_of_them(subject, pairs):
    pairs = [(context, continuation) for context, continuation in pairs if context.strip() or not context]
    model, seen = CrystalLM(subject), []
    model._loglikelihood_tokens = lambda requests, **_: seen.extend(requests) or [None] * len(requests)
    model.loglikelihood(asked("loglikelihood", *pairs))
    assert [(context, continuation) for _, context, continuation in seen] == encoded(subject, pairs)


@pytest.fixture(scope="module")
def hugging(run, tmp_path_factory):
    """lm-eval's own model, on the plain export of the same checkpoint."""
    from lm_eval.models.huggingface import HFLM

    place = tmp_path_factory.mktemp("plain") / "export"
    export_native(run, place)
    return HFLM(pretrained=str(place), device="cpu", dtype="float32", batch_size=4, max_length=64)


def asked(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


PAIRS = [
    ("the of and to", " in a"), ("the of and to", " is"), ("def return ", "self"), ("", "the of and"),
    (words(2, 90), " have def"), ("the  ", " of"), ("the", " "),
]  # fmt: skip


def test_log_probabilities_are_those_of_lm_evals_own_model(subject, hugging):
    mine, its = CrystalLM(subject), hugging
    found = mine.loglikelihood(asked("loglikelihood", *PAIRS))
    wanted = its.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in wanted], abs=1e-3)
    assert [x for _, x in found] == [x for _, x in wanted]
    assert (mine.max_length, mine.prefix_token_id, mine.eot_token_id) == (64, its.prefix_token_id, its.eot_token_id)


def test_whole_texts_go_in_the_windows_of_lm_evals_own_model(subject, hugging):
    texts = [(words(1, 5),), (words(3, 150),), (words(4, 61),), ("",)]
    found = CrystalLM(subject).loglikelihood_rolling(asked("loglikelihood_rolling", *texts))
    wanted = hugging.loglikelihood_rolling(asked("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_greedy_texts_are_those_of_lm_evals_own_model(subject, hugging):
    contexts = ["the of and", "def return", words(5, 60)]
    settings = {"until": [" and", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    requests = asked("generate_until", *((context, settings) for context in contexts))
    found, wanted = CrystalLM(subject).generate_until(requests), hugging.generate_until(requests, disable_tqdm=True)
    assert len(found) == len(wanted)
    for mine, its in zip(found, wanted, strict=True):
        assert mine in (its, " " + its)  # it decodes new tokens by themselves, and so loses a first word's space
    assert any(wanted)


def test_sampling_follows_the_tasks_settings(subject):
    model = CrystalLM(subject)

    def written(**settings):
        settings = {"until": [], "max_gen_toks": 16} | settings
        return model.generate_until(asked("generate_until", ("the of", settings), ("the of", settings)))

    greedy = written()
    assert greedy[0] == greedy[1]
    assert written(do_sample=True, temperature=1.5, top_k=1) == greedy
    assert written(do_sample=False, temperature=1.5) == greedy
    sampled = written(do_sample=True, temperature=1.5)
    assert sampled[0] != sampled[1]  # a repeat is another draw
    assert written(do_sample=True, temperature=1.5) == sampled
    assert written(temperature=1.5, num_beams=1) == sampled
    with pytest.raises(ConfigError, match="num_beams: 4: expected none but do_sample"):
        written(num_beams=4)


def test_a_continuation_without_room_is_one_line(subject):
    with pytest.raises(DataError, match="continuation of at most 64 tokens"):
        CrystalLM(subject).loglikelihood(asked("loglikelihood", ("the", " " + words(1, 200))))


def test_a_limit_draws_the_items_that_crystal_eval_draws(wide, directory):
    found = run_lm_eval(wide, ["arc_local"], directory, limit=5, seed=3)
    assert [sample["doc_id"] for sample in found["items"]["arc_local"]] == drawn(12, 5, 3)
    assert found["tasks"]["arc_local"]["n"] == 5
    assert found["engine"].startswith("lm-eval 0.4")


def test_lm_evals_own_command_knows_the_model_by_name(run):
    model = get_model("crystal").create_from_arg_string(
        f"checkpoint={run},dtype=bf16", {"batch_size": 8, "device": "cuda:0"}
    )
    assert next(model.subject.decoder.parameters()).dtype.itemsize == 2
    assert get_model("hf").__name__ == "HFLM"


def test_what_lm_eval_cannot_do_is_one_line(subject, directory, tmp_path):
    with pytest.raises(ConfigError, match="--suite nonsense: no such task"):
        run_lm_eval(subject, ["nonsense"], directory)
    with pytest.raises(ConfigError, match="expected a directory"):
        run_lm_eval(subject, ["arc_local"], tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="expected --include-path"):
        run_lm_eval(subject, ["arc_local"])
    broken = yaml.safe_load((directory / "arc_local.yaml").read_text())
    broken["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "missing.jsonl")}}
    (tmp_path / "arc_local.yaml").write_text(yaml.safe_dump(broken))
    with pytest.raises(ConfigError, match="lm-eval: arc_local: "):
        run_lm_eval(subject, ["arc_local"], tmp_path)


def test_published_tokenizers_own_bos_is_not_added_in_the_middle(subject):
    class Adding:
        def encode(self, text):
            return [1, *subject.tokenizer.encode(text)]

    model = CrystalLM(replace(subject, tokenizer=Adding(), start=()))
    assert model.prefix_token_id == 1
    assert model.tok_encode("the of", add_special_tokens=False) == subject.tokenizer.encode("the of")
    assert model.tok_encode("the of") == [1, *subject.tokenizer.encode("the of")]


def test_without_lm_eval_the_way_to_it_is_said(monkeypatch):
    monkeypatch.delitem(sys.modules, "crystal.evaluation.lm_eval_adapter")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'crystal-zoo\[eval\]'"):
        importlib.import_module("crystal.evaluation.lm_eval_adapter")


def test_nothing_else_imports_it():
    sources = Path(crystal.__file__).parent.rglob("*.py")
    named = [path.name for path in sources if "import lm_eval" in (text := path.read_text()) or "from lm_eval" in text]
    assert named == ["lm_eval_adapter.py"]
