"""What turns text into base ids: sentencepiece for a `.model`, `tokenizers` for a `tokenizer.json`.

A vocabulary is put to the test when it is read, because files say less than engines do: where a leading space goes,
whether texts come back as they were. What a file would do to texts unasked (truncation, padding, dropout) is switched
off; `notes` say so.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crystal.files import from_json

SPACE = "\u2581"  # SentencePiece's visible space
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_CONTROL = ("<unk>", "<s>", "</s>")
_TEXTS = ("a  b", "\n    return x\n", "\t tab \r\n ", "\u00e9 \ufb01\u00b2 \uff21 e\u0301", "1 000 A")


@dataclass(frozen=True)
class Vocabulary:
    """Base pieces and their engine.

    token_bytes[id]: what a piece stands for, b"" for unknown and control pieces. dummy_prefix: the engine puts a space
    before each text, and decoding takes it off. changes_text: an example of a text that does not come back, and as
    what; None: the tested ones do. listed: the ids and names of added tokens that the file lists behind the pieces.
    """

    engine: Any
    pieces: Sequence[str]
    token_bytes: list[bytes]
    dummy_prefix: bool
    changes_text: tuple[str, str] | None
    listed: dict[int, str]
    notes: tuple[str, ...]


class SentencePieceEngine:
    """A sentencepiece processor."""

    def __init__(self, content: bytes) -> None:
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError):  # its message is of lines in its source
            raise ValueError("a file that sentencepiece cannot read") from None
        if not content:
            raise ValueError("an empty file")

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return self.processor.encode(texts, num_threads=min(os.cpu_count() or 1, 16))


class JsonEngine:
    """A tokenizer.json. `swallows`: a space is put before each text unless it has one, so one more is given to it."""

    def __init__(self, spec: dict) -> None:
        import tokenizers

        self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.swallows = False

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(self._whole(text), add_special_tokens=False).ids

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        texts = [self._whole(text) for text in texts]
        return [e.ids for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _whole(self, text: str) -> str:
        return " " + text if self.swallows and text.startswith(" ") else text


def read_sentencepiece(content: bytes) -> Vocabulary:
    """A `.model`. User-defined symbols are text: sentencepiece finds them in texts, and they decode to themselves."""
    engine = SentencePieceEngine(content)
    processor = engine.processor
    pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
    _check(pieces)
    silent = {i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i)}
    token_bytes = [
        b"" if i in silent else _bytes_of(piece) if processor.is_byte(i) else _text_bytes(piece)
        for i, piece in enumerate(pieces)
    ]
    return _tested(engine, pieces, token_bytes, {}, [])


def read_json(content: bytes) -> Vocabulary:
    """A tokenizer.json of LLaMA's kind: byte pairs with byte fallback. Special tokens are never found in texts."""
    spec = from_json(content)
    model, added = spec["model"], spec.get("added_tokens") or []
    vocab = model["vocab"]
    pieces = sorted(vocab, key=vocab.__getitem__)
    if [vocab[piece] for piece in pieces] != list(range(len(pieces))):
        raise ValueError("ids with gaps")
    _check(pieces)
    if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
        raise ValueError("a model that is not byte pairs with byte_fallback")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"model.{key} {model[key]!r}")
    inside = {token["id"]: token for token in added if token["id"] < len(pieces)}
    for i, token in inside.items():
        if pieces[i] != token["content"]:
            raise ValueError(f"added token {token['content']} at id {i}, where the vocabulary has {pieces[i]}")
    symbols = symbols_of(spec)
    silent = set(inside) - {token["id"] for token in symbols} | {vocab[piece] for piece in _CONTROL}
    token_bytes = [b"" if i in silent else _bytes_of(piece) for i, piece in enumerate(pieces)]
    spec, notes = switched_off(spec)
    engine = JsonEngine(spec | {"added_tokens": symbols, "post_processor": None})
    listed = {token["id"]: token["content"] for token in added if token["id"] >= len(pieces)}
    found = _tested(engine, pieces, token_bytes, listed, notes)
    for symbol in symbols:
        text = f"a{symbol['content']}b"
        if _decoded(engine.encode(text), token_bytes, found.dummy_prefix) != text.encode():
            raise ValueError(f"symbol {symbol['content']!r}, around which encoding loses or puts spaces")
    return found


def symbols_of(spec: dict) -> list[dict]:
    """The added tokens of a tokenizer.json that stand for themselves in texts: in its vocabulary and not special, what
    sentencepiece calls user-defined."""
    size = len(spec["model"]["vocab"])
    added = [token for token in spec.get("added_tokens") or [] if token["id"] < size]
    return [t for t in added if not t.get("special", True) and t["content"] not in _CONTROL]


def switched_off(spec: dict) -> tuple[dict, list[str]]:
    """A tokenizer.json's mapping without what cuts, fills or varies texts, and a line for each thing switched off."""
    notes = []
    if (cut := spec.get("truncation")) is not None:
        notes.append(f"truncation to {cut.get('max_length')} tokens")
    if spec.get("padding") is not None:
        notes.append("padding")
    model = spec["model"]
    if model.get("dropout"):
        notes.append(f"dropout {model['dropout']}")
    return spec | {"truncation": None, "padding": None, "model": model | {"dropout": None}}, [
        f"{what}: switched off" for what in notes
    ]


def _tested(
    engine: Any, pieces: Sequence[str], token_bytes: list[bytes], listed: dict[int, str], notes: list[str]
) -> Vocabulary:
    """The vocabulary after trials: where leading spaces go, and which texts come back."""

    def spelled(text: str) -> bytes:
        return b"".join(token_bytes[i] for i in engine.encode(text))

    # tokenizers' Metaspace does not prefix a text that has a space, after which "x" and " x" are the same
    if (spelled("x"), spelled(" x"), spelled("  x")) == (b" x", b" x", b"  x") and isinstance(engine, JsonEngine):
        engine.swallows = True
    plain, spaced = spelled("x"), spelled(" x")
    if plain not in (b"x", b" x"):
        raise ValueError(f"a vocabulary that spells 'x' as {plain.decode('utf-8', 'replace')!r}")
    dummy_prefix = plain == b" x"
    changes = None
    if spaced != b" " + plain:
        changes = (" x", "x")
    for text in _TEXTS:
        back = _decoded(engine.encode(text), token_bytes, dummy_prefix).decode("utf-8", "replace")
        if changes is None and back != text:
            changes = (text, back)
    if changes:
        notes = [*notes, f"it changes texts: {changes[0]!r} comes back as {changes[1]!r}"]
    return Vocabulary(engine, pieces, token_bytes, dummy_prefix, changes, listed, tuple(notes))


def _decoded(ids: Sequence[int], token_bytes: list[bytes], dummy_prefix: bool) -> bytes:
    spelled = b"".join(token_bytes[i] for i in ids)
    return spelled.removeprefix(b" ") if dummy_prefix else spelled


def _text_bytes(piece: str) -> bytes:
    return piece.replace(SPACE, " ").encode("utf-8")


def _bytes_of(piece: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else _text_bytes(piece)


def _check(pieces: Sequence[str]) -> None:
    missing = [p for p in ("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>") if p not in set(pieces)]
    if missing:
        raise ValueError(f"a vocabulary without {' '.join(missing)}")
