"""Recipes: files that keep the options of a run together with what came of them.

    purpose = "..."
    [options]               # of python -m training.run, by their names
    total_steps = 3200
    [stages.second]         # instead of those above, in NAME:second
    total_steps = 640
    [[runs]]                # one for each run that is known of
    command = "python -m training.run --recipe ..."
    machine = "..."
    hours = 1.6             # or in words, such as "not run"
    result = "..."

A recipe is nothing but options that come before those of the command line: what it may hold is what
the command knows.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clip_rt.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = Path(__file__).parent / "recipes"

Options = Mapping[str, Any]
"""Numbers, texts, truths, and lists of them, by the name of the option."""


@dataclass(frozen=True, kw_only=True)
class KnownRun:
    """A run of a recipe, and what came of it."""

    command: str
    machine: str
    hours: float | str
    """Or in words, such as "not run"."""
    result: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe's file says."""

    purpose: str
    options: Options
    stages: Mapping[str, Options]
    """Options that stand for those of the same names in `options`."""
    runs: tuple[KnownRun, ...]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe's file.

    Raises:
        InputError: it cannot be read, or something is missing from it or too much.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        stages = content.pop("stages", {})
        runs = tuple(KnownRun(**run) for run in content.pop("runs", ()))
        return Recipe(**content, stages=stages, runs=runs)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"the recipe {str(path)!r} cannot be read: {error}.") from error


def read_options(name: str) -> list[str]:
    """Return the options of a recipe as a command line has them.

    Args:
        name: NAME or NAME:STAGE; of a file in training/recipes, or the path of a .toml file.

    Raises:
        InputError: there is no such recipe or stage, or it cannot be read.
    """
    file, _, stage = name.partition(":")
    path = Path(file) if file.endswith(".toml") else RECIPES / f"{file}.toml"
    if path.parent == RECIPES and not path.is_file():
        known = ", ".join(sorted(each.stem for each in RECIPES.glob("*.toml")))
        raise InputError(
            f"there is no recipe {file!r}; there are {known}, or name a file that ends in .toml."
        )
    recipe = read_recipe(path)
    if stage and stage not in recipe.stages:
        raise InputError(
            f"the recipe {file!r} has no stage {stage!r}; it has "
            f"{', '.join(recipe.stages) or 'none'}."
        )
    options = {**recipe.options, **(recipe.stages[stage] if stage else {})}
    return [word for option, value in options.items() for word in _as_words(option, value)]


def _as_words(option: str, value: Any) -> list[str]:
    name = option.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *map(str, values)]
