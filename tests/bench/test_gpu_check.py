"""benchmarks/gpu_check.sh, as far as a machine without a GPU can know it."""

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", BENCHMARKS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("part", ["machine", "noticed", "documents", "pinned", "step"])
def test_its_parts_pass_on_a_cpu(gpu_check, part):
    assert gpu_check.PARTS[part]("cpu").get("passed", True)


def test_a_layout_that_does_not_train_as_the_cpu_backend_does_is_noticed(gpu_check, monkeypatch):
    assert gpu_check.layout("cpu")["passed"]
    monkeypatch.setattr(gpu_check, "TOLERANCE", -1.0)
    assert not gpu_check.layout("cpu")["passed"]


def test_all_its_parts_together_may_take_eight_minutes_at_most():
    script = (BENCHMARKS / "gpu_check.sh").read_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    once = [int(n) for n in re.findall(r"^ *part [a-z-]+ (\d+) ", script, re.M)]
    (names,) = re.findall(r"^for name in (.*); do$", script, re.M)
    (each,) = re.findall(r'^ *part "\$name" (\d+) ', script, re.M)
    assert sum(once) + int(each) * len(names.split()) < 480


def test_a_part_that_cannot_begin_is_json_too_and_does_not_stop_the_others(tmp_path):
    words = ["bash", BENCHMARKS / "gpu_check.sh", tmp_path]
    environment = os.environ | {"PYTHON": "false", "DEVICE": "cpu"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"machine", "noticed", "documents", "pinned", "layout", "step"}
    assert all(part == {"passed": False, "exit": 1, "log": f"{name}.log"} for name, part in found.items())
