"""The update rules against ``torch.optim``: several steps, from no state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch_cases import (
    CASES,
    Scale,
    assert_close,
    both_singles,
    margin,
    numpy,
    seeds,
    shapes,
    tensor,
    torch,
)

from gpubn.testing.tolerance import update_scales
from gpubn.train import optim


class Rule(NamedTuple):
    """PyTorch's optimizer for an update rule, and what its state is called there and here.

    The scalars are the rule's defaults, which are not PyTorch's throughout.
    """

    optimizer: Callable[..., Any]
    state: dict[str, str]  # ours: PyTorch's


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=1e-2)


def sgd_momentum(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)


def rmsprop(parameters: Any) -> Any:
    return torch.optim.RMSprop(parameters, lr=1e-2, alpha=0.99, eps=1e-8)


def adam(parameters: Any) -> Any:
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8)


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)


RULES = {
    "sgd": Rule(sgd, {}),
    "sgd_momentum": Rule(sgd_momentum, {"velocity": "momentum_buffer"}),
    "rmsprop": Rule(rmsprop, {"cache": "square_avg"}),
    "adam": Rule(adam, {"m": "exp_avg", "v": "exp_avg_sq"}),
    "adamw": Rule(adamw, {"m": "exp_avg", "v": "exp_avg_sq"}),
}

# PyTorch's momentum_buffer has the learning rate outside: what is taken away is their product.
FACTORS = {"velocity": -1e-2}


def test_every_rule_is_here() -> None:
    assert tuple(RULES) == optim.RULES


@pytest.mark.parametrize("rule", RULES)
@CASES
@given(
    shape=st.integers(1, 4).flatmap(shapes),
    steps=st.integers(1, 6),
    size=st.sampled_from([1.0, 1.0, 1e-3, 1e3]),
    seed=seeds,
)
@example((1,), 6, 1.0, 0)
@example((257, 31), 6, 1.0, 0)
@example((2048,), 6, 1e-6, 0)
@both_singles
def test_update_rule(
    dtype: np.dtype[Any], rule: str, shape: tuple[int, ...], steps: int, size: float, seed: int
) -> None:
    rng, state = np.random.default_rng(seed), RULES[rule].state
    w = rng.standard_normal(shape).astype(dtype)
    theirs = tensor(w.astype(np.float64), grad=True)
    optimizer = RULES[rule].optimizer([theirs])
    config: dict[str, Any] = {}
    # As large as all that has been added so far would be with one sign; every step's error stays.
    magnitude = {"w": np.abs(w.astype(np.float64)), **dict.fromkeys(state, np.zeros(shape))}
    allowed = dict.fromkeys(magnitude, np.zeros(shape))
    for step in range(steps):
        dw = (size * rng.standard_normal(shape)).astype(dtype)
        scales = update_scales(
            rule,
            magnitude["w"].astype(dtype),
            dw,
            **({"t": step} if "m" in state else {}),
            **{name: magnitude[name] for name in state},
        )
        w, config = optim.get(rule)(w, dw, config)
        theirs.grad = tensor(dw.astype(np.float64))
        optimizer.step()
        expected = {"w": numpy(theirs)}
        for name, key in state.items():
            expected[name] = FACTORS.get(name, 1.0) * numpy(optimizer.state[theirs][key])
        for name, result in {"w": w, **{name: config[name] for name in state}}.items():
            row, scale = f"{rule} {name}", scales[name]
            allowed[name] = allowed[name] + margin(row, dtype, Scale(scale, scale))
            assert_close(f"{row}, step {step + 1}", result, expected[name], allowed[name], dtype)
            magnitude[name] = scale
