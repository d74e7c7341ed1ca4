"""No damaged token store is read without a word: it is refused in one line, or gives the undamaged one's bits."""

from collections import Counter

import pytest
from hostile.stores import KINDS, cases


@pytest.mark.parametrize("seed", [0])  # more of them: make proof
def test_a_damaged_token_store_is_refused_in_one_line_or_gives_the_undamaged_ones_bits(tmp_path, seed):
    words, wrong = Counter(), []
    for number, case in enumerate(cases(seed, 2 * len(KINDS))):
        outcome = case.run(tmp_path / str(number))
        words[case.kind, outcome.word] += 1
        if outcome.word not in case.expected:
            wrong.append(f"{case.name}: {outcome.word}: {outcome.message}")
    assert not wrong, "\n".join(wrong)
    assert {kind for kind, _ in words} == KINDS.keys()
