"""What torch functions do to a row mask that is multiplied into their input: the vocabulary of discovery.

The names are `__name__` of the functions as `TorchFunctionMode` sees them.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VIEW = _names(
    "view reshape permute transpose flatten unflatten squeeze unsqueeze contiguous to type float half bfloat16 double "
    "clone __get__ view_as type_as alias swapaxes movedim moveaxis reshape_as dropout requires_grad_ as_subclass t"
)
"""Same numbers in another form (or dropout, which is the identity in eval): the same value, for our purposes."""

_SAME_PLACE = _names(
    "contiguous to type float half bfloat16 double clone type_as alias dropout requires_grad_ as_subclass"
)
"""Of these views, those that keep the form, too."""

SLICE = _names("__getitem__ chunk split narrow unbind tensor_split index_select gather select")
"""Part of the numbers."""

SCALE = _names(
    "mul mul_ div div_ true_divide multiply divide neg dropout dropout_ feature_dropout dropout1d dropout2d dropout3d"
)
"""Each number times another."""

DIVIDE = _names("div div_ true_divide divide")
"""Of these, what may not be masked in its second number."""

GATHER = _names("cat concat stack sum mean roll expand pad flip interpolate avg_pool2d adaptive_avg_pool2d fold repeat")
"""Linear and without a bias, of one or several values."""

COMMUTES = VIEW | SLICE | SCALE | GATHER
"""f(m * x) == m * f(x) for a mask m >= 0 with one entry a row."""

KEEPS_ZERO = _names("relu relu_ gelu silu tanh leaky_relu hardswish mish elu relu6")
"""f(0) == 0: commutes with masks of zeros and ones, not with rescaled ones."""

MOVES = (VIEW | SLICE | _names("expand expand_as repeat tile broadcast_to flip roll")) - _SAME_PLACE
"""Each number of the result is one of the input's, at another place."""

LIKE = _names("view_as reshape_as expand_as type_as")
"""Take a second tensor for its form alone."""

ELEMENTWISE = (
    _SAME_PLACE
    | SCALE
    | KEEPS_ZERO
    | _names(
        "add __add__ __iadd__ __radd__ sub __sub__ rsub __rsub__ __mul__ __rmul__ __rdiv__ __rtruediv__ reciprocal abs "
        "pow __pow__ square sqrt rsqrt exp log sin cos erf sigmoid logsigmoid hardsigmoid hardtanh softplus clamp clip "
        "where masked_fill maximum minimum"
    )
)
"""Each number of the result comes from those at the same place in the inputs, which are broadcast; in place, too."""

DROPOUT = _names("dropout dropout_ dropout1d dropout2d dropout3d feature_dropout alpha_dropout feature_alpha_dropout")

ADD = _names("add add_ addcmul addcmul_ __add__ __iadd__ __radd__")
SUBTRACT = _names("sub sub_ subtract subtract_ __sub__ __isub__ rsub __rsub__")
REDUCE = _names("sum mean einsum")
"""Add up the values of a list that was put together."""

CONCATENATE = _names("cat concat stack")

WEIGHTED = _names("linear conv1d conv2d conv3d multi_head_attention_forward conv_transpose2d")
"""Layers with a weight matrix; the number of them on a path tells a shortcut from a branch."""

AFFINE = (
    COMMUTES
    | ADD
    | _names(
        "linear conv1d conv2d conv3d batch_norm layer_norm group_norm rms_norm instance_norm max_pool1d max_pool2d "
        "max_pool3d boolean_dispatch avg_pool1d avg_pool3d clamp sub rsqrt pow"
    )
)
"""What a projection shortcut may be made of: projections, norms and pooling."""

MIXING = _names("matmul __matmul__ bmm einsum baddbmm softmax scaled_dot_product_attention")
"""Products of two data-dependent values, as in attention."""

NO_SUM = COMMUTES | ELEMENTWISE | WEIGHTED | DROPOUT | (MIXING - {"baddbmm"})
"""Known not to add some of the values they take to others, but by name (`ADD`, `SUBTRACT`)."""

DISTANCE = _names(
    "pow pow_ __pow__ square square_ abs abs_ norm linalg_norm linalg_vector_norm vector_norm mse_loss l1_loss "
    "smooth_l1_loss huber_loss"
)
"""What is made of a difference that is an error."""

UPSAMPLE = _names(
    "interpolate conv_transpose1d conv_transpose2d conv_transpose3d pixel_shuffle upsample repeat_interleave"
)

BROADCAST = _names("expand repeat tile expand_as broadcast_to repeat_interleave")
"""Turns a learned token into one a row: data from here on."""

FRESH = frozenset(
    f"{prefix}_{suffix}"
    for prefix in ("new", "full", "zeros", "ones", "empty", "rand", "randn")
    for suffix in ("zeros", "ones", "full", "empty", "tensor", "like")
)
"""Take a tensor for its shape alone; the result does not depend on its numbers."""

FACTORIES = FRESH | _names("empty zeros ones full tensor arange rand randn randint randperm")
"""Make a tensor where they are told to, of nothing that depends on data."""

FROM_HOST = _names("tensor as_tensor asarray from_numpy frombuffer")
"""Make tensors of what are none: texts that were turned to numbers, say."""

DRAWS = _names(
    "rand rand_like uniform_ bernoulli bernoulli_ randint randint_like random_ randperm multinomial randn randn_like "
    "normal normal_ exponential_ poisson binomial"
)
"""Draw random numbers, whatever mode the model is in."""

PRODUCT = _names("mul mul_ multiply where masked_fill masked_fill_")
"""A number a row in these keeps or takes away the row."""
