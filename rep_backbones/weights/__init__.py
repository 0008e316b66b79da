"""Pretrained weights: the files of other people's code, read under their own names for the layers."""

from rep_backbones.weights.errors import WeightsError
from rep_backbones.weights.load import load_weights
from rep_backbones.weights.report import Report

__all__ = ["Report", "WeightsError", "load_weights"]
