"""The shapes that are timed, in three sizes of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

Shape = tuple[int, ...]
Size = Literal["full", "quick", "tiny"]
"""``tiny`` is to see that everything runs; its times say nothing."""

MLP: Mapping[Size, tuple[Shape, ...]] = {
    "full": (
        *((32, 100), (256, 100), (128, 512), (1024, 512), (4096, 1024), (8192, 4096)),
        *((65536, 256), (262144, 64), (131072, 3), (1000, 1023), (64, 65536)),
    ),
    "quick": ((256, 100), (1024, 512), (4096, 1024)),
    "tiny": ((8, 5),),
}

# The inputs of ResNet-50's batch norms at batch 32: (channels, height and width).
_RESNET = (
    *((64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28)),
    *((256, 14), (1024, 14), (512, 7), (2048, 7)),
)
IMAGES: Mapping[Size, tuple[Shape, ...]] = {
    "full": tuple((32, channels, side, side) for channels, side in _RESNET),
    "quick": ((32, 64, 56, 56), (32, 512, 7, 7)),
    "tiny": ((2, 8, 3, 3),),
}

ROWS: Mapping[Size, tuple[Shape, ...]] = {
    "full": ((128, 512), (4096, 768), (65536, 256), (8192, 4096)),
    "quick": ((128, 512), (4096, 768)),
    "tiny": ((4, 6),),
}

ELEMENTS: Mapping[Size, tuple[Shape, ...]] = {
    "full": ((32, 100), (1024, 512), (4096, 1024), (32, 256, 56, 56), (8192, 4096)),
    "quick": ((32, 100), (1024, 512), (4096, 1024)),
    "tiny": ((4, 6),),
}

PARAMETERS: Mapping[Size, tuple[Shape, ...]] = {
    "full": ((1 << 12,), (1 << 16,), (1 << 20,), (1 << 24,)),
    "quick": ((1 << 16,), (1 << 20,)),
    "tiny": ((37,),),
}


def images(size: Size) -> Iterator[tuple[Shape, str, int]]:
    """Yield shape, layout and channel axis of every image, channels first and then last."""
    for n, c, h, w in IMAGES[size]:
        yield (n, c, h, w), "NCHW", 1
        yield (n, h, w, c), "NHWC", -1


def name(shape: Shape) -> str:
    """Return a shape as tables have it: ``32x64x56x56``."""
    return "x".join(map(str, shape))
