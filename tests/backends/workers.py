"""Processes of `crystal train` as torchrun starts them, forked from one that has imported everything; no torchrun.

What torchrun is for them here: their environment, a directory for last words, and the signals it would forward.
"""

import json
import os
import pkgutil
import signal
import socket
import sys
import time
from multiprocessing import get_context
from pathlib import Path

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "torch.utils.tensorboard", "crystal.cli.main", "crystal.training.start", "crystal.backends.cuda.backend",
     "crystal.training.plots", "workers"]
)  # fmt: skip
PLOT = "crystal.training.plots.plot_losses"
LAYOUT = ["backend.name=cuda", "backend.device=cpu", "backend.dtype=fp32", "backend.compile=false"]


class Workers:
    """`crystal train PATH WORDS` in so many processes.

    changes: (function by its dotted name, what it does now): wait so many seconds before its work; None or False, give
    that; a rank: fail there. attempt, restarts: torchrun's count of starts before this one, and the most there may be.
    """

    def __init__(self, path, root: Path, *words, processes=2, changes=(), attempt=0, restarts=0):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.root, self.run_dir = root, root / "run"
        self.prints = [root / f"prints-{attempt}-{rank}" for rank in range(processes)]
        self.processes = []
        for rank in range(processes):
            place = root / f"attempt_{attempt}" / str(rank)
            place.mkdir(parents=True)
            environment = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "GROUP_WORLD_SIZE": 1,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
                "TORCHELASTIC_RESTART_COUNT": attempt, "TORCHELASTIC_MAX_RESTARTS": restarts,
                "TORCHELASTIC_ERROR_FILE": place / "error.json",
            }  # fmt: skip
            environment = dict(os.environ) | {name: str(value) for name, value in environment.items()}
            command = ["train", str(path), *LAYOUT, f"run_dir={self.run_dir}", *map(str, words)]
            arguments = (command, self.prints[rank], environment, [(PLOT, None), *changes])
            process = CONTEXT.Process(target=_worker, args=arguments, daemon=True)
            process.start()
            self.processes.append(process)

    def until(self, true, seconds=300):
        """Wait for a condition while all are at work."""
        end = time.monotonic() + seconds
        while not true():
            assert all(p.is_alive() for p in self.processes), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.005)

    def steps(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return max([json.loads(line)["step"] for line in path.read_text().splitlines()], default=0) if (
            path.exists() and path.read_text().endswith("\n")
        ) else 0  # fmt: skip

    def kill(self, number, *ranks):
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def ended(self, seconds=120) -> list[int]:
        """Their exit codes."""
        try:
            for process in self.processes:
                process.join(seconds)
        finally:
            for process in self.processes:
                process.kill()
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        return "\n".join(path.read_text() for path in self.prints if path.exists())


def _worker(words, prints, environment, changes):
    import torch

    from crystal.cli.__main__ import main

    os.environ.clear()
    os.environ |= environment
    torch.set_num_threads(1)
    with open(prints, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["crystal", *words]
    for name, change in changes:
        _change(name, change)
    main()


def _change(name, change):
    owner, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    original = getattr(owner, attribute)

    def changed(*args, **kwargs):
        if change is None or change is False:
            return change
        if isinstance(change, int):
            if int(os.environ["RANK"]) == change:
                raise ValueError("broken on purpose")
            return original(*args, **kwargs)
        until = time.monotonic() + change
        while (left := until - time.monotonic()) > 0:
            time.sleep(left)
        return original(*args, **kwargs)

    setattr(owner, attribute, changed)
