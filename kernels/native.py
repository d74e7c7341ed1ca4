"""The CPU's kernels of `native.c`: where they run, and how they are called with tensors.

torch's CPU path of an operator is several passes over memory, in bf16 each with a conversion before and after; these
are one. gcc compiles them on first use (a second, then cached). Without gcc, under CRYSTAL_KERNELS=torch, while a graph
is captured, and for tensors of other kinds (fp16, fp64, DTensors, fakes) operators are torch's.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

from crystal.kernels.dispatch import mode
from crystal.kernels.gcc import build

PARTS = 64  # native.c's: sums over rows are made in as many parts
ENOUGH = 1 << 14  # elements that are worth a second thread
_POINTER, _WHOLE, _REAL, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "norm_forward": [_POINTER] * 8 + [_WHOLE] * 2 + [_REAL] * 2 + [_INT],
    "norm_backward": [_POINTER] * 10 + [_WHOLE] * 2 + [_INT],
    "swiglu_forward": [_POINTER] * 3 + [_WHOLE] * 4 + [_INT],
    "swiglu_backward": [_POINTER] * 5 + [_WHOLE] * 5 + [_INT],
    "rope_turn": [_POINTER] * 4 + [_WHOLE] * 7 + [_POINTER] + [_INT] * 3,
    "causal_softmax": [_POINTER] + [_WHOLE] * 4 + [_REAL, _INT],
    "softmax_backward": [_POINTER] * 2 + [_WHOLE] * 2 + [_REAL, _INT],
    "score": [_POINTER] * 4 + [_WHOLE] * 2 + [_REAL] + [_INT] * 2,
    "adamw": [_POINTER] * 6 + [_WHOLE, _INT],
    "adamw_halves": [_POINTER] * 7 + [_WHOLE, _INT],
    "square_sum": [_POINTER] * 2 + [_WHOLE, _INT],
}
_RESULTS = {"score": _INT, "square_sum": _REAL}


def load(
    file: str, signatures: dict[str, list], *options: str, results: dict[str, type] | None = None
) -> dict[torch.dtype, ctypes.CDLL]:
    """A C file of this directory compiled for each dtype, its functions declared; {} where that cannot be done."""
    if not sys.platform.startswith("linux"):
        return {}
    source = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("real.h", file))
    try:
        found = {
            dtype: build(source, "native", *options, *kind)
            for dtype, kind in ((torch.float32, ()), (torch.bfloat16, ("-DBF16",)))
        }
    except (RuntimeError, OSError) as error:
        _say(str(error))
        return {}
    for library in found.values():
        for name, kinds in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = kinds, (results or {}).get(name)
    return found


@functools.cache
def _say(why: str) -> None:
    """Once in a process, though several files are compiled."""
    print(f"crystal: CPU kernels by torch, which is slower: {why}", file=sys.stderr)


@functools.cache
def _libraries() -> dict[torch.dtype, ctypes.CDLL]:
    return load("native.c", _SIGNATURES, "-ffp-contract=off", results=_RESULTS)


def available() -> bool:
    """Whether operators on CPU tensors may be native.c's."""
    return mode() == "auto" and bool(_libraries())


def use_native(*tensors: Tensor | None) -> bool:
    """Whether an operator over these tensors, all of one dtype, is native.c's."""
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if t is not None and not (type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and t.numel()):
            return False
    dtypes = {t.dtype for t in tensors if t is not None}
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16} and available()


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _call(name: str, of: Tensor, elements: int, *arguments) -> float | None:
    threads = torch.get_num_threads() if elements >= ENOUGH else 1
    return getattr(_libraries()[of.dtype], name)(*arguments, threads)


