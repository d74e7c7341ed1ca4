"""The repaired interpreter computes as torch does, its sanitizer finds planted faults, and our kernels are clean."""

import pytest

pytest.importorskip("triton", reason="the kernels' interpreter")

from accuracy_rule import too_far

from crystal.kernels.catalog import OPERATORS

FAULTS = {
    "outside": "memcheck: load outside every tensor",
    "same_element": "racecheck: two programs write the same element of Y",
    "neighbour": "racecheck: a program writes what another reads of Y",
    "lane_twice": "racecheck: one store writes an element of Y twice",
    "misaligned": "misaligned: load of 4 bytes",
    "atomic": "atomic: the order of additions is not fixed",
}


def test_rounding_and_bfloat16_arithmetic_are_torchs_bit_for_bit(interpreted):
    wrong = {line["case"]: line["wrong"] for line in interpreted("rounding")}
    assert len(wrong) == 5
    assert not any(wrong.values()), wrong


def test_the_interpreter_as_it_comes_is_wrong_so_the_repair_is_still_needed(interpreted):
    wrong = {line["case"]: line["wrong"] for line in interpreted("rounding", "stock")}
    assert wrong["cast to torch.bfloat16"] > 0
    assert wrong["a * b"] > 0


def test_every_planted_fault_is_found_and_a_clean_kernel_is_not_accused(interpreted):
    lines = {line["kernel"]: line for line in interpreted("faults")}
    for kernel, expected in FAULTS.items():
        assert any(found.startswith(expected) for found in lines[kernel]["findings"]), lines[kernel]
    assert lines["undefined"]["nan"], "a load without `other` must leave its masked lanes visible"
    assert lines["clean"]["findings"] == {}
    assert not lines["clean"]["nan"]


@pytest.fixture(scope="module")
def examined(interpreted):
    return interpreted("operators")


def test_no_kernel_of_any_operator_reads_or_writes_where_it_should_not(examined):
    assert {(line["operator"], line["shape"]): line["findings"] for line in examined if line["findings"]} == {}


def test_every_operator_is_as_exact_as_torch_at_every_small_and_odd_shape(examined):
    assert [(line["operator"], line["shape"], why) for line in examined for why in too_far(line["errors"])] == []


def test_every_kernel_of_every_operator_ran(examined):
    for operator in OPERATORS:
        launched = {name for line in examined if line["operator"] == operator.name for name in line["launched"]}
        assert launched == set(operator.kernels)


@pytest.mark.proof
@pytest.mark.parametrize("module", ["norm_kernels", "swiglu", "rope", "cross_entropy"])
def test_a_kernel_that_loses_one_mask_is_noticed_whichever_it_is(module, interpreted):
    unharmed, *mutants = interpreted(module, script="mutants.py")
    assert unharmed["noticed"] is None
    assert len(mutants) >= 3
    assert [line["fault"] for line in mutants if line["noticed"] is None] == []
