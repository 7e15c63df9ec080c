"""The formulas of the library in float64 NumPy: what every kernel is held to.

Bit-for-bit agreement between two devices says that they compute the same thing; agreement with this
module says that it is the right thing. So this module is written to be read and checked by hand,
and not to be fast:

- every function raises its inputs to float64 and returns float64;
- every function is pure: no argument is changed, no result shares memory with an argument, and
  state (running statistics, an optimizer's moments) goes in as arguments and comes out as results;
- nothing but NumPy is used.

Sources: the notes and assignments of Stanford's CS231n for names and conventions; Ioffe and Szegedy
2015 for batch normalization; Ba, Kiros and Hinton 2016 for layer normalization; Wu and He 2018 for
group normalization; Zhang and Sennrich 2019 for RMS normalization; Kingma and Ba 2015 for Adam;
Loshchilov and Hutter 2019 for AdamW; Salmon et al. 2011 for Philox.

Batch normalization as a computation graph
------------------------------------------
For ``x`` of shape (N, D), N samples of D features, each feature is normalised on its own by the
mean and the biased variance of its column::

    x ─┬───────────────────> (-) ── centred ─┬──────────────────────────────> (*) ── xhat ─┐
       │                      ^              │                                 ^           │
       └─> (mean) ── mean ────┘              └─> (^2) ── squared ─┐          invstd        │
                                                                  v            │           │
                                                               (mean)        (1/.)         │
                                                                  │            ^           │
                                                                 var ──> (sqrt(. + eps))   │
                                                                              std          │
                                                                                           │
                                         out <── (+) <── scaled <── (*) <──────────────────┘
                                                  ^                  ^
                                                 beta              gamma

``xhat`` is (N, D); ``mean``, ``var``, ``std``, ``invstd``, ``gamma`` and ``beta`` are (D,).

To go back through it, write ``dv`` for the derivative of the loss by the node ``v``. Four rules do
it all:

1. **Chain rule.** A node ``v = f(u)`` turns ``dv`` into ``du = dv * f'(u)``: what comes from above
   times the node's local derivative.
2. **Sum at a branch.** A value that feeds two nodes gets a gradient from each, and they add. That
   happens twice here: ``centred`` feeds ``xhat`` directly and through the variance, and ``x`` feeds
   ``centred`` directly and through the mean. Both are what makes ``dx`` more than
   ``dout * gamma / std``.
3. **A broadcast goes back as a sum.** ``gamma`` (D,) is used once in each of the N rows, which is a
   branch into N, so ``dgamma`` is the sum over rows.
4. **A sum goes back as a broadcast.** Each row enters ``mean = sum(x) / N`` with weight 1/N, so
   each row gets ``dmean / N``. Rules 3 and 4 are each other's transpose, like a column of ones and
   a row of ones.

`batchnorm_forward` and `batchnorm_backward_graph` are this graph, a line a node.
`batchnorm_backward` is what is left when the algebra is done on paper; its docstring does it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "BatchNormGraph",
    "adam",
    "adamw",
    "affine_backward",
    "affine_forward",
    "batchnorm_backward",
    "batchnorm_backward_graph",
    "batchnorm_forward",
    "batchnorm_running",
    "batchnorm_test",
    "channels_to_rows",
    "count_correct",
    "dropout_backward",
    "dropout_forward",
    "dropout_mask",
    "groupnorm_backward",
    "groupnorm_forward",
    "l2_penalty",
    "layernorm_backward",
    "layernorm_forward",
    "philox4x32",
    "relu_backward",
    "relu_forward",
    "rmsnorm_backward",
    "rmsnorm_forward",
    "rmsprop",
    "rows_to_channels",
    "sgd",
    "sgd_momentum",
    "softmax_loss",
    "sum_of_squares",
    "svm_loss",
]

Float64: TypeAlias = NDArray[np.float64]


# Arguments: float64, the right shape, and an error that says which one is wrong.


def _float64(name: str, value: ArrayLike, shape: tuple[int, ...] | None = None) -> Float64:
    """Return a float64 copy of an argument, of the expected shape where one is given.

    Always a copy: a result may then keep it, and the caller may go on changing their array.
    """
    array = np.asarray(value)
    if array.dtype.kind == "c":
        raise TypeError(f"{name} has dtype {array.dtype}, expected real numbers")
    if shape is not None and array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    return np.array(array, dtype=np.float64, order="C")


def _float64_matrix(name: str, value: ArrayLike) -> Float64:
    """Return a float64 copy of an argument that has to be two-dimensional and not empty."""
    array = _float64(name, value)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}, expected (N, D) with N, D >= 1")
    return array


def _labels(y: ArrayLike, num_samples: int, num_classes: int) -> NDArray[np.int64]:
    """Return the labels as int64, checked: a negative one would silently index from the end."""
    labels = np.asarray(y)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"y has dtype {labels.dtype}, expected integers")
    if labels.shape != (num_samples,):
        raise ValueError(f"y has shape {labels.shape}, expected ({num_samples},)")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"y has labels from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}"
        )
    return labels.astype(np.int64)


def _sum_rows(values: Float64) -> Float64:
    """Sum an (N, D) array over its rows, accurately for large N.

    NumPy adds pairwise only along the axis that is contiguous in memory; over the rows of a
    C-ordered array it adds one row after the other, and the error bound grows with N instead of log
    N. So the columns are laid out contiguously first.
    """
    columns: Float64 = np.ascontiguousarray(values.T)
    total: Float64 = columns.sum(axis=1)
    return total


# Batch normalization


@dataclass(frozen=True)
class BatchNormGraph:
    """Every node of the graph in the module docstring, as the forward pass left it.

    `centred`, `squared`, `xhat`, `scaled` and `out` are (N, D); the rest are (D,) and `eps` is a
    number.
    """

    mean: Float64
    centred: Float64
    squared: Float64
    var: Float64
    std: Float64
    invstd: Float64
    xhat: Float64
    scaled: Float64
    out: Float64
    gamma: Float64
    eps: float


def batchnorm_forward(
    x: ArrayLike, gamma: ArrayLike, beta: ArrayLike, eps: float = 1e-5
) -> BatchNormGraph:
    """Normalise each column of `x` by its batch statistics, node by node.

    Parameters
    ----------
    x : array_like, (N, D)
        The batch.
    gamma, beta : array_like, (D,)
        Scale and shift of each feature.
    eps : float
        Added to the variance inside the root.

    Returns
    -------
    BatchNormGraph
        All nodes; ``.out`` is the result, ``.mean`` and ``.var`` are the batch's (biased)
        statistics.

    Notes
    -----
    The statistics take two passes, the mean first and then the squares of the deviations from it.
    ``E[x^2] - E[x]^2`` in one pass would subtract two numbers near 1e12 to find a variance of 0.25
    when the mean is 1e6.

    The first row is subtracted before anything is averaged. The variance does not change with a
    shift, and the deviations are then small numbers, not differences of large ones, so a mean far
    larger than the deviation costs no digits. A constant column becomes exactly zero and its output
    exactly `beta`, where averaging N copies of 0.1 would give something next to 0.1. Any value of
    the column would do as the shift; the first is the cheapest.
    """
    x = _float64_matrix("x", x)
    num_samples, num_features = x.shape
    gamma = _float64("gamma", gamma, (num_features,))
    beta = _float64("beta", beta, (num_features,))

    shift = x[0].copy()
    shifted = x - shift
    shifted_mean = _sum_rows(shifted) / num_samples

    mean = shift + shifted_mean
    centred = shifted - shifted_mean  # = x - mean, without rounding the mean to the size of x
    squared = centred**2
    var = _sum_rows(squared) / num_samples
    std = np.sqrt(var + eps)
    invstd = 1.0 / std
    xhat = centred * invstd
    scaled = gamma * xhat
    out = scaled + beta
    return BatchNormGraph(
        mean=mean,
        centred=centred,
        squared=squared,
        var=var,
        std=std,
        invstd=invstd,
        xhat=xhat,
        scaled=scaled,
        out=out,
        gamma=gamma,
        eps=eps,
    )


def batchnorm_backward_graph(
    dout: ArrayLike, graph: BatchNormGraph
) -> tuple[Float64, Float64, Float64]:
    """Walk the graph of the module docstring backwards, a line a node.

    Parameters
    ----------
    dout : array_like, (N, D)
        The loss's derivative by ``graph.out``.
    graph : BatchNormGraph
        What `batchnorm_forward` returned.

    Returns
    -------
    dx, dgamma, dbeta : arrays of shapes (N, D), (D,), (D,)
    """
    dout = _float64("dout", dout, graph.out.shape)
    num_samples = graph.out.shape[0]

    # out = scaled + beta: both local derivatives are 1; beta was broadcast over rows, so it sums.
    dscaled = dout
    dbeta = _sum_rows(dout)

    # scaled = gamma * xhat: by gamma it is xhat (and a broadcast: sum), by xhat it is gamma.
    dgamma = _sum_rows(dscaled * graph.xhat)
    dxhat = dscaled * graph.gamma

    # xhat = centred * invstd: by invstd it is centred (and a broadcast: sum), by centred invstd.
    dinvstd = _sum_rows(dxhat * graph.centred)
    dcentred_direct = dxhat * graph.invstd

    # invstd = 1 / std: the derivative of 1/u is -1/u^2.
    dstd = dinvstd * -(graph.invstd**2)

    # std = sqrt(var + eps): the derivative of sqrt(u) is 1 / (2 sqrt(u)), and sqrt(u) is std.
    dvar = dstd * (0.5 / graph.std)

    # var = sum of squared / N: each row has weight 1/N; a sum goes back as a broadcast.
    dsquared = np.broadcast_to(dvar / num_samples, graph.squared.shape)

    # squared = centred^2: the derivative of u^2 is 2u.
    dcentred_through_var = dsquared * (2.0 * graph.centred)

    # centred branched into xhat and squared: the two gradients add.
    dcentred = dcentred_direct + dcentred_through_var

    # centred = x - mean: by x it is 1, by mean it is -1 (and a broadcast: sum, over rows only).
    dx_direct = dcentred
    dmean = _sum_rows(-dcentred)

    # mean = sum of x / N: each row has weight 1/N; a sum goes back as a broadcast.
    dx_through_mean = np.broadcast_to(dmean / num_samples, dcentred.shape)

    # x branched into centred and mean: the two gradients add.
    dx = dx_direct + dx_through_mean
    return dx, dgamma, dbeta


def batchnorm_backward(
    dout: ArrayLike, x: ArrayLike, gamma: ArrayLike, eps: float = 1e-5
) -> tuple[Float64, Float64, Float64]:
    r"""Gradients of batch normalization in closed form.

    Parameters
    ----------
    dout, x : array_like, (N, D)
        The loss's derivative by the output, and the forward pass's input.
    gamma : array_like, (D,)
        Scale of each feature. `beta` has no part in any gradient.
    eps : float
        Added to the variance inside the root.

    Returns
    -------
    dx, dgamma, dbeta : arrays of shapes (N, D), (D,), (D,)

    Notes
    -----
    The lines of `batchnorm_backward_graph`, for one feature, with the short names
    ``g = dxhat = gamma * dout``, ``c = centred``, ``s = invstd`` and ``xhat = c * s``; sum and mean
    run over the N rows.

    1. Down the variance's path::

           dinvstd = sum(g * c)
           dstd    = -s^2 * dinvstd
           dvar    = 1/2 * s * dstd = -1/2 * s^3 * sum(g * c)

    2. Both paths into ``centred``; two of the three factors s turn a c into an xhat each::

           dcentred = s * g + (2 c / N) * dvar
                    = s * g - c * s^3 * sum(g * c) / N
                    = s * (g - xhat * mean(g * xhat))

    3. The mean's path. Deviations from a mean sum to zero, sum(c) = 0, so the part of ``dcentred``
       that came through the variance, a constant times c, vanishes here: moving the mean a little
       does not change the variance to first order, since the mean is the point of least squared
       deviation.
       ::

           dmean = -sum(dcentred)
                 = -s * sum(g) - (2/N) * dvar * sum(c)
                 = -s * sum(g)

    4. Both paths into ``x``::

           dx = dcentred + dmean / N
              = s * (g - mean(g) - xhat * mean(g * xhat))

    5. With g = gamma * dout, mean(g) = gamma * dbeta / N and mean(g * xhat) = gamma * dgamma / N::

           dx = gamma * s / N * (N * dout - dbeta - xhat * dgamma)

    In words: normalising forgets a column's level and its scale, so ``dx`` is ``gamma * s * dout``
    less its part along the ones (level) and its part along xhat (scale; all of it but for eps).
    """
    x = _float64_matrix("x", x)
    dout = _float64("dout", dout, x.shape)
    num_samples, num_features = x.shape
    graph = batchnorm_forward(x, gamma, np.zeros(num_features), eps)

    dbeta = _sum_rows(dout)
    dgamma = _sum_rows(dout * graph.xhat)
    # Means, where step 5 has sums times 1/N: the same value, and N * dout cannot overflow.
    projected = dout - dbeta / num_samples - graph.xhat * (dgamma / num_samples)
    dx = graph.gamma * graph.invstd * projected
    return dx, dgamma, dbeta


def batchnorm_running(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    x: ArrayLike,
    momentum: float = 0.9,
    unbiased: bool = False,
) -> tuple[Float64, Float64]:
    """Move the running statistics towards those of the batch `x`.

    ``running = momentum * running + (1 - momentum) * sample``, as CS231n writes it. PyTorch's
    momentum is the complement, ``1 - momentum``.

    Parameters
    ----------
    running_mean, running_var : array_like, (D,)
        The statistics so far; CS231n starts both from zero.
    x : array_like, (N, D)
        The batch.
    momentum : float
        The share that the old value keeps.
    unbiased : bool
        Take the batch's variance with N - 1 instead of N, as PyTorch does for the running value.

    Returns
    -------
    running_mean, running_var : arrays, (D,)
    """
    x = _float64_matrix("x", x)
    num_samples, num_features = x.shape
    running_mean = _float64("running_mean", running_mean, (num_features,))
    running_var = _float64("running_var", running_var, (num_features,))
    graph = batchnorm_forward(x, np.ones(num_features), np.zeros(num_features))
    sample_var = graph.var
    if unbiased:
        if num_samples < 2:
            raise ValueError(f"x has shape {x.shape}, expected N >= 2 for an unbiased variance")
        sample_var = sample_var * (num_samples / (num_samples - 1))
    return (
        momentum * running_mean + (1 - momentum) * graph.mean,
        momentum * running_var + (1 - momentum) * sample_var,
    )


def batchnorm_test(
    x: ArrayLike,
    gamma: ArrayLike,
    beta: ArrayLike,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    eps: float = 1e-5,
) -> Float64:
    """Normalise `x` (N, D) by running statistics (D,), as at test time.

    The statistics are constants here, so samples do not mix and N may be 1.
    """
    x = _float64_matrix("x", x)
    features = (x.shape[1],)
    centred = x - _float64("running_mean", running_mean, features)
    std = np.sqrt(_float64("running_var", running_var, features) + eps)
    out: Float64 = _float64("gamma", gamma, features) * (centred / std)
    return out + _float64("beta", beta, features)


# Images and the like: x has a channel axis, and batch normalization treats every position of every
# sample as one more sample. So the channels become the columns of a matrix.


def channels_to_rows(x: ArrayLike, axis: int) -> Float64:
    """Return `x` as a matrix (M, C): one row for each place along the axes beside the channels'.

    Parameters
    ----------
    x : array_like, any shape of at least two dimensions
    axis : int
        Which axis the C channels are; -1 where they are last.

    Returns
    -------
    rows : array, (M, C)
        The places in C order of the other axes: for images (N, C, H, W) row
        ``(n * H + h) * W + w`` is ``x[n, :, h, w]``. `rows_to_channels` undoes it.
    """
    x = _float64("x", x)
    if x.ndim < 2 or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"x has shape {x.shape}, expected an axis {axis} of at least 2 dimensions")
    channels_last = np.moveaxis(x, axis, -1)
    return np.array(channels_last.reshape(-1, x.shape[axis]), order="C")


def rows_to_channels(rows: ArrayLike, shape: tuple[int, ...], axis: int) -> Float64:
    """Return a matrix of `channels_to_rows` in the shape of the array that it was made of."""
    others = [length for i, length in enumerate(shape) if i != axis % len(shape)]
    rows = _float64("rows", rows, (math.prod(others), shape[axis]))
    return np.array(np.moveaxis(rows.reshape(*others, shape[axis]), -1, axis), order="C")


# Layer normalization: batch normalization turned on its side. Each sample is normalised by its own
# mean and variance, which is what batch normalization does to the columns of x transposed. Only
# gamma and beta stay where they were, one a feature, so they are applied after turning back.


def layernorm_forward(
    x: ArrayLike, gamma: ArrayLike, beta: ArrayLike, eps: float = 1e-5
) -> Float64:
    """Normalise each row of `x` by its own statistics; the same in training and at test time.

    Parameters
    ----------
    x : array_like, (N, D)
        The batch.
    gamma, beta : array_like, (D,)
        Scale and shift of each feature.
    eps : float
        Added to the variance inside the root.

    Returns
    -------
    out : array, (N, D)
    """
    x = _float64_matrix("x", x)
    num_samples, num_features = x.shape
    gamma = _float64("gamma", gamma, (num_features,))
    beta = _float64("beta", beta, (num_features,))
    xhat = batchnorm_forward(x.T, np.ones(num_samples), np.zeros(num_samples), eps).xhat.T
    return np.ascontiguousarray(gamma * xhat + beta)


def layernorm_backward(
    dout: ArrayLike, x: ArrayLike, gamma: ArrayLike, eps: float = 1e-5
) -> tuple[Float64, Float64, Float64]:
    """Gradients of layer normalization.

    Parameters
    ----------
    dout, x : array_like, (N, D)
        The loss's derivative by the output, and the forward pass's input.
    gamma : array_like, (D,)
        Scale of each feature.
    eps : float
        Added to the variance inside the root.

    Returns
    -------
    dx, dgamma, dbeta : arrays of shapes (N, D), (D,), (D,)
        ``dgamma`` and ``dbeta`` still sum over rows: that is where they were broadcast. ``dx`` has
        its two means along the row.
    """
    x = _float64_matrix("x", x)
    num_samples, num_features = x.shape
    dout = _float64("dout", dout, x.shape)
    gamma = _float64("gamma", gamma, (num_features,))
    ones = np.ones(num_samples)

    xhat = batchnorm_forward(x.T, ones, np.zeros(num_samples), eps).xhat.T
    dbeta = _sum_rows(dout)
    dgamma = _sum_rows(dout * xhat)
    dxhat = dout * gamma
    dx = batchnorm_backward(dxhat.T, x.T, ones, eps)[0].T
    return np.ascontiguousarray(dx), dgamma, dbeta


# Group normalization: each sample's channels are cut into groups of neighbours, and a group is
# normalised by the mean and variance of all that is in it. So a group is a column of batch
# normalization. One channel a group is instance normalization.


def _by_sample(name: str, value: ArrayLike, axis: int) -> Float64:
    """Return (N, ..., C, ...) as (N, C, positions)."""
    array = _float64(name, value)
    if array.ndim < 2 or array.size == 0 or not -array.ndim <= axis < array.ndim:
        raise ValueError(f"{name} has shape {array.shape}, expected (N, C, ...), none of them 0")
    if axis % array.ndim == 0:
        raise ValueError(f"axis is {axis}, expected a channel axis after the samples' axis 0")
    channels_second = np.moveaxis(array, axis, 1)
    return channels_second.reshape(*channels_second.shape[:2], -1)


def _from_samples(array: Float64, shape: tuple[int, ...], axis: int) -> Float64:
    """Return (N, C, positions) in the shape that `_by_sample` had it from."""
    num_samples, num_channels, *positions = np.moveaxis(np.empty(shape), axis, 1).shape
    channels_second = array.reshape(num_samples, num_channels, *positions)
    return np.array(np.moveaxis(channels_second, 1, axis), order="C")


def _groups(x: Float64, num_groups: int) -> Float64:
    """Return (N, C, positions) as a matrix whose columns are the groups of all samples."""
    num_samples, num_channels, _ = x.shape
    if num_groups < 1 or num_channels % num_groups:
        raise ValueError(f"num_groups is {num_groups}, expected a divisor of {num_channels}")
    return x.reshape(num_samples * num_groups, -1).T


def groupnorm_forward(
    x: ArrayLike,
    gamma: ArrayLike,
    beta: ArrayLike,
    num_groups: int,
    eps: float = 1e-5,
    axis: int = 1,
) -> Float64:
    """Normalise each group of channels of each sample by its own statistics.

    Parameters
    ----------
    x : array_like, (N, C, ...)
        The batch; or with the channels at another `axis` than 1.
    gamma, beta : array_like, (C,)
        Scale and shift of each channel.
    num_groups : int
        How many groups the C channels of a sample are cut into; C for instance normalization.
    eps : float
        Added to the variance inside the root.
    axis : int
        Which axis of `x` the channels are; -1 where they are last.

    Returns
    -------
    out : array, shape of x
    """
    samples = _by_sample("x", x, axis)
    num_channels = samples.shape[1]
    gamma = _float64("gamma", gamma, (num_channels,))[:, np.newaxis]
    beta = _float64("beta", beta, (num_channels,))[:, np.newaxis]
    groups = _groups(samples, num_groups)
    ones = np.ones(groups.shape[1])
    xhat = batchnorm_forward(groups, ones, 0 * ones, eps).xhat.T.reshape(samples.shape)
    return _from_samples(gamma * xhat + beta, np.shape(x), axis)


def groupnorm_backward(
    dout: ArrayLike,
    x: ArrayLike,
    gamma: ArrayLike,
    num_groups: int,
    eps: float = 1e-5,
    axis: int = 1,
) -> tuple[Float64, Float64, Float64]:
    """Gradients of group normalization.

    Parameters
    ----------
    dout, x : array_like, (N, C, ...)
        The loss's derivative by the output, and the forward pass's input.
    gamma : array_like, (C,)
        Scale of each channel.
    num_groups, eps, axis
        As in `groupnorm_forward`.

    Returns
    -------
    dx, dgamma, dbeta : arrays of shapes (N, C, ...), (C,), (C,)
        ``dgamma`` and ``dbeta`` sum over samples and positions, where they were broadcast. ``dx``
        has its two means over the group, of the derivative by xhat: it has gamma in it already.
    """
    samples = _by_sample("x", x, axis)
    dout = _by_sample("dout", _float64("dout", dout, np.shape(x)), axis)
    num_channels = samples.shape[1]
    gamma = _float64("gamma", gamma, (num_channels,))
    groups = _groups(samples, num_groups)
    ones = np.ones(groups.shape[1])

    xhat = batchnorm_forward(groups, ones, 0 * ones, eps).xhat.T.reshape(samples.shape)
    dbeta = _sum_rows(channels_to_rows(dout, 1))
    dgamma = _sum_rows(channels_to_rows(dout * xhat, 1))
    dxhat = _groups(dout * gamma[:, np.newaxis], num_groups)
    dx = batchnorm_backward(dxhat, groups, ones, eps)[0].T.reshape(samples.shape)
    return _from_samples(dx, np.shape(x), axis), dgamma, dbeta


# RMS normalization: layer normalization that takes no mean away.


def rmsnorm_forward(x: ArrayLike, gamma: ArrayLike, eps: float = 1e-5) -> Float64:
    """Divide each row of `x` by the root of its mean square; the same in training and at test time.

    Parameters
    ----------
    x : array_like, (N, D)
        The batch.
    gamma : array_like, (D,)
        Scale of each feature.
    eps : float
        Added to the mean square inside the root.

    Returns
    -------
    out : array, (N, D)
    """
    x = _float64_matrix("x", x)
    gamma = _float64("gamma", gamma, (x.shape[1],))
    rms = np.sqrt(np.mean(x**2, axis=1, keepdims=True) + eps)
    out: Float64 = gamma * (x / rms)
    return out


def rmsnorm_backward(
    dout: ArrayLike, x: ArrayLike, gamma: ArrayLike, eps: float = 1e-5
) -> tuple[Float64, Float64]:
    r"""Gradients of RMS normalization.

    Parameters
    ----------
    dout, x : array_like, (N, D)
        The loss's derivative by the output, and the forward pass's input.
    gamma : array_like, (D,)
        Scale of each feature.
    eps : float
        Added to the mean square inside the root.

    Returns
    -------
    dx, dgamma : arrays of shapes (N, D), (D,)

    Notes
    -----
    For one row, with ``r = rms``, ``xhat = x / r`` and ``g = gamma * dout``; mean and sum run over
    its D features. ``x`` branches into ``xhat`` directly and through r, as in the module docstring.

    1. ``r = sqrt(mean(x^2) + eps)``, so a feature's share in it is ``dr / dx = x / (D * r)``.

    2. ``xhat = x / r``: by x it is 1 / r, by r it is -x / r^2 (and r was broadcast: sum), so
       ``dr = -sum(g * x) / r^2 = -sum(g * xhat) / r``.

    3. Both paths add::

           dx = g / r + dr * x / (D * r)
              = (g - xhat * mean(g * xhat)) / r
    """
    x = _float64_matrix("x", x)
    dout = _float64("dout", dout, x.shape)
    gamma = _float64("gamma", gamma, (x.shape[1],))
    rms = np.sqrt(np.mean(x**2, axis=1, keepdims=True) + eps)
    xhat = x / rms
    g = gamma * dout
    dgamma = _sum_rows(dout * xhat)
    dx = (g - xhat * np.mean(g * xhat, axis=1, keepdims=True)) / rms
    return dx, dgamma


# The other layers


def affine_forward(x: ArrayLike, w: ArrayLike, b: ArrayLike) -> Float64:
    """Return ``x.reshape(N, D) @ w + b`` for `x` (N, d1, ..., dk), `w` (D, M) and `b` (M,)."""
    w = _float64_matrix("w", w)
    rows = _rows(x, w.shape[0])
    return rows @ w + _float64("b", b, (w.shape[1],))


def affine_backward(
    dout: ArrayLike, x: ArrayLike, w: ArrayLike
) -> tuple[Float64, Float64, Float64]:
    """Return ``dx`` in the shape of `x`, ``dw`` (D, M) and ``db`` (M,), for `dout` (N, M).

    Each derivative of a matrix product is the product with the other factor transposed, on the side
    that makes the shapes fit.
    """
    w = _float64_matrix("w", w)
    rows = _rows(x, w.shape[0])
    dout = _float64("dout", dout, (rows.shape[0], w.shape[1]))
    dx = (dout @ w.T).reshape(np.shape(x))
    dw = rows.T @ dout
    return dx, dw, _sum_rows(dout)


def _rows(x: ArrayLike, num_features: int) -> Float64:
    """Flatten each sample of `x` (N, d1, ..., dk) into a row of `num_features`."""
    x = _float64("x", x)
    if x.ndim < 2 or math.prod(x.shape[1:]) != num_features:
        raise ValueError(
            f"x has shape {x.shape}, expected (N, d1, ..., dk) with d1 * ... * dk = {num_features}"
        )
    return x.reshape(x.shape[0], num_features)


def relu_forward(x: ArrayLike) -> Float64:
    """Return ``max(0, x)``, elementwise; NaN stays NaN."""
    out: Float64 = np.maximum(0.0, _float64("x", x))
    return out


def relu_backward(dout: ArrayLike, x: ArrayLike) -> Float64:
    """Return `dout` where ``x > 0`` and 0 elsewhere, at 0 itself too.

    A choice and not a product: ``dout * (x > 0)`` would turn an infinite upstream gradient into NaN
    where the unit is off.
    """
    x = _float64("x", x)
    return np.where(x > 0, _float64("dout", dout, x.shape), 0.0)


def dropout_forward(x: ArrayLike, mask: NDArray[np.bool_], p: float) -> Float64:
    """Keep `x` where `mask` is true, scaled by ``1 / p``, and put 0 elsewhere.

    Parameters
    ----------
    x : array_like
        Any shape.
    mask : bool array, shape of x
        True where a unit is kept, for instance from `dropout_mask`.
    p : float
        The probability of keeping a unit, so that the expectation of the output is `x`.
    """
    x = _float64("x", x)
    mask = np.asarray(mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask has dtype {mask.dtype}, expected bool")
    if mask.shape != x.shape:
        raise ValueError(f"mask has shape {mask.shape}, expected {x.shape}")
    if not 0 < p <= 1:
        raise ValueError(f"p is {p}, expected 0 < p <= 1")
    return np.where(mask, x / p, 0.0)


def dropout_backward(dout: ArrayLike, mask: NDArray[np.bool_], p: float) -> Float64:
    """Return `dout` where `mask` is true, scaled by ``1 / p``, and 0 elsewhere.

    The layer is linear and diagonal, so it is its own transpose: backward is forward on `dout`.
    """
    return dropout_forward(_float64("dout", dout), mask, p)


# Losses: the mean over the batch, and its derivative by the scores


def softmax_loss(x: ArrayLike, y: ArrayLike) -> tuple[float, Float64]:
    """Mean cross-entropy of the softmax of scores `x` (N, C) with labels `y` (N,).

    Returns
    -------
    loss : float
    dx : array, (N, C)
        ``(softmax(x) - onehot(y)) / N``.

    Notes
    -----
    The row's maximum is subtracted first: softmax does not change with a shift, and exp cannot
    overflow. The loss is log(sum(exp)) minus the score, and not the log of a probability that may
    have become 0.
    """
    x = _float64_matrix("x", x)
    num_samples, num_classes = x.shape
    labels = _labels(y, num_samples, num_classes)
    rows = np.arange(num_samples)

    shifted = x - x.max(axis=1, keepdims=True)
    exps = np.exp(shifted)
    totals = exps.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(totals[:, 0]) - shifted[rows, labels]))

    dx = exps / totals
    dx[rows, labels] -= 1.0
    return loss, dx / num_samples


def svm_loss(x: ArrayLike, y: ArrayLike) -> tuple[float, Float64]:
    """Mean multiclass hinge loss, margin 1, of scores `x` (N, C) with labels `y` (N,).

    A sample's loss is the sum over the wrong classes j of ``max(0, x[j] - x[y] + 1)``.

    Returns
    -------
    loss : float
    dx : array, (N, C)
        Each wrong class inside the margin pushes its own score down and the right one's up.
    """
    x = _float64_matrix("x", x)
    num_samples, num_classes = x.shape
    labels = _labels(y, num_samples, num_classes)
    rows = np.arange(num_samples)

    margins = np.maximum(0.0, x - x[rows, labels][:, np.newaxis] + 1.0)
    margins[rows, labels] = 0.0
    loss = float(margins.sum(axis=1).mean())

    dx = (margins > 0).astype(np.float64)
    dx[rows, labels] = -dx.sum(axis=1)
    return loss, dx / num_samples


def count_correct(x: ArrayLike, y: ArrayLike) -> int:
    """Return for how many rows of scores `x` (N, C) the first largest one is at the label `y` (N,).

    A NaN counts as larger than any number. A label that is no class is never right.
    """
    x = _float64_matrix("x", x)
    labels = np.asarray(y)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"y has dtype {labels.dtype}, expected integers")
    if labels.shape != (len(x),):
        raise ValueError(f"y has shape {labels.shape}, expected ({len(x)},)")
    return sum(map(operator.eq, map(_first_largest, x.tolist()), labels.tolist()))


def _first_largest(row: list[float]) -> int:
    nans = (j for j, score in enumerate(row) if math.isnan(score))
    return next(nans, row.index(max(row)))


# The penalty on weights


def sum_of_squares(x: ArrayLike) -> float:
    """Return the sum of the squares of all elements, of any shape."""
    squares = _float64("x", x).reshape(-1) ** 2
    total = float(squares.sum())
    return math.fsum(squares.tolist()) if math.isfinite(total) else total


def l2_penalty(w: ArrayLike, reg: float) -> tuple[float, Float64]:
    """Return ``0.5 * reg * sum(w**2)`` and its gradient ``reg * w``, for `w` of any shape."""
    return 0.5 * reg * sum_of_squares(w), reg * _float64("w", w)


# Update rules: parameters, gradient and state in, new parameters and new state out


def sgd(w: ArrayLike, dw: ArrayLike, learning_rate: float = 1e-2) -> Float64:
    """Return ``w - lr * dw``."""
    w = _float64("w", w)
    return w - learning_rate * _float64("dw", dw, w.shape)


def sgd_momentum(
    w: ArrayLike,
    dw: ArrayLike,
    velocity: ArrayLike,
    learning_rate: float = 1e-2,
    momentum: float = 0.9,
) -> tuple[Float64, Float64]:
    """Return ``(w + v, v)`` with ``v = momentum * velocity - lr * dw``; velocity starts at zero."""
    w = _float64("w", w)
    velocity = _float64("velocity", velocity, w.shape)
    velocity = momentum * velocity - learning_rate * _float64("dw", dw, w.shape)
    return w + velocity, velocity


def rmsprop(
    w: ArrayLike,
    dw: ArrayLike,
    cache: ArrayLike,
    learning_rate: float = 1e-2,
    decay_rate: float = 0.99,
    epsilon: float = 1e-8,
) -> tuple[Float64, Float64]:
    """Return ``(w - lr * dw / (sqrt(c) + epsilon), c)`` with ``c = d * cache + (1 - d) * dw**2``.

    `cache`, the running mean of the squared gradient, starts at zero.
    """
    w = _float64("w", w)
    dw = _float64("dw", dw, w.shape)
    cache = _float64("cache", cache, w.shape)
    cache = decay_rate * cache + (1 - decay_rate) * dw**2
    return w - learning_rate * dw / (np.sqrt(cache) + epsilon), cache


def adam(
    w: ArrayLike,
    dw: ArrayLike,
    m: ArrayLike,
    v: ArrayLike,
    t: int,
    learning_rate: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> tuple[Float64, Float64, Float64, int]:
    """One step of Adam: ``w - lr * mhat / (sqrt(vhat) + epsilon)``.

    Parameters
    ----------
    w, dw : array_like
        Parameters and their gradient.
    m, v : array_like, shape of w
        The running means of the gradient and of its square; zeros before the first step.
    t : int
        The number of steps already taken: 0 before the first. It is raised by one before it is
        used.
    learning_rate, beta1, beta2, epsilon : float
        As in Kingma and Ba 2015.

    Returns
    -------
    next_w, m, v, t
        The parameters after the step, and the state for the next.
    """
    return adamw(w, dw, m, v, t, learning_rate, beta1, beta2, epsilon, weight_decay=0.0)


def adamw(
    w: ArrayLike,
    dw: ArrayLike,
    m: ArrayLike,
    v: ArrayLike,
    t: int,
    learning_rate: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Float64, Float64, Float64, int]:
    """One step of Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    ``w - lr * (mhat / (sqrt(vhat) + epsilon) + weight_decay * w)``. The decay is not part of the
    gradient, so it is not divided by ``sqrt(vhat)`` as an L2 penalty in `adam` would be. Arguments
    and results as for `adam`.
    """
    w = _float64("w", w)
    dw = _float64("dw", dw, w.shape)
    m = _float64("m", m, w.shape)
    v = _float64("v", v, w.shape)
    if t < 0:
        raise ValueError(f"t is {t}, expected the number of steps already taken, >= 0")

    t = t + 1
    m = beta1 * m + (1 - beta1) * dw
    v = beta2 * v + (1 - beta2) * dw**2
    # Both means start at zero; after t steps their weights add up to 1 - beta^t only.
    mhat = m / (1 - beta1**t)
    vhat = v / (1 - beta2**t)
    direction = mhat / (np.sqrt(vhat) + epsilon) + weight_decay * w
    return w - learning_rate * direction, m, v, t


# Random numbers from counters


def philox4x32(
    counter: NDArray[np.uint32], key: NDArray[np.uint32], rounds: int = 10
) -> NDArray[np.uint32]:
    """Philox4x32, the counter-based random generator of Salmon et al. 2011 (SC'11, Random123).

    A bijection of 128-bit counters, one for each 64-bit key: no state, so any thread can compute
    any block of the stream at any time.

    Parameters
    ----------
    counter : uint32 array, (..., 4)
        One block a row; word 0 is the least significant.
    key : uint32 array, (2,)
        The key, word 0 the least significant.
    rounds : int
        10 is the published, recommended number.

    Returns
    -------
    uint32 array, (..., 4)
        Four random words for each counter.
    """
    counter = np.asarray(counter)
    key = np.asarray(key)
    for name, words, length in (("counter", counter, 4), ("key", key, 2)):
        if words.dtype != np.uint32:
            raise TypeError(f"{name} has dtype {words.dtype}, expected uint32")
        if words.ndim == 0 or words.shape[-1] != length:
            raise ValueError(f"{name} has shape {words.shape}, expected a last axis of {length}")
    if key.shape != (2,):
        raise ValueError(f"key has shape {key.shape}, expected (2,)")

    # 32-bit words kept in 64 bits: a product of two words is then exact, and its halves are a shift
    # and a mask away.
    low_half = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    multiplier0, multiplier1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    # The key's increments: the golden ratio and sqrt(3) - 1, as fractions of 2^32.
    increment0, increment1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)

    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key.astype(np.uint64)
    for _ in range(rounds):
        product0 = multiplier0 * c0
        product1 = multiplier1 * c2
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ k0,
            product1 & low_half,
            (product0 >> half) ^ c3 ^ k1,
            product0 & low_half,
        )
        k0 = (k0 + increment0) & low_half
        k1 = (k1 + increment1) & low_half
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def dropout_mask(
    shape: tuple[int, ...], p: float, seed: int, stream: int, step: int
) -> NDArray[np.bool_]:
    """Which units dropout keeps: a function of its arguments alone, on every device.

    Parameters
    ----------
    shape : tuple of int
        The shape of the layer's input.
    p : float
        The probability of keeping a unit, from 0 to 1; 1 keeps all.
    seed : int
        64 bits, the generator's key.
    stream, step : int
        32 bits each: which dropout layer, and which training step.

    Returns
    -------
    bool array of `shape`
        True where a unit is kept.

    Notes
    -----
    Element i in C order takes word ``i % 4`` of block ``i // 4``, whose counter is (block's low 32
    bits, block's high 32 bits, stream, step), and is kept if the word is less than
    ``round(p * 2**32)``. The comparison is of integers in 64 bits: the bound of p = 1 is 2**32,
    which no 32-bit word reaches or holds.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}, expected 0 <= p <= 1")
    for name, value, bits in (("seed", seed, 64), ("stream", stream, 32), ("step", step, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} is {value}, expected 0 <= {name} < 2**{bits}")

    size = math.prod(shape)
    block = np.arange((size + 3) // 4, dtype=np.uint64)
    counter = np.empty((block.size, 4), dtype=np.uint32)
    counter[:, 0] = block & np.uint64(0xFFFFFFFF)
    counter[:, 1] = block >> np.uint64(32)
    counter[:, 2] = stream
    counter[:, 3] = step
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32)

    words = philox4x32(counter, key).reshape(-1)[:size].astype(np.uint64)
    kept: NDArray[np.bool_] = words < np.uint64(round(p * 2**32))
    return kept.reshape(shape)
