import gzip
import hashlib
import json
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal.data.corpus import extract, filters, package_formats
from crystal.data.corpus.recipe import Entry

RST = """\
=======
Queries
=======

.. _label:
.. currentmodule:: shop

Once there is a :class:`~shop.Model`, see :doc:`the guide </guide>` or `the site <https://x.org>`_.

.. code-block:: python

    secret = 1

    other = 2

Then::

    literal = 3

A ``list`` of *things* and **more** [#f]_:

* first
  continued
* second

  ::

      nested = 4

>>> 1 + 1
2

.. note::
   :class: wide

   Mind the gap.

.. versionadded:: 5.2

:param size: how large.
:orphan:

.. a comment
   over two lines

====  ====
left  right
====  ====
"""


def members(**files):
    return [(path.replace("_", "."), content) for path, content in files.items()]


def entry(**keys):
    return Entry(license="MIT", package="npm:x@1", include=".", **keys)


def test_rst_keeps_prose_and_leaves_code_and_markup_out():
    text = extract.rst_text(RST)
    assert text.split("\n\n") == [
        "Queries",
        "Once there is a Model, see the guide or the site.",
        "Then:",
        "A list of things and more :",
        "* first\ncontinued\n* second",
        "Mind the gap.",
        "New in version 5.2",
        "size: how large.",
        "left  right",
    ]


@given(st.text(alphabet="ab :`*_.|<>\\\n=>"))
def test_rst_reads_anything_and_gives_no_more_than_was_there(text):
    assert len(extract.rst_text(text)) <= len(text)


def test_html_is_cut_to_its_part_and_stripped_of_what_is_not_seen():
    page = (
        "<html><head><title>no</title></head><body><nav>menu</nav><div id=main>"
        "<h1>A &amp; B</h1><script>x()</script><p>One\n  two.<!-- no --></p><ul><li>a<li>b</ul>"
        "<pre>keep\n  this</pre><div class=foot>end</div></body>"
    )
    text = extract.html_text(page, start="<div id=main>", stop="<div class=foot>")
    assert text == "A & B\n\nOne two.\n\n- a\n- b\n\nkeep\n  this"


def test_html_without_the_start_pattern_is_read_whole():
    assert extract.html_text("<p>all</p>", start="<main>") == "all"


def test_pod():
    pod = "=head1 NAME\n\n=over 4\n\n=item *\n\nB<bold I<and>> L<text|http://x> E<lt> C<< a > b >>\n\n=back\n\n=cut\n"
    assert extract.pod_text(pod) == "NAME\n\n* bold and text < a > b"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("héllo".encode(), "héllo"),
        ("héllo".encode("latin-1"), "héllo"),
        ("\ufeffa\r\nb\rc\x00".encode(), "a\nb\nc"),
    ],
)
def test_decode(content, text):
    assert extract.decode(content) == text


def test_code_keeps_its_indentation():
    found = list(extract.extract(entry(), [("a.py", b"\n\n  if x:\n\t\treturn\n\n")]))
    assert found == [("a.py", "  if x:\n\t\treturn\n")]


def test_split_cuts_before_every_match_and_numbers_the_parts():
    book = b"CHAPTER 1\none\nCHAPTER 2\ntwo\n"
    found = list(extract.extract(entry(split=r"(?m:^CHAPTER)"), [("b.txt", book)]))
    assert found == [("b.txt#0", "CHAPTER 1\none\n"), ("b.txt#1", "CHAPTER 2\ntwo\n")]


# ----------------------------------------------------------------------------------------------- formats


def test_verses_are_gathered_by_chapter():
    rows = [("Job", 1, 1, "a"), ("Job", 1, 2, "b"), ("Job", 2, 1, "c")]
    lines = "\n".join(json.dumps(dict(zip(("book", "chapter", "verse", "text"), r, strict=True))) for r in rows)
    found = list(package_formats.verses([("k", lines.encode())]))
    assert found == [("k#Job-1", "Job 1\n\na\nb"), ("k#Job-2", "Job 2\n\nc")]


def test_dictd_reads_each_entry_once_and_not_the_head_of_the_database():
    data = b"about\nAbacus\n {frame} of balls\nZebra\n striped"
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def line(word, start, end):
        return f"{word}\t{digits[start]}\t{digits[end - start]}\n"

    zebra = data.index(b"Zebra")
    index = line("00-database-info", 0, 6) + line("abacus", 6, zebra) + line("frame", 6, zebra)
    index += line("zebra", zebra, len(data))
    found = list(package_formats.dictd(members(d_index=index.encode(), d_dict_dz=gzip.compress(data))))
    assert found == [("d.index#0", "Abacus\n frame of balls\n\nZebra\n striped")]


def test_dictionary_entries_are_gathered_into_several_documents():
    lines = b"".join(b"1 00 n 01 dog 0 000 | " + b"x" * 900 + b"\n" for _ in range(20))
    found = list(package_formats.wordnet([("dict/data.noun", lines)]))
    assert [path for path, _ in found] == ["dict/data.noun#0", "dict/data.noun#1", "dict/data.noun#2"]


