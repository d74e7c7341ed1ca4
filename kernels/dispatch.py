"""Where an operator runs, and how it enters autograd and compiled graphs.

A CUDA tensor goes to our Triton kernels, anything else to torch. Triton (a third of a second, and absent from
many machines) is imported by the first launch and not before. CRYSTAL_KERNELS forces the choice for a whole run:
`torch`; `triton`, on any device, for drivers that compile or execute launches without a GPU; or `interpret`,
Triton's interpreter on CPU tensors, which TRITON_INTERPRET=1 chooses as well.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (Tensor, torch.nn.Parameter)
MODES = ("auto", "torch", "triton", "interpret")
HAS_TRITON = importlib.util.find_spec("triton") is not None
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148}  # of a whole A100, A10, L4/4090, H100, B200


class KernelModeError(ValueError):
    """What CRYSTAL_KERNELS or CRYSTAL_TUNING say cannot be; one line."""


def _mode_of_environment() -> str:
    mode = os.environ.get("CRYSTAL_KERNELS", "interpret" if os.environ.get("TRITON_INTERPRET") == "1" else "auto")
    if mode not in MODES:
        raise KernelModeError(f"CRYSTAL_KERNELS={mode}: expected one of {', '.join(MODES)}")
    if mode == "interpret" and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise KernelModeError(
                "CRYSTAL_KERNELS=interpret: triton is imported already; set TRITON_INTERPRET=1 at the start"
            )
        os.environ["TRITON_INTERPRET"] = "1"
    return mode


_mistake: KernelModeError | None = None  # the package raises it, once this module is whole and knows its class
try:
    _mode = _mode_of_environment()
except KernelModeError as error:
    _mode, _mistake = "auto", error


def mode() -> str:
    """What CRYSTAL_KERNELS or `forced` say. Raises KernelModeError."""
    if _mistake is not None:
        raise _mistake
    return _mode


@contextlib.contextmanager
def forced(mode: str) -> Iterator[None]:
    """Within, every thread's operators run as CRYSTAL_KERNELS=mode says."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


def use_triton(*tensors: Tensor) -> bool:
    """Whether an operator over these tensors is a Triton launch.

    Empty tensors and fp64 stay with torch, and so do DTensors, for whose parts torch has rules of its own.
    """
    if _mode == "torch" or (_mode == "auto" and not (HAS_TRITON and tensors[0].is_cuda)):
        return False
    return all(t.dtype in DTYPES and t.numel() > 0 and (_has_memory(t) or _is_on_its_way(t)) for t in tensors)


def _has_memory(t: Tensor) -> bool:
    """Whether t is no wrapper, which has its numbers in tensors of its own and no memory for a kernel to read."""
    return type(t) in PLAIN or not hasattr(type(t), "__tensor_flatten__")


def _is_on_its_way(t: Tensor) -> bool:
    """Whether t is the result of a functional collective that nobody has waited for: an AsyncCollectiveTensor."""
    return hasattr(type(t), "trigger_wait")


def _launchable(argument, name: str):
    """A launch's argument, waited for if it is on its way. Raises TypeError for another tensor without memory."""
    if not isinstance(argument, Tensor) or _has_memory(argument):
        return argument
    if _is_on_its_way(argument):
        return argument.wait()
    raise TypeError(f"Triton kernel {name}: expected tensors with memory of their own, got a {type(argument).__name__}")


def eager_cpu(x: Tensor) -> bool:
    """Whether x is worth our own gradient by torch: compilers, and tracers on other devices, want plain operations."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def target(device: torch.device) -> tuple[int, int]:
    """Compute capability (80 for 8.0) and number of multiprocessors that a launch is planned for.

    Off CUDA it is the active driver's, if there is one (a compiler without a GPU), else an A100's.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return 10 * properties.major + properties.minor, properties.multi_processor_count
    from triton.runtime import driver

    try:
        arch = driver.active.get_current_target().arch
    except RuntimeError:  # the interpreter has no driver
        arch = 80
    return arch, MULTIPROCESSORS.get(arch, 108)


