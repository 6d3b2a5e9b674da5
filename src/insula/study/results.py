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
        self, arm: tuple[str, str], task: str, asked: Asked = "own", outcome: str = "success", look: int = -1
    ) -> np.ndarray:
        """bool [seeds, scenes], scenes in the order of their seeds; [0, 0] where it was not asked."""
        rows = []
        for result in self.of(arm):
            by_step = result["closed_loop"]
            found = by_step[sorted(by_step, key=int)[look]][task] if by_step else {}
            if asked in found:
                rows.append(numbers(found[asked], outcome) == 1)

        return np.stack(rows) if rows else np.zeros((0, 0), bool)

    def all_tasks(
        self, arm: tuple[str, str], asked: Asked = "own", outcome: str = "success", look: int = -1
    ) -> np.ndarray:
        """As `outcomes`, of all tasks, one after the other: each has as many scenes, so each weighs alike."""
        parts = [self.outcomes(arm, task, asked, outcome, look) for task in self.study.tasks]
        parts = [part for part in parts if part.size]
        return np.concatenate(parts, axis=1) if parts else np.zeros((0, 0), bool)


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
                    "termination": "success" if row["success"] else "timeout",
                    "session": f"seed {row['training_seed']}",
                }
            )
