"""The experiments of CS231n's second assignment: what normalization does to training, in pictures.

``gpubn experiment NAME`` runs them. ``definitions`` says which networks each one trains and what is
drawn of them, ``running`` trains them, ``figures`` and ``report`` show what came of it.
"""

from gpubn.experiments.definitions import EXPERIMENTS, Experiment, Training
from gpubn.experiments.running import ExperimentError, Plan, Watcher, run

__all__ = ["EXPERIMENTS", "Experiment", "ExperimentError", "Plan", "Training", "Watcher", "run"]
