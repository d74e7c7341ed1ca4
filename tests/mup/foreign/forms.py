"""The forms of muP as tables of exponents, and what draws and trains a model by them.

A weight is used as A * W @ x, drawn with sigma * B and trained with lr * C (Tensor Programs V). `m` is the ratio of
a tensor's own fan_in to its fan_in at the base width. A form is named by its first word, so that "table8 before" and
"table8 after" are one table in two spellings. Architectures state the kind of every tensor by its name, by hand:

    input   finite -> infinite at the model's input: embeddings, positions, patch convolutions
    hidden  infinite -> infinite
    output  infinite -> finite at the model's end
    narrow  infinite -> finite inside the model (no multiplier, whatever the form): routers, fixed k and v
    wide    finite -> infinite inside the model
    vector  one growing dimension: biases, gains, filters
    fixed   no dimension grows
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .family import Broken, Family

BASE = 64
LR = 2.0**-7
DECAY = 0.1
ADAM = {"hidden": (0, -0.5, -1), "narrow": (0, -1, -1), "wide": (0, 0, 0), "vector": (0, 0, 0), "fixed": (0, 0, 0)}
TABLES = {
    "table8": ADAM | {"input": (0, 0, 0), "output": (-1, 0, 0)},
    "table3": ADAM | {"input": (0, 0, 0), "output": (0, -1, -1)},
    "table9": ADAM | {"input": (0.5, -0.5, -0.5), "output": (-0.5, -0.5, -0.5)},
    # Table 8 with hidden weights moved along abc's symmetry, to either side
    "ntk": ADAM | {"input": (0, 0, 0), "hidden": (-0.5, 0, -0.5), "output": (-1, 0, 0)},
    "upscaled": ADAM | {"input": (0, 0, 0), "hidden": (0.5, -1, -1.5), "output": (-1, 0, 0)},
    # SGD's tables
    "sgd8": {"input": (0, 0, 1), "hidden": (0, -0.5, 0), "output": (-1, 0, 1), "vector": (0, 0, 1), "fixed": (0, 0, 0)},
    "sgd9": {
        "input": (0.5, -0.5, 0),
        "hidden": (0, -0.5, 0),
        "output": (-0.5, -0.5, 0),
        "vector": (0, 0, 1),
        "fixed": (0, 0, 0),
    },
}


def abc(form: str, kind: str, m: float) -> tuple[float, float, float]:
    """Return multiplier, sigma and learning rate relative to the base width."""
    a, b, c = TABLES[form.split()[0]][kind]
    return m**a, m**b, m**c


@dataclass(frozen=True)
class Role:
    """What a tensor is, and how it starts at the base width."""

    kind: str
    sigma: float = 0.125
    start: str = "normal"
    ratio: Callable[[float], float] | None = None  # own fan_in's ratio, from the width's


def gain() -> Role:
    """Return the role of a gain that starts at one."""
    return Role("vector", start="ones")


def bias() -> Role:
    """Return the role of a bias that starts at zero."""
    return Role("vector", start="zeros")


@dataclass(frozen=True)
class Fault:
    """What is edited in a right family. Powers are those of m by which a tensor is off, by pattern of its name."""

    name: str
    tensor: str
    by: tuple[str, ...] = ("audit", "coord-check")
    code: str = ""  # handed to the architecture's own build
    init: dict[str, float] = field(default_factory=dict)
    lr: dict[str, float] = field(default_factory=dict)
    decay: dict[str, float] = field(default_factory=dict)
    eps: float = 0.0
    left_out: tuple[str, ...] = ()
    after: Callable[[nn.Module], None] | None = None
    forms: tuple[str, ...] = ()  # first words of the forms it makes sense in; all if empty


AUDIT = ("audit",)
BOTH = ("audit", "coord-check")


def role_of(roles: dict[str, Role], name: str) -> Role:
    """Return the first role whose pattern fits."""
    for pattern, role in roles.items():
        if fnmatchcase(name, pattern):
            return role
    raise KeyError(f"no role stated for {name}")


def off(powers: dict[str, float], name: str, m: float) -> float:
    """Return the factor by which a fault is off at this tensor."""
    factor = 1.0
    for pattern, power in powers.items():
        if fnmatchcase(name, pattern):
            factor *= m**power
    return factor


def start(parameter: Tensor, how: str, sigma: float) -> None:
    """Draw one tensor in one of the ways people do."""
    if how == "normal":
        nn.init.normal_(parameter, std=sigma)
    elif how == "normal ones":
        nn.init.normal_(parameter, mean=1.0, std=sigma)
    elif how == "trunc":
        nn.init.trunc_normal_(parameter, std=sigma, a=-3 * sigma, b=3 * sigma)
    elif how == "uniform":
        nn.init.uniform_(parameter, -(3**0.5) * sigma, 3**0.5 * sigma)
    elif how == "zeros":
        nn.init.zeros_(parameter)
    elif how == "ones":
        nn.init.ones_(parameter)
    elif how != "keep":
        raise ValueError(how)


def draw(model: nn.Module, roles: dict[str, Role], form: str, m: float, fault: Fault) -> None:
    """Initialise every parameter by its role."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in (*fault.init, *fault.lr, *fault.decay, *fault.left_out):
        assert any(fnmatchcase(name, pattern) for name in names), f"{fault.name}: nothing is called {pattern}"
    for name, parameter in model.named_parameters():
        role = role_of(roles, name)
        _, b, _ = abc(form, role.kind, role.ratio(m) if role.ratio else m)
        start(parameter, role.start, role.sigma * b * off(fault.init, name, m))


