"""Text of unknown origin on its way to a terminal: whatever could move, color or reorder what is shown is escaped."""

from __future__ import annotations

import re

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


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