def test_wordnet_synsets():
    line = b"  1 a licence | of words\n00001740 03 n 02 dog 0 domestic_dog 0 001 @ 1 n 0 | a pet; barks  \n"
    assert list(package_formats.wordnet([("data.noun", line)])) == [
        ("data.noun#0", "dog, domestic dog (noun): a pet; barks")
    ]


def test_sword_blocks_are_cut_into_chapters_without_notes():
    osis = b'<title>Head</title><chapter sID="1"/>In the <w>beginning</w><note>no</note>.<lb/>Next &amp; last'
    block = zlib.compress(osis)
    found = list(
        package_formats.sword(members(ot_bzs=struct.pack("<III", 2, len(block), len(osis)), ot_bzz=b"zz" + block))
    )
    assert found == [("ot.bzs#0.0", "Head"), ("ot.bzs#0.1", "In the beginning.\nNext & last")]


def test_r_character_vectors():
    def record(strings):
        body = b"X\n" + bytes(12) + struct.pack(">I", 5) + b"UTF-8" + struct.pack(">II", 16, len(strings))
        for s in strings:
            body += struct.pack(">Ii", 9, -1 if s is None else len(s)) + (s or b"")
        return struct.pack(">I", len(body)) + zlib.compress(body)

    first = record([b"CHAPTER I", None, b"It is a truth"])
    found = list(package_formats.rdata([("a.rdb", first + record([b"Emma"]))]))
    assert found == [("a.rdb@0", "CHAPTER I\n\nIt is a truth"), (f"a.rdb@{len(first)}", "Emma")]


def test_factbook_headings_and_texts():
    country = {"Geography": {"Area": {"land": {"text": "5 <b>km</b> ++ flat"}}, "Note": {"text": ""}}}
    found = list(package_formats.factbook([("xx.json", json.dumps(country).encode())]))
    assert found == [("xx.json", "Geography\nArea\nland: 5 km \n flat")]


# ----------------------------------------------------------------------------------------------- filters

PROSE = "The people of the town had gone to the river, and it was late in the day for that. " * 8
CODE = "".join(f"def name_{i}(x):\n    return x + {i}\n\n" for i in range(20))
PAGE = "<html><head><style>" + "a {}" * 50 + "</style></head><body><p>" + PROSE[:300] + "</p></body></html>"


@pytest.mark.parametrize(
    ("kind", "text", "good"),
    [
        ("english", PROSE, True),
        ("english", PROSE[:300], False),
        ("english", "Les gens du village sont partis vers la grande ville ce matin. " * 10, False),
        ("english", CODE * 2, False),
        ("code", CODE, True),
        ("code", "x = 1\n", False),
        ("code", CODE * 1000, False),
        ("code", CODE + "y = [" + "1, " * 400 + "]\n", False),
        ("code", "# Generated by the tool, do not edit\n" + CODE, False),
        ("code", "////////////////////////////\n" * 30, False),
        ("code", "переменная = значение\n" * 30, False),
        ("html", PAGE, True),
        ("html", PAGE + "\n<p>" + "word " * 300 + "</p>", True),  # long lines are usual in HTML
        ("html", "<html><script>" + CODE + "</script><body>" + PROSE[:150] + "</body></html>", False),
        ("html", "<p>" + "<br class='wide'>" * 100 + PROSE[:150] + "</p>", False),
        ("none", "x", True),
        ("none", " \n", False),
    ],
)
def test_filters(kind, text, good):
    assert filters.good(text, kind) is good


def test_a_text_with_most_lines_seen_before_is_a_repeat():
    seen = filters.Seen()
    assert not seen.repeats(CODE)
    assert seen.repeats(CODE)
    assert seen.repeats("\n".join(reversed(CODE.split("\n"))))


@pytest.mark.parametrize(("old", "repeats"), [(60, False), (80, True)])
def test_a_repeat_has_over_seventy_percent_of_its_lines_seen(old, repeats):
    seen = filters.Seen()
    lines = [f"the line numbered {i}" for i in range(200)]
    assert not seen.repeats("\n".join(lines[:100]))
    assert seen.repeats("\n".join(lines[100 - old : 200 - old])) is repeats


@given(st.lists(st.text(), unique=True, max_size=20))
def test_short_texts_are_repeats_only_when_equal(texts):
    seen = filters.Seen()
    short = [text for text in texts if text.count("\n") < 4]
    assert not any(seen.repeats(text) for text in short)
    assert all(seen.repeats(text) for text in short)


def test_extraction_version_is_raised_when_texts_change():
    page, pod = (
        "<h1>T</h1><p>a <b>b</b><ul><li>c</ul><table><tr><td>d<td>e</table>",
        "=head1 A\n\nB<b> C<c>\n",
    )
    texts = [extract.rst_text(RST), extract.html_text(page), extract.pod_text(pod)]
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
    assert (extract.VERSION, digest) == (1, "22cc14158f63"), "other text: raise extract.VERSION, then pin it here"
