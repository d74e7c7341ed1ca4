"""The parameter plan: for every tensor, by name and global shape, what muP says about it. Plain data.

The `mup` package decides which dimensions are widths, by comparing a base and a delta model of other widths, all
three on the meta device; from then on nothing hangs on tensors, so the plan holds after deepcopy, to_empty,
assign=True, functional_call, export, compile, DDP, FSDP, tensor parallelism and weight streaming. It knows no
model of ours: a role follows from the kind of module that holds a tensor and from which of its dimensions grow.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import mup
from torch import Tensor, nn

from crystal.mup.rules import PARAMETRIZATIONS, Parametrization, Role, Tuning, role_of_map


class PlanError(ValueError):
    """A tensor whose role cannot be told, or models that do not match; the message names the tensor."""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor's row. init_std is the parent normal's sigma; init_cut the bound it is cut at, or None."""

    tensor: str
    shape: tuple[int, ...]
    role: Role
    group: str  # optimizer group: tensors of one role with one lr, weight decay and eps
    width_multiplier: float
    init: str  # normal | zeros | ones
    init_std: float
    init_cut: float | None
    lr_multiplier: float
    weight_decay: float
    eps: float
    forward_multiplier: float
    rule: str


@dataclass(frozen=True)
class Plan:
    """All rows, and the two multipliers that belong to the model rather than to a tensor."""

    parametrization: str
    width_multiplier: float  # of d_model
    depth_multiplier: float
    embedding_multiplier: float
    logits_multiplier: float
    residual_multiplier: float
    tensors: tuple[TensorPlan, ...]

    def __getitem__(self, tensor: str) -> TensorPlan:
        return next(row for row in self.tensors if row.tensor == tensor)

    def groups(self) -> dict[str, tuple[TensorPlan, ...]]:
        """Optimizer groups in order of first appearance: name → rows, equal in lr, weight decay and eps."""
        found: dict[str, tuple[TensorPlan, ...]] = {}
        for row in self.tensors:
            found[row.group] = (*found.get(row.group, ()), row)
        return found

    def parameter_groups(self, weights: nn.Module | Mapping[str, Tensor], lr: float) -> list[dict]:
        """What an AdamW takes: `torch.optim.AdamW(plan.parameter_groups(model, lr=0.01), betas=…)`.

        weights: a module, or its tensors by name (sharded ones too: a group is a list of names). Each group has
        params, lr (base lr times its multiplier), weight_decay, eps, and name and lr_multiplier for schedules.
        """
        named = dict(weights.named_parameters()) if isinstance(weights, nn.Module) else weights
        return [
            {
                "name": name,
                "params": [named[row.tensor] for row in rows],
                "lr": lr * rows[0].lr_multiplier,
                "lr_multiplier": rows[0].lr_multiplier,
                "weight_decay": rows[0].weight_decay,
                "eps": rows[0].eps,
            }
            for name, rows in self.groups().items()
        ]

    def as_dict(self) -> dict:
        """JSON-ready; what a run's manifest holds."""
        return asdict(self)


Layouts = Mapping[str, tuple[int, int] | None]

# which dimension of a weight is fan_in and which fan_out
_LAYOUTS = {
    "Linear": (1, 0), "Embedding": (0, 1), "EmbeddingBag": (0, 1), "Conv1D": (0, 1), "Conv1d": (1, 0), "Conv2d": (1, 0),
    "Conv3d": (1, 0), "ConvTranspose1d": (0, 1), "ConvTranspose2d": (0, 1), "ConvTranspose3d": (0, 1),
}  # fmt: skip
_RECURRENT = ("RNNBase", "RNNCellBase")


