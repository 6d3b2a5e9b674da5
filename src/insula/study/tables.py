"""What a study shows, as plain values: one entry for each table of its report."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from insula.evaluate.intervals import wilson
from insula.study.episodes import ASKED, Asked, numbers
from insula.study.results import Results
from insula.study.statistics import (
    ALPHA,
    CONFIDENCE,
    FEWEST_SEEDS,
    Interval,
    Outcomes,
    compare_all,
    crossed_interval,
    not_told_apart,
)

Arm = tuple[str, str]
STAGES = ("before", "after")


def tables(results: Results) -> dict[str, Any]:
    """Everything, by name; a table of what was not measured is empty."""
    return {
        "confidence": CONFIDENCE,
        "cells": [cell.name for cell in results.found],
        "missing": [cell.name for cell in results.study.cells if cell not in results.found],
        "unlike": unlike(results),
        "success": {asked: success(results, asked) for asked in ASKED},
        "wrong_object": success(results, "own", "wrong_object"),
        "by_cell": by_cell(results),
        "comparisons": comparisons(results),
        "by_data": by_data(results),
        "by_updates": by_updates(results),
        "knowledge": knowledge(results),
        "answers": answers(results),
        "held_out": held_out(results),
        "open_loop": open_loop(results),
        "gradients": gradients(results),
        "compute": compute(results),
    }


def unlike(results: Results) -> list[str]:
    """In words, what cells were not made alike by: data that changed between them, another version of insula."""
    digests: dict[str, dict[str, list[str]]] = {}
    for cell, result in results.found.items():
        for source, digest in (result["data"] | {"insula": result["insula"]}).items():
            digests.setdefault(source, {}).setdefault(digest, []).append(cell.name)

    told = []
    for source, groups in digests.items():
        if len(groups) > 1:
            shown = "; ".join(", ".join(names) for names in groups.values())
            told.append(f"{'versions of insula' if source == 'insula' else f'data of {source!r}'} differ: {shown}")
    return told


def success(results: Results, asked: Asked, outcome: str = "success") -> list[dict[str, Any]]:
    """For each arm the rate of every task, and of all of them, with intervals over training seeds and scenes."""
    rows = []
    for arm in results.arms:
        by_task = {name: results.outcomes(arm, tasks, asked, outcome) for name, tasks in _groups(results).items()}
        rates = {name: asdict(crossed_interval(seen)) for name, seen in by_task.items() if seen}
        if rates:
            counts = {"seeds": len(by_task["all"][0]), "scenes": sum(one.shape[1] for one in by_task["all"])}
            rows.append(_named(arm) | counts | {"rates": rates})

    return rows


def by_cell(results: Results) -> list[dict[str, Any]]:
    """Of each cell the rate of success in every task, as it was asked: how well this one policy does, with Wilson's
    interval over scenes."""
    rows = []
    for cell, result in results.found.items():
        last = result["closed_loop"].get(str(max(map(int, result["closed_loop"]), default=0)), {})
        for asked in ASKED:
            seen = {task: numbers(loop[asked], "success") for task, loop in last.items() if asked in loop}
            rates = {task: _wilson(one) for task, one in seen.items()}
            if rates:
                rows.append({"cell": cell.name, "asked": asked, "rates": rates})

    return rows


def _wilson(outcomes: np.ndarray) -> dict[str, float]:
    found = wilson(int(outcomes.sum()), len(outcomes))
    return asdict(Interval(found.rate, found.low, found.high))


def comparisons(results: Results) -> list[dict[str, Any]]:
    """Every two recipes that had the same data, by what was asked and by task. Holm's correction is over all pairs of
    one table: one task, or all, and one way of asking."""
    found = []
    for amount in dict.fromkeys(amount for _, amount in results.arms):
        arms = [arm for arm in results.arms if arm[1] == amount]
        for asked in ASKED:
            for name, tasks in _groups(results).items():
                seen = {arm[0]: results.outcomes(arm, tasks, asked) for arm in arms}
                compared = {recipe: one for recipe, one in seen.items() if one and len(one[0]) >= FEWEST_SEEDS}
                if sum(bool(one) for one in seen.values()) < 2:
                    continue
                made = compare_all(compared)
                found.append(
                    {
                        "episodes": amount,
                        "asked": asked,
                        "task": name,
                        "pairs": [asdict(one) | {"told_apart": one.told_apart} for one in made],
                        "not_told_apart": not_told_apart(made),
                        "too_few_seeds": [recipe for recipe, one in seen.items() if one and recipe not in compared],
                    }
                )
    return found


def _groups(results: Results) -> dict[str, Sequence[str]]:
    """Each task by itself, and all of them."""
    return {task: [task] for task in results.study.tasks} | {"all": results.study.tasks}


def by_data(results: Results) -> list[dict[str, Any]]:
    """Success over all tasks against the number of demonstrations, where a recipe had several."""
    rows = success(results, "own")
    several = {row["recipe"] for row in rows if sum(other["recipe"] == row["recipe"] for other in rows) > 1}
    return [
        {name: row[name] for name in ("recipe", "episodes", "scenes")} | {"success": row["rates"]["all"]}
        for row in rows
        if row["recipe"] in several
    ]


def by_updates(results: Results) -> list[dict[str, Any]]:
    """Success over all tasks after some of the updates; the last look has more scenes than those before."""
    rows = []
    for arm in results.arms:
        steps = sorted({int(step) for result in results.of(arm) for step in result["closed_loop"]})
        for step in steps if len(steps) > 1 else []:
            seen: Outcomes = results.outcomes(arm, results.study.tasks, updates=step)
            if seen:
                scenes = sum(one.shape[1] for one in seen)
                rows.append(
                    _named(arm) | {"updates": step, "scenes": scenes, "success": asdict(crossed_interval(seen))}
                )
    return rows


def knowledge(results: Results) -> list[dict[str, Any]]:
    """Questions about the tabletop that were answered right, by kind, before and after; mean and range over seeds."""
    rows = []
    for arm in results.arms:
        known = [result["knowledge"] for result in results.of(arm) if "knowledge" in result]
        for kind in sorted({kind for one in known for kind in one["after"]["accuracy"]}):
            shares = {stage: _spread(_known([one[stage]["accuracy"] for one in known], kind)) for stage in STAGES}
            rows.append(_named(arm) | {"kind": kind} | shares)
        if known:
            means = {
                stage: [float(np.mean(list(one[stage]["accuracy"].values()))) for one in known] for stage in STAGES
            }
            rows.append(
                _named(arm) | {"kind": "mean of kinds"} | {stage: _spread(each) for stage, each in means.items()}
            )
    return rows


def answers(results: Results) -> list[dict[str, Any]]:
    """Held-out questions of the study's own data that were answered right, before and after."""
    rows = []
    for arm in results.arms:
        for name in sorted({name for result in results.of(arm) for name in result["answers"]["after"]}):
            found = {stage: _known([one["answers"][stage] for one in results.of(arm)], name) for stage in STAGES}
            shares = {stage: _spread([one["right"] / one["of"] for one in each]) for stage, each in found.items()}
            rows.append(_named(arm) | {"source": name} | shares)
    return rows


