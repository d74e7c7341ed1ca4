"""Cerebras' checkpoints: ours read by cstorch, theirs read without it, and whole runs there and back."""

import json
import struct
import subprocess

import h5py
import numpy as np
import pytest
import torch
from cerebras_jobs import ENVIRONMENT, needs_cerebras
from hypothesis import given
from hypothesis import strategies as st

from crystal import checkpoint
from crystal.backends.cerebras import mdl
from crystal.errors import CheckpointError, ConfigError
from crystal.interop.cerebras_mdl import export_mdl, import_mdl


def in_cerebras(code: str, *arguments) -> str:
    """What a program prints in Cerebras' environment."""
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a small trained run."""
    from runs import write_run

    directory = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.setenv("CRYSTAL_CACHE", str(directory / "cache"))
    from rich.console import Console

    from crystal.run import load_run
    from crystal.training.start import start

    path = write_run(directory, directory, **{"train.eval_every": 100})
    outcome = start(load_run(path), None, 5, Console(quiet=True, stderr=True))
    patch.undo()
    return outcome.directory


def tensors(directory):
    saved = checkpoint.read(checkpoint.locate(directory))
    return {f"{p}.{n}": t for p in ("model", "optimizer") for n, t in saved.tensors(p)}, saved.state


def test_a_run_goes_out_and_comes_back_the_same(run, tmp_path):
    """Weights, moments, counts, config and tokenizer; exporting again gives the same bytes' worth."""
    result = export_mdl(run, tmp_path / "a.mdl")
    assert result["optimizer"]
    before, state = tensors(run)
    (tmp_path / state["tokenizer"]).write_bytes((checkpoint.locate(run) / state["tokenizer"]).read_bytes())
    import_mdl(tmp_path / "a.mdl", tmp_path / "ckpt")
    after, came = tensors(tmp_path / "ckpt")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {k: v for k, v in came.items() if k != "imported_from"} == state
    export_mdl(tmp_path / "ckpt", tmp_path / "b.mdl")
    a, b = mdl.read(tmp_path / "a.mdl"), mdl.read(tmp_path / "b.mdl")
    assert a.shapes == b.shapes
    assert all(torch.equal(a.tensor(path), b.tensor(path)) for path in a.shapes)


