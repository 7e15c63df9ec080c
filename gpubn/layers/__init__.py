"""Layers as functions: a forward that gives an output and a cache, a backward that gives gradients.

``out, cache = <layer>_forward(...)``, ``gradients = <layer>_backward(dout, cache)``, with the names
and rules of CS231n's second assignment. NumPy arrays in, NumPy arrays out; CuPy arrays in, CuPy
arrays out. No input is changed; batch norm updates its ``bn_param``. Anything
with ``__dlpack__`` (PyTorch, JAX) goes in too, and comes back as the same library's.

Caches refer to the arguments, and that of ``batchnorm_add_relu`` to its output, not to copies:
change none of them in place before the backward pass.
"""

from gpubn.layers.affine import affine_backward, affine_forward, affine_parameter_gradients
from gpubn.layers.batchnorm import (
    batchnorm_add_relu_backward,
    batchnorm_add_relu_forward,
    batchnorm_backward,
    batchnorm_backward_alt,
    batchnorm_forward,
    batchnorm_relu_backward,
    batchnorm_relu_forward,
    spatial_batchnorm_backward,
    spatial_batchnorm_forward,
)
from gpubn.layers.combined import (
    affine_bn_relu_backward,
    affine_bn_relu_forward,
    affine_relu_backward,
    affine_relu_forward,
)
from gpubn.layers.dropout import dropout_backward, dropout_forward
from gpubn.layers.groupnorm import (
    groupnorm_backward,
    groupnorm_forward,
    instancenorm_backward,
    instancenorm_forward,
    spatial_groupnorm_backward,
    spatial_groupnorm_forward,
)
from gpubn.layers.layernorm import layernorm_backward, layernorm_forward
from gpubn.layers.losses import count_correct, l2_penalty, softmax_loss, svm_loss
from gpubn.layers.relu import relu_backward, relu_forward
from gpubn.layers.rmsnorm import rmsnorm_backward, rmsnorm_forward

__all__ = [
    "affine_backward",
    "affine_bn_relu_backward",
    "affine_bn_relu_forward",
    "affine_forward",
    "affine_parameter_gradients",
    "affine_relu_backward",
    "affine_relu_forward",
    "batchnorm_add_relu_backward",
    "batchnorm_add_relu_forward",
    "batchnorm_backward",
    "batchnorm_backward_alt",
    "batchnorm_forward",
    "batchnorm_relu_backward",
    "batchnorm_relu_forward",
    "count_correct",
    "dropout_backward",
    "dropout_forward",
    "groupnorm_backward",
    "groupnorm_forward",
    "instancenorm_backward",
    "instancenorm_forward",
    "l2_penalty",
    "layernorm_backward",
    "layernorm_forward",
    "relu_backward",
    "relu_forward",
    "rmsnorm_backward",
    "rmsnorm_forward",
    "softmax_loss",
    "spatial_batchnorm_backward",
    "spatial_batchnorm_forward",
    "spatial_groupnorm_backward",
    "spatial_groupnorm_forward",
    "svm_loss",
]
