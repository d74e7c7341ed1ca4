"""Fused operators, one file each: the torch reference that defines the operator, and where it runs fastest."""

from crystal.kernels.linear_cross_entropy import linear_cross_entropy
from crystal.kernels.layer_norm import layer_norm
from crystal.kernels.rms_norm import rms_norm
from crystal.kernels.rope import rope, rope_table
from crystal.kernels.swiglu import swiglu

__all__ = ["layer_norm", "linear_cross_entropy", "rms_norm", "rope", "rope_table", "swiglu"]
