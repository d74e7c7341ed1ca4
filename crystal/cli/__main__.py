"""The process of the command, however it is started: Ctrl-C counts from here on, while all else is imported."""

import sys

from crystal.output import interrupts


def main() -> None:
    """Run the command line to its end, which is SystemExit with the exit code."""
    interrupts.listen()
    from crystal.cli.main import main as command

    try:
        command()
    except SystemExit as stop:
        interrupts.over(stop.code or 0)
        raise


if __name__ == "__main__":
    sys.exit(main())
