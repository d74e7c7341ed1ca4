"""Damaged Model Zoo parameter files, from a seed: values, keys, YAML and trees of phases, of both forms.

Each is imported and the run that comes of it written again as Model Zoo files (`stage_files`). `fine` is a run that
means what the file says: every key of the file is in what is written, is Model Zoo's default, or is one that this file
lists as harmless or off; and nothing else is written. So a key that is passed over is `silent`, whichever it is.
"""

import copy
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import yaml
from hostile.case import Case, Outcome, command, judged
from hostile.model_zoo_refused import REFUSED, REFUSED_OF_TRAINERS
from interop.published_phases import BY_HAND, CLUSTER

from crystal.config import Config, parse
from crystal.interop.cerebras_params_read import files_of, import_parameters, run_of
from crystal.interop.cerebras_params_write import stage_files
from crystal.run import RunConfig, RunFile

EITHER = ("refused", "fine")
HARMLESS = re.compile(
    r"((cerebras|eval_input)(\..*)?|optimizer\.(log_summaries|loss_scaling_factor)"
    r"|runconfig\.(?!(max_steps|checkpoint_steps|seed|is_pretrained_checkpoint|checkpoint_path|mode|num_steps|num_epochs"
    r"|steps_per_epoch|grad_accum_steps)$).*"
    r"|trainer\.(validate(\..*)?|fit\.val_dataloader(\..*)?|init\.((backend|logging|loggers|device|model_dir)\b.*"
    r"|checkpoint\.(?!steps$).*|loop\.eval.*|precision\.(?!max_gradient).*|callbacks\.\d+\.(ComputeNorm|Keep).*))"
    r"|(trainer\.init\.)?model\.(attention_kernel|attention_softmax_fp32|boundary_casting|mixed_precision|fp16_type"
    r"|use_bfloat16|weight_initialization_seed|compute_eval_metrics)"
    r"|(train_input|trainer\.fit\.train_dataloader)\.(num_workers|prefetch_factor|persistent_workers|use_worker_cache"
    r"|shuffle|shuffle_seed|repeat|drop_last))(\..+)?"
)
DEFAULTS = {  # Model Zoo's, where a file is silent
    "scale_qk_dot_by_d": False, "embeddings_scale": 1.0, "output_logits_scale": 1.0, "seed": 1, "name": "gpt2",
    "max_gradient_norm": None, "correct_bias": True, "is_pretrained_checkpoint": False, "norm_type": "layernorm",
    "rope_theta": 10000.0, "mean": 0.0, "attention_type": "scaled_dot_product", "use_bias_in_output": False,
    "attention_dropout_rate": 0.0, "use_position_embedding": True, "output_logits_alpha": 1.0, "mode": "train",
    "initializer_range": 0.02, "data_subset": "0.0-1.0", "data_processor": "GptHDF5MapDataProcessor",
}  # fmt: skip
OFF = {
    "amsgrad": False, "l2_regularization_rate": 0.0, "momentum": 0.0, "sparsity": {}, "cycle": False,
    "grad_accum_steps": 1, "alibi": False, "embedding_layer_norm": False, "pos_scaling_factor": 1.0, "use_vsl": False,
    "attention_logits_alpha": 1.0, "embedding_dropout_rate": 0.0, "scale_output_logits_by_d": True, "moe": {},
}  # fmt: skip

OTHERS = ("0.1", "4", "x", "", True, False, math.nan, math.inf, -math.inf, [], {}, [1], {"a": 1}, [[]], "null")
NUMBERS = (0, 1, 2, 3, 7, -1, 0.5, -0.5, 1e-30, 1e-320, 1e300, 10**30, 10**400, 1 << 53, 0.073, 64, 1e-9)


