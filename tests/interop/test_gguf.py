"""`--to gguf`: real llama.cpp loads the file and says what our decoder says, and its tokenizer gives our ids."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import assert_near, path_length
from folding import CRYSTAL, LLAMA, SHAPES, checkpoint, config_of, copied, trained
from shared_files import shared_file

from crystal.checkpoint import read
from crystal.errors import ConfigError, RunError
from crystal.inference.generate import generate
from crystal.inference.load import load_decoder, load_tokenizer
from crystal.inference.logits import logits
from crystal.interop import llama_cpp
from crystal.interop.gguf_file import export_gguf

gguf = pytest.importorskip("gguf", reason="gguf is not there: pip install gguf")
needs_llama = pytest.mark.skipif(not llama_cpp.library(), reason=f"llama.cpp is not there: {llama_cpp.INSTALL}")
TEXTS = [p.read_text() for p in sorted(Path(__file__).parents[1].glob("*.py"))]
ODD = [
    "",
    "a",
    "  two",
    "\n\n   é 𝄞\t\r\n",
    "1 000 000,50 €",
    "\x00\x7f",
    " leading",
    "trailing  ",
    "<s> <|im_end|> </s>",
]


def rows_of(config, length=60):
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(5))


@needs_llama
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_gives_our_logits_and_our_greedy_tokens(name, tmp_path):
    config = config_of(SHAPES[name])
    export_gguf(checkpoint(tmp_path / "c", config), tmp_path / "x.gguf")
    ours, _ = load_decoder(tmp_path / "c")
    rows = rows_of(config)
    prompt = rows[0, :20].tolist()
    said = llama_cpp.ask(tmp_path / "x.gguf", rows.tolist(), prompt=prompt, greedy=64)
    expected = logits(ours, rows)
    assert expected.abs().max() > 1
    assert_near(torch.tensor(np.stack(said.logits)), expected, path_length(config, rows.shape[1]))
    assert said.greedy == list(generate(ours, prompt, 64))


@needs_llama
@pytest.mark.parametrize(("dtype", "off"), [("fp16", 2e-3), ("bf16", 2e-2), ("q8_0", 8e-2)])
def test_fewer_bits_cost_as_much_as_they_round(dtype, off, tmp_path):
    """Of the largest logit: some units of 2^-11, of 2^-8, and of 2^-7 where activations are rounded to 8 bits too."""
    config = config_of(CRYSTAL | {"d_model": 128, "n_heads": 4, "d_ff": 341})
    export_gguf(checkpoint(tmp_path / "c", config), tmp_path / "x.gguf", dtype)
    ours, _ = load_decoder(tmp_path / "c")
    rows = rows_of(config)
    expected = logits(ours, rows).numpy()
    said = np.stack(llama_cpp.ask(tmp_path / "x.gguf", rows.tolist()).logits)
    assert 0 < np.abs(said - expected).max() <= off * np.abs(expected).max()


def test_the_file_says_what_it_holds(tmp_path):
    config = config_of(CRYSTAL | {"vocab_size": 448})
    checkpoint(tmp_path / "c", config, trained(tmp_path, TEXTS))
    (tmp_path / "c" / "chat_template.jinja").write_text("{{ messages }}")
    made = export_gguf(tmp_path / "c", tmp_path / "x.gguf", "q8_0")
    assert (made["form"], made["files"]) == ("gguf", ["x.gguf"])
    reader = gguf.GGUFReader(tmp_path / "x.gguf")

    def field(name):
        return reader.fields[name].contents()

    assert field("general.architecture") == "stablelm"
    assert field("stablelm.attention.layer_norm_epsilon") == pytest.approx(1e-5 * 64 / 96)
    assert field("stablelm.rope.dimension_count") == 4
    assert field("tokenizer.ggml.model") == "llama"
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    ours = load_tokenizer(read(tmp_path / "c"))
    assert len(tokens) == len(types) == len(field("tokenizer.ggml.scores")) == 448
    assert tokens[ours.fim_prefix] == "<|fim_prefix|>"
    assert types[:4] == [2, 3, 3, 6]  # unknown, control, control, a byte
    assert types[ours.n_base] == 3
    assert types[-1] == 5  # unused
    assert field("tokenizer.ggml.fim_mid_token_id") == ours.fim_middle
    assert (field("tokenizer.ggml.bos_token_id"), field("tokenizer.ggml.eos_token_id")) == (1, 2)
    assert field("tokenizer.ggml.add_bos_token") is True
    assert field("tokenizer.chat_template").strip() == "{{ messages }}"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q8_0"}


def test_rows_that_are_no_whole_blocks_stay_f16(tmp_path):
    export_gguf(checkpoint(tmp_path / "c", config_of(LLAMA | {"d_ff": 90})), tmp_path / "x.gguf", "q8_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")


@needs_llama
@pytest.mark.parametrize(
    "settings", [{}, {"add_dummy_prefix": False}, {"add_dummy_prefix": False, "user_defined_symbols": ["<tool>"]}]
)
def test_its_tokenizer_gives_our_ids(settings, tmp_path):
    file = trained(tmp_path, TEXTS, **settings)
    checkpoint(tmp_path / "c", config_of(CRYSTAL | {"vocab_size": 448}), file)
    assert export_gguf(tmp_path / "c", tmp_path / "x.gguf")["notes"] == []
    ours = load_tokenizer(read(tmp_path / "c"))
    texts = [*TEXTS, *ODD, "a<tool>b"]
    said = llama_cpp.ask(tmp_path / "x.gguf", [], texts).tokens
    for text, ids in zip(texts, said, strict=True):
        assert ids == [1, *ours.encode(text)], text[:80]


def test_symbols_behind_which_llama_cpp_puts_a_space_are_said(tmp_path):
    file = trained(tmp_path, TEXTS, user_defined_symbols=["<tool>"])
    checkpoint(tmp_path / "c", config_of(CRYSTAL | {"vocab_size": 448}), file)
    (note,) = export_gguf(tmp_path / "c", tmp_path / "x.gguf")["notes"]
    assert "<tool>" in note


@needs_llama
def test_the_published_tokenizer_gives_our_ids(tmp_path):
    file = copied(shared_file("crystalcoder-tokenizer.json"), tmp_path / "tokenizer.json")
    checkpoint(tmp_path / "c", config_of(CRYSTAL | {"vocab_size": 32032, "n_layers": 1}), file)
    export_gguf(tmp_path / "c", tmp_path / "x.gguf", "q8_0")
    ours = load_tokenizer(read(tmp_path / "c"))
    assert ours.encode("\n    return") == [29871, 13, 1678, 736]
    said = llama_cpp.ask(tmp_path / "x.gguf", [], [*TEXTS, *ODD]).tokens
    for text, ids in zip([*TEXTS, *ODD], said, strict=True):
        assert ids == [1, *ours.encode(text)], text[:80]


def byte_pairs(path, digits):
    """A tokenizer.json of GPT-2's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [pre_tokenizers.Digits(individual_digits=True), bytes_]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if digits else bytes_
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return path


