"""Fill-in-the-middle on a packed row, as CrystalCoder's data preparation did it, but on-line.

LLM360/crystalcoder-data-prep (`fim_hdf5_stage2.py`) rewrote packed rows once and stored them. Here the same
is done when a row is read, so that every epoch sees new cuts and nothing is stored twice. The unit is a
document segment of the row's S input tokens (split at EOS). Each segment is chosen with probability `rate`;
a chosen one is decoded, cut at two uniform character positions, and its three pieces are tokenised apart:

    PSM               PREFIX prefix SUFFIX suffix MIDDLE middle
    SPM (variant 2)   PREFIX SUFFIX suffix MIDDLE prefix middle      with probability `spm_rate`

EOS follows every segment but the last, as before. The row has grown or shrunk; it is cut to length or
filled with fim_pad, which the mask leaves out of the loss.

The end of the row. The published rows are S inputs and S labels; the label of the last input is EOS,
whatever the text, unless the row was cut. After a transformed segment that EOS says where the middle ends,
and it is kept. After an untouched segment it would be a wrong label (and would touch rows in which nothing
was chosen), so there the row's own next token, its S+1st, stays. A row here is inputs and labels in one,
S+1 tokens, so that token also stands as an input before the padding, where no scored position can see it:
loss and gradients are the published ones.

Three more points where the script's text handling damages data, and what is done instead:
- BOS. It decodes `<s>` as three characters, which a cut may break. Here BOS is no text: it opens the prefix
  piece, which is where the script leaves it when it does not break it.
- A row may begin or end inside a character that is spelled in byte tokens. The script turns these bytes
  into U+FFFD. Here they stay as tokens, at the outer ends of the prefix and suffix pieces, and are not cut.
- An empty segment (a row that begins with EOS) loses its EOS in the script. Here it stays.

A segment with nothing to cut (no text) or with control or added tokens in it (already transformed) is left
as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crystal.data.tokenizer import Tokenizer


def fim_row(
    row: np.ndarray, tokenizer: Tokenizer, rate: float, spm_rate: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Transform the segments of one packed row; a pure function of its arguments and of `rng`'s state.

    row: [S+1] token ids, inputs row[:-1] and labels row[1:]. rate, spm_rate: probabilities in [0, 1].
    Returns (row' [S+1] of the same dtype, mask [S] bool): mask[i] says whether label row'[i+1] is scored.
    Raises ValueError when rate > 0 and `no_fim` has a reason.
    """
    inputs = len(row) - 1
    if rate == 0:
        return row.copy(), np.ones(inputs, dtype=bool)
    if (reason := no_fim(tokenizer)) is not None:
        raise ValueError(f"FIM needs {reason}")
    tokens: list[int] = []
    transformed = False
    segments = split_segments(row[:-1], tokenizer.eos_id)
    for number, segment in enumerate(segments):
        new = _permuted(segment, tokenizer, spm_rate, rng) if rng.random() < rate else None
        transformed = new is not None
        tokens.extend(segment if new is None else new)
        if number < len(segments) - 1:
            tokens.append(tokenizer.eos_id)
    tokens.append(tokenizer.eos_id if transformed else int(row[-1]))
    scored = min(len(tokens) - 1, inputs)
    out = np.full(len(row), tokenizer.fim_pad, dtype=row.dtype)
    out[: scored + 1] = tokens[: scored + 1]
    return out, np.arange(inputs) < scored


def no_fim(tokenizer: Tokenizer) -> str | None:
    """What FIM needs that a vocabulary has not, as the end of a sentence; None: nothing."""
    if tokenizer.fim_prefix is None:
        return "a vocabulary with CrystalCoder's added tokens"
    if tokenizer.changes_text is not None:  # cut in three, a document would lose more than it does whole
        text, back = tokenizer.changes_text
        return f"a vocabulary that gives texts back; in this one {text!r} comes back as {back!r}"
    return None


def split_segments(ids: np.ndarray, eos_id: int) -> list[list[int]]:
    """The runs of `ids` between EOS tokens: one more than there are EOS, possibly empty, EOS left out."""
    ends = np.flatnonzero(ids == eos_id)
    return [part.tolist() for part in np.split(ids, np.sort(np.concatenate([ends, ends + 1])))[::2]]


def _permuted(segment: list[int], tokenizer: Tokenizer, spm_rate: float, rng: np.random.Generator) -> list[int] | None:
    """The segment in PSM or SPM order, or None when there is nothing to cut."""
    head = segment[:1] if segment[:1] == [tokenizer.bos_id] else []
    body = segment[len(head) :]
    pieces = [tokenizer.token_bytes[i] if i < tokenizer.n_base else b"" for i in body]
    if not all(pieces):
        return None
    first, last = _whole_characters(pieces)
    text = b"".join(pieces[first:last]).decode("utf-8", "replace")
    if first == 0 and tokenizer.dummy_prefix:
        text = text.removeprefix(" ")  # the dummy space, which encoding puts back
    if not text:
        return None
    low, high = sorted(rng.integers(0, len(text) + 1, size=2).tolist())
    prefix = head + body[:first] + tokenizer.encode(text[:low])
    middle = tokenizer.encode(text[low:high])
    suffix = tokenizer.encode(text[high:]) + body[last:]
    if rng.random() < spm_rate:
        return [tokenizer.fim_prefix, tokenizer.fim_suffix, *suffix, tokenizer.fim_middle, *prefix, *middle]
    return [tokenizer.fim_prefix, *prefix, tokenizer.fim_suffix, *suffix, tokenizer.fim_middle, *middle]


def _whole_characters(pieces: Sequence[bytes]) -> tuple[int, int]:
    """(first, last): pieces[first:last] leaves out the byte tokens of a character cut off at either end."""
    first = 0
    while first < min(3, len(pieces)) and len(pieces[first]) == 1 and 0x80 <= pieces[first][0] < 0xC0:
        first += 1
    for back in range(1, min(3, len(pieces) - first) + 1):
        piece = pieces[-back]
        if len(piece) != 1 or piece[0] < 0x80:
            break
        if piece[0] >= 0xC0:  # a lead byte: 2, 3 or 4 bytes are wanted, `back` of them are here
            wanted = 2 + (piece[0] >= 0xE0) + (piece[0] >= 0xF0)
            return first, len(pieces) - (back if back < wanted else 0)
    return first, len(pieces)
