"""What is meant for our interpreter does not reach the one of Cerebras' environment, in set-up or at work."""

import os
import sys

import pytest

from crystal.backends.cerebras import environment
from crystal.errors import ConfigError, RunError

OURS = {
    "PYTHONHOME": "/nowhere", "PYTHONPATH": "/nowhere/site-packages", "PYTHONSTARTUP": "x.py",
    "PYTHONWARNINGS": "error", "PYTHONOPTIMIZE": "2", "PYTHONMALLOC": "debug",
    "VIRTUAL_ENV": "/nowhere", "VIRTUAL_ENV_PROMPT": "x",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _ours(monkeypatch):
    for name, value in OURS.items():
        monkeypatch.setenv(name, value)


def test_the_worker_is_given_its_own(tmp_path):
    given = environment.process_environment(tmp_path / "cerebras", tmp_path / "package")
    assert {name: value for name, value in given.items() if name.startswith(("PYTHON", "VIRTUAL_ENV"))} == {
        "PYTHONPATH": str(tmp_path / "package"), "PYTHONNOUSERSITE": "1"
    }  # fmt: skip
    assert given["PATH"].startswith(str(tmp_path / "cerebras" / "bin") + os.pathsep)
    assert given["HOME"] == os.environ["HOME"]


def test_set_up_starts_interpreters_that_pythonhome_would_keep_from_starting(tmp_path):
    environment._run([sys.executable, "-c", "import json"], "json")
    if sys.version_info[:2] == (3, 11):
        assert environment._checked_python(sys.executable) == sys.executable
    else:
        with pytest.raises(ConfigError, match=r"expected Python 3\.11"):
            environment._checked_python(sys.executable)
    with pytest.raises(RunError, match="cerebras setup: no module failed: ModuleNotFoundError"):
        environment._run([sys.executable, "-c", "import no_such_module"], "no module")
