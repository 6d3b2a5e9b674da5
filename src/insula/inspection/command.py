"""What `insula inspect` does."""

from pathlib import Path

import jax
from rich.table import Table

from insula.certificate import SUFFIX, Proof, prove, write_certificate
from insula.inspection.subject import Subject
from insula.terminal import as_text

COLUMNS = {
    "flow": "flow",
    "flow_control": "flow, not insulated",
    "flow_embeddings": "flow, stopped at the embeddings only",
    "flow_frozen": "flow, backbone frozen",
    "fast": "token",
    "fast_control": "token, not insulated",
}


def certify(subject: Subject, number: int, source: str | None, seed: int, file: Path | None) -> Proof:
    """Measure where both losses' gradients go on one sample, under every scheme, and write it to `file`.

    Raises ValueError where the sample lacks an action or tokens, so that it can show nothing.
    """
    batch, where = subject.sample(number, source)
    if not batch.action_mask.any() or batch.loss_mask is None or not batch.loss_mask.any():
        lacks = "no action" if not batch.action_mask.any() else "no scored token"
        raise ValueError(f"{where} has {lacks}, so it cannot show where gradients go; choose a robot's sample")
    config = subject.assets.config
    proof = prove(subject.params, config, batch, jax.random.key(seed), tuple(SUFFIX))
    if file is not None:
        about = {"samples": [where], "seed": seed, "parameters": "trained" if subject.trained else "random"}
        write_certificate(file, proof, config, about)
    return proof


def table(proof: Proof) -> str:
    """Gradient norms of part and loss, exact zeros as such, and what they show."""
    shown = Table("part", *COLUMNS.values(), "cosine", title="gradient norms", title_justify="left")
    for part, row in proof.table.items():
        cosine = proof.cosine.get(part)
        norms = ["0 exactly" if row[name] == 0 else f"{row[name]:.3g}" for name in COLUMNS]
        shown.add_row(part, *norms, "" if cosine is None else f"{cosine:+.2f}")
    return as_text(shown, f"insulation: {proof.outcome}", *proof.findings, width=150)
