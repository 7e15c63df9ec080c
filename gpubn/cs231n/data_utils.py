"""The assignment's ``cs231n.data_utils``: CIFAR-10 as its notebooks want it."""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from gpubn.train import data

__all__ = ["get_CIFAR10_data"]

VARIABLE = "GPUBN_CIFAR10"
"""The environment variable that names the data where no argument does."""

FOLDER = os.path.join("cs231n", "datasets", "cifar-10-batches-py")
"""Where the assignment's ``get_datasets.sh`` puts them: looked for where neither does."""


def get_CIFAR10_data(  # noqa: N802 - the assignment's name
    num_training: int = 49000,
    num_validation: int = 1000,
    num_test: int = 1000,
    subtract_mean: bool = True,
    cifar10_dir: str | os.PathLike[str] | None = None,
) -> dict[str, NDArray[np.generic]]:
    """Return training, validation and test images and their labels.

    Parameters
    ----------
    num_training, num_validation, num_test : int
        How many. Validation images are those behind the training images.
    subtract_mean : bool
        Whether to subtract the mean training image.
    cifar10_dir : path, optional
        The folder of CIFAR-10's Python batches, or a file FILE.npz with the arrays X_train,
        y_train, X_val, y_val, X_test and y_test of uint8 images. By default ``GPUBN_CIFAR10``, else
        the course's ``cs231n/datasets/cifar-10-batches-py``. Of a file with fewer images there are
        as many as it has, and a line says so; its array ``mean_image``, where it has one, is what
        is subtracted.

    Returns
    -------
    dict
        X_train, X_val and X_test, float64 (N, 3, 32, 32) of 0 to 255 less the mean image;
        y_train, y_val and y_test, int64 (N,).

    Raises
    ------
    gpubn.train.DataError
        The data are missing or damaged; nothing in them is executed.
    """
    path = os.fspath(cifar10_dir or os.environ.get(VARIABLE) or FOLDER)
    is_file = path.lower().endswith(".npz")
    if not os.path.exists(path):
        raise data.DataError(
            f"{path} is missing, expected CIFAR-10's Python batches: name their folder by "
            f"cifar10_dir or by {VARIABLE}, or fetch them by the course's get_datasets.sh"
        )
    dataset = data.load(path if is_file else f"cifar10:{path}")
    if dataset.X_test is None or dataset.y_test is None:
        raise data.DataError(f"{path} has no X_test, expected a test set")
    X = np.concatenate([dataset.X_train, dataset.X_val])
    y = np.concatenate([dataset.y_train, dataset.y_val])
    training = min(num_training, len(dataset.X_train))
    parts = {
        "train": (X[:training], y[:training]),
        "val": (X[training:][:num_validation], y[training:][:num_validation]),
        "test": (dataset.X_test[:num_test], dataset.y_test[:num_test]),
    }
    for (part, (images, _)), asked in zip(
        parts.items(), (num_training, num_validation, num_test), strict=True
    ):
        if len(images) < asked:
            print(f"{path} has {len(images):,} images for {part}, not {asked:,}")
    mean = data.read_npz(path, ("mean_image",)).get("mean_image") if is_file else None
    if mean is None:
        mean = parts["train"][0].mean(axis=0, dtype=np.float64)
    arrays: dict[str, NDArray[np.generic]] = {}
    for part, (images, labels) in parts.items():
        arrays[f"X_{part}"] = images.astype(np.float64) - (mean if subtract_mean else 0)
        arrays[f"y_{part}"] = labels
    return arrays
