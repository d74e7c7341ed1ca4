"""SwiGLU's elementwise part: silu(gate) * up (Shazeer 2020, "GLU Variants Improve Transformer")."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, in the inputs' dtype."""
    return F.silu(gate) * up
