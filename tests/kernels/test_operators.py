"""What every operator takes, its kernels run on the CPU: strides of every argument, mixed dtypes, graphs, in place."""

import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels' compiler")
if shutil.which("gcc") is None:
    pytest.skip("the kernels run on a CPU as C: no gcc", allow_module_level=True)

import torch
from torch import Tensor

from crystal.kernels import rope, rope_
from crystal.kernels.bench.compiled import launches
from crystal.kernels.catalog import OPERATORS, Operator
from crystal.kernels.proof.accuracy import outputs_and_gradients
from crystal.kernels.proof.behaviour import same_bits
from crystal.kernels.proof.cpu import on_cpu
from crystal.kernels.proof.offline import Launch

NAMED = {operator.name: operator for operator in OPERATORS}
every_operator = pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
every_differentiable = pytest.mark.parametrize(
    "operator", [operator for operator in OPERATORS if not operator.inplace], ids=lambda operator: operator.name
)


def inputs(operator: Operator, dtype=torch.bfloat16, shape: str = "small") -> tuple:
    return operator.make_inputs(operator.shapes[shape], dtype, "cpu", torch.Generator().manual_seed(0))


def results(operator: Operator, arguments: tuple) -> dict[str, Tensor]:
    """Outputs and gradients by the kernels."""
    with on_cpu():
        return outputs_and_gradients(operator.run, arguments, torch.Generator().manual_seed(1), not operator.inplace)


@every_operator
def test_on_a_cpu_too_torch_compile_makes_one_graph(operator):
    """There it traces the definition, whose roundings differ from those of the eager path's own kernels."""
    torch._dynamo.reset()
    eager, compiled = (
        outputs_and_gradients(function, inputs(operator), torch.Generator().manual_seed(1), not operator.inplace)
        for function in (operator.run, torch.compile(operator.run, fullgraph=True, backend="aot_eager"))
    )
    for name, value in eager.items():
        assert (compiled[name].double() - value.double()).norm() <= 2**-6 * value.double().norm(), name


def columns_apart(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape, 2)[..., 0].copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def rows_apart(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] + 24)[..., : x.shape[-1]].copy_(x)


@every_operator
@pytest.mark.parametrize("lay", [columns_apart, transposed, rows_apart])
def test_no_stride_of_any_argument_changes_a_bit(operator, lay):
    def laid(x):
        return lay(x.detach()).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    plain, strided = (results(operator, made) for made in (inputs(operator), tuple(map(laid, inputs(operator)))))
    assert all(same_bits(plain[name], strided[name]) for name in plain)


@every_differentiable
def test_an_expanded_gradient_is_read_as_what_it_stands_for(operator):
    found = []
    for grad in (torch.ones_like, lambda x: torch.ones((), dtype=x.dtype).expand(x.shape)):
        arguments = inputs(operator)
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
        with on_cpu():
            given = operator.run(*arguments)
            outputs = given if isinstance(given, tuple) else (given,)
            found.append(torch.autograd.grad(outputs, leaves, [grad(x) for x in outputs]))
    assert all(map(same_bits, *found))


@every_operator
def test_nothing_waits_for_the_host_and_no_kernel_of_torch_runs_beside_ours(operator):
    for name in {"small", "small-pitch"} & operator.shapes.keys():
        for log in launches(80, operator, operator.run, operator.shapes[name], torch.float16, frontend=True).values():
            assert [x.name for x in log if not isinstance(x, Launch)] == []


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm_scaled"])
def test_bf16_rows_take_an_fp32_weight_whose_gradient_is_fp32(name):
    operator = NAMED[name]
    x, *rest = inputs(operator)
    wide = [a.detach().float().requires_grad_() if isinstance(a, Tensor) and a.dim() == 1 else a for a in rest]
    found, narrow = results(operator, (x, *wide)), results(operator, (x, *rest))
    for key, value in found.items():
        torch.testing.assert_close(value.to(narrow[key].dtype), narrow[key], rtol=2**-8, atol=2**-10)
    assert {value.dtype for value in found.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("by", ["kernels", "torch"])
class TestRopeInPlace:
    """rope_ tells autograd what it overwrote, by the kernels and by torch."""

    @pytest.fixture(autouse=True)
    def _by(self, by):
        if by == "torch":
            yield
        else:
            with on_cpu():
                yield

    @pytest.fixture
    def given(self):
        q = inputs(NAMED["rope_half_packed"], torch.float32)
        return q[0], q[1], q[2], "half"

    def test_it_returns_what_it_was_given_and_counts_a_version(self, given):
        leaf, *how = given
        x = leaf.detach().clone()
        version = x._version
        assert rope_(x, *how, layout="bshd") is x
        assert x._version > version
        assert same_bits(x, rope(leaf, *how, layout="bshd"))

    def test_its_gradient_is_that_of_rope(self, given):
        leaf, *how = given
        weights = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3))
        (right,) = torch.autograd.grad((rope(leaf, *how, layout="bshd") * weights).sum(), leaf)
        (found,) = torch.autograd.grad((rope_(leaf * 1, *how, layout="bshd") * weights).sum(), leaf)
        torch.testing.assert_close(found, right, rtol=0, atol=1e-6)

    def test_a_leaf_that_wants_its_gradient_is_refused(self, given):
        with pytest.raises(RuntimeError, match="leaf"):
            rope_(*given, layout="bshd")

    @pytest.mark.parametrize("wanted", [True, False])
    def test_a_value_that_backward_needs_is_missed_when_it_was_turned(self, given, wanted):
        leaf, *how = given
        x = leaf * 1 if wanted else leaf.detach().clone()
        weight = torch.ones((), requires_grad=True)
        saved = weight * x
        rope_(x, *how, layout="bshd")
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()


def test_triton_is_imported_by_the_first_launch_and_not_before():
    code = "import sys, torch, crystal.kernels as k; k.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5); "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit('triton' in sys.modules)"], check=False)
    assert done.returncode == 0
