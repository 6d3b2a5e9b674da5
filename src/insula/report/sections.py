"""The parts of the page, each from plain data. None means that it was not measured."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from insula.certificate.proof import VERDICTS, Outcome
from insula.certificate.table import column_title, exact_text, table_columns
from insula.evaluate.closed_loop import Recording
from insula.page.html import Html, html_table, tag
from insula.report import charts

MISSING = "not measured"
EPISODES_SHOWN = 8
"""Episodes on the page."""
ANIMATED = 3
"""The first of them, which also move."""
NARROW_SPACE = "\u202f"  # a narrow space that never breaks
RATES = (  # key, what it says, whether more is worse
    ("success", "success", False),
    ("swapped_success", "success, instruction swapped", False),
    ("wrong_object", "wrong object", True),
    ("swapped_wrong_object", "wrong object, instruction swapped", True),
)


def show_statement(demonstrations: int | None) -> Html:
    """Where the data come from, before any number."""
    # First on the page, in words that nobody can read past: no real robot.
    many = "Demonstrations" if demonstrations is None else f"All {demonstrations:,} demonstrations"
    return tag(
        "p",
        f"{many} come from a scripted expert in a simulated tabletop (“put the red block in the blue bowl”). Results "
        "come from the same simulator, on scenes from seeds that neither demonstrations nor pretraining "
        "use. No person and no real robot took part. The backbone learns from discrete FAST action tokens, the action "
        "expert by flow matching, and no gradient of the second is to reach the first; whether that holds is measured "
        "below.",
    )


def percent(value: float) -> str:
    """A share from 0 to 1, as whole percent."""
    return f"{100 * value:.0f}{NARROW_SPACE}%"


def _interval(rate: Mapping[str, Any]) -> str:
    return f"{100 * rate['low']:.0f}–{100 * rate['high']:.0f}{NARROW_SPACE}%"


def show_headline(
    loop: Mapping[str, Any] | None,
    knowledge: Mapping[str, Any] | None,
    proof: Mapping[str, Any] | None,
    seconds: Mapping[str, float] | None,
    machine: str | None,
) -> Html:
    """One card for each number that matters, in plain sight."""

    def card(value: str | None, name: str, note: str | None = None, class_: str | None = None) -> Html:
        shown = tag("b", "–" if value is None else value, class_=class_)
        return tag("div", tag("span", name), shown, tag("span", MISSING if value is None else note), class_="card")

    # The swapped instruction beside plain success: a policy that ignores language would look as good in the first
    # alone.
    cards = []
    for key, name, _ in RATES[:3]:
        rate = loop[key] if loop else None
        cards.append(
            card(percent(rate["rate"]), name, f"{_interval(rate)}, {rate['total']} scenes")
            if rate
            else card(None, name)
        )

    outcome = proof["outcome"] if proof else None
    cards.append(card(outcome, "insulation", "gradients measured on this model", _outcome_class(proof)))

    # Before beside after: insulation claims to keep what the backbone knew, not that it knew much.
    known, before = (percent(mean_accuracy(knowledge[when])) if knowledge else None for when in ("after", "before"))
    cards.append(card(known, "held-out questions right", f"{before} before robot training"))

    train = (seconds or {}).get("train")
    cards.append(card(None if train is None else f"{train / 60:.1f} min", "training", machine))
    return tag("div", cards, class_="cards")


def mean_accuracy(known: Mapping[str, Any]) -> float:
    """Accuracy over kinds of questions, each counting the same, 0 to 1; 0 without any."""
    return sum(known["accuracy"].values()) / max(len(known["accuracy"]), 1)


def show_closed_loop(loop: Mapping[str, Any] | None) -> Html | None:
    """Rates with their intervals, as `ClosedLoop.to_json()` has them, and every episode one click away."""
    if loop is None:
        return None

    # A rate that was not measured has its row all the same.
    rows = []
    for key, name, worse in RATES:
        rate = loop[key]
        if rate is None:
            rows.append([name, tag("span", MISSING, class_="missing"), "", "", ""])
            continue

        bar = charts.interval_bar(rate["rate"], rate["low"], rate["high"], worse)
        rows.append([name, percent(rate["rate"]), _interval(rate), f"{rate['count']} of {rate['total']}", bar])

    latency = ", ".join(f"{name} {value:.1f} ms" for name, value in loop["latency_ms"].items())
    solved = loop["mean_steps_of_successes"]
    seeds = f"{loop['first_seed']} to {loop['first_seed'] + loop['scenes'] - 1}"
    episodes = [
        [e["seed"], e["task"], "swapped" if e["swapped"] else "", _success_mark(e), e["steps"]]
        for e in loop["episodes"]
    ]

    return tag(
        "div",
        tag(
            "p",
            "Every scene is run twice: with its instruction, and with one that names another block and the other bowl "
            "of the same scene. A policy that does not listen scores 0\u202f% there and moves a wrong object instead.",
        ),
        html_table(["", "rate", "95 % interval", "scenes", ""], rows),
        tag(
            "p",
            f"Seeds {seeds}; {loop['replan_steps']} steps of each chunk executed before looking again; "
            f"{loop['mean_steps']:.0f} steps an episode on average"
            + (f", {solved:.0f} where it succeeded" if solved is not None else "")
            + f". One call of the policy: {latency}. Wilson intervals.",
            class_="soft",
        ),
        tag(
            "details",
            tag("summary", f"All {len(episodes)} episodes"),
            html_table(["seed", "instruction", "", "outcome", "steps"], episodes),
        ),
    )


def show_tasks(by_task: Mapping[str, Mapping[str, Any]]) -> Html:
    """One row for each task."""

    def said(rate: Mapping[str, Any] | None) -> Html | str:
        if rate is None:
            return tag("span", MISSING, class_="missing")
        return f"{percent(rate['rate'])} ({_interval(rate)})"

    rows = []
    for task, loop in by_task.items():
        rate = loop["success"]
        bar = charts.interval_bar(rate["rate"], rate["low"], rate["high"], False)
        others = [said(loop[key]) for key in ("swapped_success", "held_out_success", "wrong_object")]
        rows.append([task, said(rate), bar, percent(loop["mean_credit"]), *others])

    names = ["task", "success", "", "done", "swapped", "held-out words or pairs", "wrong object"]
    return html_table(names, rows)


def _success_mark(episode: Mapping[str, Any]) -> Html:
    """Success or failure, in a word and a color."""
    # Never by color alone.
    good = episode["success"]
    word = "✓ success" if good else "✗ failure"
    wrong = ", wrong object" if episode["wrong_object"] else ""
    return tag("span", word + wrong, class_="good" if good else "bad")


def show_rollouts(recordings: Sequence[Recording]) -> Html | None:
    """The first episodes in key frames, and the first of those in motion. Not chosen: a choice would flatter."""
    if not recordings:
        return None

    shown = recordings[:EPISODES_SHOWN]
    which = f"The first {len(shown)} episodes as they came, not chosen" + (
        f", of {len(recordings)} that were recorded" if len(recordings) > len(shown) else ""
    )

    # Animations are most of the page's size, so only a few move.
    figures = [_rollout(recording, i < ANIMATED) for i, recording in enumerate(shown)]
    return tag(
        "div",
        tag("p", f"{which}. Upper row: front camera; lower row: wrist camera. These pixels are what the policy sees."),
        tag("div", figures, class_="rollouts"),
    )


def _rollout(recording: Recording, animated: bool) -> Html:
    episode = vars(recording.episode)

    moving = None
    if animated:  # a still one for those who asked their system for less motion
        still = charts.first_frame(recording.frames)
        moving = tag(
            "picture",
            tag("source", srcset=still, media="(prefers-reduced-motion: reduce)"),
            tag("img", src=charts.animation(recording.frames), alt="the whole episode, front and wrist camera"),
        )

    note = f"seed {episode['seed']}{', swapped' if episode['swapped'] else ''}, {episode['steps']} steps"
    return tag(
        "figure",
        tag("p", tag("span", _success_mark(episode), class_="badge"), episode["task"]),
        moving,
        tag("img", src=charts.key_frames(recording.frames), alt="key frames from first to last"),
        tag("figcaption", note),
        class_="card",
    )


def show_insulation(proof: Mapping[str, Any] | None) -> Html | None:
    """The verdict, what spoils it, and the table of a proof or a certificate, as plain values."""
    if proof is None:
        return None

    verdict = tag("span", VERDICTS[Outcome(proof["outcome"])], class_=_outcome_class(proof))
    findings = tag("ul", [tag("li", finding) for finding in proof["findings"]]) if proof["findings"] else None
    if not proof["table"]:  # a checkpoint that was never certified
        return tag("div", tag("p", verdict), findings)

    columns = table_columns(proof["table"])
    rows = [
        [part, *(_exact_norm(row[loss][scheme]) for loss, scheme in columns)] for part, row in proof["table"].items()
    ]
    return tag(
        "div",
        tag("p", verdict),
        findings,
        html_table(["gradient norm on", *(column_title(loss, scheme) for loss, scheme in columns)], rows),
        tag(
            "p",
            "Measured on this very model. “Not insulated” is the same loss of the same weights "
            "with gradients let through: the control without which a zero would prove nothing. The final norm comes "
            "after the last keys and values, so the flow loss cannot reach it in any scheme.",
            class_="soft",
        ),
    )


def _outcome_class(proof: Mapping[str, Any] | None) -> str | None:
    if proof is None:
        return None

    # Everything else is bad, "not certified" too: only a proof that holds shows anything.
    return "good" if proof["outcome"] == Outcome.HOLDS else "bad"


def _exact_norm(value: float) -> Any:
    # Exact zeros stand out; which of them had to be zero is the verdict's to say.
    shown = exact_text(value)
    return tag("span", shown, class_="good") if value == 0 else shown


def show_knowledge(known: Mapping[str, Mapping[str, Any]] | None, question_share: float | None = None) -> Html | None:
    """What the backbone answers "before" and "after" robot training, kind by kind. `question_share`: of its samples."""
    if known is None:
        return None

    before, after = known["before"], known["after"]

    def row(name: Any, old: float | None, new: float | None) -> list[Any]:
        change = "–" if old is None or new is None else f"{100 * (new - old):+.1f}"
        return [name, *("–" if v is None else percent(v) for v in (old, new)), change]

    # A kind may be missing on one side: not every scene allows every question.
    kinds = sorted({*before["accuracy"], *after["accuracy"]})
    rows = [row(kind, before["accuracy"].get(kind), after["accuracy"].get(kind)) for kind in kinds]
    rows.append(row(tag("b", "mean of kinds"), mean_accuracy(before), mean_accuracy(after)))
    return tag(
        "div",
        tag(
            "p",
            f"{after['answered']:,} held-out questions about unseen scenes, asked of the backbone before and after "
            "robot training; the share answered right. Locations count as right within a pixel of a 64-pixel image."
            + (
                ""
                if not question_share
                else f" In that training, {percent(question_share)} of the samples were questions about other scenes."
            ),
        ),
        html_table(["kind of question", "before", "after", "points"], rows),
        tag(
            "p",
            f"Locations are off by {before['location_error']:.1f} bins of 128 before and {after['location_error']:.1f} "
            "after, on average.",
            class_="soft",
        ),
    )


def show_curves(metrics: Sequence[Mapping[str, Any]]) -> Html | None:
    """Losses over updates, training and held-out."""
    wanted = (("Flow loss", "flow", True), ("Token loss", "fast", True), ("Token accuracy", "token_accuracy", False))
    # Losses over orders of magnitude, an accuracy from 0 to 1.
    drawn = [
        charts.loss_chart(title, charts.curve(metrics, name), charts.curve(metrics, f"held_out/{name}"), log)
        for title, name, log in wanted
    ]
    if not any(drawn):
        return None

    return tag(
        "div",
        tag("p", "Held-out: episodes never trained on, with the averaged weights that are evaluated."),
        tag("div", drawn, class_="charts"),
    )


def show_fast(found: Mapping[str, Any] | None) -> Html | None:
    """Name and value of each statistic."""
    return html_table([], [[name, _short(value)] for name, value in found.items()], "plain") if found else None


def show_provenance(facts: Mapping[str, Any], settings: Mapping[str, Any] | None) -> Html:
    """`facts` in sight, all settings (nested) one click away."""

    def listed(pairs: Mapping[str, Any]) -> Html:
        return html_table([], [[k, MISSING if v is None else _short(v)] for k, v in pairs.items()], "plain")

    flat = dict(_flattened(settings or {}))

    return tag(
        "div",
        listed(facts),
        tag("details", tag("summary", f"All {len(flat)} settings"), listed(flat)) if flat else None,
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flattened(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} → ("a.b", 1)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{above}{name}.")
        else:
            yield above + name, "none" if value is None else value
