"""No damaged sweep is gone on with without a word, and none is a program's error."""

from collections import Counter

from hostile.sweeps import KINDS, cases

COUNT = 2 * len(KINDS)


def test_a_damaged_sweep_is_refused_in_one_line_or_goes_on_with_the_same_trials(tmp_path):
    words, wrong = Counter(), []
    for case in cases(0, COUNT):
        outcome = case.run(tmp_path)
        words[case.kind, outcome.word] += 1
        if outcome.word not in case.expected:
            wrong.append(f"{case.name}: {outcome.word}: {outcome.message}")
    assert not wrong, "\n".join(wrong)
    assert {kind for kind, _ in words} == KINDS.keys()
