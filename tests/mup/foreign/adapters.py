"""Constant sizes inside a growing model: adapters and LoRA, frozen tensors, d_ff that's constant or goes with sqrt(m).

"houlsby" trains all, with adapters of 8 coordinates after each MLP. "lora" freezes the model (as read from somewhere)
but for its norms and head, and trains matrices of rank 4 on q and v; "frozen" freezes the embedding alone. "constant"
has a d_ff of 96 at any width, "root" one of 128 sqrt(m), so that fan_in's ratio isn't the width's. Frozen tensors move
nothing and aren't judged.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    AUDIT,
    BOTH,
    Fault,
    Role,
    Scaled,
    coded,
    families,
    forgotten,
    gain,
    hidden_init,
    hidden_lr,
    next_token,
    output_mult,
    readout,
    tokens,
    vector_lr,
    wrong_decay,
)


class LoRALinear(nn.Module):
    """A frozen Linear and a trained map of constant rank; `scaling` is alpha / r."""

    def __init__(self, d_in: int, d_out: int, r: int = 4, scaling: float = 2.0) -> None:
        super().__init__()
        self.base = nn.Linear(d_in, d_out, bias=False)
        self.lora_A = nn.Linear(d_in, r, bias=False)
        self.lora_B = nn.Linear(r, d_out, bias=False)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling


class Adapter(nn.Module):
    """Houlsby's bottleneck."""

    def __init__(self, d: int, size: int = 8) -> None:
        super().__init__()
        self.down_project, self.up_project = nn.Linear(d, size), nn.Linear(size, d)

    def forward(self, x: Tensor) -> Tensor:
        """Add the bottleneck's map."""
        return x + self.up_project(F.gelu(self.down_project(x)))


class Block(nn.Module):
    """A block of any kind."""

    def __init__(self, d: int, d_ff: int, kind: str, scale: float) -> None:
        super().__init__()
        make = LoRALinear if kind == "lora" else lambda a, b: nn.Linear(a, b, bias=False)
        self.q, self.v = make(d, d), make(d, d)
        self.k, self.o = (nn.Linear(d, d, bias=False) for _ in range(2))
        self.ln1, self.ln2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.up, self.down = nn.Linear(d, d_ff, bias=False), nn.Linear(d_ff, d, bias=False)
        self.adapter = Adapter(d) if kind == "houlsby" else None
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then the MLP."""
        h = self.ln1(x)
        q, k, v = (f(h).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.down(F.silu(self.up(self.ln2(x))))
        return x + (y if self.adapter is None else self.adapter(y))


class LM(nn.Module):
    """Two blocks."""

    def __init__(self, d: int, d_ff: int, kind: str, scale: float, output_mult: float) -> None:
        super().__init__()
        self.wte = nn.Embedding(50, d)
        self.blocks = nn.ModuleList([Block(d, d_ff, kind, scale) for _ in range(2)])
        self.ln_f = nn.RMSNorm(d)
        self.head = Scaled(d, 50, bias=False, mult=output_mult)
        if kind == "frozen":
            self.wte.requires_grad_(False)
        if kind == "lora":
            for name, parameter in self.named_parameters():
                parameter.requires_grad = any(part in name for part in ("lora_", "ln", "head"))

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits and all hidden states, as many do."""
        hidden = [self.wte(ids)]
        for block in self.blocks:
            hidden.append(block(hidden[-1]))
        return self.head(self.ln_f(hidden[-1])), hidden


COMMON = {
    "wte.weight": Role("input"),
    "*ln*.weight": gain(),
    "head.weight": Role("output"),
    "*.lora_A.weight": Role("narrow"),
    "*.lora_B.weight": Role("wide", start="zeros"),
    "*.adapter.down_project.weight": Role("narrow"),
    "*.adapter.down_project.bias": Role("fixed", start="zeros"),
    "*.adapter.up_project.weight": Role("wide", 0.05),
    "*.adapter.up_project.bias": Role("vector", start="zeros"),
}
ROLES = COMMON | {"*.weight": Role("hidden")}
CONSTANT = COMMON | {
    "*.up.weight": Role("narrow"),
    "*.down.weight": Role("wide", 0.05),
    "*.weight": Role("hidden"),
}
ROOT = COMMON | {
    "*.down.weight": Role("hidden", ratio=lambda m: d_ff("root", 64 * m) / d_ff("root", 64)),
    "*.weight": Role("hidden"),
}


