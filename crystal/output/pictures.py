"""Pictures on their way to a file: colors, axes that are read at a glance, and one line for a path that cannot be.

Names come from users and are drawn as they stand: `$` starts no formula, and `_` hides nothing from a legend.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.errors import ConfigError, RunError
from crystal.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf", "svg")
# Okabe and Ito's, which color-blind readers tell apart, without black and yellow, which lines and text need.
_FEW = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#999999")


def colors(count: int) -> list[str]:
    """As many colors, no two the same; up to eight are told apart by color-blind readers too."""
    import matplotlib
    from matplotlib.colors import hsv_to_rgb, to_hex

    if count <= len(_FEW):
        return list(_FEW[:count])
    if count <= 20:  # ten hues, dark ones first
        pairs = [to_hex(c) for c in matplotlib.colormaps["tab20"].colors]
        return (pairs[::2] + pairs[1::2])[:count]
    return [to_hex(hsv_to_rgb((i / count, (0.9, 0.55, 0.75)[i % 3], (0.85, 0.7, 0.5)[i % 3]))) for i in range(count)]


def legible_on(color: str) -> str:
    """Black or white, whichever is read more easily on a color (WCAG's relative luminance)."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.179 else "white"


def short(number: float) -> str:
    """1,500 as 1.5k, 2,000,000 as 2M, then B and T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.99995 * size:
            return f"{number / size:.4g}{unit}"
    return f"{number:.4g}"


def literal(name: str) -> str:
    """A name for a legend, which leaves out what begins with `_`; control characters are escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return f"\u200b{shown}" if shown.startswith("_") else shown


def save(make: Callable[[], Figure], path: Path) -> None:
    """Draw a figure and write it in the format that the path's suffix names (none: PNG).

    Raises ConfigError where the suffix is another, or the path cannot be written; nothing half-written is left.
    """
    import matplotlib

    form = path.suffix.lower().removeprefix(".") or "png"
    if form not in FORMATS:
        raise ConfigError(f"{path}: expected a picture's name that ends in .png, .pdf or .svg")
    try:
        file = path.resolve()  # a link's target is written, the link stays
        if file.exists() and not file.is_file():  # never renamed over, as a directory or /dev/null would be
            raise ConfigError(f"{path}: expected the name of a picture, this is no ordinary file")
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        why = getattr(error, "strerror", None) or error
        raise RunError(f"{path}: the picture cannot be written: {why}") from None
    content = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False, "pdf.fonttype": 42}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in letters that the font lacks
        make().savefig(content, format=form, dpi=120)
    try:
        write_whole(file, content.getvalue())
    except OSError as error:
        raise RunError(f"{path}: the picture cannot be written: {error.strerror}") from None