@needs_cerebras
def test_cstorch_loads_what_we_write_and_we_read_what_it_saves(run, tmp_path):
    """Its own load of our file, saved again by it, is our file; its optimizer takes the state."""
    export_mdl(run, tmp_path / "ours.mdl")
    code = """
import sys, torch, cerebras.pytorch as cstorch
backend = cstorch.backend("CPU")
state = cstorch.load(sys.argv[1])
parameters = {n: torch.nn.Parameter(t + 0) for n, t in state["model"].items()}
groups = [{k: v for k, v in g.items()} | {"params": [list(parameters.values())[i] for i in g["params"]]}
          for g in state["optimizer"]["param_groups"]]
adamw = cstorch.optim.AdamW(groups)
adamw.load_state_dict(state["optimizer"])
state["half"] = state["model"]["norm.weight"].to(torch.bfloat16) + 0
state["tied"] = state["model"]["norm.weight"]
cstorch.save(state, sys.argv[2])
print(len(adamw.state))
"""
    held = in_cerebras(code, tmp_path / "ours.mdl", tmp_path / "theirs.mdl").split()[-1]
    ours, theirs = mdl.read(tmp_path / "ours.mdl"), mdl.read(tmp_path / "theirs.mdl")
    assert int(held) == sum(path.startswith("model.") for path in ours.shapes)
    assert set(ours.shapes) <= set(theirs.shapes)
    for path in ours.shapes:
        assert torch.equal(ours.tensor(path), theirs.tensor(path)), path
    assert theirs.values["crystal"] == ours.values["crystal"]
    assert theirs.tensor("half").dtype == torch.bfloat16
    assert torch.equal(theirs.tensor("half"), ours.tensor("model.norm.weight").bfloat16())
    assert torch.equal(theirs.tensor("tied"), ours.tensor("model.norm.weight"))
    import_mdl(tmp_path / "theirs.mdl", tmp_path / "ckpt")
    before, after = tensors(run)[0], tensors(tmp_path / "ckpt")[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


LEAF = st.one_of(st.none(), st.integers(-5, 5), st.floats(-1, 1), st.text(max_size=5))
KEY = st.one_of(st.text("abc.", min_size=1, max_size=4), st.integers(0, 3))
TREE = st.recursive(
    LEAF, lambda t: st.one_of(st.dictionaries(KEY, t, max_size=3), st.lists(t, max_size=3).map(tuple)), max_leaves=8
)


@given(st.dictionaries(st.text("xyz", min_size=1, max_size=3), TREE, min_size=1, max_size=3))
def test_the_form_of_the_whole_is_torchs_own(tree):
    """`__spec__` is what torch.utils._pytree prints for the same tree."""
    from torch.utils import _pytree

    tree = json.loads(json.dumps(tree), object_pairs_hook=dict)  # keys as JSON leaves them
    leafless = _pytree.tree_map(lambda leaf: 0, _nones_are_leaves(tree))
    _, spec = _pytree.tree_flatten(leafless)
    version, printed = json.loads(_pytree.treespec_dumps(spec))
    assert version == 1
    assert mdl._spec(_nones_are_leaves(tree)) == printed


def _nones_are_leaves(node):
    if isinstance(node, dict):
        return {key: _nones_are_leaves(child) for key, child in node.items()}
    return [_nones_are_leaves(child) for child in node] if isinstance(node, list) else 0


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_lz4_chunks_of_any_size_are_read(tmp_path, size):
    """Packed and unpacked blocks, chunks that reach over the edge, and a skipped filter."""
    import pyarrow

    codec, array = pyarrow.Codec("lz4_raw"), np.arange(35, dtype=np.float32).reshape(5, 7)
    array[2:] = 1.5  # something to pack
    with h5py.File(tmp_path / "a.mdl", "w") as file:
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((2, 4))
        creation.set_filter(int(mdl.LZ4), h5py.h5z.FLAG_OPTIONAL, (0,))
        space = h5py.h5s.create_simple(array.shape)
        dataset = h5py.Dataset(h5py.h5d.create(file.id, b"model.a", h5py.h5t.NATIVE_FLOAT, space, creation))
        for i in range(0, 5, 2):
            for j in range(0, 7, 4):
                chunk = np.zeros((2, 4), np.float32)
                part = array[i : i + 2, j : j + 4]
                chunk[: part.shape[0], : part.shape[1]] = part
                plain = chunk.tobytes()
                packed = struct.pack(">QI", len(plain), size)
                for at in range(0, len(plain), size):
                    block = plain[at : at + size]
                    small = codec.compress(block).to_pybytes()
                    packed += struct.pack(">I", min(len(small), len(block))) + min(small, block, key=len)
                skipped = (i, j) == (0, 0)
                dataset.id.write_direct_chunk((i, j), plain if skipped else packed, filter_mask=int(skipped))
        dataset.attrs["dtypes"] = ["torch.float32"]
        file.attrs["__spec__"], file.attrs["__SUCCESS__"] = "[]", True
    assert torch.equal(mdl.read(tmp_path / "a.mdl").tensor("model.a"), torch.from_numpy(array))


def test_what_is_wrong_with_a_file_is_said_in_one_line(run, tmp_path):
    (tmp_path / "text.mdl").write_text("no HDF5")
    with pytest.raises(CheckpointError, match=r"text\.mdl: expected a Cerebras checkpoint"):
        mdl.read(tmp_path / "text.mdl")
    with pytest.raises(CheckpointError, match="no such file"):
        mdl.read(tmp_path / "none.mdl")
    export_mdl(run, tmp_path / "a.mdl")
    with pytest.raises(ConfigError, match="expected a new file, it is there already"):
        export_mdl(run, tmp_path / "a.mdl")
    with h5py.File(tmp_path / "a.mdl", "a") as file:
        del file.attrs["__SUCCESS__"]
    with pytest.raises(CheckpointError, match="expected a finished Cerebras checkpoint"):
        import_mdl(tmp_path / "a.mdl", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


@pytest.mark.parametrize("damaged", ["crystal.__metadata__", "crystal"])
def test_damaged_metadata_is_said_in_one_line(tmp_path, damaged):
    file = mdl.write(tmp_path / "a.mdl", {"model": {"w": None}, "crystal": "no JSON"}, [("model.w", torch.zeros(2))])
    if damaged != "crystal":
        with h5py.File(file, "a") as opened:
            opened.attrs[damaged] = "{"
    with pytest.raises(CheckpointError, match=rf"^\S*a\.mdl: {damaged}: expected a JSON mapping, it is damaged$"):
        import_mdl(file, tmp_path / "ckpt")


def test_a_file_cut_short_or_without_flat_tensors_is_refused(run, tmp_path):
    export_mdl(run, tmp_path / "a.mdl")
    whole = (tmp_path / "a.mdl").read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "cut.mdl").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(CheckpointError, match=r"^\S*cut\.mdl: [^\n]*$"):
            import_mdl(tmp_path / "cut.mdl", tmp_path / "ckpt")
    with h5py.File(tmp_path / "groups.mdl", "w") as file:
        file["model/w"] = [1.0]
    with pytest.raises(CheckpointError, match=r"groups\.mdl: expected a finished Cerebras checkpoint"):
        import_mdl(tmp_path / "groups.mdl", tmp_path / "ckpt")


def test_a_file_of_other_tensors_is_refused_by_name(run, tmp_path):
    export_mdl(run, tmp_path / "a.mdl")
    with pytest.raises(CheckpointError, match=r"a\.mdl: model\.embed\.weight: expected \[32032, 32\], got \[352, 32\]"):
        import_mdl(tmp_path / "a.mdl", tmp_path / "ckpt", "crystalcoder-w32-l4")
    with h5py.File(tmp_path / "a.mdl", "a") as file:
        file.move("model.norm.bias", "model.norm.offset")
    with pytest.raises(CheckpointError, match=r"expected the tensor model\.norm\.bias, it is not there"):
        import_mdl(tmp_path / "a.mdl", tmp_path / "ckpt")
    nameless = mdl.write(tmp_path / "b.mdl", {"model": {"w": None}}, [("model.w", torch.zeros(2))])
    with pytest.raises(ConfigError, match="the file does not say: --model NAME"):
        import_mdl(nameless, tmp_path / "ckpt")


@pytest.mark.parametrize("given", [{}, {"model.w": 1, "model.x": 1}])
def test_writing_takes_all_tensors_and_no_others(tmp_path, given):
    with pytest.raises(ValueError, match=r"model\.[wx]: no"):
        mdl.write(tmp_path / "a.mdl", {"model": {"w": None}}, [(path, torch.zeros(2)) for path in given])
    assert list(tmp_path.iterdir()) == []


def test_bias_corrections_are_multiplied_up_in_fp32():
    power = torch.tensor(0.9)
    for updates in range(1200):  # down to where fp32 ends
        assert torch.equal(mdl.beta_power(0.9, updates), power), updates
        power = power * 0.9
    assert torch.equal(mdl.beta_power(0.9, 10**9), power)
