"""What `insula train` does."""

import argparse
import dataclasses
import logging
from pathlib import Path

import tyro

from insula.errors import InputError
from insula.parallel.processes import ALONE, is_main, join_processes, together
from insula.train.config import TrainConfig as TrainConfig
from insula.train.config import apply_recipe, training_preset
from insula.train.resume import stored_settings
from insula.train.run import train


def train_defaults(preset: str | None, arguments: list[str]) -> TrainConfig:
    """What flags change: the settings of a preset and of a recipe, or, with --resume, those of the run, so that only
    what is given differs. Raises as `training_preset`, `apply_recipe` and `stored_settings`, InputError for another
    preset than the run's."""
    # A first look at four flags, before tyro: what the others start from depends on them.
    parser = argparse.ArgumentParser("insula train", add_help=False, allow_abbrev=False)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--recipe")
    parser.add_argument("--init", type=Path)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    known, _ = parser.parse_known_args(arguments)
    # A run writes a dozen files: never into wherever the shell happens to be.
    chosen = training_preset(preset or "tiny", known.run or tyro.MISSING)
    if known.recipe is not None:
        # Of a second stage, which must name its first: this one is checked as it is made.
        chosen = apply_recipe(dataclasses.replace(chosen, init=known.init), known.recipe)

    # Help is given without a run, too, which may not exist.
    if not known.resume or known.run is None or {"-h", "--help"} & set(arguments):
        return chosen

    stored = stored_settings(known.run)
    if preset is not None and stored.model.name != chosen.model.name:
        raise InputError(f"{known.run}: --preset: stored {stored.model.name!r}, got {preset!r}; drop the flag")
    return stored


def run_train(config: TrainConfig) -> int:
    """Train, and say how to go on where that was interrupted. Returns the exit code. Raises as `train`."""
    join_processes(config.processes)
    if not is_main():  # one process speaks for all
        logging.disable(logging.WARNING)

    config = dataclasses.replace(config, processes=ALONE)
    with together():
        complete = train(config, quiet=not is_main(), base=stored_settings(config.run) if config.resume else None)
    if is_main():
        print(
            f"done {config.run}" if complete else f"interrupted; go on with: insula train --resume --run {config.run}"
        )
    if complete:
        return 0

    return 130  # as of any process that Ctrl-C ends; a script must not take half a run for a whole one
