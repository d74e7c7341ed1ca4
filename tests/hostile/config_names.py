"""Hostile names, packages, paths, row ranges, FIM and sweeps: see hostile.configs."""

import json
from random import Random

import yaml
from hostile.case import Case
from hostile.config_case import CORPUS, EITHER, case

from crystal.data.corpus.build import load_recipe
from crystal.sweeps.sweep import load_sweep

NAMES = [".", "..", "...", "-rf", "--help", ".hidden", "manifest.json", "tokenizer.json", "tokenizer.model",
    "Manifest.JSON",
         "a/b", "/abs", "../up", "a\\b", "", "x" * 101, "x" * 5000, "\u00e9" * 60, "a b", "a\nb", "a:b", "*", "~",
         "$HOME", "\U0001f4a5"]  # fmt: skip


def hostile_name(rng: Random) -> Case:
    """Names of runs, recipes, sources and sweeps that are paths, options, or files that lie there already."""
    name, what = rng.choice(NAMES), rng.choice(["run", "recipe", "source", "sweep"])
    quoted = json.dumps(name)
    if what == "run":
        return case("hostile name", f"run {name}", f"name={quoted}")
    if what == "recipe":
        return case(
            "hostile name", f"recipe {name}", files={"corpus.yaml": CORPUS.replace("name: tiny", f"name: {quoted}")}
        )
    if what == "source":
        return case(
            "hostile name", f"source {name}", files={"corpus.yaml": CORPUS.replace("english:", f"{quoted}:", 1)}
        )
    return sweep_case("hostile name", f"name={quoted}")


PACKAGES = ["npm:-x@1", "npm:--registry=x@1", "npm:@-x/y@1", "npm:@x/-y@1", "npm:..@1", "npm:.@1", "npm:./x@1",
    "npm:../x@1", "npm:x@-1",
            "npm:x@../y", "npm:x@file:y", "npm:x@git+ssh://y", "npm:x", "pypi:-x==1", "pypi:--index" "-url==1",
            "pypi:x", "pypi:x==", "pypi:x>=1",
            "pypi:x==1 --index" "-url y", "pypi:x @ " "file:///y", "pypi:../x==1", "pypi:x==1;y", "deb:-x", "deb:--x=1",
            "deb:x y", "deb:x=1 y",
            "deb:../x", "deb:/x", "git:x", "", "pypi:", "npm:\u00e9@1", "pypi:x==\u0661", "npm:x@1\n--y",
            "pypi:" + "x" * 300 + "==1"]  # fmt: skip


def hostile_package(rng: Random) -> Case:
    """Names of packages that their clients would take for options, paths or addresses."""
    package = rng.choice(PACKAGES)
    files = {"corpus.yaml": CORPUS.replace('"pypi:six==1.16.0"', json.dumps(package))}
    return case("hostile package", package, files=files)


def hostile_recipe(rng: Random) -> Case:
    """A recipe's own keys: expressions that do not compile, or compile too much."""
    key, value = rng.choice([
        *(("include", text) for text in ("(", "[", "*", "(?P<a>x)(?P<a>y)", "a{99999999999}", "(" * 5000, "x" * 5000,
        "(?<=a+)b", "\\", "(?z)")),
        ("exclude", "("), ("start", "["), ("max_bytes", 0), ("max_bytes", -1), ("max_bytes", 10**30), ("sha256", "x"),
        ("sha256", "0" * 63), ("files", "x"), ("files", ""), ("where", {"a": 1}), ("license", ""), ("extract", "x"),
        ("text_key", "x"),
    ])  # fmt: skip
    recipe = yaml.safe_load(CORPUS)
    recipe["sources"]["python"]["entries"][0][key] = value
    return case("hostile recipe", f"{key} {value}", files={"corpus.yaml": yaml.safe_dump(recipe)})


