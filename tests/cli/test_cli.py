"""The command: exit codes, one line for a mistake, and the JSON that tools rely on."""

import json
import os
import resource
import subprocess
import sys
from math import prod

import pytest

from crystal import __version__
from crystal.cli.main import app


def as_json(result):
    code, out, err = result
    assert code == 0, err
    value = json.loads(out)
    assert isinstance(value, dict)
    assert out.count("\n") == 1, "one object on one line"
    return value


def test_models_lists_the_presets_with_exact_counts(crystal):
    models = {m["name"]: m["parameters"] for m in as_json(crystal("models", "--json"))["models"]}
    assert models["amber-7b"] == 6_738_415_616
    assert models["crystalcoder-7b"] == 6_575_278_720


def test_a_model_is_described_with_its_plan(crystal):
    assert "plan" not in as_json(crystal("models", "crystalcoder-7b", "--json"))
    model = as_json(crystal("models", "crystalcoder-7b", "--plan", "--json"))
    assert (model["name"], model["parameters"]) == ("crystalcoder-7b", 6_575_278_720)
    keys = "tensor shape role width_multiplier init_std lr_multiplier weight_decay rule".split()
    assert all(set(keys) <= set(row) for row in model["plan"])
    assert sum(prod(row["shape"]) for row in model["plan"]) == model["parameters"]
    assert model["config"]["d_ff"] == 10922
    row = next(r for r in model["plan"] if r["tensor"] == "blocks.0.attn.q.weight")
    assert (row["shape"], row["role"], row["width_multiplier"]) == ([4096, 4096], "hidden", 16)
    assert (row["init_std"], row["lr_multiplier"], row["weight_decay"]) == (0.01825, 0.0625, 0.1)
    assert "Cerebras" in row["rule"]
    assert {r["eps"] for r in model["plan"]} == {1e-9}


