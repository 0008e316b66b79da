"""Train a detector with many parallel branches per layer, deploy it with one convolution per layer, computing the same."""

from rep_backbones import blocks
from rep_backbones.backbones import create_backbone, list_backbones
from rep_backbones.fuse import fuse
from rep_backbones.registry import register_layer
from rep_backbones.rep_optimizers import RepAdamW, RepSGD
from rep_backbones.rules import equivalent_conv
from rep_backbones.verify import verify
from rep_backbones.yolo.expanding import expand
from rep_backbones.yolo.install import install
from rep_backbones.yolo.pretrained import load_weights
from rep_backbones.yolo.training_form import to_gradient, to_online

__version__ = "0.1.0"
__all__ = [
    "RepAdamW",
    "RepSGD",
    "blocks",
    "create_backbone",
    "equivalent_conv",
    "expand",
    "fuse",
    "list_backbones",
    "load_weights",
    "register_layer",
    "to_gradient",
    "to_online",
    "verify",
]

install()  # last: the adapter needs the verbs above
