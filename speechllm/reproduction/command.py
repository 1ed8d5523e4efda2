"""`speechllm reproduce`: prepare the data, run the cells, report."""

from pathlib import Path

from ..recipes import UsageError
from .data import prepare_fine_tuning, prepare_pretraining
from .plan import plan
from .report import Report
from .run import Runner
from .scales import SCALES


def reproduce(
    scale_name: str,
    output: Path,
    *,
    rows: list[str] | None = None,
    seeds: int | None = None,
    fractions: list[int] | None = None,
    stage: str | None = None,
    recipes: Path = Path("recipes"),
) -> bool:
    """Run what is missing of a scale's cells; whether all are there at the end.

    Args:
        rows, seeds, fractions: instead of the scale's.
        stage: "pretraining" runs that stage alone.
        recipes: the repository's folder of recipes.

    Raises:
        UsageError: if the recipes are not there, or there is no such row.
    """
    scale = SCALES[scale_name]
    if not (recipes / scale.recipes).is_dir():
        raise UsageError(
            f"There are no recipes in {recipes / scale.recipes}. Run this in a checkout of the repository, or give "
            "--recipes."
        )
    percents = list(fractions or scale.fractions)
    if scale.name == "tiny":
        prepare_pretraining()
        if stage is None:
            prepare_fine_tuning(percents)
    cells = plan(scale, recipes, rows, seeds, percents)
    if stage is not None:
        cells = [cell for cell in cells if cell.stage == stage]
    output.mkdir(parents=True, exist_ok=True)
    return Runner(cells, output, Report(scale, cells, output).write).run()
