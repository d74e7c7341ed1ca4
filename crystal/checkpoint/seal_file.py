"""What `checkpoint.json` may say: its keys and their kinds, its digest, and whether a checkpoint is complete.

Formats: 1, every tensor in one piece; 2, some in parts; 3, all in a backend's store. Since `files` stands in it, a
seal has a digest of itself: the sha256 of its JSON with sorted keys, without spaces, without `sha256`. Those of
crystal 0.1.0 have neither, and are read with what can be checked of them: kinds, names, sizes, that nothing is missing.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, Field

from crystal.backends.config import OptimizerConfig
from crystal.config import Strict, load_yaml, parse
from crystal.config.bounded_yaml import shortened
from crystal.errors import CheckpointError, ConfigError
from crystal.files import from_json, no_number, regular_bytes
from crystal.output.printable import printable_line
from crystal.zoo.build import meta_decoder
from crystal.zoo.config import ModelConfig

SEAL = "checkpoint.json"
DIGEST = "sha256"
WHOLE, PARTS, STORE = 1, 2, 3
MOMENTS = ("optimizer.exp_avg", "optimizer.exp_avg_sq")
KINDS = ("model", *MOMENTS)
_CELLS = 1 << 20  # of the grid that the parts of a tensor make; no layout has as many


def _bare(name: str) -> str:
    """A name of a file in the checkpoint's own directory."""
    if name in ("", ".", "..", SEAL) or "/" in name or "\\" in name or not name.isprintable() or len(name) > 255:
        raise ValueError(f"expected a file's bare name, got {shortened(ascii(name))}")
    return name


Size = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_bare)]
TensorName = Annotated[str, Field(pattern="^[!-~]{1,500}$")]


class _Entry(pydantic.BaseModel):
    """As Strict, without its look at paths, of which there are none: a seal may have a hundred thousand entries."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PartEntry(_Entry):
    """Which rectangle of a whole tensor a shard holds."""

    offset: list[Size]
    size: list[Size]
    shape: list[Size]


class ShardEntry(_Entry):
    bytes: Size
    sha256: Sha256
    tensors: list[TensorName]
    parts: dict[TensorName, PartEntry] | None = None


class FileEntry(_Entry):
    """What lies beside the shards: the tokenizer."""

    bytes: Size
    sha256: Sha256


class BackendEntry(_Entry):
    model_config = pydantic.ConfigDict(extra="allow")

    optimizer_step: Size


class StateEntry(_Entry):
    """What else was saved; a checkpoint that was imported has other keys besides."""

    model_config = pydantic.ConfigDict(extra="allow")

    step: Size | None = None
    stage: str | None = None
    stage_ended: Annotated[int, Field(ge=1)] | None = None
    model: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    backend: BackendEntry | None = None
    tokenizer: FileName | None = None
    tokenizer_kind: Literal["llama", "plain"] | None = None
    added_tokens: bool | None = None
    bos: bool | None = None
    eos_id: Size | list[Size] | None = None


Held = dict[str, list[tuple[str, PartEntry | None]]]  # where each tensor is: (shard, part)


class Seal(Strict):
    format: Literal[1, 2, 3]
    state: StateEntry
    shards: dict[FileName, ShardEntry]
    store: str | None = None
    store_identity: str | None = None
    files: dict[FileName, FileEntry] | None = None
    sha256: Sha256 | None = None


def format_of(shards: dict[str, dict], store: str | None) -> int:
    """The format of a checkpoint with these shards' records."""
    return STORE if store else PARTS if any("parts" in record for record in shards.values()) else WHOLE


def with_digest(content: dict) -> dict:
    """A seal with its own digest, JSON-ready."""
    content = json.loads(json.dumps(content))
    return content | {DIGEST: digest_of(content)}


