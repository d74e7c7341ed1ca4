"""minGPT's way of initialising and grouping: `self.apply(_init_weights)`, then names; decay and no_decay by module.

Everything here is spelled as its author would: sigma is a number of the config, `p.data.normal_` draws, a loop over
named_parameters divides residual projections' sigma, and configure_optimizers makes groups of which some take the
optimizer's own lr. "xavier" draws a block's weights by nn.init.xavier_uniform_ and orthogonal_, whose sigma goes with
fan_in + fan_out and with the larger of both.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .family import Broken, Family
from .forms import AUDIT, BOTH, tokens


class Attention(nn.Module):
    """Separate query, key and value with biases."""

    def __init__(self, n_embd: int, divisor: float) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(n_embd, n_embd) for _ in range(3))
        self.proj = nn.Linear(n_embd, n_embd)
        self.register_buffer("mask", torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32))
        self.n_head, self.divisor = 4, divisor

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        B, T, C = x.size()
        k = self.key(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = self.query(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = self.value(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / self.divisor)
        att = F.softmax(att.masked_fill(self.mask[:, :, :T, :T] == 0, float("-inf")), dim=-1)
        return self.proj((att @ v).transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    """Checkpointed, with dropout."""

    def __init__(self, n_embd: int, divisor: float) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = Attention(n_embd, divisor)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(0.05)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add in place where that's allowed."""
        x = x + self.attn(self.ln1(x))
        x += self.mlp(self.ln2(x))
        return x


class GPT(nn.Module):
    """minGPT with a muP config."""

    def __init__(self, n_embd: int, form: str, fault: str = "") -> None:
        super().__init__()
        self.m, self.form, self.fault = n_embd / 64, form, fault
        self.tok_emb = nn.Embedding(50, n_embd)
        self.pos_emb = nn.Parameter(torch.zeros(1, 32, n_embd))
        self.drop = nn.Dropout(0.05)
        divisor = math.sqrt(n_embd // 4) if fault == "sqrt" else n_embd // 4 / 4
        self.blocks = nn.ModuleList([Block(n_embd, divisor) for _ in range(2)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.head = nn.Linear(n_embd, 50, bias=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith(("proj.weight", "mlp.2.weight")):
                p.data.normal_(mean=0.0, std=0.125 / math.sqrt(2 * len(self.blocks)) * self.m**-0.5)
                if fault == "residual" and name == "blocks.1.mlp.2.weight":
                    p.data.mul_(self.m**0.5)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            std = 0.125
            if isinstance(module, nn.Linear) and not (
                self.fault == "init" and module.out_features > module.in_features
            ):
                std *= self.m**-0.5
            if self.form.startswith("xavier") and isinstance(module, nn.Linear):
                square = module.in_features == module.out_features
                (nn.init.orthogonal_ if square else nn.init.xavier_uniform_)(module.weight)
                if self.fault == "init" and not square:
                    module.weight.data *= self.m**0.5
            else:
                module.weight.data.normal_(mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.data.zero_()
        elif isinstance(module, nn.LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)
        elif isinstance(module, GPT):
            nn.init.trunc_normal_(module.pos_emb, std=0.05)
            return
        if module is getattr(self, "head", None):
            module.weight.data.normal_(mean=0.0, std=0.125 / (self.m if self.form.endswith("table3") else 1.0))

    def configure_optimizers(self, fault: str = "") -> torch.optim.Optimizer:
        """Return AdamW of three or four groups."""
        decay, no_decay = set(), set()
        for mn, module in self.named_modules():
            for pn, _ in module.named_parameters(recurse=False):
                name = f"{mn}.{pn}" if mn else pn
                (decay if pn == "weight" and isinstance(module, nn.Linear) else no_decay).add(name)
        if fault == "gone":
            no_decay.remove("pos_emb")
        params = dict(self.named_parameters())
        hidden = sorted(name for name in decay if name != "head.weight")
        lr, divided = 2.0**-7, 2.0**-7 / self.m
        head = divided if self.form.endswith("table3") else lr
        groups = [
            {"params": [params[n] for n in hidden], "weight_decay": 0.1, "lr": lr if fault == "lr" else divided},
            {"params": [params["head.weight"]], "weight_decay": 0.1, "lr": head},
            {"params": [params[n] for n in sorted(no_decay)], "weight_decay": 0.0},
        ]
        if fault == "no_decay":
            groups[2]["lr"] = divided
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and loss."""
        x = self.drop(self.tok_emb(idx) + self.pos_emb[:, : idx.size(1), :])
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        logits = self.head(self.ln_f(x))
        if self.form.endswith("table8") and self.fault != "logits":
            logits.div_(self.m)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return minGPT's own loss."""
    return model(ids[:, :-1], ids[:, 1:])[1]


def family(form: str) -> Family:
    """Return minGPT's family; "xavier" or "normal", and a table."""
    made = {
        "sqrt": ("scores by 1/sqrt(d_head)", "attn", AUDIT),
        "init": ("a widening Linear's sigma isn't divided by sqrt(m)", "mlp.0", BOTH),
        "residual": ("a residual projection's sigma isn't divided by sqrt(m)", "blocks.1.mlp.2", BOTH),
    }
    if form.endswith("table8"):
        made["logits"] = ("logits aren't divided by m", "head", BOTH)
    trained = {
        "lr": ("hidden lr isn't divided by m", "blocks", BOTH),
        "no_decay": ("lr of embeddings, biases and gains is divided by m", "tok_emb", BOTH),
        "gone": ("pos_emb is in no group", "pos_emb", BOTH),
    }
    broken = [Broken(*words, factory=partial(GPT, form=form, fault=fault)) for fault, words in made.items()]
    broken += [
        Broken(*words, optimizer=partial(GPT.configure_optimizers, fault=fault)) for fault, words in trained.items()
    ]
    return Family("mingpt", form, partial(GPT, form=form), GPT.configure_optimizers, loss, tokens, tuple(broken))


FAMILIES = [family("normal table3"), family("xavier table8")]
