"""Cerebras Model Zoo parameter files, of both forms that `modelzoo` writes, read into a run file.

The published phase files of CrystalCoder are read as they are, in their directories. Every key is read, may only say
what crystal does, or is on a list of those without bearing on what is trained (`cerebras_params_keys`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from crystal.config import parse
from crystal.config.bounded_yaml import Room, read_yaml
from crystal.curriculum.resolve import resolve
from crystal.errors import ConfigError, RunError
from crystal.files import expect_new, write_whole
from crystal.interop import cerebras_params_keys as keys
from crystal.interop.cerebras_params_model import model_of
from crystal.interop.cerebras_params_node import NUMBER, Keys, Node, plain
from crystal.output.config_messages import found
from crystal.run import RunConfig

SHAPES = {"Linear": "linear", "LinearLR": "linear", "CosineDecay": "cosine", "CosineDecayLR": "cosine"}
PHASES = 3  # directories that CrystalCoder's parameter files were published in
_PHASE = re.compile(r"phase([1-9][0-9]{0,3})")


class Parts(NamedTuple):
    """What the two forms say in different places."""

    model: dict
    optimizer: dict
    lr: list[tuple[float, float, int, str]]
    seq_len: int
    data: Node
    steps: int
    checkpoint_every: int
    seed: int
    weights_only: bool
    starts_from: str | None  # the key that names a checkpoint or asks for one


def import_parameters(source: Path, to: Path) -> dict:
    """A parameter file, all *.yaml of a directory in the order of their names, or a tree of phaseN/params.yaml, as
    the run file `to`.

    One file becomes one stage; they must agree on model, optimizer and batch. Returns {run, stages}.
    Raises ConfigError naming file and key, or when `to` exists.
    """
    source, to = Path(source), Path(to)
    expect_new(to, "file")
    run = run_of(files_of(source), to.stem)
    head = (
        "# Read from Model Zoo parameter files. To fill in: data:, and curriculum.bind from sources to the corpus's.\n"
    )
    try:
        write_whole(to, head + yaml.safe_dump(run, sort_keys=False))
    except OSError as error:
        raise RunError(f"{to}: cannot be written: {error.strerror or error}") from None
    return {"run": str(to), "stages": [stage["name"] for stage in run["curriculum"]["stages"]]}


def files_of(source: Path) -> list[Path]:
    """The parameter files to read, in order. Raises ConfigError for a directory that holds none, or a tree of phases
    in which one is missing."""
    if not source.is_dir():
        return [source]
    try:
        inside = sorted(source.iterdir(), key=_by_number)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}", file=source) from None
    files = [path for path in inside if path.suffix in (".yaml", ".yml")]
    phases = {int(match[1]): path for path in inside if (match := _PHASE.fullmatch(path.name))}
    if files and phases:
        raise ConfigError(f"{source}: expected *.yaml or phaseN/params.yaml, found {files[0].name} beside phases")
    if not files and not phases:
        raise ConfigError(f"{source}: expected Model Zoo parameter files (*.yaml, or phaseN/params.yaml), none there")
    if files:
        return files
    tree = [source / f"phase{n + 1}" / "params.yaml" for n in range(max(PHASES, *phases))]
    for file in tree:
        if not file.is_file():
            others = "; stages of your own can lie side by side as *.yaml"
            raise ConfigError(f"{file}: expected phase 1 to {len(tree)} of a run, this one is not there{others}")
    return tree


def run_of(files: list[Path], name: str) -> dict:
    """The run that these files describe together, as the mapping of a run file."""
    first, stages = None, []
    for file in files:
        parts = _parts(_top(file))
        shared = {
            "model": parts.model,
            "optimizer": parts.optimizer,
            "seq_len": parts.seq_len,
            "global_batch_size": parts.data.above_zero("batch_size", int),
            "seed": parts.seed,
        }
        if first is None and parts.starts_from is not None:
            what = "expected none in the first stage, which starts from new weights; give all stages together"
            raise ConfigError(f"{file}: {parts.starts_from}: {what}", file=file, key=parts.starts_from)
        first = first or shared
        _expect_the_same(shared, first, file, files[0])
        carry = [] if not stages else ["weights"] if parts.weights_only else ["weights", "optimizer"]
        stages.append(
            {
                "name": _stage_name(file, name if len(files) == 1 else None),
                "steps": parts.steps,
                "carry": carry,
                "checkpoint_every": parts.checkpoint_every,
                "lr": [{"from": a, "to": b, "steps": steps, "shape": shape} for a, b, steps, shape in parts.lr],
                "sources": _sources(parts.data),
            }
        )
    run = {
        "name": name,
        "model": first["model"],
        "optimizer": first["optimizer"],
        "curriculum": {
            "name": name,
            "seq_len": first["seq_len"],
            "global_batch_size": first["global_batch_size"],
            "lr_counts_from": 0,  # Model Zoo's first step has lr(0)
            "stages": stages,
        },
        "data": {"corpus": "corpus.yaml", "tokenizer": {"path": "tokenizer.json"}},
        "train": {"seed": first["seed"], "micro_batch_size": 1},
    }
    where = str(files[0])
    config = parse(RunConfig, run, where)
    resolve(config.curriculum, where)
    try:
        config.plan()
    except ConfigError as error:  # a base width without whole heads
        raise ConfigError(f"{where}: {error}", file=where) from None
    return run


def _by_number(path: Path) -> list:
    """stage2 before stage10."""
    return [(part.zfill(12) if part.isdigit() else part) for part in re.split(r"([0-9]+)", path.name)]


def _stage_name(file: Path, only: str | None) -> str:
    if only is not None:
        return only
    return file.parent.name if file.name == "params.yaml" and _PHASE.fullmatch(file.parent.name) else file.stem


def _top(file: Path) -> Node:
    mapping = read_yaml(file, Room())
    if not isinstance(mapping, dict):
        raise ConfigError(f"{file}: expected a mapping of keys, got {found(mapping)}", file=file)
    return Node(file, "", mapping)


def _expect_the_same(shared: dict, first: dict, file: Path, first_file: Path) -> None:
    """Both files of one model, optimizer, batch and seed. Raises ConfigError naming the first key that differs."""
    depth = 2 if file.parent != first_file.parent else 1
    ours, theirs = _flat(shared), _flat(first)
    for key in {**theirs, **ours}:
        if ours.get(key) != theirs.get(key):
            as_in = "/".join(first_file.parts[-depth:])
            raise ConfigError(
                f"{file}: {key}: expected {plain(theirs.get(key))} as in {as_in}, got {plain(ours.get(key))}",
                file=file,
                key=key,
            )


def _flat(mapping: dict, at: str = "") -> dict[str, Any]:
    """{dotted key: value}."""
    flat = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{at}{key}.") if isinstance(value, dict) else {f"{at}{key}": value}
    return flat


def _parts(top: Node) -> Parts:
    return _of_trainer(top) if "trainer" in top.mapping else _of_published(top)


def _of_published(top: Node) -> Parts:
    """Release 1.9.1."""
    top.expect(keys.PUBLISHED)
    model, optimizer, run = top.inside("model"), top.inside("optimizer"), top.inside("runconfig")
    if optimizer.get("optimizer_type", str) != "AdamW":
        raise optimizer.error("optimizer_type", f"expected AdamW, got {plain(optimizer.mapping['optimizer_type'])}")
    adjusted = optimizer.get("adjust_learning_rate", dict, {})
    if adjusted.keys() - {"decoder_kernel"}:
        got = plain(", ".join(adjusted))
        raise optimizer.error("adjust_learning_rate", f"expected decoder_kernel alone, got {got}")
    kernel = optimizer.inside("adjust_learning_rate").above_zero("decoder_kernel", NUMBER) if adjusted else None
    optimizer.expect(keys.OPTIMIZER)
    run.expect(keys.RUNCONFIG)
    seq_len = _seq_len(model)
    betas = [optimizer.get("beta1", NUMBER), optimizer.get("beta2", NUMBER)]
    weights_only = run.get("is_pretrained_checkpoint", bool, False)
    path = run.get("checkpoint_path", str, None)
    starts = "is_pretrained_checkpoint" if weights_only else "checkpoint_path" if path is not None else None
    return Parts(
        model_of(model, kernel, trainer=False),
        _optimizer(optimizer, betas, "weight_decay_rate", optimizer),
        [_published_segment(entry) for entry in optimizer.entries("learning_rate")],
        seq_len,
        _data(top.inside("train_input"), model, seq_len),
        run.above_zero("max_steps", int),
        run.above_zero("checkpoint_steps", int),
        run.get("seed", int, 1),
        weights_only,
        starts and f"runconfig.{starts}",
    )


def _of_trainer(top: Node) -> Parts:
    """Release 2.10."""
    trainer = top.expect(keys.TRAINER_FILE).inside("trainer").expect(keys.TRAINER)
    init, fit = trainer.inside("init").expect(keys.INIT), trainer.inside("fit").expect(keys.FIT)
    adamw = init.inside("optimizer").expect(Keys("AdamW")).inside("AdamW").expect(keys.ADAMW)
    precision = Node(init.file, f"{init.path}.precision", init.get("precision", dict, {})).expect(keys.PRECISION)
    model, seq_len = init.inside("model"), _seq_len(init.inside("model"))
    betas = adamw.get("betas", list)
    if len(betas) != 2:
        raise adamw.error("betas", f"expected two numbers, got {found(betas)}")
    pair = Node(adamw.file, f"{adamw.path}.betas", dict(zip("01", betas, strict=True)))
    states = _loaded_states(init)
    path = fit.get("ckpt_path", str, None)
    return Parts(
        model_of(model, None, trainer=True),
        _optimizer(adamw, [pair.get(i, NUMBER) for i in "01"], "weight_decay", precision),
        _trainer_segments(init),
        seq_len,
        _data(fit.inside("train_dataloader"), model, seq_len),
        init.inside("loop").expect(keys.LOOP).above_zero("max_steps", int),
        init.inside("checkpoint").expect(keys.CHECKPOINT).above_zero("steps", int),
        init.get("seed", int, 1),
        states == "model",
        "trainer.init.callbacks" if states is not None else "trainer.fit.ckpt_path" if path is not None else None,
    )


def _loaded_states(init: Node) -> str | None:
    """What a stage takes over from its checkpoint, `all` or `model`; None: the file does not say."""
    states = None
    for entry in init.entries("callbacks") if init.mapping.get("callbacks") is not None else ():
        entry.expect(keys.CALLBACKS)
        if "LoadCheckpointStates" in entry.mapping:
            loading = entry.inside("LoadCheckpointStates").expect(Keys("load_checkpoint_states"))
            states = loading.get("load_checkpoint_states", str, "all")
            if states not in ("all", "model"):
                raise loading.error("load_checkpoint_states", f"expected all or model, got {found(states)}")
    return states


def _optimizer(node: Node, betas: list, decay: str, clipping: Node) -> dict:
    """Cerebras' AdamW, and so by its formula; biases and norms do not decay there. clipping: where its bound is."""
    return {
        "name": "adamw_cerebras",
        "betas": betas,
        "eps": node.above_zero("eps", NUMBER),
        "weight_decay": node.get(decay, NUMBER),
        "decay_norms_and_biases": False,
        "grad_clip": clipping.above_zero("max_gradient_norm", NUMBER, None),
    }


