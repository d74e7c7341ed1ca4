"""No Model Zoo parameter file is read as something that it does not say: one line, or a run that means the same.

`make proof` runs many more.
"""

import copy

import pytest
from hostile.case import expect_right
from hostile.model_zoo import KINDS, beds, cases, outcome, put, write
from hostile.model_zoo_refused import REFUSED, REFUSED_OF_TRAINERS

COUNT, SEED = 105, 1


def test_a_damaged_parameter_file_is_refused_in_one_line_or_read_as_it_says(tmp_path):
    words = expect_right(cases(SEED, COUNT), tmp_path)
    assert {kind for kind, _ in words} == set(KINDS)


@pytest.mark.parametrize("style", ["1.9.1", "2.10"])
def test_whatever_trains_something_else_is_refused_by_the_name_of_its_key(tmp_path, style):
    """The whole table of the kind, once."""
    table = REFUSED if style == "1.9.1" else REFUSED_OF_TRAINERS
    for number, (path, value) in enumerate((path, value) for path, values in table.items() for value in values):
        file = copy.deepcopy(beds()[style][0])
        put(file, path, value)
        write(tmp_path / str(number) / "in", [file], style, tree=False)
        result = outcome(tmp_path / str(number) / "in", style)
        assert result.word == "refused", f"{path} = {value!r}: {result}"
        named = [word for part in path.split(".")[-2:] for word in part.split("_") if not word.isdigit()]
        assert any(word in result.message.partition(": ")[2] for word in named), result.message
