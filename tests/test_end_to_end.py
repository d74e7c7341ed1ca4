"""The main job on real text: the sample corpus through all three stages, and text out of each.

The corpus (12 Python packages, 83 MB) is fetched once with pip into the crystal cache, outside the checkout. The model
and the curriculum are the demo's, at a hundredth of its steps.
"""

import json
from pathlib import Path

import pytest
from command import crystal, crystal_process

SHORT = ("curriculum.scale=0.0001", "curriculum.min_warmup_steps=2", "train.eval_every=10", "train.eval_rows=4")


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A directory in which a short demo was trained, and the JSON that training printed."""
    cwd = tmp_path_factory.mktemp("demo")
    done = crystal_process("train", "demo", "--json", *SHORT, cwd=cwd, OMP_NUM_THREADS="2")
    if done.returncode and "not downloaded" in done.stderr:
        pytest.skip(f"the sample corpus is not in the cache and there is no package index: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return cwd, json.loads(done.stdout)


def test_real_text_goes_through_all_three_stages(demo):
    cwd, result = demo
    records = [json.loads(line) for line in (cwd / "runs" / "demo" / "metrics.jsonl").read_text().splitlines()]
    assert result["step"] == records[-1]["step"] == 32
    val = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    assert set(val[0]) == {"english", "python", "javascript", "html", "css"}
    assert 24 < val[0]["english"] < 32  # the fresh model's 28 nats
    assert val[8]["english"] < 12
    assert val[32]["python"] < 9
    assert result["peak_rss_bytes"] < 2.5e9


@pytest.mark.parametrize(("stage", "prompt"), [(1, "The President of the"), (2, "def "), (3, "<div class=")])
def test_every_stage_writes_text(demo, stage, prompt):
    cwd, _ = demo
    words = ("generate", "runs/demo", "--stage", str(stage), "--prompt", prompt, "--max-new-tokens", "8", "--json")
    done = crystal_process(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout)["text"], str)
    again = crystal(*words, cwd=cwd)
    assert again.stdout == done.stdout


def test_the_documents_of_the_readme_are_true(demo, tmp_path):
    """Every `crystal …` line in the README's and the docs' sh blocks runs, where runs/demo is the short demo.

    The pages that need other files than it have are tried elsewhere, in test_docs_commands.py and test_init.py.
    """
    cwd, _ = demo
    root = Path(__file__).parents[1]
    commands = []
    pages = {root / "README.md", *(root / "docs").glob("*.md")} - {
        root / "docs" / name for name in ("commands.md", "own-data.md")
    }
    for page in sorted(pages):
        for block in page.read_text().split("```python\n")[1:]:
            first = block.partition("\n")[0].partition("# ")[2]
            if first.endswith(".py"):  # a file that the page's commands read
                (Path(cwd) / first).write_text(block.split("```")[0])
        for block in page.read_text().split("```sh\n")[1:]:
            lines = (line.split("#")[0].strip() for line in block.split("```")[0].splitlines())
            commands += [line for line in lines if line.startswith("crystal ")]
    assert len(commands) > 10
    import shlex

    for command in commands:
        words = shlex.split(command)[1:]
        if words[:2] == ["train", "demo"] and "--dry-run" not in words:
            continue  # the same command, with other numbers, made the fixture
        done = crystal(*words, cwd=cwd)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