def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, scale: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """As `norm.forward`."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    weight, bias = weight.float().contiguous(), None if bias is None else bias.float().contiguous()
    n, y = x.shape[-1], torch.empty_like(x)
    rows = x.numel() // n
    summed = None if residual is None else torch.empty_like(x)
    mean, rstd = None if bias is None else torch.empty(rows), torch.empty(rows)
    tensors = (x, residual, weight, bias, y, summed, mean, rstd)
    _call("norm_forward", x, x.numel(), *map(_at, tensors), rows, n, scale, eps)
    return y, summed, mean, rstd


def norm_backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dweight, dbias), as `norm.backward`."""
    dy, x, dsummed = dy.contiguous(), x.contiguous(), None if dsummed is None else dsummed.contiguous()
    n, dx = x.shape[-1], torch.empty_like(x)
    dweight, dbias = torch.empty(n), None if mean is None else torch.empty(n)
    partial = torch.empty((1 if mean is None else 2) * PARTS * n)
    wide = weight.float().contiguous()
    tensors = (dy, dsummed, x, wide, mean, rstd, dx, dweight, dbias, partial)
    _call("norm_backward", x, x.numel(), *map(_at, tensors), x.numel() // n, n)
    return dx, dweight.to(weight.dtype), None if dbias is None else dbias.to(weight.dtype)


def swiglu_forward(gate: Tensor, up: Tensor, y: Tensor) -> None:
    """gate and up [rows, f], their last dimension adjacent; y contiguous."""
    rows, f = gate.shape
    _call("swiglu_forward", y, y.numel(), _at(gate), _at(up), _at(y), rows, f, gate.stride(0), up.stride(0))


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    """All [rows, f], their last dimension adjacent, dy contiguous, dgate and dup of one row stride."""
    rows, f = gate.shape
    steps = (gate.stride(0), up.stride(0), dgate.stride(0))
    _call("swiglu_backward", dy, dy.numel(), *map(_at, (dy, gate, up, dgate, dup)), rows, f, *steps)


def rope_turn(
    x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, turned: int, interleaved: bool, seq_dim: int, back: bool
) -> None:
    """Turn x into y, which may be x. cos, sin [S, P] or [B, S, P]; last dimensions of x and y adjacent."""
    cos, sin, head_dim = cos.float().contiguous(), sin.float().contiguous(), 3 - seq_dim
    steps = [t.stride(i) for t in (x, y) for i in (0, seq_dim, head_dim)]
    _call(
        "rope_turn", x, x.numel(), *map(_at, (x, y, cos, sin)), x.shape[0], x.shape[seq_dim], x.shape[head_dim],
        turned, x.shape[3], cos.shape[-1], cos.stride(0) if cos.dim() == 3 else 0, (ctypes.c_int64 * 6)(*steps),
        interleaved, back,
    )  # fmt: skip


def causal_softmax(scores: Tensor, first: int, scale: float) -> None:
    """Scores [heads, rows, keys], contiguous, become probabilities: row i sees keys 0 … first + i."""
    _call("causal_softmax", scores, scores.numel(), _at(scores), *scores.shape, first, scale)


def softmax_backward(probabilities: Tensor, gradients: Tensor, scale: float) -> None:
    """Gradients [..., keys] of probabilities become those of the scores before scale; both contiguous."""
    keys = gradients.shape[-1]
    rows = gradients.numel() // keys
    _call("softmax_backward", gradients, gradients.numel(), _at(probabilities), _at(gradients), rows, keys, scale)


def score(logits: Tensor, labels: Tensor, weights: Tensor, scale: float, grad: bool) -> Tensor:
    """nll [rows] of logits [rows, words], contiguous, which become, if grad, its weighted sum's gradient.

    Raises IndexError for a label that is no word.
    """
    rows, words = logits.shape
    labels, weights, nll = labels.contiguous(), weights.float().contiguous(), torch.empty(rows)
    if _call("score", logits, logits.numel(), *map(_at, (logits, labels, weights, nll)), rows, words, scale, grad):
        raise IndexError(f"labels {labels.min()} to {labels.max()}: expected 0 to {words - 1}")
    return nll


def adamw(
    weight: Tensor, m: Tensor, v: Tensor, gradient: Tensor, rounded: Tensor | None, numbers: tuple[float, ...]
) -> None:
    """Update fp32 weight, m and v, and bf16 rounded, all contiguous. numbers: those of native.c's struct."""
    tensors, numbers = (weight, m, v, gradient, rounded), (_REAL * 8)(*numbers)
    _call("adamw", gradient, weight.numel(), *map(_at, tensors), numbers, weight.numel())


def adamw_halves(
    high: Tensor, low: Tensor, m: Tensor, v: Tensor, gradient: Tensor, rounded: Tensor, numbers: tuple[float, ...]
) -> None:
    """The same of weights in two int16 halves."""
    tensors, numbers = (high, low, m, v, gradient, rounded), (_REAL * 8)(*numbers)
    _call("adamw_halves", gradient, high.numel(), *map(_at, tensors), numbers, high.numel())


def square_sum(x: Tensor) -> float:
    """Of contiguous x, in fp32."""
    partial = torch.empty(PARTS)
    return _call("square_sum", x, x.numel(), _at(x), _at(partial), x.numel())
