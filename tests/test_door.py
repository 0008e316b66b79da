"""What `rep-yolo` lets Ultralytics read, fetch and install: nothing that runs, nothing unnamed, nothing at all."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import ultralytics.utils
from checkpoint_helpers import built, contents, saved, tiny_yaml
from hostile import Call, good, touch
from ultralytics import YOLO
from ultralytics.data import utils as data_utils
from ultralytics.nn import tasks
from ultralytics.utils import checks, downloads
from yolo_helpers import model_yaml, tiny_data, train_args  # noqa: F401

from rep_backbones.yolo import checkpoint, door
from rep_backbones.yolo.cli import main
from rep_backbones.yolo.plain_data import Refused
from rep_backbones.yolo.switches import no_downloads, no_installs
from rep_backbones.yolo.trainer import RepTrainer

# ---- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:  # noqa: F811
    """The folder of a run of two epochs as it was after the first one: weights/last.pt has an optimizer."""
    folder = tmp_path_factory.mktemp("run")
    yolo = YOLO(str(model_yaml(folder)))

    def keep(trainer: Any) -> None:
        if trainer.epoch == 0:
            shutil.copytree(trainer.wdir, folder / "stopped" / "weights")

    yolo.add_callback("on_model_save", keep)
    yolo.train(trainer=RepTrainer, **train_args(tiny_data, folder))
    return folder / "stopped"


def test_a_checkpoint_is_what_torch_load_gives(stopped: Path) -> None:
    path = stopped / "weights" / "last.pt"
    ours, theirs = checkpoint.as_ultralytics(path), torch.load(path, weights_only=False)
    assert list(sorted(ours)) == list(sorted(theirs))
    assert ours["model"] is None and theirs["optimizer"]["state"], "it can be resumed"
    for key in set(ours) - {"ema", "train_args"}:
        _equal(ours[key], theirs[key], key)
    _equal(ours["ema"].state_dict(), theirs["ema"].state_dict(), "ema")
    _equal(ours["train_args"], theirs["train_args"], "train_args")


def _equal(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs.float() if theirs.is_floating_point() else theirs), where
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            _equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (a, b) in enumerate(zip(ours, theirs)):
            _equal(a, b, f"{where}.{index}")
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), where


def test_a_training_is_resumed_as_with_trust(stopped: Path, tmp_path: Path) -> None:
    final = []
    for name, words in (("shut", []), ("open", ["--trust"])):
        copy = tmp_path / name
        shutil.copytree(stopped, copy)
        content = torch.load(copy / "weights" / "last.pt", weights_only=False)
        content["train_args"]["save_dir"] = str(copy)
        torch.save(content, copy / "weights" / "last.pt")
        assert main(["train", "resume=True", f"model={copy / 'weights' / 'last.pt'}", *words]) == 0
        final.append(checkpoint.load(copy / "weights" / "last.pt"))
        assert final[-1].epoch == -1 and (copy / "weights" / "best_deploy.pt").exists()
    state, other = (done.model.state_dict() for done in final)
    assert all(torch.equal(state[key], other[key]) for key in other)


def test_an_evil_best_beside_what_is_resumed_is_not_read(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that came from elsewhere, none of whose later epochs is better: its best.pt is finished at the end."""
    canary, run = tmp_path / "canary", tmp_path / "run"
    shutil.copytree(stopped, run)
    content = torch.load(run / "weights" / "last.pt", weights_only=False)
    content["train_args"]["save_dir"], content["best_fitness"] = str(run), 1e9
    torch.save(content, run / "weights" / "last.pt")
    torch.save({**contents(built(tiny_yaml())), "evil": touch(canary)}, run / "weights" / "best.pt")
    assert main(["train", "resume=True", f"model={run / 'weights' / 'last.pt'}"]) == 2
    assert "best.pt is refused" in capsys.readouterr().err and not canary.exists()


