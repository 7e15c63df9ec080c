"""Parity's group and instance norm."""

from __future__ import annotations

from gpubn import layers
from gpubn.backend import Array
from gpubn.testing import reference, tolerance
from gpubn.testing.parity.batchnorm_operations import in_both_layouts, norm_arguments
from gpubn.testing.parity.cases import Draw
from gpubn.testing.parity.operation import Arrays, Operation, Reference, held
from gpubn.testing.parity.shapes import DTYPES, GROUPS, INSTANCES

# --- Group and instance norm ----------------------------------------------------------------------


def _groupnorm_arguments(draw: Draw) -> Arrays:
    channels = draw.shape[1]
    divisors = [n for n in range(1, channels + 1) if channels % n == 0]
    return {**norm_arguments(draw, channels), "groups": int(draw.rng.choice(divisors))}


def _groupnorm(x: Array, gamma: Array, beta: Array, dout: Array, groups: int, axis: int) -> Arrays:
    out, cache = layers.groupnorm_forward(x, gamma, beta, groups, {}, axis)
    dx, dgamma, dbeta = layers.groupnorm_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def _groupnorm_reference(
    x: Array, gamma: Array, beta: Array, dout: Array, groups: int
) -> Reference:
    dx, dgamma, dbeta = reference.groupnorm_backward(dout, x, gamma, groups)
    out = reference.groupnorm_forward(x, gamma, beta, groups)
    expected = {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}
    return held("groupnorm", expected, tolerance.groupnorm_scales(x, gamma, beta, dout, groups))


def _instancenorm_arguments(draw: Draw) -> Arrays:
    return norm_arguments(draw, draw.shape[1])


def _instancenorm(x: Array, gamma: Array, beta: Array, dout: Array, axis: int) -> Arrays:
    out, cache = layers.instancenorm_forward(x, gamma, beta, {}, axis)
    dx, dgamma, dbeta = layers.instancenorm_backward(dout, cache)
    return {"out": out, "dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def _instancenorm_reference(x: Array, gamma: Array, beta: Array, dout: Array) -> Reference:
    return _groupnorm_reference(x, gamma, beta, dout, x.shape[1])


# --- All of them ----------------------------------------------------------------------------------

OPERATIONS = (
    Operation(
        "groupnorm",
        shapes=GROUPS,
        dtypes=DTYPES,
        arguments=_groupnorm_arguments,
        run=in_both_layouts(_groupnorm),
        reference=_groupnorm_reference,
    ),
    Operation(
        "instancenorm",
        shapes=INSTANCES,
        dtypes=DTYPES,
        arguments=_instancenorm_arguments,
        run=in_both_layouts(_instancenorm),
        reference=_instancenorm_reference,
    ),
)
