"""Measured parts of the documentation: the lines between two marks of a page belong to the tool that measures them."""

from __future__ import annotations

from pathlib import Path

from rep_backbones.export.files import replacing, writable_folder

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
END = "<!-- end -->"


def start(tool: str) -> str:
    """The mark in front of what `tool` writes."""
    return f"<!-- measured by {tool} -->"


def check(page: Path, tool: str) -> str:
    """The text of a page that `fill` will accept, so that nothing is measured in vain.

    Raises:
        ValueError: the page lacks the marks, or cannot be read.
        TargetError: it cannot be written.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{page} cannot be read ({error.strerror}); give a page with the marks of {tool}") from error
    if END not in text.partition(start(tool))[2]:
        raise ValueError(f"{page} lacks the marks {start(tool)} and {END}, between which the measured part goes")
    writable_folder(page.parent)
    return text


def fill(page: Path, tool: str, body: str) -> None:
    """Put `body` between the tool's marks in `page`; errors as `check`."""
    before, mark, after = check(page, tool).partition(start(tool))
    with replacing(page) as temporary:
        temporary.write_text(f"{before}{mark}\n\n{body}\n\n{END}{after.partition(END)[2]}", encoding="utf-8")


def part(page: Path, tool: str) -> str:
    """What stands between the tool's marks."""
    return check(page, tool).partition(start(tool))[2].partition(END)[0].strip()
