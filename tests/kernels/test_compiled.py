"""Compiled for sm_80 and sm_90, no kernel needs more than the committed baseline; and the counting is right."""

import json
import os
import shutil

import pytest

triton = pytest.importorskip("triton", reason="the kernels' compiler")

import compiled  # noqa: E402
import planted  # noqa: E402
import torch  # noqa: E402

from crystal.kernels.proof.offline import Launch, TorchCall, offline  # noqa: E402
from crystal.kernels.proof.offsets import unsafe_offsets  # noqa: E402
from crystal.kernels.proof.resources import access_widths, resident_blocks, resources  # noqa: E402
from crystal.kernels.proof.ttir import parse  # noqa: E402

PINNED = compiled.BASELINE.exists()
needs_baseline = pytest.mark.skipif(
    not PINNED, reason=f"no baseline for triton {triton.__version__}: python tests/kernels/compiled.py writes it"
)


@pytest.fixture(scope="module")
def baseline():
    return json.loads(compiled.BASELINE.read_text())


@needs_baseline
@pytest.mark.parametrize("arch", compiled.ARCHS)
def test_no_kernel_needs_more_than_the_baseline(arch, baseline):
    if arch == compiled.ARCHS[0] and shutil.which("gcc") is None:
        pytest.skip("bytes are counted by compiled C: no gcc")
    seen = dict(compiled.found(arch))
    expected = {what for what in baseline if what.startswith(f"sm_{arch} ")}
    assert set(seen) == expected, "python tests/kernels/compiled.py writes the baseline anew"
    assert {what: bad for what, now in seen.items() if (bad := compiled.worse(baseline[what], now))} == {}


@needs_baseline
def test_the_baseline_itself_has_no_spill_no_atomic_no_double_and_no_unsafe_offset(baseline):
    for what, counts in baseline.items():
        assert counts.get("unsafe_offsets", 0) == counts["syncs"] == counts["torch_launches"] == 0, what
        assert counts.get("variants", 1) <= 2, what
        assert counts["launches"] <= 2, what
        for kernel in counts["kernels"].values():
            assert kernel["spills"] == kernel["atomics"] == kernel["doubles"] == 0, what


@needs_baseline
@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("launches", 3, "launches: 3, was 1"),
        ("width", 2, "width: 2, was 16"),
        ("bytes_ratio", 1.3, "bytes_ratio: 1.3, was"),
        ("variants", 10, "variants: 10, was 1"),
        ("unsafe_offsets", 4, "unsafe_offsets: 4, was 0"),
        ("registers", 255, "norm_forward registers: 255, was"),
        ("spills", 8, "norm_forward spills: 8, was 0"),
        ("warps_resident", 8, "norm_forward warps_resident: 8, was"),
        ("atomics", 1, "norm_forward atomics: 1, was 0"),
    ],
)
def test_what_gets_worse_is_named_and_what_gets_better_is_not(baseline, key, value, complaint):
    before = baseline["sm_80 layer_norm crystalcoder-7b bfloat16 forward"]
    now = json.loads(json.dumps(before))
    (now if key in now else now["kernels"]["norm_forward"])[key] = value
    (found,) = compiled.worse(before, now)
    assert found.startswith(complaint)
    assert compiled.worse(now, before) == []


def _compiled(kernel, grid, *arguments, arch=80, **options) -> Launch:
    with offline(arch) as log:
        kernel[grid](*arguments, **options)
    (launch,) = log
    return launch


def _meta(*sizes, dtype=torch.bfloat16):
    return torch.empty(sizes, dtype=dtype, device="meta")


def test_spills_and_occupancy_of_a_kernel_that_keeps_too_much():
    x = _meta(1 << 16, dtype=torch.float32)
    fat = resources(_compiled(planted.hoards, (1,), x, x, N=1 << 15, num_warps=4).compiled, 80)
    lean = resources(_compiled(planted.hoards, (1,), x, x, N=1 << 9, num_warps=4).compiled, 80)
    assert fat.spills > 0
    assert lean.spills == 0
    assert lean.warps_resident == 64


def test_narrow_accesses_of_a_width_known_only_at_run_time():
    x = _meta(64, 1000)
    for kernel, width in ((planted.copies_rows_of_any_width, 2), (planted.copies_rows_of_one_width, 16)):
        launch = _compiled(kernel, (64,), x, _meta(64, 1000), 1000, BLOCK=1024, num_warps=4)
        names = [name[1:] for name, _ in parse(launch.compiled.asm["ttir"]).parameters]
        widths = access_widths(launch.compiled.asm["ptx"], names, {"X", "Y"})
        assert set(widths["X"]) == set(widths["Y"]) == {width}


def test_atomics_and_doubles_are_counted():
    x = _meta(256, dtype=torch.float32)
    used = resources(_compiled(planted.adds_in_any_order, (2,), x, x, N=128).compiled, 80)
    assert used.atomics > 0
    assert resources(_compiled(planted.in_double, (2,), x, x, N=128).compiled, 80).doubles > 0


def test_an_offset_that_wraps_in_32_bits_is_named_and_a_64_bit_one_is_not():
    arguments = {"step": 1 << 20}
    for kernel, wrong in ((planted.offset_in_32_bits, 2), (planted.offset_in_64_bits, 0)):
        x = torch.empty_strided((5000, 128), (1 << 20, 1), dtype=torch.bfloat16, device="meta")
        launch = _compiled(kernel, (5000,), x, x, 1 << 20, BLOCK=128)
        assert len(unsafe_offsets(launch.compiled.asm["ttir"], launch.grid, launch.arguments | arguments)) == wrong
        assert unsafe_offsets(launch.compiled.asm["ttir"], (8, 1, 1), launch.arguments | arguments) == []


def test_host_syncs_and_torch_kernels_between_launches_are_recorded():
    with offline(80) as log:
        x = torch.ones(8, 8, device="cuda")
        x.sum().item()
    assert [(call.name, call.sync) for call in log if isinstance(call, TorchCall)] == [
        ("ones", False), ("sum", False), ("_local_scalar_dense", True),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks", "limit"),
    [  # by NVIDIA's occupancy calculator for compute capability 8.0
        (32, 0, 8, 8, "warps"),
        (40, 0, 8, 6, "registers"),
        (128, 0, 16, 1, "registers"),
        (255, 0, 4, 2, "registers"),
        (16, 48 * 1024, 4, 3, "shared"),
        (16, 0, 1, 32, "blocks"),
    ],
)
def test_resident_blocks_follow_nvidias_rules(registers, shared, warps, blocks, limit):
    assert resident_blocks(80, registers, shared, warps) == (blocks, limit)


def test_compiling_needs_no_gpu_and_leaves_none_behind():
    before = torch.cuda.is_available(), torch.Tensor.is_cuda, os.environ.get("CUDA_VISIBLE_DEVICES")
    with offline(90):
        assert torch.empty(3, device="meta").is_cuda
    assert (torch.cuda.is_available(), torch.Tensor.is_cuda, os.environ.get("CUDA_VISIBLE_DEVICES")) == before
    assert not torch.empty(3, device="meta").is_cuda
