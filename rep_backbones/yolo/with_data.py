"""What `fuse_export` does with a data set: AP for every form of the model, and INT8 whose loss is measured on it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from torch import nn

from rep_backbones.export.onnx_model import OnnxModel
from rep_backbones.yolo import artifacts, backends, devices
from rep_backbones.yolo.coco_ap import Predict, coco_ap, refuse_other_tasks
from rep_backbones.yolo.dataset import DataSet, open_data

if TYPE_CHECKING:
    from rep_backbones.yolo.checkpoint import Checkpoint
    from rep_backbones.yolo.fuse_export import Making, Settings

INT8 = "onnx_int8"


def opened(settings: Settings, loaded: Checkpoint) -> DataSet | None:
    """The data set that the settings ask for, if it can serve.

    Raises:
        ValueError: INT8 without data or beside FP16, a task without boxes, or a data set of other classes.
    """
    if settings.int8 and settings.data is None:
        raise ValueError("--int8 needs --data: pictures to calibrate on, and boxes to measure its loss with")
    if settings.int8 and settings.half:
        raise ValueError("--int8 and --half exclude each other: INT8 is made from FP32; run the command once for each")
    if settings.data is None:
        return None
    refuse_other_tasks(loaded.task, "--data", f"{loaded.path.stem}_deploy.onnx")
    if loaded.yaml.get("channels", 3) != 3:
        raise ValueError(f"--data reads pictures of 3 channels; the model takes {loaded.yaml['channels']}")
    data = open_data(Path(settings.data))
    data.categories(loaded.names)
    return data


def add_int8(making: Making, job: artifacts.Job, data: DataSet, loaded: Checkpoint) -> None:
    """Quantize the ONNX file of this run, and keep it under a name that says whether its loss is within what is allowed."""
    from rep_backbones.yolo import int8  # its quantizer takes a while to load

    source = making.made.get("onnx")
    if source is None or not making.report.artifacts["onnx"].get("proved"):
        making.fail("--int8: there is no proved ONNX file to make it from")
        return
    try:
        found = int8.make(
            source,
            data,
            names=loaded.names,
            size=job.size,
            nc=len(loaded.names),
            rows=artifacts.gives_rows(job, OnnxModel(source)),
            max_drop=job.settings.int8_max_drop,
            tell=making.tell,
        )
    except (MemoryError, RuntimeError) as error:  # ONNX Runtime's allocator raises the latter
        making.fail(
            f"--int8: it could not be made ({type(error).__name__}: {str(error).splitlines()[0]}); give a smaller --imgsz"
        )
        return
    path = making.path("_int8.onnx")
    onnx.save(found.model, str(path))
    if found.drop > job.settings.int8_max_drop:
        making.fail(f"{path.name} loses {found.drop:.2f} AP, over the {job.settings.int8_max_drop} of --int8-max-drop")
    making.report.artifacts[INT8] = {
        "conv_nodes": OnnxModel(path).conv_nodes,
        "precision": "int8",
        "int8": found.about(),
        "ap": asdict(found.ap),
    }
    making.report.artifacts["onnx"]["ap"] = asdict(found.float_ap)
    making.keep(INT8, path, proved=found.drop <= job.settings.int8_max_drop)


def add_ap(making: Making, trained: nn.Module, deployed: nn.Module, data: DataSet, job: artifacts.Job, names: Any) -> None:
    """AP of the multi-branch form, the fused one, and each proved artefact, on the same pictures."""
    forms: dict[str, tuple[dict[str, Any], Predict]] = {
        "multi-branch": (making.report.trained, backends.model_predictor(trained)),
        "pt": (making.report.artifacts["pt"], backends.model_predictor(deployed)),
    }
    device = devices.at_hand(job.settings.device)
    for name, path in making.proved().items():
        if name != "pt" and backends.can_run(path):
            forms[name] = making.report.artifacts[name], backends.predictor(path, device=device)
    for name, (about, predict) in forms.items():
        if "ap" not in about:
            about["ap"] = asdict(coco_ap(predict, data, names=names, size=job.size, title=f"evaluating {name}"))
        making.tell(f"AP of {name}: {about['ap']['ap']:.4f}, AP50 {about['ap']['ap50']:.4f}")
