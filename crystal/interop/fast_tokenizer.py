"""A checkpoint's tokenizer as the `tokenizer.json` and `tokenizer_config.json` that transformers loads by itself.

transformers 5 converts a sentencepiece model too, but ranks merges by piece id: LLaMA's pieces of spaces merge last and
have ids in between, so indented code gets other ids than SentencePiece gives it. Here merges are ranked by score.
"""

from __future__ import annotations

import json
from pathlib import Path

from crystal.data.tokenizer import ADDED_TOKENS, Tokenizer
from crystal.data.tokenizer_engines import SPACE, switched_off, symbols_of
from crystal.files import from_json


def tokenizer_files(tokenizer, file: Path, bos: bool, eos_id: int | None, max_length: int) -> dict[str, dict]:
    """File name → content, for a tokenizer as `load_tokenizer` gives it, and the file that it was read from.

    bos: whether a text starts with the begin token; max_length: tokens that the model is built for. A published
    tokenizer of another kind is kept as it is, but for what would silently cut or pad a text.
    """
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 adds types that generate() refuses
    }
    content = file.read_bytes()
    if not isinstance(tokenizer, Tokenizer):
        spec, _ = switched_off(from_json(content))
        names = {token["id"]: token["content"] for token in spec.get("added_tokens") or []}
        names |= {i: piece for piece, i in spec["model"]["vocab"].items()}
        if eos_id in names:
            config["eos_token"] = names[eos_id]
        return {"tokenizer.json": spec, "tokenizer_config.json": config}
    if file.suffix == ".json":
        spec, _ = switched_off(from_json(content))
        symbols = [token["content"] for token in symbols_of(spec)]
    else:
        spec, symbols = of_sentencepiece(content, tokenizer.dummy_prefix)
    vocab = spec["model"]["vocab"]
    special = {vocab[name]: name for name in ("<unk>", "<s>", "</s>")} | {i: n for n, i in tokenizer.added.items()}
    names = special | {vocab[name]: name for name in symbols}
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"] = [
        {"id": i, "content": n} | plain | {"special": i in special} for i, n in sorted(names.items())
    ]
    spec["post_processor"] = _begin(tokenizer.bos_id) if bos else None
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if tokenizer.added:
        config["additional_special_tokens"] = list(ADDED_TOKENS)
    return {"tokenizer.json": spec, "tokenizer_config.json": config}


def write_tokenizer(directory: Path, files: dict[str, dict]) -> list[str]:
    """Write them; their names. Raises OSError."""
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return list(files)


def of_sentencepiece(model: bytes, dummy_prefix: bool) -> tuple[dict, list[str]]:
    """The tokenizer.json (without added tokens) of a BPE sentencepiece model with byte fallback, and its symbols.

    Symbols: pieces that are found in texts as they are (user-defined), which are added tokens in a tokenizer.json.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    symbols = [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]
    merges = []
    for entry in proto.pieces:
        if entry.type != kinds.NORMAL:
            continue
        piece, score = entry.piece, entry.score
        halves = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        found = [(a, b) for a, b in halves if a in vocab and b in vocab]
        # every way to make a piece has the piece's rank; ties go to the first place in the text
        merges += [(score, pair) for pair in sorted(found, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda merge: -merge[0])  # stable
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, space] if dummy_prefix else [space],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
            + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if dummy_prefix else []),
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [list(pair) for _, pair in merges],
        },
    }
    return spec, symbols


def _begin(bos_id: int) -> dict:
    special = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, second],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos_id], "tokens": ["<s>"]}},
    }