@pytest.mark.parametrize(
    ("run", "steps", "tokens"),
    [
        ("configs/runs/crystalcoder-7b.yaml", [79721, 214387, 27728], 1_392_061_710_336),
        ("configs/runs/amber-7b.yaml", [274320], 1_258_448_486_400),
    ],
)
def test_the_published_runs_need_no_data_to_be_read(crystal, monkeypatch, tmp_path, run, steps, tokens):
    monkeypatch.chdir(tmp_path)
    plan = as_json(crystal("train", run, "--dry-run", "--json"))
    assert [s["steps"] for s in plan["stages"]] == steps
    assert sum(s["tokens"] for s in plan["stages"]) == tokens
    for stage in plan["stages"]:
        assert {"name", "steps", "tokens", "global_batch_size", "seq_len", "sources", "fim_rate"} <= set(stage)
        assert sum(stage["sources"].values()) == pytest.approx(1)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_the_demo_keeps_the_published_proportions(crystal, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plan = as_json(crystal("train", "demo", "train.seed=7", "--dry-run", "--json"))
    assert [stage["fim_rate"] for stage in plan["stages"]] == [0, 0.9, 0.3]
    assert plan["stages"][1]["steps"] / plan["stages"][0]["steps"] == pytest.approx(214387 / 79721, rel=0.02)
    assert list(tmp_path.iterdir()) == []


def test_without_json_the_same_is_text(crystal):
    for words in (
        ("models",),
        ("models", "amber-7b", "--plan"),
        ("train", "amber-7b", "--dry-run"),
        ("schedule", "demo"),
    ):
        code, out, err = crystal(*words)
        assert (code, err) == (0, "")
        assert len(out.splitlines()) > 2


def test_schedule_gives_base_and_group_rates(crystal):
    got = as_json(crystal("schedule", "crystalcoder-7b", "--stage", "1", "--at", "1,86,1500,79721", "--json"))
    assert got["stage"] == "stage1"
    assert got["lr"]["86"] == 0.012
    assert got["lr"]["1500"] == pytest.approx(1.194295e-2, rel=1e-6)
    assert got["groups"]["hidden"]["79721"] == pytest.approx(8.786884e-3 / 16, rel=1e-6)
    assert got["groups"]["embedding"] == got["lr"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("models", "crystalcoder-8b"), "did you mean 'crystalcoder-7b'"),
        (("train", "demo", "model.d_modle=3"), "command line: model.d_modle=3: unknown key; did you mean 'd_model'?"),
        (("train", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (("train", "demo", "seed"), "seed: expected dotted.key=value"),
        (("schedule", "demo", "--stage", "9"), "--stage: expected 1 to 3, got 9"),
        (("schedule", "demo", "--at", "1,x"), "--at: expected steps such as 1,86,1500, got 1,x"),
        (("generate", "nowhere"), "nowhere: expected a checkpoint"),
        (("logits", "nowhere", "--ids", "a.npy", "--out", "b.npy"), "nowhere: expected a checkpoint"),
        (("import", "nowhere", "--to", "x"), "nowhere"),
        (("train", "amber-7b.yml", "--dry-run"), "amber-7b.yml: no such file; did you mean 'amber-7b'?"),
        (
            ("train", "demo", "model.n_heads=3", "--dry-run"),
            "command line: model.n_heads=3: expected a divisor of d_model",
        ),
        (("modles",), "No such command 'modles'"),
        (("data", "shwo"), "No such command 'shwo'"),
        (("models", "--jsno"), "No such option: --jsno"),
        (("models", "a", "b"), "unexpected extra argument"),
        (("train",), "Missing argument 'RUN.yaml'"),
        (("schedule", "demo", "--stage", "x"), "Invalid value for '--stage'"),
        (("export", "x", "--out", "y", "--to", "z"), "Invalid value for '--to'"),
        (("generate", "x", "--max-new-tokens", "0"), "Invalid value for '--max-new-tokens'"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(crystal, words, message):
    code, out, err = crystal(*words)
    assert (code, out) == (2, "")
    assert err.startswith("crystal: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_typo_in_a_file_names_the_file(crystal, tmp_path):
    run = tmp_path / "mine.yaml"
    run.write_text("extends: runs/demo\nmodel: {d_modle: 64}\n")
    code, out, err = crystal("train", str(run))
    assert (code, out) == (2, "")
    assert err.startswith(f"crystal: {run}: model.d_modle: unknown key; did you mean 'd_model'?")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "file", "key"),
    [
        (("train", "{mine}"), "{mine}", "model.d_modle"),
        (("train", "{broken}"), "{broken}", None),
        (("train", "{bent}"), "{bent}", "curriculum.stages.0.lr.0.to"),
        (("train", "{orphan}"), "{orphan}", "extends"),
        (("train", "demo", "model.d_modle=3"), None, "model.d_modle"),
        (("config", "demo", "curriculum.stages.x.steps=3"), None, "curriculum.stages.x.steps"),
        (("train", "demo", "train.micro_batch_size=7"), None, "train.micro_batch_size"),
        (("train", "demo", "backend.name=cuda", "backend.parallel.tp=3"), None, "backend.parallel.tp"),
        (("train", "nowhere.yaml"), "nowhere.yaml", None),
        (("config", "demo", "model.d_modle"), "demo", "model.d_modle"),
        (("runs", "nowhere"), "nowhere", None),
        (("models", "crystalcoder-8b"), None, None),
        (("models", "--jsno"), None, None),
        (("modles",), None, None),
        (("train",), None, None),
        (("schedule", "demo", "--stage", "x"), None, None),
        (("export", "x", "--out", "y", "--to", "z"), None, None),
    ],
)
def test_with_json_a_mistake_is_an_object_and_the_line_besides(crystal, tmp_path, monkeypatch, words, file, key):
    monkeypatch.chdir(tmp_path)
    texts = {
        "mine": "extends: runs/demo\nmodel: {d_modle: 64}\n",
        "broken": "extends: [runs/demo\nmodel: ]",
        "bent": "extends: runs/demo\ncurriculum: {stages: [{name: a, steps: 3, sources: {english: 1}, "
        "checkpoint_every: 3, lr: [{from: 0.0, to: x}]}]}\n",
        "orphan": "extends: runs/dmeo\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    words, (file,) = [[w.format(**{n: f"{n}.yaml" for n in texts}) if w else w for w in ws] for ws in (words, [file])]
    code, out, err = crystal(*words, "--json")
    assert (code, out.count("\n"), err.count("\n")) == (2, 1, 1)
    error = json.loads(out)
    assert error == {"error": {"kind": "config", "message": err[len("crystal: ") : -1], "file": file, "key": key}}


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("models", "crystalcoder-8b"), "config"),
        (("prepare", "{run}"), "data"),
        (("generate", "{empty}", "--prompt", "x"), "checkpoint"),
        (("schedule", "demo", "--plot", "{empty}/none/x.png"), "run"),
    ],
)
def test_an_error_says_of_what_kind_it_is(crystal, tmp_path, make_run, words, kind):
    (tmp_path / "empty").mkdir()
    run = make_run(**{"data.tokenizer": {"path": str(tmp_path / "none.model")}})
    places = {"run": run, "empty": tmp_path / "empty"}
    code, out, _ = crystal(*(word.format(**places) for word in words), "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (2, kind)


def test_of_several_processes_only_the_first_tells_a_mistake(crystal, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert crystal("train", "nowhere.yaml", "--json") == (2, "", "")
    assert crystal("train", "--jsno", "--json") == (2, "", "")


def test_a_value_of_the_wrong_type_is_told_in_plain_words(crystal):
    for words, expected in (
        (("schedule", "demo", "--stage", "x"), "'--stage': expected an integer, got 'x'"),
        (("generate", "x", "--temperature", "warm"), "'--temperature': expected a number, got 'warm'"),
        (("generate", "x", "--top-p", "2"), "'--top-p': expected at most 1, got '2'"),
        (("generate", "x", "--max-new-tokens", "0"), "'--max-new-tokens': expected at least 1, got '0'"),
        (
            ("export", "x", "--to", "z"),
            "'--to': expected one of hf, native, gguf, safetensors, mdl, cerebras-yaml, got 'z'",
        ),
    ):
        _, _, err = crystal(*words)
        assert err == f"crystal: Invalid value for {expected} (see crystal {words[0]} --help)\n"
    assert crystal("train", "demo", "--until")[2].endswith("(see crystal train --help)\n")


def test_a_bare_command_shows_its_help(crystal):
    for words in ((), ("data",)):
        code, out, err = crystal(*words)
        assert (code, out) == (2, "")
        assert "Commands:" in err


def test_version(crystal):
    assert crystal("--version") == (0, f"crystal {__version__}\n", "")


def test_an_interrupt_outside_training_exits_130(crystal, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("crystal.planning.describe.listing", interrupted)
    assert crystal("models") == (130, "", "crystal: interrupted\n")


def test_our_own_mistakes_keep_their_traceback(crystal, monkeypatch):
    monkeypatch.setattr("crystal.planning.describe.listing", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        crystal("models")


def test_a_reader_that_stops_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "crystal.cli", "models", "crystalcoder-7b", "--plan"]
    run = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (0, b"")


def test_help_is_light():
    code = """
import sys
sys.argv = ["crystal", "--help"]
from crystal.cli.main import main
try:
    main()
finally:
    heavy = {"torch", "numpy", "transformers", "mup", "pyarrow", "matplotlib", "rich", "pydantic", "yaml"}
    heavy &= set(sys.modules)
    assert not heavy, heavy
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert "generate" in run.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1


def test_the_commands_are_there():
    assert {c.name or c.callback.__name__ for c in app.registered_commands} >= {
        "models", "prepare", "train", "schedule", "plan", "audit", "coord-check", "transfer", "import", "export",
        "logits", "generate", "config", "runs", "compare",
    }  # fmt: skip


def test_an_unknown_choice_of_kernels_is_one_line(tmp_path):
    settings = os.environ | {"CRYSTAL_KERNELS": "foo"}
    command = [sys.executable, "-m", "crystal.cli", "coord-check", "amber-w64-l2"]
    done = subprocess.run(command, env=settings, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "CRYSTAL_KERNELS=foo: expected one of auto" in done.stderr
