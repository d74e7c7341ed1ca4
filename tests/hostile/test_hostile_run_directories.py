"""No damaged run directory is a program's error to any command that reads one, or makes one hang."""

from collections import Counter

from hostile.run_directories import KINDS, cases

COUNT = 2 * len(KINDS)


def test_a_damaged_run_directory_is_read_as_far_as_it_goes_or_refused_in_one_line(tmp_path):
    words, wrong = Counter(), []
    for case in cases(0, COUNT):
        outcome = case.run(tmp_path)
        words[case.kind, outcome.word] += 1
        if outcome.word not in case.expected:
            wrong.append(f"{case.name}: {outcome.word}: {outcome.message[:300]}")
    assert not wrong, "\n".join(wrong)
    assert {kind for kind, _ in words} == KINDS.keys()