def d_ff(kind: str, width: float) -> int:
    """Return the MLP's size."""
    return {"constant": 96, "root": round(128 * (width / 64) ** 0.5)}.get(kind, int(2 * width))


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a model whose kind is the form's second word."""
    m, kind = width / 64, form.split()[1]
    scale = (width // 4) ** -0.5 if code == "scores" else 4.0 / (width // 4)
    model = LM(width, d_ff(kind, width), kind, scale, output_mult(form, m, code))
    for block in model.blocks:
        if kind == "lora" and code == "lora":
            block.q.scaling = block.v.scaling = 2.0 * m**0.5
    return model


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the next tokens' cross-entropy."""
    return next_token(model(ids)[0], ids)


FAULTS = (
    coded("scores by 1/sqrt(d_head)", "blocks", "scores"),
    *readout("head", "head.weight"),
    vector_lr("ln_f.weight", "ln_f"),
)
HOULSBY = (
    *FAULTS,
    hidden_lr("*.down_project.weight", tensor="down_project"),
    hidden_init("*.down_project.weight", "down_project", by=AUDIT),
    vector_lr("*.up_project.weight", "up_project.weight"),
    vector_lr("*.down_project.bias", "down_project.bias"),
    forgotten("blocks.0.adapter.up_project.bias", "blocks.0.adapter.up_project.bias"),
    hidden_lr("*.[qkvo].weight", "*.up.weight", "*.down.weight", tensor="blocks"),
)
LORA = (
    *FAULTS,
    hidden_lr("*.lora_A.weight", tensor="lora_A"),
    vector_lr("*.lora_B.weight", "lora_B"),
    Fault("lora_B's lr grows with m", "lora_B", BOTH, lr={"*.lora_B.weight": 1.0}),
    hidden_init("*.lora_A.weight", "lora_A", by=AUDIT),
    coded("LoRA's scaling grows as sqrt(m)", "lora_B", "lora", BOTH),
)
FROZEN = (
    *FAULTS,
    hidden_lr("blocks.1.down.weight", tensor="blocks.1.down"),
    hidden_init("blocks.0.o.weight", "blocks.0.o"),
    forgotten("blocks.0.k.weight", "blocks.0.k"),
)
FLAT = (
    *FAULTS,
    hidden_lr("*.up.weight", tensor="up.weight"),
    hidden_init("*.up.weight", "up.weight", by=AUDIT),
    vector_lr("*.down.weight", "down.weight"),
    Fault("down's sigma goes by the width", "down.weight", AUDIT, init={"*.down.weight": -0.5}),
    wrong_decay("*.down.weight", "down.weight"),
)
SQRT = (
    *FAULTS,
    Fault("down's lr goes by the width", "down.weight", AUDIT, lr={"*.down.weight": -0.5}),
    Fault("down's lr isn't divided", "down.weight", AUDIT, lr={"*.down.weight": 0.5}),
    Fault("up's lr goes by d_ff", "up.weight", AUDIT, lr={"*.up.weight": 0.5}),
    Fault("down's sigma is a constant", "down.weight", AUDIT, init={"*.down.weight": 0.25}),
    vector_lr("wte.weight", "wte", by=BOTH),
)
FAMILIES = [
    *families("adapters", build, ROLES, loss, tokens, ("table8 houlsby", "table3 houlsby"), HOULSBY),
    *families("lora", build, ROLES, loss, tokens, ("table3 lora", "table8 lora"), LORA, decay="none"),
    *families("frozen embedding", build, ROLES, loss, tokens, ("table8 frozen", "table3 frozen"), FROZEN),
    *families("constant d_ff", build, CONSTANT, loss, tokens, ("table3 constant", "table8 constant"), FLAT),
    *families("root d_ff", build, ROOT, loss, tokens, ("table8 root", "table3 root"), SQRT, decay="independent"),
]
