"""The report to look at: one HTML file that loads nothing, runs nothing, and says what the JSON says, with pictures.

Everything in it that comes from a report, a model or a picture is escaped by the template, or by matplotlib in its SVG.
"""

from __future__ import annotations

import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from shlex import quote
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rep_backbones.export import charts
from rep_backbones.export.charts import Bar
from rep_backbones.verify import TOLERANCE

LAYER = TOLERANCE[torch.float32]  # what a layer may be off by
FORMS = {  # what the keys of `artifacts` are called
    "trained": "multi-branch",
    "pt": "fused",
    "onnx": "ONNX",
    "onnx_int8": "ONNX INT8",
    "engine": "TensorRT",
    "openvino": "OpenVINO",
    "ncnn": "NCNN",
    "torchscript": "TorchScript",
}
VERDICTS = {  # exit status -> what is seen at once, its class, and what it means
    0: ("Proved", "good", "The files compute what the trained model computes."),
    3: ("Not proved", "bad", "A proof failed, or a step did. Do not deploy what is named .unproved."),
    4: (
        "Proved, but not complete",
        "warn",
        "All that could be made here is proved; something that was asked for is not here.",
    ),
}
AVERAGES = {"ap": "AP", "ap50": "AP50", "ap75": "AP75", "small": "small", "medium": "medium", "large": "large"}


@dataclass(frozen=True)
class Row:
    """A row of a model's YAML: its place, its layers by type, and its convolutions before and after fusing."""

    place: int
    name: str
    branches: int  # of the multi-branch layer in it that has most; 0: it has none
    before: int
    after: int | None  # None: there is no fused model


@dataclass(frozen=True)
class Box:
    """One detection in a picture: the corners of its box in the picture's pixels, its class and its score."""

    corners: Sequence[tuple[float, float]]
    name: str
    score: float


@dataclass(frozen=True)
class Found:
    """What one form of the model finds in a picture: boxes, or the likeliest classes and their scores."""

    form: str  # a key of FORMS
    boxes: Sequence[Box] = ()
    classes: Sequence[tuple[str, float]] = ()
    more: int = 0  # boxes that are not shown


@dataclass(frozen=True)
class Sample:
    """A picture, as JPEG, with what two forms find in it."""

    name: str
    jpeg: bytes
    size: tuple[int, int]  # (width, height) in pixels
    found: Sequence[Found]


@dataclass
class Sketches:
    """What the report shows and the JSON has not."""

    layers: list[tuple[str, str]] = field(default_factory=list)  # title, and the layer's SVG before and after
    rows: list[Row] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    confidence: float = 0.25  # of the boxes in the samples


def page(report: Mapping[str, Any], sketches: Sketches | None = None) -> str:
    """The HTML of a report.

    Args:
        report: what `Report.as_dict` gives, or the JSON as read back.
        sketches: pictures of layers and of what is detected.
    """
    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "error": _error,
        "size": _size,
        "number": _number,
        "form": form,
        "percent": _percent,
        "words": _words,
    }
    verdict = VERDICTS.get(report["status"], VERDICTS[3])
    return environment.get_template("report.html.jinja").render(
        r=report,
        css=Markup((folder / "report.css").read_text(encoding="utf-8")),  # our own file
        verdict=verdict,
        stem=stem(report),
        tolerance=LAYER,
        forms=FORMS,
        averages=AVERAGES,
        sketches=sketches or Sketches(),
        diagrams=[(title, Markup(svg)) for title, svg in (sketches.layers if sketches else ())],
        samples=[_sample(sample) for sample in (sketches.samples if sketches else ())],
        errors=_errors(report),
        shares=_shares(report),
        measured=_measured(report),
        ap=_ap(report),
        latency=_latency(report),
        int8=_int8(report),
        outputs=_outputs(report),
        commands=commands(report),
    )


def form(key: str) -> str:
    """What a key of `artifacts` is called."""
    return FORMS.get(key, key)


def stem(report: Mapping[str, Any]) -> str:
    """What the names of all files of a run begin with."""
    return f"{PurePath(report['source']['path']).stem}_deploy"


