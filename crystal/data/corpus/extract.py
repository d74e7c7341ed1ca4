"""Prose out of what packages hold: reStructuredText, HTML and POD turned into the text a reader sees.

Code samples, tables and references to other pages are left out of reStructuredText: the english sources
stand for web text, and code has sources of its own. These are readers by line and by pattern, not parsers.
They drop what they do not understand rather than fail, and they are fast, since all of a corpus goes through
them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from crystal.data.corpus import package_formats
from crystal.data.corpus.recipe import Entry

VERSION = 1  # raise it when an archive gives other documents (also by formats or filters): corpora are remade


def extract(entry: Entry, members: list[tuple[str, bytes]]) -> Iterator[tuple[str, str]]:
    """(path, text) of each document in the members of a package. Texts end in one newline."""
    if entry.extract in package_formats.READERS:
        documents = package_formats.READERS[entry.extract](members)
    else:
        documents = ((path, _text(entry, decode(content))) for path, content in members)
    for path, text in documents:
        if entry.split is None:
            yield path, text.strip("\n") + "\n"
        else:
            parts = re.split(f"(?={entry.split})", text)
            for number, part in enumerate(part for part in parts if part.strip()):
                yield f"{path}#{number}", part.strip("\n") + "\n"


def decode(content: bytes) -> str:
    """UTF-8, or Latin-1 where it is not; line ends as \\n; no byte order mark, no NUL."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff").replace("\x00", "")


def _text(entry: Entry, text: str) -> str:
    if entry.extract == "rst":
        return rst_text(text)
    if entry.extract == "html":
        return html_text(text, entry.start, entry.stop)
    if entry.extract == "pod":
        return pod_text(text)
    return text


def tidy(text: str) -> str:
    """No trailing blanks, at most one empty line in a row, plain spaces."""
    text = text.replace("\u00a0", " ").replace("\u200b", "")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()


# ------------------------------------------------------------------------------------- reStructuredText

_DIRECTIVE = re.compile(r"\.\. (?:\|[^|]+\| ?)?([\w:+.-]+)::(.*)")
_RULE = re.compile(r"[=\-~^\"'`#*+.:_<>!|\s]{3,}")
_FIELD = re.compile(r":(?:(?:param|arg|keyword|raises|ivar|cvar|var) )?([^:`]+):(?:\s+(.*)|$)")
_VERSION_NOTE = {
    "versionadded": "New in version",
    "versionchanged": "Changed in version",
    "deprecated": "Deprecated in",
}
_WITHOUT_PROSE = re.compile(
    r"(?:[a-z]+:)?(?:code(-block)?|sourcecode|literalinclude|highlight.*|include|image|figure|toctree|index|raw"
    r"|math|csv-table|table|list-table|test(code|setup|output|cleanup)|doctest|ipython|parsed-literal"
    r"|productionlist|graphviz|digraph|graph|inheritance-diagram|plot|auto.*|module|currentmodule|contents"
    r"|sectnum|section-numbering|default-role|role|meta|rst-class|cssclass|bibliography|tabularcolumns"
    r"|sectionauthor|moduleauthor|kernel-.*|flat-table|replace|unicode|date|targets|sidebar|console|prompt"
    r"|c|py|namespace.*)"
)


def rst_text(text: str) -> str:
    """The prose of a reStructuredText page: headings, paragraphs, lists, notes and descriptions."""
    out: list[str] = []
    dropping = -1  # a block indented deeper than this is left out; -1: none is
    options = doctest = False
    for line in text.expandtabs(8).split("\n"):
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if dropping >= 0:
            if not bare or indent > dropping:
                continue
            dropping = -1
            out.append("")
        if not bare:
            options = doctest = False
            out.append("")
            continue
        if doctest or bare.startswith((">>>", "In [")):
            doctest = True
        elif directive := _DIRECTIVE.match(bare):
            if _WITHOUT_PROSE.fullmatch(directive[1].lower()):
                dropping = indent
            else:
                options = True
                note = _VERSION_NOTE.get(directive[1].lower(), "")
                out.extend(("", f"{note} {directive[2].strip()}".strip()))
        elif bare == ".." or bare.startswith(".. "):  # a comment, a target or a footnote
            dropping = indent
        elif field := _FIELD.match(bare):
            if not options and field[2]:
                out.append(f"{field[1]}: {field[2]}")
        elif not _RULE.fullmatch(bare) and not bare.startswith(("|", "+--", "+==")):
            if bare.endswith("::"):  # the next block is literal
                dropping = indent
                bare = bare[:-1]
            if bare != ":":
                out.append(bare)
    return tidy(_rst_inline("\n".join(out)))


