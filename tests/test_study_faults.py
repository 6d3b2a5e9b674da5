"""`insula compare` killed, alone or with all its processes, at instants of no special merit: it ends with the same
tables. And one cell, made again from nothing, has the same figures."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mixtures import write_mixture

from insula.study.cell import RESULT_FILE
from insula.study.design import read_study

STUDY = """
data = "data.toml"
preset = "tiny"
steps = 4
batch_size = 4
looks = 2

[[grid]]
recipes = ["insulated", "tokens-only"]
seeds = [0]
"""
KILLS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_mixture(tmp_path_factory.mktemp("killed"))
    (folder / "study.toml").write_text(STUDY)
    return folder


def start(folder: Path, out: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "insula", "compare", str(folder / "study.toml"), "--out", str(folder / out)]
    with (folder / f"{out}.txt").open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)


def gone(group: int) -> bool:
    """Whether no process of it is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def without_seconds(tables: Any) -> Any:
    """What does not depend on how busy the machine is."""
    if isinstance(tables, dict):
        return {key: without_seconds(value) for key, value in tables.items() if key not in ("seconds", "compute")}
    return [without_seconds(value) for value in tables] if isinstance(tables, list) else tables


@pytest.mark.slow
def test_killed_at_three_instants_it_ends_with_the_same_tables(folder: Path) -> None:
    began = time.monotonic()
    assert start(folder, "whole").wait() == 0, (folder / "whole.txt").read_text()
    needed = time.monotonic() - began

    rng = random.Random(0)
    for number in range(KILLS):
        process = start(folder, "killed")
        time.sleep(rng.uniform(0.1, 0.5) * needed)
        alone = number == 1  # its cell ends then by itself
        (os.kill if alone else os.killpg)(process.pid, signal.SIGKILL)
        process.wait()
        while not gone(process.pid):
            time.sleep(0.1)
    assert start(folder, "killed").wait() == 0, (folder / "killed.txt").read_text()

    found = {out: json.loads((folder / out / "tables.json").read_text()) for out in ("whole", "killed")}
    assert without_seconds(found["killed"]) == without_seconds(found["whole"])
    assert found["whole"]["cells"] == [cell.name for cell in read_study(folder / "study.toml").cells]


@pytest.mark.slow
def test_a_cell_made_again_has_the_same_figures(folder: Path) -> None:
    if not (folder / "whole").is_dir():
        assert start(folder, "whole").wait() == 0
    path = folder / "whole" / "cells" / "insulated-all-s0" / RESULT_FILE
    first = json.loads(path.read_text())
    command = [sys.executable, "-m", "insula", "compare", str(folder / "study.toml"), "--out", str(folder / "again")]
    subprocess.run([*command, "--only", "insulated-all-s0", "--here"], check=True, capture_output=True)
    again = json.loads((folder / "again" / "cells" / "insulated-all-s0" / RESULT_FILE).read_text())
    for result in (first, again):
        result["settings"].pop("run")
    assert without_seconds(again) == without_seconds(first)
