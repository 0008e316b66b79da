"""Training of multi-branch models: Ultralytics' trainers, which also guard, measure and keep what fusing needs.

    YOLO("efficientrep-n.yaml").train(data="coco8.yaml", trainer=RepTrainer)      # `rep-yolo train` takes TRAINERS[task]

What such a run has more than a plain one: `branches.csv` and `branches.png`, `weights/best_fp32.pt` (the weights of best.pt
before they were rounded to FP16) and `weights/best_deploy.pt`. It learns the same weights, bit for bit, unless the model has
branch scales, which do not decay here, or a key of `training_keys` asks for another weight decay. In processes of torchrun
it trains on all their machines (`machines`).
"""

from __future__ import annotations

import filecmp
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
import ultralytics
from torch import nn
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK, YAML
from ultralytics.utils.torch_utils import unwrap_model

from rep_backbones import decay
from rep_backbones.export.files import replacing
from rep_backbones.rules import FoldError, multi_branch
from rep_backbones.yolo import branch_log, machines, training_form, training_keys
from rep_backbones.yolo.fusing import unmerged
from rep_backbones.yolo.guard import refuse_fused, some

__all__ = ["TRAINERS", "RepTrainer"]

if TYPE_CHECKING:
    _Base = BaseTrainer
else:
    _Base = object


