"""How other people's code names the layers of the networks that we have too: the visible table of formats.

A rename reads one of their keys as `unit|slot`: the layer that it belongs to, and the name that the tensor has in our own
layer of that kind. Layers of the two models then meet in the order in which they run (`order`), or row by row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Format:
    """The names of one published code.

    Attributes:
        name: what it is called in messages.
        signature: matches a key that only files of this format have.
        renames: pattern of a whole key -> `unit|slot`; the first that matches counts.
        parts: beginnings of units. Each tuple is there as a whole or not at all, the first one always; a model may end
            where one of them ends.
        order: children in the order in which they run, wherever a module has no others than these.
        eps: of all its norms, which no file holds.
        unused: keys without a place in our models, such as another head's.
        by_row: units are rows of the same number in the model.
    """

    name: str
    signature: str
    renames: Renames
    parts: tuple[tuple[str, ...], ...]
    order: tuple[tuple[str, ...], ...]
    eps: float
    unused: str = r"(?!)"
    by_row: bool = False

    def read(self, key: str) -> tuple[str, str] | None:
        """The unit and the slot of a key, or None for one that the format does not know."""
        for pattern, replacement in self.renames:
            if match := re.fullmatch(pattern, key):
                unit, _, slot = match.expand(replacement).partition("|")
                return (unit, slot) if self.part(unit) or self.by_row else None
        return None

    def part(self, unit: str) -> str:
        """The beginning of `parts` that a unit has, "" for none."""
        every = (part for group in self.parts for part in group)
        return next((part for part in every if unit == part or unit.startswith(f"{part}.")), "")


def _branches(layer: str) -> Renames:
    """RepVGG's names of branches, which YOLOv6 and YOLOv7 took over."""
    return (
        (rf"({layer})\.rbr_dense\.((?:conv|bn)\.\w+)", r"\1|kxk.\2"),
        (rf"({layer})\.rbr_1x1\.((?:conv|bn)\.\w+)", r"\1|1x1.\2"),
        (rf"({layer})\.rbr_identity\.(\w+)", r"\1|identity.\2"),
        (rf"({layer})\.rbr_reparam\.(\w+)", r"\1|conv.\2"),
    )


_STAGE = r"stage\d+(?:\.\d+)?"
_TIMM = r"stem|stages\.\d+\.\d+"
_V6 = r"(?:backbone|neck)\.[\w.]+?"
_V7 = r"model\.\d+"
_FIVE = tuple(f"stage{i}" for i in range(5))
_V6_BACKBONE = ("stem", *(f"ERBlock_{i}" for i in range(2, 6)))
_V6_NECK = (
    *("reduce_layer0", "Bifusion0", "Rep_p4", "reduce_layer1", "Bifusion1", "Rep_p3"),
    *("downsample2", "Rep_n3", "downsample1", "Rep_n4"),
)

