"""Recipes: YAML files with settings, overridden by options of the command line.

A recipe is a flat mapping from settings to values. Settings are the fields of dataclasses; unknown ones are errors with
a suggestion, and so are values of the wrong type. Parsing itself is `HfArgumentParser`'s.

`base: stage1.yaml` names a recipe, relative to the file, that this one builds on: it has the base's settings, overridden by
its own (`null`: by the setting's default).
"""

import argparse
import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


class UsageError(ValueError):
    """A command that makes no sense; the message says which option, why, and what is possible."""


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file and of those that it builds on.

    Raises:
        UsageError: if a file is missing, is not a YAML mapping, or builds on itself; the message names the files that led
            there.
    """
    return {name: value for _, values in _recipe_files(path) for name, value in values.items()}


def _recipe_files(path: str | Path, above: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(name, own settings) of every file of a recipe, from the lowest base up to `path`; `above`: those built on it."""
    chain = (*above, os.path.normpath(path))
    name = ", base ".join(chain)
    if chain[-1] in above:
        raise UsageError(f"--config {name}: it builds on itself. Remove one of these `base`.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {name}: {error.strerror}. Give an existing YAML file.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {name} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict | None):
        raise UsageError(f"--config {name} holds a {type(values).__name__}; it must map settings to values.")
    values = values or {}
    base = values.pop("base", None)
    if not isinstance(base, str | None):
        raise UsageError(f"--config {name}: `base` is {base!r}; it must be the path of one recipe.")
    return [*(_recipe_files(Path(path).parent / base, chain) if base else []), (name, values)]


def parse_settings(
    dataclasses: Sequence[type], arguments: Sequence[str], program: str, description: str
) -> tuple[Any, ...]:
    """Instances of `dataclasses`, from `--config recipe.yaml` and command-line overrides.

    Raises:
        UsageError: for an unknown setting or a value that does not fit.
    """
    parser = _Parser(
        list(dataclasses),
        prog=program,
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # `--layer` would silently be `--layers`
    )
    parser.add_argument("--config", metavar="RECIPE.yaml", help="Settings from a file; options given here override it.")
    config, rest = _split_config(list(arguments))
    files = _recipe_files(config) if config else []
    recipe = {name: value for _, values in files for name, value in values.items()}
    known = [field.name for cls in dataclasses for field in fields(cls) if field.init]
    for file, values in files:
        for name in values:
            if name not in known:
                raise UsageError(_suggest(f"--config {file}: there is no setting `{name}`.", known, name))
    options = [option for action in parser._actions for option in action.option_strings]
    for name in (argument.partition("=")[0] for argument in rest):
        if name.startswith("--") and name not in options:
            raise UsageError(_suggest(f"there is no option {name}.", options, name))
    try:
        return parser.parse_args_into_dataclasses([*_as_options(recipe), *rest], look_for_args_file=False)[
            : len(dataclasses)
        ]
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _split_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    if sum(argument.partition("=")[0] == "--config" for argument in arguments) > 1:
        raise UsageError("--config is there twice. Give one recipe; its `base` may name another.")
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.partition("=")[2], arguments[:i] + arguments[i + 1 :]
        if argument == "--config":
            if i + 1 == len(arguments):
                raise UsageError("--config needs the path of a YAML file.")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


def _as_options(recipe: dict[str, Any]) -> list[str]:
    """A recipe as options that precede the user's own, so that the user's win."""
    options = []
    for name, value in recipe.items():
        if value is None:
            continue
        if isinstance(value, list):
            options += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
        elif isinstance(value, dict):
            options.append(f"--{name}={json.dumps(value)}")
        else:
            options.append(f"--{name}={value}")
    return options


def _suggest(message: str, known: list[str], word: str) -> str:
    """The message, and what was probably meant by `word`."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"{message} Did you mean `{near[0]}`?" if near else message
