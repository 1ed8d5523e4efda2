"""`speechllm reproduce`: prepare the data, run the cells, report."""

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..evaluation.metrics.comet import find_environment
from ..recipes import UsageError
from .comet import score_translations
from .data import prepare_fine_tuning, prepare_languages, prepare_pretraining, prepare_probing
from .plan import Cell, Scale, at_fractions, plan
from .report import Report
from .run import Runner, read_result
from .scales import SCALES
from .studies import scale_of


def reproduce(
    scale_name: str,
    output: Path,
    *,
    rows: list[str] | None = None,
    seeds: int | None = None,
    fractions: list[int] | None = None,
    stage: str | None = None,
    study: str | None = None,
    publish: Path | None = None,
    report_only: bool = False,
    jobs: int = 1,
    comet: dict[str, Any] | None = None,
    recipes: Path = Path("recipes"),
) -> bool:
    """Run what is missing of a scale's cells, and report; whether nothing failed.

    Args:
        rows, seeds, fractions: instead of the scale's.
        stage: "pretraining" runs that stage alone.
        study: its rows instead of the scale's, see `studies.py`.
        publish: folder to which the report's page and plots are copied, under the scale's (and the study's) name.
        report_only: run nothing; report on what is there.
        jobs: cells to run at a time, each in a process with its share of the processors.
        comet: score translations by COMET too, with these options of `comet_score`.
        recipes: the repository's folder of recipes.

    Raises:
        UsageError: if the recipes are not there, there is no such row or study, or another process runs in `output`.
        CometUnavailable: if COMET is asked for and cannot run; before anything else is run, as far as that can be told.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("`reproduce` starts its runs by itself, each on one GPU. Start it once, without a launcher.")
    if comet is not None:
        find_environment(comet.get("python"))
    scale = SCALES[scale_name]
    if study is not None:
        scale = scale_of(scale, study)
    if not (recipes / scale.recipes).is_dir():
        raise UsageError(
            f"There are no recipes in {recipes / scale.recipes}. Run this in a checkout of the repository, or give "
            "--recipes."
        )
    if fractions is not None:
        scale = at_fractions(scale, fractions)
    cells = plan(scale, recipes, rows, seeds)
    if stage is not None:
        cells = [cell for cell in cells if cell.stage == stage]
    if scale.prepared and not report_only:
        _prepare(scale, cells, study)
    if report_only and not any(read_result(cell, output) for cell in cells):
        raise UsageError(
            f"{output} holds no result of these rows as they are set here, with the data as it is here. Run them first, or "
            "where their data is."
        )
    output.mkdir(parents=True, exist_ok=True)
    options = {"study": [study] * (study is not None), "rows": rows, "seeds": [seeds] * (seeds is not None),
               "fractions": fractions, "stage": [stage] * (stage is not None)}  # fmt: skip
    command = ["speechllm", "reproduce", "--scale", scale_name, "--output", str(output)]
    for option, values in options.items():
        command += [f"--{option}", *map(str, values)] if values else []
    name = "results" if study is None else f"study-{study}"
    report = Report(scale, cells, output, shlex.join(command), name)
    complete = report_only or _run_alone(Runner(cells, output, report.write, jobs=jobs))
    try:
        if comet is not None:
            score_translations(cells, output, **comet)
    finally:  # a failing COMET does not cost the other metrics
        report.write()
    if publish is not None:
        publish_report(report, publish, "-".join(filter(None, [scale.name, study])))
    return complete


def _run_alone(runner: Runner) -> bool:
    """Whether nothing failed. Two processes in one folder would remove each other's unfinished cells."""
    try:
        with FileLock(runner.output / ".running.lock", timeout=0):
            return runner.run()
    except Timeout:
        raise UsageError(
            f"Another process runs cells in {runner.output}. Wait for it, or give another --output."
        ) from None


def _prepare(scale: Scale, cells: list[Cell], study: str | None) -> None:
    """Make what is missing of the cells' data."""
    stages, manifests = {cell.stage for cell in cells}, {cell.settings.get("train_data") for cell in cells}
    fractions = [
        percent for percent, settings in scale.fraction_settings.items() if settings["train_data"] in manifests
    ]
    prepare_pretraining()
    if study == "languages":
        prepare_languages()
    if fractions or "fine-tuning" in stages:
        prepare_fine_tuning(scale.name, scale.tasks, fractions)
    if "probing" in stages:
        prepare_probing()


def publish_report(report: Report, folder: Path, name: str) -> None:
    """Copy the page as `<name>.md` and its plots to `<name>/`, which hold nothing else afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = folder / name
    shutil.rmtree(plots, ignore_errors=True)
    page = (report.output / f"{report.name}.md").read_text(encoding="utf-8")
    (folder / f"{name}.md").write_text(page.replace(f"]({report.plots}/", f"]({name}/"), encoding="utf-8")
    for plot in sorted((report.output / report.plots).glob("*.svg")):
        plots.mkdir(exist_ok=True)
        shutil.copy(plot, plots)