def make_plan(
    target: nn.Module,
    base: nn.Module,
    delta: nn.Module,
    parametrization: str,
    tuning: Tuning,
    *,
    residual_out: Sequence[str] = (),
    blocks: str = "blocks.",
    n_layers: int = 1,
    base_n_layers: int | None = None,
) -> Plan:
    """The plan of `target`.

    target, base, delta: the same architecture and depth at the target's, the base and another width, on meta.
    residual_out: endings of the names of matrices that write into the residual stream.
    blocks: start of the names of tensors inside residual blocks. n_layers, base_n_layers: for 2L and CompleteP.
    Raises PlanError for a tensor of unknown role or models of different structure.
    """
    rules = PARAMETRIZATIONS[parametrization]
    infshapes = infshapes_of(target, base, delta)
    layouts = layouts_of(target)
    m_depth = n_layers / (base_n_layers or n_layers) if rules.depth else 1.0
    m_model = _model_width(infshapes, layouts)
    rows = [
        _row(name, infshape, layouts[name], rules, tuning, m_model, m_depth, name.startswith(blocks),
             name.endswith(tuple(residual_out)), n_layers)
        for name, infshape in infshapes.items()
    ]  # fmt: skip
    return Plan(
        parametrization=parametrization,
        width_multiplier=m_model,
        depth_multiplier=m_depth,
        embedding_multiplier=tuning.embedding_multiplier,
        logits_multiplier=tuning.output_alpha * m_model ** rules.powers["output"].forward,
        residual_multiplier=m_depth**-tuning.depth_alpha if rules.depth else 1.0,
        tensors=tuple(_named_groups(rows)),
    )


def infshapes_of(target: nn.Module, base: nn.Module, delta: nn.Module) -> dict[str, mup.InfShape]:
    """mup's verdict on every dimension; its marks are taken off the tensors again."""
    names = [{n for n, _ in m.named_parameters()} for m in (target, base, delta)]
    if not names[0] == names[1] == names[2]:
        raise PlanError(f"base and delta must have the target's tensors; differing: {sorted(names[0] ^ names[1])[:3]}")
    mup.set_base_shapes(target, base, delta=delta, rescale_params=False, do_assert=False)
    found = {name: p.infshape for name, p in target.named_parameters()}
    for p in target.parameters():
        del p.infshape
    return found


def layouts_of(model: nn.Module, known: Layouts | None = None) -> dict[str, tuple[int, int] | None]:
    """name → (fan_in dimension, fan_out dimension) of a matrix, or None for a vector.

    known: layouts of tensors that no module of a known kind holds. Raises PlanError for one that is not in it.
    """
    found = known_layouts(model, known)
    holders = {id(p): type(m).__name__ for m in model.modules() for p in m.parameters(recurse=False)}
    for name, p in model.named_parameters():
        if name not in found:
            raise PlanError(
                f"{name}: expected a known module (Linear, Embedding, …), got {holders[id(p)]}: say which of its "
                f"dimensions are fan_in and fan_out, as in layouts={{'{name}': (0, 1)}}, or None if it is no matrix"
            )
    return found


def layouts_beside(
    model: nn.Module, known: Layouts | None, told: Collection[str], refused: Collection[str] = ()
) -> dict[str, tuple[int, int] | None]:
    """As `layouts_of`, without tensors that their use in the forward pass tells of: `told`, less those `refused`.

    Frozen tensors need no layout. Raises PlanError for the first tensor that nothing tells.
    """
    found = known_layouts(model, known)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    layouts_of(model, found | dict.fromkeys((set(told) - set(refused)) | frozen))
    return found


def known_layouts(model: nn.Module, known: Layouts | None = None) -> dict[str, tuple[int, int] | None]:
    """As `layouts_of`, with tensors left out that no module of a known kind holds."""
    found: dict[str, tuple[int, int] | None] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for module in model.modules():
        for key, p in module.named_parameters(recurse=False):
            name = names[id(p)]
            layout = _layout(module, key)
            if known and name in known:
                found[name] = known[name]
            elif layout and p.ndim > 1:
                # a tied tensor keeps the layout of the embedding, which is registered first
                found.setdefault(name, layout)
            elif p.ndim < 2 or math.prod(p.shape) == max(p.shape):
                found.setdefault(name, None)
    return found


def _layout(module: nn.Module, key: str) -> tuple[int, int] | None:
    """Of a module's own tensor, by the kind of module."""
    kind = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _LAYOUTS), None)
    if kind and key == "weight":
        return _LAYOUTS[kind]
    if any(c.__name__ in _RECURRENT for c in type(module).__mro__) and key.startswith("weight_"):
        return (1, 0)
    if any(c.__name__ == "MultiheadAttention" for c in type(module).__mro__) and key.endswith("proj_weight"):
        return (1, 0)
    return None


