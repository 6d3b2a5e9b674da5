"""Studies: what is compared, how sure one may be of it, and cells that are trained, measured and never repeated."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from mixtures import settings, write_mixture
from scipy.stats import binomtest
from scipy.stats import t as student

from insula.errors import InputError, InsulaError
from insula.study import cell as cells
from insula.study import compare
from insula.study.cell import RESULT_FILE, cell_config, first_stage, run_cell
from insula.study.compare import CompareConfig, plan_text, run_compare
from insula.study.design import Cell, Grid, Study, read_study
from insula.study.episodes import in_rows, numbers
from insula.study.open_loop import clustered
from insula.study.page import render_study, write_study
from insula.study.results import Results, episode_rows, read_results
from insula.study.statistics import (
    compare_all,
    crossed_interval,
    holm,
    not_told_apart,
    paired_difference,
)
from insula.study.tables import statement, tables
from insula.train import config as train_config

# --- statistics ------------------------------------------------------------------------------------------------------


def trials(rate: float, seeds: int = 3, scenes: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((seeds, scenes)) < rate


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_an_interval_knows_of_seeds_and_of_scenes() -> None:
    same = np.repeat(trials(0.8, 1), 3, axis=0)
    alike, apart = (
        crossed_interval([same]),
        crossed_interval([np.concatenate([trials(1.0, 1), trials(0.8, 1), trials(0.6, 1)])]),
    )
    assert alike.low < alike.mean < alike.high and alike.mean == same.mean()
    assert apart.high - apart.low > 1.5 * (alike.high - alike.low)  # three seeds that differ are little evidence
    certain = crossed_interval([np.ones((3, 20))])
    assert (certain.low, certain.mean, certain.high) == pytest.approx((1, 1, 1))
    assert crossed_interval([same]) == crossed_interval([same])  # the same numbers each time
    for nothing in ([], [np.zeros((0, 3))], [np.zeros(3)], [same, same[:2]]):
        with pytest.raises(InputError, match=r"expected \[training seeds, scenes\]"):
            crossed_interval(nothing)


def test_tasks_weigh_alike_and_none_is_drawn() -> None:
    easy, hard = np.ones((3, 100)), np.zeros((3, 50))
    found = crossed_interval([easy, hard])
    assert (found.low, found.mean, found.high) == pytest.approx((0.5, 0.5, 0.5))
    mixed = crossed_interval([np.concatenate([easy, hard], axis=1)])  # the control: as one task it would vary
    assert mixed.high - mixed.low > 0.1


@pytest.mark.parametrize("seeds, least", [(3, 0.85), (12, 0.88)])
def test_the_interval_covers_as_often_as_it_says(seeds: int, least: float) -> None:
    """Of studies whose truth is known: scenes of differing difficulty, seeds of differing luck."""
    rng, inside, studies = np.random.default_rng(0), 0, 200
    for n in range(studies):
        rate = np.clip(0.7 + 0.1 * rng.normal(size=(seeds, 1)) + 0.15 * rng.normal(size=(1, 80)), 0, 1)
        found = crossed_interval([rng.random((seeds, 80)) < rate], seed=n, draws=300)
        inside += found.low <= 0.7 <= found.high
    assert least <= inside / studies <= 1.0


def test_pairing_scenes_tells_apart_what_is_apart() -> None:
    hard = np.random.default_rng(1).random(100) < 0.5  # scenes that nobody manages
    worse, better = trials(0.6, seed=2) & ~hard, trials(0.98, seed=3) & ~hard
    found, p = paired_difference([worse], [better])
    assert found.low > 0 and p < 0.05 and found.mean == pytest.approx(better.mean() - worse.mean())
    unpaired, _ = paired_difference([worse], [np.random.default_rng(4).permuted(better, axis=1)])
    assert found.high - found.low < unpaired.high - unpaired.low
    back, again = paired_difference([better], [worse])
    assert (back.low, back.high, again) == pytest.approx((-found.high, -found.low, p))
    with pytest.raises(InputError, match="the same ones"):
        paired_difference([np.ones((3, 5))], [np.ones((3, 6))])
    with pytest.raises(InputError, match="got 1 training seed, expected at least 2"):
        paired_difference([np.ones((3, 5))], [np.ones((1, 5))])


def test_a_difference_by_hand() -> None:
    """Two seeds each of two scenes: means 0.5 and 1, then 0 and 0.5, so a difference of −0.5."""
    first, second = np.array([[1, 0], [1, 1]]), np.array([[0, 0], [1, 0]])
    found, p = paired_difference([first], [second])
    # Between seeds 0.125 / 2 each, where that of so many trials is less: 4/6 · 2/6 / 2 / 2. Both scenes −0.5: nothing.
    variance = 2 * 0.125 / 2
    assert found.mean == -0.5 and p == pytest.approx(2 * student.sf(0.5 / np.sqrt(variance), 2))
    assert found.low == -1.0 and found.high == pytest.approx(min(1, -0.5 + student.ppf(0.975, 2) * np.sqrt(variance)))


def test_success_everywhere_is_not_certainty() -> None:
    found, p = paired_difference([np.zeros((3, 100))], [np.ones((3, 100))])
    assert found.mean == 1 and found.low > 0.9 and 0 < p < 1e-4
    _, p = paired_difference([np.ones((3, 100))], [np.ones((3, 100))])
    assert p == 1.0


@pytest.mark.parametrize("luck", [0.0, 0.1])
def test_equal_recipes_are_seldom_told_apart(luck: float) -> None:
    """Eight equal recipes, 28 pairs: one family in twenty may have a false one. Trials pooled over seeds, as McNemar's
    test would have them, are the control."""
    rng, families, pooled, studies = np.random.default_rng(0), 0, 0, 60
    for _ in range(studies):
        scene = rng.normal(0.6, 0.2, size=(1, 100))
        rates = (np.clip(scene + rng.normal(0, luck, size=(3, 1)), 0, 1) for _ in range(8))
        outcomes = {f"recipe {n}": [rng.random((3, 100)) < rate] for n, rate in enumerate(rates)}
        families += any(one.told_apart for one in compare_all(outcomes))
        first, second = outcomes["recipe 0"][0], outcomes["recipe 1"][0]
        pooled += binomtest(int((first & ~second).sum()), max(1, int((first ^ second).sum()))).pvalue < 0.05
    assert families / studies <= 0.12
    assert (pooled / studies > 0.2) == (luck > 0)


def test_many_comparisons_are_corrected_together() -> None:
    made = compare_all({"a": [trials(0.3, seed=0)], "b": [trials(0.9, seed=1)], "c": [trials(0.88, seed=2)]})
    assert [(one.first, one.second) for one in made] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [one.told_apart for one in made] == [True, True, False] and not_told_apart(made) == [("b", "c")]
    assert all(one.p_corrected >= one.p for one in made)
    pairs = [dataclasses.asdict(one) | {"told_apart": one.told_apart} for one in made]
    said = statement({"pairs": pairs, "not_told_apart": not_told_apart(made), "too_few_seeds": ["d"]})
    assert re.match(r"b beats a by \d\d points \(\d\d to \d\d\); c beats a by", said)
    assert said.endswith("not told apart at 5%: b and c. one training seed, which tells nothing of others: d.")


def test_errors_of_actions_are_means_with_intervals_over_episodes() -> None:
    errors = np.ones((12, 2, 3)) * np.array([1.0, 2.0, 3.0])
    errors[6:] *= 2  # three other episodes, twice as far off
    scored = np.ones((12, 2), bool)
    scored[:, 1] = False
    errors[:, 1] = np.nan_to_num(np.inf)  # not recorded: must not count
    episode = np.arange(12) // 2
    found = clustered(errors, scored, episode, axis=1)
    assert found["mean"] == pytest.approx([1.5, 3.0, 4.5])
    # Six episodes of 1 or 2 each: the mean of six draws lies within 7/6 to 11/6 in all but 2 · 0.5⁶ of them.
    assert found["low"][0] == pytest.approx(7 / 6) and found["high"][0] == pytest.approx(11 / 6)
    assert found["low"] == pytest.approx([found["low"][0] * k for k in (1, 2, 3)])

    few = clustered(errors, scored, episode // 2, axis=1)  # three episodes: a mean, and nothing said of how sure
    assert few["mean"] == found["mean"] and few["low"] == few["high"] == [None] * 3
    by_step = clustered(errors, scored, episode, axis=2)
    assert by_step["mean"][0] == pytest.approx(3.0) and by_step["mean"][1] is by_step["low"][1] is None
    json.dumps([found, few, by_step], allow_nan=False)


# --- the file --------------------------------------------------------------------------------------------------------

STUDY = """
data = "data.toml"
preset = "tiny"
tasks = ["sort", "stack"]