PLAIN = {"tokenizer_kind": "plain", "bos": False, "eos_id": [0, 5], "imported_from": "elsewhere"}


@needs_llama
@pytest.mark.parametrize(("digits", "begin"), [(True, False), (False, False), (False, True)])
def test_byte_level_pairs_go_along_too(digits, begin, tmp_path):
    """As SmolLM2 has them, with digits apart, or as GPT-2; with a begin token where the file puts one."""
    file = byte_pairs(tmp_path / "tokenizer.json", digits)
    if begin:
        spec = json.loads(file.read_text())
        special, text = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        names = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
        pair = [special, text, {"Sequence": {"id": "B", "type_id": 1}}]
        spec["post_processor"] = {"type": "TemplateProcessing", "single": [special, text], "pair": pair}
        spec["post_processor"]["special_tokens"] = names
        file.write_text(json.dumps(spec))
    checkpoint(tmp_path / "c", config_of(LLAMA | {"vocab_size": 512}), file, PLAIN)
    export_gguf(tmp_path / "c", tmp_path / "x.gguf")
    ours = load_tokenizer(read(tmp_path / "c"))
    texts = [*TEXTS, *(text for text in ODD if "<" not in text)]
    said = llama_cpp.ask(tmp_path / "x.gguf", [], texts).tokens
    for text, ids in zip(texts, said, strict=True):
        assert ids == ours.encode(text), text[:80]
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert ("tokenizer.ggml.bos_token_id" in fields) is begin
    assert ours.encode("a")[0] == 0 or not begin


def test_a_tokenizer_without_a_name_there_is_refused(tmp_path):
    file = byte_pairs(tmp_path / "tokenizer.json", digits=False)
    spec = json.loads(file.read_text())
    spec["pre_tokenizer"] = {"type": "Whitespace"}
    file.write_text(json.dumps(spec))
    checkpoint(tmp_path / "c", config_of(LLAMA | {"vocab_size": 512}), file, PLAIN)
    with pytest.raises(ConfigError, match=r"a BPE tokenizer split by Whitespace: expected SentencePiece's or GPT-2's"):
        export_gguf(tmp_path / "c", tmp_path / "x.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "tokenizer.json"]


@needs_llama
def test_a_file_that_llama_cpp_does_not_load_is_its_one_line(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(RunError, match=r"llama\.cpp: .*x\.gguf: llama\.cpp does not load it"):
        llama_cpp.ask(tmp_path / "x.gguf", [[1, 2]])


def test_what_is_missing_is_named_with_its_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    checkpoint(tmp_path / "c", config_of(LLAMA))
    with pytest.raises(ConfigError, match="pip install gguf"):
        export_gguf(tmp_path / "c", tmp_path / "x.gguf")
    monkeypatch.setattr(llama_cpp, "library", lambda: None)
    with pytest.raises(RunError, match="pip install xllamacpp"):
        llama_cpp.ask(tmp_path / "x.gguf", [])
