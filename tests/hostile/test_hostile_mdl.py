"""No damaged .mdl is imported as something else than it was, nor takes anything along that lies elsewhere.

`make proof` runs many more.
"""

from collections import Counter

from hostile.mdl import DAMAGES, cases

COUNT, SEED = 80, 1


def test_a_damaged_mdl_is_refused_in_one_line_or_gives_what_the_undamaged_one_gives(tmp_path):
    words, wrong = Counter(), []
    for number, case in enumerate(cases(SEED, COUNT)):
        outcome = case.run(tmp_path / str(number))
        words[case.kind, outcome.word] += 1
        if outcome.word not in case.expected:
            wrong.append(f"{case.name}: {outcome.word}: {outcome.message}")
    assert not wrong, "\n".join(wrong)
    assert {kind for kind, _ in words} == DAMAGES.keys()
    assert sum(n for (_, word), n in words.items() if word == "refused") > COUNT // 3
