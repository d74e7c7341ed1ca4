"""A tokenizer as llama.cpp reads it from a GGUF file: pieces, scores and types, or byte-level pairs and merges.

llama.cpp's "llama" vocabulary joins the two neighbours whose piece has the best score, which is what SentencePiece does
with the scores of its .model. A tokenizer.json ranks pairs, not pieces: scores are taken from the ranks, where those
stay together for each piece, as they do in every json that was made of a SentencePiece model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crystal.data.tokenizer import Tokenizer
from crystal.data.tokenizer_engines import symbols_of
from crystal.errors import ConfigError
from crystal.files import from_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_PADDING_SCORE = -1e4
_FIM = {"pre": "fim_prefix", "suf": "fim_suffix", "mid": "fim_middle", "pad": "fim_pad"}


@dataclass
class Vocabulary:
    """`model`: llama, gpt2 or none. Lists are of the model's whole vocabulary, unused ids included."""

    model: str
    tokens: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    pre: str = "default"
    add_bos: bool = False
    dummy_prefix: bool = True
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos, unknown, fim_pre, …
    notes: list[str] = field(default_factory=list)  # where llama.cpp will encode otherwise, for people

    def add_to(self, writer: Any) -> None:
        """All keys of it to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        if self.model == "none":
            return
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "llama":
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.dummy_prefix)
        else:
            writer.add_token_merges(self.merges)
        for name, i in self.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)


def vocabulary(
    tokenizer, file: Path | None, vocab_size: int, bos: bool, bos_id: int | None, eos_id: int | None
) -> Vocabulary:
    """Of a tokenizer as `load_tokenizer` gives it, read from `file`, or of none.

    vocab_size: the model's, ids behind the tokenizer's are unused; bos: whether a text starts with bos_id.
    Raises ConfigError, in a line, for a tokenizer that llama.cpp has no form of.
    """
    if tokenizer is None:
        return Vocabulary("none")
    content = file.read_bytes()
    if not isinstance(tokenizer, Tokenizer):
        found = _byte_level(from_json(content))
    elif file.suffix == ".json":
        found = _of_json(from_json(content), str(file))
    else:
        found = _of_sentencepiece(content)
    if isinstance(tokenizer, Tokenizer):
        found.dummy_prefix = tokenizer.dummy_prefix
        found.ids["unknown"] = found.tokens.index("<unk>")
        symbols = [token for token, kind in zip(found.tokens, found.types, strict=True) if kind == USER_DEFINED]
        if symbols and found.dummy_prefix:
            found.notes.append(
                f"llama.cpp puts a space behind the symbol {symbols[0]} and others of its kind: texts that hold them "
                "get other ids there"
            )
        for name in tokenizer.added:
            found.tokens.append(name)
            found.scores.append(0.0)
            found.types.append(CONTROL)
        for key, name in _FIM.items():
            if f"<|{name}|>" in tokenizer.added:
                found.ids[f"fim_{key}"] = tokenizer.added[f"<|{name}|>"]
    else:  # what begins a text is put there by the file itself
        begin = tokenizer.encode("")
        if len(begin) > 1:
            found.notes.append("llama.cpp puts one begin token before a text, this tokenizer more than that around it")
        bos, bos_id = bool(begin), begin[0] if begin else bos_id
    for name, i in (("bos", bos_id), ("eos", eos_id)):
        if i is not None:
            found.ids[name] = i
    for i in range(len(found.tokens), vocab_size):
        found.tokens.append(f"[PAD{i}]")
        found.scores.append(_PADDING_SCORE)
        found.types.append(UNUSED)
    found.add_bos = bos
    return found


def _of_sentencepiece(model: bytes) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    # the kinds have the same numbers there, llama.cpp took them over
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    return Vocabulary("llama", [p.piece for p in pieces], [p.score for p in pieces], [p.type for p in pieces])


def _of_json(spec: dict, where: str) -> Vocabulary:
    """Scores from the ranks of merges: the first that makes a piece has its rank."""
    vocab, merges = spec["model"]["vocab"], [_pair(merge) for merge in spec["model"]["merges"]]
    pieces = sorted(vocab, key=vocab.__getitem__)
    scores = dict.fromkeys(pieces, 0.0)
    last, rank = None, 0
    for a, b in merges:
        if a + b != last:
            if scores.get(a + b):
                raise ConfigError(
                    f"{where}: merges that make {a + b!r} lie apart: llama.cpp ranks pieces, not merges, and would "
                    "encode other ids"
                )
            last, rank = a + b, rank + 1
            scores[last] = -float(rank)
    kinds = {"<s>": CONTROL, "</s>": CONTROL, "<unk>": UNKNOWN}
    kinds |= {token["content"]: USER_DEFINED for token in symbols_of(spec)}
    types = [BYTE if len(p) == 6 and p.startswith("<0x") else kinds.get(p, NORMAL) for p in pieces]
    # pieces of one character are there from the start and never made; their score is not looked at
    return Vocabulary("llama", pieces, [scores[p] for p in pieces], types)


def _byte_level(spec: dict) -> Vocabulary:
    """GPT-2's kind, with the splits that llama.cpp has a name for."""
    model = spec["model"]
    splits = spec.get("pre_tokenizer") or {}
    parts = splits.get("pretokenizers", [splits])
    kinds = [part.get("type") for part in parts]
    byte_level = kinds[-1:] == ["ByteLevel"] and not parts[-1].get("add_prefix_space", True)
    if model.get("type") != "BPE" or not byte_level or kinds[:-1] not in ([], ["Digits"]):
        raise ConfigError(
            f"tokenizer.json: a {model.get('type')} tokenizer split by {', '.join(map(str, kinds))}: expected "
            "SentencePiece's or GPT-2's kind, llama.cpp has no name for others that is known here"
        )
    names = {i: piece for piece, i in model["vocab"].items()}
    special = {}
    for token in spec["added_tokens"]:
        names[token["id"]] = token["content"]
        special[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    size = max(names) + 1
    tokens = [names.get(i, f"[PAD{i}]") for i in range(size)]
    types = [special.get(i, NORMAL if i in names else UNUSED) for i in range(size)]
    merges = [" ".join(_pair(merge)) for merge in model["merges"]]
    return Vocabulary("gpt2", tokens, [0.0] * size, types, merges, "smollm" if kinds[:-1] else "gpt-2")


def _pair(merge: str | list[str]) -> tuple[str, str]:
    a, b = merge.split(" ") if isinstance(merge, str) else merge
    return a, b
