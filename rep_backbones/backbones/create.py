"""Whole networks by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from rep_backbones.backbones.efficientrep import EfficientRep
from rep_backbones.backbones.mobileone import MobileOne
from rep_backbones.backbones.repvgg import RepVGG
from rep_backbones.backbones.stages import Classifier, Config, Features, check_multiples
from rep_backbones.registry import near

FAMILIES = (RepVGG, EfficientRep, MobileOne)
CONFIGS: dict[str, Config] = {
    f"{family.__name__.lower()}_{variant}": config for family in FAMILIES for variant, config in family.variants.items()
}


def list_backbones(pattern: str = "*") -> list[str]:
    """The names that `create_backbone` takes, of those that match `pattern`, such as "repvgg_b*"."""
    return [name for name in CONFIGS if fnmatch.fnmatchcase(name, pattern)]


def create_backbone(
    name: str,
    num_classes: int = 1000,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    in_chans: int = 3,
    width: float = 1.0,
    depth: float = 1.0,
) -> Classifier | Features:
    """A published network in its training form, with random weights; `fuse` gives its deployed form.

    Args:
        name: one of `list_backbones()`.
        num_classes: of the linear layer behind the mean over the picture; 0 for none, which gives `(n, channels[-1])`.
        features_only: give a list of feature maps instead of classes.
        out_indices: with `features_only`, the stages to take, from 0, the stem, or from the end if negative; by default all
            five, of strides 2, 4, 8, 16 and 32.
        in_chans: channels of the picture.
        width, depth: multiples of the published channels (then rounded to 8) and repeats.

    Returns:
        A module `(n, in_chans, h, w)` -> `(n, num_classes)`, or -> a list of `(n, channels[i], h / strides[i],
        w / strides[i])`; `strides` and `channels` are its attributes: of these maps, and of all stages in a classifier.

    Raises:
        ValueError: for an unknown name, with the near ones, and for any other argument that is not accepted.
    """
    if name not in CONFIGS:
        raise ValueError(f"there is no backbone {name!r}: {near(name, CONFIGS)}Accepted are {', '.join(CONFIGS)}")
    if type(num_classes) is not int or num_classes < 0:
        raise ValueError(f"num_classes={num_classes!r} is not accepted; give a whole number, 0 for no linear layer")
    check_multiples(width=width, depth=depth)
    layout = CONFIGS[name].layout(width, depth)
    if features_only:
        return Features(layout, in_chans, _stages(out_indices, len(layout)))
    if out_indices is not None:
        raise ValueError(f"out_indices={out_indices!r} needs features_only=True; a classifier gives no feature maps")
    return Classifier(layout, in_chans, num_classes)


def _stages(out_indices: Sequence[int] | None, count: int) -> list[int]:
    given = list(range(count)) if out_indices is None else out_indices
    if (
        not isinstance(given, (list, tuple))
        or not given
        or any(type(i) is not int or not -count <= i < count for i in given)
    ):
        raise ValueError(
            f"out_indices={out_indices!r} is not accepted; give a list of stages, 0 to {count - 1}, or -{count} to -1 "
            "from the end"
        )
    return [index % count for index in given]
