"""The parts of a corpus recipe, the YAML under configs/corpora/: entries and sources.

A source (english, python, …) is made of entries, read in order. An entry is either a published package,
which is read in place and never installed, or files of the user's own. Every entry states the licence of the
text that is taken from it, so that each document can carry one.
"""

from __future__ import annotations

import re
import warnings
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from crystal.config import Strict, Tally
from crystal.config.bounded_yaml import shortened

PACKAGE = re.compile(
    r"pypi:(?P<pypi>[A-Za-z0-9][\w.-]*)==(?P<pypi_version>[\w.!+]+)"
    r"|deb:(?P<deb>[a-z0-9][a-z0-9+.-]+)(?:=(?P<deb_version>[\w.:~+-]+))?"
    # npm takes a word that begins with - for an option, one with . for a directory
    r"|npm:(?P<npm>(?:@\w[\w.-]*/)?\w[\w.-]*)@(?P<npm_version>\w[\w.+-]*)",
    re.ASCII,
)
_FILES_ONLY = {"text_key", "id_key", "license_key", "where", "skip_bad"}
_PACKAGE_ONLY = {"archive", "sha256", "include", "exclude", "extract", "start", "stop", "split"}


LONGEST = 2000  # characters of a regular expression
LONGEST_NAME = 200  # of a package with its version: a folder of the cache is called by it


def _regex(value: str | None) -> str | None:
    if value is not None and len(value) > LONGEST:
        raise ValueError(f"expected a regular expression of at most {LONGEST:,} characters, got {len(value):,}")
    if value is not None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                re.compile(value)
        except (re.error, OverflowError) as error:
            raise ValueError(f"expected a regular expression, got {shortened(value)!r} ({error})") from None
        except RecursionError:
            raise ValueError(f"expected a regular expression with fewer brackets, got {shortened(value)!r}") from None
    return value


class Entry(Strict):
    """One place documents come from: exactly one of `package` and `files`."""

    license: str = Field(min_length=1)  # SPDX
    max_bytes: Tally | None = None

    package: str | None = None  # pypi:NAME==VERSION, npm:NAME@VERSION, deb:NAME, deb:NAME=VERSION
    archive: Literal["wheel", "sdist"] = "wheel"  # which of the two of a pypi: package
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    include: str | None = None  # a regular expression searched in each member's path
    exclude: str | None = None
    extract: Literal["text", "rst", "html", "pod", "verses", "dictd", "wordnet", "sword", "rdata", "factbook"] = "text"
    start: str | None = None  # extract html: the text begins after the first match …
    stop: str | None = None  # … and ends before the next match of this
    split: str | None = None  # a document is cut before every match

    files: str | None = Field(
        default=None, min_length=1
    )  # a file, a directory (of rows) or a glob, relative to the recipe
    text_key: str = "text"  # keys of a row, dotted where nested
    id_key: str | None = None
    license_key: str | None = None
    where: dict[str, str] = Field(default_factory=dict)  # only rows that hold these values
    skip_bad: bool = False  # pass over rows without text and files that are not UTF-8; else the first is an error

    _regexes = field_validator("include", "exclude", "start", "stop", "split")(_regex)

    @field_validator("package")
    @classmethod
    def _known_index(cls, value: str | None) -> str | None:
        if value is not None and (len(value) > LONGEST_NAME or not PACKAGE.fullmatch(value)):
            forms = "pypi:NAME==VERSION, npm:NAME@VERSION, deb:NAME or deb:NAME=VERSION"
            raise ValueError(f"expected {forms}, got {shortened(value)!r}")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.package is None) == (self.files is None):
            raise ValueError("expected one of 'package' and 'files'")
        place, other = ("package", _FILES_ONLY) if self.package else ("files", _PACKAGE_ONLY)
        if wrong := self.model_fields_set & other:
            raise ValueError(f"'{min(wrong)}' has no meaning beside '{place}'")
        if self.package and self.include is None:
            raise ValueError("expected 'include', a regular expression for the members to read")
        return self


class Source(Strict):
    """One class of text."""

    filter: Literal["english", "code", "html", "none"] = "none"  # crystal.data.corpus.filters
    exclude: str | None = None  # of every package here, beside the entry's own
    max_bytes: Tally | None = None
    entries: tuple[Entry, ...] = Field(min_length=1)

    _regexes = field_validator("exclude")(_regex)