[[grid]]
recipes = ["insulated", "joint"]
seeds = [0, 1]

[[grid]]
recipes = ["insulated"]
seeds = [0]
episodes = [50, 200]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "steps, count, at",
    [(5000, 3, [1667, 3334, 5000]), (4, 2, [2, 4]), (5001, 2, [2501, 5001]), (15, 8, [2, 4, 6, 8, 10, 12, 14, 15])],
)
def test_looks_are_even_and_the_last_is_at_the_end(tmp_path: Path, steps: int, count: int, at: list[int]) -> None:
    study = read_study(written(tmp_path, f"steps = {steps}\nlooks = {count}\n" + STUDY))
    config = cell_config(study, study.cells[0], tmp_path)
    assert cells.looks(config) == at
    # None of them is removed, whatever else an interruption saves.
    assert config.checkpoint_every == config.keep_every == config.evaluate_every == at[0]


def test_a_study_is_every_combination_once_seed_by_seed(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, STUDY + '[[grid]]\nrecipes = ["joint"]\nseeds = [0]\n'))
    names = [cell.name for cell in study.cells]
    assert names[:4] == ["insulated-all-s0", "joint-all-s0", "insulated-n50-s0", "insulated-n200-s0"]
    assert names[4:] == ["insulated-all-s1", "joint-all-s1"]
    assert study.data == tmp_path / "data.toml"


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ('"joint"]\nseeds', '"joined"]\nseeds', r"study.toml: grid 1: no recipe 'joined' .did you mean 'joint'"),
        ("tasks =", "task =", r"study.toml: unknown field 'task' .did you mean 'tasks'"),
        ('"sort"', '"sorted"', r"study.toml: .*'sorted'.*did you mean 'sort'"),
        ('preset = "tiny"', 'preset = "tinny"', r"no preset 'tinny' .did you mean 'tiny'"),
        ("episodes = [50, 200]", "episodes = [0]", "episodes has one that is 0"),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds has one that is -1"),
        ("data =", "dat =", "dat"),
        ("[[grid]]", "[grid]", "not readable as TOML|expected tables"),
        ("seeds = [0]", "seeds = 0", r"seeds is 0, expected"),
        ('tasks = ["sort", "stack"]', "scenes = 0", "scenes is 0"),
    ],
)
def test_what_is_wrong_with_a_study_is_named(tmp_path: Path, was: str, now: str, message: str) -> None:
    assert was in STUDY
    with pytest.raises(InputError, match=message):
        read_study(written(tmp_path, STUDY.replace(was, now, 1)))


