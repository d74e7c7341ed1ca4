"""What a model is asked: damaged .npy files of ids, prompts that are no text, settings at the ends of their range.

The model is the checkpoint of tests/samples. Right is one line; or, of a .npy file that numpy reads, the logits of
those ids; or, of settings that leave one token to draw, the likeliest one.
"""

import functools
import io
import json
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from hostile.case import Case, Outcome, command, judged
from hostile.checkpoints import STEP, bed

from crystal.checkpoint import read
from crystal.inference.load import load_decoder
from crystal.inference.logits import logits

IDS = np.array([[5, 9, 300, 17], [44, 2, 8, 101]])


@functools.cache
def checkpoint() -> Path:
    return bed("new") / "run" / "checkpoints" / STEP


@functools.cache
def model():
    return load_decoder(read(checkpoint()))[0]


def npy(header: str | bytes | dict, data: bytes = IDS.tobytes(), version=(1, 0)) -> bytes:
    """A .npy file with this header, whatever it says."""
    text = (repr(header) if isinstance(header, dict) else header) or ""
    text = text if isinstance(text, bytes) else text.encode("latin1")
    length = len(text).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + text + data


def whole() -> bytes:
    file = io.BytesIO()
    np.save(file, IDS)
    return file.getvalue()


# --- .npy files: random numbers → what lies in the file


def _cut(rng: random.Random) -> bytes:
    return whole()[: rng.randrange(len(whole()))]


def _longer(rng: random.Random) -> bytes:
    return whole() + bytes(rng.choice([1, 8, 4096]))


def _flipped(rng: random.Random) -> bytes:
    data = bytearray(whole())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _shape(rng: random.Random) -> bytes:
    large = rng.choice([0, -1, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30])
    shape = rng.choice([(large,), (large, 4), (4, large), (large, large), (2, 2, 2), (), (1,) * 70, (2.0, 4), (True, 4),
                        ("2", 4), (None,), [2, 4], 8, (2, 5), (1, 4)])  # fmt: skip
    return npy({"descr": "<i8", "fortran_order": False, "shape": shape})


def _dtype(rng: random.Random) -> bytes:
    descr = rng.choice(["O", "|O", "<f8", "<c16", "S8", "<U2", "V8", "<M8[s]", "|b1", "i3", "", "x", "<i8,<i8", 8, None,
                        [("a", "<i8")], ("<i8", (2,)), ">i8", "<u8", "<i4"])  # fmt: skip
    return npy({"descr": descr, "fortran_order": rng.choice([False, True]), "shape": (2, 4)})


def _header(rng: random.Random) -> bytes:
    right = {"descr": "<i8", "fortran_order": False, "shape": (2, 4)}
    text = rng.choice([
        "", "{", "[]", "1", "None", "{}", repr(right | {"more": 1}), repr({**right, "fortran_order": 1}),
        "__import__('os').system('true')", "(" * 400, "[" * 90 + "]" * 90, "9" * 6000, repr(right) + " " * 60_000,
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2, 4), }\n", "\x00" * 40, "\xff" * 40,
    ])  # fmt: skip
    return npy(text, version=rng.choice([(1, 0), (2, 0), (3, 0), (0, 0), (9, 9)]))


def _values(rng: random.Random) -> bytes:
    ids = IDS.copy()
    ids[rng.randrange(2), rng.randrange(4)] = rng.choice([-1, 1 << 20, 2**62, -(2**63), 2**63 - 1])
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


def _not_npy(rng: random.Random) -> bytes:
    archive = io.BytesIO()
    np.savez(archive, ids=IDS)
    return rng.choice([b"", b"\x93NUMPY", archive.getvalue(), pickle.dumps(IDS), b"[1, 2, 3]", bytes(4096)])


NPY = {
    "cut": _cut, "longer": _longer, "bit flipped": _flipped, "absurd shapes": _shape, "types": _dtype,
    "headers": _header, "ids outside": _values, "not .npy": _not_npy,
}  # fmt: skip


def _judge_npy(kind: str, seed: int, directory: Path) -> Outcome:
    directory.mkdir(parents=True)
    ids, out = directory / "ids.npy", directory / "logits.npy"
    ids.write_bytes(NPY[kind](random.Random(seed)))

    def same(_, __) -> bool:
        right = np.atleast_2d(np.load(ids, allow_pickle=False)).astype(np.int64)  # a reader that is not ours
        return np.array_equal(np.load(out), logits(model(), torch.from_numpy(right)).numpy())

    outcome = judged(command("logits", checkpoint(), "--ids", ids, "--out", out), same)
    if outcome.word == "refused" and [p.name for p in directory.iterdir()] != ["ids.npy"]:
        return Outcome("silent", "something was left behind", outcome.cpu_seconds)
    return outcome


# --- prompts in a file: random numbers → its bytes


