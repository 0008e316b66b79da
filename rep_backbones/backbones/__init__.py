"""Whole networks as configuration data, and one builder."""

from rep_backbones.backbones.create import create_backbone, list_backbones
from rep_backbones.backbones.efficientrep import EfficientRep
from rep_backbones.backbones.mobileone import MobileOne
from rep_backbones.backbones.repvgg import RepVGG
from rep_backbones.backbones.stages import Classifier, Features, Stages, Trunk

__all__ = [
    "Classifier",
    "EfficientRep",
    "Features",
    "MobileOne",
    "RepVGG",
    "Stages",
    "Trunk",
    "create_backbone",
    "list_backbones",
]
