"""The formats of Ultralytics' exporter: what each needs, what is missing for it on this machine, and what it accepts.

Nothing is installed or downloaded: a format that would do either, with its packages in place or not, is left to the user.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ultralytics.engine.exporter import export_formats

from rep_backbones.export import tensorrt

if TYPE_CHECKING:
    from rep_backbones.yolo.fuse_export import Settings


@dataclass(frozen=True)
class Needs:
    """What a format needs: Python modules, what pip installs them as, and a program; or why it is not made here."""

    modules: tuple[str, ...] = ()
    install: str = ""
    program: str = ""
    refused: str = ""


_CALIBRATES = Needs(refused="Ultralytics quantizes it on pictures, which it downloads where it is given none")
_TENSORFLOW = Needs(refused="Ultralytics downloads calibration data and converters for it")

# the visible table: a format that is not in it is not made, because what it would install is not known
NEEDS: dict[str, Needs] = {
    "onnx": Needs(),
    "torchscript": Needs(),
    "engine": Needs(),  # tensorrt.missing() tells
    "openvino": Needs(("openvino",), "openvino"),
    # the converter's version is the one that Ultralytics asks for, because of crashes with a later one
    "ncnn": Needs(("ncnn", "pnnx"), "ncnn pnnx==20260526"),
    "coreml": Needs(("coremltools",), "coremltools"),
    "coreai": Needs(("coreai_torch",), "coreai-torch"),
    "litert": Needs(("litert_torch", "ai_edge_litert"), "litert-torch ai-edge-litert"),
    "paddle": Needs(("paddle", "x2paddle"), "paddlepaddle x2paddle"),
    "executorch": Needs(("executorch.version",), "executorch"),
    "rknn": Needs(("rknn.api",), "rknn-toolkit2"),
    "ascend": Needs(program="atc"),
    "mnn": Needs(refused="its converter runs pip when it is imported, and reports its use over the network"),
    "edgetpu": Needs(
        refused="Ultralytics downloads or installs its compiler, and quantizes it on pictures that it downloads"
    ),
    "saved_model": _TENSORFLOW,
    "pb": _TENSORFLOW,
    "tflite": _TENSORFLOW,
    "tfjs": _TENSORFLOW,
    "imx": _CALIBRATES,
    "axelera": _CALIBRATES,
    "deepx": _CALIBRATES,
    "qnn": _CALIBRATES,
    "hailo": _CALIBRATES,
    "xilinx": _CALIBRATES,
}
_UNKNOWN = Needs(refused="what it would install or download is not known")

_HALF = {"onnx", "engine", "torchscript", "openvino", "ncnn", "coreml", "coreai", "rknn", "ascend"}


def names() -> list[str]:
    """All that the installed Ultralytics exports to."""
    return [name for name in export_formats()["Argument"] if name != "-"]


def arguments(name: str) -> list[str]:
    """The options of `yolo export` that a format takes; none for one that the installed Ultralytics does not know."""
    known = export_formats()
    return list(dict(zip(known["Argument"], known["Arguments"])).get(name, ()))


def file_name(name: str) -> str:
    """What is written, such as "<stem>_deploy.onnx"; a folder ends with "/"."""
    known = export_formats()
    ending = dict(zip(known["Argument"], known["Suffix"])).get(name, f"_{name}")
    return f"<stem>_deploy{ending}{'' if '.' in ending else '/'}"


def missing(name: str) -> str:
    """Why a format cannot be made on this machine, and what to do; empty if it can."""
    if name == "engine":
        return tensorrt.missing()
    needs = NEEDS.get(name, _UNKNOWN)
    if needs.refused:
        return f"{needs.refused}; {_yourself(name)}"
    lacking = [module.partition(".")[0] for module in needs.modules if not _installed(module)]
    if lacking:
        packages = "package is" if len(lacking) == 1 else "packages are"
        return f"the Python {packages} not installed: {', '.join(lacking)} (pip install {needs.install})"
    if needs.program and shutil.which(needs.program) is None:
        return f"the program {needs.program} is not in PATH; install the tools of its vendor"
    return ""


def check(wanted: Iterable[str], settings: Settings) -> None:
    """That each format takes the options that are set.

    Raises:
        ValueError: one that does not, with those that do.
    """
    for name in wanted:
        for option in ("dynamic", "nms", "half"):
            if getattr(settings, option) and not _takes(name, option):
                others = ", ".join(other for other in NEEDS if other in names() and _takes(other, option))
                raise ValueError(f"--{option} is not made for --format {name}; accepted with it are {others}")


def listing(proved: Collection[str]) -> str:
    """The table of `--list-formats`.

    Args:
        proved: the formats whose files are run and compared where they can be made.
    """
    known = names()
    rows = [("format", "file", "on this machine")]
    for name in [*proved, *(name for name in known if name not in proved)]:
        if name in known:
            rows.append((name, file_name(name), _state(name, proved)))
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{a:{wide[0]}}  {b:{wide[1]}}  {c}" for a, b, c in rows]
    return "\n".join([*lines, "", f"For what is not made: {_yourself('NAME')}"])


def _state(name: str, proved: Collection[str]) -> str:
    needs = NEEDS.get(name, _UNKNOWN)
    if needs.refused:
        return f"not made: {needs.refused}"
    if reason := missing(name):
        return f"missing: {reason}"
    return "proved" if name in proved else "not run: made by Ultralytics, and proved by nothing"


def _yourself(name: str) -> str:
    return f"run yolo export model=<stem>_deploy.pt format={name} yourself if you accept that"


def _takes(name: str, option: str) -> bool:
    return name in _HALF if option == "half" else option in arguments(name)


def _installed(module: str) -> bool:
    try:
        spec: Any = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # what it is a part of
        return False
    except ValueError:  # it is loaded, and does not tell from where
        return True
    return spec is not None and spec.origin is not None  # a folder of that name alone has no origin
