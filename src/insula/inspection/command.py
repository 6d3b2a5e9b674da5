"""What `insula inspect` does."""

import dataclasses
from importlib.metadata import version
from pathlib import Path

from rich.table import Table

from insula import page
from insula.certificate import Proof, write_certificate
from insula.errors import InputError
from insula.inspection.config import InspectConfig
from insula.inspection.findings import Findings, Inspector
from insula.inspection.influence import EFFECTS, Influence
from insula.inspection.page import render
from insula.inspection.server import serve
from insula.inspection.subject import open_subject
from insula.model.config import preset as model_preset
from insula.terminal import as_text
from insula.train.config import training_preset

COLUMNS = {
    "flow": "flow",
    "flow_control": "flow, not insulated",
    "flow_embeddings": "flow, stopped at the embeddings only",
    "flow_frozen": "flow, backbone frozen",
    "fast": "token",
    "fast_control": "token, not insulated",
}


def inspect(config: InspectConfig) -> bool:
    """Look at one sample, write the page (or serve all samples'), print what was measured. Returns whether the model is
    free of faults. Raises as `open_subject`, and ValueError or IndexError for a sample that does not exist or has
    nothing to certify."""
    subject = open_subject(config)
    inspector = Inspector(subject, config.seed)
    if config.serve:
        subject.sample(config.sample, config.source)
        serve(inspector, config.source, config.sample, config.port)
        return True
    found = inspector.look(config.sample, config.source)
    if config.certificate is not None:
        certify(found, config.certificate)
    written = page.write(config.out or (config.run or Path()) / "inspect.html", render(found))
    print(as_text(*summary(found), f"page: {written}", width=150))
    return not found.faults


def default_settings(preset: str | None, arguments: list[str]) -> InspectConfig:
    """What flags change: the model and the dialect of a preset. Raises InputError where there is no such preset."""
    name = preset or "tiny"
    reading = dataclasses.replace(training_preset(name, Path()).reading, on_overflow=InspectConfig.reading.on_overflow)
    return InspectConfig(model=model_preset(name), reading=reading)


def run(config: InspectConfig) -> int:
    """Inspect, and return the exit code: 1 where a fault was found."""
    return 0 if inspect(config) else 1


def certify(found: Findings, file: Path) -> None:
    """Write what was measured, gradients and what moves what. Raises ValueError where the sample lacks a loss, so that
    it can show nothing."""
    if not found.shows_insulation:
        lacks = "no action" if not found.has_actions else "no scored token"
        raise InputError(
            f"{found.sample.where} has {lacks}, so it cannot show where gradients go; choose a robot's sample"
        )
    assert found.proof is not None and found.influence is not None
    subject = found.subject
    about = {
        "samples": [found.sample.where],
        "seed": found.seed,
        "parameters": subject.parameters,
        "influence": found.influence.table,
    }
    assert found.outcome != "not asked"
    proof = dataclasses.replace(found.proof, outcome=found.outcome, findings=tuple(found.faults))
    write_certificate(file, proof, subject.assets.config, about)


def summary(found: Findings) -> list[Table | str]:
    """What was measured, exact zeros as such, and what it shows."""
    parts: list[Table | str] = [f"insula {version('insula')}: {found.sample.where}"]
    if found.proof and found.influence:
        parts += [gradient_table(found.proof, found), influence_table(found.influence)]
        why = "" if found.shows_insulation or found.faults else ": this sample lacks one of the losses"
        parts += [f"insulation: {found.outcome}{why}", *found.faults]
    return parts


def gradient_table(proof: Proof, found: Findings) -> Table:
    there = {"flow": found.has_actions, "fast": found.has_answer}
    names = [name for name in COLUMNS if there[name.split("_")[0]]]
    both = ["cosine"] if found.shows_insulation else []
    shown = Table("part", *(COLUMNS[name] for name in names), *both, title="gradient norms", title_justify="left")
    for part, row in proof.table.items():
        cosine = proof.cosine.get(part)
        angle = "" if cosine is None else f"{cosine:+.2f}"
        shown.add_row(part, *(_exact(row[name]) for name in names), *([angle] if both else []))
    return shown


def influence_table(measured: Influence) -> Table:
    shown = Table("changed", *EFFECTS, title="largest change", title_justify="left")
    for changed, row in measured.table.items():
        shown.add_row(changed, *(_exact(row[effect]) for effect in EFFECTS))
    return shown


def _exact(value: float | None) -> str:
    return "" if value is None else "0 exactly" if value == 0 else f"{value:.3g}"
