"""No damaged run directory is a program's error to any command that reads one, or makes one hang."""

from hostile.case import expect_right
from hostile.run_directories import KINDS, cases

COUNT = 2 * len(KINDS)


def test_a_damaged_run_directory_is_read_as_far_as_it_goes_or_refused_in_one_line(tmp_path):
    words = expect_right(cases(0, COUNT), tmp_path)
    assert {kind for kind, _ in words} == KINDS.keys()