FORMATS = (
    Format(
        name="YOLOv6's",  # meituan/YOLOv6, releases 0.3 and 0.4
        signature=r"backbone\.(stem|ERBlock_\d)\..+",
        renames=(
            *_branches(_V6),
            (rf"({_V6})\.upsample_transpose\.(\w+)", r"\1|conv.\2"),
            (rf"({_V6}\.alpha)", r"\1|alpha"),
            (rf"({_V6})(?:\.block)?\.((?:conv|bn)\.\w+)", r"\1|\2"),
        ),
        parts=(tuple(f"backbone.{name}" for name in _V6_BACKBONE), tuple(f"neck.{name}" for name in _V6_NECK)),
        order=(
            ("backbone", "neck"),
            _V6_BACKBONE,
            _V6_NECK,
            ("conv1", "conv2", "alpha"),
            ("conv1", "block"),
            ("cv1", "m", "cv2", "cv3"),
            ("upsample", "cv1", "cv2", "downsample", "cv3"),
            ("cv2", "cv1", "cv3", "cv4", "cv5", "cv6", "cv7"),
        ),
        eps=1e-3,
        unused=r"detect\..+",
    ),
    Format(
        name="YOLOv7's",  # WongKinYiu/yolov7
        signature=rf"{_V7}\.(rbr_\w+\..+|i[am]\.\d+\.implicit|anchor_grid|cv7\.conv\.weight)",
        renames=(
            *_branches(_V7),
            (rf"({_V7})\.rbr_dense\.0\.(\w+)", r"\1|kxk.conv.\2"),
            (rf"({_V7})\.rbr_dense\.1\.(\w+)", r"\1|kxk.bn.\2"),
            (rf"({_V7})\.rbr_1x1\.0\.(\w+)", r"\1|1x1.conv.\2"),
            (rf"({_V7})\.rbr_1x1\.1\.(\w+)", r"\1|1x1.bn.\2"),
            (rf"({_V7}(?:\.cv\d)?)\.((?:conv|bn)\.\w+)", r"\1|\2"),
        ),
        parts=(),
        order=(("cv1", "cv3", "cv4", "cv5", "cv6", "cv2", "cv7"),),
        eps=1e-3,
        unused=rf"{_V7}\.(m2?\.\d+\.(weight|bias)|i[am]\.\d+\.implicit|anchors|anchor_grid)",
        by_row=True,
    ),
    Format(
        name="MobileOne's authors'",  # apple/ml-mobileone
        signature=rf"({_STAGE})\.(rbr_conv\.\d+|rbr_scale|rbr_skip|reparam_conv)\..+",
        renames=(
            (rf"({_STAGE})\.rbr_conv\.(\d+)\.((?:conv|bn)\.\w+)", r"\1|kxk_\2.\3"),
            (rf"({_STAGE})\.rbr_scale\.((?:conv|bn)\.\w+)", r"\1|1x1.\2"),
            (rf"({_STAGE})\.rbr_skip\.(\w+)", r"\1|identity.\2"),
            (rf"({_STAGE})\.reparam_conv\.(\w+)", r"\1|conv.\2"),
            (rf"({_STAGE}\.se\.(?:reduce|expand))\.(\w+)", r"\1|conv.\2"),
            (r"(linear)\.(\w+)", r"\1|linear.\2"),
        ),
        parts=(_FIVE, ("linear",)),
        order=((*_FIVE, "linear"), ("reduce", "expand")),
        eps=1e-5,
    ),
    Format(
        name="RepVGG's authors'",  # DingXiaoH/RepVGG
        signature=rf"({_STAGE})\.rbr_(dense|1x1|identity|reparam)\..+",
        renames=(
            *_branches(_STAGE),
            (rf"({_STAGE}\.se\.(?:down|up))\.(\w+)", r"\1|conv.\2"),
            (r"(linear)\.(\w+)", r"\1|linear.\2"),
        ),
        parts=(_FIVE, ("linear",)),
        order=((*_FIVE, "linear"), ("down", "up")),
        eps=1e-5,
    ),
    Format(
        name="timm's RepVGG or MobileOne",  # huggingface/pytorch-image-models, byobnet
        signature=rf"({_TIMM})\.(conv_kxk|conv_1x1|conv_scale|reparam_conv)\..+",
        renames=(
            (rf"({_TIMM})\.conv_kxk\.((?:conv|bn)\.\w+)", r"\1|kxk.\2"),
            (rf"({_TIMM})\.conv_kxk\.(\d+)\.((?:conv|bn)\.\w+)", r"\1|kxk_\2.\3"),
            (rf"({_TIMM})\.(?:conv_1x1|conv_scale)\.((?:conv|bn)\.\w+)", r"\1|1x1.\2"),
            (rf"({_TIMM})\.identity\.(\w+)", r"\1|identity.\2"),
            (rf"({_TIMM})\.reparam_conv\.(\w+)", r"\1|conv.\2"),
            (rf"((?:{_TIMM})\.attn\.fc[12])\.(\w+)", r"\1|conv.\2"),
            (r"(head)\.fc\.(\w+)", r"\1|linear.\2"),
        ),
        parts=(("stem", *(f"stages.{i}" for i in range(4))), ("head",)),
        order=(("stem", "stages", "head"), ("fc1", "fc2")),
        eps=1e-5,
    ),
)


OURS = "our own"  # or those of the model itself, whoever wrote it


def format_of(keys: list[str]) -> Format | None:
    """The format that the names of a file have, or None for names of our own (or of nobody that we know)."""
    return next((known for known in FORMATS if any(re.fullmatch(known.signature, key) for key in keys)), None)
