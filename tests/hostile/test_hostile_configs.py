"""No config, however wrong, is taken for another one, ends in a traceback, or takes more than a second to refuse.

`make proof` runs many more.
"""

from collections import Counter
from pathlib import Path

import pytest
from hostile.case import Case, Outcome, command, judged
from hostile.config_case import keys, on_paper, write
from hostile.configs import KINDS, cases

from crystal.config import CONFIGS
from crystal.errors import ConfigError, RunError
from crystal.run import load_run
from crystal.sweeps.sweep import load_sweep
from crystal.workspace.project import FILES, init

COUNT, SEED = 147, 1
SECOND = 3.0  # of work: one on a quiet machine, but here workers share the cores
LONGEST = 4000  # characters of a line: a key may be named twice, and have 32 parts


@pytest.fixture(scope="module")
def begun():
    """The schemas of all sections, and what is imported late, are there before anything is timed."""
    keys()


def wrong(case: Case, outcome: Outcome) -> str | None:
    if outcome.word not in case.expected:
        return f"{case.kind}: {case.name!r}: expected {' or '.join(case.expected)}, {outcome.word}: {outcome.message}"
    if outcome.cpu_seconds > SECOND:
        return f"{case.kind}: {case.name!r}: {outcome.word} after {outcome.cpu_seconds:.2f} s of work"
    if len(outcome.message) > LONGEST:
        return f"{case.kind}: {case.name!r}: a line of {len(outcome.message)} characters"
    return None


@pytest.mark.parametrize("part", range(7))
def test_hostile_configs_get_one_line_within_a_second(begun, tmp_path, part):
    counts: Counter = Counter()
    mistakes = []
    for i, case in enumerate(cases(SEED + part, COUNT // 7)):
        outcome = case.run(tmp_path / str(i))
        counts[case.kind] += 1
        if (mistake := wrong(case, outcome)) is not None:
            mistakes.append(mistake)
    assert not mistakes, "\n".join(mistakes)
    assert len(counts) == min(len(KINDS), COUNT // 7)


def test_a_seed_gives_the_same_cases_again():
    assert [(c.kind, c.name) for c in cases(5, 60)] == [(c.kind, c.name) for c in cases(5, 60)]
    assert [c.name for c in cases(5, 60)] != [c.name for c in cases(6, 60)]


def test_the_undamaged_files_are_taken(begun, tmp_path):
    write(tmp_path, {})
    assert judged(lambda: on_paper(tmp_path / "run.yaml")).word == "fine"
    assert judged(command("config", tmp_path / "run.yaml")).word == "fine"
    assert load_sweep(str(tmp_path / "sweep.yaml"), (), tmp_path / "out").config.name == "tiny"


NUMBERS = [key for key in keys() if "number" in key.type]


@pytest.mark.parametrize("number", ["1" + "0" * 400, str(2**200), "1e300", "1e308", "-1e300"])
def test_no_number_of_a_run_may_be_absurd(begun, tmp_path, number):
    """Whichever key it is, one that is added tomorrow too."""
    write(tmp_path, {})
    assert len(NUMBERS) > 50
    for key in NUMBERS:
        with pytest.raises(ConfigError) as error:
            load_run(tmp_path / "run.yaml", [f"{key.place}={number}"])
        assert key.place in str(error.value)


@pytest.mark.parametrize("backend", ["cuda", "weight_streaming", "cerebras"])
def test_no_number_of_any_backend_may_be_absurd(begun, tmp_path, backend):
    write(tmp_path, {})
    chosen = [f"backend={{name: {backend}" + (", cluster: {mgmt_address: x}}" if backend == "cerebras" else "}")]
    from crystal.workspace.config_keys import run_keys

    numbers = [k for k in run_keys(load_run(tmp_path / "run.yaml", chosen), "backend") if "number" in k.type]
    assert numbers
    for key in numbers:
        for number in ("1" + "0" * 30, "1e300", "-1"):
            with pytest.raises(ConfigError, match="expected"):
                load_run(tmp_path / "run.yaml", [*chosen, f"{key.place}={number}"])


@pytest.mark.parametrize("run", sorted(p.stem for p in (CONFIGS / "runs").glob("*.yaml")))
def test_every_packaged_run_is_far_inside_of_the_bounds(begun, run):
    assert judged(lambda: load_run(run, ["curriculum.scale=0.001"])).word == "fine"
    outcome = judged(lambda: load_run(run))
    assert outcome.word == "fine"
    assert outcome.cpu_seconds < SECOND


@pytest.mark.parametrize("name", ["My Texts", ".hidden", "-rf", "manifest.json", "\u00e9\u00e8", "x" * 200, "a b:c"])
def test_a_project_is_called_by_a_name_that_its_run_may_have(tmp_path, name):
    directory = tmp_path / name
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / f"{name.strip('-.')[:80]}.txt").write_text("words of a text\n" * 3000)
    init(directory, [tmp_path / "texts"], None)
    on_paper(directory / "run.yaml")
    other = tmp_path / "other"
    with pytest.raises(ConfigError, match=r"^--name: expected letters"):
        init(other, [], name)
    assert not any((other / file).exists() for file in FILES)


def test_judged_tells_all_kinds_of_ends_apart(tmp_path, monkeypatch):
    def ends(error: BaseException):
        def run() -> None:
            raise error

        return judged(run)

    def spin() -> None:
        while True:
            pass

    assert judged(lambda: 3, lambda _, result: result == 3).word == "fine"
    assert judged(lambda: 3, lambda _, result: result == 4).word == "silent"
    assert ends(RunError("x: one line")).word == "refused"
    assert ends(RunError("x: one line")).message == "x: one line"
    assert ends(ValueError("x")).word == "traceback"
    assert ends(SystemExit(1)).word == "verdict"
    assert ends(SystemExit(3)).word == "traceback"
    assert judged(command("config", Path(tmp_path) / "nowhere.yaml")).word == "refused"
    assert judged(command("config", "demo", "train.seed")).word == "fine"
    monkeypatch.setattr("hostile.case.CPU_SECONDS", 0.2)
    assert judged(spin).word == "hang"
