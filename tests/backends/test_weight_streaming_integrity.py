"""A weight-streaming store that is not what was written is refused; a reader writes nothing; one process trains in it.

The kinds of damage are in tests/hostile/streaming.py. Stores of crystal 0.1.0, which had no checksums, are in
samples/streaming-0.1.0: made at e9b5e6f by the backend below, three steps; what no longer counted in them is zeroed.
"""

import hashlib
import json
import shutil
import tarfile
import threading
from pathlib import Path

import pytest
from closeness import near, path_length
from dying import start_training
from hostile.streaming import (
    KINDS,
    backend,
    batches,
    bed,
    model,
    read_all,
    refer,
    stop_at,
    train_on,
)

from crystal import checkpoint
from crystal.backends.weight_streaming.lock import LOCK
from crystal.backends.weight_streaming.record import read_record
from crystal.backends.weight_streaming.sealed import sealed_tensors
from crystal.errors import CheckpointError, RunError
from crystal.files import locked
from crystal.zoo.build import plan_for

SAMPLES = Path(__file__).parent / "samples" / "streaming-0.1.0"
EXPECTED = json.loads((SAMPLES / "expected.json").read_text())


@pytest.fixture
def old(tmp_path):
    """old(name) → the run directory of a sample of 0.1.0."""

    def unpack(name: str) -> Path:
        with tarfile.open(SAMPLES / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / name / "run"

    return unpack


@pytest.fixture
def run(tmp_path):
    """A run directory after step 3, with a checkpoint that refers to its store."""
    return Path(shutil.copytree(bed("settled"), tmp_path / "run"))


def listing(directory: Path) -> list[tuple]:
    return [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(directory.rglob("*"))]


# --- stores of 0.1.0


def test_a_checkpoint_of_0_1_0_reads_as_it_did_and_says_that_nothing_could_be_checked(old, capsys):
    directory = old("settled")
    before = listing(directory)
    saved = checkpoint.read(checkpoint.locate(directory))
    found = {f"{kind}.{name}": t.numpy().tobytes() for kind in KINDS for name, t in saved.tensors(kind)}
    digests = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in found.items()}
    assert digests == EXPECTED["settled"]["tensors"]
    assert listing(directory) == before
    assert capsys.readouterr().err.count("made by crystal 0.1.0, which kept no checksums") == 1


