"""`insula compare STUDY.toml`: every cell of a study, then what they say together.

Cells are processes of their own: one that fails, or is killed, takes no other with it, and the same command goes on
with whatever is left. They end with the process that started them. What a cell says is in its folder's log.txt.
"""

import dataclasses
import datetime
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.table import Table

from insula.checks import check_integer
from insula.errors import InputError, did_you_mean
from insula.files import check_output_folder, read_json, write_json
from insula.recipes import find_recipe
from insula.study.cell import RESULT_FILE, RUN_FOLDER, cell_config, first_stage, run_cell
from insula.study.checks import check_study
from insula.study.design import Cell, Study, read_study
from insula.study.page import write_study
from insula.terminal import as_text

STUDY_FILE, CELLS_FOLDER, LOG_FILE, SECONDS_FILE = "study.json", "cells", "log.txt", "seconds.json"
LAST_LINES = 3
PARENT_SECONDS = 0.5
"""How often a cell looks whether the process that started it is there."""


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Train and measure every recipe, seed and amount of data of a study, and write one report. The same command goes
    on where it was stopped; a finished cell is never repeated. Raises InputError for values that cannot be."""

    study: tyro.conf.Positional[Path]
    """A .toml file (docs/study.md)."""
    out: Path | None = None
    """Folder for all of it; runs/NAME of the file unless given."""
    jobs: int = 1
    """Cells at a time, each in a process of its own."""
    plan: bool = False
    """Say what would be done, and do nothing."""
    only: tuple[str, ...] = ()
    """Cells to do, by name (--plan lists them); all of them unless given."""
    report: bool = False
    """Write the report of what is there, and train nothing."""
    here: bool = False
    """Do them in this process, one after the other, and write no report: what the process of each cell is told."""
    parent: int | None = None
    """With --here: end when the process of this number, which started this one, does."""

    def __post_init__(self) -> None:
        check_integer("jobs", self.jobs, 1)


def run_compare(config: CompareConfig) -> int:
    """Do it. Returns 1 where a cell failed. Raises InputError, as `read_study`, and where the folder holds another
    study."""
    study = read_study(config.study)
    out = config.out or Path("runs") / config.study.stem
    cells = _chosen(study, config.only)
    if config.here:
        _same_study(study, out)  # the file may have changed since the others began
        if config.parent is not None:
            threading.Thread(target=_end_with, args=(config.parent,), daemon=True).start()
        for cell in cells:
            run_cell(study, cell, out / CELLS_FOLDER / cell.name, tell=lambda line: print(line, flush=True))
        return 0

    if not config.report:  # whose data need not be on this machine
        check_study(study)
    if not config.plan:
        check_output_folder(out, "out")
    _same_study(study, out, note=not (config.plan or config.report))
    left = [cell for cell in cells if not _is_finished(out, cell)]
    print(plan_text(study, cells, out), flush=True)
    if config.plan:
        return 0

    failed = [] if config.report else run_cells(config, left, out)
    print(f"report: {write_study(study, out, out / CELLS_FOLDER)}")
    for cell in failed:
        print(f"failed: {cell.name}: {_last_words(out, cell)}", file=sys.stderr)
    return 1 if failed else 0


def plan_text(study: Study, cells: Sequence[Cell], out: Path) -> str:
    """What there is to do, as plain text, and how long it will take, from the cells that are finished."""
    table = Table("cell", "updates", "recipe", "state", box=None, pad_edge=False)
    for cell in cells:
        folder = out / CELLS_FOLDER / cell.name
        state = "finished" if _is_finished(out, cell) else "begun" if folder.is_dir() else ""
        stages = [stage for stage in (first_stage(study, cell, folder), cell_config(study, cell, folder)) if stage]
        updates = " + ".join(str(stage.steps) for stage in stages)
        table.add_row(cell.name, updates, find_recipe(cell.recipe).about, state)

    left = [cell for cell in cells if not _is_finished(out, cell)]
    each = [_seconds(out, cell) for cell in study.cells if _is_finished(out, cell) and _seconds(out, cell) > 0]
    estimate = (
        f"{_duration(len(left) * sum(each) / len(each))}, at {_duration(sum(each) / len(each))} for each of the "
        f"{len(each)} that are finished"
        if each
        else "told once the first is finished"
    )
    return as_text(table, f"{len(left)} of {len(cells)} cells left; time needed one at a time: {estimate}")


def run_cells(config: CompareConfig, cells: Sequence[Cell], out: Path) -> list[Cell]:
    """All of them, `jobs` at a time. Returns those that failed; the others went on."""
    waiting, running, failed = list(cells), dict[Cell, tuple[subprocess.Popen, float]](), list[Cell]()
    try:
        while waiting or running:
            while waiting and len(running) < config.jobs:
                cell = waiting.pop(0)
                running[cell] = _start(config, cell, out), time.perf_counter()
                print(f"{_now()} {cell.name}: begun; {len(waiting)} wait", flush=True)

            time.sleep(0.2)
            for cell, (process, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[cell]
                _note_seconds(out, cell, time.perf_counter() - since)
                if process.returncode == 0 and _is_finished(out, cell):
                    print(f"{_now()} {cell.name}: finished in {_duration(_seconds(out, cell))}", flush=True)
                else:
                    failed.append(cell)
                    print(f"{_now()} {cell.name}: failed, {_last_words(out, cell)}", flush=True)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on with what is left") from None
    finally:  # Ctrl-C reaches them as well, and each writes a checkpoint before it ends
        for process, _ in running.values():
            process.terminate()
        for cell, (process, since) in running.items():
            process.wait()
            _note_seconds(out, cell, time.perf_counter() - since)

    return failed


def _start(config: CompareConfig, cell: Cell, out: Path) -> subprocess.Popen:
    folder = out / CELLS_FOLDER / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [str(config.study), "--out", str(out), "--only", cell.name, "--here", "--parent", str(os.getpid())]
    with (folder / LOG_FILE).open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "insula", "compare", *arguments], stdout=file, stderr=file)


def _end_with(parent: int) -> None:
    """End this process, as SIGTERM does, once its parent is gone: one that was killed by signal 9 could end nobody, and
    the next start would find a cell that is still being trained."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _chosen(study: Study, names: Sequence[str]) -> list[Cell]:
    known = {cell.name: cell for cell in study.cells}
    for name in names:
        if name not in known:
            raise InputError(f"only: no cell {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return [cell for name, cell in known.items() if not names or name in names]


def _same_study(study: Study, out: Path, note: bool = True) -> None:
    """`note`: write down what `out` is a study of. Raises InputError where cells of something else have begun there."""
    path, settings = out / STUDY_FILE, study.to_json(out)
    begun = any((out / CELLS_FOLDER).glob(f"*/{RUN_FOLDER}")) or any((out / CELLS_FOLDER).glob(f"*/{RESULT_FILE}"))
    if path.is_file() and begun:
        stored = read_json(path, "data")
        # More recipes, seeds or amounts of data are more cells; anything else makes other cells of the same name.
        other = [key for key in settings if key != "grid" and _plain(stored.get(key)) != _plain(settings[key])]
        if other:
            key = other[0]
            raise InputError(
                f"{out} holds a study whose {key} is {stored.get(key)!r}, this one's is {settings[key]!r}; choose "
                "another folder with --out"
            )
    if note:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _is_finished(out: Path, cell: Cell) -> bool:
    return (out / CELLS_FOLDER / cell.name / RESULT_FILE).is_file()


def _note_seconds(out: Path, cell: Cell, seconds: float) -> None:
    """Add what a process of this cell took, however it ended."""
    write_json(out / CELLS_FOLDER / cell.name / SECONDS_FILE, {"seconds": seconds + _seconds(out, cell)})


def _seconds(out: Path, cell: Cell) -> float:
    """What all processes of a cell took; 0 where that was not written down."""
    path = out / CELLS_FOLDER / cell.name / SECONDS_FILE
    return float(read_json(path, "seconds")["seconds"]) if path.is_file() else 0.0


def _last_words(out: Path, cell: Cell) -> str:
    """The end of what a cell said."""
    path = out / CELLS_FOLDER / cell.name / LOG_FILE
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-LAST_LINES:]) if lines else f"see {path}"


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _now() -> str:
    return datetime.datetime.now().strftime("%H:%M:%S")
