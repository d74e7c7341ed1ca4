"""What a run takes from the machine it began on: its dtype, and choices that it keeps when measuring would differ."""

import json
import os

import pytest
import torch
import torch.multiprocessing as mp
import yaml

from crystal.backends.config import CudaConfig, Layout
from crystal.backends.machine import keep_choices, with_dtype
from crystal.kernels import tuning
from crystal.run import load_run
from crystal.training.metrics import read_metrics
from crystal.training.record import with_recorded_dtype


def measured(dtype="fp32", processor="this one", **chosen):
    """As if this had been measured here."""
    cases = {key: tuning.Case(name, {name: 1.0}, 0.0, True) for key, name in chosen.items()}
    return tuning.Tuning({"processor": processor}, dtype, cases)


@pytest.fixture
def machine(monkeypatch):
    """machine(dtype, processor, **choices): be that machine from now on."""
    monkeypatch.setattr(tuning, "_kept", {})
    monkeypatch.setattr(tuning, "_made", {})

    def become(dtype, processor="this one", **chosen):
        tuning._kept.clear()
        tuning._made.clear()
        made = measured(dtype, processor, **chosen)
        monkeypatch.setattr(tuning, "_tunings", dict.fromkeys(range(1, 65), made))
        monkeypatch.setattr(tuning, "identity", lambda threads: made.identity)

    return become


def recorded(outcome):
    return json.loads((outcome.directory / "manifest.json").read_text())["tuning"]


def config(outcome):
    return yaml.safe_load((outcome.directory / "config.yaml").read_text())


def losses(outcome):
    return [r["loss"] for r in read_metrics(outcome.directory) if r.get("loss") is not None]


def test_auto_is_the_dtype_that_is_fastest_here_and_is_written_down(make_run, train, machine):
    machine("fp32")
    assert config(train(make_run(), until=2))["backend"]["dtype"] == "fp32"
    machine("bf16")
    other = train(make_run(), f"run_dir={make_run().parent / 'other'}", until=2)
    assert config(other)["backend"]["dtype"] == "bf16"


def test_a_run_keeps_its_dtype_when_it_moves(make_run, train, machine):
    path = make_run()
    machine("fp32", "one", **{"fp32 forward 128": "torch"})
    train(path, until=2)
    machine("bf16", "another", **{"fp32 forward 128": "onednn"})
    moved = train(path, until=4)
    assert config(moved)["backend"]["dtype"] == "fp32"
    assert [(made["identity"]["processor"], made["choices"]["fp32 forward 128"]) for made in recorded(moved)] == [
        ("one", "torch"), ("another", "onednn")
    ]  # fmt: skip
    machine("bf16", "one", **{"fp32 forward 128": "onednn"})  # and back again, where another choice is faster today
    train(path, until=6)
    assert tuning.chosen("fp32 forward 128") == "torch"


def test_a_resumed_run_keeps_its_choices_and_so_its_bits(make_run, train, machine):
    products = [
        f"fp32 {o} 128{down}" for o in ("forward", "input_gradient", "weight_gradient") for down in ("", " down")
    ]
    path = make_run()
    machine("fp32", **dict.fromkeys(products, "onednn"))
    whole = train(path, f"run_dir={path.parent / 'whole'}", until=6)
    train(path, until=3)
    machine("fp32", **dict.fromkeys(products, "torch"))
    assert losses(train(path, until=6)) == losses(whole)


def test_a_bf16_run_without_bf16_products_gives_the_same_numbers(make_run, train, machine):
    """Products of the same rounded numbers in fp32, rounded: another order of the same sums."""
    names = [
        f"bf16 {o} {size}" for o in ("forward", "input_gradient", "weight_gradient")
        for size in ("128", "128 down", "256 head", "512 head")
    ]  # fmt: skip
    path = make_run()
    machine("bf16")
    with_products = losses(train(path, until=8))
    machine("bf16", "an older one", **dict.fromkeys(names, "widened"))
    without = losses(train(path, f"run_dir={path.parent / 'without'}", until=8))
    # bf16 rounds to 2^-9 of a number; eight steps of AdamW carry that on
    assert with_products == pytest.approx(without, rel=8 * 2**-9)


def _rank(rank, folder, results):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=(folder / "port").read_text(),
        LOCAL_RANK=str(rank), GROUP_WORLD_SIZE="2", CRYSTAL_TUNING=str(folder / f"{rank}.json"),
    )  # fmt: skip
    torch.set_num_threads(1)
    tuning._tunings.clear()
    backend = with_dtype(CudaConfig(name="cuda", device="cpu", parallel=Layout(dp=2)))
    made = keep_choices(backend, [])
    results.put((rank, backend.dtype, made[0]["choices"], tuning.chosen("fp32 forward 256")))


def test_of_several_processes_the_first_chooses_for_all(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(s.getsockname()[1]))
    tuning.save(measured("fp32", **{"fp32 forward 256": "onednn"}), tmp_path / "0.json")
    tuning.save(measured("bf16", **{"fp32 forward 256": "torch"}), tmp_path / "1.json")
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_rank, args=(rank, tmp_path, results)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = sorted(results.get(timeout=600) for _ in processes)
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    assert answers[0][1:] == answers[1][1:] == ("fp32", {"fp32 forward 256": "onednn"}, "onednn")


@pytest.mark.parametrize("recorded", ["null", "cbfloat16"])
def test_a_cerebras_systems_dtype_is_not_taken_for_one_of_the_cpus(make_run, machine, recorded):
    path = make_run()
    machine("fp32")
    directory = load_run(path).config.directory
    directory.mkdir()
    run = load_run(path, ["backend={name: cerebras, device: csx}"]).config.model_dump(mode="json", by_alias=True)
    run["backend"]["dtype"] = yaml.safe_load(recorded)
    (directory / "config.yaml").write_text(yaml.safe_dump(run))
    assert with_recorded_dtype(load_run(path)).config.backend.dtype == "fp32"