class Kernel:
    """A Triton kernel, or a function called by one, that is handed to Triton when it is first launched.

    Until then it is plain Python whose module may lack triton; its `tl` is put in place here. `kernel[grid](...)`
    launches on the device of its first argument, whichever device is current. What a launch may be given is decided
    here and nowhere else: a tensor on its way is waited for, another one without memory is refused.
    """

    def __init__(self, function: Callable, unspecialized: tuple[str, ...] = ()):
        self.function, self.unspecialized, self.compiled = function, unspecialized, None
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def jit(self):
        """The triton.jit function."""
        if self.compiled is None:
            import triton
            import triton.language as tl

            names = self.function.__globals__
            names["tl"] = tl
            for name in self.function.__code__.co_names:  # the kernels it calls
                if isinstance(names.get(name), Kernel):
                    names[name] = names[name].jit()
            self.compiled = triton.jit(self.function, do_not_specialize=self.unspecialized)
        return self.compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch(first: Tensor, *arguments, **options):
            first, *arguments = (_launchable(argument, self.__name__) for argument in (first, *arguments))
            elsewhere = first.is_cuda and first.device.index != torch.cuda.current_device()
            with torch.cuda.device(first.device) if elsewhere else contextlib.nullcontext():
                return self.jit()[grid](first, *arguments, **options)

        return launch


def kernel(*unspecialized: str) -> Callable[[Callable], Kernel]:
    """Decorator: a Triton kernel. Arguments named here vary from call to call and must not cost a compilation."""
    return lambda function: Kernel(function, unspecialized)


def differentiable(
    name: str,
    forward: Callable,
    backward: Callable,
    save: Callable,
    gradients: Callable,
    forward_shapes: Callable,
    backward_shapes: Callable,
) -> Callable:
    """An operator with its backward, for eager autograd and, as crystal::name, for torch.compile and torch.export.

    forward(*inputs) and backward(*tensors) compute; *_shapes return empty tensors like theirs. save(ctx, inputs,
    output) keeps what gradients(ctx, backward, *grads) hands on. Eager calls pass by the dispatcher, which costs
    three times a launch; both ways share every function, and neither can be differentiated twice.
    """

    def defined(ctx, backward, *grads):
        if all(grad is None for grad in grads):  # nothing that came of the outputs has a gradient
            return (None,) * len(ctx.needs_input_grad)
        return gradients(ctx, backward, *grads)

    def eager_backward(ctx, *grads):
        return defined(ctx, backward, *grads)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(save),
        "backward": staticmethod(torch.autograd.function.once_differentiable(eager_backward)),
    }
    function = type(name, (torch.autograd.Function,), members)
    if not hasattr(torch.library, "infer_schema"):  # torch 2.4, as Cerebras pins it: eager only
        return function.apply
    operator = torch.library.custom_op(f"crystal::{name}", forward, mutates_args=())
    operator.register_fake(forward_shapes)
    backward_operator = torch.library.custom_op(f"crystal::{name}_backward", backward, mutates_args=())
    backward_operator.register_fake(backward_shapes)
    operator.register_autograd(lambda ctx, *grads: defined(ctx, backward_operator, *grads), setup_context=save)

    def run(*inputs):
        if torch.compiler.is_compiling():
            return operator(*inputs)
        # what nothing can be differentiated of needs none of autograd's bookkeeping, which costs 30 us a call
        return function.apply(*inputs) if torch.is_grad_enabled() else forward(*inputs)

    return run


def widened(x: Tensor) -> Tensor:
    """x in fp32, or as it is if that is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rows_of(x: Tensor) -> Tensor:
    """x [..., n] as [rows, n] with adjacent elements in a row; copies only what no single row stride can express."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def unit(*strides: int) -> int:
    """The largest power of two up to 16 that divides all strides.

    Kernels take strides in this unit and multiply it back: Triton itself would notice only divisibility by 16,
    and fall to 2-byte accesses on bf16 rows of 1000.
    """
    joined = 16
    for stride in strides:
        joined |= stride
    return joined & -joined


def power_of_two(n: int) -> int:
    """The least power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()
