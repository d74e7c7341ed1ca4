"""What the benchmark prints, from its records alone: aligned columns, and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

COLOURS = {
    "ours": "#1b7837",
    "torch": "#999999",
    "torch.compile": "#5e3c99",
    "liger": "#e08214",
    "flash-attn": "#2166ac",
}


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns two spaces apart, the first `left` of them flush left, the others flush right."""
    widths = [max(len(line[k]) for line in (head, *lines)) for k in range(len(head))]
    shown = []
    for line in (head, *lines):
        cells = enumerate(zip(line, widths, strict=True))
        shown.append("  ".join(f"{cell:<{w}}" if k < left else f"{cell:>{w}}" for k, (cell, w) in cells).rstrip())
    return "\n".join(shown)


def _or_dash(value, form: str = "{}") -> str:
    return "-" if value is None else form.format(value)


def _key(row: dict) -> list[str]:
    return [row["op"], row["shape"], row["direction"], row["provider"]]


def offline_table(rows: Sequence[dict]) -> str:
    """Of `compiled.rows`. Occupancy is of the largest launch, as are registers and access width; spills are of all."""
    head = [
        "operator", "shape", "direction", "provider", "registers", "spills", "occupancy", "access B", "bytes/least",
        "launches", "of torch", "syncs", "recompiles", "unsafe offsets",
    ]  # fmt: skip
    lines = []
    for row in sorted(rows, key=lambda r: (r["op"], r["shape"], r["direction"] != "forward")):
        if "failed" in row:
            lines.append([*_key(row), *["-"] * (len(head) - 4)])
            continue
        occupancy = None if row["warps_resident"] is None else row["warps_resident"] / 64
        lines.append([
            *_key(row), _or_dash(row["registers"]), str(row["spills"]), _or_dash(occupancy, "{:.0%}"),
            _or_dash(row["width"]), _or_dash(row["bytes_ratio"], "{:.3f}"), str(row["launches"]),
            str(row["torch_launches"]), str(row["syncs"]), _or_dash(row["variants"]), _or_dash(row["unsafe_offsets"]),
        ])  # fmt: skip
    refused = [f"{r['provider']} {r['op']} {r['shape']}: {r['failed']}" for r in rows if "failed" in r]
    return "\n".join([aligned(head, lines, 4), *refused])


def measured_table(rows: Sequence[dict]) -> str:
    """Of `measured.rows`: times in microseconds, speed on the bytes that must be moved."""
    head = [
        "operator", "shape", "direction", "provider", "us", "p20", "p80", "graph us", "host us", "GB/s", "% of copy",
        "peak MB", "error", "torch's",
    ]  # fmt: skip
    lines = []
    for row in rows:
        errors = [_or_dash(row.get(key), "{:.1e}") for key in ("error", "torch_error")]
        if "failed" in row:
            lines.append([*_key(row), *["-"] * 8, *errors])
            continue
        times = [row[key] for key in ("seconds", "p20", "p80", "graph_seconds", "host_seconds")]
        lines.append([
            *_key(row), *(_or_dash(None if t is None else 1e6 * t, "{:.1f}") for t in times),
            f"{row['gb_s']:.0f}", f"{row['copy_percent']:.0f}", f"{row['peak_bytes'] / 1e6:.1f}", *errors,
        ])  # fmt: skip
    failed = [f"{r['provider']} {r['op']} {r['shape']}: {r['failed']}" for r in rows if "failed" in r]
    return "\n".join([aligned(head, lines, 4), *failed])


def bars_table(bars: Sequence[dict]) -> str:
    """The ten, one under the other: what is wanted, ours, and each peer installed."""
    lines = []
    for bar in bars:
        lines.append(f"{bar['number']:>2}  {bar['verdict']}  {bar['what']}: {bar['want']}")
        lines += [f"          {name:<11}{value}" for name, value in {"ours": bar["ours"], **bar["peers"]}.items()]
    return "\n".join(lines)


def errors_table(rows: Sequence[dict]) -> str:
    """Of each operator and dtype the output or gradient that stands worst beside torch's."""
    head = ["operator", "dtype", "shape", "worst output", "ours", "torch's", "ours / torch's"]
    lines = [
        [r["op"], r["dtype"], r["shape"], r["output"], f"{r['ours']:.2e}", f"{r['torch']:.2e}", f"{r['ratio']:.4f}"]
        for r in rows
    ]
    return aligned(head, lines, 4)


def draw(rows: Sequence[dict], path: Path, title: str) -> None:
    """Percent of copy of every operator at each shape, a panel per direction, a bar per provider."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if "failed" not in row]
    names = list(dict.fromkeys((row["op"], row["shape"]) for row in timed))
    providers = [name for name in COLOURS if any(row["provider"] == name for row in timed)]
    figure = Figure(figsize=(13, 1.5 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    figure.suptitle(title)
    for panel, direction in zip(panels, ("forward", "backward", "both"), strict=True):
        for k, provider in enumerate(providers):
            found = {
                (row["op"], row["shape"]): row["copy_percent"]
                for row in timed if row["provider"] == provider and row["direction"] == direction
            }  # fmt: skip
            places = [number + 0.8 * (k + 0.5) / len(providers) - 0.4 for number in range(len(names))]
            panel.barh(
                places, [found.get(name, 0) for name in names], 0.8 / len(providers), label=provider,
                color=COLOURS[provider],
            )  # fmt: skip
        panel.axvline(100, color="black", linewidth=0.7)
        panel.set(title=direction, xlabel="% of the speed of a copy of as many bytes")
    panels[0].set_yticks(range(len(names)), [f"{op}  {shape}" for op, shape in names])
    panels[0].invert_yaxis()
    panels[2].legend(fontsize="small")
    figure.savefig(path, dpi=110)
