"""The blocks under their YAML names, one paper per file."""

from rep_backbones.blocks.efficientrep import BepC3, BottleRep, SimCSPSPPF, SimSPPF
from rep_backbones.blocks.plain import ConvBNAct
from rep_backbones.blocks.repvgg import RepConv, RepConvN, RepVGGBlock

__all__ = ["BepC3", "BottleRep", "ConvBNAct", "RepConv", "RepConvN", "RepVGGBlock", "SimCSPSPPF", "SimSPPF"]
