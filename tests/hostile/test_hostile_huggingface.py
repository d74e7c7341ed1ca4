"""No damaged Hugging Face directory is imported as something else than it says, and none of its code runs.

`make proof` runs many more.
"""

from hostile.case import expect_right
from hostile.huggingface import DAMAGES, cases

COUNT, SEED = 150, 1


def test_a_damaged_directory_is_refused_in_one_line_or_gives_what_it_says(tmp_path):
    words = expect_right(cases(SEED, COUNT), tmp_path)
    assert {kind for kind, _ in words} == DAMAGES.keys()
    assert sum(n for (_, word), n in words.items() if word == "refused") > COUNT // 3