OTHERWISE = """
[model]
state_dim = 14
cameras = ["high", "left", "right"]
[model.backbone]
mlp_dim = 96
[model.objective]
flow_samples = 2
[reading]
text_tokenizer = "words/tokenizer.json"
[optimizer]
expert_lr = 2e-4
"""


def test_what_differs_from_the_preset_is_said_in_tables(tmp_path: Path) -> None:
    """For every cell, beside what its recipe decides. Control: all else is the preset's."""
    study = read_study(written(tmp_path, STUDY + OTHERWISE))
    joint = next(cell for cell in study.cells if cell.recipe == "joint")
    found, usual = cell_config(study, joint, tmp_path), train_config.training_preset("tiny", tmp_path / "run")
    assert (found.model.state_dim, found.model.backbone.mlp_dim) == (14, 96)
    assert found.model.cameras == ("high", "left", "right")
    assert found.model.objective.flow_samples == 2 and not found.model.objective.knowledge_insulation
    assert found.optimizer == dataclasses.replace(usual.optimizer, expert_lr=2e-4)
    assert found.reading == dataclasses.replace(usual.reading, text_tokenizer=tmp_path / "words" / "tokenizer.json")
    was = {name: getattr(usual.model, name) for name in ("state_dim", "cameras", "backbone", "objective")}
    assert dataclasses.replace(found.model, **was) == usual.model

    kept = study.to_json(tmp_path / "out")
    assert kept["reading"]["text_tokenizer"] == "../words/tokenizer.json"
    assert kept["model"]["backbone"] == {"mlp_dim": 96}
    json.dumps(kept)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[model]\nstate_dims = 14", r"study: model: unknown field 'state_dims' .did you mean 'state_dim'"),
        ("[model.backbone]\ndeep = 3", r"backbone: unknown field 'deep'"),
        ("[optimizer]\nexpert_lr = -1.0", "expert_lr is -1"),
        ("[model.objective]\nknowledge_insulation = false", "knowledge_insulation is what recipes decide"),
        ("[model.lora]\nrank = 4", "lora is what recipes decide"),
        ("[reading]\nfast = 3", "reading: fast"),
    ],
)
def test_tables_that_cannot_be_are_refused(tmp_path: Path, table: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_study(written(tmp_path, f"{STUDY}\n{table}\n"))


def test_a_study_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \[\[grid\]\]"):
        read_study(written(tmp_path, 'data = "data.toml"\n'))
    with pytest.raises(InputError, match="no such file"):
        read_study(tmp_path / "other.toml")


# --- cells -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("study"))


@pytest.fixture
def study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Of recordings: two recipes, no simulator."""
    small = dataclasses.replace(settings(folder, Path()), certify=True, checkpoint_every=1000)
    monkeypatch.setitem(train_config.TRAINING, "small", small)
    return Study(folder / "data.toml", (Grid(("insulated", "tokens-only"), (0,)),), preset="small", steps=4, looks=2)


def test_how_a_cell_is_trained(study: Study, tmp_path: Path) -> None:
    config = cell_config(study, Cell("joint", 3, 2), tmp_path)
    assert (config.recipe, config.seed, config.episodes, config.steps) == ("joint", 3, 2, 4)
    assert config.checkpoint_every == 2 and config.keep > study.looks
    assert first_stage(study, Cell("joint", 3), tmp_path) is None

    second, first = (make(study, Cell("two-stage", 1), tmp_path) for make in (cell_config, first_stage))
    assert (first.recipe, first.steps, second.steps) == ("tokens-only", 2, 2)
    assert second.init == tmp_path / "weights"
    assert first.run != second.run and first.seed == second.seed == 1


def test_a_study_of_recordings_needs_no_simulator(study: Study, tmp_path: Path) -> None:
    for one in study.cells:
        run_cell(study, one, tmp_path / one.name, tell=lambda line: None)
    results = read_results(study, tmp_path)
    shown = tables(results)
    assert len(shown["cells"]) == 2 and shown["missing"] == [] and shown["success"]["own"] == []

    robots = {(row["recipe"], row["robot"]) for row in shown["open_loop"]}
    assert robots == {(r, robot) for r in ("insulated", "tokens-only") for robot in ("arm", "cart")}
    arm = next(row for row in shown["open_loop"] if (row["recipe"], row["robot"]) == ("insulated", "arm"))
    assert len(arm["by_dimension"]["mean"]) == 3 and len(arm["by_step"]["mean"]) == 6
    # Too few recordings are held out for an interval, and the report says of how many the mean is.
    assert arm["recordings"] < 5 and arm["by_step"]["low"] == [None] * len(arm["by_step"]["mean"])
    assert all(error > 0 for error in arm["by_step"]["mean"])
    (answers,) = [row for row in shown["answers"] if row["recipe"] == "insulated"]
    assert answers["source"] == "scenes" and 0 <= answers["before"]["mean"] <= 1

    metrics = {row["metric"] for row in shown["held_out"] if row["recipe"] == "insulated"}
    assert {"held_out/arm/flow", "held_out/arm/token_accuracy"} <= metrics
    assert {row["updates"] for row in shown["gradients"]} == {2, 4}
    assert {row["part"] for row in shown["gradients"]} >= {"vision", "backbone layer 0"}
    page = render_study(results, shown)
    assert "not measured" in page and "tokens-only" in page and "https:" not in page


def test_a_finished_cell_is_never_repeated(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / RESULT_FILE).write_text(json.dumps({"cell": {}, "closed_loop": {}}))
    monkeypatch.setattr(cells, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run_cell(study, study.cells[0], tmp_path) == {"cell": {}, "closed_loop": {}}


# --- a whole study, its cells made by hand ---------------------------------------------------------------------------


def loop(rate: float, seed: int, scenes: int = 20) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    episodes = [
        {
            **{"seed": 1_000_000 + scene, "swapped": swapped, "held_out": held_out, "task": "put it there"},
            **{"success": bool(rng.random() < rate), "wrong_object": False, "credit": 1.0, "steps": 30},
        }
        for scene in range(scenes)
        for swapped, held_out in ((False, False), (True, False), (False, True))
    ]
    return in_rows(episodes)


def test_episodes_are_kept_in_rows() -> None:
    episode = {"seed": 1_000_001, "swapped": False, "held_out": False, "success": True, "wrong_object": False}
    other = episode | {"seed": 1_000_000, "success": False}
    kept = in_rows([episode | {"credit": 1.0, "steps": 31}, other | {"credit": 0.5, "steps": 250}])
    assert list(kept) == ["own"] and kept["own"]["scene"] == "1000000 1000001"
    assert numbers(kept["own"], "success").tolist() == [0, 1] and numbers(kept["own"], "credit").tolist() == [0.5, 1]


def made_by_hand(study: Study, folder: Path) -> None:
    rates = {"insulated": 0.95, "joint": 0.3}
    for n, one in enumerate(study.cells):
        rate = rates[one.recipe] if one.episodes is None else 0.5
        result = {
            "cell": dataclasses.asdict(one),
            "closed_loop": {
                step: {task: loop(rate * share, 10 * n + i) for i, task in enumerate(study.tasks)}
                for step, share in (("100", 0.5), ("200", 1.0))
            },
            "knowledge": {s: {"accuracy": {"color": 0.5, "count": x}} for s, x in (("before", 1.0), ("after", 0.25))},
            "answers": {"before": {}, "after": {}},
            "held_out": [{"step": 200, "held_out/flow": 0.1 * n}],
            "open_loop": {},
            "gradients": [],
            "training": {"updates": 200, "seconds": 60.0},
            "machine": f"a machine with {n + 1} cores",
            "insula": "1.0",
            "data": {"tabletop": "5e" if n else "3a"},
        }
        (folder / one.name).mkdir(parents=True)
        (folder / one.name / RESULT_FILE).write_text(json.dumps(result))


def test_tables_and_files_of_a_study(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, STUDY))
    made_by_hand(study, tmp_path / "cells")
    assert write_study(study, tmp_path, tmp_path / "cells").is_file()
    shown = json.loads((tmp_path / "tables.json").read_text())

    first = shown["success"]["own"][0]
    assert (first["recipe"], first["episodes"], first["seeds"]) == ("insulated", "all", 2)
    rows = pq.read_table(tmp_path / "episodes.parquet").to_pylist()
    wanted = [r["success"] for r in rows if (r["recipe"], r["episodes"], r["asked"]) == ("insulated", "all", "own")]
    assert first["rates"]["all"]["mean"] == pytest.approx(np.mean(wanted)) and len(wanted) == 2 * 2 * 20
    assert first["rates"]["all"]["mean"] == pytest.approx(np.mean([first["rates"][t]["mean"] for t in study.tasks]))

    whole = next(one for one in shown["comparisons"] if (one["asked"], one["task"]) == ("own", "all"))
    assert [one["told_apart"] for one in whole["pairs"]] == [True]
    assert {(row["recipe"], row["episodes"]) for row in shown["by_data"]} == {
        ("insulated", a) for a in ("all", "n50", "n200")
    }
    assert [row["updates"] for row in shown["by_updates"] if row["recipe"] == "joint"] == [100, 200]
    known = {(row["kind"], row["after"]["mean"]) for row in shown["knowledge"] if row["recipe"] == "joint"}
    assert known == {("color", 0.5), ("count", 0.25), ("mean of kinds", 0.375)}

    with (tmp_path / "episodes.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows) == 6 * 2 * 20 * 3
    assert {"condition", "arm", "success", "duration_s"} <= table[0].keys() and table[0]["duration_s"] == "3.0"
    assert {row["arm"] for row in table} == {"insulated", "joint", "insulated-n50", "insulated-n200"}
    assert {row["termination"] for row in table} == {"success", "other"}  # words of fieldtrial; none ran out of time


def test_a_study_half_done_says_what_is_missing(tmp_path: Path) -> None:
    study = read_study(written(tmp_path, STUDY))
    made_by_hand(study, tmp_path / "cells")
    (tmp_path / "cells" / "joint-all-s1" / RESULT_FILE).unlink()
    results = read_results(study, tmp_path / "cells")
    assert tables(results)["missing"] == ["joint-all-s1"]
    page = render_study(results, tables(results))
    assert "not finished: joint-all-s1" in page
    alike = ", ".join(one.name for one in study.cells[1:-1])
    assert tables(results)["unlike"] == [f"data of 'tabletop' differ: {study.cells[0].name}; {alike}"] and alike in page
    assert all((f"{n + 1} cores" in page) == (one in results.found) for n, one in enumerate(study.cells))
    empty = Results(study, {})
    assert render_study(empty, tables(empty)).count("not measured") > 5 and episode_rows(empty) == []


def test_the_plan_comes_first_and_an_estimate_once_there_is_one(tmp_path: Path) -> None:
    path = written(tmp_path, STUDY)
    study, out = read_study(path), tmp_path / "out"
    assert "6 of 6 cells left" in plan_text(study, study.cells, out) and "once the first" in plan_text(
        study, study.cells, out
    )
    made_by_hand(study, out / "cells")
    (out / "cells" / "joint-all-s1" / RESULT_FILE).unlink()
    (out / "cells" / "joint-all-s0" / "seconds.json").write_text('{"seconds": 90}')
    assert "1 of 6 cells left; time needed one at a time: 0:01:30" in plan_text(study, study.cells, out)


def test_cells_that_fail_are_told_and_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A process for each: one of them says why it ends."""
    path, out = written(tmp_path, STUDY), tmp_path / "out"
    study = read_study(path)
    made_by_hand(study, tmp_path / "made")
    script = (
        "import sys, shutil; name = sys.argv[1]; print('insula: no such data'); "
        "sys.exit(1) if name.startswith('joint') else shutil.copy(sys.argv[2], sys.argv[3])"
    )

    def start(config: CompareConfig, one: Cell, out: Path) -> Any:
        place = out / "cells" / one.name
        place.mkdir(parents=True)
        source = tmp_path / "made" / one.name / RESULT_FILE
        with (place / "log.txt").open("w") as file:
            arguments = [sys.executable, "-c", script, one.name, str(source), str(place / RESULT_FILE)]
            return subprocess.Popen(arguments, stdout=file)

    monkeypatch.setattr(compare, "_start", start)
    monkeypatch.setattr(compare, "check_study", lambda study: None)
    assert run_compare(CompareConfig(path, out, jobs=2)) == 1
    said = capsys.readouterr()
    assert said.out.count(": failed, insula: no such data") == 2 and said.out.count("finished in") == 4
    assert "failed: joint-all-s0: insula: no such data" in said.err and (out / "report.html").is_file()


def test_another_study_is_not_mixed_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "check_study", lambda study: None)
    out, other = tmp_path / "out", STUDY.replace('"sort", ', "")
    # Nothing has begun: another one may take its place, and a plan leaves no trace.
    assert run_compare(CompareConfig(written(tmp_path, STUDY), out, plan=True)) == 0 and not out.exists()
    made_by_hand(read_study(written(tmp_path, STUDY)), out / "cells")
    run_compare(CompareConfig(written(tmp_path, STUDY), out))
    more = STUDY + '[[grid]]\nrecipes = ["lora"]\n'  # more cells of the same study
    run_compare(CompareConfig(written(tmp_path, more), out, report=True))

    # A copy elsewhere is the same study: nothing in its folder knows where that is.
    assert str(tmp_path) not in (out / "study.json").read_text()
    moved = shutil.copytree(tmp_path, tmp_path.with_name("moved"))
    run_compare(CompareConfig(moved / "study.toml", moved / "out", report=True))
    # A cell's own process sees it as well: the file may have changed meanwhile.
    for how in ({}, {"report": True}, {"here": True}):
        with pytest.raises(InputError, match=r"holds a study whose tasks is .*, this one's is .*; choose another"):
            run_compare(CompareConfig(written(tmp_path, other), out, **how))
    with pytest.raises(InputError, match=r"no cell 'joint-all-s9' .did you mean 'joint-all-s"):
        run_compare(CompareConfig(written(tmp_path, STUDY), out, only=("joint-all-s9",)))

    shutil.rmtree(out / "cells")
    run_compare(CompareConfig(written(tmp_path, other), out, report=True))


MAPPING = """
[robots.one]
path = "one"
cameras = { front = "front" }
{more}
"""


@pytest.mark.parametrize(
    "study, mapping, message",
    [
        ("", "", "no such file"),
        ("robot = 'two'", MAPPING, r"robot: no 'two' in .*known: one"),
        ("", MAPPING + MAPPING.replace("one", "two"), "has one, two; say which of them acts"),
        ("", MAPPING.replace("{more}", "losses = ['fast']"), "'insulated' acts by flow, which nothing teaches one"),
        (
            "",
            MAPPING.replace("{more}", "subtasks = 'subtask_index'"),
            "no subtask, and one is trained on subtask, actions; add flat",
        ),
        ("scenes = 2000000", MAPPING, "for 2000000 episodes, expected seeds"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    tmp_path: Path, study: str, mapping: str, message: str
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    if mapping:
        (tmp_path / "data.toml").write_text(mapping.replace("{more}", ""))
    with pytest.raises(InsulaError, match=message):
        run_compare(CompareConfig(written(tmp_path, study + STUDY), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
