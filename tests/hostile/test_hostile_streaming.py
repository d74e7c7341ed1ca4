"""No damaged store is trained from or read without a word."""

from hostile.case import expect_right
from hostile.streaming import DAMAGES, cases


def test_a_damaged_store_is_refused_in_one_line_or_gives_the_undamaged_ones_bits(tmp_path):
    words = expect_right(cases(0, 6 * len(DAMAGES)), tmp_path)
    assert all(words[kind, "refused"] for kind in DAMAGES)
