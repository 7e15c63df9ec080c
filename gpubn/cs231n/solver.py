"""The assignment's ``cs231n.solver``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpubn import train
from gpubn.backend import Array

__all__ = ["Solver"]


class Solver(train.Solver):
    """``gpubn.train.Solver``, whose batches and samples are drawn from NumPy's global stream.

    ``Solver(model, data, **options)``: the options are the assignment's, by the same names and with
    the same defaults, and those of ``gpubn.train.Solver`` beside them, save ``seed``: call
    ``np.random.seed``.
    """

    def __init__(self, model: Any, data: Mapping[str, Array], **options: Any) -> None:
        if "seed" in options:
            raise ValueError(
                "seed is given, expected none: batches come from NumPy's global stream, which "
                "np.random.seed starts"
            )
        super().__init__(model, data, seed=0, **options)  # a seed that nothing is drawn from
        self.generator: Any = _GlobalStream()


class _GlobalStream:
    """NumPy's global stream, with those methods of a ``Generator`` that a Solver calls."""

    def choice(self, count: int, size: int) -> Any:
        return np.random.choice(count, size)

    def permutation(self, count: int) -> Any:
        return np.random.permutation(count)

    @property
    def bit_generator(self) -> _GlobalStream:
        return self

    @property
    def state(self) -> dict[str, Any]:
        """The stream's state, as checkpoints keep it: nothing but numbers, texts and lists."""
        state: Any = np.random.get_state(legacy=False)
        key = state["state"]["key"].tolist()
        return {**state, "state": {**state["state"], "key": key}}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        key = np.array(state["state"]["key"], np.uint32)
        np.random.set_state({**state, "state": {**state["state"], "key": key}})

    def __deepcopy__(self, memo: Any) -> np.random.RandomState:
        """Return a stream that goes on as this one would, and leaves it as it is."""
        copy = np.random.RandomState()
        copy.set_state(np.random.get_state())
        return copy
