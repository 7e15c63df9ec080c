"""Whole training steps of a network with batch norm, beside the same network in PyTorch.

A step gathers a batch, goes forward and back, and updates the parameters; the loss stays on the
device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import gpubn
from benchmarks.bench_optimizer import torch_optimizer
from benchmarks.checks import EPS, Float64, Results, WrongResult
from benchmarks.harness import BLAS_REST, OURS, Case, Contestant, Setting
from benchmarks.layer import note
from benchmarks.peers import COMPILED, EAGER, FUSED, Torch
from gpubn.backend import to_host
from gpubn.testing import reference

STEP = "step"
HIDDEN, INPUTS, CLASSES = (100,) * 5, 3072, 10
RATES = {"adam": 2e-3, "sgd_momentum": 2e-2}
WEIGHT_SCALE = 0.05
BATCHES = {"full": (50, 256), "quick": (50, 256), "tiny": (8,)}
DATA = 20  # batches
CHECKED = 4
"""Steps whose losses are compared; those after the first show that the updates are right."""
LOSS_TOLERANCE = {"float32": 1e-3, "float64": 1e-6}


def cases(setting: Setting) -> Iterator[Case]:
    if setting.dtype not in LOSS_TOLERANCE:
        note(f"training steps are left out: networks have no {setting.dtype}")
        return
    if setting.reuse:
        note("training steps are left out: their buffers are the networks' own")
        return
    for rule in RATES:
        for batch in BATCHES[setting.size]:
            yield _case(setting, rule, batch)


class Problem:
    """Data, and the weights at the start."""

    def __init__(self, setting: Setting, rule: str, batch: int) -> None:
        rng = np.random.default_rng(0)
        self.rule, self.batch, self.dtype, self.device = rule, batch, setting.dtype, setting.device
        self.X = rng.standard_normal((DATA * batch, INPUTS)).astype(setting.dtype)
        self.y = rng.integers(0, CLASSES, len(self.X))
        weights = self.net().params
        self.start = {name: np.array(to_host(array)) for name, array in weights.items()}

    def net(self) -> gpubn.FullyConnectedNet:
        return gpubn.FullyConnectedNet(
            HIDDEN,
            INPUTS,
            CLASSES,
            normalization="batchnorm",
            weight_scale=WEIGHT_SCALE,
            dtype=self.dtype,
            seed=0,
            device=self.device.name,
        )

    def batches(self) -> Iterator[Any]:
        """Yield each batch's samples, in the order that ``Solver`` has them."""
        generator = np.random.default_rng(0)
        while True:
            yield from generator.permutation(len(self.X)).reshape(DATA, self.batch)

    def losses(self) -> Float64:
        """Return the first steps' losses, by the reference."""
        params: dict[str, Any] = {name: a.astype(np.float64) for name, a in self.start.items()}
        state: dict[str, tuple[Any, ...]] = {}
        losses = []
        for _, chosen in zip(range(CHECKED), self.batches(), strict=False):
            loss, grads = _loss(params, self.X[chosen], self.y[chosen])
            losses.append(loss)
            for name, w in params.items():
                zero = np.zeros_like(w)
                before = state.get(name, (zero, zero, 0) if self.rule == "adam" else (zero,))
                updated = getattr(reference, self.rule)(
                    w, grads[name], *before, learning_rate=RATES[self.rule]
                )
                params[name], *after = updated
                state[name] = tuple(after)
        return np.array(losses)


def _loss(params: dict[str, Any], X: Any, y: Any) -> tuple[float, dict[str, Any]]:
    """Return the loss and its gradients, in float64."""
    depth = len(HIDDEN)
    inputs, graphs = [X], []
    for i in range(1, depth + 1):
        scores = reference.affine_forward(inputs[-1], params[f"W{i}"], params[f"b{i}"])
        graphs.append(
            reference.batchnorm_forward(scores, params[f"gamma{i}"], params[f"beta{i}"], EPS)
        )
        inputs.append(reference.relu_forward(graphs[-1].out))
    last = depth + 1
    scores = reference.affine_forward(inputs[-1], params[f"W{last}"], params[f"b{last}"])
    loss, dout = reference.softmax_loss(scores, y)
    grads: dict[str, Any] = {}
    for i in range(last, 0, -1):
        if i < last:
            dout = reference.relu_backward(dout, graphs[i - 1].out)
            dout, grads[f"gamma{i}"], grads[f"beta{i}"] = reference.batchnorm_backward_graph(
                dout, graphs[i - 1]
            )
        dout, grads[f"W{i}"], grads[f"b{i}"] = reference.affine_backward(
            dout, inputs[i - 1], params[f"W{i}"]
        )
    return loss, grads


