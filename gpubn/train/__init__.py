"""Networks and their training: ``FullyConnectedNet``, ``Solver``, update rules, data."""

from gpubn.train import optim
from gpubn.train.data import DataError, Dataset, Preprocessing
from gpubn.train.data import load as load_data
from gpubn.train.net import FullyConnectedNet
from gpubn.train.parameters import Parameters
from gpubn.train.solver import NonFiniteLoss, Solver

__all__ = [
    "DataError",
    "Dataset",
    "FullyConnectedNet",
    "NonFiniteLoss",
    "Parameters",
    "Preprocessing",
    "Solver",
    "load_data",
    "optim",
]