def _published_segment(entry: Node) -> tuple[float, float, int, str]:
    entry.expect(keys.LEARNING_RATE)
    # 1.9.1 takes either; the published phases have both, or one of them
    length = "decay_steps" if entry.mapping.get("decay_steps") is not None else "steps"
    if length == "steps" and entry.mapping.get("steps") is None:
        length = "decay_steps"
    segment = _segment(entry, length, entry.get("scheduler", str))
    if entry.get("steps", int, segment[2]) != segment[2]:
        raise entry.error("steps", f"expected {length} {segment[2]}, got {entry.mapping['steps']}")
    for key in ("base_lr", "learning_rate"):  # what Model Zoo itself adds to a file that it has read
        if entry.get(key, NUMBER, segment[0]) != segment[0]:
            raise entry.error(key, f"expected initial_learning_rate {segment[0]:g}, got {entry.mapping[key]}")
    return segment


def _trainer_segments(init: Node) -> list[tuple[float, float, int, str]]:
    """One scheduler, or one sequence of them; several in the list would all act at once."""
    listed = init.entries("schedulers")
    if len(listed) != 1:
        raise init.error("schedulers", f"expected one scheduler, or one SequentialLR, got {len(listed)}")
    if "SequentialLR" not in listed[0].mapping:
        return [_trainer_segment(listed[0])]
    sequence = listed[0].expect(Keys("SequentialLR")).inside("SequentialLR").expect(keys.SEQUENCE)
    segments = [_trainer_segment(entry) for entry in sequence.entries("schedulers")]
    ends = [sum(steps for _, _, steps, _ in segments[: i + 1]) for i in range(len(segments) - 1)]
    milestones = sequence.get("milestones", list, ends)
    if milestones != ends or any(isinstance(end, bool) for end in milestones):
        raise sequence.error("milestones", f"expected {ends}, where each scheduler ends, got {found(milestones)}")
    return segments


