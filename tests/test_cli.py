"""The command: exit codes, one line for a mistake, and the JSON that tools rely on."""

import json
import subprocess
import sys

import pytest

from crystal.cli import app, main


@pytest.fixture
def crystal(capsys, monkeypatch):
    """crystal(*words) → (exit code, stdout, stderr), in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["crystal", *words])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def as_json(result):
    code, out, err = result
    assert code == 0, err
    return json.loads(out)


def test_models_lists_the_presets_with_exact_counts(crystal):
    models = {m["name"]: m["parameters"] for m in as_json(crystal("models", "--json"))["models"]}
    assert models["amber-7b"] == 6_738_415_616
    assert models["crystalcoder-7b"] == 6_575_278_720


def test_a_model_is_described_with_its_plan(crystal):
    model = as_json(crystal("models", "crystalcoder-7b", "--plan", "--json"))
    assert model["parameters"] == 6_575_278_720
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
        (("train", "demo", "model.d_modle=3"), "command line: model.d_modle: unknown key; did you mean 'd_model'?"),
        (("train", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (("train", "demo", "seed"), "seed: expected dotted.key=value"),
        (("schedule", "demo", "--stage", "9"), "--stage: expected 1 to 3, got 9"),
        (("schedule", "demo", "--at", "1,x"), "--at: expected steps such as 1,86,1500, got 1,x"),
        (("generate", "nowhere"), "nowhere: expected a checkpoint"),
        (("logits", "nowhere", "--ids", "a.npy", "--out", "b.npy"), "nowhere: expected a checkpoint"),
        (("import", "nowhere", "--to", "x"), "nowhere"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(crystal, words, message):
    code, out, err = crystal(*words)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("words", [("modles",), ("models", "--jsno"), ("train",), ("schedule", "demo", "--stage", "x")])
def test_usage_errors_exit_2_too(crystal, words):
    code, out, err = crystal(*words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_help_does_not_load_torch():
    code = "import sys, crystal.cli; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'transformers', 'mup')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_command_has_help():
    assert {c.name or c.callback.__name__ for c in app.registered_commands} >= {
        "models", "prepare", "train", "schedule", "import", "logits", "generate",
    }  # fmt: skip
    assert all(c.callback.__doc__ for c in app.registered_commands)
