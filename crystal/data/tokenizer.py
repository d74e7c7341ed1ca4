"""Text to token ids and back, exactly as SentencePiece's LLaMA tokenizer does it, plus CrystalCoder's 22
tokens.

Three sources of a vocabulary: one trained here (`train_tokenizer`), LLaMA's published `tokenizer.model`, or
CrystalCoder's published `tokenizer.json`. All are byte-pair encodings with byte fallback, unk 0, BOS 1, EOS
2. Most put a space before every text (LLaMA's dummy prefix), which decoding takes off again; where a vocabulary has
none, a leading space is the text's own and stays. A json whose Metaspace gives `x` and ` x` the same ids (transformers
5 writes such) is read as SentencePiece reads the model that it came from: ` x` is two spaces and x.

Encoding is left to the engine (sentencepiece, or `tokenizers` for the json). Decoding is done here from one
table of bytes per id, because the engines disagree on bytes that are not UTF-8, which rows cut inside a
character hold: `tokenizers` replaces a whole run of byte tokens when one is bad.

Text never turns into a control or added token: `</s>` or `<|fim_prefix|>` in a document is encoded as
characters. For that the json's list of added tokens is taken out before the engine sees it.

Beware of LLaMA vocabularies from elsewhere (facts: data.md C): a npm package called tokenizer-llama2
carries Mistral's ids, and a json converted from the bare `.model` by transformers 5 ranks merges by id,
which changes the ids of runs of spaces. `Hello world` is 15043 3186, and a newline, four spaces, `return`
is 29871 13 1678 736.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from crystal.data.tokenizer_engines import Vocabulary, read_json, read_sentencepiece
from crystal.errors import ConfigError, DataError
from crystal.files import regular_bytes, write_whole
from crystal.output.interrupts import child
from crystal.output.progress import Bar

_NAMES = """ fim_prefix fim_middle fim_suffix fim_pad filename gh_stars issue_start issue_comment
issue_closed jupyter_start jupyter_text jupyter_code jupyter_output empty_output commit_before commit_msg
commit_after reponame im_start im_end sys_start sys_end
"""
ADDED_TOKENS = tuple(f"<|{name}|>" for name in _NAMES.split())
"""CrystalCoder's added tokens; the first has id n_base (32000 for LLaMA's vocabulary)."""

_TRAIN_THREADS = 2  # written into the trained model, so a constant: same texts, same file anywhere
_TRAINER = Path(__file__).with_name("train_vocabulary.py")
_META_AND_BYTES = 3 + 256  # pieces of a vocabulary that are neither characters nor merges


def padded(n_base: int, added_tokens: bool) -> int:
    """The size of a vocabulary of `n_base` ids with CrystalCoder's added tokens behind, as a multiple of 32."""
    return -(-(n_base + (len(ADDED_TOKENS) if added_tokens else 0)) // 32) * 32


class VocabularyError(ConfigError):
    """The texts cannot fill a vocabulary of the size that was asked for, or hold too many characters for it."""


class Tokenizer:
    """A vocabulary and its two directions.

    Ids: 0 unk, `bos_id`, `eos_id`, then pieces up to `n_base`, then the added tokens, then unused ids up to
    `vocab_size`, a multiple of 32. `pad_id` is EOS, as published. `fim_*` are None without added tokens.
    `token_bytes[id]` are the bytes a base id stands for (empty for control ids). `dummy_prefix`: whether encoding puts
    a space first. `changes_text`: (text, what comes back) where the vocabulary alters texts, else None.
    `listed`: {id: name} of the tokens that the file itself lists behind its base ids. `notes`: lines for people.
    `path` and `sha256` are those of the vocabulary file.
    """

    def __init__(self, path: Path, content: bytes, vocabulary: Vocabulary, added_tokens: bool) -> None:
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.added_tokens = added_tokens
        pieces = vocabulary.pieces
        self.n_base = len(pieces)
        names = ADDED_TOKENS if added_tokens else ()
        self.added = {name: self.n_base + i for i, name in enumerate(names)}
        self.vocab_size = padded(self.n_base, added_tokens)
        self.bos_id, self.eos_id = pieces.index("<s>"), pieces.index("</s>")
        self.pad_id = self.eos_id
        self.fim_prefix = self.added.get("<|fim_prefix|>")
        self.fim_middle = self.added.get("<|fim_middle|>")
        self.fim_suffix = self.added.get("<|fim_suffix|>")
        self.fim_pad = self.added.get("<|fim_pad|>")
        self.token_bytes = vocabulary.token_bytes
        self.dummy_prefix, self.changes_text = vocabulary.dummy_prefix, vocabulary.changes_text
        self.listed, self.notes = vocabulary.listed, vocabulary.notes
        self._engine = vocabulary.engine
        self._names = {i: name for name, i in self.added.items()}

    @classmethod
    def load(cls, path: str | Path, *, added_tokens: bool = True) -> Tokenizer:
        """Read a sentencepiece `.model` or a `tokenizer.json`.

        added_tokens: put CrystalCoder's 22 tokens after the base vocabulary (Amber's has none: 32,000 ids).
        Raises DataError naming the file when it is missing or not a LLaMA-like vocabulary.
        """
        path = Path(path)
        try:
            content = regular_bytes(path)
        except OSError as error:
            raise DataError(f"{path}: tokenizer cannot be read: {error.strerror}") from None
        try:
            vocabulary = (read_json if path.suffix == ".json" else read_sentencepiece)(content)
            if foreign := foreign_token(vocabulary.listed, len(vocabulary.pieces)):
                raise ValueError(f"added token {foreign}, not one of CrystalCoder's")
            inside = [piece for piece in vocabulary.pieces if piece in ADDED_TOKENS] if added_tokens else []
            if inside:
                raise ValueError(f"{inside[0]} among the base pieces, where texts turn into it")
        except Exception as error:  # the engines raise bare Exception, too
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"{path}: expected a sentencepiece model or a tokenizer.json of the LLaMA kind, got: {reason[0]}"
            ) from None
        return cls(path, content, vocabulary, added_tokens)

    def encode(self, text: str) -> list[int]:
        """Base ids of `text`; no BOS or EOS is added. A lone surrogate, which has no UTF-8, becomes `?`."""
        return self._engine.encode(_utf8(text))

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(t) for t in texts]`, on several threads."""
        return self._engine.encode_many([_utf8(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: added tokens by name, control, unknown and unused ids as nothing, bad bytes as U+FFFD.

        The dummy space is dropped at the start and after BOS, EOS and added tokens, where encoding put it; an unknown
        id takes nothing with it.
        """
        out: list[str] = []
        run: list[bytes] = []
        first = self.dummy_prefix
        for i in (*map(int, ids), self.eos_id):
            piece = self.token_bytes[i] if 0 <= i < self.n_base else b""
            if piece:
                run.append(piece)
                continue
            text = b"".join(run).decode("utf-8", "replace")
            out.append(text.removeprefix(" ") if first else text)
            opens = i in (self.bos_id, self.eos_id) or i in self._names
            first = self.dummy_prefix and (opens or (first and not run))
            out.append(self._names.get(i, ""))
            run.clear()
        return "".join(out)


def foreign_token(listed: dict[int, str], n_base: int) -> str | None:
    """The first of the tokens {id: name} behind n_base that is not CrystalCoder's there, as "name at id N"."""
    for i, name in sorted(listed.items()):
        known = ADDED_TOKENS[i - n_base] if 0 <= i - n_base < len(ADDED_TOKENS) else None
        # CrystalCoder's data scripts write <name> where its released tokenizer writes <|name|>
        if known is None or name.strip("<|>") != known.strip("<|>"):
            return f"{name} at id {i}"
    return None


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_path: str | Path, bar: Bar | None = None) -> Tokenizer:
    """Train a byte-pair vocabulary of `vocab_size` base ids on `texts`, write it to `out_path` and load it.

    LLaMA's settings: byte fallback, text taken as it is (identity normalization), digits apart, pieces of
    spaces only allowed, 99.995 % of characters covered. Trained line by line, so a newline stays a byte
    token. The same texts in the same order give the same file. bar: where it shows how far it is. Raises
    VocabularyError when the texts cannot fill the vocabulary.
    """
    settings = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.99995,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "shuffle_input_sentence": False,
        "num_threads": _TRAIN_THREADS,
    }
    model = _train(settings, _lines(texts), bar or Bar(None))
    out_path = Path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out_path, model)
    return Tokenizer.load(out_path)


def _train(settings: dict, lines: Iterable[str], bar: Bar) -> bytes:
    """The trained model. In a process of its own: the trainer cannot be interrupted, a process can."""
    size = settings["vocab_size"]
    command = [sys.executable, "-P", str(_TRAINER), json.dumps(settings)]
    with child(command, **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)) as process:
        said: list[str] = []
        listener = threading.Thread(target=_follow, args=(process.stderr, size, bar, said))
        listener.start()
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why below
            for line in lines:
                process.stdin.write(line.encode("utf-8") + b"\n")
            bar.begin("training the tokenizer")
            process.stdin.close()
        output = process.stdout.read()
        process.wait()
        listener.join()
    if process.returncode == 0:
        return output
    if process.returncode == 3:
        reason = _reason(output.decode("utf-8", "replace"))
    else:
        reason = f"its process ended with {process.returncode}: {''.join(said) or 'no message'}"
    raise VocabularyError(f"a vocabulary of {size} cannot be trained: {reason}")


def _reason(said: str) -> str:
    """What sentencepiece says, in words that are about the user's text."""
    if most := re.search(r"value <= (\d+)", said):
        return f"this text can fill at most {most[1]}"
    if needed := re.search(r"required_chars\. \d+ vs (\d+)", said):
        return f"this text has so many characters that it needs more than {needed[1]}"
    return said.rpartition("] ")[2].strip() or "there is no text"


def _follow(log: IO[bytes], vocab_size: int, bar: Bar, said: list[str]) -> None:
    """Show how many merges of how many the trainer has made; `said` holds its last line."""
    for line in log:
        said[:] = [line.decode("utf-8", "replace").strip()]
        if match := re.search(r"Alphabet size=(\d+)", said[0]):
            bar.begin("training the tokenizer", max(vocab_size - int(match[1]) - _META_AND_BYTES, 1))
        elif (match := re.search(r"(?:merges|size)=(\d+)", said[0])) and bar.total is not None:
            bar.reach(min(int(match[1]), bar.total))


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines of at most 1,000 characters: the trainer skips sentences above 4,192 bytes."""
    for text in texts:
        for line in _utf8(text).split("\n"):
            for start in range(0, len(line), 1000):
                yield line[start : start + 1000]


def _utf8(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode("utf-8")
    return text
