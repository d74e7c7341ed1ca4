"""Documents held out for validation from a source so small that its share of them would be less than a row.

Usually each document is held out or not by its own hash, whatever else there is. Of a small source that may leave
nothing to validate on, so the next documents in the order of the hash are held out as well.
"""

from __future__ import annotations

from crystal.data import pack

_MOST = 10_000  # documents kept in mind; a source of more that has no row held out yet is left as it is


class Small:
    """The documents that may be held out of a source, while it is not known to be large."""

    def __init__(self) -> None:
        self.documents: list[tuple[float, str, int]] = []

    def add(self, fraction: float, document_id: str, tokens: int) -> None:
        """Keep one in mind; fraction: its place in the order in which documents are held out."""
        if len(self.documents) < _MOST:
            self.documents.append((fraction, document_id, tokens))

    def choose(self, tokens: int, most: int) -> set[str]:
        """Ids of the first documents with at least `tokens` together and at most `most`; none where none have."""
        chosen, held = set(), 0
        for _, document_id, size in sorted(self.documents):
            if held < tokens and held + size <= most:
                chosen.add(document_id)
                held += size
        return chosen if held >= tokens else set()


def hold_out(train: pack.Spool, val: pack.Spool, small: Small, row: int) -> tuple[pack.Spool, str]:
    """Move documents from `train` to `val` until it has a row of so many tokens.

    Returns the spool of what is left for training, and what to tell the user. Nothing is moved where less would be
    left for training than is held out.
    """
    chosen = small.choose(row - val.tokens, most=(train.tokens - val.tokens) // 2)
    if not chosen:
        return train, "too little text to hold a row of it out: all of it is trained on"
    rest = pack.Spool(train.directory.with_suffix(".rest"), train.seed, train.dtype)
    for record, tokens in train.shuffled():
        (val if record["id"] in chosen else rest).add(record, tokens)
    share = val.tokens / (val.tokens + rest.tokens)
    return rest, f"a small source: documents with {val.tokens:,} tokens, {share:.0%} of it, are held out for validation"
