"""`certificate.json`: written beside the weights of a checkpoint, and read where one is shown.

A checkpoint of a run holds one, measured on the very weights beside it. The weights are saved first and certified
afterwards, so a checkpoint may be without one: `stored_certificate` then says so.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from insula.batch import LossName
from insula.certificate.proof import Outcome, Proof
from insula.certificate.table import Scheme
from insula.errors import InputError, InsulaError, MissingFileError
from insula.files import read_json, write_json
from insula.model.config import ModelConfig

FORMAT = 2
"""Layout of certificate.json. 2: `table[part][loss][scheme]`. 1 (it had no number): `table[part][loss_scheme]`."""


def write_certificate(path: Path, proof: Proof, config: ModelConfig, about: dict[str, Any]) -> None:
    """The proof, what the run was trained with, and `about`: step, samples, seed. Written whole or not at all."""
    # The settings that decide where gradients go. Measuring lifts them, so the file must say how training had them.
    names = ("knowledge_insulation", "gamma", "flow_gradient_end", "ki_fast_loss_weight", "freeze_backbone", "mistake")
    trained_with = {name: getattr(config.objective, name) for name in names}
    head = {"format": FORMAT, "insula": version("insula"), "model": config.name}

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, head | about | {"trained_with": trained_with} | proof.to_json())


def read_certificate(path: Path) -> dict[str, Any]:
    """What `write_certificate` wrote.

    Raises MissingFileError where there is none, and InputError where it is damaged or another version wrote it.
    """
    again = "measure it again: insula inspect --run RUN --certificate FILE.json"
    if not path.is_file():
        raise MissingFileError(f"{path}: not certified, there is no such file; {again}")

    # A run of an older version is no damage: it is named as such, with what to do.
    written = read_json(path, "outcome", "findings", "table")
    if (found := written.get("format", 1)) != FORMAT:
        age = "an older" if isinstance(found, int) and found < FORMAT else "another"
        raise InputError(f"{path}: written by {age} version of insula (format {found}, expected {FORMAT}); {again}")

    _refuse_damaged(path, written)
    return written


def _refuse_damaged(path: Path, written: dict[str, Any]) -> None:
    """Raises InputError where a reader would stumble: over the outcome, the findings, or an entry of the table."""
    if written["outcome"] not in list(Outcome):
        raise InputError(f"{path}: outcome is {written['outcome']!r:.80}, expected one of {', '.join(Outcome)}")

    if not isinstance(written["findings"], list):
        raise InputError(f"{path}: findings is {written['findings']!r:.80}, expected a list of lines")

    table = written["table"]
    if not isinstance(table, dict) or not table:
        raise InputError(f"{path}: the table is {table!r:.80}, expected a row for each part of the model")

    for part, row in table.items():
        if not isinstance(row, dict) or not all(_is_norms(row.get(loss)) for loss in LossName):
            raise InputError(f"{path}: the table's {part!r} is {row!r:.80}, expected norms by loss and scheme")


def _is_norms(columns: Any) -> bool:
    # Another program may write 0 for 0.0: the same number in JSON.
    return isinstance(columns, dict) and all(
        scheme in list(Scheme) and isinstance(norm, int | float) for scheme, norm in columns.items()
    )


def stored_certificate(path: Path) -> dict[str, Any]:
    """`read_certificate`, or, where there is none to be read, one of outcome MISSING that says why: for pages that show
    any checkpoint, certified or not."""
    # No page should fail because a run was killed between saving and certifying, and none should say "holds" then.
    try:
        return read_certificate(path)
    except InsulaError as error:
        return {"outcome": Outcome.MISSING, "findings": [str(error)], "table": {}, "cosine": {}}
