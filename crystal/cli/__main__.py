"""The process of the command, however it is started: stop signals count from here on, while all else is imported."""

import sys
import traceback

from crystal.output import interrupts, launcher
from crystal.output.ranks import has_launcher, is_first, rank


def main() -> None:
    """Run the command line to its end, which is SystemExit with the exit code."""
    interrupts.listen()
    try:
        _run()
    except (KeyboardInterrupt, Exception) as error:  # before the command began, or while its end was told
        if not interrupts.is_end(error):
            raise
        interrupts.tell()
        interrupts.over(interrupts.CODE)
        sys.exit(interrupts.CODE)


def _run() -> None:
    launcher.die_with_torchrun()
    _end_like_those_before()
    from crystal.cli.main import main as command

    try:
        command()
    except SystemExit as stop:
        interrupts.over(stop.code or 0)
        raise
    except Exception as error:
        if not has_launcher() or interrupts.is_end(error):
            raise
        _say_in_a_line(error)
        interrupts.over(1)
        sys.exit(1)


def _say_in_a_line(error: Exception) -> None:
    """Of several processes each would print a long trace: it stands in RUN/logs, and in torchrun's summary."""
    from crystal.output.printable import printable_line
    from crystal.training.rank_log import lost_another

    said = printable_line(f"{type(error).__name__}: {error}")[:500]
    if not lost_another(error):
        launcher.leave_last_words(said, trace=traceback.format_exc())
        print(f"crystal: process {rank()}: {said}", file=sys.stderr)
    elif is_first():  # without last words: torchrun is to name the other as the cause
        print(f"crystal: another process is lost (the run's post-mortem.txt says more): {said}", file=sys.stderr)


def _end_like_those_before() -> None:
    """torchrun tried again what ended for good: say so once, in the end."""
    launcher.note_that_it_began()
    if ended := launcher.ended_for_good():
        code, line = ended
        launcher.leave_last_words(line, code)
        if is_first() and launcher.is_last_attempt():
            print(line, file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