def _case(setting: Setting, rule: str, batch: int) -> Case:
    problem = Problem(setting, rule, batch)
    contestants = [_ours(problem)]
    if setting.torch is not None:
        chosen = (name for name in setting.torch.names if name in (EAGER, COMPILED, FUSED))
        contestants += [_peer(setting.torch, problem, name) for name in chosen]
    expected = problem.losses()

    def check(name: str, results: Results) -> None:
        error = float(np.abs(results["losses"] - expected).max())
        if not error <= LOSS_TOLERANCE[setting.dtype]:
            raise WrongResult(f"losses {results['losses']}, expected {expected}")

    return Case(
        op=f"step {rule}",
        direction=STEP,
        shape=(batch, INPUTS, *HIDDEN, CLASSES),
        layout="2-D",
        dtype=setting.dtype,
        nbytes=0,
        passes=0,
        contestants=tuple(contestants),
        check=check,
        rest=BLAS_REST,
    )


def after_first_steps(step: Callable[[], Any]) -> Callable[[], Any]:
    """Return a step, of which all but the last that is checked have been made."""
    for _ in range(CHECKED - 1):
        step()
    return step


def _ours(problem: Problem) -> Contestant:
    def prepare() -> Callable[[], Any]:
        device = problem.device
        X, y = device.asarray(problem.X), device.asarray(problem.y)
        solver = gpubn.Solver(
            problem.net(),
            {"X_train": X, "y_train": y, "X_val": X, "y_val": y},
            update_rule=problem.rule,
            optim_config={"learning_rate": RATES[problem.rule]},
            batch_size=problem.batch,
            shuffle=True,
            seed=0,
            verbose=False,
        )

        def step() -> gpubn.Solver:
            solver._step()
            return solver

        return after_first_steps(step)

    def results(solver: gpubn.Solver) -> Results:
        return {"losses": np.array(solver.loss_history[:CHECKED])}

    return Contestant(OURS, prepare, results)


def _peer(torch: Torch, problem: Problem, name: str) -> Contestant:
    def prepare() -> Callable[[], Any]:
        module, nn = torch.module, torch.module.nn
        net = _torch_net(torch, problem)
        optimizer = torch_optimizer(
            torch, problem.rule, net.parameters(), RATES[problem.rule], name == FUSED
        )
        X, y = torch.tensor(problem.X), torch.tensor(problem.y)
        batches, losses = problem.batches(), list[Any]()
        forward = torch.transformed(name, lambda X, y: nn.functional.cross_entropy(net(X), y))

        def step() -> Any:
            chosen = module.from_numpy(next(batches)).to(torch.device)
            optimizer.zero_grad()
            loss = forward(X[chosen], y[chosen])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            return losses

        return after_first_steps(step)

    def results(losses: list[Any]) -> Results:
        return {"losses": np.array([float(loss) for loss in losses[:CHECKED]])}

    return Contestant(name, prepare, results)


def _torch_net(torch: Torch, problem: Problem) -> Any:
    """Return the network, with the same weights at the start."""
    nn, start = torch.module.nn, problem.start
    layers: list[Any] = []
    widths = (INPUTS, *HIDDEN, CLASSES)
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths), 1):
        affine = nn.Linear(inputs, outputs)
        affine.weight.data, affine.bias.data = (
            torch.tensor(start[f"W{i}"].T),
            torch.tensor(start[f"b{i}"]),
        )
        layers.append(affine)
        if i <= len(HIDDEN):
            layers += [nn.BatchNorm1d(outputs, EPS), nn.ReLU()]
    dtype = getattr(torch.module, problem.dtype)
    return nn.Sequential(*layers).to(torch.device, dtype)
