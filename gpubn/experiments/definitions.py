"""What each experiment trains, what is drawn of it, and what follows from its results.

Networks and settings are those of CS231n's notebooks on batch normalization, dropout and fully
connected nets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from gpubn.experiments.results import Results

BASELINE = "no norm"
"""The series without normalization."""

TRAINS = 0.5
"""A network trains where its best training accuracy is above this share of the way from chance to
the best of all networks of the experiment."""


@dataclass(frozen=True)
class Training:
    """One network and its training.

    Attributes
    ----------
    series : str
        The line in a figure that it belongs to.
    images : int
        How many of the training images it sees: the first ones, or all where there are fewer.
    Everything else is as in ``FullyConnectedNet`` and ``Solver``.
    """

    series: str
    hidden_dims: tuple[int, ...] = (100,) * 5
    normalization: str | None = None
    dropout_keep_ratio: float = 1.0
    weight_scale: float = 2e-2
    update_rule: str = "adam"
    learning_rate: float = 1e-3
    num_epochs: int = 10
    batch_size: int = 50
    images: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Figure:
    """A figure: one plot for each measure.

    Attributes
    ----------
    name : str
        Part of the file's name.
    measures : tuple of str
        Keys of ``figures.MEASURES``.
    across : str
        ``"time"``, or the field of ``Training`` on the horizontal axis.
    """

    name: str
    measures: tuple[str, ...]
    across: str = "time"


@dataclass(frozen=True)
class Experiment:
    """An experiment.

    Attributes
    ----------
    name, title, question : str
    trainings : callable
        Takes whether to be quick; returns the trainings of one seed.
    figures : tuple of Figure
    finding : callable
        Takes the results; returns what they say, in a sentence.
    """

    name: str
    title: str
    question: str
    trainings: Callable[[bool], list[Training]]
    figures: tuple[Figure, ...]
    finding: Callable[[Results], str]

    def of_seeds(self, seeds: int, quick: bool) -> list[Training]:
        """Return the trainings of seeds 0, 1, ..., a seed after the other."""
        return [
            replace(training, seed=seed)
            for seed in range(seeds)
            for training in self.trainings(quick)
        ]


_HISTORY = Figure("history", ("loss", "train_accuracy", "val_accuracy"))
_ACCURACIES = Figure("accuracy", ("train_accuracy", "val_accuracy"))


# --- With and without batch norm ------------------------------------------------------------------


def _batchnorm(quick: bool) -> list[Training]:
    epochs = 5 if quick else 10
    return [
        Training("batch norm", normalization="batchnorm", num_epochs=epochs),
        Training(BASELINE, num_epochs=epochs),
    ]


def _batchnorm_finding(results: Results) -> str:
    ours, none = (results.of(series) for series in ("batch norm", BASELINE))
    epoch = results.first_epoch("batch norm", none.train_accuracy)
    if epoch is None:
        reached = "it did not reach what the other ended with"
    elif epoch == 0:
        reached = "it had reached what the other ended with after the first iteration"
    else:
        reached = f"it had reached what the other ended with by epoch {epoch}"
    return (
        f"With batch norm a net of six layers ended with {ours.train_accuracy:.1%} of its training "
        f"images right, without any norm with {none.train_accuracy:.1%} (validation: "
        f"{ours.val_accuracy:.1%} and {none.val_accuracy:.1%}); {reached}."
    )


# --- The scale of the initial weights -------------------------------------------------------------


def _weight_scale(quick: bool) -> list[Training]:
    return [
        Training(
            series,
            hidden_dims=(50,) * 7,
            normalization=normalization,
            weight_scale=float(scale),
            num_epochs=5 if quick else 10,
        )
        for scale in np.logspace(-4, 0, num=9 if quick else 20)
        for series, normalization in (("batch norm", "batchnorm"), (BASELINE, None))
    ]


def decades_that_train(results: Results, series: str) -> float:
    """Return over how many decades of the weights' scale networks of a series train.

    Each scale stands for the stretch half-way to its neighbours, within what was tried.
    """
    best = results.best_train_accuracies("weight_scale")
    ceiling = max(max(accuracies.values()) for accuracies in best.values())
    enough = results.chance + TRAINS * (ceiling - results.chance)
    scales = sorted(best[series])
    logs = np.log10(scales)
    edges = np.concatenate([logs[:1], (logs[1:] + logs[:-1]) / 2, logs[-1:]])
    trained = np.array([best[series][scale] > enough for scale in scales])
    return float(np.diff(edges)[trained].sum())


def _weight_scale_finding(results: Results) -> str:
    ours, none = (decades_that_train(results, series) for series in ("batch norm", BASELINE))
    scales = sorted(results.best_train_accuracies("weight_scale")[BASELINE])
    span = np.log10(scales[-1] / scales[0])
    return (
        f"Of the {span:.0f} decades of weight scale from {scales[0]:g} to {scales[-1]:g}, a net of "
        f"eight layers trained over {ours:.1f} with batch norm and over {none:.1f} without."
    )


# --- The size of the batches ----------------------------------------------------------------------


def _batch_sizes(normalization: str, name: str) -> Callable[[bool], list[Training]]:
    def trainings(quick: bool) -> list[Training]:
        shared = Training(
            f"{BASELINE}, batches of 5",
            learning_rate=10**-3.5,
            num_epochs=4 if quick else 10,
            batch_size=5,
        )
        return [
            shared,
            *(
                replace(
                    shared,
                    series=f"{name}, batches of {size}",
                    normalization=normalization,
                    batch_size=size,
                )
                for size in (5, 10, 50)
            ),
        ]

    return trainings


def _batch_sizes_finding(name: str) -> Callable[[Results], str]:
    def finding(results: Results) -> str:
        small, large = (results.of(f"{name}, batches of {size}") for size in (5, 50))
        none = results.of(f"{BASELINE}, batches of 5")
        return (
            f"With {name} the best validation accuracy was {small.best_val_accuracy:.1%} in "
            f"batches of 5 and {large.best_val_accuracy:.1%} in batches of 50; without a norm, in "
            f"batches of 5, {none.best_val_accuracy:.1%}."
        )

    return finding


# --- Dropout --------------------------------------------------------------------------------------


def _dropout(quick: bool) -> list[Training]:
    return [
        Training(
            "no dropout" if keep == 1 else f"dropout, {keep:g} kept",
            hidden_dims=(500,),
            dropout_keep_ratio=keep,
            weight_scale=1e-2,
            learning_rate=5e-4,
            num_epochs=10 if quick else 25,
            batch_size=100,
            images=500,
        )
        for keep in (1.0, 0.25)
    ]


def _dropout_finding(results: Results) -> str:
    none, kept = (results.of(series) for series in ("no dropout", "dropout, 0.25 kept"))
    return (
        f"Training and validation accuracy ended {100 * none.gap:.1f} points apart without dropout "
        f"({none.train_accuracy:.1%} and {none.val_accuracy:.1%}) and {100 * kept.gap:.1f} with a "
        f"quarter of the units kept ({kept.train_accuracy:.1%} and {kept.val_accuracy:.1%})."
    )


# --- Update rules ---------------------------------------------------------------------------------

_RULES = {"sgd": 5e-3, "sgd_momentum": 5e-3, "adam": 1e-3, "rmsprop": 1e-4}


def _update_rules(quick: bool) -> list[Training]:
    return [
        Training(
            rule,
            weight_scale=5e-2,
            update_rule=rule,
            learning_rate=rate,
            num_epochs=3 if quick else 5,
            batch_size=100,
            images=4000,
        )
        for rule, rate in _RULES.items()
    ]


def _update_rules_finding(results: Results) -> str:
    ended = {rule: results.of(rule).train_accuracy for rule in _RULES}
    order = sorted(ended, key=lambda rule: -ended[rule])
    return f"After {results.epochs} epochs the training accuracies were: " + ", ".join(
        f"{rule} {ended[rule]:.1%}" for rule in order
    ) + "."  # fmt: skip


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "batchnorm",
            "Batch norm in a deep net",
            "Does a net of six layers learn faster with batch norm?",
            _batchnorm,
            (_HISTORY,),
            _batchnorm_finding,
        ),
        Experiment(
            "weight-scale",
            "Batch norm and the scale of the initial weights",
            "How much may the initial weights be off?",
            _weight_scale,
            (
                Figure(
                    "weight-scale",
                    ("best_train_accuracy", "best_val_accuracy", "final_loss"),
                    "weight_scale",
                ),
            ),
            _weight_scale_finding,
        ),
        Experiment(
            "batch-size",
            "Batch norm and the size of the batches",
            "What do small batches, whose statistics are poor estimates, cost?",
            _batch_sizes("batchnorm", "batch norm"),
            (_ACCURACIES,),
            _batch_sizes_finding("batch norm"),
        ),
        Experiment(
            "layernorm",
            "Layer norm and the size of the batches",
            "Does a norm that sees one sample at a time mind small batches?",
            _batch_sizes("layernorm", "layer norm"),
            (_ACCURACIES,),
            _batch_sizes_finding("layer norm"),
        ),
        Experiment(
            "dropout",
            "Dropout",
            "Does dropout close the gap between training and validation?",
            _dropout,
            (_ACCURACIES,),
            _dropout_finding,
        ),
        Experiment(
            "update-rules",
            "Update rules",
            "Which update rule learns fastest?",
            _update_rules,
            (_HISTORY,),
            _update_rules_finding,
        ),
    )
}
"""Every experiment by its name."""