@functools.cache
def beds() -> dict[str, list[dict]]:
    """The parameter files of a small run of three stages, in both forms, with keys as published files have them."""
    initial = {"init_std": 0.073, "init_truncate": 2.0, "residual_init_2l": True, "embedding_multiplier": 14.6}
    mup = {"parametrization": "crystalcoder", "base_d_model": 32, "output_alpha": 2.22, "attention_scale": "1/d"}
    lr = [{"from": 0.0, "to": 0.012, "steps": 4}, {"from": 0.012, "to": 0.001, "steps": 30}]
    sources = {"SlimPajama/a": {"weight": 0.25, "subset": "0.0-0.5"}, "StarCoder_fim/b": {"weight": 0.75}}
    stages = [
        {"name": f"phase{i + 1}", "steps": 20, "checkpoint_every": 5, "lr": lr, "sources": sources,
         "carry": [[], ["weights", "optimizer"], ["weights"]][i]}
        for i in range(3)
    ]  # fmt: skip
    model = {"d_model": 64, "n_heads": 4, "n_layers": 2, "d_ff": 176, "vocab_size": 512, "max_seq_len": 64,
             "norm": "layernorm", "norm_eps": 1e-5, "bias": True, "rotary_fraction": 0.25, "tie_embeddings": True,
             "rotary_style": "interleaved", "mup": initial | mup}  # fmt: skip
    run = as_run({
        "name": "small", "model": model, "optimizer": {"name": "adamw_cerebras", "eps": 1e-9},
        "curriculum": {"name": "small", "seq_len": 64, "global_batch_size": 8, "lr_counts_from": 0, "stages": stages},
        "data": {"corpus": "corpus.yaml", "tokenizer": {"path": "tokenizer.json"}}, "train": {"seed": 1},
    })  # fmt: skip
    published, trainer = ([*stage_files(run, style).values()] for style in ("1.9.1", "2.10"))
    for i, file in enumerate(published):
        file["runconfig"] = (BY_HAND if i == 2 else CLUSTER) | file["runconfig"]
        file |= {"cerebras": {"save_iter_state_path": "/x"}, "eval_input": {"batch_size": 32, "data_dir": ["/a", "/b"]}}
    for file in trainer:
        file["trainer"] |= {"validate": {"val_dataloader": {"batch_size": 4}}}
        file["trainer"]["init"]["callbacks"] += [{"ComputeNorm": {}}, {"KeepNCheckpoints": {"n": 3}}]
        file["trainer"]["init"]["loop"] |= {"eval_frequency": 10, "eval_steps": 5}
    return {"1.9.1": published, "2.10": trainer}


def as_run(mapping: dict) -> RunFile:
    return RunFile(parse(RunConfig, mapping, "run"), Config(mapping, {(): "run"}), "run")


# --- what a file says, and what became of it


