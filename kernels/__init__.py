"""Fused operators, one file each: the torch reference that defines the operator, and where it runs fastest."""

from crystal.kernels import measuring, tuning
from crystal.kernels.add_norm import add_norm
from crystal.kernels.attention import attention
from crystal.kernels.attention_documents import document_bounds
from crystal.kernels.cross_entropy import cross_entropy
from crystal.kernels.dispatch import mode
from crystal.kernels.layer_norm import layer_norm
from crystal.kernels.linear import linear
from crystal.kernels.linear_cross_entropy import linear_cross_entropy
from crystal.kernels.rms_norm import rms_norm
from crystal.kernels.rope import rope, rope_, rope_table
from crystal.kernels.swiglu import swiglu

tuning.measure = measuring.measure  # which times the operators above, and so cannot be imported below them
mode()  # a wrong CRYSTAL_KERNELS is heard of at once

__all__ = [
    "add_norm",
    "attention",
    "cross_entropy",
    "document_bounds",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_",
    "rope_table",
    "swiglu",
]
