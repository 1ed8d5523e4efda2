"""Run the cells of a plan that are not there yet, and write the report after each.

- A cell is there if its folder has a `result.json` with its hash. One whose settings, data or start changed is run again.
- A cell that fails leaves `error.txt`; the run goes on without those that start from it, and the next run tries again.
- Progress tells the time left, from the time that cells of the same kind took.
"""

import gc
import json
import os
import platform
import re
import shutil
import statistics
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Collection
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch

from .plan import Cell, with_starts
from .stages import run_cell


RESULT, ERROR = "result.json", "error.txt"


def read_result(cell: Cell, output: Path) -> dict[str, Any] | None:
    """The result of exactly this cell; None if it was not run, or with other settings."""
    found = _stored(cell, output)
    return found if found and found["hash"] == cell.hash else None


def _stored(cell: Cell, output: Path) -> dict[str, Any] | None:
    path = output / cell.name / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class Runner:
    """Runs cells in order.

    Args:
        cells: see `plan`.
        output: folder of the run.
        report: called with the output folder after every cell.
        run: runs one cell.
        jobs: cells at a time. With more than one, each runs in a process of its own with its share of the processors;
            small models use two processors better as two jobs.
    """

    def __init__(
        self,
        cells: list[Cell],
        output: Path,
        report: Callable[[], None] = lambda: None,
        run: Callable[[Cell, Path], dict[str, Any]] = run_cell,
        jobs: int = 1,
    ):
        self.cells, self.output, self.report, self.run_cell, self.jobs = cells, output, report, run, jobs
        self.failed: dict[str, str] = {}
        self.begin = time.monotonic()

    def run(self) -> bool:
        """Whether all cells are there at the end."""
        missing = [cell for cell in self.cells if read_result(cell, self.output) is None]
        self.say(f"{len(self.cells)} cells, {len(self.cells) - len(missing)} of them there already")
        waiting, running = list(missing), {}
        with ExitStack() as stack:
            workers = stack.enter_context(executor(self.jobs))
            while waiting or running:
                while len(running) < self.jobs and (cell := self._next(waiting, running.values())):
                    waiting.remove(cell)
                    position = f"{len(missing) - len(waiting)}/{len(missing)} {cell.name.removeprefix('cells/')}"
                    if lost := next((start for start in with_starts(cell.start) if start.name in self.failed), None):
                        self.failed[cell.name] = f"{lost.name} failed"
                        self.say(f"{position}: skipped, as {lost.name} failed")
                        continue
                    if _stored(cell, self.output):
                        self.say(f"{position}: its settings or data changed; run again")
                    self.say(f"{position} ... {self._time_left([cell, *waiting, *running.values()])}")
                    folder = self.output / cell.name
                    shutil.rmtree(folder, ignore_errors=True)  # of other settings, or of a run that was cut off
                    folder.mkdir(parents=True)
                    task = (_timed, self.run_cell, cell, self.output)
                    try:
                        future = workers.submit(*task)
                    except BrokenProcessPool:  # by a process that was killed; its cells have failed
                        workers = stack.enter_context(executor(self.jobs))
                        future = workers.submit(*task)
                    running[future] = cell
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._finish(running.pop(future), future)
                    if waiting or running:
                        self._report_so_far()
        self.report()
        return not self.failed

    def _report_so_far(self) -> None:
        try:
            self.report()
        except Exception as error:  # of any kind: the cells go on, and the report is written anew after each
            self.say(f"the report could not be written: {type(error).__name__}: {error}")

    @staticmethod
    def _next(waiting: list[Cell], running: Collection[Cell]) -> Cell | None:
        """The first cell that need not wait for another."""
        unfinished = {cell.name for cell in (*waiting, *running)}
        return next(
            (cell for cell in waiting if not any(start.name in unfinished for start in with_starts(cell.start))), None
        )

    def _finish(self, cell: Cell, future: Future) -> None:
        folder = self.output / cell.name
        if (error := future.exception()) is not None:  # of any kind: the other cells go on
            message, details = error.args if isinstance(error, CellFailed) else described(error)
            if isinstance(error, BrokenProcessPool):  # which does not say whose process it was
                message = "a process was killed, perhaps for want of memory; run again, with fewer --jobs"
            self.failed[cell.name] = message
            (folder / ERROR).write_text(details, encoding="utf-8")
            self.say(f"failed: {message} (see {folder / ERROR})")
            return
        result = {
            "stage": cell.stage,
            "row": cell.row,
            "seed": cell.seed,
            "percent": cell.percent,
            "hash": cell.hash,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment() | {"jobs": self.jobs},
            **future.result(),
        }
        partial = folder / f".{RESULT}"
        partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, folder / RESULT)
        shutil.rmtree(folder / "training", ignore_errors=True)

    def _time_left(self, missing: list[Cell]) -> str:
        """From the mean time of finished cells of the same kind; of the other stage's, where there is none."""
        taken = defaultdict(list)
        for cell in self.cells:
            if result := read_result(cell, self.output):
                taken[cell.stage].append(result["cell_seconds"])
        if not taken:
            return ""
        means = {stage: statistics.mean(values) for stage, values in taken.items()}
        fallback = statistics.mean(means.values())
        seconds = sum(means.get(cell.stage, fallback) for cell in missing) / self.jobs
        return f"(about {duration(seconds)} left)"

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.begin), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {text}", flush=True)


def environment() -> dict[str, Any]:
    """Versions, and the kind of machine."""
    names = ("speechllm", "torch", "transformers", "peft")
    found = {name: version(name) for name in names} | {"python": platform.python_version()}
    found |= {
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cpus": os.cpu_count(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor()


class _Here(Executor):
    """Runs what is submitted at once, in this process; an interruption by the user is not a failure of the cell."""

    def submit(self, function, /, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def executor(jobs: int) -> Executor:
    """This process, or `jobs` others that share the processors, and of several GPUs see one each, by turns."""
    gpus = visible_gpus()
    if jobs == 1 and len(gpus) < 2:
        return _Here()
    threads = max(1, torch.get_num_threads() // jobs)
    # Libraries that a worker loads before it can be told (BLAS, under the probes) take a thread per core otherwise.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)))
    if gpus:  # a library that asks for CUDA as it is imported must not begin it before a worker knows its GPU
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = get_context("spawn")
    dealt = context.SimpleQueue()
    for job in range(jobs):
        dealt.put(gpus[job % len(gpus)] if gpus else None)
    return ProcessPoolExecutor(jobs, context, _begin_worker, (threads, dealt))


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [*map(str, range(count))] if named is None else [name.strip() for name in named.split(",")][:count]


def _begin_worker(threads: int, gpus: SimpleQueue) -> None:
    torch.set_num_threads(threads)
    if (gpu := gpus.get()) is not None:  # before CUDA is asked anything
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu

    def end_with_parent() -> None:  # else a killed run's cell would go on, and write where the next run's does
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class CellFailed(Exception):
    """What `described` says of an error, without the error: its frames would keep the cell's model in memory."""


def described(error: BaseException) -> tuple[str, str]:
    """The first line of the message, and all of the traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0], "".join(traceback.format_exception(error))


def _timed(run: Callable[[Cell, Path], dict[str, Any]], cell: Cell, output: Path) -> dict[str, Any]:
    begin, failure = time.monotonic(), None
    try:
        result = run(cell, output)
    except Exception as error:  # of any kind
        failure = CellFailed(*described(error))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if failure:  # not while the error is being handled, which it would refer to
        raise failure
    return {"cell_seconds": round(time.monotonic() - begin, 1), **result}


def duration(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 1 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
