"""What a study shows, as plain values: one entry for each table of its report."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from insula.study.episodes import ASKED, Asked
from insula.study.results import Results
from insula.study.statistics import ALPHA, CONFIDENCE, compare_all, crossed_interval, not_told_apart

Arm = tuple[str, str]
STAGES = ("before", "after")


def tables(results: Results) -> dict[str, Any]:
    """Everything, by name; a table of what was not measured is empty."""
    return {
        "confidence": CONFIDENCE,
        "cells": [cell.name for cell in results.found],
        "missing": [cell.name for cell in results.study.cells if cell not in results.found],
        "success": {asked: success(results, asked) for asked in ASKED},
        "wrong_object": success(results, "own", "wrong_object"),
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


def success(results: Results, asked: Asked, outcome: str = "success") -> list[dict[str, Any]]:
    """For each arm the rate of every task, and of all of them, with intervals over training seeds and scenes."""
    rows = []
    for arm in results.arms:
        by_task = {task: results.outcomes(arm, task, asked, outcome) for task in results.study.tasks}
        by_task["all"] = results.all_tasks(arm, asked, outcome)
        rates = {task: asdict(crossed_interval(seen)) for task, seen in by_task.items() if seen.size}
        if rates:
            rows.append(_named(arm) | {"seeds": len(results.of(arm)), "rates": rates})

    return rows


def comparisons(results: Results) -> list[dict[str, Any]]:
    """Every two recipes that had the same data, by what was asked and by task. Holm's correction is over all pairs of
    one table: one task, or all, and one way of asking."""
    found = []
    for amount in dict.fromkeys(amount for _, amount in results.arms):
        arms = [arm for arm in results.arms if arm[1] == amount]
        for asked in ASKED:
            for task in (*results.study.tasks, "all"):
                seen = {arm[0]: _outcomes(results, arm, task, asked) for arm in arms}
                seen = {name: outcomes for name, outcomes in seen.items() if outcomes.size}
                if len(seen) < 2:
                    continue
                made = compare_all(seen)
                found.append(
                    {
                        "episodes": amount,
                        "asked": asked,
                        "task": task,
                        "pairs": [asdict(one) | {"told_apart": one.told_apart} for one in made],
                        "not_told_apart": not_told_apart(made),
                    }
                )
    return found


def _outcomes(results: Results, arm: Arm, task: str, asked: Asked) -> np.ndarray:
    return results.all_tasks(arm, asked) if task == "all" else results.outcomes(arm, task, asked)


def by_data(results: Results) -> list[dict[str, Any]]:
    """Success over all tasks against the number of demonstrations, where a recipe had several."""
    rows = success(results, "own")
    several = {row["recipe"] for row in rows if sum(other["recipe"] == row["recipe"] for other in rows) > 1}
    return [
        {"recipe": row["recipe"], "episodes": row["episodes"], "success": row["rates"]["all"]}
        for row in rows
        if row["recipe"] in several
    ]


def by_updates(results: Results) -> list[dict[str, Any]]:
    """Success over all tasks after some of the updates; the last look has more scenes than those before."""
    rows = []
    for arm in results.arms:
        steps = sorted({int(step) for result in results.of(arm) for step in result["closed_loop"]})
        for look, step in enumerate(steps):
            seen = results.all_tasks(arm, look=look)
            if seen.size and len(steps) > 1:
                rows.append(_named(arm) | {"updates": step, "success": asdict(crossed_interval(seen))})
    return rows


def knowledge(results: Results) -> list[dict[str, Any]]:
    """Questions about the tabletop that were answered right, by kind, before and after; mean and range over seeds."""
    rows = []
    for arm in results.arms:
        known = [result["knowledge"] for result in results.of(arm) if "knowledge" in result]
        for kind in sorted({kind for one in known for kind in one["after"]["accuracy"]}):
            shares = {stage: _spread([one[stage]["accuracy"][kind] for one in known]) for stage in STAGES}
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
            found = {stage: [one["answers"][stage][name] for one in results.of(arm)] for stage in STAGES}
            shares = {stage: _spread([one["right"] / one["of"] for one in each]) for stage, each in found.items()}
            rows.append(_named(arm) | {"source": name} | shares)
    return rows


def held_out(results: Results) -> list[dict[str, Any]]:
    """Losses and token accuracy at the end on what was never trained on."""
    rows = []
    for arm in results.arms:
        last = [result["held_out"][-1] for result in results.of(arm) if result["held_out"]]
        for key in sorted({key for row in last for key in row if key.startswith("held_out")}):
            rows.append(_named(arm) | {"metric": key} | {"value": _spread([row[key] for row in last])})
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
        f"{better} beats {worse} by {abs(one['difference']['mean']):.0%}"
        for one in apart
        for worse, better in [_ordered(one)]
    ]
    left = [f"{first} and {second}" for first, second in comparison["not_told_apart"]]
    parts = ["; ".join(said)] if said else []
    if left:
        parts.append(f"not told apart at {ALPHA:.0%}: " + ", ".join(left))
    return ". ".join(parts) + "."


def _ordered(one: dict[str, Any]) -> tuple[str, str]:
    """The worse one, and the better one."""
    return (one["first"], one["second"]) if one["difference"]["mean"] > 0 else (one["second"], one["first"])


def _named(arm: Arm) -> dict[str, Any]:
    return {"recipe": arm[0], "episodes": arm[1]}


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and most over training seeds: three of them have no interval worth the name."""
    return {"mean": float(np.mean(values)), "least": float(min(values)), "most": float(max(values))}