def grown(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """The dimensions that differ."""
    return [d for d, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]


def uses_of(model: nn.Module) -> dict[str, set[tuple[int, int]]]:
    """name → layouts under which modules hold it: more than one where an embedding and a head share a tensor."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, set[tuple[int, int]]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        layout = _layout(module, "weight")
        if layout and weight is not None and weight.ndim > 1:
            found.setdefault(names[id(weight)], set()).add(layout)
    return found


def role_of(name: str, infshape: mup.InfShape, layout: tuple[int, int] | None) -> Role:
    if layout is None:
        return "vector"
    role = role_of_map(*(infshape[d].isinf() for d in layout))
    if role is None:
        raise PlanError(f"{name}: no dimension of {tuple(infshape.shape())} grows from base to delta")
    return role


def _model_width(infshapes: dict, layouts: dict) -> float:
    """m of d_model: the growing dimension of the first embedding (or of the first matrix there is)."""
    matrices = [name for name in infshapes if layouts[name] is not None]
    first = next((n for n in matrices if role_of(n, infshapes[n], layouts[n]) == "embedding"), matrices[0])
    return infshapes[first].width_mult()


def _row(
    name: str,
    infshape: mup.InfShape,
    layout: tuple[int, int] | None,
    rules: Parametrization,
    tuning: Tuning,
    m_model: float,
    m_depth: float,
    in_block: bool,
    is_residual_out: bool,
    n_layers: int,
) -> TensorPlan:
    role = role_of(name, infshape, layout)
    powers = rules.powers[role]
    own = infshape[layout[0]].width_mult() if role == "hidden" else infshape.width_mult()
    m = own if rules.own_fan_in else m_model
    notes = [f"{role}: init m^{powers.init:g}, lr m^{powers.lr:g}" if role == "hidden" else f"{role}: init 1, lr 1"]

    init = "normal" if layout is not None else "ones" if name.endswith("weight") else "zeros"
    std = tuning.init_std * m**powers.init if init == "normal" else 0.0
    if is_residual_out and tuning.residual_init_2l:
        std /= math.sqrt(2 * n_layers)
        notes.append("init /sqrt(2L)")
    lr, eps = m**powers.lr, tuning.eps
    if rules.depth and in_block:
        lr *= m_depth ** (tuning.depth_alpha - 1)
        eps *= m_model**-1 * m_depth**-tuning.depth_alpha
        notes.append("block: lr m_L^(alpha-1), eps m^-1 m_L^-alpha")
    decay = tuning.weight_decay if role != "vector" or tuning.decay_vectors else 0.0
    if tuning.independent_decay:
        decay *= m**-powers.lr
        notes.append("weight decay x m")
    forward = tuning.embedding_multiplier if role == "embedding" else 1.0
    if is_residual_out and rules.depth:
        forward = m_depth**-tuning.depth_alpha
    if role == "output":
        forward = tuning.output_alpha * m_model**powers.forward
    return TensorPlan(
        tensor=name,
        shape=tuple(infshape.shape()),
        role=role,
        group="",
        width_multiplier=m,
        init=init,
        init_std=std,
        init_cut=std * tuning.init_truncate if tuning.init_truncate and init == "normal" else None,
        lr_multiplier=lr,
        weight_decay=decay,
        eps=eps,
        forward_multiplier=forward,
        rule=f"{'; '.join(notes)} ({rules.source})",
    )


def _named_groups(rows: list[TensorPlan]) -> list[TensorPlan]:
    """Name each row's optimizer group: the role, plus the lr multiplier where a role has more than one."""
    settings: dict[Role, set] = {}
    for row in rows:
        settings.setdefault(row.role, set()).add((row.lr_multiplier, row.weight_decay, row.eps))

    def name(row: TensorPlan) -> str:
        if len(settings[row.role]) == 1:
            return row.role
        same_lr = sum(s[0] == row.lr_multiplier for s in settings[row.role]) > 1
        return f"{row.role} lr x{row.lr_multiplier:g}" + (f" eps {row.eps:g}" if same_lr else "")

    return [TensorPlan(**{**row.__dict__, "group": name(row)}) for row in rows]
