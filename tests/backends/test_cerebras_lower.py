"""A lowered step's contract, read off its IR: planted faults are found, and both published models keep it."""

import json

import pytest
from cerebras_jobs import ENVIRONMENT, needs_cerebras
from typer.testing import CliRunner

from crystal.backends.cerebras import cirh
from crystal.cli.main import app

# one matrix, one update of it; what the compiler prints around the numbers is left out
STEP = """module {
  func @graph(%arg0: tensor<2x3xf32> {tf.aliasing_output = 0 : i64, tf.resource_name = "state.model.w"} loc(unknown), \
%arg1: tensor<2x3xf32> {tf.aliasing_output = 1 : i64, tf.resource_name = "state.optimizer.state.0.exp_avg"}, \
%arg2: tensor<2x3xf32> {tf.aliasing_output = 2 : i64, tf.resource_name = "state.optimizer.state.0.exp_avg_sq"}, \
%arg3: tensor<f32> {tf.aliasing_output = 3 : i64, tf.resource_name = "state.optimizer.state.0.beta1_power"}, \
%arg4: tensor<f32> {tf.aliasing_output = 4 : i64, tf.resource_name = "state.optimizer.state.0.beta2_power"}, \
%arg5: tensor<i64> {tf.aliasing_output = 5 : i64, tf.resource_name = "state.schedulers.0.last_epoch"}, \
%arg6: tensor<2x3xf32> {tf.input_name = "x"}) -> (tensor<2x3xf32>) {
    %0 = cirh.Mul %arg0, %arg6 : (tensor<2x3xf32>, tensor<2x3xf32>) -> tensor<2x3xf32>
    %1 = cirh.Add %arg1, %0 : (tensor<2x3xf32>, tensor<2x3xf32>) -> tensor<2x3xf32>
    %2 = cirh.Add %arg2, %0 : (tensor<2x3xf32>, tensor<2x3xf32>) -> tensor<2x3xf32>
    %3 = cirh.Mul %arg3, %arg3 : (tensor<f32>, tensor<f32>) -> tensor<f32>
    %4 = cirh.Mul %arg4, %arg4 : (tensor<f32>, tensor<f32>) -> tensor<f32>
    %5 = cirh.Add %arg5, %arg5 : (tensor<i64>, tensor<i64>) -> tensor<i64>
    %6 = cirh.Mul %1, %5 : (tensor<2x3xf32>, tensor<i64>) -> tensor<2x3xf32>
    %7 = cirh.Sub %arg0, %6 : (tensor<2x3xf32>, tensor<2x3xf32>) -> tensor<2x3xf32>
    return %7, %1, %2, %3, %4, %5 : tensor<2x3xf32>
  }
}
"""
LAST = "state.optimizer.state.0"


def found(tmp_path, text):
    (tmp_path / "cirh.mlir").write_text(text)
    return cirh.problems(cirh.read(tmp_path / "cirh.mlir"), {"w": (2, 3)}, ["w"])


def test_a_step_that_keeps_the_contract_has_no_problems(tmp_path):
    assert found(tmp_path, STEP) == []


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("state.model.w", "state.model.v", "state.model.w: expected once, named 0 times"),
        ("state.model.w", "state.model.v", "state.model.v: is not a tensor of the plan"),
        (f"{LAST}.exp_avg_sq", f"{LAST}.exp_avg", f"{LAST}.exp_avg: expected once, named 2 times"),
        ("tf.aliasing_output = 2 : i64, ", "", f"{LAST}.exp_avg_sq: is not written back"),
        ("aliasing_output = 2", "aliasing_output = 1", f"{LAST}.exp_avg: output 1 replaces 2 tensors"),
        ("aliasing_output = 2", "aliasing_output = 9", f"{LAST}.exp_avg_sq: is not written back"),
        ("return %7, %1, %2", "return %7, %1, %arg2", f"{LAST}.exp_avg_sq: is written back as it was"),
        ("return %7, %1", "return %7, %0", f"{LAST}.exp_avg: is written back as it was, or as something else"),
        ("cirh.Mul %1, %5", "cirh.Mul %1, %1", "state.model.w: its update does not depend on the step's learning rate"),
        ("%arg3, %arg3", "%arg4, %arg4", f"{LAST}.beta1_power: is not read"),
        ("%arg1: tensor<2x3xf32>", "%arg1: tensor<2x3xbf16>", f"{LAST}.exp_avg: expected f32 [2, 3], got bf16 [2, 3]"),
        ("%arg1: tensor<2x3xf32>", "%arg1: tensor<3xf32>", f"{LAST}.exp_avg: expected f32 [2, 3], got f32 [3]"),
        ("last_epoch", "epoch", "state.schedulers.0.last_epoch: expected the step, a scalar"),
        ("tensor<i64>) -> tensor<2x3xf32>", "tensor<i64>) -> tensor<0x3xf32>", "1 operations on tensors without"),
    ],
)  # fmt: skip
def test_every_planted_fault_is_named(tmp_path, before, after, problem):
    assert before in STEP
    assert any(line.startswith(problem) for line in found(tmp_path, STEP.replace(before, after, 1)))


def test_a_file_without_a_graph_is_refused(tmp_path):
    (tmp_path / "cirh.mlir").write_text("module {\n}\n")
    with pytest.raises(ValueError, match="expected a function of Cerebras IR, none found"):
        cirh.read(tmp_path / "cirh.mlir")


@needs_cerebras
@pytest.mark.parametrize(
    ("run", "parameters", "tensors"), [("crystalcoder-7b", 6_575_278_720, 579), ("amber-7b", 6_738_415_616, 291)]
)
@pytest.mark.proof
def test_the_published_models_whole_steps_lower_at_full_length(tmp_path, run, parameters, tensors):
    """No system: Cerebras' own compiler front takes all of it, and stops where a cluster would be spoken to."""
    words = ["cerebras", "lower", run, f"backend={{name: cerebras, device: csx, environment: {ENVIRONMENT}}}"]
    done = CliRunner().invoke(app, [*words, "--rows", "1", "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["verdict"], result["problems"]) == ("PASS", [])
    assert (result["parameters"], result["tensors"], result["seq_len"]) == (parameters, tensors, 2048)
    assert result["state_tensors"] == 5 * tensors + 1  # weight, two moments, two bias corrections; the step
    assert set(result["matmuls_by_dtype"]) == {"bf16"}
    assert "mgmt_address" in result["stopped"]
    graph = cirh.read(tmp_path / "cirh.mlir")
    assert len(graph.outputs) >= result["state_tensors"]
