"""What `insula inspect` does."""

import contextlib
import dataclasses
from importlib.metadata import version
from pathlib import Path

from rich.table import Table

from insula.certificate.proof import Proof
from insula.certificate.stored import write_certificate
from insula.certificate.table import column_title, exact_text
from insula.errors import InputError
from insula.files import check_output_file, read_json
from insula.inspection.config import InspectConfig
from insula.inspection.findings import Findings, Inspector
from insula.inspection.influence import Effect, Influence
from insula.inspection.sample_page import render_sample
from insula.inspection.sample_server import HOST, serve_samples
from insula.inspection.subject import Sample, open_subject
from insula.model.config import preset as model_preset
from insula.page import write_page
from insula.ports import listen
from insula.terminal import as_text
from insula.train.config import training_preset

PAGE_FILE = "inspect.html"


def inspect(config: InspectConfig) -> bool:
    """Look at one sample, write the page (or serve all samples'), print what was measured. Returns whether the model is
    free of faults.

    Raises as `open_subject`; InputError for a sample that does not exist or has nothing to certify; InputError or
    FileError for a file or port that cannot be used, before anything is loaded.
    """
    # The port is taken before anything is loaded, which takes seconds: a taken one is said at once.
    if config.serve:
        with contextlib.closing(listen(HOST, config.port)) as listening:
            subject = open_subject(config)
            subject.sample(config.sample, config.source)  # what does not exist is said here, not in a browser
            serve_samples(Inspector(subject, config.seed), config.source, config.sample, listening)
        return True

    # Likewise what cannot be written.
    file = config.out or (config.run or Path()) / PAGE_FILE
    check_outputs(config, file)

    subject = open_subject(config)
    if config.certificate is not None:
        refuse_uncertifiable(subject.sample(config.sample, config.source))

    # The certificate first: should the page fail, what was measured is not lost.
    found = Inspector(subject, config.seed).look(config.sample, config.source)
    if config.certificate is not None:
        certify(found, config.certificate)

    written = write_page(file, render_sample(found))
    print(as_text(*summary(found), f"page: {written}", width=170))
    return not found.faults


def run_inspect(config: InspectConfig) -> int:
    """Inspect, and return the exit code: 1 where a fault was found."""
    return 0 if inspect(config) else 1


def inspect_defaults(preset: str | None, arguments: list[str]) -> InspectConfig:
    """What flags change: the model and the dialect of a preset. Raises InputError where there is no such preset."""
    # A data set is read as training reads it, but a chunk that is too long is shown, not refused.
    name = preset or "tiny"
    reading = dataclasses.replace(training_preset(name, Path()).reading, on_overflow=InspectConfig.reading.on_overflow)
    return InspectConfig(model=model_preset(name), reading=reading)


def check_outputs(config: InspectConfig, page: Path) -> None:
    """Raises InputError or FileError for what cannot be written, or must not be overwritten."""
    # A run that is not there is refused by its own name later, and no folder is made for its page.
    if config.out is not None or page.parent.is_dir():
        check_output_file(page, (".html", ".htm"), "--out")

    if config.certificate is not None:
        # An older certificate may be replaced; anything else that happens to be JSON may not.
        there = config.certificate.is_file()
        check_output_file(config.certificate, (".json",), "--certificate")
        if there and not {"outcome", "findings", "table"} <= read_json(config.certificate).keys():
            raise InputError(
                f"--certificate {config.certificate}: is there and is no certificate; name a new file, or remove it"
            )


def refuse_uncertifiable(sample: Sample) -> None:
    """Raises InputError where a sample lacks a loss, so that it can show nothing."""
    # A missing loss is zero everywhere, and would pass for the strictest insulation.
    batch = sample.batch
    has_answer = batch.loss_mask is not None and bool(batch.loss_mask.any())
    if batch.action_mask.any() and has_answer:
        return

    lacks = "no scored token" if batch.action_mask.any() else "no action"
    raise InputError(f"{sample.where} has {lacks}, so it cannot show where gradients go; choose a robot's sample")


def certify(found: Findings, file: Path) -> None:
    """Write what was measured, gradients and what moves what. Raises InputError as `refuse_uncertifiable`."""
    refuse_uncertifiable(found.sample)
    assert found.proof is not None and found.influence is not None

    subject = found.subject
    about = {
        "samples": [found.sample.where],
        "seed": found.seed,
        "parameters": subject.parameters,
        "influence": found.influence.to_json(),
    }

    # The outcome of all that was measured here, not of the gradients alone.
    proof = dataclasses.replace(found.proof, outcome=found.outcome, findings=tuple(found.faults))
    write_certificate(file, proof, subject.assets.config, about)


def summary(found: Findings) -> list[Table | str]:
    """What was measured, exact zeros as such, and what it shows: tables and lines to print."""
    lines: list[Table | str] = [f"insula {version('insula')}: {found.sample.where}"]
    if found.proof and found.influence:
        lines += [gradient_table(found.proof, found), influence_table(found.influence)]
        why = "" if found.shows_insulation or found.faults else ": this sample lacks one of the losses"
        lines += [f"insulation: {found.outcome}{why}", *found.faults]

    if found.subject.certified is not None:
        lines.append(f"certificate of this checkpoint: {found.subject.certified}")

    return lines


def gradient_table(proof: Proof, found: Findings) -> Table:
    """Norms by part and column, of the losses that the sample has."""
    # An angle between two losses needs both.
    titles = [column_title(loss, scheme) for loss, scheme in found.columns]
    both = ["cosine"] if found.shows_insulation else []
    shown = Table("part", *titles, *both, title="gradient norms", title_justify="left")

    for part, row in proof.table.items():
        norms = [exact_text(row[loss][scheme]) for loss, scheme in found.columns]
        cosine = proof.cosine.get(part)
        angle = "" if cosine is None else f"{cosine:+.2f}"
        shown.add_row(part, *norms, *([angle] if both else []))

    return shown


def influence_table(measured: Influence) -> Table:
    """The largest change that each changed input made."""
    shown = Table("changed", *Effect, title="largest change", title_justify="left")
    for change, moved in measured.table.items():
        shown.add_row(change.label, *(exact_text(moved[effect]) for effect in Effect))

    return shown
