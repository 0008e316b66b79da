"""Telling why branches stay apart: where convolutions meet in a sum that was not merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain

import torch
from torch import fx, nn

from rep_backbones.foreign.cost import is_picture
from rep_backbones.foreign.graph import Part, Steps
from rep_backbones.foreign.rebuild import below

_JOINING = {torch.cat, torch.concat, torch.concatenate}  # stages side by side, which nobody expects to be one convolution


def unmerged_sum(
    steps: Steps, parts: list[Part], refused: Mapping[fx.Node, str], convolves: Callable[[nn.Module], bool]
) -> str:
    """Why branches with convolutions meet and are not merged; "" where there is no such place."""
    merged = {node for part in parts for node in part.inside}
    for node in steps.graph.nodes:
        sources = [n for n in node.all_input_nodes if n in steps.fed]
        if node in merged | steps.bent or node.target in _JOINING or not is_picture(steps.values.get(node)):
            continue
        behind = [[n, *_ancestors(n, steps.fed)] for n in sources]
        shared = set.intersection(*map(set, behind)) if behind else set()
        branches = [[n for n in branch if n not in shared] for branch in behind]
        modules = [[steps.called(n) for n in branch] for branch in branches]
        if sum(any(m is not None and convolves(m) for m in branch) for branch in modules) < 2:
            continue
        if node in refused:
            return refused[node]
        for n in chain(*branches):
            if n in steps.bent:
                module = steps.called(n)
                what = type(module).__name__ if module is not None else str(getattr(n.target, "__name__", n.target))
                return f"{below(n) if module is not None else n.name} ({what}) in front of its sum is not affine"
        return "a value within its branches is used elsewhere too"
    return ""


def _ancestors(node: fx.Node, fed: set[fx.Node]) -> list[fx.Node]:
    found, left = dict[fx.Node, None](), [node]
    while left:
        new = [n for n in left.pop(0).all_input_nodes if n in fed and n not in found]
        found.update(dict.fromkeys(new))
        left += new
    return list(found)
