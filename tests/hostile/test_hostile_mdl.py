"""No damaged .mdl is imported as something else than it was, nor takes anything along that lies elsewhere.

`make proof` runs many more.
"""

from hostile.case import expect_right
from hostile.mdl import DAMAGES, cases

COUNT, SEED = 80, 1


def test_a_damaged_mdl_is_refused_in_one_line_or_gives_what_the_undamaged_one_gives(tmp_path):
    words = expect_right(cases(SEED, COUNT), tmp_path)
    assert {kind for kind, _ in words} == DAMAGES.keys()
    assert sum(n for (_, word), n in words.items() if word == "refused") > COUNT // 3
