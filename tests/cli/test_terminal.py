"""Every command that draws, in a real terminal: wide, narrow, dumb, resized, and interrupted in each phase."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from terminal import ESCAPE, LEFT, Terminal

from crystal.output.printable import printable, printable_line
from crystal.output.progress import Bar, restore

UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
STEP = "crystal.backends.cpu.CpuBackend.train_step"
NO_PLOT = {"crystal.training.plots.plot_losses": False}
ESCAPES = "\x1b]0;title\x07 \x1b[31mred \x9b2J \u202eback \u2066x\x7f"
SWEEP = {
    "name": "tiny", "family": "amber", "parametrization": "mup", "base_d_model": 32, "widths": [32, 64],
    "depths": [1], "steps": 3, "eval_rows": 2, "seeds": [1], "search": {"lr": {"log2": [-8.0, -4.0], "step": 2.0}},
}  # fmt: skip


@pytest.fixture
def run(make_run, tmp_path):
    """A run file whose token store is there."""
    from crystal.run import load_run, prepare_run

    path = make_run()
    prepare_run(load_run(path))
    return path


@pytest.fixture
def terminal(tmp_path):
    """terminal(*words, columns=80, slow={…}, VARIABLE=…) → a command running in a terminal."""
    opened = []

    def start(*words, **how):
        opened.append(Terminal(tmp_path, *words, **how))
        return opened[-1]

    yield start
    for each in opened:
        each.__exit__()


def interrupted(term: Terminal, typed: bool = False) -> None:
    """Ctrl-C, typed now or before: exit 130, one line, nothing left behind."""
    before = len(term.output)
    if not typed:
        term.type(b"\x03")
    assert term.ended() == 130, term.output
    assert term.lines[-1] == "crystal: interrupted", term.output
    assert term.output.count("crystal:") == 1, term.output
    assert "rror" not in term.output[before:], term.output


# ------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("columns", [80, 40])
def test_train_draws_one_line_that_fits(terminal, run, columns):
    term = terminal("train", run, columns=columns, slow=NO_PLOT | {STEP: 0.03})
    assert term.ended() == 0
    assert len(term.counts) > 5
    assert any(LEFT.search(frame) for frame in term.frames)
    assert any(re.match(r"stage \d \w+.* \d+/30 ", frame) for frame in term.frames)
    assert all(cell_len(frame) < columns for frame in term.frames)
    assert sum("30/30" in line for line in term.lines) == 1, "the bar is drawn in one place"
    assert any("step 30  validation  english" in line for line in term.lines)


def test_a_window_that_is_resized_keeps_one_bar(terminal, run):
    term = terminal("train", run, slow=NO_PLOT | {STEP: 0.08})
    for columns in (40, 23, 100):
        shown = len(term.counts)
        term.until(lambda t, shown=shown: len(t.counts) > shown + 2)
        term.resize(columns)
        before = len(term.frames)
        term.until(lambda t, before=before: len(t.frames) > before + 3)
        assert all(cell_len(frame) < columns for frame in term.frames[before + 2 :])
    assert term.ended() == 0
    assert sum("30/30" in line for line in term.lines) == 1


def test_a_terminal_that_cannot_redraw_gets_lines_with_time_left(terminal, run):
    term = terminal("train", run, "--until", "20", TERM="dumb", slow=NO_PLOT | {STEP: 0.03})
    assert term.ended() == 0
    assert "\x1b" not in term.output
    told = [line for line in term.lines if re.search(r"stage 1 english: step \d+/20  loss", line)]
    assert len(told) > 5
    assert LEFT.search(told[-1])


def test_without_color_nothing_is_colored(terminal, run):
    term = terminal("train", run, "--until", "20", NO_COLOR="1", slow=NO_PLOT | {STEP: 0.03})
    assert term.ended() == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", term.output)
    assert len(term.counts) > 5


def test_names_print_as_they_are_and_are_cut_to_the_window(terminal, make_run, corpus):
    names = ["[/red]x :smile:", "漢字" * 30, "\x1b[31m" + "w" * 60]
    path = make_run()
    content = yaml.safe_load(path.read_text())
    for stage, name in zip(content["curriculum"]["stages"], names, strict=True):
        stage["name"] = name
    path.write_text(yaml.safe_dump(content))
    for columns in (80, 40):
        term = terminal("train", path, f"run_dir=run-{columns}", columns=columns, slow=NO_PLOT)
        assert term.ended() == 0
        assert "\x1b[31m" not in term.output
        assert all(cell_len(frame) < columns for frame in term.frames)
        said = "".join(line.ljust(columns) for line in term.lines)
        assert "stage 1 [/red]x :smile:: step 10  validation" in said
        assert "stage 3 \\x1b[31mwwww" in said


def test_preparing_shows_each_phase(terminal, make_run, tmp_path):
    changes = {"data.dir": str(tmp_path / "stores"), "data.tokenizer.train.bytes_per_source": 19999}
    slow = {
        "crystal.data.corpus.packages._remembered": 0.1, "crystal.data.pack.hash_fraction": 0.002,
        "crystal.data.pack.windows": 0.1,
    }  # fmt: skip
    phases = "hashing the", "sampling python", "training the tok", "python: tok", "python: pack"
    for columns in (80, 40):
        cache = str(tmp_path / f"cache-{columns}")
        path = make_run(**changes | {"data.dir": str(tmp_path / f"stores-{columns}")})
        term = terminal("prepare", path, columns=columns, slow=slow, CRYSTAL_CACHE=cache)
        assert term.ended() == 0
        assert [phase for phase in phases if not any(frame.startswith(phase) for frame in term.frames)] == []
        assert any(re.search(r"^sampling .* [\d,]+ documents .*\d:\d\d left", frame) for frame in term.frames)
        assert all(cell_len(frame) < columns for frame in term.frames)
        assert not any("tokenizing" in line for line in term.lines), "a finished phase leaves no line"


def test_transfer_shows_trials(terminal, run, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**SWEEP, "run": str(run)}))
    term = terminal("transfer", "tiny.yaml", columns=40)
    assert term.ended() in (0, 1), term.output
    assert term.counts[-1] == "6"
    assert all(cell_len(frame) < 40 for frame in term.frames)


def test_coord_check_shows_models(terminal):
    sizes = ("--widths", "32,64,96", "--seeds", "2", "--parametrization", "mup")
    for columns in (80, 40):
        term = terminal("coord-check", "amber", *sizes, columns=columns, slow={"crystal.mup.coord_check.measure": 0.15})
        assert term.ended() in (0, 1), term.output
        assert len(term.counts) > 2
        assert any(re.match(r"size \d+, seed \d.* \d/6 .*\d:\d\d left", frame) for frame in term.frames)
        assert all(cell_len(frame) < columns for frame in term.frames)


def test_in_a_file_a_line_is_one_line(terminal, run, tmp_path):
    """As a log: no escape sequences, nothing broken at 80 columns, nothing replaced."""
    content = yaml.safe_load(run.read_text())
    content["curriculum"]["stages"][0]["name"] = long = "x" * 100 + ":smile:[bold]"
    run.write_text(yaml.safe_dump(content))
    term = terminal("train", run, "--until", "5", slow=NO_PLOT, into={2: tmp_path / "log"})
    assert term.ended() == 0
    said = (tmp_path / "log").read_text()
    assert "\x1b" not in said
    assert any(line.startswith(f"stage 1 {long}: step 5  validation  english") for line in said.splitlines())
    assert any(line.startswith(f"stage 1 {long}: step 4/5  loss") for line in said.splitlines())


TEXT = st.text(st.characters(codec=None) | st.sampled_from("漢[]/:\x1b\x9b\u202e\n\t"))


@given(TEXT, st.integers(20, 200), st.integers(0, 10**6), st.integers(1, 10**6), TEXT)
def test_a_line_of_progress_fits_whatever_it_is_called(what, room, completed, total, numbers):
    bar = Bar(None, what, total)
    bar.numbers = numbers
    bar.reach(min(completed, total))
    line = bar.line(room).plain
    assert cell_len(line) <= room
    assert not UNSAFE.search(line)
    if room >= 39:
        assert f" {bar.completed:,}/{total:,} " in f" {line} "
        assert re.search(r" (\d+:\d\d|-:--)( left)?$", line)


@given(TEXT)
def test_printable_text_holds_nothing_that_a_terminal_obeys(text):
    assert not UNSAFE.search(printable(text).replace("\n", "").replace("\t", ""))
    assert not UNSAFE.search(printable_line(text))
    safe = UNSAFE.sub("", text)
    assert printable_line(safe) == safe
    printable(text).encode("utf-8")


# ---------------------------------------------------------------------------------------- control characters


@pytest.fixture
def hostile(make_run, tmp_path, monkeypatch):
    """A run on documents that hold escape sequences, from a file whose name does too."""
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path / "cache"))
    path = make_run(**{"data.corpus": str(tmp_path / "hostile.yaml"), "data.dir": str(tmp_path / "stores")})
    sources = {}
    for source in ("english", "python", "html"):
        folder = tmp_path / source
        folder.mkdir()
        texts = [f"{source} {i}\t{ESCAPES}\nand {i * 7} more of it, {source * 20}" for i in range(200)]
        rows = [json.dumps({"text": text}) for text in texts]
        (folder / "a\x1b[31m\nb.jsonl").write_text("\n".join(rows))
        sources[source] = {"entries": [{"files": source, "license": "CC0-1.0"}]}
    (tmp_path / "hostile.yaml").write_text(yaml.safe_dump({"name": "hostile", "sources": sources}))
    return path


def test_what_documents_hold_is_shown_escaped(terminal, hostile):
    for words in (("show", "--step", "3"), ("where", "--step", "3"), ("stats",)):
        term = terminal("data", words[0], hostile, *words[1:])
        assert term.ended() == 0, term.output
        text = ESCAPE.sub("", term.output[term.output.rfind("\x1b[2K") + 4 :])
        assert not UNSAFE.search(re.sub(r"\r\n|\t", "", text))
        if words[0] == "show":
            assert "\\x1b]0;title\\x07 \\x1b[31mred" in text
            assert "\t" in text
        if words[0] == "where":
            assert "a\\x1b[31m\\nb.jsonl:" in text


def test_json_stays_exact(terminal, hostile, tmp_path):
    assert terminal("data", "show", hostile, "--step", "3", "--json", into={1: tmp_path / "out"}).ended() == 0
    rows = json.loads((tmp_path / "out").read_text())["rows"]
    assert "\x1b]0;title\x07 \x1b[31mred" in "".join(row["text"] for row in rows)


def test_a_message_that_quotes_a_name_quotes_it_escaped(terminal):
    term = terminal("train", "x\x1b[2J\u202e\n.yaml")
    assert term.ended() == 2
    assert term.lines == ["crystal: x\\x1b[2J\\u202e\\n.yaml: no such file"]


def test_generated_text_is_escaped_on_a_terminal_and_raw_in_a_pipe(terminal, run, tmp_path):
    assert terminal("train", run, "--until", "1", slow=NO_PLOT).ended() == 0
    words = ("generate", "run", "--prompt", "a\x1b[31mb", "--max-new-tokens", "1")
    term = terminal(*words)
    assert term.ended() == 0
    assert term.output.startswith("a\\x1b[31mb")
    assert terminal(*words, into={1: tmp_path / "out"}).ended() == 0
    assert (tmp_path / "out").read_text().startswith("a\x1b[31mb")


# ---------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_while_packages_are_fetched(terminal, make_run, tmp_path):
    """The clients are ended with all that they started, and nothing of what they brought is left."""
    (tmp_path / "bin").mkdir()
    client = tmp_path / "bin" / "npm"
    client.write_text("#!/bin/sh\necho half > half.tgz\ntrap '' INT\nsleep 99 &\nsleep 99\n")
    client.chmod(0o755)
    entries = [{"package": f"npm:p{i}@1", "include": ".", "license": "MIT"} for i in range(6)]
    (tmp_path / "npm.yaml").write_text(yaml.safe_dump({"name": "npm", "sources": {"english": {"entries": entries}}}))
    path = make_run(**{"data.corpus": str(tmp_path / "npm.yaml"), "curriculum.bind": {"*": "english"}})
    cache = tmp_path / "cache"
    settings = {"CRYSTAL_CACHE": str(cache), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    term = terminal("prepare", path, columns=40, **settings)
    term.until(lambda t: len(list(cache.rglob("half.tgz"))) == 4 and t.frames)
    interrupted(term)
    assert any(frame.startswith("fetching packag") and " 0/6 " in frame for frame in term.frames), term.frames
    assert not list((cache / "packages" / "npm").iterdir())


def wheel(cache: Path) -> None:
    folder = cache / "packages" / "pypi" / "toy==1"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "toy-1-py3-none-any.whl", "w") as archive:
        for i in range(60):
            archive.writestr(f"toy/m{i}.py", f"def f{i}(x):\n    return x + {i}\n" * 20 + f"VALUE_{i} = {i * 7}\n" * 8)


PREPARING = {
    "extracting": "crystal.data.corpus.filters.good",
    "sampling": "crystal.data.pack.hash_fraction",
    "training the tokenizer": None,
    "tokenizing": "crystal.data.tokenizer.Tokenizer.encode_many",
    "packing": "crystal.data.pack.windows",
    "english": "crystal.data.prepare._Build.seal",
}


def test_ctrl_c_in_each_phase_of_preparing(terminal, make_run, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    wheel(cache)
    entry = {"package": "pypi:toy==1", "include": "py$", "license": "MIT"}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({"name": "toy", "sources": {"english": {"entries": [entry]}}}))
    path = make_run(**{
        "data.corpus": str(tmp_path / "toy.yaml"), "data.dir": str(tmp_path / "stores"),
        "data.tokenizer.train.vocab_size": 300, "curriculum.bind": {"*": "english"},
    })  # fmt: skip
    trainer = tmp_path / "trainer.py"
    trainer.write_text(
        "import sys, time\nsys.stdin.buffer.read()\n"
        "for i in range(900): print(f'Alphabet size=10' if not i else f'merges={i % 30}', file=sys.stderr, flush=True)"
        " or time.sleep(0.1)\n"
    )
    for phase, function in PREPARING.items():
        slow = {function: None} if function else {"crystal.data.tokenizer._TRAINER": trainer}
        term = terminal("prepare", path, slow=slow, CRYSTAL_CACHE=str(cache))
        if function is None:
            term.until(lambda t: len(t.counts) > 3)
            assert re.search(r"training the tokenizer .* \d+/31 ", term.frames[-1])
        else:
            term.until(lambda t, phase=phase: t.stuck and any(phase in frame for frame in t.frames))
        interrupted(term)
        left = [p for p in (*cache.rglob("*"), *(tmp_path / "stores").rglob("*")) if "partial" in p.name]
        assert left == [], phase
    term = terminal("prepare", path, CRYSTAL_CACHE=str(cache))
    assert term.ended() == 0, term.output


BUILDING = {
    "crystal.training.start.prepare_run": "",
    "crystal.training.loop.create": "building the model",
    "crystal.backends.cpu.CpuBackend.initialise": "initializing the weights",
}


def test_ctrl_c_before_the_first_step_leaves_a_run_that_can_be_started(terminal, run):
    for function, shown in BUILDING.items():
        term = terminal("train", run, slow={function: None})
        term.until(lambda t, shown=shown: t.stuck and any(frame.startswith(shown) for frame in ["", *t.frames]))
        interrupted(term)
    term = terminal("train", run, slow=NO_PLOT | {"crystal.backends.cpu.CpuBackend.eval_step": None})
    term.until(lambda t: t.stuck)
    term.type(b"\x03")
    stopping(term)
    assert term.ended() == 130
    assert term.lines[-1] == "SIGINT: stopped after step 0; the same command continues"
    term = terminal("train", run, "--until", "2", slow=NO_PLOT)
    assert term.ended() == 0
    assert "continuing" not in term.output


def stopping(term: Terminal) -> None:
    """The signal was heard: let training go on."""
    term.until(lambda t: any(frame.startswith("stopping after this step") for frame in t.frames))
    term.release()


def test_ctrl_c_while_training_saves_and_says_so_last(terminal, run, tmp_path):
    term = terminal("train", run, slow=NO_PLOT | {STEP: None})
    term.until(lambda t: t.stuck)
    term.type(b"\x03")
    stopping(term)
    assert term.ended() == 130
    assert term.lines[-1] == "SIGINT: stopped after step 1, saved; the same command continues"
    assert (tmp_path / "run" / "checkpoints" / "step-0000001" / "checkpoint.json").is_file()
    term = terminal("train", run, "--until", "2", slow=NO_PLOT)
    assert term.ended() == 0
    assert term.lines[0] == "continuing from step 1"


def test_ctrl_c_twice_while_training_ends_at_once(terminal, run):
    term = terminal("train", run, slow={STEP: None})
    term.until(lambda t: t.stuck)
    term.type(b"\x03")
    term.until(lambda t: any(frame.startswith("stopping after this step") for frame in t.frames))
    interrupted(term)
    assert terminal("train", run, "--until", "1", slow=NO_PLOT).ended() == 0


def test_ctrl_c_while_a_checkpoint_is_written_or_the_plot_drawn_leaves_both_whole(terminal, run, tmp_path):
    term = terminal("train", run, "--until", "1", slow=NO_PLOT | {"crystal.checkpoint.save_file": None})
    term.until(lambda t: t.stuck and any(frame.startswith("saving step-0000001") for frame in t.frames))
    term.type(b"\x03")
    stopping(term)
    assert term.ended() == 130
    assert term.lines[-1] == "SIGINT: stopped after step 1, saved; the same command continues"
    assert (tmp_path / "run" / "checkpoints" / "step-0000001" / "checkpoint.json").is_file()
    term = terminal("train", run, "--until", "2", slow={"crystal.training.plots.plot_losses": None})
    term.until(lambda t: any(frame.startswith("drawing loss.png") for frame in t.frames))
    term.type(b"\x03")
    term.release()
    interrupted(term, typed=True)
    assert (tmp_path / "run" / "loss.png").read_bytes().endswith(b"IEND\xaeB`\x82")


def test_ctrl_c_during_a_sweep_ends_its_workers(terminal, run, tmp_path):
    """First while they import torch, then at their trials; the same command goes on."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**SWEEP, "run": str(run)}))
    term = terminal("transfer", "tiny.yaml", "steps=100000")
    term.until(lambda t: len(_children(t)) > 2)
    interrupted(term)
    term = terminal("transfer", "tiny.yaml", "steps=100000")
    time.sleep(1)
    interrupted(term)