def groups(model: nn.Module, roles: dict[str, Role], form: str, fault: Fault, decay: str, lr: float) -> list[dict]:
    """Return the optimizer's groups, one for each pair of learning rate and weight decay."""
    m, made = model.width_mult, {}
    assert decay != "none" or not fault.decay, f"{fault.name}: no weight decay to be wrong"
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or any(fnmatchcase(name, pattern) for pattern in fault.left_out):
            continue
        role = role_of(roles, name)
        _, _, c = abc(form, role.kind, role.ratio(m) if role.ratio else m)
        weighs = decay != "none" and role.kind not in ("vector", "fixed")
        shrink = DECAY * (1 / c if decay == "independent" else 1) * off(fault.decay, name, m) if weighs else 0.0
        made.setdefault((lr * c * off(fault.lr, name, m), shrink), []).append(parameter)
    return [{"params": ps, "lr": rate, "weight_decay": shrink} for (rate, shrink), ps in made.items()]


def families(
    name: str,
    build: Callable[[int, str, str], nn.Module],
    roles: dict[str, Role],
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Callable[[int], Any],
    forms: Iterable[str],
    faults: Iterable[Fault],
    *,
    decay: str = "coupled",  # or "independent" or "none"
    eps: float = 0.0,  # eps is 1e-8 * m ** eps
    lr: float = LR,
    after: Callable[[nn.Module], None] | None = None,
) -> list[Family]:
    """Return an architecture's families, one a form: `build` makes the module, and roles draw and train it."""

    def factory(form: str, fault: Fault) -> Callable[[int], nn.Module]:
        def make(width: int) -> nn.Module:
            model = build(width, form, fault.code)
            model.width_mult = width / BASE
            draw(model, roles, form, width / BASE, fault)
            for step in (after, fault.after):
                if step is not None:
                    step(model)
            return model

        return make

    def optimizer(form: str, fault: Fault) -> Callable[[nn.Module], torch.optim.Optimizer]:
        def make(model: nn.Module) -> torch.optim.Optimizer:
            made = groups(model, roles, form, fault, decay, lr)
            if form.startswith("sgd"):
                return torch.optim.SGD(made, lr=lr)
            return torch.optim.AdamW(made, lr=lr, eps=1e-8 * model.width_mult ** (eps + fault.eps))

        return make

    found, right = [], Fault("", "")
    for form in forms:
        fitting = [fault for fault in faults if not fault.forms or form.split()[0] in fault.forms]
        broken = tuple(Broken(f.name, f.tensor, f.by, factory(form, f), optimizer(form, f)) for f in fitting)
        found.append(Family(name, form, factory(form, right), optimizer(form, right), loss, batch, broken))
    return found


