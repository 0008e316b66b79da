"""The blocks under their YAML names, one paper per file."""

from rep_backbones.blocks.acnet import ACBlock
from rep_backbones.blocks.csp import CSPStage
from rep_backbones.blocks.dbb import DiverseBranchBlock
from rep_backbones.blocks.efficientrep import BepC3, BottleRep, SimCSPSPPF, SimSPPF
from rep_backbones.blocks.largekernel import ReparamLargeKernelConv, RepVGGDW
from rep_backbones.blocks.mobileone import MobileOneBlock
from rep_backbones.blocks.orepa import OREPABlock
from rep_backbones.blocks.plain import ConvBNAct
from rep_backbones.blocks.qarepvgg import QARepVGGBlock, QARepVGGBlockV2
from rep_backbones.blocks.repvgg import RepConv, RepConvN, RepVGGBlock
from rep_backbones.blocks.residual import ResidualBlock, WeightedResidualBlock
from rep_backbones.blocks.unireplknet import DilatedReparamBlock
from rep_backbones.blocks.yolov7 import SPPCSPC

__all__ = [
    "SPPCSPC",
    "ACBlock",
    "BepC3",
    "BottleRep",
    "CSPStage",
    "ConvBNAct",
    "DilatedReparamBlock",
    "DiverseBranchBlock",
    "MobileOneBlock",
    "OREPABlock",
    "QARepVGGBlock",
    "QARepVGGBlockV2",
    "RepConv",
    "RepConvN",
    "RepVGGBlock",
    "RepVGGDW",
    "ReparamLargeKernelConv",
    "ResidualBlock",
    "SimCSPSPPF",
    "SimSPPF",
    "WeightedResidualBlock",
]