def _children(term: Terminal) -> list[int]:
    from terminal import _session

    return _session(term.shell.pid)


OTHERS = {
    "data verify": "crystal.data.store.sha256_of",
    "data stats": "crystal.data.order.StageOrder.counts_at",
    "data show --step 3": "crystal.data.tokenizer.Tokenizer.decode",
    "data where --step 3": "crystal.data.store.TokenStore.documents_in_row",
    "data when --doc x": "crystal.data.store.TokenStore.occurrences",
    "schedule": "crystal.planning.describe.schedule",
    "train --dry-run": "crystal.planning.describe.dry_run",
    "plan": "crystal.planning.report.plan_run",
    "audit": "crystal.checks.audit.audit",
    "coord-check": "crystal.mup.coord_check.measure",
    "transfer --plan-only": "crystal.sweeps.transfer.plan_only",
}


def test_ctrl_c_in_every_other_command(terminal, run, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**SWEEP, "run": str(run)}))
    for words, function in OTHERS.items():
        command, *more = words.split(" --")
        subject = {"transfer": "tiny.yaml"}.get(command, run)
        term = terminal(*command.split(), subject, *(w for m in more for w in f"--{m}".split()), slow={function: None})
        term.until(lambda t: t.stuck)
        interrupted(term)


def test_ctrl_c_while_text_is_generated(terminal, run):
    assert terminal("train", run, "--until", "1", slow=NO_PLOT).ended() == 0
    term = terminal("generate", "run", "--max-new-tokens", "2", slow={"crystal.inference.generate.last_logits": None})
    term.until(lambda t: t.stuck)
    interrupted(term)


