"""`crystal export … --check`: one table of engines, a verdict, and the exit code that goes with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from folding import CRYSTAL, LLAMA, checkpoint, config_of, trained, weights

from crystal.checkpoint import read, write
from crystal.inference.load import load_decoder
from crystal.interop import agreement, engines, llama_cpp
from crystal.interop.agreement import stated_error
from crystal.interop.native import open_for_export

TEXTS = [p.read_text() for p in sorted(Path(__file__).parents[1].glob("*.py"))]
ENGINES = ["transformers-native", "transformers-remote-code", "llama.cpp"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A CrystalCoder with a tokenizer, small enough to be asked in a second."""
    path = tmp_path_factory.mktemp("small")
    config = config_of(CRYSTAL | {"vocab_size": 448, "max_seq_len": 192, "n_layers": 1})
    return checkpoint(path / "c", config, trained(path, TEXTS))


def has(engine):
    return engines.missing(engine) is None


def test_every_engine_that_is_there_says_the_same(small, tmp_path, crystal):
    pytest.importorskip("gguf", reason="gguf is not there: pip install gguf")
    code, out, _ = crystal("export", small, "--to", "gguf", "--out", tmp_path / "x.gguf", "--check", "--json")
    said = json.loads(out)
    assert code == 0
    assert said.keys() >= {"form", "files", "agreement", "out", "to"}
    assert (said["form"], said["files"], said["verdict"]) == ("gguf", ["x.gguf"], "PASS")
    assert set(said["agreement"]) == {engine for engine in ENGINES if has(engine)}
    assert set(said["skipped"]) == {engine for engine in ENGINES if not has(engine)}
    for engine, row in said["agreement"].items():
        assert 0 < row["max_abs"] <= row["bound"] < 1e-2
        assert row["argmax"] > 0.99
        assert row["greedy"] in ("equal", "tie")
        assert row["tokens"] is (None if engine == "transformers-remote-code" else True)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.gguf"]  # what was exported for the check alone is gone


def test_people_get_a_table(small, tmp_path, crystal):
    code, out, _ = crystal("export", small, "--to", "native", "--dtype", "bf16", "--out", tmp_path / "x", "--check")
    assert code == 0
    head, *lines = out.splitlines()[1:]
    assert head.split() == [
        "engine",
        "dtype",
        "max",
        "|Δ|",
        "median",
        "|Δ|",
        "allowed",
        "argmax",
        "greedy",
        "text",
        "tokenizer",
    ]
    rows = {line.split()[0]: line.split() for line in lines}
    assert rows["transformers-native"][1] == "bf16"
    assert rows["transformers-native"][6:] == ["-", "equal", "PASS"]  # rounded weights: no greedy text
    if has("llama.cpp"):
        assert rows["llama.cpp"][1] == "fp32"
        assert rows["llama.cpp"][7:] == ["equal", "PASS"]


def test_an_engine_that_is_not_there_is_said_with_its_install(small, tmp_path, crystal, monkeypatch):
    monkeypatch.setattr(llama_cpp, "library", lambda: None)
    code, out, _ = crystal("export", small, "--to", "native", "--out", tmp_path / "x", "--check")
    assert code == 0
    assert "llama.cpp: not run: pip install xllamacpp" in out


def test_a_wrong_file_fails(small, tmp_path, crystal, monkeypatch):
    """Weights of another model, as an engine would read them that gets a rotation or a norm wrong."""
    from crystal.interop import native

    other = read(small)
    path = write(
        tmp_path / "other",
        ((f"model.{n}", t * 1.01 if "attn.q" in n else t) for n, t in other.tensors("model")),
        other.state, [small / "tokenizer.model"],
    )  # fmt: skip
    real = native.export_native
    monkeypatch.setattr(native, "export_native", lambda source, out, dtype: real(path, out, dtype))
    code, out, _ = crystal("export", small, "--to", "native", "--out", tmp_path / "x", "--check", "--json")
    said = json.loads(out)
    assert code == 1
    assert said["verdict"] == "FAIL"
    assert said["agreement"]["transformers-native"]["verdict"] == "FAIL"


def test_without_a_tokenizer_logits_and_greedy_ids_are_compared(tmp_path, crystal):
    checkpoint(tmp_path / "c", config_of(LLAMA))
    code, out, _ = crystal("export", tmp_path / "c", "--to", "native", "--out", tmp_path / "x", "--check", "--json")
    row = json.loads(out)["agreement"]["transformers-native"]
    assert (code, row["tokens"], row["verdict"]) == (0, None, "PASS")


def test_greedy_text_may_part_only_where_two_tokens_are_as_good_as_equal(small):
    opened = open_for_export(small)
    model, _ = load_decoder(opened.source)
    asked = agreement.questions(opened)
    from crystal.inference.generate import generate

    mine = list(generate(model, asked.prompt, 8))
    other = [*mine[:3], (mine[3] + 1) % 448, *mine[4:]]
    gap = model(torch.tensor([asked.prompt + mine[:3]]))[0, -1].topk(2).values
    gap = float(gap[0] - gap[1])
    assert agreement._greedy(model, asked.prompt, mine, list(mine), 0) == "equal"
    assert agreement._greedy(model, asked.prompt, mine, other, gap * 0.4) == "differs"
    assert agreement._greedy(model, asked.prompt, mine, other, gap * 0.6) == "tie"
    assert agreement._greedy(model, asked.prompt, mine, mine[:5], 1.0) == "differs"  # it stopped


def test_the_stated_error_is_some_units_of_the_largest_logit():
    config = config_of(CRYSTAL)
    assert 1e-6 < stated_error(config, 60, 1.0) < 1e-4
    assert stated_error(config, 60, 20.0) == pytest.approx(20 * stated_error(config, 60, 1.0))
    assert len(weights(config)) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "mdl", "--check"), "--check: expected with hf, native, gguf or safetensors, not with mdl"),
        (("--to", "mdl", "--dtype", "bf16"), "--dtype: expected with"),
        (("--to", "hf", "--dtype", "q8_0"), "--dtype: expected fp32, bf16, fp16 for hf, got q8_0"),
        (("--to", "native", "--stage", "2"), "expected the checkpoint at the end of stage 2"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(words, message, small, tmp_path, crystal):
    code, _, err = crystal("export", small if "--stage" not in words else tmp_path, *words, "--out", tmp_path / "x")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_logits_that_are_no_numbers_fail(small):
    opened = open_for_export(small)
    model, _ = load_decoder(opened.source)
    asked = agreement.questions(opened)
    ours = [np.zeros((4, 448), dtype=np.float32)] * 2
    said = engines.Answers([ours[0], ours[0] * np.nan], [], None)
    row = agreement._judged("bf16", 1.0, model, asked, ours, [], said, [])
    assert (row.max_abs, row.median_abs, row.verdict) == (None, None, "FAIL")
    assert "nan" in agreement.Agreement({"llama.cpp": row}, {}).table()
