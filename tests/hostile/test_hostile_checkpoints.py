"""No damaged checkpoint or run directory is used without a word, and none is a program's error."""

from hostile.case import expect_right
from hostile.checkpoints import ALWAYS_FINE, DAMAGES, RUN_DAMAGES, cases, run_cases


def test_a_damaged_checkpoint_is_refused_in_one_line_or_gives_what_the_undamaged_one_gives(tmp_path):
    words = expect_right(cases(0, 6 * len(DAMAGES)), tmp_path)
    assert all(words[kind, "refused"] for kind in DAMAGES)


def test_a_damaged_run_directory_goes_on_to_the_same_loss_or_is_refused_in_one_line(tmp_path):
    words = expect_right(run_cases(0, 3 * len(RUN_DAMAGES)), tmp_path)
    assert all(words[kind, "fine" if kind in ALWAYS_FINE else "refused"] for kind in RUN_DAMAGES)
