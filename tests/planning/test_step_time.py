"""Seconds of a step: by hand, and what must hold of any device."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal.backends.config import Layout
from crystal.planning.device import Device, load_device
from crystal.planning.layouts import Work, candidate, divisors
from crystal.planning.step_time import overlapped, process_flops_per_token
from crystal.planning.traffic import latency, link
from crystal.zoo.config import model_config
from crystal.zoo.flops import flops_per_token

AMBER, CRYSTAL = model_config("amber-7b"), model_config("crystalcoder-7b")
A100 = load_device("a100-80gb")
AMBER_RUN = Work(AMBER, 2048, 2240, 274_320)
LATENCIES = ["collective_latency_us=8", "intra_node_latency_us=3", "inter_node_latency_us=14"]


def test_the_time_of_ambers_own_layout_by_hand():
    changes = ["devices_per_node=4", "matmul_fraction=0.5", "contention=0.2", *LATENCIES]
    c = candidate(AMBER_RUN, Layout(fsdp=224), load_device("a100-80gb", changes), 10, "block")
    # 32 blocks again: q, k, v, out 2 x 4 x 4096^2, MLP 2 x 3 x 4096 x 11008, causal scores 2 x 4096 x 2048
    again = 32 * (8 * 4096**2 + 6 * 4096 * 11008 + 2 * 4096 * 2048)
    assert c.seconds["compute"] == pytest.approx(20_480 * (41_254_674_432 + again) / 156e12)
    # of the fullest of 224: 19 of 4,096 rows, 50 of 11,008, 143 of 32,000
    block = 4 * 19 * 4096 + 2 * 50 * 4096 + 19 * 11008 + 2 * 19
    ends = 2 * 143 * 4096 + 19
    gather, scatter = c.traffic
    assert gather.bytes == 223 * 2 * (2 * 32 * block + ends)
    assert scatter.bytes == 223 * 4 * (32 * block + ends)
    # 32 blocks twice and the ends, once reduced; 223 steps of a ring, 55 of them between 56 nodes
    assert (gather.calls, scatter.calls) == (65, 33)
    assert gather.latency_seconds == pytest.approx(65 * (8 + 168 * 3 + 55 * 14) / 1e6)
    assert gather.seconds == pytest.approx(gather.latency_seconds + gather.bytes / 100e9)  # 4 cards of 25 GB/s a node
    # all of it beside compute, which loses a fifth of its pace meanwhile
    assert c.seconds["contention"] == pytest.approx(0.2 * (gather.seconds + scatter.seconds))
    assert (gather.inter, c.seconds["exposed"], c.seconds["bubble"], c.seconds["tensor"]) == (True, 0, 0, 0)


@pytest.mark.parametrize(
    ("stride", "size", "inter", "gb_per_s"),
    [
        (1, 8, False, 240),
        (4, 2, False, 240),
        (1, 16, True, 200),
        (2, 8, True, 100),
        (8, 2, True, 25),
        (64, 2, True, 25),
    ],
)
def test_a_ring_between_nodes_has_a_card_for_each_member_in_a_node(stride, size, inter, gb_per_s):
    assert link(A100, stride, size) == (inter, gb_per_s * 1e9)


@pytest.mark.parametrize(
    ("kind", "stride", "size", "microseconds"),
    [
        ("all_gather", 1, 8, 8 + 7 * 3),
        ("reduce_scatter", 1, 16, 8 + 14 * 3 + 1 * 14),
        ("all_reduce", 1, 16, 8 + 28 * 3 + 2 * 14),
        ("all_reduce", 8, 4, 8 + 6 * 14),  # one rank a node: every step goes out
        ("all_gather", 2, 6, 8 + 4 * 3 + 1 * 14),  # four ranks in one node, two in the next
        ("p2p", 4, 2, 8 + 3),
        ("p2p", 8, 4, 8 + 14),
    ],
)
def test_the_latency_of_a_collective_is_its_start_and_the_steps_of_a_ring(kind, stride, size, microseconds):
    device = load_device("a100-80gb", LATENCIES)
    assert latency(device, kind, stride, size) == pytest.approx(microseconds / 1e6)


def test_a_device_that_says_no_latency_and_no_contention_has_none():
    rates = {"memory_gb": 80, "peak_tflops": 312, "matmul_fraction": 0.5, "hbm_gb_per_s": 2039}
    own = Device(name="own", devices_per_node=4, intra_node_gb_per_s=240, inter_node_gb_per_s=25, **rates)
    c = candidate(AMBER_RUN, Layout(fsdp=28, tp=4, dp=2), own, 10, "block")
    assert {t.latency_seconds for t in c.traffic} == {0}
    assert c.seconds["contention"] == 0


def test_traffic_that_fits_beside_compute_costs_contention_and_the_rest_is_exposed():
    fast, slowed = (
        candidate(AMBER_RUN, Layout(fsdp=224), load_device("a100-80gb", [f"inter_node_gb_per_s={x}"]), 10, "none")
        for x in (25, 0.1)
    )
    assert fast.seconds["exposed"] == 0
    assert fast.seconds["contention"] == pytest.approx(A100.contention * sum(t.seconds for t in fast.traffic))
    sent = sum(t.seconds for t in slowed.traffic)
    busy = slowed.seconds["compute"] + slowed.seconds["contention"] + slowed.seconds["exposed"]
    assert busy == pytest.approx(sent)  # compute is all beside it


def test_what_comes_once_a_step_shares_the_last_backward_pass_with_the_gathers_of_its_micro_batch():
    """The reduction of replicas would fit there alone, so would the gathers; together they do not."""
    device = load_device("a100-80gb", ["contention=0", "inter_node_gb_per_s=1.95"])
    c = candidate(AMBER_RUN, Layout(dp=28, fsdp=8), device, 10, "none")
    window = 2 / 3 * c.seconds["compute"] / c.micro_batches
    once = sum(t.seconds for t in c.traffic if t.of == "dp")
    often = sum(t.seconds for t in c.traffic if t.of == "fsdp")
    each = 2 / 3 * often / c.micro_batches
    assert max(once, each) < window < once + each
    assert c.seconds["exposed"] == pytest.approx(once + each - window)


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 0.9), st.floats(0, 100))
def test_overlapping_takes_no_less_than_either_and_no_more_than_one_after_the_other(compute, sent, contention, more):
    lost, exposed = overlapped(compute, sent, contention)
    took = compute + lost + exposed
    assert took >= max(compute, sent) * (1 - 1e-12)
    assert took <= (compute + sent) * (1 + 1e-12)
    assert took == pytest.approx(max(sent, compute + contention * sent))
    assert sum(overlapped(compute, sent + more, contention)) >= (lost + exposed) * (1 - 1e-12)


def test_a_pipelines_bubble_is_narayanans():
    one, two = (candidate(AMBER_RUN, Layout(pp=8, fsdp=28, interleave=v), A100, 1, "none") for v in (1, 2))
    for c, v in ((one, 1), (two, 2)):
        assert c.micro_batches == 80
        assert c.seconds["bubble"] == pytest.approx(7 / (80 * v) * (c.seconds["compute"] + c.seconds["contention"]))


@pytest.mark.parametrize("config", [AMBER, CRYSTAL], ids=["amber-7b", "crystalcoder-7b"])
def test_the_flops_of_a_pipelines_processes_are_those_of_the_model(config):
    for pp in divisors(config.n_layers):
        each = [process_flops_per_token(config, 2048, Layout(pp=pp, interleave=1), place) for place in range(pp)]
        assert sum(each) == flops_per_token(config, 2048)
