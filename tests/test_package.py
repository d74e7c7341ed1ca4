"""The house: layout, import directions, and policies, read off the source."""

import ast
import os
import re
import subprocess
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCES = [p for room in ("crystal", "backends", "kernels") for p in sorted((ROOT / room).rglob("*.py"))]
SOURCES = list({p.resolve(): p for p in SOURCES}.values())

# Rooms from the ground up, and the files that lie flat in crystal/: each imports its own room and those on floors
# below, no neighbour (DESIGN §1). What is not listed fails. Rooms to come have their floor already.
FLOORS = [
    {"crystal", "crystal.errors"},
    {"crystal.files", "crystal.memory"},
    {"crystal.output"},
    {"crystal.config", "crystal.kernels", "crystal.mup"},
    {"crystal.zoo", "crystal.data"},
    {"crystal.curriculum"},
    {"crystal.backends"},
    {"crystal.run", "crystal.checkpoint"},
    {"crystal.training", "crystal.inference", "crystal.checks"},
    {"crystal.bench", "crystal.interop", "crystal.evaluation"},
    {"crystal.finetune", "crystal.analysis", "crystal.planning"},
    {"crystal.sweeps", "crystal.workspace"},
    {"crystal.release"},
    {"crystal.cli"},
    {"crystal.__main__"},
]


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2])


def floor(name: str) -> int:
    found = [i for i, names in enumerate(FLOORS) if name in names]
    assert found, f"{name}: expected a room of FLOORS"
    return found[0]


def module_of(path: Path) -> str:
    parts = path.resolve().relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "crystal" else ("crystal", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Modules of crystal that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they go"
            found.add(node.module)
            if node.module == "crystal":
                found |= {f"crystal.{alias.name}" for alias in node.names if alias.name != "__version__"}
    return {name for name in found if name.split(".")[0] == "crystal" and name != "crystal"}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_room_imports_only_rooms_below(path):
    mine = room(module_of(path))
    for imported in imports_of(path):
        other = room(imported)
        if other == mine:
            continue
        assert floor(other) < floor(mine), f"{module_of(path)} imports {imported}"
    if mine == "crystal.kernels":
        assert all(room(i) == mine for i in imports_of(path))
    if mine == "crystal.mup":
        assert all(room(i) == mine for i in imports_of(path))


def test_no_import_goes_round_in_a_circle():
    """Those inside functions count too: they would only hide it."""
    modules = {module_of(path): path for path in SOURCES}
    graph = {
        name: {other for other in imports_of(path) if other in modules and other != name}
        for name, path in modules.items()
    }
    assert graph["crystal.run"] >= {"crystal.config", "crystal.curriculum.resolve"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert listing or not (ROOT / ".git").exists()
    return listing.splitlines()


def test_the_top_level_is_as_designed_and_the_links_lead_home():
    known = """.ci .gitignore CHANGELOG.md LICENSE Makefile README.md backends benchmarks configs crystal docs kernels
               pyproject.toml requirements.lock tests""".split()
    assert {name.split("/")[0] for name in tracked()} <= set(known)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "CHANGELOG.md", "requirements.lock", ".ci/run"):
        assert (ROOT / name).is_file(), name
    for name in ("backends", "configs", "kernels"):
        link = ROOT / "crystal" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
        assert (link / "__init__.py").samefile(ROOT / name / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_files_stay_short_and_say_what_they_are(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "a module starts with what it does"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_unsafe_is_loaded(path):
    assert unsafe(path.read_text()) == []


def unsafe(text: str) -> list[str]:
    """Imports and calls that could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            found += sorted(names & {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"})
        elif isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            loader = ast.unparse(node.args[1]) if len(node.args) > 1 else given.get("Loader")
            found += [f"{key}=True" for key in ("trust_remote_code", "allow_pickle") if given.get(key) == "True"]
            if called.startswith("yaml.") and called.split(".")[1] in ("unsafe_load", "full_load", "load_all"):
                found.append(called)
            if called == "yaml.load" and loader not in ("_Loader", "yaml.SafeLoader", "yaml.CSafeLoader"):
                found.append(called)
            if called == "torch.load" and given.get("weights_only") != "True":
                found.append(called)
            if called in ("eval", "exec"):
                found.append(called)
    return found


@pytest.mark.parametrize(
    "text",
    [
        "from pickle import loads", "import os, pickle as p", "yaml.load(f)", "yaml.load(f, yaml.Loader)",
        "yaml.load(f, Loader=yaml.FullLoader)", "torch.load(Path(p), map_location='cpu')",
        "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)", "f(trust_remote_code=True)", "eval(s)",
    ],
)  # fmt: skip
def test_the_unsafe_is_seen(text):
    assert len(unsafe(text)) == 1


def test_the_safe_is_let_through():
    assert unsafe("yaml.load(f, _Loader); torch.load(p, weights_only=True); np.load(p); model.eval()") == []


def test_the_lock_pins_what_the_project_asks_for_and_names_no_place():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {re.sub(r"[-_.]+", "-", name).lower(): pin for name, pin in pins.items()}
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", pin) for pin in pins.values()), "no local builds, no addresses"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, [*wanted, *project["build-system"]["requires"], "torchvision"]):
        assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert (pins["torch"], pins["torchvision"], pins["mup"]) == ("2.14.1", "0.29.1", "1.0.0")
    assert pins["triton"].startswith("3.8.")


def test_the_package_knows_its_version():
    import crystal

    assert version("crystal-zoo") == crystal.__version__
    assert f"## {crystal.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_package_indexs_address_is_written_down():
    for name in tracked():
        path = ROOT / name
        if path.suffix in (".png",) or not path.is_file():
            continue
        text = path.read_text(errors="ignore")
        hosts = "|".join(("pypi" + r"\.org", "pytho" + r"nhosted", "npm" + r"js\.(org|com)", "index" + "-url"))
        hosts += "|--find" + "-links|/opt/" + r"(wheels|pypi)|^\S+ @ (file|https?):"
        assert not re.search(hosts, text, re.MULTILINE), name
