"""What became of each tensor."""

from __future__ import annotations

from dataclasses import dataclass

SHOWN = 6


@dataclass(frozen=True)
class Report:
    """What `load_weights` did; `print` it.

    Attributes:
        source: the file, or "the state dict".
        format: whose names it has.
        loaded: its keys that are in the model now.
        unused: its keys that are not.
        missing: keys of the model that stay as they were.
        folded: layers whose branches were merged, as the model has one convolution there.
        unfolded: layers that got one convolution as their main branch, the others silent.
        notes: what was wrong, where `strict=False` let it pass.
    """

    source: str
    format: str
    loaded: tuple[str, ...]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    folded: tuple[str, ...] = ()
    unfolded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = len(self.loaded) + len(self.unused)
        lines = [f"{self.source}, {self.format} names: {len(self.loaded)} of {count} tensors loaded"]
        if self.folded:
            lines.append(f"  branches merged in {len(self.folded)} layers: {listed(self.folded)}")
        if self.unfolded:
            lines.append(f"  merged convolution as the main branch of {len(self.unfolded)} layers: {listed(self.unfolded)}")
        if self.unused:
            lines.append(f"  not used, {len(self.unused)} tensors: {listed(self.unused)}")
        if self.missing:
            lines.append(f"  not in the file, {len(self.missing)} tensors of the model stay: {listed(self.missing)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def listed(names: tuple[str, ...] | list[str], shown: int = SHOWN) -> str:
    """The first few of the names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
