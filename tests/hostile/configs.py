"""Hostile configs, from a seed: run files, recipes, sweeps and overrides of twenty kinds.

Each is read as the commands read it before they begin: `crystal config`, or what `crystal train` does before it makes
anything. What is taken (`fine`) must be what was written: another value in its place is `silent`.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from hostile.case import Case, Outcome, command, judged
from hostile.config_case import EITHER, FILES, RUN, case, keys, on_paper, sections, write
from hostile.config_names import (
    fim,
    hostile_name,
    hostile_package,
    hostile_path,
    hostile_recipe,
    hostile_sweep,
    part_of_rows,
)  # fmt: skip

from crystal.config.bounded_yaml import yaml_value
from crystal.run import load_run


def cases(seed: int, count: int) -> Iterator[Case]:
    """The first `count` cases of a seed, all kinds in turn."""
    for i, kind in enumerate(itertools.islice(itertools.cycle(KINDS), count)):
        yield kind(Random(f"{seed}:{i}"))


# ---------------------------------------------------------------------------------------------- values and types

SCALARS = ["x", "''", "3", "-3", "0", "0.5", "1e-3", "true", "null", "2024-01-01", "''", "a b", "~", "1_000", "+5",
           "[]", "{}", "[1]", "{a: 1}", "[[]]", "[null]", "yes", "0x10", ".inf", ".nan", "-.inf",
           "'\U0001f4a5'"]  # fmt: skip


def any_value(rng: Random) -> Case:
    """A key gets a value of any type: refused, or taken just as it is."""
    key, text = rng.choice(keys()), rng.choice(SCALARS)

    def read(directory: Path) -> Callable:
        return lambda: (on_paper(directory / "run.yaml", (word,)), load_run(directory / "run.yaml", (word,)))[1]

    def taken(_out: str, run: object) -> bool:
        held = run.config.model_dump(mode="json", by_alias=True)
        for part in key.place.split("."):
            held = held[int(part) if isinstance(held, list) else part]
        given = yaml_value(text)
        chosen = given in (None, "auto") and key.place in ("model.vocab_size", "train.micro_batch_size")
        return chosen or (held == given and isinstance(held, bool) == isinstance(given, bool))

    word = f"{key.place}={text}"

    def run(directory: Path) -> Outcome:
        write(directory, {})
        return judged(read(directory), taken)

    return Case("any value", word, run, EITHER)


def wrong_section(rng: Random) -> Case:
    """Something else where a section or a list of them was."""
    word = f"{rng.choice(sections())}={rng.choice(['[1]', 'x', 'true', '[[]]', '2024-01-01', '[x, y]', '[{}]'])}"
    return case("wrong section", word, word)


def absurd_number(rng: Random) -> Case:
    """A number that is finite and no size of anything."""
    key = rng.choice([k for k in keys() if "number" in k.type])
    number = rng.choice(
        ["1" + "0" * 400, "1" + "0" * 30, "1e300", "1e308", "-1e300", str(-(10**30)), str(2**64), "5e-324"]
    )
    share = any(words in key.type for words in ("from 0 to 1", "less than 1", "at most 1", "at least 0"))
    word = f"{key.place}={number}"
    return case("absurd number", word, word, expected=EITHER if share and number == "5e-324" else ("refused",))


def absurd_together(rng: Random) -> Case:
    """Numbers that each may be, and not together."""
    name, *words = rng.choice([
        ("lr", "curriculum.lr_scale=1e9", "curriculum.stages.0.lr=1"),
        ("steps", "curriculum.scale=1e9", "curriculum.stages.0.steps=1000000000"),
        ("batch", "curriculum.global_batch_size=2147483647", "curriculum.stages.1.steps=281474976710656"),
        ("tokens", "curriculum.stages.0={name: a, tokens: 1000000000000000000, lr: 1, sources: {text-a: 1}}"),
        ("weights", "curriculum.stages.0.sources={text-a: 1e300, text-b: 1e300}"),
        ("weights", "curriculum.stages.0.sources={" + ", ".join(f"s{i}: 1e308" for i in range(20)) + "}"),
        ("bind", "curriculum.bind={text*: {" + ", ".join(f"s{i}: 1e308" for i in range(20)) + "}}"),
        ("heads", "model.d_model=1048576", "model.n_heads=1048575"),
    ])  # fmt: skip
    return case("absurd together", name, *words)


# ------------------------------------------------------------------------------------------------------ YAML

TEXTS = [
    "0x_", "0b_", "!!int x", "!!int 1.5", "!!int ''", "!!float x", "!!float ''", "!!bool maybe", "!!null x",
    "!!set {a}",
    "!!binary aGk=", "!!omap [a: 1]", "!!pairs [a: 1]", "!!python/name:os.system",
    "!!python/object/apply:os.system [x]",
    "9" * 5000, "-" + "9" * 101, "1e400", "1e-400", "0.000e400x: 1: 2", "010", "-010", "1:30", "190:20:30", "1:30.5",
    '"\\0"', '"a\\0b"', '"\\ud800"', '"\\U00110000"', '"\\q"', "*nope", "&a [*a]", "&a {k: *a}", "{a: 1, a: 2}",
    "{? [a] : b}", "{'': 1}", "{\"a\\0\": 1}", "[1, 2", "{a: 1", "'x", '"x', "@x", "`x`", "%x", "!<tag:x> y", "<<",
    "=",
    "!!timestamp [1]", "!!str [1]", "!!map [1]", "!!seq {a: 1}", "{<<: 1}", "{<<: [1]}", "{<<: *nope}", ".inf",
    ".nan",
    "a: b: c", "- - - x", "[a]]", "\x01", "\x7f", "{!!int 1: 2, !!python/x y: 3}", "&a &b x", "!!float 0x10", "- x",
]  # fmt: skip


def hostile_text(rng: Random) -> Case:
    """A YAML value that is not what it says, or that no reader should take: in the file, or in an override."""
    text = rng.choice(TEXTS)
    if rng.random() < 0.5:
        return case("hostile text", text, f"provenance.note={text}")
    return case("hostile text", text, files={"run.yaml": RUN.replace("note: mine", f"note: mine, more: {text}")})


def deep(rng: Random) -> Case:
    """Levels upon levels, of every bracket there is, and by way of aliases."""
    levels = rng.choice([33, 40, 90, 200, 300, 900, 3000, 20000])
    opening = rng.choice(["[", "{a: ", "[{a: ", "- ", "? ", "a:\n"])
    if opening == "a:\n":
        text = "".join(f"{' ' * i}a:\n" for i in range(min(levels, 900)))
    else:
        text = opening * levels + rng.choice(["", "x"])
    chain = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 60))])
    shape = rng.choice(["file", "override", "extended", "aliases"])
    if shape == "override":
        return case("deep", f"{opening} x {levels}, override", f"provenance={text}")
    file = "base.yaml" if shape == "extended" else "run.yaml"
    content = chain if shape == "aliases" else text if opening in ("- ", "? ", "a:\n") else f"provenance: {text}"
    return case("deep", f"{opening!r} x {levels}, {shape}", files={file: content})


def laughs(rng: Random) -> Case:
    """Aliases of aliases: a small text that stands for a large value."""
    width, levels = rng.randint(2, 12), rng.randint(16, 60)
    item = rng.choice(["[{}]", "{{{}}}"])

    def items(i: int) -> str:
        words = [f"*a{i - 1}" if i else "x"] * width
        return ", ".join(words if item == "[{}]" else (f"k{n}: {word}" for n, word in enumerate(words)))

    lines = [f"a{i}: &a{i} {item.format(items(i))}" for i in range(levels)]
    if rng.random() < 0.3:  # in an override
        nested = "[" + ", ".join(f"&a{i} {item.format(items(i))}" for i in range(levels)) + "]"
        return case("laughs", f"{width}^{levels} override", f"provenance={nested}")
    if rng.random() < 0.3:
        lines = [f"a{i}: &a{i} {{k{i}: 1, <<: [{', '.join([f'*a{i - 1}'] * width)}]}}" if i else "a0: &a0 {x: 1}"
                 for i in range(levels)]  # fmt: skip
    return case("laughs", f"{width}^{levels}", files={"run.yaml": "\n".join(lines) + "\n" + RUN})


def large(rng: Random) -> Case:
    """A file of too many bytes or values: of the run, of what it extends, of the corpus."""
    text = rng.choice([
        "# " + "x" * (1 << 20), "\n" * (1 << 20), "x: '" + "y" * (1 << 20) + "'", "x: [" + "1, " * 60_000 + "1]",
        "".join(f"k{i}: {i}\n" for i in range(30_000)), "x:\n" + "- {a: 1}\n" * 20_000, "[" * (1 << 20),
        "- " * (1 << 19),
        "x: " + "a " * (1 << 19), "? " * (1 << 18), "&a " * 1000 + "x", "x: " + "!!str " * 9000,
    ])  # fmt: skip
    return case("large", text[:20], files={rng.choice(["run.yaml", "base.yaml", "corpus.yaml"]): text})


def hostile_key(rng: Random) -> Case:
    """Keys that are long, strange or twice there."""
    key = rng.choice([
        "k" * 257, "k" * 1000, "''", "? ", "[a]", "{a: b}", "name", "!!int 1", "!!python/x y", '"\\0"', '"a\\nb"',
        "? [a]\n",
        "*nope", "null", "~", "no", "1", "0x1", "1.5", ".nan", "2024-01-01", "<<", "=", "\U0001f4a5", "a.b",
        "extend", "MODEL",
    ])  # fmt: skip
    if len(key) > 900:
        key = f"? {key}\n"
    return case("hostile key", key, files={"run.yaml": f"{RUN}{key}: 1\n"})


def damaged(rng: Random) -> Case:
    """A file of which bytes are missing, changed or doubled: taken or refused, never worse."""
    name = rng.choice(["run.yaml", "base.yaml", "corpus.yaml"])
    content = bytearray(FILES[name].encode())
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(content))
        how = rng.randrange(8)
        if how > 3:  # a word or number becomes another
            at = rng.choice([i for i, byte in enumerate(content) if chr(byte).isalnum()] or [0])
            content[at] = ord(rng.choice("0123456789abcdefxyz_-."))
        elif how == 0:
            content = content[:at]
        elif how == 1:
            content[at] = rng.randrange(256)
        elif how == 2:
            content[at:at] = content[rng.randrange(len(content)) :][: rng.randint(1, 60)]
        else:
            del content[at : at + rng.randint(1, 30)]
        content = content or bytearray(b"\n")
    return case("damaged", f"{name} {bytes(content)[:40]!r}", files={name: bytes(content)}, expected=EITHER)


def encoded(rng: Random) -> Case:
    """A file in another encoding, or in none."""
    content = rng.choice([
        RUN.encode("utf-16"), RUN.encode("utf-32"), b"\xff\xfe", b"\x80" * 9, rng.randbytes(200), b"\0" * 100, b"",
        b"%PDF-1.4\n%\xe2\xe3\n", b"PK\x03\x04" + rng.randbytes(60), b"\x1f\x8b\x08" + rng.randbytes(60), b"{}",
        b"[]", b"null",
        b"3", b"x", b"---\n---\n", b"--- {}\n--- {}\n", b"%YAML 9.9\n--- {}\n",
    ])  # fmt: skip
    return case("encoded", content[:20], files={"run.yaml": content})


# -------------------------------------------------------------------------------------------- files and overrides


def extended(rng: Random) -> Case:
    """What a file extends: circles, chains, diamonds, and names that are none."""
    shape = rng.choice(["circle", "chain", "diamond", "small diamond", "wide", "name", "link", "type"])
    size = rng.randint(20, 60)
    if shape == "circle":
        size = rng.randint(1, 6)
        files = {f"f{i}.yaml": f"extends: f{(i + 1) % size}.yaml\n" for i in range(size)}
    elif shape in ("chain", "wide"):
        files = {f"f{i}.yaml": f"extends: f{i + 1}.yaml\n" for i in range(50)} | {"f50.yaml": "x: 1\n"}
        if shape == "wide":
            files["f0.yaml"] = f"extends: [{', '.join(['f50.yaml'] * 200)}]\n"
    elif shape == "diamond":
        files = {f"f{i}.yaml": f"extends: [f{i + 1}.yaml, f{i + 1}.yaml]\n" for i in range(size)}
        files[f"f{size}.yaml"] = "x: 1\n"
    elif shape == "small diamond":
        files = {f"f{i}.yaml": f"extends: [f{i + 1}.yaml, f{i + 1}.yaml]\n" for i in range(12)}
        return case("extended", shape, files=files | {"f12.yaml": "seed: 3\n", "run.yaml": _over(RUN,
        "train: {seed: 3}\n")},
                    expected=("fine",))  # fmt: skip
    elif shape == "link":
        files = {}
    else:
        name = rng.choice(
            ["nowhere", '"a\\0b"', "n" * 300, "/", "..", ".", "''", "/dev/null", "[[a]]", "{a: b}", "3", "true"]
        )
        files = {"f0.yaml": f"extends: {name if shape == 'name' else [3, name]}\n"}
    if shape == "link":

        def read(directory: Path) -> Callable:
            (directory / "f0.yaml").symlink_to("run.yaml")
            return lambda: on_paper(directory / "run.yaml")

        return case("extended", shape, files={"run.yaml": _over(RUN, "")}, read=read)
    return case("extended", f"{shape} {size}", files=files | {"run.yaml": _over(RUN, "")})


def _over(run: str, more: str) -> str:
    return run.replace("base.yaml]", "base.yaml, f0.yaml]") + more if not more else run + more


def overridden(rng: Random) -> Case:
    """Words of the command line that are no override, or too much of one."""
    words = rng.choice([
        [".".join("a" * rng.choice([33, 900, 3000])) + "=1"], ["k" * 3000 + "=1"], ["model." + "k" * 300 + "=1"],
        [f"curriculum.stages.{'9' * 5000}.steps=1"], ["curriculum.stages.-1.steps=1"],
        ["curriculum.stages.two.three.four=1"],
        ["train.seed=1"] * 300, ["train.seed=" + "1" * 5000], ["name=" + "x" * 100_000], ["=1"], ["a..b=1"],
        ["train.seed="],
        ["train.seed=[1"], ["train.seed=&a [*a]"], ["extends=demo"], ["data.corpus=\0"], ["\0=1"], ["train.\ud800=1"],
        ["name.own=1"], ["model=null"], ["curriculum.stages=null"], ["curriculum=null"], ["data=null"],
        ["curriculum.stages=[]"],
        ["train.seed=1\n2"], ["backend.parallel.dp=0"], ["backend={name: cuda, parallel: [1]}"],
        ["backend={name: [cuda]}"],
        ["backend={name: {a: b}}"], ["backend=3"], ["backend.name=null"],
        ["optimizer.betas=[" + "0.9, " * 9000 + "0.9]"],
        ["curriculum.global_batch_size=2147483646", "train.micro_batch_size=auto", "curriculum.seq_len=0"],
    ])  # fmt: skip

    def by_command(directory: Path) -> Callable:
        return command("config", directory / "run.yaml", *words)

    return case("overridden", words[0], *words, read=by_command if rng.random() < 0.5 else None)


def steps_of_a_size(rng: Random) -> Case:
    """Large sizes that a run may have are read at once."""
    words = rng.choice([
        ["curriculum.global_batch_size=2000000000", "curriculum.stages.1.steps=100000"], ["model.vocab_size=352",
        "model.d_ff=16777216"],
        ["model.d_model=1048576", "model.n_heads=32768"], ["curriculum.stages.0.steps=10000000000000"],
        ["model.max_seq_len=134217728", "curriculum.seq_len=134217728"], ["train.seed=-1"],
        ["train.seed=9223372036854775807"],
        ["curriculum.scale=1e-12"], ["curriculum.stages.0.lr=1e-20"], ["optimizer.eps=1e-30"],
        ["model.rotary_base=1e12"],
    ])  # fmt: skip
    return case("large and right", words[0], *words, expected=("fine",))


KINDS = [
    any_value, wrong_section, absurd_number, absurd_together, hostile_text, deep, laughs, large, hostile_key,
    damaged, encoded,
    extended, overridden, steps_of_a_size, hostile_name, hostile_package, hostile_recipe, hostile_path, part_of_rows,
    fim,
    hostile_sweep,
]  # fmt: skip
