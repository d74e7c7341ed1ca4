"""No hostile input, of any kind there is a generator for, ends in a traceback, a hang, or silence: `make proof`.

CRYSTAL_FUZZ_COUNT and CRYSTAL_FUZZ_SEED ask for other cases than CI's.
"""

import os

import pytest
from hostile.fuzz import GENERATORS, chunks, judge, process_chunks

pytestmark = pytest.mark.proof
COUNT, SEED = int(os.environ.get("CRYSTAL_FUZZ_COUNT", "2000")), int(os.environ.get("CRYSTAL_FUZZ_SEED", "1"))
CHUNKS = chunks(COUNT, SEED) + process_chunks(100, SEED)


def test_every_generator_has_its_share():
    assert sum(chunk.count for chunk in CHUNKS if not chunk.as_process) >= COUNT
    assert sum(chunk.count for chunk in CHUNKS if chunk.as_process) >= 100
    assert {chunk.generator for chunk in CHUNKS} == GENERATORS.keys()


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_what_is_hostile_is_refused_in_one_line_or_changes_nothing(chunk, tmp_path):
    found = list(judge(chunk, tmp_path))
    assert len(found) == chunk.count
    assert not [str(each) for each in found if not each.right]
