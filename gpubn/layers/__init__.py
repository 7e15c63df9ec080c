"""Layers as functions: a forward that gives an output and a cache, a backward that gives gradients.

``out, cache = <layer>_forward(...)``, ``gradients = <layer>_backward(dout, cache)``, with the names
and rules of CS231n's second assignment. NumPy arrays in, NumPy arrays out; CuPy arrays in, CuPy
arrays out. No input is changed; batch norm updates its ``bn_param``.
"""

from gpubn.layers.affine import affine_backward, affine_forward
from gpubn.layers.batchnorm import (
    batchnorm_backward,
    batchnorm_backward_alt,
    batchnorm_forward,
)
from gpubn.layers.combined import (
    affine_bn_relu_backward,
    affine_bn_relu_forward,
    affine_relu_backward,
    affine_relu_forward,
)
from gpubn.layers.dropout import dropout_backward, dropout_forward
from gpubn.layers.layernorm import layernorm_backward, layernorm_forward
from gpubn.layers.losses import count_correct, l2_penalty, softmax_loss, svm_loss
from gpubn.layers.relu import relu_backward, relu_forward

__all__ = [
    "affine_backward",
    "affine_bn_relu_backward",
    "affine_bn_relu_forward",
    "affine_forward",
    "affine_relu_backward",
    "affine_relu_forward",
    "batchnorm_backward",
    "batchnorm_backward_alt",
    "batchnorm_forward",
    "count_correct",
    "dropout_backward",
    "dropout_forward",
    "l2_penalty",
    "layernorm_backward",
    "layernorm_forward",
    "relu_backward",
    "relu_forward",
    "softmax_loss",
    "svm_loss",
]
