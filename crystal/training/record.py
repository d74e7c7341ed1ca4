"""What a run directory says about the run: config.yaml, and manifest.json with everything it was made from."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import yaml
from pydantic import ConfigDict

import crystal
from crystal.backends.machine import with_dtype
from crystal.checkpoint import steps
from crystal.config import Strict, load_yaml, parse
from crystal.config.bounded_yaml import shortened
from crystal.data.store import TokenStore
from crystal.errors import ConfigError, RunError
from crystal.files import regular_bytes, write_whole
from crystal.kernels import tuning
from crystal.mup.plan import Plan
from crystal.output.printable import printable_line
from crystal.run import RunConfig, RunFile

FORMAT = 1  # of a run directory; those of 0.1.0 do not say it
MAX_MANIFEST = 1 << 26  # bytes of manifest.json, which has the plan of every tensor
_PACKAGES = ("torch", "numpy", "mup", "sentencepiece", "transformers", "safetensors", "triton")
# what may change between two starts of one run, beside where its steps run (`backend`, all but its dtype);
# where its text and vocabulary lie counts for nothing, what they hold does (manifest.json)
_FREE = {
    ("run_dir",),
    ("data", "corpus"),
    ("data", "tokenizer", "path"),
    ("data", "dir"),
    ("data", "verify"),
    ("train", "checkpoint_every"),
    ("train", "keep_checkpoints"),
    ("train", "max_bad_steps"),
    ("train", "evaluate"),
}


class _Data(Strict):
    model_config = ConfigDict(extra="allow")

    store: str | None = None
    tokenizer_sha256: str | None = None


class _Choices(Strict):
    identity: dict
    choices: dict


class _Manifest(Strict):
    """What a run is gone on with by; the rest of manifest.json is for people."""

    model_config = ConfigDict(extra="allow")

    format: int = FORMAT
    data: _Data
    tuning: tuple[_Choices, ...] = ()


def with_recorded_dtype(run: RunFile) -> RunFile:
    """The run with `backend.dtype: auto` replaced: by the dtype that it was made with, or the fastest one here."""
    backend = run.config.backend
    if backend.dtype != "auto":
        return run
    config_path = run.config.directory / "config.yaml"
    if config_path.exists():
        before = parse(RunConfig, load_yaml(config_path).mapping, str(config_path)).backend
        if before.dtype in tuning.DTYPES:  # a Cerebras system has others, and may leave it to itself
            backend = backend.model_copy(update={"dtype": before.dtype})
    return dataclasses.replace(run, config=run.config.model_copy(update={"backend": with_dtype(backend)}))


def recorded_choices(directory: Path) -> list[dict]:
    """The measured choices that a run has kept to, [{identity, choices}], one a kind of machine."""
    manifest = directory / "manifest.json"
    return _read_manifest(manifest).get("tuning", []) if manifest.exists() else []


def open_run(run: RunFile, plan: Plan, store: TokenStore, backend: dict, choices: list[dict]) -> Path:
    """Make the run directory, or check that the one there belongs to this run. Returns it.

    backend: what it says of itself; choices: those to record, of `crystal.backends.machine`.
    Raises ConfigError naming the first key (or the data) that differs from when the run began, RunError where its
    manifest is gone or damaged: what the run was made from is not guessed.
    """
    directory = run.config.directory
    config_path, manifest_path = directory / "config.yaml", directory / "manifest.json"
    resolved = run.config.model_dump(mode="json", by_alias=True)
    data = {"store": store.manifest["fingerprint"], "tokenizer_sha256": store.manifest["tokenizer"]["sha256"]}
    if manifest_path.exists():
        # read through RunConfig, so that a key that is younger than the run has its default
        before = parse(RunConfig, load_yaml(config_path).mapping, str(config_path))
        for loc, old, new in _differences(before.model_dump(mode="json", by_alias=True), resolved):
            raise ConfigError(
                f"{run.path}: {'.'.join(loc)}: the run in {directory} was made with {old!r}, the file now says "
                f"{new!r}; set another run_dir"
            )
        manifest = _read_manifest(manifest_path)
        recorded = manifest["data"]
        if recorded != data:
            raise ConfigError(
                f"{directory}: the run was made from the token store {str(recorded.get('store'))[:16]}…, "
                f"the data now makes {data['store'][:16]}…; set another run_dir"
            )
        if manifest.get("tuning", []) != choices:  # the run has moved to another kind of machine
            write_whole(manifest_path, json.dumps(manifest | {"tuning": choices}, indent=1))
        return directory
    _expect_no_run(directory, manifest_path)
    manifest = {
        "format": FORMAT,
        "name": run.config.name,
        "code": {"crystal": crystal.__version__, "commit": _commit()},
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": platform.platform(),
        "seed": run.config.train.seed,
        "data": data,
        "backend": backend,
        "tuning": choices,
        "plan": plan.as_dict(),
    }
    try:
        (directory / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_whole(config_path, yaml.safe_dump(resolved, sort_keys=False))
        write_whole(manifest_path, json.dumps(manifest, indent=1))
    except OSError as error:
        raise RunError(f"{run.path}: run_dir: {directory} cannot be made: {error.strerror}") from None
    return directory


def _expect_no_run(directory: Path, manifest_path: Path) -> None:
    """Raise RunError where a directory without a manifest holds a run's records."""
    recorded = [name for name in ("metrics.jsonl", "events.jsonl") if (directory / name).exists()]
    found = steps(directory / "checkpoints")
    if found or recorded:
        what = f"the checkpoint of step {found[-1]}" if found else recorded[0]
        raise RunError(
            f"{manifest_path}: expected the manifest of the run that {what} is of, it is not there; nothing else says "
            f"what data and code that was: restore it, or set another run_dir",
            file=manifest_path,
        )


def _read_manifest(path: Path) -> dict:
    """Raises RunError where it is damaged or of a newer format."""
    try:
        manifest = json.loads(regular_bytes(path, MAX_MANIFEST).decode(), parse_constant=float)
        parse(_Manifest, manifest, str(path))
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        why = error if isinstance(error, ConfigError) else "it cannot be read"
        reason = printable_line(shortened(str(why).removeprefix(f"{path}: "), 300))
        raise RunError(
            f"{path}: expected a run's manifest: {reason}; restore it or set another run_dir", file=path
        ) from None
    if manifest.get("format", FORMAT) != FORMAT:
        raise RunError(
            f"{path}: format: expected {FORMAT}, got {manifest['format']}: another crystal wrote it", file=path
        )
    return manifest


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _differences(old: object, new: object, loc: tuple = ()) -> list[tuple[tuple, object, object]]:
    elsewhere = loc[:1] == ("backend",) and len(loc) > 1 and loc != ("backend", "dtype")
    if loc in _FREE or elsewhere or old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), (*loc, str(k)))]
    return [(loc, old, new)]


def _commit() -> str | None:
    """The code's git commit, with + when files are changed; None outside a checkout."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