def test_ctrl_c_during_a_benchmark_ends_its_trainers(terminal):
    term = terminal("bench", "train", "--d-model", "64", slow={"crystal.bench.training.matmul_peak": 0})
    term.until(lambda t: len(_children(t)) > 2)
    interrupted(term)


def test_a_bar_whose_block_was_never_entered_does_not_draw_after_the_command():
    """An interrupt may fall between the two."""
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as file:
        bar = Bar(Console(file=file, force_terminal=True), "left open")
        bar.__enter__()
        restore()
        time.sleep(0.3)  # longer than it waits before it draws
        os.set_blocking(master, False)
        with pytest.raises(BlockingIOError):
            os.read(master, 1)
    os.close(master)


@pytest.mark.parametrize("how", ["wordy", "forgetful"])
def test_an_interrupt_that_others_lose_on_its_way_is_still_one(terminal, run, how):
    term = terminal("schedule", run, slow={"crystal.planning.describe.schedule": how})
    term.until(lambda t: t.stuck)
    interrupted(term)


def test_what_hears_no_interrupt_ends_at_the_second(terminal, run):
    term = terminal("schedule", run, slow={"crystal.planning.describe.schedule": "deaf"})
    term.until(lambda t: t.stuck)
    term.type(b"\x03")
    time.sleep(1.1)  # sooner, it is the same one twice
    interrupted(term)


