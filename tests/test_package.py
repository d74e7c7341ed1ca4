"""The house: layout, import directions, and policies, read off the source."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for room in ("crystal", "backends", "kernels") for p in sorted((ROOT / room).rglob("*.py"))]
SOURCES = list({p.resolve(): p for p in SOURCES}.values())

# Rooms from the ground up; a module may import its own room and those below it (DESIGN §1).
FLOORS = [
    {"crystal", "crystal.config", "crystal.files", "crystal.schedule", "crystal.kernels"},
    {"crystal.mup"},
    {"crystal.zoo", "crystal.data"},
    {"crystal.curriculum"},
    {"crystal.backends"},
    {"crystal.run"},
    {"crystal.training"},
]


def room(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2])


def floor(name: str) -> int:
    return next((i for i, names in enumerate(FLOORS) if name in names), len(FLOORS))


def module_of(path: Path) -> str:
    parts = path.resolve().relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "crystal" else ("crystal", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "crystal":
                found |= {f"crystal.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "crystal" and name != "crystal"}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_room_imports_only_rooms_below(path):
    mine = room(module_of(path))
    for imported in imports_of(path):
        other = room(imported)
        if other == mine:
            continue
        assert floor(other) < floor(mine) or floor(mine) == len(FLOORS), f"{module_of(path)} imports {imported}"
    if mine == "crystal.kernels":
        assert all(room(i) == mine for i in imports_of(path))
    if mine == "crystal.mup":
        assert all(room(i) == mine for i in imports_of(path))


def test_the_top_level_is_as_designed_and_the_links_lead_home():
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
    text = path.read_text()
    assert not re.search(r"\bimport pickle\b|\bpickle\.|trust_remote_code\s*=\s*True|allow_pickle\s*=\s*True", text)
    assert not re.search(r"yaml\.(unsafe_load|full_load|load\((?!.*_Loader))", text)
    assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", text))


def test_no_package_indexs_address_is_written_down():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    assert tracked or not (ROOT / ".git").exists()
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".png",) or not path.is_file():
            continue
        text = path.read_text(errors="ignore")
        hosts = "|".join(("pypi" + r"\.org", "pytho" + r"nhosted", "npm" + r"js\.(org|com)", "index" + "-url"))
        assert not re.search(hosts, text), name
