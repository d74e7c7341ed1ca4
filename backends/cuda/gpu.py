"""What torch is told before a process' first use of its GPU."""

from __future__ import annotations

import os

import torch

# torch reads the first of these that is set, when memory of the device is first asked for (CUDAAllocatorConfig.h)
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def settle() -> None:
    """Choose how memory is cut and how products are summed, wherever the user did not.

    Expandable segments: blocks of many sizes come and go (gathered weights, activations, chunks of logits), and
    segments of fixed size keep what fits no later request; a plan that fills 34.4 of 36 GB has no room for that.

    bf16 products add up in fp32, as on the other backends. cuBLAS is otherwise free to add the parts of a product that
    it split along its inner dimension in bf16, and whether it splits goes by the shape: the widths of a muP comparison,
    or the ranks of two layouts, would round differently.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
