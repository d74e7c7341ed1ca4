"""Run a command in this process; on its way through imports a copy of the process is interrupted, again and again.

    python interrupt_imports.py EVERY COMMAND...

Of the lines of modules that are being imported every EVERYth is taken, and all of the modules that the way out of a
command looks into. The copy is to end with 130 and one line, wherever it stands. Prints a line for each that does not,
and how many were tried.
"""

import os
import signal
import sys
import tempfile
import traceback
from types import FrameType

LOOKED_INTO = (
    "/torch/distributed/__init__.py",
    "/multiprocessing/__init__.py",
    "/multiprocessing/process.py",
    "/crystal/output/progress.py",
)


class Interrupt:
    """A trace function."""

    def __init__(self, every: int) -> None:
        self.every, self.seen, self.tried, self.wrong = every, 0, set(), []

    def __call__(self, frame: FrameType, event: str, value: object) -> object:
        return self.at_line if frame.f_code.co_name == "<module>" else None

    def at_line(self, frame: FrameType, event: str, value: object) -> object:
        self.seen += 1
        line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        looked_into = frame.f_code.co_filename.endswith(LOOKED_INTO)
        if line in self.tried or (self.seen % self.every and not looked_into):
            return self.at_line
        self.tried.add(line)
        sys.stderr.flush()
        with tempfile.TemporaryFile() as said:
            copy = os.fork()
            if copy == 0:
                os.dup2(said.fileno(), 2)
                return self.interrupted()
            _, status = os.waitpid(copy, 0)
            said.seek(0)
            found = os.waitstatus_to_exitcode(status), said.read().decode()
        if found != (130, "crystal: interrupted\n"):
            self.wrong.append((line, *found))
        return self.at_line

    def interrupted(self) -> None:
        sys.settrace(None)
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except Exception:  # under C++ that imports Python it would abort the process
            traceback.print_exc()
            os._exit(1)


def listening() -> None:
    """Stop signals are heard from here on."""
    listen()
    sys.settrace(interrupt)


if __name__ == "__main__":
    from crystal.cli import __main__ as crystal

    every, *sys.argv[1:] = sys.argv[1:]
    interrupt = Interrupt(int(every))
    listen, crystal.interrupts.listen = crystal.interrupts.listen, listening
    try:
        crystal.main()  # from a module's own line, as the `crystal` script does
    except SystemExit as end:
        sys.settrace(None)
        for line, code, said in interrupt.wrong:
            print(f"WRONG at {line}: exit code {code}, {said[-2000:]!r}")
        print(f"the command ended with {end.code}; interrupted at {len(interrupt.tried)} of {interrupt.seen} lines")
