"""What a caller of an operator may count on, checked by running its kernels on the CPU.

Inputs stay as they were; a second backward over a kept graph gives the same gradients; the order in which a GPU
happens to run the programs changes no bit; rows may lie so far apart that offsets pass 2^31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crystal.kernels.catalog import Operator
from crystal.kernels.proof.accuracy import copied, outputs_and_gradients
from crystal.kernels.proof.cpu import on_cpu


def _inputs(operator: Operator, shape: dict[str, int], dtype: torch.dtype) -> tuple:
    return operator.make_inputs(shape, dtype, "cpu", torch.Generator().manual_seed(0))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits; NaNs compare as bits too."""
    as_integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = (x.detach().contiguous().view(as_integers) for x in (a, b))
    return torch.equal(a, b)


def inputs_kept(operator: Operator, shape: dict[str, int], dtype: torch.dtype) -> bool:
    """Whether forward and backward leave every argument's storage as it was, and its autograd version."""
    arguments = _inputs(operator, shape, dtype)
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    before = [(copied((x,))[0], x._version) for x in tensors]
    with on_cpu():
        outputs_and_gradients(operator.run, arguments, torch.Generator().manual_seed(1))
    return all(same_bits(x, old) and x._version == version for x, (old, version) in zip(tensors, before, strict=True))


def gradients_repeat(operator: Operator, shape: dict[str, int], dtype: torch.dtype) -> bool:
    """Whether a second backward over a kept graph gives the bits of the first."""
    arguments = _inputs(operator, shape, dtype)
    leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    with on_cpu():
        given = operator.run(*arguments)
        outputs = given if isinstance(given, tuple) else (given,)
        grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(k)).to(x) for k, x in enumerate(outputs)]
        first, second = (torch.autograd.grad(outputs, leaves, grads, retain_graph=True) for _ in range(2))
    return all(map(same_bits, first, second))


def bits_fixed(operator: Operator, shape: dict[str, int], dtype: torch.dtype) -> bool:
    """Whether outputs and gradients keep their bits when programs run in another order."""
    runs = []
    for shuffle in (None, 1, 2):
        with on_cpu(shuffle=shuffle):
            found = outputs_and_gradients(
                operator.run, copied(_inputs(operator, shape, dtype)), torch.Generator().manual_seed(1),
                not operator.inplace,
            )  # fmt: skip
        runs.append(found)
    return all(same_bits(runs[0][name], run[name]) for run in runs[1:] for name in runs[0])


def rest_untouched(rope: Operator, shape: dict[str, int]) -> bool:
    """Whether a packed rope in place writes nothing but the turned dimensions: elsewhere NaNs keep their payload."""
    qkv, *rest = _inputs(rope, shape, torch.bfloat16)
    rotary, heads = shape["rotary_dim"], shape["heads"] + shape["kv_heads"]
    generator = torch.Generator().manual_seed(2)
    noise = torch.randint(-(1 << 15), 1 << 15, qkv.shape, generator=generator, dtype=torch.int16).view(torch.bfloat16)
    noise[:, :, :heads, :rotary] = qkv[:, :, :heads, :rotary]
    turned = noise.clone()
    with on_cpu():
        rope.run(turned, *rest)
    kept = same_bits(turned[..., rotary:], noise[..., rotary:]) and same_bits(turned[:, :, heads:], noise[:, :, heads:])
    return kept and not same_bits(turned[:, :, :heads, :rotary], noise[:, :, :heads, :rotary])


def right_beyond_2_31() -> bool:
    """Whether every operator is right on three rows 2^30 elements apart (4 GiB, of which 3 rows exist).

    The third row starts at element 2^31, where a 32-bit offset has wrapped.
    """
    from crystal.kernels.cross_entropy import cross_entropy
    from crystal.kernels.layer_norm import layer_norm
    from crystal.kernels.rope import rope, rope_, rope_table
    from crystal.kernels.swiglu import swiglu

    apart, width = 1 << 30, 1000
    stored = torch.empty(2 * apart + width, dtype=torch.bfloat16)  # pages that nobody touches cost nothing
    x = stored.as_strided((3, width), (apart, 1))
    x.copy_(torch.randn(3, width, generator=torch.Generator().manual_seed(0)))
    near = x.clone()
    weight, bias, labels = torch.ones(width), torch.zeros(width), torch.tensor([3, 500, 999])
    table = rope_table(torch.arange(3), 64, 10000.0)

    def results(x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        with on_cpu():
            found = [
                layer_norm(x, weight, bias, 1e-5), cross_entropy(x, labels), swiglu(x),
                rope(x[None, None], *table, "half"),
            ]  # fmt: skip
            gradients = [torch.autograd.grad(y.float().square().sum(), x)[0] for y in found]
            return found + gradients + [rope_(x.detach()[None, None], *table, "half")]  # the last writes over x

    return all(map(same_bits, results(x), results(near)))