class Scaled(nn.Linear):
    """A Linear whose input is multiplied by a number: the readout of most people's muP."""

    def __init__(self, *args, mult: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.mult = mult

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of the scaled input."""
        return super().forward(x * self.mult)


class ScaledEmbedding(nn.Embedding):
    """An Embedding whose rows are multiplied by a number, as Gemma's are."""

    def __init__(self, *args, mult: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.mult = mult

    def forward(self, ids: Tensor) -> Tensor:
        """Return the scaled rows."""
        return super().forward(ids) * self.mult


def tokens(seed: int, vocab: int = 50, batch: int = 4, length: int = 17) -> Tensor:
    """Return a batch of token ids."""
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the cross-entropy of every next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def hf_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the loss that a transformers' model computes by itself."""
    return model(input_ids=ids, labels=ids).loss


# Faults that many architectures share


def hidden_lr(*patterns: str, tensor: str = "", power: float = 1.0) -> Fault:
    """Return the fault of hidden weights whose lr isn't divided by m."""
    words = "isn't divided by m" if power > 0 else "is divided by m twice"
    return Fault(f"lr of {tensor or patterns[0]} {words}", tensor, BOTH, lr=dict.fromkeys(patterns, power))


def hidden_init(pattern: str, tensor: str, power: float = 0.5, by: tuple[str, ...] = BOTH) -> Fault:
    """Return the fault of a hidden weight whose sigma isn't divided by sqrt(m)."""
    return Fault(f"init of {tensor} off by m**{power}", tensor, by, init={pattern: power})


def vector_lr(pattern: str, tensor: str, power: float = -1.0, by: tuple[str, ...] = AUDIT) -> Fault:
    """Return the fault of an embedding, bias or gain whose lr is divided by m."""
    return Fault(f"lr of {tensor} off by m**{power}", tensor, by, lr={pattern: power})


def forgotten(pattern: str, tensor: str) -> Fault:
    """Return the fault of a trainable tensor that's in no group of the optimizer."""
    return Fault(f"{tensor} is in no group", tensor, BOTH, left_out=(pattern,))


def wrong_decay(pattern: str, tensor: str, power: float = 1.0) -> Fault:
    """Return the fault of a weight decay that goes with a power of m of its own."""
    return Fault(f"weight decay of {tensor} off by m**{power}", tensor, AUDIT, decay={pattern: power})


def wrong_eps(power: float = 2.0) -> Fault:
    """Return the fault of Adam's eps that grows with width."""
    return Fault(f"eps off by m**{power}", "", AUDIT, eps=power)


def coded(name: str, tensor: str, code: str, by: tuple[str, ...] = AUDIT, forms: tuple[str, ...] = ()) -> Fault:
    """Return a fault that the architecture's build plants by itself."""
    return Fault(name, tensor, by, code, forms=forms)


def readout(tensor: str, pattern: str) -> list[Fault]:
    """Return a readout's faults, fitting the form: its multiplier where it has one, else its init."""
    return [
        coded("readout's multiplier is missing", tensor, "readout", BOTH, ("table8", "ntk", "upscaled")),
        coded("readout's multiplier is missing", tensor, "readout", AUDIT, ("table9",)),
        coded("readout's multiplier is 1/sqrt(m)", tensor, "readout sqrt", AUDIT, ("table8", "ntk", "upscaled")),
        Fault("readout's init isn't divided by m", tensor, BOTH, init={pattern: 1.0}, forms=("table3",)),
        Fault("readout's lr isn't divided by m", tensor, BOTH, lr={pattern: 1.0}, forms=("table3",)),
    ]


def output_mult(form: str, m: float, code: str = "") -> float:
    """Return the readout's multiplier, or what a fault makes of it."""
    if code == "readout":
        return 1.0
    return m**-0.5 if code == "readout sqrt" else abc(form, "output", m)[0]
