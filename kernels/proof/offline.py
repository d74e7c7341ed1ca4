"""Run any wrapper of Triton kernels without a GPU and record what it would launch.

Inside `offline(arch)` a fake driver tells Triton that the chosen GPU is there, and meta tensors, which hold nothing
and may have any size, say that they lie on it. A wrapper, ours or a peer's with its autograd, then runs as it is:
every Triton launch is compiled ahead of time with exactly the specialisation the JIT would use and is recorded
with its grid and arguments instead of being executed; so is every operation of torch that would start a kernel of
its own, and every read of a value back to the host. With `execute`, a recorded launch is handed to a function
instead, which is how the kernels run on the CPU (see `cpu`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import autotuner, driver, jit

from crystal.kernels.dispatch import MULTIPROCESSORS

_ir = triton._C.libtriton.ir


@dataclass
class Launch:
    """One Triton launch. `compiled.asm` holds "ttir" and, unless the frontend alone ran, "ptx" and "cubin"."""

    name: str
    grid: tuple[int, int, int]
    compiled: Any
    arguments: dict[str, Any]
    function: Any = None  # the triton.jit function

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}


@dataclass
class TorchCall:
    """A torch operation that starts a kernel (or waits for the GPU: sync), with the bytes it reads and writes."""

    name: str
    read: int
    written: int
    sync: bool = False


@dataclass
class Frontend:
    """What compiling stopped at TTIR gives."""

    asm: dict[str, str] = field(default_factory=dict)
    metadata: Any = None


_trying: list = []  # compiled kernels of an autotuner's trial, within one
_chosen: dict = {}  # an autotuner's choices, for each number of a driver


class _Driver:
    """As much of triton's driver as compiling asks for. A device number per target keeps JIT caches apart."""

    def __init__(self, arch: int, frontend: bool, preference: Callable[[Any], float] | None) -> None:
        self.arch, self.number, self.preference = arch, arch + 1000 * frontend, preference

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def map_python_to_cpp_type(self, kind):
        return kind

    def get_benchmarker(self):
        """An autotuner's timer: with nothing to time, the preference. It keeps the timer, and its choices."""

        def score(call: Callable, quantiles=None, **_) -> list[float]:
            call()
            compiled = _trying[-1]
            known = self.preference is not None and "cubin" in compiled.asm
            return [self.preference(compiled) if known else 0.0] * len(quantiles or [0])

        return score

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache):
        pass

    @staticmethod
    def is_active():
        return True


NO_KERNEL = {
    "view", "_unsafe_view", "reshape", "expand", "transpose", "t", "permute", "slice", "select", "split", "unbind",
    "squeeze", "unsqueeze", "detach", "alias", "as_strided", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "split_with_sizes", "unfold", "chunk", "resize_", "set_", "lift_fresh", "movedim",
}  # fmt: skip
FILLS = {"zeros", "zeros_like", "new_zeros", "full", "full_like", "zero_", "fill_", "ones", "ones_like", "new_full"}


class _Disguise(TorchDispatchMode):
    """Meta tensors say that they are on cuda:0, and what is created there is a meta tensor.

    Notes the torch operations on its way; a read of a value, which a meta tensor has not, gives 1.
    """

    def __init__(self, log: list) -> None:
        super().__init__()
        self.log, self.worn, self.torch_tensor = log, True, torch.tensor

    def device_of(self, x: Tensor) -> torch.device:
        device = torch._C.TensorBase.device.__get__(x)
        return torch.device("cuda", 0) if self.worn and device.type == "meta" else device

    def tensor(self, data, **options) -> Tensor:
        """torch.tensor, which copies a number to the GPU without passing by dispatch."""
        if torch.device(options.get("device") or "cpu").type == "cuda":
            options["device"] = "meta"
        return self.torch_tensor(data, **options)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, dict(kwargs or {})
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = torch.device("meta")
        flat = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        read = sum(map(size_of, flat))
        if name in ("_local_scalar_dense", "equal", "is_nonzero"):
            self.log.append(TorchCall(name, read, 0, sync=True))
            return 1 if name != "equal" else False
        if function.namespace not in ("aten", "prims"):  # a wrapper registered as an operator: look inside
            with self:
                return function._op_dk(torch._C.DispatchKey.Meta, *args, **kwargs)
        self.worn = False  # torch's own Python must see where they are
        try:
            result = function(*args, **kwargs)
        finally:
            self.worn = True
        given = [r for r in torch.utils._pytree.tree_leaves(result) if isinstance(r, Tensor)]
        if name not in NO_KERNEL and given:
            read = 0 if name in FILLS else read
            self.log.append(TorchCall(name, read, sum(map(size_of, given))))
        return result


