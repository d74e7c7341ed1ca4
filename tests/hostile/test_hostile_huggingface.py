"""No damaged Hugging Face directory is imported as something else than it says, and none of its code runs.

`make proof` runs many more.
"""

from collections import Counter

from hostile.huggingface import DAMAGES, cases

COUNT, SEED = 150, 1


def test_a_damaged_directory_is_refused_in_one_line_or_gives_what_it_says(tmp_path):
    words, wrong = Counter(), []
    for number, case in enumerate(cases(SEED, COUNT)):
        outcome = case.run(tmp_path / str(number))
        words[case.kind, outcome.word] += 1
        if outcome.word not in case.expected:
            wrong.append(f"{case.name}: {outcome.word}: {outcome.message}")
    assert not wrong, "\n".join(wrong)
    assert {kind for kind, _ in words} == DAMAGES.keys()
    assert sum(n for (_, word), n in words.items() if word == "refused") > COUNT // 3