def held_out(results: Results) -> list[dict[str, Any]]:
    """Losses and token accuracy at the end on what was never trained on."""
    rows = []
    for arm in results.arms:
        last = [result["held_out"][-1] for result in results.of(arm) if result["held_out"]]
        for key in sorted({key for row in last for key in row if key.startswith("held_out")}):
            rows.append(_named(arm) | {"metric": key} | {"value": _spread(_known(last, key))})
    return rows


def open_loop(results: Results) -> list[dict[str, Any]]:
    """Action errors by robot, seed by seed, by dimension and by step of the chunk, each with its interval."""
    return [
        _named(arm) | {"robot": robot, "seed": result["cell"]["seed"]} | errors
        for arm in results.arms
        for result in results.of(arm)
        for robot, errors in result["open_loop"].items()
    ]


def gradients(results: Results) -> list[dict[str, Any]]:
    """At each checkpoint, were there no insulation: the cosine of both losses' gradients and their norms, by part."""
    rows = []
    for arm in results.arms:
        for result in results.of(arm):
            for look in result["gradients"]:
                parts = [part for part, value in look["cosine"].items() if value is not None]
                for part in parts:
                    norms = {loss: look["table"][part][loss]["joint"] for loss in ("flow", "fast")}
                    rows.append(
                        _named(arm)
                        | {"seed": result["cell"]["seed"], "updates": look["step"], "part": part}
                        | {"cosine": look["cosine"][part], "outcome": look["outcome"]}
                        | norms
                    )
    return rows


def compute(results: Results) -> list[dict[str, Any]]:
    """Updates and seconds of training, which depend on what else the machine did."""
    return [
        _named(arm)
        | {
            "updates": results.of(arm)[0]["training"]["updates"],
            "seconds": _spread([result["training"]["seconds"] for result in results.of(arm)]),
        }
        for arm in results.arms
    ]


def statement(comparison: dict[str, Any]) -> str:
    """One line: what can be said of a table of pairs, and what can't."""
    apart = [one for one in comparison["pairs"] if one["told_apart"]]
    said = [
        f"{better} beats {worse} by {_points(one['difference'])}" for one in apart for worse, better in [_ordered(one)]
    ]
    left = [f"{first} and {second}" for first, second in comparison["not_told_apart"]]
    parts = ["; ".join(said)] if said else []
    if left:
        parts.append(f"not told apart at {ALPHA:.0%}: " + ", ".join(left))
    if comparison["too_few_seeds"]:
        parts.append("one training seed, which tells nothing of others: " + ", ".join(comparison["too_few_seeds"]))
    return ". ".join(parts) + "."


def _points(difference: dict[str, float]) -> str:
    """ "5 points (2 to 8)", whichever of the two is better."""
    ends = sorted(abs(100 * difference[end]) for end in ("low", "high"))
    return f"{abs(100 * difference['mean']):.0f} points ({ends[0]:.0f} to {ends[1]:.0f})"


def _ordered(one: dict[str, Any]) -> tuple[str, str]:
    """The worse one, and the better one."""
    return (one["first"], one["second"]) if one["difference"]["mean"] > 0 else (one["second"], one["first"])


def _named(arm: Arm) -> dict[str, Any]:
    return {"recipe": arm[0], "episodes": arm[1]}


def _known(rows: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """What rows have under a key; what a seed held out may have none of some kind."""
    return [row[key] for row in rows if key in row]


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and most over training seeds: three of them have no interval worth the name."""
    return {"mean": float(np.mean(values)), "least": float(min(values)), "most": float(max(values))}
