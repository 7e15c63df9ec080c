"""Batch norm and ReLU in one pass, beside PyTorch's two calls."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import bench_batchnorm
from benchmarks.harness import Case, Setting


def cases(setting: Setting) -> Iterator[Case]:
    return bench_batchnorm.cases(setting, relu=True)