def test_an_impatient_ctrl_c_is_one(terminal, run):
    term = terminal("schedule", run, slow={"crystal.planning.describe.schedule": None})
    term.until(lambda t: t.stuck)
    term.type(b"\x03\x03\x03")
    interrupted(term, typed=True)


def test_sigterm_outside_training_is_the_same(terminal, run):
    term = terminal("coord-check", run, slow={"crystal.mup.coord_check.measure": None})
    term.until(lambda t: t.stuck)
    os.kill(max(_children(term)), signal.SIGTERM)
    assert term.ended() == 130
    assert term.lines[-1] == "crystal: terminated"


@pytest.mark.parametrize("every", [800, pytest.param(60, marks=pytest.mark.proof)])
def test_an_interrupt_at_any_line_of_an_import_ends_the_command_at_once(every):
    command = [sys.executable, str(Path(__file__).parent / "interrupt_imports.py"), str(every)]
    done = subprocess.run([*command, "schedule", "amber-7b"], capture_output=True, text=True)
    *table, last = done.stdout.splitlines()
    assert [line for line in table if line.startswith("WRONG")] == []
    ended, _, interrupted = last.partition("; interrupted at ")
    assert ended == "the command ended with 0"
    assert int(interrupted.split()[0]) > 150


@pytest.mark.parametrize("seconds", [0.4, 1.0])
def test_ctrl_c_while_torch_is_imported(seconds):
    """In a process of its own, which has not imported it before; in the middle of C code too."""
    command = [sys.executable, "-m", "crystal.cli", "coord-check", "amber"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while _cpu(process.pid) < seconds:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out) == (130, "")
    *before, last = err.splitlines()
    assert last == "crystal: interrupted"
    assert all(": models 0/" in line for line in before), "a fast machine may have begun by then, and say so"


