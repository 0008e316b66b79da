"""The files of one benchmark: a page, the same as data, and its picture, with the machine, the command and the date."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rep_backbones.export import svg
from rep_backbones.export.files import place, workplace, writable_folder
from rep_backbones.export.report import versions, write_json

WARNING = "A first look by `--quick`, at sizes and numbers of runs that say nothing: not to be quoted."


@dataclass(frozen=True)
class Findings:
    """What a benchmark found.

    Attributes:
        title: of the page, in front of the machine's name.
        text: Markdown, the tables.
        rows: the same as plain data, every single run included.
        picture: a chart of `charts`, or "" for none.
        notes: what could not be measured, and why.
    """

    title: str
    text: str
    rows: Sequence[dict[str, Any]]
    picture: str = ""
    notes: Sequence[str] = field(default_factory=list)


def stem(word: str, machine: str) -> str:
    """The name of the files of `tools/benchmark.py <word>` on a machine, without ending."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") + f"-{word}"


def page(found: Findings, machine: str, command: str, *, picture: str = "", quick: bool = False) -> str:
    """The page in Markdown; `picture` is the name of its file."""
    about = ", ".join(f"{name} {version}" for name, version in versions().items())
    parts = [
        f"# {found.title}: {machine}",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')} with {about}; threads: {torch.get_num_threads()}.",
        WARNING if quick else "",
        f"![{found.title}]({picture})" if picture else "",
        found.text.strip(),
        "\n".join(f"- {note}" for note in found.notes),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def write(folder: Path, word: str, found: Findings, machine: str, command: str, *, quick: bool = False) -> list[Path]:
    """Write `<machine>-<word>.md`, `.json` and `.svg`, which replace older ones together; a killed run leaves those.

    Raises:
        TargetError: the folder cannot be written to.
    """
    name = stem(word, machine)
    with workplace(writable_folder(folder)) as made:
        if found.picture:
            (made / f"{name}.svg").write_text(svg.alone(found.picture), encoding="utf-8")
        about = {
            "title": found.title,
            "machine": machine,
            "threads": torch.get_num_threads(),
            "command": command,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "quick": quick,
            "versions": versions(),
        }
        write_json(made / f"{name}.json", {**about, "notes": found.notes, "rows": found.rows})
        text = page(found, machine, command, picture=f"{name}.svg" if found.picture else "", quick=quick)
        (made / f"{name}.md").write_text(text, encoding="utf-8")
        files = sorted(made.iterdir())
        place((file, folder / file.name) for file in files)
    return [folder / file.name for file in files]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
