"""Train a detector with many parallel branches per layer, deploy it with one convolution per layer, computing the same."""

from rep_backbones import blocks
from rep_backbones.backbones import create_backbone, list_backbones
from rep_backbones.fuse import fuse
from rep_backbones.registry import register_layer
from rep_backbones.rules import equivalent_conv
from rep_backbones.verify import verify
from rep_backbones.yolo.expanding import expand
from rep_backbones.yolo.install import install
from rep_backbones.yolo.pretrained import load_weights

__version__ = "0.1.0"
__all__ = [
    "blocks",
    "create_backbone",
    "equivalent_conv",
    "expand",
    "fuse",
    "list_backbones",
    "load_weights",
    "register_layer",
    "verify",
]

install()  # last: the adapter needs the verbs above