def test_what_the_process_saved_itself_is_read_as_ever(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with door.shut([]):
        torch.save({"evil": touch(canary)}, tmp_path / "own.pt")
        torch.load(tmp_path / "own.pt", weights_only=False)
        assert canary.exists()
        canary.unlink()
        (tmp_path / "own.pt").write_bytes((tmp_path / "own.pt").read_bytes() + b"\0")
        with pytest.raises(Refused):
            torch.load(tmp_path / "own.pt", weights_only=False)
        torch.save({"a": torch.ones(2)}, tmp_path / "weights.pt")
        assert torch.load(tmp_path / "weights.pt", weights_only=True)["a"].sum() == 2
        assert torch.load(tmp_path / "weights.pt")["a"].sum() == 2, "which is what torch does by default"
        with (tmp_path / "own.pt").open("rb") as stream, pytest.raises(Refused, match=r"own\.pt is of a model family"):
            torch.load(stream, weights_only=False)
    assert not canary.exists()


def test_everything_is_put_back() -> None:
    def state() -> list[Any]:
        found = [torch.load, torch.save, tasks.torch_safe_load, tasks.parse_model, downloads.safe_download, downloads.is_url]
        found += [data_utils.check_det_dataset, data_utils.check_cls_dataset, data_utils.load_dataset_cache_file]
        return [*found, ultralytics.engine.trainer.check_det_dataset, subprocess.Popen.__init__, checks.AUTOINSTALL]

    before = state()
    with suppress(KeyError), door.shut([]), no_installs():
        assert all(a is not b for a, b in list(zip(before, state()))[:-1])
        raise KeyError
    assert all(a is b for a, b in zip(before, state()))


# ---- data ----------------------------------------------------------------------------------------------------------------


def data_yaml(path: Path, extra: str = "") -> Path:
    path.write_text(f"path: {path.parent}\ntrain: images\nval: images\nnames: [a]\n{extra}")
    return path


def test_only_yamls_that_ultralytics_ships_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, bool] = {}

    def stock(dataset: Any, autodownload: bool = True, split: str = "") -> None:
        seen[str(dataset)] = autodownload

    monkeypatch.setattr(data_utils, "check_det_dataset", stock)
    monkeypatch.chdir(tmp_path)
    with door.shut(["val", "data=coco8.yaml", f"source={tmp_path / 'mine.yaml'}"]):
        data_utils.check_det_dataset("coco8.yaml")
        data_utils.check_det_dataset(data_yaml(tmp_path / "mine.yaml"))
        data_utils.check_det_dataset("coco128.yaml")  # which nobody named
        assert seen == {"coco8.yaml": True, str(tmp_path / "mine.yaml"): False, "coco128.yaml": False}
        data_yaml(tmp_path / "coco8.yaml")  # of the same name, which Ultralytics takes first
        data_utils.check_det_dataset("coco8.yaml")
        assert seen["coco8.yaml"] is False


def test_missing_data_says_what_to_do(tmp_path: Path) -> None:
    with door.shut([]):
        with pytest.raises(FileNotFoundError, match="images not found"):
            data_utils.check_det_dataset(data_yaml(tmp_path / "plain.yaml"))
        with pytest.raises(Refused, match=r"images not found.*`download:` is not run; get the data yourself.*--trust"):
            data_utils.check_det_dataset(data_yaml(tmp_path / "code.yaml", "download: raise SystemExit\n"))
        with pytest.raises(Refused, match="name it with data="):
            data_utils.check_det_dataset("xView.yaml")
        (tmp_path / "images").mkdir()
        assert data_utils.check_det_dataset(tmp_path / "code.yaml")["nc"] == 1, "the pictures are here"


def test_trust_runs_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = data_yaml(tmp_path / "code.yaml", "download: open('canary', 'w').close()\n")
    command = ["val", f"model={good(tmp_path / 'good.pt')}", f"data={data}", "workers=0", "plots=False"]
    main(command)
    assert not (tmp_path / "canary").exists()
    main([*command, "--trust"])
    assert (tmp_path / "canary").exists()


def test_a_folder_of_classes_that_is_not_named_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(data_utils, "check_cls_dataset", lambda dataset, split="": fetched.append(str(dataset)))
    with door.shut(["val", "data=imagenette"]):
        data_utils.check_cls_dataset("imagenette")
        data_utils.check_cls_dataset(tmp_path)
        with pytest.raises(Refused, match="'imagenet' is not here"):
            data_utils.check_cls_dataset("imagenet")
    assert fetched == ["imagenette", str(tmp_path)]


