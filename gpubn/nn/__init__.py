"""Layers as objects, which hold their parameters, and networks that are put together of them.

``net = Sequential(Affine(64, 100), BatchNorm(100, relu=True), Affine(100, 10))``, then
``out = net(x)`` and ``dx = net.backward(dout)``: gradients are in ``net.grads``. The arithmetic is
that of ``gpubn.layers``. Arrays may be NumPy's, CuPy's, or any library's that has DLPack.
"""

from gpubn.nn.affine import Affine
from gpubn.nn.elementwise import Dropout, Flatten, ReLU
from gpubn.nn.files import CheckpointError
from gpubn.nn.inference import fold_batchnorm, population_statistics
from gpubn.nn.layer import Layer
from gpubn.nn.norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from gpubn.nn.sequential import Sequential
from gpubn.nn.torch import from_torch_state_dict, to_torch_state_dict

__all__ = [
    "Affine",
    "BatchNorm",
    "CheckpointError",
    "Dropout",
    "Flatten",
    "GroupNorm",
    "InstanceNorm",
    "Layer",
    "LayerNorm",
    "RMSNorm",
    "ReLU",
    "Sequential",
    "fold_batchnorm",
    "from_torch_state_dict",
    "population_statistics",
    "to_torch_state_dict",
]
