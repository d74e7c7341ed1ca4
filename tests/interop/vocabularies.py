"""Small vocabularies of every make that published directories have, for the tests of this folder."""

import io
import json

import sentencepiece

LINES = [f"the quick brown fox number {i} jumps over    lazy dogs (and\treturns)" for i in range(300)]


def model_bytes(**changes):
    """A sentencepiece `.model` with LLaMA's settings, or others."""
    settings = {
        "model_type": "bpe", "vocab_size": 340, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": True, "split_digits": True,
        "allow_whitespace_only_pieces": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "num_threads": 1,
        "minloglevel": 3,
    } | changes  # fmt: skip
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=written, **settings)
    return written.getvalue()


_PREPEND = {"type": "Prepend", "prepend": "\u2581"}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def _metaspace(scheme):
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}


SPACES = {
    "prepend": {"normalizer": {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]}},
    "none": {"normalizer": _REPLACE},
    "metaspace always": {"pre_tokenizer": _metaspace("always")},
    "metaspace first": {"pre_tokenizer": _metaspace("first")},
    "metaspace never": {"pre_tokenizer": _metaspace("never")},
}
"""Where tokenizer.json files put a space, by what their makers wrote."""


def added(i, content, special=True):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": special} | flags


BEGIN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


def spec(spaces="prepend", more=(), pieces=(), **changes):
    """A small tokenizer.json of LLaMA's kind. spaces: of SPACES; more: added tokens; pieces: further base pieces."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    merges = [("\u2581", "\u2581"), ("\u2581\u2581", "\u2581\u2581"), ("\u2581", "x"), ("a", "b"), ("r", "e")]
    names += ["\u2581", *"abcdefghijklmnopqrstuvwxyzA0123456789()", *("".join(pair) for pair in merges), *pieces]
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": {name: i for i, name in enumerate(names)}, "merges": [" ".join(pair) for pair in merges],
    }  # fmt: skip
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if spaces not in ("none",) else []
    replace = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    decoders = [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>"), *more],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders}, "model": model,
    } | SPACES[spaces] | changes  # fmt: skip


def base_size(**settings):
    return len(spec(**settings)["model"]["vocab"])


def put(path, spec_):
    path.write_text(json.dumps(spec_))
    return path