def digest_of(content: dict) -> str:
    """Hex sha256 of what was read from JSON, but for a digest that is in it."""
    rest = {key: value for key, value in content.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_seal(directory: Path) -> dict:
    """checkpoint.json of a directory, as it stands, when it is right and complete.

    Raises CheckpointError: not there, no JSON, changed since it was written, a key of another kind, of another step
    than its directory says, a tensor or moment missing.
    """
    with _no_collection():
        return _read_seal(directory / SEAL)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A hundred thousand entries come at once and none is garbage: looking for some takes longer than all the rest."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _read_seal(path: Path) -> dict:
    content = _loaded(path)
    version = content.get("format")
    if type(version) is not int or not WHOLE <= version <= STORE:
        newer = "; a newer crystal wrote it" if type(version) is int and version > STORE else ""
        raise CheckpointError(
            f"{path}: format: expected {WHOLE} to {STORE}, got {shortened(ascii(version))}{newer}", file=path
        )
    if content.get(DIGEST) is None and content.get("files") is not None:
        raise CheckpointError(f"{path}: {DIGEST}: expected the seal's digest, it is not there", file=path, key=DIGEST)
    if content.get(DIGEST) not in (None, digest_of(content)):
        raise CheckpointError(f"{path}: expected what has the {DIGEST} that is in it, the file has changed", file=path)
    try:
        seal = _validated(content, str(path))
        state = seal.state
        model = None if state.model is None else parse(ModelConfig, state.model, str(path), ("state", "model"))
        if state.optimizer is not None:
            parse(OptimizerConfig, state.optimizer, str(path), ("state", "optimizer"))
    except ConfigError as error:
        raise CheckpointError(printable_line(shortened(str(error), 1000)), file=path, key=error.key) from None
    _expect_step(path, seal.state)
    held = _held(seal)
    for problem in itertools.chain(_inconsistent(seal, held), [] if model is None else _incomplete(seal, model, held)):
        raise CheckpointError(f"{path}: {problem}", file=path)
    return content


def _validated(content: dict, where: str) -> Seal:
    """As `parse`, which writes all of it down as JSON again, and is asked where something is wrong."""
    with contextlib.suppress(pydantic.ValidationError):
        return Seal.model_validate(content)
    return parse(Seal, content, where)


def _loaded(path: Path) -> dict:
    try:
        content = json.loads(regular_bytes(path).decode(), parse_constant=no_number)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: expected a checkpoint directory, but {SEAL} is not there") from None
    except RecursionError:
        raise CheckpointError(f"{path}: expected a checkpoint's seal, it is nested too deep", file=path) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or printable_line(shortened(str(error), 200))
        raise CheckpointError(f"{path}: expected a checkpoint's seal: {why}", file=path) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a checkpoint's seal, got {shortened(ascii(content))}", file=path)
    return content


def _expect_step(path: Path, state: StateEntry) -> None:
    """Raise CheckpointError where a directory step-NNNNNNN holds another step."""
    named = re.fullmatch(r"step-([0-9]{7,})", Path(os.path.abspath(path)).parent.name)
    # what was imported may lie anywhere, and has no step
    if named and (state.step is not None or state.stage is not None) and state.step != int(named[1]):
        raise CheckpointError(
            f"{path}: state.step: expected {int(named[1])}, as its directory says, got {state.step}",
            file=path,
            key="state.step",
        )


def _inconsistent(seal: Seal, held: Held) -> Iterator[str]:
    """What cannot be true together, one line each."""
    if (seal.format == STORE) != (seal.store is not None):
        yield f"format: {seal.format} {'needs' if seal.format == STORE else 'has no'} `store`"
    if seal.store is not None and (seal.shards or "\0" in seal.store or not seal.store):
        yield "store: expected the path of a store, and no shards beside it"
    for name, record in seal.shards.items():
        if not record.tensors or len(set(record.tensors)) != len(record.tensors):
            yield f"shards.{name}: expected the names of its tensors, each once"
        if record.parts and seal.format != PARTS:
            yield f"shards.{name}.parts: expected none in format {seal.format}"
        if stray := set(record.parts or ()) - set(record.tensors):
            yield f"shards.{name}.parts: {min(stray)}: no tensor of this shard"
    if seal.files is not None and seal.state.tokenizer is not None and seal.state.tokenizer not in seal.files:
        yield f"state.tokenizer: expected one of the files under `files`, got {seal.state.tokenizer}"
    for key, entries in held.items():
        parts = [part for _, part in entries]
        if parts != [None] and not _tile(parts):
            yield f"{key}: expected it whole, once, or in parts that make it up without a gap; it is in " + ", ".join(
                sorted({file for file, _ in entries})[:3]
            )


def _held(seal: Seal) -> Held:
    found: Held = {}
    for file, record in seal.shards.items():
        for key in record.tensors:
            found.setdefault(key, []).append((file, (record.parts or {}).get(key)))
    return found


def _tile(parts: list[PartEntry | None]) -> bool:
    """Whether parts make up one tensor, each number of it once."""
    if None in parts or len({tuple(part.shape) for part in parts}) != 1:
        return False
    shape = parts[0].shape
    if any(len(part.offset) != len(shape) or len(part.size) != len(shape) for part in parts):
        return False
    if all(p.offset[1:] == [0] * len(shape[1:]) and p.size[1:] == shape[1:] for p in parts):  # cut along the first only
        spans = sorted((p.offset[0], p.offset[0] + p.size[0]) for p in parts if p.size[0]) if shape else []
        return bool(shape) and [0, *(b for _, b in spans)] == [*(a for a, _ in spans), shape[0]]
    cuts, ends = [], [[o + n for o, n in zip(part.offset, part.size, strict=True)] for part in parts]
    for i, length in enumerate(shape):
        cuts.append(sorted({0, length, *(part.offset[i] for part in parts), *(end[i] for end in ends)}))
    if any(cut[-1] > length for cut, length in zip(cuts, shape, strict=True)):
        return False
    cells = math.prod(len(cut) - 1 for cut in cuts)
    if cells > _CELLS:
        return False
    at = [{cut: i for i, cut in enumerate(column)} for column in cuts]
    covered: set[tuple[int, ...]] = set()
    for part, end in zip(parts, ends, strict=True):
        own = itertools.product(*(range(at[i][part.offset[i]], at[i][end[i]]) for i in range(len(shape))))
        for cell in own:
            if cell in covered:
                return False
            covered.add(cell)
    return len(covered) == cells


def _incomplete(seal: Seal, model: ModelConfig, held: Held) -> Iterator[str]:
    """Which tensors or moments are missing, are none of the model's, or are of another shape as far as the seal says.

    Moments are there for all tensors or, where no optimizer was saved or it has not stepped, for none.
    """
    if seal.format == STORE:  # which is checked when it is opened
        return
    stepped = seal.state.backend is not None and seal.state.backend.optimizer_step > 0
    wanted = ["model", *(kind for kind in MOMENTS if stepped or any(key.startswith(kind + ".") for key in held))]
    left = set(held)
    for kind in wanted:
        for name, shape in parameters(model):
            key = f"{kind}.{name}"
            if key not in left:
                yield f"{key}: expected, but no such tensor in it"
                return  # with as many names as a damaged number of blocks would make
            left.remove(key)
            part = held[key][0][1]
            if part is not None and tuple(part.shape) != shape:
                yield f"{key}: expected a tensor of {list(shape)}, got parts of one of {part.shape}"
    if left:
        yield f"{min(left)}: expected the model's tensors and their moments only"


def parameters(model: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of all tensors of a model, in no time: its blocks are alike."""
    one_block, begin = _shapes(model.model_copy(update={"n_layers": 1})), "blocks.0."
    for name, shape in one_block.items():
        if not name.startswith(begin):
            yield name, shape
    for block in range(model.n_layers):
        for name, shape in one_block.items():
            if name.startswith(begin):
                yield f"blocks.{block}.{name.removeprefix(begin)}", shape


@lru_cache(maxsize=8)
def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in meta_decoder(model).named_parameters()}


def files_of(directory: Path, seal: dict) -> dict[str, dict]:
    """The files beside the shards with their sha256, as a seal says it; for one of 0.1.0, as its run directory does.

    Raises CheckpointError where the seal says another model than the run's config.yaml.
    """
    if seal.get(DIGEST) is not None:
        return seal.get("files") or {}
    state, run = seal["state"], Path(os.path.abspath(directory)).parent.parent
    if run / "checkpoints" != Path(os.path.abspath(directory)).parent:
        return {}
    with contextlib.suppress(ConfigError, OSError, KeyError, TypeError):  # a damaged one says nothing
        mapping = load_yaml(run / "config.yaml").mapping["model"]
        model, path = parse(ModelConfig, mapping, "config.yaml"), directory / SEAL
        if state.get("model") is not None and parse(ModelConfig, state["model"], str(path)) != model:
            raise CheckpointError(f"{path}: state.model: expected the model of {run / 'config.yaml'}", file=path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        sha256 = from_json(regular_bytes(run / "manifest.json"))["data"]["tokenizer_sha256"]
        if state.get("tokenizer") is not None and re.fullmatch("[0-9a-f]{64}", sha256):
            return {state["tokenizer"]: {"sha256": sha256}}
    return {}


def missing_seal(directory: Path) -> CheckpointError:
    """What is said of a checkpoint's directory whose seal is gone."""
    return CheckpointError(
        f"{directory / SEAL}: expected the checkpoint's seal, it is not there; restore it, or move {directory.name} "
        f"elsewhere to go on without it",
        file=directory / SEAL,
    )
