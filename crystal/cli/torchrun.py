"""`python -m crystal.cli.torchrun` takes torchrun's words and does what it does, but ends as its workers ended.

torchrun itself ends with 1 and a traceback after whatever was not 0: a run that was stopped and saved (130), a user's
mistake (2). Here the run's own line stands last, and its code is this command's.
"""

from __future__ import annotations

import os
import sys
import tempfile

from crystal.output import interrupts, launcher


def main(words: list[str]) -> int:
    """Run torchrun; words: its command line. Returns the exit code: its workers' where all of them ended for good with
    the same, else 1."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with tempfile.TemporaryDirectory(prefix="crystal-torchrun-") as logs:
        arguments = run.parse_args(["--log-dir", os.environ.get("PET_LOG_DIR", logs), *words])
        try:
            run.run(arguments)
            return 0
        except SignalException as stop:
            ended = launcher.how_workers_ended(arguments.log_dir)
            why = f"crystal: {stop.sigval.name}: not all processes of this machine had saved when they were ended"
        except ChildFailedError as failure:
            ended, why = launcher.how_workers_ended(arguments.log_dir), str(failure)
        code, line = ended or (1, why)
        print(line, file=sys.stderr)
        return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # while torch is imported
        sys.exit(interrupts.CODE)
