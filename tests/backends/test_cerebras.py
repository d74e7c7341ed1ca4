"""The real cerebras.pytorch behind our protocol: agreement with the cpu backend, state, failures in one line."""

import json
import os
import signal

import pytest
import torch
from cerebras_jobs import ENVIRONMENT, TWO_STAGES, backends, batch, curriculum, micro_batches, model, needs_cerebras
from closeness import near, path_length

from crystal.backends.base import Setup
from crystal.backends.cerebras.bridge import CerebrasBackend
from crystal.backends.config import CerebrasConfig, ClusterConfig, OptimizerConfig
from crystal.errors import CheckpointError, ConfigError, RunError
from crystal.run import load_run
from crystal.training.guards import plan_differences
from crystal.zoo.build import initial_weights, plan_for

# CrystalCoder's own warm-up (86 steps to 0.012), of which 20 steps are made here
PUBLISHED = curriculum((100, [{"from": 0.0, "to": 0.012, "steps": 86}, {"from": 0.012, "to": 1.2e-4, "steps": 14}], []))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(cpu, cerebras), one process for all tests of the usual job; each begins with `fresh`."""
    made = backends(tmp_path_factory.mktemp("run"))
    yield made
    made[1].process.close()


def fresh(pair):
    for backend in pair:
        backend.initialise()
        backend.reset_optimizer()
    return pair


def weights(backend):
    return {name: tensor.clone() for name, tensor in backend.state()}


def losses(directory):
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def assert_near_at_every_step(theirs, ours, run):
    """Losses of a run of rows of 32 tokens."""
    config = load_run(run).config.model
    for step, (found, expected) in enumerate(zip(theirs, ours, strict=True), 1):
        assert found == near(expected, path_length(config, 32, step)), step


@needs_cerebras
@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        (OptimizerConfig(name="adamw_cerebras", eps=1e-9), {"preset": "crystalcoder-w64-l2"}),
        (OptimizerConfig(name="adamw", decay_norms_and_biases=True), {"preset": "amber-w64-l2", "document_mask": True}),
    ],
    ids=["crystalcoder, Cerebras' AdamW", "amber, torch's AdamW, documents apart"],
)
def test_twenty_steps_agree_with_the_cpu_backend(tmp_path, optimizer, changes):
    cpu, cerebras = backends(tmp_path, optimizer, model(**changes), PUBLISHED)
    for step in range(1, 21):
        rows = micro_batches(batch(step))
        ours, theirs = cpu.train_step(step, rows).host(), cerebras.train_step(step, rows).host()
        length = path_length(model(**changes), 16, step)
        assert theirs["loss"] == near(ours["loss"], length), step
        assert theirs["grad_norm"] == near(ours["grad_norm"], 25 * length)
        assert theirs["source_nll"] == near(ours["source_nll"], length)
        assert theirs["source_tokens"] == ours["source_tokens"]
        assert ours["grad_norm"] > 1, "clipping had something to do"
    ours, theirs = weights(cpu), weights(cerebras)
    assert ours.keys() == theirs.keys()
    for name, start in initial_weights(cpu.plan, 1):
        if not name.endswith("k.bias"):  # whose gradient is rounding noise
            tensor = ours[f"model.{name}"]
            assert (tensor - theirs[f"model.{name}"]).abs().max() < 1e-3 * (tensor - start).abs().max(), name
    cerebras.process.close()


@needs_cerebras
def test_groups_follow_the_plan_and_evaluation_agrees(pair):
    cpu, cerebras = fresh(pair)
    assert plan_differences(cerebras.plan, cerebras.groups()) == []
    for rows in (8, 3):  # validation may end with a smaller batch
        ours, theirs = cpu.eval_step(batch(7, rows)), cerebras.eval_step(batch(7, rows))
        assert theirs[0].tolist() == near(ours[0].tolist(), path_length(model(), 16))
        assert torch.equal(ours[1], theirs[1])


@needs_cerebras
def test_a_stage_that_starts_the_optimizer_afresh_does_so(pair):
    """Moments and bias correction begin again, the learning rate goes on with the second stage's warm-up."""
    cpu, cerebras = fresh(pair)
    for step in (9, 10, 11, 12):
        if step == 11:
            cpu.reset_optimizer()
            cerebras.reset_optimizer()
            assert cerebras.scalars() == {"optimizer_step": 0}
            assert all(not t.any() for n, t in cerebras.state() if n.startswith("optimizer."))
        rows = micro_batches(batch(step))
        ours, theirs = cpu.train_step(step, rows).host(), cerebras.train_step(step, rows).host()
        assert theirs["loss"] == near(ours["loss"], path_length(model(), 16, step - 8)), step
    assert cerebras.scalars() == cpu.scalars() == {"optimizer_step": 2}