def leaves(node: object, at: str = "") -> dict[str, object]:
    """{dotted path: value} of what holds no other; an empty mapping or list is a value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found: dict[str, object] = {}
    for key, value in items:
        found |= leaves(value, f"{at}.{key}" if at else str(key))
    return found if items and found else {at: node}


def alike(a: object, b: object) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return a.removeprefix("/path/to/").strip("/") == b.removeprefix("/path/to/").strip("/")
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return math.isclose(a, b, rel_tol=1e-9, abs_tol=0) if numbers else a == b


def difference(given: dict, back: dict) -> str | None:
    """The first key of a file that what was written of its run does not say, or the other way round."""
    said, written = leaves(given), leaves(back)
    for path, value in said.items():
        key = path.rpartition(".")[2]
        unsaid = value is None and (path not in written or re.search(r"(steps|(loader|input)\.vocab_size)$", path))
        if HARMLESS.fullmatch(path) or unsaid or value == {}:  # a section without a key says nothing
            continue
        if path not in written:
            if key in ("base_lr", "learning_rate") or (key in OFF | DEFAULTS and alike(value, (OFF | DEFAULTS)[key])):
                continue
            return f"{path}: {value!r} was passed over"
        if not alike(value, written[path]) and not (value is None and alike(written[path], DEFAULTS.get(key, "?"))):
            return f"{path}: {value!r} became {written[path]!r}"
    for path, value in written.items():
        key = path.rpartition(".")[2]
        known = alike(value, DEFAULTS.get(key, "?")) or key in ("steps", "decay_steps") or ".callbacks" in path
        known |= path in ("train_input.vocab_size", "trainer.fit.train_dataloader.vocab_size")
        if path not in said and not known and not HARMLESS.fullmatch(path):
            return f"{path}: {value!r} came from nowhere"
    return None


def outcome(directory: Path, style: str) -> Outcome:
    """Import what lies in a directory, twice: as the command does, and to look at what it means."""
    target = directory.with_name("run.yaml")

    def call() -> object:
        import_parameters(directory, target)
        return run_of(files_of(directory), "run")

    def right(_out: str, run: dict) -> bool:
        back = [*stage_files(as_run(run), style).values()]
        said = [yaml.load(file.read_text(), NumbersToo) for file in files_of(directory)]  # noqa: S506
        differences.extend(filter(None, map(difference, said, back)))
        return len(back) == len(said) and not differences

    differences: list[str] = []
    done = judged(command("import", directory, "--to", target, instead=call), right)
    if done.word == "silent":
        return Outcome("silent", "; ".join(differences))
    if done.word == "refused" and (target.exists() or "\n" in done.message or len(done.message) > 1000):
        return Outcome("silent", f"left {target.name}, or a long line: {done.message}")
    return done


class NumbersToo(yaml.SafeLoader):
    """YAML 1.1 but for 1e-5, which is a number."""


NumbersToo.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def write(directory: Path, files: list[dict], style: str, tree: bool = True) -> None:
    for i, file in enumerate(files):
        path = directory / (f"phase{i + 1}/params.yaml" if tree else f"phase{i + 1}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(file))


def put(node: dict, path: str, value: object) -> None:
    """Set what lies at a dotted path, making mappings on the way."""
    *way, last = path.split(".")
    for part in way:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


# --- kinds


Damage = Callable[[list[dict], str, Random], str]


def _in_all(change: Callable[[dict, str, Random], str]) -> Damage:
    """The same change in each file, so that they still agree."""

    def on(files: list[dict], style: str, rng: Random) -> str:
        state = rng.getstate()
        for file in files:
            rng.setstate(state)
            done = change(file, style, rng)
        return done

    return on


def _place(file: dict, rng: Random, numbers: bool = False) -> str:
    """A place, those that mean something more often than others."""
    found = {p: v for p, v in leaves(file).items() if not numbers or (type(v) in (int, float))}
    heard = [path for path in found if not HARMLESS.fullmatch(path)]
    return rng.choice(heard if rng.random() < 0.8 else list(found))


def another_type(file: dict, style: str, rng: Random) -> str:
    path = _place(file, rng, numbers=rng.random() < 0.6)
    old = leaves(file)[path]
    value = rng.choice([v for v in OTHERS if type(v) is not type(old) or (isinstance(v, float) and v != v)])
    put(file, path, value)
    return f"{path} = {value!r}"


def another_number(file: dict, style: str, rng: Random) -> str:
    path, value = _place(file, rng, numbers=True), rng.choice(NUMBERS)
    put(file, path, value)
    return f"{path} = {str(value)[:40]}"


def another_word(file: dict, style: str, rng: Random) -> str:
    path = rng.choice([p for p, v in leaves(file).items() if isinstance(v, str)])
    words = ["", "x", "../../etc/passwd", "a\tb", "\u202e", "x" * 400, "AdamW2", "normal", "1.0", "a" * 70_000]
    value = rng.choice(words)
    put(file, path, value)
    return f"{path} = {value[:30]!r}"


def refused(file: dict, style: str, rng: Random) -> str:
    table = REFUSED if style == "1.9.1" else REFUSED_OF_TRAINERS
    path = rng.choice(list(table))
    value = rng.choice(table[path])
    put(file, path, value)
    return f"{path} = {value!r}"


def unknown_key(file: dict, style: str, rng: Random) -> str:
    sections = sorted({p.rpartition(".")[0] for p in leaves(file)} | {""})
    section = rng.choice([s for s in sections if not HARMLESS.fullmatch(f"{s}.x".strip("."))])
    inside = node_at(file, section.split(".") if section else [])
    if isinstance(inside, list):
        inside.append(rng.choice([1, {}, "x", None]))
        return f"{section}: one more"
    known = rng.choice(list(inside))
    near = [known + "s", known.upper() + "_", known[:-1] or "x"]
    key = rng.choice([*near, "warmup_steps", "z_loss", "lr_scale", "dtype2"])
    inside[key] = inside[known] if key in near else rng.choice([1, 0.5, "x", True])
    return f"{section}.{key}"


def node_at(node: dict | list, way: list[str]) -> dict | list:
    return functools.reduce(lambda n, part: n[int(part)] if isinstance(n, list) else n[part], way, node)


def gone(file: dict, style: str, rng: Random) -> str:
    path = _place(file, rng)
    *way, last = path.split(".")
    if rng.random() < 0.3 and len(way) > 1:
        *way, last = way
    node = node_at(file, way)
    how = rng.choice(["gone", "null"]) if isinstance(node, dict) else "gone"
    if how == "null":
        node[last] = None
    else:
        del node[int(last) if isinstance(node, list) else last]
    return f"{path} {how}"


def one_differs(files: list[dict], style: str, rng: Random) -> str:
    """One of the files says something else of what they share."""
    base = "" if style == "1.9.1" else "trainer.init."
    data = "train_input" if style == "1.9.1" else "trainer.fit.train_dataloader"
    places = [f"{base}model.{k}" for k in ("num_hidden_layers", "filter_size", "vocab_size", "layer_norm_epsilon",
                                           "max_position_embeddings", "embeddings_scale", "loss_weight")]  # fmt: skip
    path = rng.choice([*places, f"{data}.batch_size"])
    file = rng.choice(files)
    old = leaves(file)[path]
    put(file, path, old * 2 if isinstance(old, int) else old / 2)
    return path


def harmless(file: dict, style: str, rng: Random) -> str:
    """What does not touch training is another, gone, or of another type."""
    path = rng.choice([p for p in leaves(file) if HARMLESS.fullmatch(p) and p.count(".") and "callbacks" not in p])
    value = rng.choice([None, 7, "x", False, 0.25, [1]])
    put(file, path, value)
    return f"{path} = {value!r}"


def off(file: dict, style: str, rng: Random) -> str:
    """A key is there to say that something is off."""
    base = ("optimizer", "model", "train_input") if style == "1.9.1" else (
        "trainer.init.optimizer.AdamW", "trainer.init.model", "trainer.fit.train_dataloader")  # fmt: skip
    places = {"amsgrad": 0, "l2_regularization_rate": 0, "embedding_layer_norm": 1, "pos_scaling_factor": 1, "moe": 1,
              "attention_logits_alpha": 1, "embedding_dropout_rate": 1, "use_vsl": 2}  # fmt: skip
    key = rng.choice(list(places))
    put(file, f"{base[places[key]]}.{key}", copy.deepcopy(OFF[key]))
    return key


CHANGES: dict[str, tuple[Damage, tuple]] = {
    "another type": (_in_all(another_type), EITHER),
    "another number": (_in_all(another_number), EITHER),
    "another word": (_in_all(another_word), EITHER),
    "what crystal does not train with": (_in_all(refused), ("refused",)),
    "a key too many": (_in_all(unknown_key), ("refused",)),
    "a key gone": (_in_all(gone), EITHER),
    "files that differ": (one_differs, ("refused",)),
    "harmless": (_in_all(harmless), ("fine",)),
    "off": (_in_all(off), ("fine",)),
}


def _flipped(text: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(text))
    return text[:at] + bytes([text[at] ^ (1 << rng.randrange(7))]) + text[at + 1 :]


def _cut(text: bytes, rng: Random) -> bytes:
    return text[: rng.randrange(len(text))]


def _doubled(text: bytes, rng: Random) -> bytes:
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    return b"".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])


def _other_text(text: bytes, rng: Random) -> bytes:
    return rng.choice([
        b"", b"[]", b"7", b"null", b"- a", b"\xff\xfe", text.decode().encode("utf-16"), b"a: &a [*a]", b"{" * 4000,
        b"a: !!python/object/apply:os.system [id]", b"x: " + b"[" * 500, text + b"\n---\nmodel: {}\n",
        b"extends: /etc/passwd\n" + text, text.replace(b":", b": !!str", 1), b"trainer: 3", b"\0" + text,
        b"\n".join(b"k%d: 1" % i for i in range(30_000)), text + b"#" * 600_000,
    ])  # fmt: skip


TEXTS = {"flipped": _flipped, "cut": _cut, "a line twice": _doubled, "another text": _other_text}


def _no_phase(directory: Path, rng: Random) -> str:
    phases = sorted(directory.iterdir())
    how = rng.choice(["gone", "no file", "a file", "renamed", "far away", "beside", "a directory", "dangling", "empty"])
    phase = rng.choice(phases)
    params = phase / "params.yaml"
    elsewhere = {"gone": "../aside", "renamed": "stage2", "far away": "phase7"}
    if how in elsewhere:
        phase.rename(directory / elsewhere[how])
    elif how == "a file":
        params.unlink()
        phase.rmdir()
        phase.write_text("x")
    elif how == "beside":
        (directory / "params.yaml").write_bytes(params.read_bytes())
    elif how == "empty":
        for each in phases:
            each.rename(directory.with_name(each.name))
    else:
        params.unlink()
        if how == "a directory":
            params.mkdir()
        elif how == "dangling":
            params.symlink_to("nowhere")
    return f"{phase.name}: {how}"


KINDS = [*CHANGES, *TEXTS, "a phase is not there", "undamaged"]


def cases(seed: int, count: int) -> Iterator[Case]:
    """The first `count` damaged parameter files of a seed, all kinds in turn."""
    for i, kind in enumerate(itertools.islice(itertools.cycle(KINDS), count)):
        rng = Random(f"{seed}:{i}")
        expected = CHANGES[kind][1] if kind in CHANGES else EITHER
        expected = {"a phase is not there": ("refused",), "undamaged": ("fine",)}.get(kind, expected)
        style = rng.choice(["1.9.1", "1.9.1", "2.10"])
        yield Case(kind, f"{kind}, {style} ({seed}:{i})", functools.partial(_judge, kind, style, rng), expected)


def _judge(kind: str, style: str, rng: Random, scratch: Path) -> Outcome:
    directory = scratch / "in"
    alone = kind in CHANGES and kind != "files that differ" and rng.random() < 0.5
    files = copy.deepcopy(beds()[style][:1] if alone else beds()[style])
    done = CHANGES[kind][0](files, style, rng) if kind in CHANGES else ""
    write(directory, files, style, tree=not alone and (kind == "a phase is not there" or rng.random() < 0.5))
    if kind in TEXTS:
        file = rng.choice(files_of(directory))
        file.write_bytes(TEXTS[kind](file.read_bytes(), rng))
    elif kind == "a phase is not there":
        done = _no_phase(directory, rng)
    found = outcome(directory, style)
    return Outcome(found.word, f"{done}: {found.message}", found.cpu_seconds)
