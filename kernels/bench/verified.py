"""Every operator's worst error against fp64 beside torch's own error on the same input: `--verify`.

With `--offline` the kernels themselves run on the CPU, from Triton's own TTIR (see `proof.cpu`), at shapes whose
largest tensor is [4096, 4096]; on a GPU as they are, at every shape of the catalog.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from crystal.kernels.bench.peers import torch_functions
from crystal.kernels.catalog import operators
from crystal.kernels.proof.accuracy import Error, errors

ON_CPU, ON_GPU = 1.01, 2.0  # times torch's error; on a GPU torch's kernels add in yet other orders
LAST_DIGIT = 2.0**-22  # two units of fp32; below it, which of two errors is smaller is chance
SQUARE = {
    "norm": {"rows": 4096, "width": 4096},
    "swiglu": {"rows": 4096, "width": 4096},
    "rope": {"batch": 1, "seq": 4096, "heads": 10, "kv_heads": 3, "head_dim": 256, "rotary_dim": 64},
    "cross_entropy": {"rows": 4096, "vocab": 4096},
}


def square(name: str) -> dict[str, int]:
    """A shape whose largest tensor is [4096, 4096] (rope's [4096, 16 heads of 256])."""
    return next(shape for key, shape in SQUARE.items() if key in name)


def errors_on_cpu(
    names: tuple[str, ...] | None = None, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
) -> Iterator[tuple[str, str, torch.dtype, list[Error]]]:
    """(operator, shape, dtype, errors) at the square shapes, the kernels translated to C."""
    from crystal.kernels.proof.cpu import on_cpu

    baselines = torch_functions()
    for operator in operators(names):
        shape = square(operator.name)
        for dtype in dtypes:
            yield operator.name, "4096 x 4096", dtype, errors(operator, shape, dtype, baselines[operator.name], on_cpu)


def errors_on_gpu(
    names: tuple[str, ...] | None, shapes: tuple[str, ...] | None, dtypes: tuple[torch.dtype, ...]
) -> Iterator[tuple[str, str, torch.dtype, list[Error]]]:
    """(operator, shape, dtype, errors) on the current CUDA device, every shape or those named."""
    baselines = torch_functions()
    for operator in operators(names):
        for name in (s for s in operator.shapes if shapes is None or s in shapes):
            for dtype in dtypes:
                found = errors(
                    operator, operator.shapes[name], dtype, baselines[operator.name], contextlib.nullcontext, "cuda"
                )
                yield operator.name, name, dtype, found


def worst(name: str, shape: str, dtype: torch.dtype, found: list[Error], times: float) -> dict:
    """The record of the output or gradient that stands worst beside torch's; passed: none exceeds times torch's."""
    error = max(found, key=lambda e: e.ratio)
    return {
        "op": name,
        "provider": "ours",
        "direction": "backward" if error.output.startswith("grad") else "forward",
        "shape": shape,
        "dtype": str(dtype).split(".")[1],
        **error.record(),
        "passed": all(e.ours <= times * e.torch + LAST_DIGIT for e in found),
    }
