"""Comparison of final detections, whose rows have no fixed order: what comes out of NMS or top-k in the graph.

Rows are (x1, y1, x2, y2, score, class, ...) in pixels; unused ones are zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from rep_backbones.verify import Difference, Report

FLOOR = 1e-3  # scores below are noise that no one draws
MARGIN = 1e-3  # at the cut by score, either side may keep the row that the other drops


def compare_rows(pairs: Iterable[tuple[Tensor, Tensor]], *, size: int, tolerance: float) -> tuple[Report, int]:
    """Find for each row of one side its partner of the same class on the other.

    Args:
        pairs: of a reference and a candidate, each `(n, k, 6 or more)`.
        size: of the picture, the range of the boxes in pixels.
        tolerance: for boxes as a fraction of `size`, for scores as they are.

    Returns:
        The report, with infinity for a row without a partner, and the number of rows that were compared.
    """
    boxes, scores, compared, batches = 0.0, 0.0, 0, 0
    for reference, candidate in pairs:
        batches += 1
        for a, b in zip(reference.double(), candidate.double(), strict=True):
            for one, other in ((a, b), (b, a)):
                wanted = one[one[:, 4] > _cut(one, other)]
                compared += len(wanted)
                for row in wanted:
                    box, score = _nearest(row, other, size)
                    boxes, scores = max(boxes, box), max(scores, score)
    found = [Difference("boxes", boxes, float(size), tolerance), Difference("scores", scores, 1.0, tolerance)]
    return Report(found, batches), compared


def _cut(one: Tensor, other: Tensor) -> float:
    full = [float(rows[:, 4].min()) + MARGIN for rows in (one, other) if float(rows[:, 4].min()) > 0]
    return max([FLOOR, *full])


def _nearest(row: Tensor, others: Tensor, size: int) -> tuple[float, float]:
    same = others[(others[:, 5] == row[5]) & (others[:, 4] > 0)]
    if not len(same):
        return math.inf, math.inf
    box = (same[:, :4] - row[:4]).abs().amax(1) / size
    score = (same[:, 4] - row[4]).abs()
    best = int(torch.argmin(box + score))
    return float(box[best]), float(score[best])