class KeepsBranches(_Base):
    """What this package adds to a trainer of Ultralytics; put it in front of the task's trainer in the list of bases."""

    ema: Any  # ModelEMA, but None until training is set up
    optimizer: Any  # likewise

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: Any = None, _callbacks: Any = None) -> None:
        given, keys = training_keys.split(overrides)
        super().__init__(cfg, machines.place(given), _callbacks)
        self._keep(keys)
        if machines.world_size() > 1:
            self.world_size = machines.world_size()
        self._branch_log: branch_log.BranchLog | None = None
        self._branch_images: torch.Tensor | None = None
        self._branch_log_failed = False

    def setup_model(self) -> Any:
        given = self.model
        checkpoint = super().setup_model()
        if isinstance(given, nn.Module):  # made elsewhere, so that no weights were loaded: `guard` has not seen any
            refuse_fused(given, given)
        return checkpoint

    def validate(self) -> Any:
        with self._same_ema():
            result = super().validate()
        if RANK in {-1, 0} and self.ema:
            self._log_branches()
        return result

    def save_model(self) -> Any:
        saved = super().save_model()
        # last.pt is written each time and best.pt from the same bytes, so that they are equal now if best.pt was written too
        if self.last.exists() and self.best.exists() and filecmp.cmp(self.last, self.best, shallow=False):
            self._save_float32()
        return saved

    def final_eval(self) -> None:
        try:
            super().final_eval()
        except FoldError as error:  # diverged: what was measured and drawn before is still worth having
            LOGGER.error(f"{self.best} was not validated, as it cannot be fused: {error}")
        if RANK in {-1, 0}:
            if self._branch_log and self.args.plots:
                self._guarded(self._branch_log.plot)
            self._save_deploy()

    # ---- the form of the branches ------------------------------------------------------------------------------------

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        keys, optimizer = training_keys.of(self.args), self.args.optimizer
        search = None if keys["scales"] is None or self.resume else self._search(keys["scales"])
        model = super().get_model(training_form.config_for(cfg, keys, optimizer), weights, verbose)
        if search is not None:
            training_form.adopt_scales(model, search, weights=not weights)
        return model

    def _search(self, file: Any) -> nn.Module:
        """The model whose learned scales are the constants of this one's branches."""
        from rep_backbones.yolo.checkpoint import load_precise

        if training_form.stock_of(self.args.optimizer) is None:
            raise ValueError(f"scales= is for optimizer=RepSGD or RepAdamW, not for {self.args.optimizer}")
        return load_precise(file).model

    # ---- weight decay, and several machines ----------------------------------------------------------------------------

    def _keep(self, keys: dict[str, Any]) -> None:
        """Our keys become arguments of the run, as if Ultralytics knew them; a resumed run has those of its checkpoint."""
        if self.resume:
            if ignored := [key for key, value in keys.items() if value != training_keys.of(self.args)[key]]:
                LOGGER.warning(
                    f"resuming keeps the checkpoint's {' and '.join(ignored)}, not those given; start a new run to change it"
                )
            return
        vars(self.args).update(training_keys.changed(keys))
        training_keys.check(training_keys.of(self.args))
        file = self.save_dir / "args.yaml"
        if RANK in {-1, 0} and training_keys.changed(keys):
            YAML.save(file, {**YAML.load(file), **training_keys.changed(keys)})

    def get_validator(self) -> Any:
        with training_keys.hidden(self.args):
            return super().get_validator()

    def build_optimizer(self, model: Any, name: str = "auto", *args: Any, **kwargs: Any) -> Any:
        stock = training_form.stock_of(name)
        if stock is None:
            training_form.refuse_without_masks(name, unwrap_model(model))
        optimizer = super().build_optimizer(model, stock or name, *args, **kwargs)
        if stock is not None:
            optimizer = training_form.rep_optimizer(name, optimizer, unwrap_model(model))
        decay.spare(optimizer, unwrap_model(model))
        if training_keys.of(self.args)["decay"] == "equivalent":
            decay.decay_equivalent(optimizer, unwrap_model(model))
        return optimizer

    def _model_train(self) -> None:
        super()._model_train()
        if (wdf := training_keys.of(self.args)["wdf"]) != 1:
            training_keys.anneal(self.optimizer, wdf, self.epoch, self.epochs)

    def _setup_ddp(self, *args: Any) -> None:
        super()._setup_ddp(*args)
        machines.share_folder(self)

    # ---- the FP32 weights ----------------------------------------------------------------------------------------------

    @contextmanager
    def _same_ema(self) -> Iterator[None]:
        """Validation gets a copy of the EMA: Ultralytics up to 8.3 rounds what it validates with AMP to FP16, in place."""
        if not self.ema:
            yield
            return
        ema = self.ema.ema
        self.ema.ema = deepcopy(ema)
        try:
            yield
        finally:
            self.ema.ema = ema

    def _save_float32(self) -> None:
        """Write `best_fp32.pt`: the EMA as it is, of which best.pt holds the roundings."""
        from rep_backbones import __version__

        state = {name.replace("_orig_mod.", ""): value for name, value in unwrap_model(self.ema.ema).state_dict().items()}
        content = {
            "state_dict": {name: _plain(value) for name, value in state.items() if isinstance(value, torch.Tensor)},
            "epoch": self.epoch,
            "fitness": None if self.fitness is None else float(self.fitness),
            "ultralytics": ultralytics.__version__,
            "rep_backbones": __version__,
        }
        with replacing(self.wdir / "best_fp32.pt") as temporary:
            torch.save(content, temporary)

    # ---- the log -------------------------------------------------------------------------------------------------------

    def _log_branches(self) -> None:
        ema = unwrap_model(self.ema.ema)
        if not multi_branch(ema):
            return
        if bad := branch_log.not_finite(ema):
            LOGGER.warning(
                f"epoch {self.epoch + 1}: weights of the EMA are NaN or infinite, so it has no fused form: {some(bad)}. "
                "If training does not recover, lower lr0 or train with amp=False."
            )
            return
        self._guarded(lambda: self._measure(ema))

    def _measure(self, ema: nn.Module) -> None:
        if self._branch_log is None:
            self._branch_log = branch_log.BranchLog(self.save_dir, resume=bool(self.resume))
        if self._branch_images is None:
            self._branch_images = branch_log.fixed_images(self.test_loader.dataset)
        with branch_log.kept_random_state():
            measured = branch_log.measure(ema, self._branch_images)
        self._branch_log.write(self.epoch + 1, measured)
        if self.args.plots:
            self._branch_log.plot()
        _to_tensorboard(branch_log.scalars(measured), self.epoch + 1)

    def _guarded(self, action: Callable[[], object]) -> None:
        """The log is no reason to lose a training: what fails in it is told once."""
        try:
            action()
        except Exception as error:
            if not self._branch_log_failed:
                self._branch_log_failed = True
                LOGGER.warning(
                    f"branches.csv is incomplete: epoch {self.epoch + 1} was not logged ({type(error).__name__}: {error}). "
                    "Training goes on; this is told once."
                )

    # ---- the deploy model ----------------------------------------------------------------------------------------------

    def _save_deploy(self) -> None:
        """Write `best_deploy.pt`, fused from the FP32 weights of the best epoch. A failure is told, and best.pt stays."""
        if not self.best.exists():
            return
        from ultralytics.nn.tasks import load_checkpoint

        from rep_backbones.yolo.checkpoint import load_precise
        from rep_backbones.yolo.deploy import save_deploy

        target = self.wdir / "best_deploy.pt"
        try:
            best = load_precise(self.best, trust=True)  # this very run wrote it
            if not unmerged(best.model):
                LOGGER.info(f"{target.name} is not written: this model has no multi-branch layers to merge.")
                return
            if bad := branch_log.not_finite(best.model):
                raise ValueError(f"the weights are NaN or infinite in {some(bad)}")
            if not best.precise:
                LOGGER.warning(f"{target.name} is fused from the FP16 weights of {self.best.name}. {best.note}")
            save_deploy(best.model, target, checkpoint=load_checkpoint(self.best)[1])
        except Exception as error:
            LOGGER.error(
                f"{target} was not written ({type(error).__name__}: {error}). {self.best} is complete; see why with: "
                f"python tools/fuse_export.py {self.best}"
            )
        else:
            LOGGER.info(f"Fused model saved as {target}")


class RepTrainer(KeepsBranches, DetectionTrainer):
    """Trains detectors; TRAINERS has those of the other tasks."""


class RepSegmentationTrainer(KeepsBranches, SegmentationTrainer):
    """Trains segmentation models."""


class RepPoseTrainer(KeepsBranches, PoseTrainer):
    """Trains pose models."""


class RepOBBTrainer(KeepsBranches, OBBTrainer):
    """Trains detectors of rotated boxes."""


class RepClassificationTrainer(KeepsBranches, ClassificationTrainer):
    """Trains classifiers."""


TRAINERS: dict[str, type[BaseTrainer]] = {
    "detect": RepTrainer,
    "segment": RepSegmentationTrainer,
    "pose": RepPoseTrainer,
    "obb": RepOBBTrainer,
    "classify": RepClassificationTrainer,
}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, float32 where it is floating point."""
    return tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()


def _to_tensorboard(values: dict[str, float], step: int) -> None:
    """Ultralytics' callback has a writer only where the user has TensorBoard on and installed."""
    from ultralytics.utils.callbacks import tensorboard

    writer = getattr(tensorboard, "WRITER", None)
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