def _trainer_segment(listed: Node) -> tuple[float, float, int, str]:
    if len(listed.mapping) != 1:
        raise listed.error("", f"expected one scheduler, got {plain(', '.join(listed.mapping) or 'none')}")
    (kind,) = listed.mapping
    if kind not in SHAPES:
        raise listed.error(kind, f"expected one of {', '.join(SHAPES)}, got {plain(kind)}")
    return _segment(listed.inside(kind).expect(keys.SCHEDULER), "total_iters", kind)


def _segment(entry: Node, length: str, kind: str) -> tuple[float, float, int, str]:
    if kind not in SHAPES:
        raise entry.error("scheduler", f"expected one of {', '.join(SHAPES)}, got {plain(kind)}")
    ends = entry.get("initial_learning_rate", NUMBER), entry.get("end_learning_rate", NUMBER)
    return (*ends, entry.above_zero(length, int), SHAPES[kind])


def _data(data: Node, model: Node, seq_len: int) -> Node:
    """The training data's section, which must be of the model's vocabulary and rows."""
    data.expect(keys.DATA)
    vocab_size = model.above_zero("vocab_size", int)
    if data.above_zero("vocab_size", int, vocab_size) != vocab_size:
        raise data.error("vocab_size", f"expected the model's {vocab_size}, got {data.mapping['vocab_size']}")
    if data.above_zero("max_sequence_length", int, seq_len) != seq_len:
        got = data.mapping["max_sequence_length"]
        raise data.error("max_sequence_length", f"expected {seq_len}, as 1 / the model's loss_weight, got {got}")
    return data