@needs_cerebras
def test_a_step_that_is_not_finite_leaves_weights_and_moments_alone(pair):
    _, cerebras = fresh(pair)
    cerebras.train_step(4, micro_batches(batch(4)))
    before = weights(cerebras)
    bad = batch(5)
    bad.weights_BT[0, 0] = float("inf")
    result = cerebras.train_step(5, micro_batches(bad)).host()
    assert not result["applied"]
    after = weights(cerebras)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert cerebras.scalars() == {"optimizer_step": 1}
    assert cerebras.train_step(6, micro_batches(batch(6))).host()["applied"]


@needs_cerebras
def test_state_goes_to_the_cpu_backend_and_back(pair):
    """The same next loss from a checkpoint of either, and to the bit in Cerebras' own."""
    cpu, cerebras = fresh(pair)
    for step in (3, 4, 5):
        cerebras.train_step(step, micro_batches(batch(step)))
    saved, scalars = weights(cerebras), cerebras.scalars()
    following = cerebras.train_step(6, micro_batches(batch(6))).host()
    moved = weights(cerebras)

    def read(prefix):
        return ((n.removeprefix(prefix + "."), t) for n, t in saved.items() if n.startswith(prefix + "."))

    cpu.load(read, scalars)
    continued = cpu.train_step(6, micro_batches(batch(6))).host()["loss"]
    assert continued == near(following["loss"], path_length(model(), 16))
    cerebras.load(read, scalars)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in cerebras.state())
    assert cerebras.train_step(6, micro_batches(batch(6))).host() == following
    assert all(torch.equal(tensor, moved[name]) for name, tensor in cerebras.state())
    decoder = cerebras.decoder()
    assert torch.equal(decoder.embed.weight, moved["model.embed.weight"])


@needs_cerebras
def test_a_process_that_dies_is_one_line(tmp_path):
    _, cerebras = backends(tmp_path)
    os.kill(cerebras.process.child.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"^cerebras: its process ended with -9: [^\n]*$"):
        cerebras.train_step(1, micro_batches(batch(1)))
    directory = cerebras.process.directory
    cerebras.process.close()
    assert not directory.exists()


@needs_cerebras
def test_a_checkpoint_without_a_tensor_is_refused_by_name(pair):
    _, cerebras = fresh(pair)
    held = {n: t for n, t in cerebras.state() if n.startswith("model.") and n != "model.norm.bias"}
    with pytest.raises(CheckpointError, match=r"expected every tensor of the model: model\.norm\.bias"):
        cerebras.load(lambda prefix: ((n.removeprefix("model."), t) for n, t in held.items()), None)