def commands(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What to type to make the files again, to check and to use them: what for, and the command."""
    source, settings = report["source"]["path"], report["settings"]
    parts = ["python tools/fuse_export.py", quote(source)]
    for key, value in settings.items():
        if key == "latency":
            parts += [] if value else ["--no-latency"]
        elif key == "imports":
            parts += [part for name in value for part in ("--import", quote(name))]
        elif value is True:
            parts.append(_option(key))
        elif value not in (None, False, [], "") and key != "pictures":  # which no option gives
            parts += [_option(key), *(quote(str(part)) for part in (value if isinstance(value, (list, tuple)) else [value]))]
    if report["source"]["trusted"]:
        parts.append("--trust")
    found = [
        ("make all files again", " ".join(parts)),
        ("check that they are whole", f"python tools/fuse_export.py --check {quote(stem(report) + '_report.json')}"),
    ]
    for name, about in report["artifacts"].items():
        if about.get("proved") and name != "pt":
            found.append((f"use {form(name)}", f"yolo predict model={quote(about['path'])} source=a.jpg"))
        if "trtexec" in about:
            found.append(("build the engine where TensorRT is", about["trtexec"]))
    return found


def _option(key: str) -> str:
    return "--format" if key == "formats" else f"--{key.replace('_', '-')}"


# ---- charts ---------------------------------------------------------------------------------------------------------------


def _errors(report: Mapping[str, Any]) -> Markup | None:
    layers = [(layer["path"], layer["error"], layer["ok"]) for layer in report["layers"]]
    return Markup(charts.errors(layers, LAYER, "error of each layer, logarithmic")) if layers else None


def _shares(report: Mapping[str, Any]) -> tuple[list[str], Markup] | None:
    """The names of the branches, in the order of their colours, and the chart."""
    found = {layer["path"]: layer["shares"] for layer in report["layers"] if layer.get("shares")}
    kinds = list(dict.fromkeys(kind for branches in found.values() for kind in branches))
    return (kinds, Markup(charts.shares(found, kinds, "share of each branch in its layer's kernel"))) if found else None


def _measured(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Everything that AP or latency may have been measured of, the multi-branch form first."""
    return {"trained": report.get("trained") or {}, **report["artifacts"]}


def _ap(report: Mapping[str, Any]) -> dict[str, Any] | None:
    found = {name: about["ap"] for name, about in _measured(report).items() if about.get("ap")}
    if not found:
        return None
    first = next(iter(found.values()))
    bars = [Bar(form(n), 100 * _nan(v["ap"]), hue=_hue(n)) for n, v in found.items()]
    rows = {n: [(v[key], _difference(v[key], first[key])) for key in AVERAGES] for n, v in found.items()}
    return {"rows": rows, "chart": Markup(charts.bars(bars, "{:.2f}", "AP of each form, in percent"))}


def _latency(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A chart and its rows for each batch size."""
    found = {name: about["latency"] for name, about in _measured(report).items() if about.get("latency")}
    charted = []
    for batch in sorted({batch for about in found.values() for batch in about["batches"]}, key=int):
        rows = {(n, about["device"]): about["batches"][batch] for n, about in found.items() if batch in about["batches"]}
        drawn = [Bar(form(n), v["median_ms"], v["low_ms"], v["high_ms"], _hue(n)) for (n, _), v in rows.items()]
        chart = Markup(charts.bars(drawn, "{:.2f} ms", f"milliseconds of a batch of {batch}"))
        charted.append({"batch": batch, "rows": rows, "chart": chart})
    return charted


def _int8(report: Mapping[str, Any]) -> dict[str, Any] | None:
    found = report["artifacts"].get("onnx_int8", {}).get("int8")
    if not found:
        return None
    worst = sorted(found["sensitivity"], key=lambda layer: _nan(layer["sqnr_db"]))
    kept = set(found["kept_in_float"])
    bars = [Bar(v["layer"], _nan(v["sqnr_db"]), hue=_hue("onnx" if v["layer"] in kept else "onnx_int8")) for v in worst]
    title = "signal to quantization noise of each layer in dB"
    return {**found, "chart": Markup(charts.bars(bars, "{:.1f} dB", title)) if bars else None}


def _outputs(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The form that was compared, and what was found of one of its outputs."""
    found = [("pt", output) for output in report["proofs"].get("fuse", {}).get("outputs", [])]
    return found + [(name, output) for name, about in report["artifacts"].items() for output in about.get("outputs", [])]


def _sample(sample: Sample) -> dict[str, Any]:
    source = f"data:image/jpeg;base64,{b64encode(sample.jpeg).decode('ascii')}"
    return {"name": sample.name, "source": source, "width": sample.size[0], "height": sample.size[1], "found": sample.found}


def _hue(name: str) -> int:
    return list(FORMS).index(name) if name in FORMS else len(FORMS) - 1


# ---- numbers --------------------------------------------------------------------------------------------------------------


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _difference(value: float | None, first: float | None) -> float | None:
    return None if value is None or first is None else value - first


def _error(value: float | None) -> str:
    return "not comparable" if value is None or not math.isfinite(value) else f"{value:.1e}" if value else "0"


def _percent(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None or not math.isfinite(value) else form.format(100 * value)


def _number(value: float) -> str:
    return f"{value:,}"


def _words(name: str) -> Markup:
    """The name of a class, which may be broken into lines where a word of it begins."""
    return Markup("<wbr>").join(re.split("(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", name))


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
