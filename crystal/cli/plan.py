"""`crystal plan`: parallel layouts of a run on a cluster. Imports when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from crystal.cli.options import Json, Overrides, Run, print_result


def plan(
    run: Run,
    overrides: Overrides = None,
    devices: Annotated[int, typer.Option(min=1, max=1 << 20, metavar="N", help="how many devices")] = 8,
    device: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="a device of configs/devices/, or a YAML file of your own")
    ] = "a100-80gb",
    changes: Annotated[
        list[str] | None, typer.Option("--with", metavar="KEY=VALUE", help="a change to the device: devices_per_node=4")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(metavar="X", help="a rate that was measured, of all devices")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(metavar="X", help="the same as a share of peak, 6 N FLOPs a token")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="how many layouts to print")] = 10,
    crossing: Annotated[
        bool, typer.Option("--crossing", help="also: the bandwidth between nodes below which tp or pp pays")
    ] = False,
    as_json: Json = False,
) -> None:
    """Parallel layouts of a run on N devices: memory, traffic, FLOPs, MFU and days of each, best first.

    A rung of a ladder (crystalcoder-w1024-l16) is planned under its family's published curriculum.

    Examples:
        crystal plan amber-7b --devices 224
        crystal plan demo --device h100-80gb --with devices_per_node=4 --crossing
    """
    from crystal.planning.report import plan_run, run_or_rung

    loaded = run_or_rung(run, overrides or ())
    result = plan_run(loaded, devices, device, changes or (), tokens_per_second, mfu, top, crossing)
    print_result(result, as_json, plan_text(result))


def plan_text(result: dict) -> str:
    """The same for people: inputs, the rate that was given, a line a layout, the best layout's parts."""
    d = result["device"]
    lines = [
        f"{result['run']}: {result['parameters']:,} parameters, {result['steps']:,} steps of "
        f"{result['global_batch_size']:,} x {result['seq_len']:,} tokens, {result['tokens'] / 1e9:,.6g} B in all; "
        f"{result['flops_per_token'] / 1e9:.4g} GFLOP a token, {result['flops_per_step']:.4g} FLOP a step",
        f"{result['devices']:,} x {d['name']}, {d['devices_per_node']} a node: {d['memory_gb']:g} GB, "
        f"{d['usable_fraction']:g} of it usable; {d['peak_tflops']:g} TFLOP/s bf16, of which {d['matmul_fraction']:g} "
        f"reached; memory {d['hbm_gb_per_s']:g} GB/s, links {d['intra_node_gb_per_s']:g} GB/s in a node and "
        f"{d['inter_node_gb_per_s']:g} between nodes",
        f"collectives: {d['collective_latency_us']:g} us, and a step of a ring {d['intra_node_latency_us']:g} us in a "
        f"node and {d['inter_node_latency_us']:g} between nodes; compute beside them loses {d['contention']:g} of its "
        "pace",
    ]
    used, given, rows = result["devices"], result["devices_given"], result["global_batch_size"]
    if used < given:
        whole = max(1, round(rows / given)) * given
        lines.append(
            f"{given - used:,} of {given:,} devices are left out: no layout divides the {rows:,} rows of a step among "
            f"more than {used:,}; curriculum.global_batch_size={whole} would use all"
        )
    if result["rate"] == "given":
        lines.append(
            f"given: {result['tokens_per_second']:,.0f} tokens/s = {result['mfu_6n']:.1%} MFU (6N), "
            f"{result['mfu']:.1%} with causal attention; {result['step_seconds']:.3f} s a step, "
            f"{result['days']:.1f} days"
        )
    lines += [
        f"{result['layouts_fitting']} of {result['layouts_possible']} layouts fit; best first by estimate",
        "",
        f"{'layout':36} {'rows x n':>9} {'recompute':>9} {'GB':>5} {'sent, GB: in/out':>16} {'bubble':>6} "
        f"{'s/step':>8} {'tokens/s':>10} {'6N MFU':>6} {'days':>7}",
        *map(_line, result["layouts"]),
    ]
    if own := result["own"]:
        lines += [f"the run file's own layout{'' if own['fits'] else ', which does not fit'}:", _line(own)]
    lines += ["", *_parts(own or result["layouts"][0]), *_stopping(result["stopping"])]
    if result["crossing"]:
        lines += ["", *_crossing(result["crossing"])]
    return "\n".join(line.rstrip() for line in lines)


def _crossing(c: dict) -> list[str]:
    """The fastest layouts without and with tp or pp, a line a bandwidth, and where they are equal."""
    from crystal.planning.report import layout_text

    head = f"{'between nodes':14} {'fastest by dp and fsdp':28} {'tokens/s':>10}"
    lines = [f"{head}  {'with tp or pp':32} {'tokens/s':>10}"]
    for p in c["points"]:
        sharded, split = p["sharded"], p["split"]
        lines.append(
            f"{p['inter_node_gb_per_s']:>9.4g} GB/s {layout_text(sharded):28} {sharded['tokens_per_second']:>10,.0f}  "
            f"{layout_text(split):32} {split['tokens_per_second']:>10,.0f} {p['gain']:+.1%}"
        )
    if c["equal_gb_per_s"] is None:
        return [*lines, f"{'with' if c['points'][0]['gain'] > 0 else 'without'} tp or pp it is faster throughout"]
    return [*lines, f"equal at {c['equal_gb_per_s']:.2g} GB/s a device between nodes"]


def _stopping(s: dict) -> list[str]:
    size = f"a checkpoint of {s['checkpoint_bytes'] / 1e9:,.3g} GB"
    if s["shutdown_timeout"] is None:
        return [f"{size}; the disk under run_dir cannot be written, so --shutdown-timeout is not known"]
    return [
        f"torchrun --shutdown-timeout {s['shutdown_timeout']}: a step and {size} at the "
        f"{s['disk_bytes_per_second'] / 1e9:.2g} GB/s that the disk under run_dir takes now"
    ]


def _line(r: dict) -> str:
    from crystal.planning.report import layout_text

    layout = layout_text(r) + (f" interleave {r['interleave']}" if r["pp"] > 1 else "")
    rows = f"{r['micro_batch_size']} x {r['micro_batches']}"
    sent = f"{r['traffic_bytes']['intra_node'] / 1e9:,.0f} / {r['traffic_bytes']['inter_node'] / 1e9:,.0f}"
    return (
        f"{layout:36} {rows:>9} {r['recompute']:>9} {r['memory_bytes'] / 1e9:>5.3g} {sent:>16} "
        f"{r['bubble_fraction']:>6.1%} {r['step_seconds']:>8.4g} {r['tokens_per_second']:>10,.0f} {r['mfu_6n']:>6.1%} "
        f"{r['days']:>7.1f}"
    )


def _parts(r: dict) -> list[str]:
    from crystal.planning.report import layout_text

    memory = ", ".join(f"{key.replace('_', ' ')} {n / 1e9:.3g}" for key, n in r["memory"].items())
    sent = ", ".join(
        f"{t['kind'].replace('_', '-')} ({t['of']}) {t['bytes'] / 1e9:.3g} {'out of' if t['inter'] else 'in'} node"
        for t in r["traffic"]
    )
    seconds = ", ".join(f"{key} {s:.3g}" for key, s in r["seconds"].items())
    return [
        f"{layout_text(r)}, GB on its fullest device: {memory}",
        f"  host memory a node, pinned for a checkpoint's copies: {r['host_bytes_a_node'] / 1e9:.3g} GB",
        f"  GB sent a step by a device: {sent or 'none'}",
        f"  estimated seconds of a step: {seconds}",
    ]
