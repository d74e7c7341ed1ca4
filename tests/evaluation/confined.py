"""For tests that run programs: skipped, counted, where the kernel cannot confine them; failed where CI says it must."""

import os

import pytest

from crystal.evaluation.confine import confinement


def needs_confinement(missing: tuple[str, ...] | None = None) -> None:
    """Call first in a test. missing: of a confinement found elsewhere; None: this process's."""
    missing = confinement().missing if missing is None else missing
    if missing:
        reason = f"programs cannot be confined here: {'; '.join(missing)}"
        if os.environ.get("CRYSTAL_REQUIRE_CONFINEMENT") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
