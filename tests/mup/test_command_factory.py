"""`crystal audit` and `crystal coord-check` of a user's own models: MODULE:NAME."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from command import crystal, crystal_process

HERE = Path(__file__).parent
QUICK = ("--widths", "16,32,64", "--seeds", "1", "--steps", "2")


def own(command, family, *flags):
    return crystal(command, f"tests.mup.own_models:Families.{family}", *flags, cwd=HERE.parents[1])


@pytest.mark.parametrize("family", ["right", "dict_batch", "own_calls"])
def test_a_right_family_passes_the_audit(family):
    done = own("audit", family)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"PASS  tests.mup.own_models:Families.{family}: mup, ")


@pytest.mark.parametrize("family", ["right", "dict_batch"])
def test_a_right_family_passes_the_coordinate_check(family):
    done = own("coord-check", family, "--seeds", "3")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(f"PASS  tests.mup.own_models:Families.{family}, mup: widths 64, 128, 256, 3 seeds")


@pytest.mark.parametrize("command", ["audit", "coord-check"])
def test_a_wrong_one_fails_and_the_tensor_is_named(command):
    done = own(command, "one_rate")
    assert done.returncode == 1
    assert "b.weight" in done.stdout
    assert "its LR is not divided by the width multiplier (optimizer group 0)" in done.stdout


def test_json_is_alone_on_stdout_whatever_the_users_code_prints():
    for command, flags in (("audit", ()), ("coord-check", QUICK)):
        done = crystal(command, f"{HERE}/own_models.py:factory", "--json", *flags)
        result = json.loads(done.stdout)
        assert {"verdict", "seconds", "tensors", "notes", "accepted"} <= result.keys()
        assert "a line of the user's own" in done.stderr


def test_a_module_is_found_here_and_its_target_and_base_are_chosen(tmp_path):
    (tmp_path / "my_models.py").write_text((HERE / "own_models.py").read_text())
    done = crystal_process("audit", "my_models:Families.one_rate", "--base", "32", "--width", "96", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "expected m^-1" in done.stdout
    assert "from width 32 to" in done.stdout


def test_the_parametrization_is_the_familys_or_the_flags():
    assert "Families.sp: sp, " in own("audit", "sp").stdout
    assert "Families.sp: mup, " in own("audit", "sp", "--parametrization", "mup").stdout


def test_out_holds_the_check_alone(tmp_path):
    done = own("coord-check", "right", *QUICK, "--out", tmp_path / "out")
    assert done.stdout.count("written: ") == 3, done.stderr
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f"coord-check.{end}" for end in ("json", "png", "html")}
    assert "for comparison" not in (tmp_path / "out" / "coord-check.html").read_text()


def test_what_is_accepted_decides_nothing_and_is_said():
    plain = own("audit", "unread")
    assert plain.returncode == 1
    assert "  inconclusive: c.weight: what it gives goes into _fft_r2c" in plain.stdout
    accepting = own("audit", "unread", "--accept", "c.*", "--accept", "d.*")
    assert accepting.returncode == 0
    assert "  note: accepted as INCONCLUSIVE: c.weight\n" in accepting.stdout
    assert "  note: accept d.*: nothing of that name is INCONCLUSIVE\n" in accepting.stdout
    result = json.loads(own("audit", "unread", "--accept", "c.weight", "--json").stdout)
    assert (result["verdict"], result["accepted"]) == ("PASS", ["c.weight"])


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("nothere", "expected a function Families.nothere in tests.mup.own_models; there is none"),
        ("rigth", "did you mean 'right'?"),
        ("number", "expected a function from a width to a torch.nn.Module, got int"),
        ("instance", "expected a function from a width to a torch.nn.Module, got Linear"),
        ("nothing", "expected a torch.nn.Module at width 64, got None"),
        ("raises", "RuntimeError: no such width (tests/mup/own_models.py:"),
        ("raises_later", "AssertionError (tests/mup/own_models.py:"),
        ("exits", "SystemExit: usage: own_models"),
        ("no_optimizer", "optimizer: expected a torch.optim.Optimizer, or a list of them, got None"),
        ("no_rule", "optimizer LBFGS: it takes steps of a line search"),
        ("not_scalar", "loss: expected a tensor of one number, got one of shape (64, 10)"),
        ("no_gradient", "loss: expected a tensor with a gradient"),
        ("bad_loss", "RuntimeError: size mismatch"),
        ("bad_batch", "ZeroDivisionError: division by zero (tests/mup/own_models.py:"),
        ("bad_calls", "calls: expected a dict of functions of the model"),
        ("bad_layouts", "layouts: expected a dict, got list"),
        ("bad_rules", "parametrization: expected one of sp, mup, crystalcoder, completep, got 'mupp'"),
        ("bad_optimizer", "optimizer: expected a function optimizer(model), got module"),
    ],
)
@pytest.mark.parametrize("command", ["audit", "coord-check"])
def test_a_mistake_is_one_line_that_names_the_family(command, family, words):
    done = own(command, family)
    lines = [line for line in done.stderr.splitlines() if "models 0/" not in line]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), done
    assert lines[0].startswith(f"crystal: tests.mup.own_models:Families.{family}: ")
    assert words in lines[0]


def test_a_call_that_cannot_be_made_is_a_mistake():
    done = own("audit", "bad_call")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "the call x raised AttributeError: 'Mlp' object has no attribute 'generate'" in done.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "expected a module broken_models that can be imported from "),
        ("import not_there_at_all", "ModuleNotFoundError: No module named 'not_there_at_all' (broken_models.py:1)"),
        ("def f(:", "SyntaxError: invalid syntax (broken_models.py, line 1)"),
        ("raise ValueError('a\\nb')", "importing broken_models raised ValueError: a (broken_models.py:1)"),
        ("def f(width): ...", "expected a function optimizer(model) in its module, or as its attribute; there is none"),
        ("def f(w): ...\ndef optimizer(m): ...", "expected a function loss(model, batch) in its module"),
        ("def f(w): ...\noptimizer = loss = f", "expected a function batch(seed) in its module"),
    ],
)
def test_a_module_that_does_not_do_is_one_line(tmp_path, monkeypatch, content, words):
    if content is not None:
        (tmp_path / "broken_models.py").write_text(content)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    done = crystal("audit", "broken_models:f", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("audit", "models:"), "expected MODULE:NAME or FILE.py:NAME"),
        (("audit", "models.py"), "expected MODULE:NAME or FILE.py:NAME"),
        (("audit", "nowhere/models.py:f"), "nowhere/models.py: expected a Python file; there is none"),
        (("audit", "amber", "--width", "96"), "--width: expected MODULE:NAME before it"),
        *(
            (("coord-check", "models:f", *flag.split()), f"{flag.split()[0]}: expected a model or run before it")
            for flag in ("--depths 2,4,8", "--lr 0.1", "--data demo", "--under fsdp", "--dtype bf16")
        ),
        (("coord-check", "models:f", "--widths", "8,16"), "--widths: expected at least three"),
    ],
)
def test_a_flag_that_does_not_fit_is_one_line(arguments, words):
    done = crystal(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert words in done.stderr


def test_a_check_that_cannot_be_made_of_a_zoo_model_is_one_line(monkeypatch):
    from crystal.mup.verdict import CheckError

    def refuse(*_, **__):
        raise CheckError("as it happens, no")

    monkeypatch.setattr("crystal.checks.audit.audit", refuse)
    monkeypatch.setattr("crystal.checks.coord_check.coord_check", refuse)
    for command in ("audit", "coord-check"):
        done = crystal(command, "amber")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "crystal: amber: as it happens, no\n"


def test_accepting_reaches_the_checks_of_the_zoo(monkeypatch):
    seen = []
    for place in ("crystal.checks.audit.audit", "crystal.checks.coord_check.coord_check"):
        module, _, name = place.rpartition(".")
        original = getattr(importlib.import_module(module), name)
        monkeypatch.setattr(place, lambda *a, original=original, **k: seen.append(k["accept"]) or original(*a, **k))
    crystal("audit", "amber-w64-l2", "--accept", "a", "--accept", "b.*")
    crystal("coord-check", "amber", *QUICK, "--accept", "c")
    assert seen == [("a", "b.*"), ("c",)]
