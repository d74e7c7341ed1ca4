"""No damaged token store is read without a word: it is refused in one line, or gives the undamaged one's bits."""

from hostile.case import expect_right
from hostile.stores import KINDS, cases


def test_a_damaged_token_store_is_refused_in_one_line_or_gives_the_undamaged_ones_bits(tmp_path):
    words = expect_right(cases(0, 2 * len(KINDS)), tmp_path)
    assert {kind for kind, _ in words} == KINDS.keys()
