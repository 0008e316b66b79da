"""The error of this room, which each of its files raises."""

from __future__ import annotations


class WeightsError(ValueError):
    """Weights that were not loaded: what was given, what is accepted, and what to do. The model is as it was."""
