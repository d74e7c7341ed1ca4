"""Text on its way to a terminal: whatever could move, color or reorder what is shown is escaped, and what the
terminal's encoding lacks takes another form."""

from __future__ import annotations

import codecs
import re
import unicodedata

SIGNS = "crystal.signs"  # an error handler of codecs, for streams: see `_without`

# C0, DEL and C1 controls, which terminals obey; bidi overrides and isolates, which reorder the rest of the line;
# lone surrogates, which no encoding can write
_UNSAFE = "\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_A_LINE = re.compile(f"[{_UNSAFE}]")
_IN_A_TEXT = re.compile(f"(?![\n\t])[{_UNSAFE}]")


def printable(text: str) -> str:
    """`text` with control characters shown as escapes (\\x1b, \\u202e); newlines and tabs stay."""
    return _IN_A_TEXT.sub(_escaped, text)


def printable_line(text: str) -> str:
    """A name or a message: as `printable`, and newlines and tabs are shown as escapes too."""
    return _IN_A_LINE.sub(_escaped, text)


def writable(text: str, encoding: str | None) -> str:
    """`text` in the form in which a stream of that encoding shows it; for what others print, who know no SIGNS."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, SIGNS).decode(encoding)


def _escaped(match: re.Match) -> str:
    return _escape(match[0])


def _without(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks: `~` for a sign (∝ … ± → ━), an escape for a letter, so that
    names stay apart."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join("~" if unicodedata.category(c)[0] in "PSZ" else _escape(c) for c in lacking), error.end


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


codecs.register_error(SIGNS, _without)
