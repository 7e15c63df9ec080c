"""Update rules, on all parameters of a network as one array: what ``Solver`` does in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.checks import Results
from benchmarks.harness import OURS, Case, Contestant, Setting
from benchmarks.layer import against, draw, note
from benchmarks.peers import EAGER, FUSED, Torch
from benchmarks.shapes import PARAMETERS, Shape
from gpubn.backend import to_host
from gpubn.testing import reference
from gpubn.train import optim

UPDATE = "update"
RATE = 0.5  # large, so that an update that is wrong is seen beside w
# What an update reads and writes: w twice and dw, and each array of state twice.
RULES = {"sgd": 3, "sgd_momentum": 5, "rmsprop": 5, "adam": 7, "adamw": 7}


def cases(setting: Setting) -> Iterator[Case]:
    if setting.dtype not in ("float32", "float64"):
        note(f"optimizers are left out: they have no {setting.dtype}")
        return
    if setting.reuse:
        note("optimizers are left out: they have no output buffers, they update in place")
        return
    for rule in RULES:
        for shape in PARAMETERS[setting.size]:
            yield _case(setting, rule, shape)


def torch_optimizer(torch: Torch, rule: str, parameters: Any, rate: float, fused: bool) -> Any:
    """Return PyTorch's optimizer that follows the same rule."""
    classes = {"sgd": "SGD", "sgd_momentum": "SGD", "rmsprop": "RMSprop", "adam": "Adam"}
    kind = getattr(torch.module.optim, classes.get(rule, "AdamW"))
    options = {"momentum": 0.9} if rule == "sgd_momentum" else {}
    return kind(parameters, lr=rate, **options, **({"fused": True} if fused else {}))


def _case(setting: Setting, rule: str, shape: Shape) -> Case:
    w, dw = draw(setting.dtype, 0, shape, shape)
    contestants = [_ours(setting, rule, w, dw)]
    if setting.torch is not None:
        names = [EAGER] if rule == "rmsprop" else [EAGER, FUSED]
        contestants += [
            _peer(setting.torch, rule, w, dw, name) for name in names if name in setting.torch.names
        ]
    return Case(
        op=f"optimizer {rule}",
        direction=UPDATE,
        shape=shape,
        layout="any",
        dtype=setting.dtype,
        nbytes=w.nbytes,
        passes=RULES[rule],
        contestants=tuple(contestants),
        check=against(lambda: {"w": _expected(rule, w, dw)}, setting.dtype),
    )


def _expected(rule: str, w: Any, dw: Any) -> Any:
    """Return the parameters after one update."""
    zero = np.zeros_like(w)
    state = {"sgd": (), "sgd_momentum": (zero,), "rmsprop": (zero,)}.get(rule, (zero, zero, 0))
    updated = getattr(reference, rule)(w, dw, *state, learning_rate=RATE)
    return updated[0] if isinstance(updated, tuple) else updated


def _ours(setting: Setting, rule: str, w: Any, dw: Any) -> Contestant:
    device = setting.device

    def prepare() -> Callable[[], Any]:
        mine, gradient = device.xp.array(device.asarray(w)), device.asarray(dw)
        config = optim.complete(rule, {"learning_rate": RATE})

        def run() -> Any:
            optim.update_in_place(rule, mine, gradient, config)
            return mine

        return run

    def results(value: Any) -> Results:
        return {"w": np.array(to_host(value), np.float64)}

    return Contestant(OURS, prepare, results)


def _peer(torch: Torch, rule: str, w: Any, dw: Any, name: str) -> Contestant:
    def prepare() -> Callable[[], Any]:
        parameter = torch.tensor(w).requires_grad_()
        parameter.grad = torch.tensor(dw)
        optimizer = torch_optimizer(torch, rule, [parameter], RATE, name == FUSED)

        def run() -> Any:
            optimizer.step()
            return parameter

        return run

    def results(value: Any) -> Results:
        return {"w": np.array(torch.array(value))}

    return Contestant(name, prepare, results)
