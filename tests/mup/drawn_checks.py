"""Coordinate checks made of formulas instead of training, for tests of what is drawn of them."""

from crystal.mup.coord_check import CoordCheck
from crystal.mup.measure import Measured
from crystal.mup.slopes import decide, fit_slope
from crystal.mup.verdict import Row

SIZES, SEEDS, STEPS = (64, 128, 256), (1, 2), 4
NAMES = [f"blocks.{b}.{part}" for b in (0, 1) for part in ("attn.q", "attn.k", "attn.out", "mlp.up", "mlp.down")]


def made_check(
    powers: dict[str, float], label: str = "model, mup", along: str = "width", values: dict | None = None
) -> CoordCheck:
    """A check of tensors `NAME.weight` (init and update) and activations `NAME` (size at both ends): each value goes
    as size ** its power in `powers` (others: 0), and 0 is right for all. values: by (name, size), instead of those."""
    names = [*NAMES, *(name for name in powers if name not in NAMES)]
    kinds = (("init", 0, ".weight"), ("update", 1, ".weight"), ("size", 1, ""), ("size", STEPS, ""))
    found = [
        (name + suffix, quantity, step, 2.0 ** (i % 7) * 1.01**i, powers.get(name, 0.0))
        for quantity, step, suffix in kinds
        for i, name in enumerate(names)
    ]
    measured = [
        Measured(
            size, seed,
            {
                (name, quantity, step): (values or {}).get((name, size), height * (size / 64) ** power)
                for name, quantity, step, height, power in found
            },
            {}, frozenset(),
        )
        for seed in SEEDS
        for size in SIZES
    ]  # fmt: skip
    rows = []
    for name, quantity, step, _, power in found:
        points = {(m.size, m.seed): m.values[name, quantity, step] for m in measured}
        slope = fit_slope(points)
        label_of = quantity if quantity in ("init", "update") else f"{quantity} t={step}"
        if slope is None:
            rows.append(Row(name, label_of, None, None, None, "FAIL", "rule", f"{name}: is never updated"))
            continue
        verdict = decide(slope, 0.0, 0.0, 0.1)
        why = f"{name}: {label_of} ∝ {along}^{power:g}, expected {along}^0: it is broken" if verdict != "PASS" else ""
        rows.append(Row(name, label_of, slope.value, (slope.low, slope.high), 0.0, verdict, "rule", why))
    settings = {"layers": 2, "lr": 0.00125, "dtype": "fp32", "batch": "4 x 64 random words of 256"}
    return CoordCheck(rows, 1.5, [], along, SIZES, STEPS, label, measured, settings=settings)
