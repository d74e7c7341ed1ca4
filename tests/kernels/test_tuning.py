"""Choices made by measuring: decided soundly, cached by what they depend on, pinned where they must not change."""

import dataclasses
import itertools
import json

import pytest
import torch
from closeness import product_tolerance, tolerance
from hypothesis import given
from hypothesis import strategies as st

from crystal.kernels import candidates, measuring, tuning
from crystal.kernels.linear import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, linear, names_of


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Choices of this test's own: an empty cache, and nothing pinned."""
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path))
    monkeypatch.delenv("CRYSTAL_TUNING", raising=False)
    for held in (tuning._tunings, tuning._kept, tuning._made):
        monkeypatch.setattr(tuning, next(n for n in vars(tuning) if vars(tuning)[n] is held), {})
    return tmp_path


def case(chosen, **rates):
    return tuning.Case(chosen, rates or {chosen: 1.0}, 0.0, True)


def found(dtype="fp32", threads=2, **cases):
    return tuning.Tuning(tuning.identity(threads), dtype, cases, 1.0, 1e12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("features_in", "features_out"), [(48, 130), (130, 48)])
def test_every_candidate_makes_the_same_product(dtype, features_in, features_out):
    rows = 96
    x, w, dy = (
        torch.randn(shape).to(dtype)
        for shape in ((rows, features_in), (features_out, features_in), (rows, features_out))
    )
    for of, tensors, (a, b) in (
        (FORWARD, (x, w), (x, w.T)),
        (INPUT_GRADIENT, (dy, w), (dy, w)),
        (WEIGHT_GRADIENT, (dy, x), (dy.T, x)),
    ):
        exact = a.double() @ b.double()
        bound = product_tolerance(a, b) + torch.finfo(dtype).eps * exact.abs()  # sums in fp32, the result rounded once
        assert names_of(of, dtype)[0] == "torch"
        for name in names_of(of, dtype):
            made = of[name](*tensors)
            assert made.dtype == dtype
            assert made.is_contiguous(), name
            assert ((made.double() - exact).abs() <= bound).all(), name


def test_the_first_candidate_wins_unless_another_leads_clearly():
    assert measuring._decided(1.0, {"a": [1.0, 1.01], "b": [0.96, 0.97]}).chosen == "a"
    assert measuring._decided(1.0, {"a": [1.0, 1.01], "b": [0.90, 0.91]}).chosen == "b"
    assert measuring._decided(2.0, {"a": [1.0, 1.0], "b": [0.5, 0.5]}).rates == {"a": 2.0, "b": 4.0}


def test_timings_that_differ_are_not_settled_unless_the_winner_leads_by_more():
    assert measuring._decided(1.0, {"a": [1.0, 1.05], "b": [1.2, 1.2]}).settled
    assert not measuring._decided(1.0, {"a": [1.0, 1.3], "b": [1.2, 1.2]}).settled
    assert measuring._decided(1.0, {"a": [1.0, 1.3], "b": [1.4, 1.4]}).settled


