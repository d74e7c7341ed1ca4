"""Weight streaming's store: what each format of moments keeps, how often it is read, and the disk it is refused for."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from closeness import near, path_length
from executors import STEPS, train_on
from test_weight_streaming import batches, config, pair, streaming

from crystal.backends.config import WeightStreamingConfig
from crystal.backends.weight_streaming.io import Buffer
from crystal.backends.weight_streaming.store import Store
from crystal.errors import ConfigError, RunError
from crystal.planning.cost import streaming_bytes
from crystal.zoo.build import plan_for
from crystal.zoo.config import model_config


# the loss's largest relative distance from the cpu backend's over 20 steps; fp32 moments: none
@pytest.mark.parametrize(("moments", "tolerance"), [("fp32", 0.0), ("bf16", 0.01), ("int8", 0.1)])
def test_moments_in_fewer_bits_keep_the_loss_near_the_cpu_backends(tmp_path, moments, tolerance):
    cpu, made = pair(tmp_path, config(), moments=moments)
    off, first = [], None
    for step in range(1, 21):
        data = batches(1 + step % 2)  # few, so that the loss falls
        a, b = cpu.train_step(step, data).loss.item(), made.train_step(step, data).loss.item()
        first = a if first is None else first
        off.append(abs(b / a - 1))
    assert a < 0.9 * first
    assert max(off) <= tolerance
    assert tolerance == 0 or max(off) > 0  # the format is in use


def test_the_update_is_clipped_by_the_norm_over_all_tensors(tmp_path):
    """The norm is the one of all gradients together, as they lie in the store, and the update's scale follows."""
    made = streaming(tmp_path, config(), dtype="fp32")
    made.initialise()
    result = made.train_step(1, batches(1))
    total = torch.zeros((), dtype=torch.float64)
    for piece in made.store.layout.pieces:
        plane = made.store.layout.gradient
        buffer = Buffer(plane.bytes(piece.numel))
        made.store.read(piece, plane, 0, buffer.bytes).wait()
        flat = buffer.tensor(plane.dtype, 0, piece.numel)
        total += sum(view.double().square().sum() for view in piece.views(flat).values())
    assert result.grad_norm.item() == near(total.sqrt().item(), max(piece.numel for piece in made.store.layout.pieces))
    assert made.update.scale == near(1.0 / result.grad_norm.item(), 1)


def test_a_step_of_four_micro_batches_reads_and_writes_what_a_step_of_one_does(tmp_path):
    def moved(parts):
        _, made = pair(tmp_path / str(parts), config(), micro_batches=4)
        made.train_step(1, batches(1, parts))
        read, wrote = Counter(), Counter()
        for method, count in (("read", read), ("write", wrote)):
            original = getattr(made.store, method)

            def counted(piece, plane, begin, memory, *more, original=original, count=count):
                count[piece.name, plane.name] += len(memory)
                return original(piece, plane, begin, memory, *more)

            setattr(made.store, method, counted)
        made.train_step(2, batches(2, parts))
        return read, wrote

    assert moved(1) == moved(4)


@pytest.mark.parametrize("gradients", ["spilled", "recomputed"])
def test_too_little_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch, gradients):
    plan = plan_for(config())
    store = Store(plan, tmp_path, "fp32", torch.bfloat16, spilled=gradients == "spilled")
    needed = store.layout.store_bytes + store.layout.gradient_bytes
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(RunError, match=f"needs {needed:,} bytes on disk .* {needed - 1:,} are free; set backend"):
        streaming(tmp_path, config(), "bf16", gradients=gradients)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    streaming(tmp_path, config(), "bf16", gradients=gradients).initialise()
    held = sum(f.stat().st_size for f in (tmp_path / "run" / "store").glob("*.bin"))
    assert held == needed


def test_a_killed_writers_disk_is_not_asked_for_twice(tmp_path, monkeypatch):
    """Files that are there already count as room: a run killed while it was initialised can begin again."""
    streaming(tmp_path, config()).initialise()
    (tmp_path / "run" / "store" / "store.json").unlink(missing_ok=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    streaming(tmp_path, config()).initialise()


def test_recomputed_gradients_are_for_one_executor(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"backend.gradients: .* expected spilled, got recomputed"):
        streaming(tmp_path, config(), gradients="recomputed")
    assert not list(tmp_path.iterdir())


def test_two_executors_equal_one_with_twice_the_batch(tmp_path):
    """On gloo, fp32. Both hold the same weights to the last bit; one process that takes all rows, nearly the same."""
    two = train_on(2, tmp_path)
    cpu, one = pair(tmp_path / "one", config())
    for step in range(1, STEPS + 1):
        for alone in (cpu, one):
            expected = alone.train_step(step, batches(step)).host()
            for found in two:
                length = path_length(config(), 16, step)
                assert found["steps"][step - 1]["loss"] == near(expected["loss"], length)
                assert found["steps"][step - 1]["grad_norm"] == near(expected["grad_norm"], 25 * length)
                assert found["steps"][step - 1]["source_tokens"] == expected["source_tokens"]
    for name, tensor in one.state():
        if name.startswith("model."):
            assert torch.equal(two[0]["weights"][name], two[1]["weights"][name])
            assert (two[0]["weights"][name] - tensor).norm() <= 1e-3 * tensor.norm() or "k.bias" in name


def test_the_documents_table_of_disk_needs_is_what_the_layout_takes():
    page = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text()
    for model in ("crystalcoder-7b", "amber-7b", "crystalcoder-w2048-l24"):
        sections = [
            WeightStreamingConfig(name="weight_streaming", moments=moments, gradients=gradients)
            for gradients in ("spilled", "recomputed")
            for moments in ("fp32", "bf16", "int8")
        ]
        sizes = (streaming_bytes(model_config(model), section)["store"] / 1e9 for section in sections)
        assert f"| {model} | {' | '.join(f'{size:.1f}' for size in sizes)} |" in page
