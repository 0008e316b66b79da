"""Real pictures to prove on: the two that Ultralytics ships, or the user's own, as its predictor would prepare them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from ultralytics.data.augment import LetterBox
from ultralytics.utils import ASSETS

SHIPPED = (ASSETS / "bus.jpg", ASSETS / "zidane.jpg")


def pictures(size: tuple[int, int], channels: int = 3, paths: Sequence[Path] = SHIPPED) -> Tensor:
    """Pictures letterboxed to `size`: `(n, channels, h, w)` float32 in [0, 1], RGB; grey for one channel, and repeated for
    more than three.

    Args:
        size: (height, width) in pixels.

    Raises:
        ValueError: a file that is not a picture, named.
    """
    prepared = []
    for path in paths:
        picture = cv2.imread(str(path))
        if picture is None:
            raise ValueError(f"{path} is not a picture that OpenCV reads; give a JPEG or PNG file")
        boxed: Any = LetterBox(size, auto=False)(image=picture)
        prepared.append(torch.from_numpy(np.ascontiguousarray(boxed[:, :, ::-1].transpose(2, 0, 1))).float() / 255)
    batch = torch.stack(prepared)
    if channels == 1:
        return batch.mean(1, keepdim=True)
    return batch[:, [index % 3 for index in range(channels)]]