@pytest.mark.parametrize("name", ["settled", "due", "due-recomputed"])
def test_a_store_of_0_1_0_trains_on_and_has_checksums_from_then_on(old, capsys, name):
    directory, expected = old(name), EXPECTED[name]
    made = backend(directory, **expected["settings"])
    assert "made by crystal 0.1.0" in capsys.readouterr().err
    assert made.position() == 3
    assert made.result()["loss"] == near(expected["losses"][2], path_length(model(), 16, 3))
    for step, loss in zip((4, 5), expected["next_losses"], strict=True):
        assert made.train_step(step, batches(step)).host()["loss"] == near(loss, path_length(model(), 16, step))
    made.seal()
    made.store.close()
    record = json.loads((directory / "store" / "store.json").read_text())
    assert record["format"] == 2
    planes = {plane.name for plane in made.store.layout.planes}
    assert all(planes <= record["sums"][piece.name].keys() for piece in made.store.layout.pieces)
    backend(directory, **expected["settings"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", ["missing", "cut", "longer", "slots", "negative", "words"])
def test_a_store_of_0_1_0_that_does_not_fit_its_record_is_refused(old, damage):
    store = old("settled") / "store"
    path, record = store / "store.bin", store / "store.json"
    found = json.loads(record.read_text())
    if damage == "missing":
        path.unlink()
    elif damage in ("cut", "longer"):
        path.write_bytes(path.read_bytes()[:-4096] if damage == "cut" else path.read_bytes() + bytes(1))
    else:
        changed = {"slots": {"slots": {"embed": 0}}, "negative": {"step": -1}, "words": {"update": {"number": "x"}}}
        record.write_text(json.dumps(found | changed[damage]))
    for use in (read_all, train_on):
        before = listing(store)
        with pytest.raises(CheckpointError, match=r"store\.(bin|json): "):
            use(store.parent)
        assert listing(store) == before


# --- reading


def test_a_reader_writes_nothing_and_asks_for_no_lock(run):
    with locked(run / "store" / LOCK, wait=False):
        before = listing(run)
        assert read_all(run) == read_all(bed("settled"))
        assert listing(run) == before


def test_a_reader_of_which_the_store_moves_on_gives_one_step_or_an_error(run):
    whole = dict(checkpoint.read(checkpoint.locate(run)).tensors("model"))
    reading = checkpoint.read(checkpoint.locate(run)).tensors("model")
    name, tensor = next(reading)
    made = backend(run)
    made.train_step(4, batches(4))
    made.seal()
    found = {name: tensor}
    with pytest.raises(CheckpointError, match="a run trains in this store: it moved on to step 4 while step 3 was rea"):
        found.update(reading)
    assert 0 < len(found) < len(whole)
    assert all((whole[name] == tensor).all() for name, tensor in found.items())
    made.store.close()


@pytest.mark.parametrize("sums", [True, False], ids=["checksums", "0.1.0"])
def test_what_is_read_while_training_goes_on_is_always_of_one_step(run, monkeypatch, sums):
    """A reader that tries again and again, beside a run; without sums it is the record alone that tells."""
    if not sums:
        from crystal.backends.weight_streaming import checksums

        monkeypatch.setattr(checksums.Checksums, "copy", lambda self: {})
    made, plan, known, ended = backend(run), plan_for(model()), {}, threading.Event()
    read, refused, wrong = [], [], []

    def reader() -> None:
        while not ended.is_set():
            try:
                record = read_record(run / "store")
                tensors = list(sealed_tensors(run / "store", plan, record.step, "model", record.identity))
                read.append((record.step, hashlib.sha256(b"".join(t.numpy().tobytes() for _, t in tensors)).digest()))
            except CheckpointError as error:
                refused.append(str(error))
            except BaseException as error:  # told below
                wrong.append(repr(error))
                return

    thread = threading.Thread(target=reader)
    thread.start()
    for step in range(4, 34):
        made.train_step(step, batches(step))
        made.seal()
        tensors = b"".join(t.numpy().tobytes() for _, t in made.store.tensors("model", fresh=False))
        known[step] = hashlib.sha256(tensors).digest()
    ended.set()
    thread.join()
    made.store.close()
    assert not wrong
    assert read or refused
    assert {known.get(step, digest) == digest for step, digest in read} <= {True}


def test_a_checkpoint_whose_store_was_taken_by_another_runs_is_refused(run, tmp_path):
    """All of the other run's store, at the same step: only the identity tells."""
    other = tmp_path / "other"
    stop_at(other, 3, due=False, seed=2)
    shutil.rmtree(run / "store")
    shutil.copytree(other / "store", run / "store")
    with pytest.raises(
        CheckpointError, match=r"expected store \w+, which the checkpoint refers to, got \w+: another run's"
    ):
        read_all(run)
    with pytest.raises(
        CheckpointError, match=r"expected store \w+, the run's own by .*store\.id, got \w+: another run's"
    ):
        train_on(run)
    (run / "store.id").unlink()
    with pytest.raises(CheckpointError, match="which the checkpoint refers to"):
        train_on(run)


# --- training


@pytest.mark.parametrize("lost", ["store.json", "store"])
def test_a_lost_store_is_not_filled_anew_without_a_word(run, lost):
    made = backend(run)
    made.train_step(4, batches(4))
    made._seal()
    made.store.close()
    checkpoint.remove_references(run / "checkpoints")  # as a run does when it goes on: nothing else tells
    if lost == "store":
        shutil.rmtree(run / "store")
    else:
        (run / "store" / lost).unlink()
    with pytest.raises(CheckpointError, match=r"store\.json: expected the record of the run's store, it is missing"):
        backend(run)
    (run / "store.id").unlink()  # as the line says
    assert backend(run).position() is None


def test_a_store_whose_filling_was_killed_is_filled_again(tmp_path):
    made = backend(tmp_path / "run")
    made.initialise()  # and no step: no record yet
    made.store.close()
    made = backend(tmp_path / "run")
    assert made.position() is None
    made.initialise()
    made.train_step(1, batches(1))
    made.store.close()


def test_a_run_that_went_on_elsewhere_fills_its_store_again(run, tmp_path):
    """From a full checkpoint, as after some steps on `cpu`: the store stays the run's own."""
    full = {kind: list(checkpoint.read(checkpoint.locate(run)).tensors(kind)) for kind in KINDS}
    made = backend(run)
    made.load(lambda kind: full[kind], {"optimizer_step": 3})
    made.train_step(9, batches(9))
    made._seal()
    made.store.close()
    assert backend(run).position() == 9


@pytest.mark.parametrize("shared", [False, True], ids=["its own", "backend.path"])
def test_a_store_that_another_process_holds_is_refused_at_once(run, tmp_path, shared):
    store = run / "store"
    before = listing(store)
    with locked(store / LOCK, wait=False):
        directory = tmp_path / "second" if shared else run
        with pytest.raises(RunError, match="another process is training in this store"):
            backend(directory, **({"path": store} if shared else {}))
        assert not (tmp_path / "second").exists()
    assert [row for row in listing(store) if LOCK not in row[0]] == [row for row in before if LOCK not in row[0]]


@pytest.mark.proof
def test_of_two_runs_that_begin_on_one_path_one_trains_and_one_is_refused(make_run, tmp_path):
    paths = []
    for name in ("a", "b"):
        section = {"name": "weight_streaming", "dtype": "fp32", "threads": 1, "path": str(tmp_path / "shared")}
        written = make_run(backend=section, **{"run_dir": str(tmp_path / name), "train.eval_every": 1000})
        paths.append(written.rename(tmp_path / f"{name}.yaml"))
    processes = [start_training(path) for path in paths]
    for process in processes:
        process.join()
    assert sorted(process.exitcode for process in processes) == [0, 1]  # an exception's, without the command around it
    record = read_record(tmp_path / "shared")
    winner = "ab"[[process.exitcode for process in processes].index(0)]
    assert (record.owner, record.step) == (str(tmp_path / winner), 30)


@pytest.mark.proof
def test_a_process_that_has_ended_its_training_lets_another_go_on(make_run, train):
    path = make_run(backend={"name": "weight_streaming", "dtype": "fp32", "threads": 1})
    assert train(path, until=2).step == 2
    process = start_training(path)
    process.join()
    assert process.exitcode == 0
    assert read_record(path.parent / "run" / "store").step == 30


def test_a_flipped_bit_ends_the_run_before_anything_is_made_of_it(run):
    """In the weights that a step reads first: no record is written, the store is as it was."""
    made = backend(run)
    refer_to = read_record(run / "store")
    piece = made.store.layout["blocks.0"]
    name, offset, _ = made.store._at(piece, made.store.layout.planes[0], 0, refer_to.slots["blocks.0"])
    with (run / "store" / f"{name}.bin").open("r+b") as file:
        file.seek(offset + 4100)
        byte = file.read(1)[0]
        file.seek(offset + 4100)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(CheckpointError, match=r"store\.bin: blocks\.0, high: expected CRC-32 \w{8}, got \w{8}"):
        made.train_step(4, batches(4))
    made.store.close()
    assert read_record(run / "store") == refer_to


def test_the_checkpoint_names_the_store_it_refers_to(tmp_path):
    made = backend(tmp_path / "run")
    made.initialise()
    made.train_step(1, batches(1))
    saved = checkpoint.read(refer(tmp_path / "run", made))
    assert saved.identity == read_record(tmp_path / "run" / "store").identity != ""
    made.store.close()
