"""`crystal bench kernels`: the operators beside torch, Liger-Kernel and flash-attention."""
