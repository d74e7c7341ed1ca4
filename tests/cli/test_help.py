"""Every command's help: whole, with examples that parse, and the words that Tab completes."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from crystal.cli import completion
from crystal.cli.help import shown_name
from crystal.cli.main import app
from crystal.config import find

METAVARS = {
    "RUN.yaml", "SWEEP.yaml", "RUN", "CKPT", "MODEL", "DIR", "FILE", "PATH", "NAME", "ID", "TEXT", "KEY", "N", "STEP",
    "X", "KEY=VALUE", "NAME=FILE", "dotted.key=value", "N,...", "STEP,...", "NAME,...", "MODULE:NAME",
}  # fmt: skip


def tree(command, words=("crystal",)):
    """(words, command) of the command and all below it."""
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from tree(below, (*words, name))


ROOT = typer.main.get_command(app)
COMMANDS = dict(tree(ROOT))
each_command = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)


def parsed(line):
    """The command that a line names and the values of its parameters, without running it. Raises for a mistake."""
    name, *words = shlex.split(line)
    command, context = ROOT, ROOT.make_context(name, [], resilient_parsing=True)
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, words, parent=context, resilient_parsing=hasattr(command, "commands"))
    return command, context.params


@each_command
def test_help_is_whole_and_fits_80_columns(words, crystal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = crystal(*words[1:], "--help")
    assert (code, err) == (0, "")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert out.startswith(f"Usage: {' '.join(words)} ")
    text = " ".join(out.split())
    for name, command in getattr(COMMANDS[words], "commands", {}).items():
        summary = re.split(r"\.\s", " ".join(command.help.split()))[0].rstrip(".")
        assert f"{name} {summary}" in text, "summaries are not cut"


@each_command
def test_two_examples_stand_below_the_help_and_parse(words, crystal):
    examples = (COMMANDS[words].epilog or "").splitlines()
    assert len(examples) == 2
    assert crystal(*words[1:], "--help")[1].endswith("Examples:\n" + "".join(f"  {e}\n" for e in examples))
    for example in examples:
        assert len(example) <= 78
        below = [command for path, command in COMMANDS.items() if path[: len(words)] == words]
        assert parsed(example)[0] in below, f"{example} is another command's"


@each_command
def test_every_parameter_is_explained_and_has_a_standard_metavar(words):
    for parameter in COMMANDS[words].params:
        assert parameter.help, parameter.name
        takes_value = parameter.param_type_name == "argument" or not parameter.is_flag
        choices = "Literal" in str(parameter.type_descriptor.annotation)
        if takes_value and not choices:
            assert set(shown_name(parameter).split("|")) <= METAVARS, parameter.name


def test_what_examples_name_is_there():
    """Runs, models and sweeps of examples are packaged, and changes fit them; `mine.yaml` and `mymodule` are not."""
    from crystal.run import load_run
    from crystal.zoo.config import model_config

    seen = 0
    for command in COMMANDS.values():
        for example in (command.epilog or "").splitlines():
            command, values = parsed(example)
            for parameter in command.params:
                value = values.get(parameter.name)
                if value is None or value in ("mine.yaml", "mymodule:factory") or "runs/" in str(value):
                    continue
                if shown_name(parameter) == "RUN.yaml":
                    load_run(value, values.get("overrides") or ())
                elif shown_name(parameter) == "SWEEP.yaml":
                    find(value, "sweeps")
                elif shown_name(parameter) == "MODEL":
                    model_config(value)
                elif shown_name(parameter).startswith("MODEL|RUN.yaml"):
                    assert value in completion.checked("")
                else:
                    continue
                seen += 1
    assert seen > 20


@each_command
def test_every_command_takes_json_and_gives_errors_as_json(words, crystal):
    if hasattr(COMMANDS[words], "commands"):
        return
    code, out, err = crystal(*words[1:], "--no-such-flag", "--json")
    assert (code, out.count("\n")) == (2, 1)
    assert err == f"crystal: No such option: --no-such-flag (see {' '.join(words)} --help)\n"
    assert ["--json"] in [parameter.opts for parameter in COMMANDS[words].params]


@pytest.fixture
def completed(crystal, monkeypatch):
    """completed(shell, line) → what Tab offers behind the line, asked for as the shell's completion function does."""

    def ask(shell, line):
        asked = {
            "bash": {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))},
            "zsh": {"_TYPER_COMPLETE_ARGS": line},
            "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        }[shell]
        for name, value in (asked | {"_CRYSTAL_COMPLETE": f"complete_{shell}"}).items():
            monkeypatch.setenv(name, value)
        code, out, err = crystal()
        assert (code, err) == (0, "")
        return out

    return ask


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_tab_completes_commands_and_names(completed, shell):
    assert "coord-check" in completed(shell, "crystal coo")
    assert "crystalcoder-7b-streaming" in completed(shell, "crystal train cry")


def test_tab_completes_run_directories_and_files(completed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/one", "runs/two", "away"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "notes.txt").touch()
    assert set(completed("bash", "crystal compare runs/").split()) == {"runs/one", "runs/two"}
    assert completed("bash", "crystal generate aw").split() == ["away"]
    assert completed("bash", "crystal train m").split() == ["mine.yaml"]
    assert completed("bash", "crystal train n").split() == []


def test_models_and_sweeps_complete_to_names_that_exist():
    from crystal.zoo.config import model_config

    assert all(model_config(name) for name in completion.models(""))
    assert completion.sweeps("transfer-m") == ["transfer-mup"]
    assert {"amber", "demo", "crystalcoder-7b"} <= set(completion.checked(""))


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_is_installed_for_the_shell_that_is_named(crystal, monkeypatch, tmp_path, shell):
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, _ = crystal("--show-completion", shell)
    assert code == 0
    assert "_CRYSTAL_COMPLETE" in out
    code, said, err = crystal("--install-completion", shell)
    assert (code, err) == (0, "")
    installed = re.search(r"installed in (\S+);", said)[1]
    assert installed.startswith(str(tmp_path))
    assert Path(installed).read_text().strip().startswith(out.strip())


def test_completion_of_the_calling_shell_or_of_the_login_shell(crystal, monkeypatch):
    import shellingham

    monkeypatch.setattr(shellingham, "detect_shell", lambda: ("zsh", "/bin/zsh"))
    assert "compdef" in crystal("--show-completion")[1]

    def none():
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", none)
    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert "complete --command crystal" in crystal("--show-completion")[1]
    monkeypatch.delenv("SHELL")
    for words in (("--show-completion",), ("--install-completion", "tcsh"), ("--show-completion", "bash", "x")):
        code, out, err = crystal(*words)
        assert (code, out) == (2, "")
        assert err.startswith(f"crystal: {words[0]}: expected one of bash, zsh, fish, got ")
        assert err.count("\n") == 1


def test_a_home_that_cannot_be_written_is_one_line(crystal, monkeypatch, tmp_path):
    (tmp_path / "home").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code, out, err = crystal("--install-completion", "fish")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(tmp_path / "home") in err


def test_the_docs_name_only_commands_that_parse():
    """Lines of a shell block in docs/ and README that start with crystal."""
    root = Path(__file__).parents[2]
    lines = [
        line.strip().partition("  #")[0]
        for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if re.match(r"crystal [a-z]", line)
    ]
    assert len(lines) > 20
    for line in lines:
        parsed(line.partition(" > ")[0])