def _prompts(rng: random.Random) -> bytes:
    line = rng.choice([
        b'"\\ud800"', b'"a\\udfffb"', b"\xff\xfe", b'{"prompt": 3}', b'{"prompt": null}', b"[1]", b"null", b"3", b"{",
        b'{"Prompt": "a"}', b"[" * 100_000, b'"' + b"a" * 5000 + b'"', b'"a', b"9" * 5000, b"NaN", b"\x00",
        '"ü"'.encode("utf-16"), b'{"prompt": ["a"]}',
    ])  # fmt: skip
    return b"".join(part + b"\n" for part in rng.choice([[line], [b'"fine"', line], [line, b'"fine"'], [b""], []]))


def _judge_prompts(seed: int, directory: Path) -> Outcome:
    directory.mkdir(parents=True)
    path, rng = directory / "prompts.jsonl", random.Random(seed)
    path.write_bytes(_prompts(rng))
    if rng.random() < 0.15:
        path = rng.choice([directory, directory / "missing", directory / "a\udcffb", Path("/dev/null")])
    return judged(command("generate", checkpoint(), "--prompts", path, "--max-new-tokens", 2), lambda *_: False)


# --- settings: random numbers → (flags, whether only the likeliest token can come)


def _settings(rng: random.Random) -> tuple[list, bool | None]:
    """None: refused."""
    refused = [["--temperature", v] for v in ("nan", "inf", "-1", "-0.1", "x", "")]
    refused += [["--top-p", v] for v in ("0", "1.5", "nan", "-1", "inf")] + [["--top-k", "0"], ["--top-k", "x"]]
    refused += [["--seed", str(v)] for v in (2**64, 10**30, -(2**63) - 1, "x", "1.5")]
    refused += [["--max-new-tokens", v] for v in ("0", "-1", "10" * 20, "x")] + [["--batch-size", "0"]]
    refused += [["--prompt", "a\udcffb"], ["--prompt", "\ud800"], ["--stage", "9" * 30], ["--stage", "0"]]
    greedy = [["--temperature", str(v)] for v in (0, -0.0, 5e-324, 1e-320, 1e-45, 1e-38, 1e-30, 1e-9)]
    greedy += [["--temperature", "1", "--top-p", str(v)] for v in (5e-324, 1e-300, 1e-45, 1e-9)]
    greedy += [["--temperature", "1e300", "--top-k", "1"]]
    any_token = [["--temperature", v] for v in ("1e308", "1e39", "1")]
    any_token += [["--temperature", "1", "--top-k", "9" * 40], ["--temperature", "1", "--seed", "-5"]]
    any_token += [["--temperature", "1", "--top-p", "1"], ["--batch-size", "9" * 30]]
    chosen, word = rng.choice([(refused, None), (greedy, True), (any_token, False)])
    return rng.choice(chosen), word


@functools.cache
def greedy() -> list[int]:
    outcome = judged(command("generate", checkpoint(), "--prompt", "hi", "--max-new-tokens", 3, "--json"))
    return json.loads(outcome.message)["tokens"]


def _judge_settings(seed: int, directory: Path) -> Outcome:
    flags, likeliest = _settings(random.Random(seed))
    default = {"--prompt": "hi", "--max-new-tokens": "3"}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        default[flag] = value
    words = [word for pair in default.items() for word in pair]

    def same(out: str, _) -> bool:
        tokens = json.loads(out)["tokens"]
        return likeliest is False or (likeliest and tokens == greedy())

    outcome = judged(command("generate", checkpoint(), *words, "--json"), same)
    return Outcome(outcome.word, f"{' '.join(flags)}: {outcome.message}", outcome.cpu_seconds)


# --- weights that are not finite


def _judge_weights(seed: int, directory: Path) -> Outcome:
    """Of a model that answers nothing finite, nothing is drawn."""
    from crystal.inference.generate import generate

    rng = random.Random(seed)
    decoder = load_decoder(read(checkpoint()))[0]
    name, weight = rng.choice([(n, p) for n, p in decoder.named_parameters() if "norm" in n or "out" in n])
    with torch.no_grad():
        weight.flatten()[rng.randrange(weight.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    temperature = rng.choice([0.0, 1.0])
    outcome = judged(lambda: list(generate(decoder, [5, 9, 17], 2, temperature)), lambda *_: False)
    return Outcome(outcome.word, f"{name}: {outcome.message}", outcome.cpu_seconds)


JUDGES: dict[str, Callable[[int, Path], Outcome]] = {
    **{f"ids: {kind}": functools.partial(_judge_npy, kind) for kind in NPY},
    "prompts": _judge_prompts,
    "settings": _judge_settings,
    "weights not finite": _judge_weights,
}
MAY_BE_FINE = {"ids: longer", "ids: bit flipped", "ids: absurd shapes", "ids: types", "ids: headers", "settings"}


def cases(seed: int, count: int) -> Iterator[Case]:
    """`count` questions, the same for the same seed; every kind comes in turn."""
    rng = random.Random(seed)
    for number in range(count):
        kind = list(JUDGES)[number % len(JUDGES)]
        own = rng.randrange(1 << 30)
        words = ("refused", "fine") if kind in MAY_BE_FINE else ("refused",)
        yield Case(kind, f"{kind}, {own}", functools.partial(JUDGES[kind], own), words)
