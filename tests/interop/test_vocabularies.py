"""Vocabularies of other makes: texts come back whole, nothing cuts or varies them, ids are those of their engines."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import SPACES, added, base_size, model_bytes, put, spec

from crystal.data.fim import fim_row
from crystal.data.tokenizer import Tokenizer
from crystal.errors import DataError
from crystal.inference.load import PlainTokenizer

TEXTS = ["", "x", " x", "  x", "    re x\n     ab", "\tx", " ", "   ", "a b ", "\n x", "é 😀", "x</s> y"]
MAKES = {
    "llama": {},
    "no dummy prefix": {"add_dummy_prefix": False},
    "symbols": {"user_defined_symbols": ["<sep>", "\u2581\u2581\u2581", "fox"]},
    "symbols, no dummy prefix": {"user_defined_symbols": ["<sep>", "fox"], "add_dummy_prefix": False},
    "control symbols": {"control_symbols": ["<mask>"], "pad_id": 3},
}


@pytest.fixture(scope="module", params=[*MAKES, *(f"json {name}" for name in SPACES)])
def tokenizer(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary")
    if request.param.startswith("json "):
        return Tokenizer.load(put(path / "tokenizer.json", spec(request.param.removeprefix("json "))))
    (path / "tokenizer.model").write_bytes(model_bytes(**MAKES[request.param]))
    return Tokenizer.load(path / "tokenizer.model")


@pytest.mark.parametrize("text", [*TEXTS, "a<sep>b <sep> c", "<sep>", "the fox fox", "<mask><pad>"])
def test_texts_come_back_with_all_their_spaces(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_many([text]) == [ids]
    assert all(tokenizer.token_bytes[i] for i in ids)  # none is a control id
    assert (tokenizer.changes_text, tokenizer.notes) == (None, ())


@settings(max_examples=30)
@given(text=st.text(st.sampled_from(" \n\tabrex()é<>sp"), max_size=30))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), text=st.text(st.sampled_from("  \nabx()"), min_size=4, max_size=30))
def test_fill_in_the_middle_keeps_every_space(tokenizer, text, seed):
    t = tokenizer
    ids = t.encode(text)
    row = np.array([*ids, t.eos_id, *ids, t.eos_id], dtype=np.int64)
    new, _ = fim_row(np.append(row, np.full(60, t.eos_id)), t, 1.0, 0.0, np.random.default_rng(seed))
    first = new[: new.tolist().index(t.eos_id)].tolist()
    prefix, rest = first[1 : first.index(t.fim_suffix)], first[first.index(t.fim_suffix) + 1 :]
    suffix, middle = rest[: rest.index(t.fim_middle)], rest[rest.index(t.fim_middle) + 1 :]
    assert t.decode(prefix) + t.decode(middle) + t.decode(suffix) == text


@pytest.mark.parametrize("name", list(MAKES))
def test_a_models_ids_and_texts_are_sentencepieces(name, tmp_path):
    import sentencepiece

    content = model_bytes(**MAKES[name])
    (tmp_path / "tokenizer.model").write_bytes(content)
    ours, theirs = (
        Tokenizer.load(tmp_path / "tokenizer.model"),
        sentencepiece.SentencePieceProcessor(model_proto=content),
    )
    for text in [*TEXTS, "a<sep>b   fox"]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


@pytest.mark.parametrize("name", SPACES)
def test_a_jsons_ids_are_transformers_but_for_a_space_that_it_would_swallow(name, tmp_path):
    from transformers import PreTrainedTokenizerFast

    path = put(tmp_path / "tokenizer.json", spec(name))
    ours, theirs = Tokenizer.load(path), PreTrainedTokenizerFast(tokenizer_file=str(path))
    for text in TEXTS[:-1]:
        swallowed = name in ("metaspace always", "metaspace first") and text.startswith(" ")
        expected = theirs((" " if swallowed else "") + text, add_special_tokens=False).input_ids
        assert ours.encode(text) == expected, text


UNASKED = {
    "truncation": ({"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}},
                   "truncation to 8 tokens: switched off"),
    "padding": ({"padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                             "pad_type_id": 0, "pad_token": "<unk>"}}, "padding: switched off"),
    "dropout": ({"model": spec()["model"] | {"dropout": 0.5}}, "dropout 0.5: switched off"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNASKED)
@pytest.mark.parametrize("kind", [Tokenizer.load, lambda path: PlainTokenizer(path, None)], ids=["llama", "plain"])
def test_what_cuts_fills_or_varies_texts_is_switched_off_and_said(name, kind, tmp_path):
    change, note = UNASKED[name]
    changed = kind(put(tmp_path / "changed.json", spec(**change)))
    plain = kind(put(tmp_path / "plain.json", spec()))
    text = "ab re xx   x" * 40
    assert [changed.encode(text) for _ in range(4)] == [plain.encode(text)] * 4
    assert (changed.notes, plain.notes) == ((note,), ())


def test_a_vocabulary_that_changes_texts_says_so_and_does_no_fim(tmp_path):
    for name, settings_, line in (
        ("spaces", {"remove_extra_whitespaces": True}, "it changes texts: ' x' comes back as 'x'"),
        ("nfkc", {"normalization_rule_name": "nmt_nfkc"}, "it changes texts"),
    ):
        (tmp_path / f"{name}.model").write_bytes(model_bytes(**settings_))
        tokenizer = Tokenizer.load(tmp_path / f"{name}.model")
        assert tokenizer.notes[0].startswith(line)
        with pytest.raises(ValueError, match="FIM needs a vocabulary that gives texts back"):
            fim_row(np.array([5, 6, 7]), tokenizer, 1.0, 0.5, np.random.default_rng(0))


REFUSED = {
    "byte_fallback off": ({"model": spec()["model"] | {"byte_fallback": False}}, "byte pairs with byte_fallback"),
    "another model": ({"model": spec()["model"] | {"type": "WordPiece"}}, "byte pairs with byte_fallback"),
    "suffixes": ({"model": spec()["model"] | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    "lower case": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "y"}]}},
        "spells",
    ),
    "foreign tokens": ({"more": [added(base_size(), "<|im_start|>")]}, r"<\|im_start\|> at id"),
    "another piece there": ({"more": [added(5, "<tool>")]}, "<tool> at id 5, where the vocabulary has"),
    "a symbol that puts spaces": (
        {"more": [added(base_size(), "<sep>", False)], "pieces": ["<sep>"]},
        "symbol '<sep>'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_json_that_is_not_of_llamas_kind_is_one_line(name, tmp_path):
    changes, line = REFUSED[name]
    with pytest.raises(DataError, match=line) as error:
        Tokenizer.load(put(tmp_path / "tokenizer.json", spec(**changes)))
    assert "\n" not in str(error.value)


def test_a_symbol_of_a_json_is_found_in_texts_where_no_space_is_put(tmp_path):
    i = base_size()
    for spaces in ("none", "metaspace never", "metaspace first"):
        more = [added(i, "<sep>", False), added(i + 1, "<cut>")]
        path = put(tmp_path / "tokenizer.json", spec(spaces, more, ["<sep>", "<cut>"]))
        tokenizer = Tokenizer.load(path)
        ids = tokenizer.encode("a<sep>b<cut>")
        assert i in ids
        assert i + 1 not in ids  # special: never from a text
        assert tokenizer.decode(ids) == "a<sep>b<cut>"
        assert tokenizer.decode([i + 1]) == ""


def test_suffixes_for_spaces_and_fim_names_as_symbols_are_refused(tmp_path):
    (tmp_path / "a.model").write_bytes(model_bytes(treat_whitespace_as_suffix=True))
    with pytest.raises(DataError, match=r"a\.model: .*spells 'x' as 'x '"):
        Tokenizer.load(tmp_path / "a.model")
    (tmp_path / "b.model").write_bytes(model_bytes(user_defined_symbols=["<|fim_prefix|>"]))
    with pytest.raises(DataError, match=r"b\.model: .*<\|fim_prefix\|> among the base pieces"):
        Tokenizer.load(tmp_path / "b.model")
    assert Tokenizer.load(tmp_path / "b.model", added_tokens=False).decode([3]) == "<|fim_prefix|>"


def test_unknown_and_unused_ids_print_nothing_and_take_no_space(tokenizer):
    ids = tokenizer.encode("a b")
    for unknown in (0, tokenizer.vocab_size - 1, tokenizer.vocab_size + 1000, -1):
        for at in range(len(ids) + 1):
            assert tokenizer.decode([*ids[:at], unknown, *ids[at:]]) == "a b"
    assert json.dumps(tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, *ids])) == '"a ba b"'
