"""Families of JAX primitives: what they compute decides what a compiler fuses and what the runtime keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..strategy import Remat

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil
    clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp
    exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p log2
    logistic lt lt_to max min mul mulhi name ne neg nextafter not one_minus_square or polygamma polynomial
    population_count pow pvary real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor zeros_like zeta""".split()
)
"""They work element by element (size-1 dimensions broadcast)."""

REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
)
"""They combine all elements along their ``axes``."""

RANDOM = frozenset(
    """create_token iota random_bits random_clone random_fold_in random_seed random_split random_unwrap random_wrap
    rng_bit_generator rng_uniform threefry2x32""".split()
)
"""Their results depend on no operand's layout (partitionable threefry)."""

KERNELS = frozenset(
    """cond conv_general_dilated cumlogsumexp cummax cummin cumprod cumsum dot_general gather ragged_dot_general
    rng_bit_generator scan scatter scatter-add scatter-max scatter-min scatter-mul
    scatter-sub sort top_k while""".split()
)
"""They end a fusion: operands and results are written to memory."""

VIEWS = frozenset("copy expand_dims name optimization_barrier reshape squeeze stop_gradient transpose".split())
"""Their result is the operand seen in another way."""

MOVES = frozenset(
    "broadcast_in_dim concatenate device_put dynamic_slice pad rev slice split stack tile unstack".split()
)
"""They move data; fused kernels take them in."""


def is_kernel_name(primitive: str) -> bool:
    """Tell whether ``primitive`` ends a fusion: its operands and results are written to memory."""
    return primitive in KERNELS


PRODUCTS = frozenset("conv_general_dilated dot_general ragged_dot_general".split())
"""They do the matmul FLOPs."""


def is_batched(primitive: str, params: Mapping[str, Any]) -> bool:
    """Tell whether a matrix product has batch dimensions: it multiplies two activations (attention), not weights."""
    return primitive == "dot_general" and bool(params["dimension_numbers"][1][0])


def is_kept(primitive: str, remat: Remat = "none", *, batched: bool = False) -> bool:
    """Tell whether results of ``primitive`` are kept for the backward pass.

    ``none`` keeps everything but elementwise operations, views and data movement: those are made again inside fused
    kernels for less than it costs to store and load them. Unknown primitives are kept (a custom kernel is expensive).
    ``dots`` keeps products with weights, ``full`` nothing.

    Args:
        primitive: Name of the primitive.
        remat: What the layer keeps.
        batched: The product is one of two activations (``is_batched``).
    """
    if remat == "none":
        return not any(primitive in family for family in (ELEMENTWISE, VIEWS, MOVES, RANDOM))
    return remat == "dots" and primitive in PRODUCTS and not batched
