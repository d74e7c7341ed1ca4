"""What torch's operations do to the scale of what goes through them; everything else is called unknown.

The names are those of aten, as a dispatch mode sees them; in-place operations go by the name without the underscore.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# the same numbers in another shape or precision, or a part of them: not worth a node of their own, and how many of
# them run depends on sizes (a reshape is a view or a copy)
LAYOUT = _names(
    """view _unsafe_view reshape _reshape_alias transpose permute t mT expand expand_as unsqueeze squeeze slice select
    split split_with_sizes unsafe_split unsafe_split_with_sizes unsafe_chunk chunk unbind tensor_split narrow
    narrow_copy movedim moveaxis swapaxes flatten unflatten diagonal unfold as_strided clone _to_copy to contiguous
    alias detach lift_fresh repeat tile view_as view_as_complex view_as_real _conj resolve_conj resolve_neg
    split_copy view_copy expand_copy permute_copy t_copy slice_copy select_copy unsqueeze_copy squeeze_copy
    alias_copy"""
)
# the same numbers, some of them, or their sums, in another order
SAME = _names(
    """copy repeat_interleave index_select index gather take take_along_dim roll rot90 flip neg tril triu
    constant_pad_nd pad reflection_pad1d replication_pad1d reflection_pad2d replication_pad2d conj_physical real imag
    masked_fill masked_select dropout native_dropout set cumsum upsample_nearest1d upsample_nearest2d
    upsample_bilinear2d pixel_shuffle im2col col2im wait_tensor all_gather_into_tensor"""
)

# sums of like things: each operand keeps its scale
SUMS = _names("add sub rsub cat concat concatenate stack hstack vstack where lerp index_add scatter_add scatter "
              "scatter_reduce index_put index_copy select_scatter slice_scatter masked_scatter complex "
              "diagonal_scatter put")  # fmt: skip

AVERAGES = _names("mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d "
                  "_adaptive_avg_pool3d nanmean")  # fmt: skip

MATMULS = _names("mm bmm addmm baddbmm addbmm linear matmul mv addmv dot _grouped_mm grouped_mm _scaled_mm "
                 "_addmm_activation vdot inner")  # fmt: skip
CONVOLUTIONS = _names("convolution _convolution convolution_overrideable mkldnn_convolution _slow_conv2d_forward "
                      "conv1d conv2d conv3d conv_depthwise3d _conv_depthwise2d thnn_conv2d")  # fmt: skip
LOOKUPS = _names("embedding embedding_renorm _embedding_bag _embedding_bag_forward_only")

# their result has coordinates of size 1, whatever the scale of what goes in: op → places of (input, weight, bias)
NORMS = {
    "native_layer_norm": (0, 2, 3),
    "layer_norm": (0, 2, 3),
    "rms_norm": (0, 2, None),
    "_fused_rms_norm": (0, 2, None),
    "native_group_norm": (0, 1, 2),
    "native_batch_norm": (0, 1, 2),
    "_native_batch_norm_legit": (0, 1, 2),
    "_native_batch_norm_legit_functional": (0, 1, 2),
    "cudnn_batch_norm": (0, 1, 2),
    "batch_norm_elemt": (0, 1, 2),
    "_batch_norm_with_update": (0, 1, 2),
    "_batch_norm_no_update": (0, 1, 2),
}

# element by element, and not homogeneous: what multiplied the input before them counts
NONLINEAR = _names(
    """relu relu6 leaky_relu elu celu selu gelu silu mish hardtanh hardswish hardsigmoid sigmoid log_sigmoid
    log_sigmoid_forward tanh softplus softshrink hardshrink threshold _prelu_kernel prelu glu sin cos tan sinh cosh
    asin acos atan atan2 exp exp2 expm1 log log1p log2 log10 erf erfc erfinv special_erf special_expit logit
    clamp clamp_min clamp_max maximum minimum fmax fmin max min amax amin aminmax argmax argmin topk sort msort
    kthvalue median mode logsumexp _logcumsumexp logcumsumexp logaddexp cumprod prod sign sgn round floor ceil trunc
    frac fmod remainder floor_divide nan_to_num max_pool1d max_pool2d max_pool2d_with_indices max_pool3d
    max_pool1d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d polar angle
    nll_loss_forward nll_loss2d_forward nll_loss nll_loss2d binary_cross_entropy binary_cross_entropy_with_logits
    mse_loss smooth_l1_loss huber_loss l1_loss kl_div bernoulli multinomial isnan isinf
    _thnn_fused_lstm_cell _thnn_fused_gru_cell heaviside xlogy softsign relu_ cummax cummin bucketize"""
)
SOFTMAX = _names("softmax _softmax _safe_softmax _masked_softmax sparsemax")
LOG_SOFTMAX = _names("_log_softmax log_softmax")

# no number of what goes in comes out
FORGETS = _names(
    """eq ne lt le gt ge logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not isfinite
    zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full new_tensor
    new_empty_strided argsort nonzero any all searchsorted sym_size size numel shape bincount histc one_hot is_nonzero
    _local_scalar_dense item equal zero fill empty zeros ones full arange scalar_tensor unique _unique2 unique_dim
    unique_consecutive normal uniform random randint is_same_size allclose _assert_async _assert_tensor_metadata
    count_nonzero randint_like is_floating_point stride storage_offset dim"""
)
