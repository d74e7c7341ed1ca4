"""What a .mdl may hold: data of its own, a tokenizer by name alone, moments of the step that it says."""

import json
import shutil

import h5py
import numpy as np
import pytest
from hostile.mdl import PATHS, bed

from crystal import checkpoint
from crystal.backends.cerebras import mdl
from crystal.errors import CheckpointError, ConfigError
from crystal.interop.cerebras_mdl import import_mdl


@pytest.fixture
def file(tmp_path):
    """A small exported checkpoint, with its tokenizer beside it."""
    for name in bed().iterdir():
        if name.is_file():
            shutil.copy(name, tmp_path)
    return tmp_path / "a.mdl"


def say(file, **changes):
    """What crystal says of a file says something else, sealed again."""
    with h5py.File(file, "a") as opened:
        entry = json.loads(opened.attrs["crystal.__metadata__"])
        about = json.loads(entry["crystal.__metadata__"]["string_value"])
        about.pop("sha256")
        for key, value in changes.items():
            about["state" if key != "optimizer_step" else key] = (
                value if key == "optimizer_step" else about["state"] | {key: value}
            )
        about["sha256"] = mdl._digest(about)
        entry["crystal.__metadata__"]["string_value"] = json.dumps(about)
        opened.attrs["crystal.__metadata__"] = json.dumps(entry)


@pytest.mark.parametrize("path", PATHS)
def test_a_tokenizer_by_a_path_is_refused_and_nothing_is_copied(file, tmp_path, path):
    say(file, tokenizer=path)
    with pytest.raises(ConfigError, match=r"a\.mdl: crystal\.state\.tokenizer: expected"):
        import_mdl(file, tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_a_tokenizer_that_is_a_link_to_elsewhere_is_refused(file, tmp_path):
    (tokenizer,) = tmp_path.glob("tokenizer.*")
    tokenizer.unlink()
    tokenizer.symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match=r"expected a file of this directory, it is a link to one elsewhere"):
        import_mdl(file, tmp_path / "to")


def test_a_file_from_before_there_was_a_digest_is_read(file, tmp_path):
    with h5py.File(file, "a") as opened:
        entry = json.loads(opened.attrs["crystal.__metadata__"])
        about = json.loads(entry["crystal.__metadata__"]["string_value"])
        del about["sha256"]
        entry["crystal.__metadata__"]["string_value"] = json.dumps(about)
        opened.attrs["crystal.__metadata__"] = json.dumps(entry)
    import_mdl(file, tmp_path / "to")
    assert checkpoint.read(tmp_path / "to").state["backend"] == {"optimizer_step": 8}


@pytest.mark.parametrize("step", [0, 7, 9, 80, 1 << 40])
def test_the_step_is_the_one_that_the_bias_corrections_are_for(file, tmp_path, step):
    say(file, optimizer_step=step)
    with pytest.raises(CheckpointError, match=r"beta1_power: expected .*, got 0\.387"):
        import_mdl(file, tmp_path / "to")


def test_a_heap_of_texts_in_which_hdf5_would_go_round_for_ever_is_refused(file, tmp_path):
    data = bytearray(file.read_bytes())
    at = data.index(b"GCOL") + 16 + 8  # the size of the first object; of index 0 it is all that is left
    data[at - 8 : at - 6] = bytes(2)
    data[at : at + 8] = bytes(8)
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="the heap of texts is damaged"):
        import_mdl(file, tmp_path / "to")


PACKINGS = [{"compression": "gzip"}, {"shuffle": True, "compression": "gzip"}, {"chunks": True}]


@pytest.mark.parametrize("packing", PACKINGS)
def test_what_hdf5_packs_itself_is_read(file, tmp_path, packing):
    before = mdl.read(file).tensor("model.embed.weight")
    with h5py.File(file, "a") as opened:
        held, attributes = np.asarray(opened["model.embed.weight"]), dict(opened["model.embed.weight"].attrs)
        del opened["model.embed.weight"]
        opened.create_dataset("model.embed.weight", data=held, **packing).attrs.update(attributes)
    import_mdl(file, tmp_path / "to")
    tensors = dict(checkpoint.read(tmp_path / "to").tensors("model"))
    assert (tensors["embed.weight"] == before).all()
