"""Proof of the kernels without a GPU: compiled, counted, and run on a CPU as they are."""