def _cpu(process: int) -> float:
    """Seconds of processor time that a process has had: where it is does not depend on what else the machine does."""
    ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------------------------------ what is refused


def test_of_two_commands_in_one_directory_the_second_hears_of_it_at_once(terminal, run, tmp_path):
    """Before the model is built, and before anything is written."""
    first = terminal("train", run, slow={"crystal.training.start.prepare_run": None})
    first.until(lambda t: t.stuck)
    second = terminal("train", run, slow={"crystal.training.start.prepare_run": None})
    assert second.ended() == 2
    assert second.lines == [f"crystal: {tmp_path / 'run'}: another process is training in it"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    interrupted(first)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--until", "31"), "--until: expected a step from 1 to 30, the run's last, got 31"),
        (("train", "--until", "0"), "--until: expected a step from 1 to 30, the run's last, got 0"),
        (("train", "--until", "31", "--dry-run"), "--until: expected a step from 1 to 30, the run's last, got 31"),
        (("train", "--stage", "4"), "--stage: expected 1 to 3, got 4"),
        (("schedule", "--at", "1,11"), "--at: expected steps up to 10, the last of stage 1 english, got 11"),
        (("data", "show", "--step", "31"), "--step: expected 1 to 30, the run's last, got 31"),
        (("data", "where", "--step", "0"), "--step: expected 1 to 30, the run's last, got 0"),
    ],
)
def test_a_step_past_the_end_is_refused(terminal, run, tmp_path, words, message):
    at = 2 if words[0] == "data" else 1
    term = terminal(*words[:at], run, *words[at:])
    assert term.ended() == 2
    assert term.lines == [f"crystal: {message}"]
    assert not (tmp_path / "run").exists()