def _rst_inline(text: str) -> str:
    text = re.sub(r":[\w:+.-]+:`([^`]+)`", _rst_role, text)
    text = re.sub(r"``(.+?)``", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"\[#?[\w*]*\]_", "", text)
    text = re.sub(r"(?<!\w)`([^`<]+?)\s*<[^`>]*>`_{0,2}", r"\1", text)
    text = re.sub(r"(?<!\w)`([^`]+)`_{0,2}", r"\1", text)
    text = re.sub(r"(?<![\w*])(\*\*?)(?=[^\s*])([^*]*[^\s*])\1(?![\w*])", r"\2", text)
    return re.sub(r"\\(.)", lambda m: "" if m[1] == " " else m[1], text)


def _rst_role(match: re.Match) -> str:
    shown = match[1].partition("<")[0].strip() or match[1].strip("<>")
    return shown.rpartition(".")[2] if shown.startswith("~") else shown.lstrip("!._")


# ------------------------------------------------------------------------------------------------- HTML

_UNSEEN = re.compile(r"(?is)<!--.*?-->|<(script|style|head|nav|header|footer|aside|svg|button)\b.*?</\1\s*>")
_BLOCK = re.compile(
    r"(?i)</?(p|div|h[1-6]|ul|ol|dl|dd|dt|table|thead|tbody|section|article|main|blockquote|figure"
    r"|title|page|note|list|item|steps|desc|terms|hr)\b[^>]*>"
)
TAG = re.compile(r"<[^>]+>")


def html_text(page: str, start: str | None = None, stop: str | None = None) -> str:
    """The visible text of a page, or of the part between the patterns `start` and `stop`."""
    if start and (begin := re.search(start, page)):
        page = page[begin.end() :]
    if stop and (end := re.search(stop, page)):
        page = page[: end.start()]
    out = []
    for number, part in enumerate(re.split(r"(?is)<pre\b[^>]*>(.*?)</pre>", _UNSEEN.sub(" ", page))):
        if number % 2:  # preformatted: its lines are its own
            out.append("\n\n" + TAG.sub("", part).strip("\n") + "\n\n")
            continue
        part = re.sub(r"(?i)<li\b[^>]*>", "\n- ", " ".join(part.split()))
        part = re.sub(r"(?i)<(br|/tr|/li)\b[^>]*>", "\n", part)
        part = re.sub(r"(?i)</t[dh]>", " ", _BLOCK.sub("\n\n", part))
        out.append(re.sub(r"\n +", "\n", TAG.sub("", part)))
    return tidy(html.unescape("".join(out)))


# -------------------------------------------------------------------------------------------------- POD


def pod_text(text: str) -> str:
    """The text of Perl's Plain Old Documentation; indented samples stay."""
    text = re.sub(r"(?ms)^=(begin|for)\b.*?^=(end|cut)\b[^\n]*", "", text)
    text = re.sub(r"(?m)^=item \*\s+", "* ", text)
    text = re.sub(r"(?m)^=(head\d|item)\s+", "", text)
    text = re.sub(r"(?m)^=\w+[^\n]*\n", "", text)
    named = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}
    for _ in range(3):  # codes nest
        text = re.sub(r"\bL<(?:([^|<>]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
        text = re.sub(r"\b[ZX]<[^<>]*>", "", text)
        text = re.sub(r"\bE<(\w+)>", lambda m: named.get(m[1], ""), text)
        text = re.sub(r"\b[BICFSN]<(?:< (.*?) >|([^<>]*))>", lambda m: m[1] or m[2] or "", text)
    return tidy(text)
