"""A checkpoint that is damaged, incomplete or another one is not opened; what is said of it is one line."""

import itertools
import json
import math
import re
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crystal import checkpoint
from crystal.backends.base import Part
from crystal.checkpoint import seal_file
from crystal.checkpoint.seal_file import DIGEST, KINDS, MOMENTS, SEAL, PartEntry, parameters, with_digest
from crystal.errors import CheckpointError
from crystal.inference.load import load_tokenizer, tokenizer_of
from crystal.zoo.build import meta_decoder
from crystal.zoo.config import ModelConfig, model_config

MODEL = ModelConfig(
    **model_config("crystalcoder-w64-l3").model_dump(mode="json")
    | {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_ff": 24, "vocab_size": 96, "max_seq_len": 16}
)


def tensors(kinds=KINDS, model=MODEL):
    return {f"{kind}.{name}": torch.rand(shape) for kind in kinds for name, shape in parameters(model)}


def saved(tmp_path, held=None, files=(), updates=3, **state):
    state = {"step": 5, "model": MODEL.model_dump(mode="json"), "backend": {"optimizer_step": updates}} | state
    directory = checkpoint.step_directory(tmp_path, 5)
    return checkpoint.write(directory, (tensors() if held is None else held).items(), state, files)


def change(directory, sealed_again=False, **changes):
    """Other values in the seal, by dotted key."""
    seal = json.loads((directory / SEAL).read_text())
    for key, value in changes.items():
        *path, last = key.split(".")
        node = seal
        for part in path:
            node = node[part]
        node[last] = value
    (directory / SEAL).write_text(json.dumps(with_digest(seal) if sealed_again else seal))


@pytest.mark.parametrize(
    "changes",
    [{"state.bos": False}, {"state.backend.optimizer_step": 4}, {"state.model.mup.output_alpha": 1.25},
     {"state.stage_ended": 1}, {"state.model.rotary_base": 10001.0}, {"format": 2}, {DIGEST: "0" * 64}],
)  # fmt: skip
def test_a_seal_that_was_changed_is_not_the_one_that_was_written(tmp_path, changes):
    directory = saved(tmp_path, bos=True, stage="web", stage_ended=None)
    checkpoint.read(directory)
    change(directory, **changes)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: expected what has the sha256 that is in it"):
        checkpoint.read(directory)


def test_how_a_seal_is_laid_out_counts_for_nothing_and_its_digest_cannot_be_left_out(tmp_path):
    directory = saved(tmp_path)
    seal = json.loads((directory / SEAL).read_text())
    (directory / SEAL).write_text(json.dumps(dict(reversed(seal.items())), indent=7))
    checkpoint.read(directory)
    del seal[DIGEST]
    (directory / SEAL).write_text(json.dumps(seal))
    with pytest.raises(CheckpointError, match="expected the seal's digest, it is not there"):
        checkpoint.read(directory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["embed.weight", "blocks.1.mlp.up.weight", "norm.bias"])
def test_a_tensor_or_moment_that_is_missing_is_named(tmp_path, kind, name):
    held = tensors()
    del held[f"{kind}.{name}"]
    with pytest.raises(CheckpointError, match=re.escape(f"{kind}.{name}: expected, but no such tensor")):
        checkpoint.read(saved(tmp_path, held))


def test_moments_may_be_missing_where_there_was_no_step_yet_but_all_together(tmp_path):
    checkpoint.read(saved(tmp_path / "none", tensors(["model"]), updates=0))
    checkpoint.read(saved(tmp_path / "unused", tensors(["model"]), backend=None))
    held = tensors(["model", "optimizer.exp_avg"]) | {"optimizer.exp_avg_sq.norm.bias": torch.rand(16)}
    with pytest.raises(CheckpointError, match=r"optimizer\.exp_avg_sq\.embed\.weight: expected"):
        checkpoint.read(saved(tmp_path / "some", held, updates=0))
    with pytest.raises(CheckpointError, match=r"optimizer\.exp_avg\.embed\.weight: expected"):
        checkpoint.read(saved(tmp_path / "stepped", tensors(["model"])))


@pytest.mark.parametrize("name", ["model.blocks.2.mlp.up.weight", "optimizer.momentum.norm.bias", "model.head.weight"])
def test_a_tensor_that_is_none_of_the_models_is_named(tmp_path, name):
    with pytest.raises(CheckpointError, match="expected the model's tensors and their moments only"):
        checkpoint.read(saved(tmp_path, tensors() | {name: torch.rand(3)}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_another_shape_is_not_read(tmp_path, kind):
    held = tensors() | {f"{kind}.norm.bias": torch.rand(1)}  # which would be spread over the whole
    opened = checkpoint.read(saved(tmp_path, held))
    for wanted in (None, {"norm.bias": (slice(0, 16),)}):
        with pytest.raises(CheckpointError, match=rf"{kind}.norm.bias: expected \[16\] in F32, got \[1\] in F32"):
            list(opened.tensors(kind, wanted))


def test_a_checkpoint_is_of_the_step_that_its_directory_names(tmp_path):
    directory = saved(tmp_path)
    moved = directory.rename(checkpoint.step_directory(tmp_path, 6))
    with pytest.raises(CheckpointError, match=r"state\.step: expected 6, as its directory says, got 5"):
        checkpoint.read(moved)
    checkpoint.read(moved.rename(tmp_path / "a-copy-elsewhere"))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", "a\nb", "\ud800", SEAL])
def test_a_shard_is_called_by_a_bare_name(tmp_path, name):
    directory = saved(tmp_path)
    seal = json.loads((directory / SEAL).read_text())
    seal["shards"] = {name: seal["shards"]["shard-00001.safetensors"]}
    (directory / SEAL).write_text(json.dumps(with_digest(seal)))
    with pytest.raises(CheckpointError, match=r"expected (a file's bare name|text that UTF-8 can hold)") as error:
        checkpoint.read(directory)
    assert len(str(error.value).splitlines()) == 1


def test_a_tokenizer_that_was_changed_is_not_loaded_and_one_that_is_gone_is_named(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"a vocabulary")
    directory = saved(tmp_path, files=[file], tokenizer=file.name)
    (directory / file.name).write_bytes(b"a Vocabulary")
    opened = checkpoint.read(directory)
    for load in (load_tokenizer, tokenizer_of):
        with pytest.raises(
            CheckpointError, match=r"tokenizer\.model: expected sha256 [0-9a-f]{16}…, the file has changed"
        ):
            load(opened)
    assert len(list(opened.tensors("model"))) == len(list(parameters(MODEL))), "the weights are as good as ever"
    (directory / file.name).unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: expected 12 bytes, got no file"):
        checkpoint.read(directory)


def test_formats_that_are_still_to_come_are_said_to_be(tmp_path):
    directory = saved(tmp_path)
    change(directory, sealed_again=True, format=4)
    with pytest.raises(CheckpointError, match="format: expected 1 to 3, got 4; a newer crystal wrote it"):
        checkpoint.read(directory)


@pytest.mark.parametrize("name", ["crystalcoder-7b", "amber-7b", "amber-w256-l8"])
def test_names_and_shapes_are_the_decoders(name):
    model = model_config(name)
    assert dict(parameters(model)) == {n: tuple(p.shape) for n, p in meta_decoder(model).named_parameters()}


# --- parts


@st.composite
def layouts(draw):
    """A tensor cut along every dimension: its parts, in any order."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    parts = [PartEntry(offset=[], size=[], shape=shape)]
    for column in cuts:
        spans = list(itertools.pairwise(column))
        parts = [PartEntry(offset=[*p.offset, a], size=[*p.size, b - a], shape=shape) for p in parts for a, b in spans]
    return draw(st.permutations(parts))


@given(layouts(), st.data())
def test_parts_make_up_a_tensor_without_a_gap_and_nothing_twice(parts, data):
    assert seal_file._tile(parts)
    one = data.draw(st.sampled_from(parts))
    others = [part for part in parts if part is not one]
    assert not seal_file._tile([*parts, one])
    assert not others or not seal_file._tile(others)
    moved = one.model_copy(update={"offset": [one.offset[0] + 1, *one.offset[1:]]})
    assert not seal_file._tile([*others, moved])
    assert not seal_file._tile([*others, one.model_copy(update={"shape": [*one.shape, 1]})])


def test_a_process_whose_part_is_missing_is_noticed_before_anything_is_read(tmp_path):
    directory, shards = checkpoint.step_directory(tmp_path, 5), {}
    for process in range(2):
        held = (
            (key, Part(t.chunk(2)[process].clone(), (process * (len(t) // 2), *[0] * (t.ndim - 1)), tuple(t.shape)))
            for key, t in tensors().items()
        )
        shards |= checkpoint.write_shards(directory, held, process)
    del shards["shard-00001-00001.safetensors"]
    checkpoint.seal(directory, shards, {"step": 5, "model": MODEL.model_dump(mode="json")})
    with pytest.raises(CheckpointError, match="expected it whole, once, or in parts that make it up without a gap"):
        checkpoint.read(directory)


def test_a_seal_of_7b_opens_in_well_under_a_second(tmp_path):
    """As 8 processes write it, each with its part of every tensor and moment; the files are holes."""
    model, shards, processes = model_config("crystalcoder-7b"), {}, 8
    held = [(f"{kind}.{name}", shape) for kind in ("model", *MOMENTS) for name, shape in parameters(model)]
    for process in range(processes):
        parts = {}
        for key, shape in held:
            ends = [math.ceil(shape[0] * n / processes) for n in (process, process + 1)]
            parts[key] = {"offset": [ends[0], *[0] * (len(shape) - 1)], "size": [ends[1] - ends[0], *shape[1:]],
                          "shape": list(shape)}  # fmt: skip
        file = tmp_path / f"shard-{process:05d}-00001.safetensors"
        file.touch()
        record = {"bytes": 0, "sha256": "0" * 64, "tensors": list(parts), "parts": parts}
        shards[file.name] = record
    state = {"model": model.model_dump(mode="json"), "backend": {"optimizer_step": 1}}
    content = with_digest({"format": 2, "state": state, "shards": shards, "files": {}})
    (tmp_path / SEAL).write_text(json.dumps(content, indent=1))
    began = time.process_time()
    checkpoint.read(tmp_path)
    assert time.process_time() - began < 5, "some 0.3 s where this was written"
