"""Are the artefacts of a report there, and whole? By their hashes, before they are used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rep_backbones.export.report import SCHEMA, sha256

LARGEST = 64 << 20  # bytes of a report; those of the largest networks have some hundred thousand
AGAIN = "export again, or get the file again from where it was made"


class NoReport(Exception):
    """What was given is not a report that can be checked; the message says why and what to give."""


@dataclass(frozen=True)
class Checked:
    """One artefact of a report; `said` is what was found, with what to do where it is not `good`."""

    name: str
    path: str
    good: bool
    said: str


def check(report: Path) -> list[Checked]:
    """Compare each artefact that the report names with its hash; those that could not be made are left out.

    Args:
        report: a `<stem>_deploy_report.json`, in the folder of its artefacts.

    Raises:
        NoReport: it is missing, damaged, of another kind, or names a path outside its folder.
    """
    named = dict(_files(report, _artifacts(report)))
    return [_checked(name, path, about) for name, (path, about) in named.items()]


def _artifacts(report: Path) -> dict[str, Any]:
    give = "give the _deploy_report.json that tools/fuse_export.py wrote"
    try:
        if not report.is_file():
            raise NoReport(f"{report} {'is not a file' if report.exists() else 'does not exist'}; {give}")
        if report.stat().st_size > LARGEST:
            raise NoReport(f"{report} has {report.stat().st_size} bytes, and no report is that large; {give}")
        content = json.loads(report.read_text(encoding="utf-8"))
    except OSError as error:
        raise NoReport(f"{report} cannot be read: {error.strerror or error}; {give}") from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise NoReport(f"{report} is not JSON: {reason}; {give}") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if found != SCHEMA:
        said = f"its schema is {_short(found)}, and {SCHEMA} is accepted" if found else "it has no schema"
        raise NoReport(f"{report} is not a report of fuse_export: {said}; {give}")
    artifacts = content.get("artifacts")
    if not isinstance(artifacts, dict) or not all(isinstance(about, dict) for about in artifacts.values()):
        raise NoReport(f"{report} does not list its artefacts as a mapping of mappings; {give}")
    return artifacts


def _files(report: Path, artifacts: dict[str, Any]) -> Iterator[tuple[str, tuple[Path, dict[str, Any]]]]:
    """Of each artefact that was made: its path and its entry; all are looked at before any file is."""
    for name, about in artifacts.items():
        if "path" not in about and "missing" in about:
            continue
        path, digest = about.get("path"), about.get("sha256")
        if not isinstance(path, str) or not path.strip() or not path.isprintable():
            raise NoReport(f"{report}: the path of artefact {_short(name)} is {_short(path)}; a file name is accepted")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise NoReport(f"{report}: the sha256 of {path} is {_short(digest)}; 64 hexadecimal digits are accepted")
        if not name.isprintable() or about.get("proved", False) not in (True, False, None):
            raise NoReport(f"{report}: the entry of {path} is not one of fuse_export")
        try:
            place = (report.parent / path).resolve()
        except (OSError, RuntimeError) as error:  # a link to itself
            raise NoReport(f"{report}: {path} cannot be followed: {error}") from error
        if "\\" in path or report.parent.resolve() not in place.parents:
            raise NoReport(f"{report} names {path}, which leads out of its folder {report.parent}; nothing was read there")
        yield name, (report.parent / path, about)


def _checked(name: str, path: Path, about: dict[str, Any]) -> Checked:
    def bad(said: str) -> Checked:
        return Checked(name, about["path"], False, said)

    if not path.exists():
        return bad(f"it is not there; {AGAIN}")
    if not (path.is_file() or path.is_dir()):
        return bad(f"it is no regular file; {AGAIN}")
    try:
        found = sha256(path)
    except OSError as error:
        return bad(f"it cannot be read: {error.strerror or error}; {AGAIN}")
    if found != about["sha256"]:
        size = path.stat().st_size
        lost = (
            f", and {size} bytes in place of {about.get('bytes')}" if path.is_file() and size != about.get("bytes") else ""
        )
        return bad(
            f"it is damaged or of another run: sha256 {found[:12]}... in place of {about['sha256'][:12]}...{lost}; {AGAIN}"
        )
    proved = about.get("proved", False)
    if proved is None:
        return Checked(name, about["path"], True, "whole; it was not run, so nothing is proved about it")
    return Checked(name, about["path"], True, "whole") if proved else bad("whole, but NOT PROVED: do not deploy it")


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
