"""What is to be run: rows of pretraining, fine-tuned on fractions of the data, from several seeds.

A *cell* is one run of one recipe: a pretraining (row, seed) or a fine-tuning with its test (row, percent, seed). Its
settings are those of a recipe file, then what the scale changes for all rows, then what the row changes. Everything here
is data: a further row or study is an entry of a list.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ..recipes import UsageError, read_recipe


Settings = Mapping[str, Any]
# Settings that change where a run writes and how it is watched, not what comes out of it.
NOT_HASHED = ("output_dir", "feature_cache", "text_state_cache", "logging_steps", "use_cpu", "disable_tqdm")
# Stage -> a number to raise when its cells come out otherwise for the same settings and data: those of before run again.
RESULTS = {"probing": 2}  # intervals over speakers too
MANIFESTS = ("train_data", "eval_data", "data")
MODEL = "model"  # folder, below a pretrained cell's, of its checkpoint


@dataclass(frozen=True)
class Row:
    """A row of the table: how the projector is pretrained.

    Attributes:
        name: as in the paper where it has one.
        recipe: file of the scale's recipes, without `.yaml`; None: no pretraining.
        settings: instead of the recipe's.
        start: another row, whose checkpoint of the same seed this one goes on from; its cost is part of this row's.
        seeds: how many, instead of the scale's, unless the command asks for a number.
        fractions: on which it is fine-tuned, instead of the scale's; none: it is pretrained only.
        fine_tuning: settings of its fine-tuning, over the scale's.
        pretrained_as: another row, whose pretraining this one has.
        oracle: in fine-tuning and test, the LLM reads the transcript in the place of the audio.
        probed: whether its states are probed for traits, with the first seed (`probing.py`).
    """

    name: str
    recipe: str | None = None
    settings: Settings = field(default_factory=dict)
    start: str | None = None
    seeds: int | None = None
    fractions: tuple[int, ...] | None = None
    fine_tuning: Settings = field(default_factory=dict)
    pretrained_as: str | None = None
    oracle: bool = False
    probed: bool = False


@dataclass(frozen=True)
class Scale:
    """A size at which the rows are run.

    Attributes:
        recipes: folder of recipes.
        pretraining, fine_tuning: settings of all rows, over the recipes'.
        rows: in the order in which they are run.
        fractions: per cent of the fine-tuning data; 0: tested straight after pretraining.
        seeds: of rows that name no number.
        fraction_settings: percent -> settings that take that part of the data.
        probing: see `probing.py`.
        prepared: whether the command makes its data (`data.py`); otherwise the recipes' manifests must be there.
        tasks: if so, task -> rows of fine-tuning in the manifest of each fraction, and rows of the test.
        notes, fine_tuning_notes: what a reader of the results must know of the settings, the latter of those of
            fine-tuning; they go into the report.
    """

    name: str
    recipes: str
    rows: tuple[Row, ...]
    fractions: tuple[int, ...]
    pretraining: Settings = field(default_factory=dict)
    fine_tuning: Settings = field(default_factory=dict)
    fraction_settings: Mapping[int, Settings] = field(default_factory=dict)
    probing: Settings = field(default_factory=dict)
    prepared: bool = False
    tasks: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    seeds: int = 3
    notes: tuple[str, ...] = ()
    fine_tuning_notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Cell:
    """One run. `settings` are complete but for the checkpoint to start from, which is `start`'s."""

    stage: Literal["pretraining", "fine-tuning", "probing"]
    row: str
    seed: int
    settings: dict[str, Any]
    percent: int | None = None
    start: "Cell | None" = None
    oracle: bool = False

    @property
    def name(self) -> str:
        """Folder of the cell below the run's."""
        part = "" if self.percent is None else f"-{self.percent}-percent"
        return f"cells/{self.stage}/{self.row}{part}-seed-{self.seed}"

    @cached_property
    def hash(self) -> str:
        """Of all that its result depends on: settings, contents of its manifests, and the cell it starts from."""
        settings = {name: value for name, value in self.settings.items() if name not in NOT_HASHED}
        settings |= {name: digest(settings[name]) for name in MANIFESTS if settings.get(name)}
        parts = [self.stage, settings, self.start and self.start.hash, *(["oracle"] if self.oracle else [])]
        parts += [RESULTS[self.stage]] if self.stage in RESULTS else []
        text = json.dumps(parts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_digests: dict[tuple[str, int, int], str] = {}


def digest(manifest: str | dict[str, Any] | list) -> str | list[str]:
    """Hash of a manifest's content; its name where there is no such file (a data set of the Hub). Of several, each."""
    if isinstance(manifest, list):
        return [digest(one) for one in manifest]
    if isinstance(manifest, dict):
        return json.dumps(manifest, sort_keys=True)
    path = Path(manifest)
    if not path.is_file():
        return manifest
    stat = path.stat()
    key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
    if key not in _digests:
        _digests[key] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return _digests[key]


def plan(
    scale: Scale,
    recipes: Path,
    rows: Iterable[str] | None = None,
    seeds: int | None = None,
    fractions: Iterable[int] | None = None,
) -> list[Cell]:
    """The cells to run, each after the one that it starts from.

    The first seed of all rows comes first: pretraining, then fine-tuning from the largest fraction down; then seed by seed
    the same, so that an early look shows every row and a later one how sure it is.

    Args:
        recipes: folder that holds the scales' folders of recipes.
        rows: names; default: all of the scale.
        seeds, fractions: instead of the scale's.

    Raises:
        UsageError: for a row that the scale does not have, or a recipe that cannot be read.
    """
    known = {row.name: row for row in scale.rows}
    chosen = list(known) if rows is None else list(rows)
    for name in chosen:
        if name not in known:
            raise UsageError(f"--rows: scale {scale.name} has no row {name!r}. Choose from {', '.join(known)}.")
    count = scale.seeds if seeds is None else seeds
    percents = {row.name: _percents(row, scale, fractions) for row in scale.rows}
    cells: dict[str, Cell] = {}

    def pretraining(row: Row, seed: int) -> Cell:
        if row.pretrained_as:
            return pretraining(known[row.pretrained_as], seed)
        start = pretraining(known[row.start], seed) if row.start else None
        cell = Cell("pretraining", row.name, seed, _pretraining_settings(scale, recipes, row, seed), start=start)
        return cells.setdefault(cell.name, cell)

    fine_tuning = {**read_recipe(recipes / scale.recipes / "finetune.yaml"), **scale.fine_tuning}
    for seed in range(count):
        present = [known[name] for name in chosen if seed < (seeds or known[name].seeds or count)]
        for row in present:
            pretraining(row, seed)
        for percent in sorted(set().union(*percents.values()), reverse=True):
            for row in present:
                if percent in percents[row.name]:
                    settings = {**fine_tuning, **_fraction(scale, percent), **row.fine_tuning, "seed": seed}
                    settings.pop("model", None)
                    cell = Cell("fine-tuning", row.name, seed, settings, percent, pretraining(row, seed), row.oracle)
                    cells[cell.name] = cell
        for row in present:
            if row.probed and seed == 0:
                cell = Cell("probing", row.name, seed, {**scale.probing, "seed": seed}, start=pretraining(row, seed))
                cells[cell.name] = cell
    return list(cells.values())


def at_fractions(scale: Scale, fractions: Iterable[int]) -> Scale:
    """The scale with these fractions in the place of its own and its rows'."""
    asked = tuple(fractions)
    rows = [replace(row, fractions=tuple(sorted(_percents(row, scale, asked), reverse=True))) for row in scale.rows]
    return replace(scale, fractions=asked, rows=tuple(rows))


def _percents(row: Row, scale: Scale, asked: Iterable[int] | None) -> set[int]:
    """On which a row is fine-tuned: what the command asks for, else the row's own, else the scale's. The oracle, which not
    every scale can train, never has others than its own."""
    if row.fractions == ():
        return set()
    if asked is not None:
        return set(asked) & set(row.fractions) if row.oracle and row.fractions else set(asked)
    return set(scale.fractions if row.fractions is None else row.fractions)


def _pretraining_settings(scale: Scale, recipes: Path, row: Row, seed: int) -> dict[str, Any]:
    recipe = read_recipe(recipes / scale.recipes / f"{row.recipe or 'base/stage1'}.yaml")
    settings = {**recipe, **scale.pretraining, **row.settings, "seed": seed}
    if row.recipe is None:
        settings["max_steps"] = 0
    if row.start:  # the start has its models
        for name in ("speech_model", "text_model", "speech_revision", "text_revision", "speech_layer", "projector"):
            settings.pop(name, None)
    return settings


def _fraction(scale: Scale, percent: int) -> Settings:
    if percent == 0:
        return {"max_steps": 0}
    if percent in scale.fraction_settings:
        return scale.fraction_settings[percent]
    return {"train_fraction": percent / 100}


def with_starts(cell: Cell) -> Iterator[Cell]:
    """The cell, the one it starts from, that one's, ..."""
    while cell is not None:
        yield cell
        cell = cell.start