@needs_cerebras
@pytest.mark.proof
def test_crystal_train_runs_a_proxy_and_goes_on_from_its_checkpoint(make_run, train, tmp_path):
    """The ordinary loop across a change of stage: the cpu backend's losses; interrupted and continued, the same."""

    path = make_run(**{"optimizer.name": "adamw_cerebras", "curriculum.lr_scale": 0.1, "train.eval_every": 100})
    words = ("backend.name=cerebras", f"backend.environment={ENVIRONMENT}", "backend.threads=1")
    ours = losses(train(path, "backend.dtype=fp32", f"run_dir={tmp_path / 'cpu'}", until=12).directory)
    theirs = losses(train(path, *words, until=12).directory)
    assert len(ours) == 12
    assert_near_at_every_step(theirs, ours, path)
    train(path, *words, f"run_dir={tmp_path / 'again'}", until=7)
    assert losses(train(path, *words, f"run_dir={tmp_path / 'again'}", until=12).directory) == theirs


@needs_cerebras
def test_a_run_moves_from_cpu_to_cerebras_and_back_with_its_losses_unbroken(make_run, train, tmp_path):
    """Stages change where it moves, so moments and fresh moments both go over: one run directory, the cpu's losses."""
    changes = {"optimizer.name": "adamw_cerebras", "curriculum.lr_scale": 0.1, "train.eval_every": 100}
    path = make_run(**changes, **{"backend.name": "cpu"})
    alone = train(path, "backend={name: cpu, dtype: fp32}", f"run_dir={tmp_path / 'cpu'}", until=14).directory
    moving = (
        ("backend={name: cpu, dtype: fp32}", 5),
        (f"backend={{name: cerebras, dtype: fp32, environment: {ENVIRONMENT}}}", 11),
    )
    for backend, until in (*moving, ("backend={name: cpu, dtype: fp32}", 14)):
        directory = train(path, backend, f"run_dir={tmp_path / 'moved'}", until=until).directory
    ours, theirs = losses(alone), losses(directory)
    assert len(theirs) == 14
    assert_near_at_every_step(theirs, ours, path)


def test_without_an_environment_the_message_says_how_to_make_one(tmp_path):
    plan = plan_for(model())
    setup = Setup(model(), plan, OptimizerConfig(), TWO_STAGES.base_lr, 1, 2, TWO_STAGES)
    section = CerebrasConfig(name="cerebras", environment=tmp_path / "none")
    with pytest.raises(ConfigError, match="make it: crystal cerebras setup"):
        CerebrasBackend(setup, section, tmp_path)
    with pytest.raises(ConfigError, match=r"backend\.cluster: expected a system's mgmt_address"):
        CerebrasBackend(setup, CerebrasConfig(name="cerebras", device="csx"), tmp_path)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "bf16"), ("csx", "fp32")])
def test_a_dtype_that_the_device_lacks_is_refused(device, dtype):
    with pytest.raises(ValueError, match=f"expected .*, got {dtype}"):
        CerebrasConfig(name="cerebras", device=device, dtype=dtype)


def test_a_session_on_systems_ends_with_the_stage_or_after_its_steps(tmp_path, monkeypatch):
    """What is asked of a worker on csx, without one: sessions are announced whole, none crosses a stage."""
    asked = []

    class Pipe:
        def __init__(self, *_):
            self.directory, self.places, self.answers = tmp_path, {}, []

        def ask(self, do, **arguments):
            return {}

        def tell(self, do, **arguments):
            asked.append(arguments)

        def hear(self):
            return {"values": [1.0, 1.0, 1.0, [1.0, 1.0], [1.0, 1.0]]}

    monkeypatch.setattr("crystal.backends.cerebras.bridge.Process", Pipe)
    section = CerebrasConfig(name="cerebras", device="csx", cluster=ClusterConfig(mgmt_address="a:1", session_steps=4))
    setup = Setup(model(), plan_for(model()), OptimizerConfig(), TWO_STAGES.base_lr, 1, 2, TWO_STAGES)
    made = CerebrasBackend(setup, section, tmp_path)
    for step in range(1, 13):
        made.train_step(step, micro_batches(batch(step)))
    assert [(a["first"], a["steps"]) for a in asked] == [(1, 4), (5, 4), (9, 2), (11, 4)]
    with pytest.raises(ConfigError, match="session_steps: step 12 is inside a session, which ends at step 14"):
        next(iter(made.state()))
