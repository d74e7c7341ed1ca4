"""Weight-streaming executors in processes of their own, on gloo: each trains its half of every step's rows."""

import multiprocessing
import os
import socket

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "executors"])
STEPS = 5


def train_on(processes, directory):
    """What each of `processes` executors gives: {steps: results, weights: {name: tensor}}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [CONTEXT.Process(target=_train, args=(rank, processes, port, directory)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(600)
        process.kill()
    assert [p.exitcode for p in started] == [0] * processes
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _train(rank, processes, port, directory):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    from test_weight_streaming import batches, config, streaming

    made = streaming(directory, config(), dtype="fp32")
    made.initialise()
    assert made.place.part == rank
    steps = [made.train_step(step, [batches(step, processes)[rank]]).host() for step in range(1, STEPS + 1)]
    weights = {name: tensor for name, tensor in made.state() if name.startswith("model.")}
    torch.save({"steps": steps, "weights": weights}, directory / f"{rank}.pt")