def test_label_caches(tmp_path: Path) -> None:
    cache = {
        "labels": [{"cls": np.ones((2, 1), np.float32), "shape": (3, 4), "im_file": "a.png"}],
        "hash": "x",
        "n": np.int64(3),
    }
    file = tmp_path / "labels.cache"
    with file.open("wb") as stream:
        np.save(stream, cache)  # type: ignore[arg-type]
    read = door.label_cache(file)
    assert read["n"] == 3 and read["labels"][0]["cls"].sum() == 2 and read["labels"][0]["shape"] == (3, 4)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(FileNotFoundError, match="damaged"):
        door.label_cache(file)
    with file.open("wb") as stream:
        np.save(stream, np.array(Call(os.mkdir, str(tmp_path / "canary")), dtype=object), allow_pickle=True)
    with pytest.raises(FileNotFoundError, match="refers to posix.mkdir"):
        door.label_cache(file)
    assert not (tmp_path / "canary").exists()


# ---- the network, and what is installed ----------------------------------------------------------------------------------


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    found: list[str] = []
    for module in (downloads, data_utils):
        monkeypatch.setattr(module, "safe_download", lambda url, *args, **kwargs: found.append(str(url)))
    # one function in both, as it was
    monkeypatch.setattr(data_utils, "safe_download", downloads.safe_download)
    yield found


def test_only_what_is_named_is_downloaded(fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(downloads, "is_url", lambda url, check=False: asked.append(url) or True if check else True)
    with no_downloads(["train", "model=yolo11n.pt", "pretrained=https://a.b/c/mine.pt?token=1"]) as freely:
        downloads.attempt_download_asset("yolo11n.pt")
        data_utils.safe_download("https://a.b/c/mine.pt?token=1")
        data_utils.safe_download(str(tmp_path))  # which is here
        for url in ("https://a.b/yolo26n.pt", "https://a.b/yolo11n.pt.exe/other.pt"):
            with pytest.raises(ConnectionError, match="does not name it"):
                downloads.safe_download(url)
        assert len(fetched) == 3 and fetched[0].endswith("/yolo11n.pt")
        assert downloads.is_url("https://a.b/Arial.ttf") and not downloads.is_url("https://a.b/Arial.ttf", check=True)
        assert asked == []
        with freely():
            downloads.safe_download("https://a.b/coco8.zip")
            assert downloads.is_url("https://a.b/Arial.ttf", check=True) and asked
    assert len(fetched) == 4


def test_nothing_is_installed_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(subprocess, "check_output", lambda *args, **kwargs: started.append(args))
    monkeypatch.delenv("ULTRALYTICS_SKIP_REQUIREMENTS_CHECKS")
    monkeypatch.setenv("YOLO_AUTOINSTALL", "true")
    for module in (checks, ultralytics.utils):
        monkeypatch.setattr(module, "AUTOINSTALL", True)
    monkeypatch.setattr(checks, "ONLINE", True)
    with no_installs():
        assert checks.check_requirements("not-a-package-of-anyone") is False
        assert os.environ["YOLO_AUTOINSTALL"] == "false" and started == []
    assert os.environ["YOLO_AUTOINSTALL"] == "true" and checks.AUTOINSTALL is True
    checks.check_requirements("not-a-package-of-anyone")
    assert started, "outside it does try"


@pytest.mark.parametrize(
    "command",
    [
        ["python3", "-m", "pip", "install", "x"],
        ["uv", "pip", "install", "x"],
        ["sudo", "apt-get", "install", "-y", "x"],
        "pip install x",
        ["bash", "-c", "pip3 install x"],
    ],
    ids=str,
)
def test_a_package_manager_is_not_started(command: Any) -> None:
    with no_installs(), pytest.raises(Refused, match="nothing is installed for you"):
        subprocess.run(command, check=True, shell=isinstance(command, str))


def test_other_processes_are_started() -> None:
    with no_installs():
        assert subprocess.run(["echo", "pip"], check=True, capture_output=True, text=True).stdout == "pip\n"


def test_fuse_export_neither_fetches_nor_installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rep_backbones.yolo import artifacts, fuse_export

    def nosy(job: Any) -> artifacts.Made:
        for action in (
            lambda: downloads.safe_download("https://localhost:1/best.pt"),
            lambda: subprocess.run(["pip", "install", "x"], check=True),
        ):
            with pytest.raises((ConnectionError, Refused)):
                action()
        return artifacts.Made(job.checkpoint, {"missing": "tried"}, missing="tried")

    monkeypatch.setitem(artifacts.FORMATS, "onnx", nosy)
    outcome = fuse_export.run(saved(tmp_path / "best.pt", built(tiny_yaml())), formats=("onnx",), imgsz=64)
    assert outcome.report.failures == ["tried"]