class Clock:
    """Time that passes only in calls."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr(measuring.time, "perf_counter", lambda: self.now)

    def taking(self, *seconds):
        turns = itertools.cycle(seconds)

        def call():
            self.calls += 1
            self.now += next(turns)

        return call


def test_noise_is_measured_again_and_quiet_is_not(monkeypatch):
    clock = Clock(monkeypatch)
    quiet = list(measuring._timed(iter([("k", 1.0, {"a": clock.taking(0.01), "b": clock.taking(0.011)})]), 1e9))
    assert [len(s) for s in quiet[0][2].values()] == [1 + measuring.ROUNDS] * 2
    noisy = {"a": clock.taking(0.010, 0.02, 0.05), "b": clock.taking(0.011, 0.03, 0.02, 0.05)}
    timed = list(measuring._timed(iter([("k", 1.0, noisy)]), 1e9))
    assert len(timed[0][2]["a"]) > 1 + measuring.ROUNDS


def test_measuring_ends_in_time_and_a_hopeless_candidate_is_soon_left_out(monkeypatch):
    clock = Clock(monkeypatch)
    cases = [(str(i), 1.0, {"a": clock.taking(0.1, 0.3, 0.2), "b": clock.taking(0.9)}) for i in range(10)]
    timed = list(measuring._timed(iter(cases), clock.now + 5.0))
    assert [len(seconds["b"]) for _, _, seconds in timed] == [3] * 10
    assert all(len(seconds["a"]) >= 2 for _, _, seconds in timed)
    assert len(timed[-1][2]["a"]) < len(timed[0][2]["a"])


def test_one_disturbed_timing_does_not_rule_a_candidate_out(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {"a": clock.taking(0.10), "b": clock.taking(0.05, 0.9, *[0.05] * 40)}
    ((_, _, seconds),) = measuring._timed(iter([("k", 1.0, calls)]), 1e9)
    assert measuring._decided(1.0, seconds).chosen == "b"


def test_a_candidate_that_this_processor_cannot_run_is_left_out(monkeypatch):
    def refuses():
        raise RuntimeError("could not create a primitive")

    ((_, _, seconds),) = measuring._timed(iter([("k", 1.0, {"a": refuses, "b": Clock(monkeypatch).taking(0.1)})]), 1e9)
    assert set(seconds) == {"b"}
    assert measuring._decided(1.0, seconds).chosen == "b"


@pytest.fixture(scope="module")
def keys():
    return {key for key, _, _ in candidates.cases()}


@given(
    features_in=st.integers(1, 5000),
    features_out=st.integers(1, 5000),
    operation=st.sampled_from(["forward", "input_gradient", "weight_gradient"]),
)
def test_every_product_has_a_case(keys, features_in, features_out, operation):
    for dtype in tuning.NAMES:
        assert tuning.product_key(operation, dtype, features_in, features_out) in keys


def test_bf16_is_auto_only_where_its_products_are_faster():
    def rated(**gflops):
        return {f"{d} forward {s}": case("torch", torch=r) for d, r in gflops.items() for s in tuning.SIZES}

    assert candidates.faster_dtype(rated(fp32=300e9, bf16=1200e9)) == "bf16"
    assert candidates.faster_dtype(rated(fp32=300e9, bf16=60e9)) == "fp32"
    assert candidates.faster_dtype(rated(fp32=300e9, bf16=310e9)) == "fp32"


def test_a_machine_is_measured_once(alone, monkeypatch):
    measured = []

    def measure(threads):
        measured.append(threads)
        return found(threads=threads, **{"fp32 forward 256": case("onednn")})

    monkeypatch.setattr(tuning, "measure", measure)
    assert tuning.product_choice("forward", torch.float32, 512, 256, 256) == "onednn"
    tuning._tunings.clear()
    tuning._made.clear()
    assert tuning.product_choice("forward", torch.float32, 512, 256, 256) == "onednn"
    assert measured == [torch.get_num_threads()]
    tuning._tunings.clear()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # libraries that may use less are another machine
    tuning.tuning()
    assert len(measured) == 2


@pytest.mark.parametrize("text", ["", "{}", '{"cases": 1}', '{"cases": {"k": {}}}', "\x00"])
def test_a_damaged_cache_is_measured_again(alone, monkeypatch, text):
    monkeypatch.setattr(tuning, "measure", lambda threads: found(threads=threads))
    tuning.tuning()
    (file,) = [f for f in (alone / "tuning").glob("*.json") if not f.name.startswith("waiting")]
    file.write_text(text)
    tuning._tunings.clear()
    assert tuning.tuning().dtype == "fp32"
    assert json.loads(file.read_text())["dtype"] == "fp32"


def test_a_result_that_did_not_settle_is_used_for_an_hour(alone, monkeypatch):
    shaky = dataclasses.replace(case("torch"), settled=False)
    clock = [1e9]
    monkeypatch.setattr(tuning.time, "time", lambda: clock[0])
    measured = []

    def measure(threads):
        measured.append(threads)
        return dataclasses.replace(found(threads=threads, k=shaky), measured=clock[0])

    monkeypatch.setattr(tuning, "measure", measure)
    for passed in (0, tuning.UNSETTLED_FOR - 1, 2):
        clock[0] += passed
        tuning._tunings.clear()
        tuning.tuning()
    assert len(measured) == 2


def test_choices_that_a_run_keeps_go_before_measured_ones(alone, monkeypatch):
    monkeypatch.setattr(tuning, "measure", lambda threads: found(k=case("torch"), other=case("torch")))
    assert tuning.chosen("k") == "torch"
    tuning.use({"k": "onednn"})
    assert (tuning.chosen("k"), tuning.chosen("other")) == ("onednn", "torch")
    tuning.use({})
    assert tuning.chosen("k") == "torch"


def test_a_file_pins_all_choices_and_a_bad_one_is_named(alone, monkeypatch):
    path = alone / "pinned.json"
    tuning.save(found("bf16", **{"fp32 forward 256": case("onednn")}), path)
    monkeypatch.setenv("CRYSTAL_TUNING", str(path))
    monkeypatch.setattr(tuning, "measure", lambda threads: pytest.fail("measured"))
    assert tuning.fastest_dtype() == "bf16"
    assert tuning.chosen("fp32 forward 256") == "onednn"
    tuning._tunings.clear()
    path.write_text("{")
    with pytest.raises(ValueError, match=r"CRYSTAL_TUNING=.*pinned\.json: expected choices"):
        tuning.tuning()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layers_gradients_under_every_choice(alone, monkeypatch, dtype):
    """Whoever makes the products, an operator's three gradients agree to the dtype's rounding."""
    x0, w0, b0, dy = (torch.randn(*shape).to(dtype) for shape in ((8, 16, 48), (130, 48), (130,), (8, 16, 130)))
    results = {}
    for name in ("torch", "transposed", "onednn", "widened", "widened_onednn"):
        chosen = {}
        for operation, of in (
            ("forward", FORWARD),
            ("input_gradient", INPUT_GRADIENT),
            ("weight_gradient", WEIGHT_GRADIENT),
        ):
            chosen[tuning.product_key(operation, dtype, 48, 130)] = case(
                name if name in names_of(of, dtype) else "torch"
            )
        monkeypatch.setattr(tuning, "measure", lambda threads, made=chosen: found(**made))
        tuning._tunings.clear()
        tuning._made.clear()
        x, w, b = (t.clone().requires_grad_() for t in (x0, w0, b0))
        y = linear(x, w, b)
        y.backward(dy)
        results[name] = [t.double() for t in (y.detach(), x.grad, w.grad, b.grad)]
    eps = torch.finfo(dtype).eps
    for name, made in results.items():
        for ours, theirs in zip(made, results["torch"], strict=True):
            size = theirs.abs().max().item()  # sums of 48, 128 and 130 terms, and their one rounding
            assert (ours - theirs).abs().max() <= tolerance(130, size) + eps * size, name
