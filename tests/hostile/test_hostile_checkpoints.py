"""No damaged checkpoint or run directory is used without a word, and none is a program's error."""

from collections import Counter

import pytest
from hostile.checkpoints import ALWAYS_FINE, DAMAGES, RUN_DAMAGES, cases, run_cases


def judge(made, tmp_path):
    words, wrong = Counter(), []
    for number, case in enumerate(made):
        outcome = case.run(tmp_path / str(number))
        words[case.kind, outcome.word] += 1
        if outcome.word not in case.expected:
            wrong.append(f"{case.name}: {outcome.word}: {outcome.message}")
    assert not wrong, "\n".join(wrong)
    return words


@pytest.mark.parametrize("seed", [0])  # more of them: make proof
def test_a_damaged_checkpoint_is_refused_in_one_line_or_gives_what_the_undamaged_one_gives(tmp_path, seed):
    words = judge(cases(seed, 6 * len(DAMAGES)), tmp_path)
    assert all(words[kind, "refused"] for kind in DAMAGES)


def test_a_damaged_run_directory_goes_on_to_the_same_loss_or_is_refused_in_one_line(tmp_path):
    words = judge(run_cases(0, 3 * len(RUN_DAMAGES)), tmp_path)
    assert all(words[kind, "fine" if kind in ALWAYS_FINE else "refused"] for kind in RUN_DAMAGES)
