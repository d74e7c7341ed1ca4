"""Vocabularies: trained ones are repeatable and lossless, the published one gives the published ids."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_files import shared_file

from crystal.data.tokenizer import ADDED_TOKENS, Tokenizer, train_tokenizer
from crystal.errors import ConfigError, DataError

TRICKY = [
    "",
    " ",
    "    x",
    "\n    return 1",
    "\t\tx\r\n",
    "é😀\x00",
    "</s><s><unk><0x0A>",
    "a<|fim_prefix|>b",
    "\ufeffa",
]
PLAIN_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\u2581"))


def test_ids_are_laid_out_as_published(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.n_base) == (1, 2, 2, 1000)
    assert (tokenizer.fim_prefix, tokenizer.fim_middle) == (1000, 1001)
    assert (tokenizer.fim_suffix, tokenizer.fim_pad) == (1002, 1003)
    assert tokenizer.vocab_size == 1024
    assert len(ADDED_TOKENS) == 22
    assert ADDED_TOKENS[21] == "<|sys_end|>"


def test_without_added_tokens_there_is_no_fim_and_no_room_for_it(tokenizer):
    plain = Tokenizer.load(tokenizer.path, added_tokens=False)
    assert (plain.fim_prefix, plain.fim_pad, plain.vocab_size) == (None, None, 1024)
    assert plain.decode([1000, *plain.encode("x")]) == "x"


def test_same_texts_train_the_same_file(tokenizer, texts, tmp_path):
    again = train_tokenizer(iter(texts), 1000, tmp_path / "other-name.model")
    assert again.sha256 == tokenizer.sha256
    assert train_tokenizer(texts, 1010, tmp_path / "b.model").sha256 != tokenizer.sha256
    assert [p.name for p in tmp_path.glob("*.partial")] == []


def test_digits_stand_alone_and_newlines_are_bytes(tokenizer):
    ids = tokenizer.encode("x\n2023")
    assert [tokenizer.token_bytes[i] for i in ids[-5:]] == [b"\n", b"2", b"0", b"2", b"3"]


@given(PLAIN_TEXT)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_come_back_and_give_base_ids_only(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 <= i < tokenizer.n_base for i in ids)
    assert tokenizer.encode_many([text, "x"]) == [ids, tokenizer.encode("x")]


@given(st.lists(st.integers(0, 1023), max_size=30))
def test_any_ids_decode(tokenizer, ids):
    assert isinstance(tokenizer.decode(ids), str)


def test_decoding_names_added_tokens_and_hides_control_ids(tokenizer):
    ids = [1, *tokenizer.encode("def f"), tokenizer.fim_middle, *tokenizer.encode(" x"), 2, 1023]
    assert tokenizer.decode(ids) == "def f<|fim_middle|> x"


def test_a_cut_character_costs_only_itself(tokenizer):
    ids = tokenizer.encode("abc\u4e09")
    assert tokenizer.decode(ids[:-1]) == "abc\ufffd"
    assert tokenizer.decode(ids[:-1] + tokenizer.encode(" z")) == "abc\ufffd  z"


def test_lone_surrogates_become_question_marks(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize("put", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo, os.mkdir,
                                 lambda path: (path.touch(), os.truncate(path, 2 << 40))],
                         ids=["device", "pipe", "directory", "terabytes"])  # fmt: skip
@pytest.mark.parametrize("name", ["t.model", "t.json"])
def test_what_is_no_vocabulary_file_is_not_read_to_its_end(tmp_path, name, put):
    put(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: tokenizer cannot be read: "):
        Tokenizer.load(tmp_path / name)


def test_mistakes_name_the_file(tmp_path):
    with pytest.raises(DataError, match=r"none\.model: tokenizer cannot be read"):
        Tokenizer.load(tmp_path / "none.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"bad\.model: expected a sentencepiece model"):
        Tokenizer.load(tmp_path / "bad.model")
    (tmp_path / "bad.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(DataError, match=r"bad\.json: .*without <unk> <s> </s>"):
        Tokenizer.load(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match=r"^a vocabulary of 5000 cannot be trained: this text can fill at most \d+$"):
        train_tokenizer(["too little text"], 5000, tmp_path / "small.model")
    assert not (tmp_path / "small.model").exists()


def test_added_tokens_of_another_model_are_refused(tmp_path):
    spec = json.loads(shared_file("crystalcoder-tokenizer.json").read_text())
    spec["added_tokens"][3]["content"] = "<|im_start|>"
    (tmp_path / "t.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r"added token <.im_start.> at id 32000"):
        Tokenizer.load(tmp_path / "t.json")


def test_published_ids(published):
    assert published.encode("Hello world") == [15043, 3186]
    assert published.encode("\n    return") == [
        29871,
        13,
        1678,
        736,
    ]  # Mistral's and mis-ranked merges differ here
    assert (published.n_base, published.vocab_size) == (32000, 32032)
    assert (published.fim_prefix, published.fim_pad, published.added["<|sys_end|>"]) == (32000, 32003, 32021)
    for text in TRICKY:
        assert published.decode(published.encode(text)) == text
        assert all(3 <= i < 32000 for i in published.encode(text))


@pytest.mark.parametrize(("chunk", "counts"), [("143", (622, 467, 3)), ("355", (622, 448, 6))])
def test_ambers_rows_come_back_as_the_same_ids(published, chunk, counts):
    """Decode and encode 1,000 real rows, document segment by document segment.

    Every segment comes back exactly unless the row starts in the middle of a word, or ends in the middle of
    a character. A start inside a word gets the dummy space that the first piece of a text always has, which
    changes the first word; the rest agrees.
    """
    whole = cut_word = cut_character = 0
    for line in shared_file(f"amber-rows-chunk{chunk}.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = row["prompt"] + row["continuation"]
        ends = [i for i, token in enumerate(ids) if token == 2]
        for start, end in zip([0, *(e + 1 for e in ends)], [*ends, len(ids)], strict=True):
            segment = ids[start:end]
            text = published.decode(segment)
            again = published.encode(text)
            if again == segment:
                whole += 1
            elif "\ufffd" in (text[:1], text[-1:]):
                cut_character += 1
            else:
                cut_word += 1
                assert start == 0
                assert not published.token_bytes[segment[0]].startswith(b" ")
                assert published.token_bytes[again[0]].startswith(b" ")
                pairs = zip(reversed(segment), reversed(again), strict=False)
                same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(segment))
                assert same >= len(segment) - 4
    assert (whole, cut_word, cut_character) == counts
