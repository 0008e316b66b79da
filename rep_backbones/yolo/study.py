"""Whether branches help, and what they cost: one detector with each kind of them, on real and on drawn pictures.

python tools/study.py --data blood-cells=bccd/data.yaml      # into ./study; the same command goes on where it was stopped

Each run trains, fuses, exports, proves and evaluates one detector in a process of its own, and leaves a `result.json`. The
tables are written to `study.md` and `study.svg`, and with `--page docs/study.md` between the marks of that page.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rep_backbones.export.files import TargetError, writable_folder
from rep_backbones.export.report import write_json
from rep_backbones.yolo import pages
from rep_backbones.yolo.command import FAILED, ended, of_checkout
from rep_backbones.yolo.dataset import open_data
from rep_backbones.yolo.devices import at_hand, machine
from rep_backbones.yolo.devices import found as device_found
from rep_backbones.yolo.shapes import make_shapes
from rep_backbones.yolo.studies import one, page
from rep_backbones.yolo.studies import plan as plans
from rep_backbones.yolo.studies.costs import latencies, times
from rep_backbones.yolo.studies.plan import PROFILES, VARIANTS, Profile, Run

TOOL = "tools/study.py"  # as in the mark of the page
DRAWN = "drawn-shapes"
CLASSES = 3  # of the detectors whose steps are timed
LATENCIES = 50  # pictures through each deployed form that are timed


@dataclass(frozen=True)
class Study:
    """A profile, the folder it goes to, and the data YAMLs by name."""

    profile: Profile
    out: Path
    data: Mapping[str, Path]
    seeds: int

    @property
    def jobs(self) -> int:
        return self.profile.jobs or os.cpu_count() or 1

    @property
    def threads(self) -> int:
        """Of each run."""
        return max((os.cpu_count() or 1) // self.jobs, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is left of the study; returns the exit status: 0, 2 bad input, 3 a run failed, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="study.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", action="append", default=[], metavar="NAME=YAML", help="a YOLO data YAML; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder for everything (default: ./study)")
    parser.add_argument("--profile", choices=PROFILES, default="cpu", help="cpu: hours on two cores; full: for a GPU")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (default: 3)")
    parser.add_argument("--page", type=Path, help="a page with the marks of this tool, for the tables")
    parser.add_argument("--tables", action="store_true", help="train nothing: write the tables of what is there")
    options = parser.parse_args(argv)
    command = shlex.join(["python", TOOL, *(sys.argv[1:] if argv is None else argv)])
    again = "interrupted; what is done is kept, and the same command goes on"
    return ended("study", lambda: _run(options, command), interrupted=again)


def _run(options: argparse.Namespace, command: str) -> int:
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds} is not accepted; give a whole number from 1")
    if options.page:
        pages.check(options.page, TOOL)
        writable_folder(page.pictures(options.page))
    profile, out = PROFILES[options.profile], writable_folder(options.out)
    if lacking := device_found(profile.device)[1]:
        raise ValueError(f"{lacking}; the profile for the CPU is --profile cpu")
    data = {**_named(options.data), DRAWN: out / DRAWN / "data.yaml"}
    study = Study(profile, out, data, options.seeds)
    train, val = profile.drawn
    make_shapes(out / DRAWN, train=train, val=val, size=profile.size)
    classes = {name: len(open_data(file).names) for name, file in data.items()}  # refused before hours of training
    costs = measured(study)
    epochs = plans.budgets(profile, times(costs))
    wanted = list(plans.runs(profile, classes, options.seeds, epochs))
    failed = {} if options.tables else trained(study, wanted)
    found = {run: result for run in wanted if (result := one.result(out / run.place, run.spec()))}
    deployed = latencies(page.first_files(found, wanted, out), profile.size, LATENCIES)
    place = machine(at_hand(profile.device))
    told = page.Told(profile, wanted, found, costs, epochs, deployed, place, study.jobs, study.threads, command)
    page.write(told, out, options.page)
    print(page.text(told, "study.svg"))
    for run, why in failed.items():
        print(f"study: {run.place} failed ({why}); see {out / run.place / 'log.txt'}", file=sys.stderr)
    return FAILED if failed else 0


def _named(given: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for word in given:
        name, _, file = word.partition("=")
        if not file or not name.replace("-", "").replace("_", "").isalnum() or name in (*found, DRAWN):
            raise ValueError(f"--data {word} is not accepted; give NAME=YAML, each name once, such as cells=bccd/data.yaml")
        open_data(Path(file))  # raises where it is none
        found[name] = Path(file)
    return found


def measured(study: Study) -> dict[str, Any]:
    """The costs of a training step, measured once: while nothing is trained, and with as many threads as a run has."""
    file = study.out / "costs.json"
    profile = study.profile
    models = {variant.name: f"detectors/{index}.yaml" for index, variant in enumerate(VARIANTS)}
    asked = {
        "models": models,
        "batch": profile.training["batch"],
        "size": profile.size,
        "device": "cpu" if profile.device == "cpu" else f"cuda:{profile.device}",
        "threads": study.threads,
        "rounds": profile.rounds,
    }
    known = one.read(file)
    if known.get("asked") == asked and "steps" in known:
        return known
    for variant in VARIANTS:
        plans.written(plans.detector(variant, profile, CLASSES), study.out / models[variant.name])
    write_json(file, {"asked": asked})
    _child("costs", study.out, None, set())
    return one.read(file)


def trained(study: Study, wanted: Sequence[Run]) -> dict[Run, str]:
    """Do those of the runs that have no result yet; returns the runs that failed, and why."""
    left = [run for run in wanted if one.result(study.out / run.place, run.spec()) is None]
    running: set[subprocess.Popen[bytes]] = set()

    def do(run: Run) -> None:
        folder = study.out / run.place
        one.prepare(folder, run.spec(), study.data[run.data], study.threads)
        _child("one", folder, folder / "log.txt", running)

    failed: dict[Run, str] = {}
    pool = ThreadPoolExecutor(study.jobs)
    try:
        waiting = {pool.submit(do, run): run for run in left}
        done = len(wanted) - len(left)
        with tqdm(total=len(wanted), initial=done, desc="study", unit="run") as bar:
            for future in as_completed(waiting):
                run, error = waiting[future], future.exception()
                if isinstance(error, TargetError):  # a full disk meets all others too
                    raise error
                if error:
                    failed[run] = str(error)
                bar.set_postfix_str(run.place)
                bar.update()
    finally:  # after Ctrl-C no other begins, and those that are under way are of no use
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
    return failed


def _child(module: str, folder: Path, log: Path | None, running: set[subprocess.Popen[bytes]]) -> None:
    """Run a module of `studies` on a folder, in a process that is in `running` meanwhile; its output goes to a file.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", f"rep_backbones.yolo.studies.{module}", str(folder)]
    with ExitStack() as stack:
        stream = stack.enter_context(log.open("wb")) if log else None
        process = stack.enter_context(subprocess.Popen(command, env=of_checkout(), stdout=stream, stderr=stream))
        running.add(process)
        stack.callback(running.discard, process)
        status = process.wait()
    if status:
        raise RuntimeError(f"exit status {status}")


if __name__ == "__main__":
    sys.exit(main())
