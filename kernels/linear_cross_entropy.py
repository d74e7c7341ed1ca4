"""The loss head in one operator: project, score, differentiate, a few hundred tokens at a time.

The logits of a whole batch are the largest tensor of a training step (8,192 tokens x 32,032 words in fp32 are
1 GB) and nobody needs them twice. So for each chunk of tokens the forward pass makes the logits, reads off the
loss, and turns them in place into their gradient softmax - onehot, which is at once multiplied back into the
gradients of x and weight. Backward only scales these. On a CPU this is 1.1x (fp32) to 1.2x (bf16) faster than
logits followed by cross_entropy, because a chunk stays in the cache. On CUDA a chunk is larger, so that its matrix
products fill the GPU, and the two kernels of `cross_entropy` make its losses and, in place, its gradient.
"""

import torch
from torch import Tensor

import crystal.kernels.native as native
from crystal.kernels.cross_entropy import backward_rows, forward_rows
from crystal.kernels.dispatch import use_triton, widened
from crystal.kernels.linear import input_gradient, product, weight_gradient

CHUNK = 512  # tokens; 256 and 512 measured equal on a CPU
CUDA_CHUNK = 4096
NO_LABEL = -100  # is ignored; labels of the head are classes throughout


def _scored_by_torch(logits_CV, labels_C, weights_C, scale: float, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Each token's loss, and the gradient of the weighted sum by the logits, which may be overwritten."""
    dtype, logits_CV = logits_CV.dtype, logits_CV.float()
    if scale != 1:
        logits_CV.mul_(scale)
    label_C1 = labels_C[:, None]
    label_logit_C1, top_C1 = logits_CV.gather(1, label_C1), logits_CV.amax(1, keepdim=True)
    # torch's softmax is one pass over a row in the cache. The row's log sum exp is its greatest logit less the
    # logarithm of its greatest probability, which is never small: half the time of torch's logsumexp and exp.
    grad_CV = torch.softmax(logits_CV, -1, out=logits_CV)
    nll_C = (top_C1 - grad_CV.amax(1, keepdim=True).log() - label_logit_C1).squeeze(1)
    if not with_grad:
        return nll_C, None
    grad_CV.scatter_add_(1, label_C1, torch.full_like(top_C1, -1.0))
    return nll_C, grad_CV.mul_(weights_C[:, None] * scale).to(dtype)


def _scored_by_native(logits_CV, labels_C, weights_C, scale: float, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The same by `native.c`."""
    return native.score(logits_CV, labels_C, weights_C, scale, with_grad), logits_CV if with_grad else None


def _scored_by_kernels(logits_CV, labels_C, weights_C, scale: float, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The same by the kernels of `cross_entropy`."""
    how = (scale, NO_LABEL, 0.0, 0.0)
    nll_C, lse_C = forward_rows(logits_CV, labels_C, *how)
    if not with_grad:
        return nll_C, None
    backward_rows(logits_CV, weights_C, logits_CV, labels_C, lse_C, None, *how)
    return nll_C, logits_CV


def scaled(
    dx_ND: Tensor | None, dw_VD: Tensor | None, dloss: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients that the forward pass made, times the loss's own, the weight's in the weight's dtype."""
    # dloss is 1 in loss.backward(); a CPU can look, a GPU would have to wait
    if type(dloss) is Tensor and dloss.device.type == "cpu" and dloss == 1:
        return dx_ND, None if dw_VD is None else dw_VD.to(weight_dtype)
    dx = None if dx_ND is None else dx_ND * dloss.to(dx_ND.dtype)
    if dw_VD is None:
        return dx, None
    # rounded as it is written: a scaled fp32 copy would be the largest tensor of the step
    return dx, torch.mul(widened(dw_VD), dloss, out=torch.empty_like(dw_VD, dtype=weight_dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, weight_VD, labels_N, weights_N, logits_scale):
        needs_x, needs_w = ctx.needs_input_grad[:2]
        dx_ND = torch.empty_like(x_ND) if needs_x else None
        nll_N = torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
        fused = use_triton(x_ND, weight_VD) and not torch.compiler.is_compiling()
        chunk = CUDA_CHUNK if fused else CHUNK
        plain = _scored_by_native if native.use_native(x_ND, weight_VD) else _scored_by_torch
        score = _scored_by_kernels if fused else plain
        dw_VD = None  # of one chunk as it comes, for it is the largest tensor of a small step; a sum of several in fp32
        if needs_w and x_ND.shape[0] > chunk:
            dw_VD = torch.zeros(weight_VD.shape, dtype=torch.float32, device=x_ND.device)
        for begin in range(0, x_ND.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            nll_N[rows], grad_CV = score(
                product(x_ND[rows], weight_VD), labels_N[rows], weights_N[rows], logits_scale, needs_x or needs_w
            )
            if needs_x:
                dx_ND[rows] = input_gradient(grad_CV, weight_VD)
            if needs_w:
                if dw_VD is None:
                    dw_VD = weight_gradient(grad_CV, x_ND[rows])
                else:
                    dw_VD += weight_gradient(grad_CV, x_ND[rows])
        ctx.save_for_backward(dx_ND, dw_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(nll_N)
        return (nll_N * weights_N).sum(), nll_N

    @staticmethod
    def backward(ctx, dloss, _):
        return *scaled(*ctx.saved_tensors, dloss, ctx.weight_dtype), None, None, None


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, weights_N: Tensor, logits_scale: float
) -> tuple[Tensor, Tensor]:
    """Weighted sum of cross-entropies of softmax(logits_scale * x @ weight.T) against labels.

    x_ND, weight_VD: fp32 or bf16; labels_N: int64 in [0, V); weights_N: fp32, what each token counts (0 for
    padding, 1/(batch * seq_len) for the published normalisation). Softmax and losses in fp32.
    Returns (loss, nll_N): the differentiable scalar, and each token's loss in nats, fp32, without gradient.
    """
    return _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, weights_N, logits_scale)
