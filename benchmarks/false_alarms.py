"""Does the coordinate check fail what is right? Many starts of correct models, judged as by `crystal coord-check`.

Both families under each parametrization, `starts` times, every time with seeds that no other check has. Prints the
verdicts and how long they took. Run: python benchmarks/false_alarms.py [--starts 10] [--first-seed 100000]
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")

from crystal.checks.coord_check import Asked, check_model
from crystal.mup.verdict import summary

SEEDS = 100  # more than a check ever adds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=10, help="of each family and parametrization")
    parser.add_argument("--first-seed", type=int, default=100_000)
    given = parser.parse_args()
    seed, alarms, done = given.first_seed, 0, 0
    for parametrization in ("mup", "crystalcoder", "completep"):
        for family in ("amber", "crystalcoder"):
            verdicts, began = Counter(), time.process_time()
            for _ in range(given.starts):
                (check,) = check_model(family, Asked(first_seed=seed), parametrization)
                verdicts[check.verdict] += 1
                seed += SEEDS
                for line in summary(check.failures) if check.verdict == "FAIL" else ():
                    print(f"  {family}, {parametrization}, first seed {seed - SEEDS}: {line}")
            alarms, done = alarms + verdicts["FAIL"], done + given.starts
            spent = time.process_time() - began
            print(f"{parametrization:13} {family:13} {dict(verdicts)}  {spent:.1f} CPU-seconds", flush=True)
    print(f"{done} checks of correct models, {alarms} alarms; first seed {given.first_seed}")


if __name__ == "__main__":
    main()