def _sources(data: Node) -> dict:
    """{source: {weight, subset}} by the directories' names behind /path/to/; one directory is all."""
    if data.mapping.get("mixture") is None:
        return {_source(data): {"weight": 1.0} | _subset(data)}
    for key in ("data_dir", "data_subset"):
        if data.mapping.get(key) is not None:
            raise data.error(key, "expected it or mixture, not both")
    sources: dict = {}
    for entry in data.entries("mixture"):
        entry.expect(keys.MIXED)
        name = _source(entry)
        if name in sources:
            raise entry.error("data_dir", f"expected each directory once, got {plain(name)} again")
        sources[name] = {"weight": entry.get("weight", NUMBER)} | _subset(entry)
    return sources


def _source(node: Node) -> str:
    return node.get("data_dir", str).removeprefix("/path/to/").strip("/")


def _subset(node: Node) -> dict:
    subset = node.get("data_subset", str, None)
    return {} if subset is None else {"subset": subset}


def _seq_len(model: Node) -> int:
    """The rows' length is what the loss is divided by."""
    weight = model.get("loss_weight", NUMBER)
    length = round(1 / weight) if 1e-12 < weight <= 1 else 0
    if not length or abs(weight * length - 1) > 1e-6:
        raise model.error("loss_weight", f"expected 1 / the rows' length, got {weight}")
    return length
