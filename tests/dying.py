"""Training processes that are killed: from outside, or by themselves at a chosen write of their weight-streaming store.

They are forked from one that has imported torch, have one thread, and the environment of the test that starts them.
"""

import os
import signal
import sys
from multiprocessing import get_context

from rich.console import Console

CONTEXT = get_context("forkserver")  # one process imports torch, the others are forked from it
CONTEXT.set_forkserver_preload(
    ["torch", "torch.utils.tensorboard", "crystal.cli.main", "crystal.training.start", "dying"]
)


def start_command(*words, prints):
    """`crystal WORDS`, which prints into a file."""
    process = CONTEXT.Process(target=_command, args=(words, prints, dict(os.environ)), daemon=True)
    process.start()
    return process


def _command(words, prints, environment):
    import torch

    from crystal.cli.main import main

    os.environ |= environment
    torch.set_num_threads(1)
    with open(prints, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["crystal", *map(str, words)]
    main()


def start_training(path, where=None, count=0):
    """A process that trains the run file; it kills itself at the count-th write (from 0) of `where`.

    where: gradients or state, half-way through the write; record or boundaries, just before it; None for no such end.
    """
    process = CONTEXT.Process(target=_train, args=(path, where, count, dict(os.environ)), daemon=True)
    process.start()
    return process


def _train(path, where, count, environment):
    import torch

    from crystal.backends.weight_streaming import boundaries, store
    from crystal.backends.weight_streaming import io as transfer
    from crystal.run import load_run
    from crystal.training.start import start

    os.environ |= environment
    torch.set_num_threads(1)
    left = count

    def dying(original, counts, half):
        def call(self, *args):
            nonlocal left
            if counts(self):
                left -= 1
                if left < 0:
                    if half:
                        original(self, args[0], args[1][: len(args[1]) // 2 // 4096 * 4096])
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args)

        return call

    if where == "record":
        store.Store._put = dying(store.Store._put, lambda self: True, half=False)
    elif where == "boundaries":
        boundaries.Boundaries.save = dying(boundaries.Boundaries.save, lambda self: True, half=False)
    elif where is not None:
        name = {"state": "store.bin", "gradients": "gradients.bin"}[where]
        transfer.DiskFile.pwrite = dying(transfer.DiskFile.pwrite, lambda self: self.path.name == name, half=True)
    start(load_run(path), None, None, Console(quiet=True, stderr=True))