def size_of(x: Tensor) -> int:
    """Bytes of its elements, each counted once, whatever it is stretched over."""
    n = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        n *= size if stride or size == 0 else 1
    return n * x.element_size()


def _ttir(function, device: int, key, signature, constexprs, options, attrs) -> Frontend:
    """Triton's frontend and its TTIR passes, nothing after."""
    cache, _, target, _, _ = function.device_caches[device]
    backend = make_backend(target)
    source = ASTSource(function, signature, constexprs, attrs)
    context = _ir.context()
    _ir.load_dialects(context)
    backend.load_dialects(context)
    stages: dict[str, Callable] = {}
    backend.add_stages(stages, options, source.language)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    cache[key] = Frontend({"ttir": str(stages["ttir"](module, {}))})
    return cache[key]


def _arguments(function, args: tuple, kwargs: dict) -> dict[str, Any]:
    given = dict(zip(function.arg_names, args, strict=False)) | {
        n: v for n, v in kwargs.items() if n in function.arg_names
    }
    defaults = {p.name: p.default for p in function.params if p.has_default}
    return defaults | given


@contextlib.contextmanager
def offline(
    arch: int,
    frontend: bool = False,
    execute: Callable[[Launch], None] | None = None,
    preference: Callable[[Any], float] | None = None,
) -> Iterator[list[Launch | TorchCall]]:
    """Yield the list that fills with what is launched inside, for compute capability arch / 10.

    frontend: compile no further than TTIR. execute: called with every Triton launch, on the tensors as they are
    (then no tensor is disguised and torch operations are not recorded). preference: the lower the better, of a
    compiled kernel; it chooses among an autotuner's configurations. One at a time in a process, one thread.
    """
    log: list[Launch | TorchCall] = []
    disguise = _Disguise(log)

    def run(self, *args, grid, warmup=False, **kwargs):
        compiled = original(self, *args, grid=grid, warmup=True, **kwargs)
        if _trying:
            _trying.append(compiled)
            return compiled
        arguments = _arguments(self, args, kwargs)
        size = grid(arguments) if callable(grid) else grid
        launch = Launch(self.fn.__name__, (*size, 1, 1)[:3], compiled, arguments, self)
        log.append(launch)
        if execute is not None:
            execute(launch)
        return compiled

    def compile_frontend(self, key, signature, device, constexprs, options, attrs, warmup):
        return _ttir(self, device, key, signature, constexprs, options, attrs)

    def try_configuration(self, *args, config, **meta):
        _trying.append(None)
        try:
            return tried(self, *args, config=config, **meta)
        finally:
            _trying.clear()

    def run_tuned(self, *args, **kwargs):
        self.cache = _chosen.setdefault((id(self), driver.active.number), {})
        return tuned(self, *args, **kwargs)

    class Properties:
        major, minor = divmod(arch, 10)
        multi_processor_count = MULTIPROCESSORS.get(arch, 108)
        warp_size, name = 32, f"sm_{arch} (offline)"

    replaced = [
        (jit.JITFunction, "run", run),
        (autotuner.Autotuner, "_bench", try_configuration),
        (autotuner.Autotuner, "run", run_tuned),
        (torch.cuda, "get_device_properties", lambda *_: Properties),
        (torch.cuda, "get_device_capability", lambda *_: divmod(arch, 10)),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device", lambda *_: contextlib.nullcontext()),
    ]
    if execute is None:
        replaced += [
            (torch.cuda, "_lazy_init", lambda: None),
            (torch, "tensor", disguise.tensor),
            (Tensor, "device", property(disguise.device_of)),
            (Tensor, "is_cuda", property(lambda x: disguise.device_of(x).type == "cuda")),
        ]
    if frontend:
        replaced.append((jit.JITFunction, "_do_compile", compile_frontend))
    original, tried, tuned = jit.JITFunction.run, autotuner.Autotuner._bench, autotuner.Autotuner.run
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    active = driver._active
    with contextlib.ExitStack() as stack:
        driver.set_active(_Driver(arch, frontend, preference))
        for owner, name, value in replaced:
            setattr(owner, name, value)
        try:
            if execute is None:
                stack.enter_context(torch._library.triton.set_wrap_triton_enabled(False))
                stack.enter_context(disguise)
            yield log
        finally:
            driver._active = active
            for owner, name, value in before:
                setattr(owner, name, value)
