"""The coordinate check's cost beside the mup package's own, in one run.

Both train the same two-layer decoder (RMSNorm, SwiGLU, d_ff 2 d_model, untied readout; batch 4 x 64, 256 words)
at the same widths, seeds and steps with AdamW and the same learning rate; mup's get_coord_data and plot_coord_data
as they come, ours with its verdict and picture, once in fp32 throughout as theirs is, and once as
`crystal coord-check` does it from width 512 on: products in bf16, weights, moments and statistics in fp32.
CPU-seconds of this process (user + system), so that other load on the machine matters little. Run:
python benchmarks/coord_check.py [--widths 64,128,256,512,1024] [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import mup
import mup.coord_check
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crystal.mup.coord_check import coord_check
from crystal.mup.coord_plots import draw
from crystal.mup.measure import Task

VOCAB, BATCH, SEQ, BASE, LR, STD = 256, 4, 64, 64, 4e-3, 0.125


class Block(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((d, 2 * d), (d, 2 * d), (2 * d, d)))

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm1(x)
        q, k, v = (f(a).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=4 / q.shape[-1])
        x = x + self.o(y.transpose(1, 2).flatten(2))
        a = self.norm2(x)
        return x + self.down(F.silu(self.gate(a)) * self.up(a))


class Decoder(nn.Module):
    """With mup's MuReadout (its multiplier hangs on tensors) or, for us, a plain Linear and a float."""

    def __init__(self, d: int, readout: type[nn.Linear], multiplier: float):
        super().__init__()
        self.multiplier = multiplier
        self.embed = nn.Embedding(VOCAB, d)
        self.blocks = nn.ModuleList(Block(d, 4) for _ in range(2))
        self.norm = nn.RMSNorm(d)
        self.head = readout(d, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if self.multiplier == 1 else logits * self.multiplier


def mup_model(width: int) -> nn.Module:
    model = Decoder(width, mup.MuReadout, 1.0)
    mup.set_base_shapes(
        model, Decoder(BASE, mup.MuReadout, 1.0), delta=Decoder(2 * BASE, mup.MuReadout, 1.0), rescale_params=False
    )
    for name, p in model.named_parameters():
        if p.ndim == 2:
            mup.normal_(p, std=STD)
            if name == "head.weight":
                p.data.normal_(0, STD)
    return model


def our_model(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    m = width / BASE
    model = Decoder(width, nn.Linear, 1 / m)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=STD if name in ("embed.weight", "head.weight") else STD * m**-0.5)
    return model


def our_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    m = model.norm.weight.numel() / BASE
    hidden = [p for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": hidden, "lr": LR / m}, {"params": rest, "lr": LR}]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    rows = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(seed))
    return rows[:, :-1], rows[:, 1:]


def loss(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(rows[0]).flatten(0, 1), rows[1].flatten())


def loss_bf16(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss(model, rows)


def theirs(widths: list[int], seeds: int, steps: int, out: Path):
    """get_coord_data, then plot_coord_data: what a user of mup runs. Returns the frame and the two CPU times."""
    import warnings

    ids, labels = batch(1)
    begin = time.process_time()
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = mup.coord_check.get_coord_data(
            {w: (lambda w=w: mup_model(w)) for w in widths},
            [(ids, labels.flatten())] * steps,
            optimizer="adamw",
            lr=LR,
            mup=True,
            nseeds=seeds,
            nsteps=steps,
            fix_data=True,
            cuda=False,
            flatten_output=True,
            lossfn="xent",
            show_progress=False,
        )
        data = time.process_time() - begin
        mup.coord_check.plot_coord_data(frame, save_to=str(out / "theirs.png"), suptitle="mup", face_color=None)
    return frame, data, time.process_time() - begin - data


def ours(widths: list[int], seeds: int, steps: int, out: Path, loss_function):
    begin = time.process_time()
    check = coord_check(Task(our_model, our_optimizer, loss_function, batch), widths, seeds=seeds, steps=steps)
    data = time.process_time() - begin
    draw([check], out / "ours.png")
    return check, data, time.process_time() - begin - data


def products(widths: list[int], seeds: int, steps: int) -> float:
    """CPU-seconds of the matrix products alone in the same fp32 check: what no tool can do without."""
    from torch.profiler import ProfilerActivity, profile

    task = Task(our_model, our_optimizer, loss, batch)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        coord_check(task, widths, seeds=seeds, steps=steps)
    names = ("aten::mm", "aten::addmm", "aten::bmm", "scaled_dot_product")
    return sum(e.self_cpu_time_total for e in seen.key_averages() if any(n in e.key for n in names)) / 1e6


def agreement(frame, check) -> list[float]:
    """|difference| of the two tools' exponents of mean |output| at the last step, over modules that both see."""
    import math

    from crystal.mup.slopes import fit_slope

    found = []
    steps, seeds = check.steps, sorted({m.seed for m in check.measured})
    ours_by_name = {r.name: r.slope for r in check.rows if r.quantity == f"size t={steps}"}
    for module, part in frame[frame.t == steps].groupby("module"):
        points = {}
        for width, mine in part.groupby("width"):
            for seed, value in zip(seeds, mine["l1"], strict=True):
                points[width, seed] = value
        slope = fit_slope(points)
        if module in ours_by_name and slope is not None and math.isfinite(slope.value):
            found.append(abs(slope.value - ours_by_name[module]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="64,128,256,512,1024")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    widths = [int(w) for w in given.widths.split(",")]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        out = Path(folder)
        for warm in (loss, loss_bf16):  # imports and first calls
            ours(widths[:3], 1, 2, out, warm)
        theirs(widths[:3], 1, 2, out)
        spent: dict[str, list[tuple[float, float]]] = {"theirs": [], "fp32": [], "ours": [], "default": []}
        for _ in range(given.rounds):  # alternating
            frame, *times = theirs(widths, given.seeds, given.steps, out)
            spent["theirs"].append(tuple(times))
            exact, *times = ours(widths, given.seeds, given.steps, out, loss)
            spent["fp32"].append(tuple(times))
            check, *times = ours(widths, given.seeds, given.steps, out, loss_bf16)
            spent["ours"].append(tuple(times))
            begin = time.process_time()
            default = coord_check(Task(our_model, our_optimizer, loss, batch), (64, 128, 256))
            spent["default"].append((time.process_time() - begin, 0.0))
        floor = products(widths, given.seeds, given.steps)
    median = {k: statistics.median(map(sum, v)) for k, v in spent.items()}
    result = {
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, 1 thread",
        "versions": {"torch": torch.__version__, "mup": version("mup")},
        "work": {"widths": widths, "seeds": given.seeds, "steps": given.steps},
        "cpu_seconds": {k: [[round(x, 2) for x in pair] for pair in v] for k, v in spent.items()},
        "ratio": {k: round(median["theirs"] / median[k], 2) for k in ("fp32", "ours", "default")},
        "products": {"cpu_seconds": round(floor, 2), "ratio": round(median["theirs"] / floor, 2)},
        "verdicts": {"fp32": exact.verdict, "ours": check.verdict, "default": default.verdict},
        "slopes_differ_by_at_most": {
            "fp32": round(max(agreement(frame, exact)), 3), "ours": round(max(agreement(frame, check)), 3)
        },
    }  # fmt: skip
    if given.json:
        print(json.dumps(result))
        return
    print(f"{result['machine']}; torch {torch.__version__}, mup {version('mup')}")
    print(f"{len(widths)} widths x {given.seeds} seeds x {given.steps} steps, CPU-seconds, median of {given.rounds}")
    print(f"{'':42} {'all':>6} {'training':>9} {'plot':>5} {'faster':>7}  verdict")
    names = {
        "theirs": "mup: get_coord_data + plot_coord_data",
        "fp32": "crystal: verdict + plot, fp32",
        "ours": "crystal: verdict + plot, bf16 products",
        "default": "crystal: default check, to its verdict",
    }
    for key, text in names.items():
        training, plot = (statistics.median(pair[i] for pair in spent[key]) for i in (0, 1))
        last = f"{result['ratio'][key]:>6}x  {result['verdicts'][key]}" if key != "theirs" else "      -  none"
        print(f"{text:42} {median[key]:>6.2f} {training:>9.2f} {plot:>5.2f} {last}")
    text = "matrix products alone of the fp32 check"
    print(f"{text:42} {floor:>6.2f} {'':>9} {'':>5} {result['products']['ratio']:>6}x  the floor")
    differ = result["slopes_differ_by_at_most"]
    print(f"slopes differ from mup's by at most {differ['fp32']} (fp32), {differ['ours']} (bf16 products)")


if __name__ == "__main__":
    main()