def hostile_path(rng: Random) -> Case:
    """Paths that no file system has."""
    key = rng.choice(
        ["data.corpus", "data.dir", "run_dir", "data.tokenizer", "train.evaluate.items", "backend", "files"]
    )
    path = rng.choice(['"a\\0b"', '"\\0"', '"\\ud800"', "x" * 300, "d/" + "y" * 256 + "/z", json.dumps("\u00e9" * 128)])
    if key == "files":
        text = f"name: tiny\nsources: {{english: {{entries: [{{files: {path}, license: MIT}}]}}}}\n"
        expected = (
            ("refused",) if "\\0" in path or "ud800" in path else EITHER
        )  # which files there are is looked for later
        read = lambda directory: lambda: load_recipe(directory / "corpus.yaml")  # noqa: E731
        return case("hostile path", f"{key} {path}", files={"corpus.yaml": text}, expected=expected, read=read)
    word = {
        "data.tokenizer": f"data.tokenizer={{path: {path}}}",
        "backend": f"backend={{name: weight_streaming, path: {path}}}",
    }.get(key, f"{key}={path}")
    return case("hostile path", word, word)


def part_of_rows(rng: Random) -> Case:
    """Row ranges, in a subset or behind a source's name."""
    text = rng.choice(["0-1e999999999", "1e9999999-1", "0-1/0", "0.5-0.1", "0-2", "-1-1", "x", "", "0", "0-0",
    "1_0-1", "0-" + "9" * 5000,
                       "0-0." + "1" * 5000, "nan-1", "0-inf", "0 - 1 - 1", "\u0661-1"])  # fmt: skip
    if rng.random() < 0.5:
        return case("part of rows", text, f"curriculum.stages.1.sources.text-b.subset={json.dumps(text)}")
    return case("part of rows", text, f"curriculum.bind.code={json.dumps(f'python[{text}]')}")


# ------------------------------------------------------------------------------------------------ FIM and sweeps


def fim(rng: Random) -> Case:
    """FIM in any stage with a vocabulary that has no tokens for it."""
    stage = rng.randrange(2)
    words = ["data.tokenizer.added_tokens=false", "model.vocab_size=auto", "curriculum.stages.1.fim.rate=0"]
    if rng.random() < 0.5:
        words.append(f"curriculum.stages.{stage}.fim={{rate: {rng.choice(['1e-6', '0.5', '1'])}}}")
    else:
        source = ("text-a", rng.choice(["text-b", "code"]))[stage]
        weight = {"text-a": 1, "text-b": 0.25, "code": 0.75}[source]
        words.append(f"curriculum.stages.{stage}.sources.{source}={{weight: {weight}, fim: 0.5}}")
    fine = rng.random() < 0.3
    return case(
        "FIM",
        words[-1] if not fine else "none",
        *(words[:-1] if fine else words),
        expected=("fine",) if fine else ("refused",),
    )


def sweep_case(kind: str, *words: str, expected=("refused",)) -> Case:
    read = lambda directory: lambda: load_sweep(str(directory / "sweep.yaml"), words, directory / "out")  # noqa: E731
    return case(kind, words[0], expected=expected, read=read)


def hostile_sweep(rng: Random) -> Case:
    """Sweeps of more trials than there is time for, or over values that no run may have."""
    return sweep_case("hostile sweep", rng.choice([
        "search.lr={log2: [-1e300, 1e300]}", "search.lr={log2: [0, 1e9]}", "search.lr={log2: [-8, -4], step: 5e-324}",
        "search.lr={log2: [-50, 50], step: 1e-9}", "search.lr={values: [1e300]}", "search.lr={values: [5e-324]}",
        "search.lr={log2: [-8, 20]}", "search.init_std={values: [1e15]}", "search.weight_decay={log2: [0, 15]}",
        "search.output_alpha={log2: [-50, 0]}", "widths=[1048577]", "widths=[0]",
        f"widths={[32 * i for i in range(1, 9000)]}",
        f"depths={[*range(1, 1200)]}", f"seeds={[*range(20_000)]}", "steps=1" + "0" * 30, "steps=0",
        "base_d_model=1" + "0" * 30,
        "eval_rows=1" + "0" * 30, "widths=[]", "seeds=[]", "search={}", "search=[1]", "search.lr=[1]",
        "family=nowhere", "run=nowhere.yaml",
        "sampler=random", "set={a: [1]}", "set={model.d_modle: 3}", "model={init_std: 1e300}", "model={d_model: 3}",
        "target=[1]",
        "seeds=[1" + "0" * 30 + "]", "stage=0", "max_shift=1e300", "warmup_fraction=2",
        "set={" + ", ".join(f"a{i}: 1" for i in range(300)) + "}",
    ]))  # fmt: skip
