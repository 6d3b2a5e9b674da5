"""What finished cells found, side by side: outcomes as arrays of [training seed, scene], the same scenes for all."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from insula.study.cell import stored_result
from insula.study.design import Cell, Study
from insula.study.episodes import ASKED, KNOWN, Asked, numbers
from insula.worlds.tabletop.environment import CONTROL_HZ
from insula.worlds.tabletop.tasks import find_task

FIELDTRIAL = ("condition", "arm", "success", "duration_s", "termination", "session")
"""Columns of episodes.csv, which `fieldtrial` (PyPI) imports: a condition is a scene and what is asked there."""


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The finished cells of a study, with what each found, in the order of the file."""

    study: Study
    found: dict[Cell, dict[str, Any]]

    @property
    def arms(self) -> list[tuple[str, str]]:
        """Recipe and amount of data of each group of cells that differ in the seed alone."""
        return list(dict.fromkeys((cell.recipe, cell.amount) for cell in self.found))

    def of(self, arm: tuple[str, str]) -> list[dict[str, Any]]:
        """By seed."""
        cells = [cell for cell in self.found if (cell.recipe, cell.amount) == arm]
        return [self.found[cell] for cell in sorted(cells, key=lambda cell: cell.seed)]

    def outcomes(
        self,
        arm: tuple[str, str],
        tasks: Sequence[str],
        asked: Asked = "own",
        outcome: str = "success",
        updates: int | None = None,
    ) -> list[np.ndarray]:
        """By task, bool [seeds, scenes], scenes in the order of their seeds; without tasks in which it was not asked.
        After so many `updates`, of the seeds that were looked at then; at the end of each unless told."""
        found = []
        for task in tasks:
            rows = []
            for result in self.of(arm):
                by_step = result["closed_loop"]
                step = str(updates or max(map(int, by_step), default=0))
                if asked in (loop := by_step.get(step, {}).get(task, {})):
                    rows.append(numbers(loop[asked], outcome) == 1)
            if rows:
                found.append(np.stack(rows))

        return found


def read_results(study: Study, cells: Path) -> Results:
    """Whatever is finished."""
    found = {cell: stored_result(cells / cell.name) for cell in study.cells}
    return Results(study, {cell: result for cell, result in found.items() if result is not None})


def episode_rows(results: Results) -> list[dict[str, Any]]:
    """Every episode of the last look, as plain values."""
    rows = []
    for cell, result in results.found.items():
        by_step = result["closed_loop"]
        if not by_step:
            continue
        step = max(by_step, key=int)
        whose = {"recipe": cell.recipe, "episodes": cell.amount, "training_seed": cell.seed, "updates": int(step)}
        for task, loop in by_step[step].items():
            for asked in (name for name in ASKED if name in loop):
                columns = {name: numbers(loop[asked], name) for name in ("scene", *KNOWN)}
                for scene, success, wrong, credit, steps in zip(*columns.values(), strict=True):
                    known = {"scene": int(scene), "success": bool(success), "wrong_object": bool(wrong)}
                    rows.append(
                        whose | {"task": task, "asked": asked} | known | {"credit": float(credit), "steps": int(steps)}
                    )
    return rows


def _ending(row: dict[str, Any]) -> str:
    """As `fieldtrial` calls it."""
    if row["success"]:
        return "success"
    return "timeout" if row["steps"] >= find_task(row["task"]).max_steps else "other"


def write_episodes(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """episodes.parquet, all of it; and episodes.csv, for `fieldtrial`."""
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "episodes.parquet")
    with (folder / "episodes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDTRIAL)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {
                    "condition": f"{row['task']}/{row['asked']}/{row['scene']}",
                    "arm": row["recipe"] if row["episodes"] == "all" else f"{row['recipe']}-{row['episodes']}",
                    "success": row["success"],
                    "duration_s": row["steps"] / CONTROL_HZ,
                    "termination": _ending(row),
                    "session": f"seed {row['training_seed']}",
                }
            )
