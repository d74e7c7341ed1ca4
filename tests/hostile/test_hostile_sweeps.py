"""No damaged sweep is gone on with without a word, and none is a program's error."""

from hostile.case import expect_right
from hostile.sweeps import KINDS, cases

COUNT = 2 * len(KINDS)


def test_a_damaged_sweep_is_refused_in_one_line_or_goes_on_with_the_same_trials(tmp_path):
    words = expect_right(cases(0, COUNT), tmp_path)
    assert {kind for kind, _ in words} == KINDS.keys()
