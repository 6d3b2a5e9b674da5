"""All that the page shows of one sample, as plain values: the page's script reads exactly this."""

import base64
from typing import Any

import jax.numpy as jnp
import numpy as np

from insula.batch import Batch
from insula.certificate.proof import Proof
from insula.certificate.table import column_title
from insula.data.chunks import dim_names
from insula.data.images import encode_png
from insula.data.samples import Samples
from insula.errors import FASTRangeError
from insula.inspection.findings import Findings
from insula.inspection.influence import Effect, Influence
from insula.inspection.measure import DRAWS, EXPECTED_DRAWS, LOOK_TIMES, TIMES, SampleMeasures
from insula.inspection.plain import pack, rounded, rounded_rows
from insula.inspection.speech_view import show_scores, show_speech
from insula.inspection.token_columns import TokenColumns, form_of, read_chunk
from insula.inspection.variants import REASONS
from insula.model.config import ModelConfig
from insula.model.vision import resize
from insula.tokens.dialects import Form

TITLES: dict[Form | None, str] = {
    None: "question → answer",
    Form.FLAT: "task → actions",
    Form.SUBTASK: "task → subtask",
    Form.ACTIONS: "task + subtask → actions",
}
"""What each form of a sample is, for a person."""


def sample_view(found: Findings, sources: dict[str, int] | None = None) -> dict[str, Any]:
    """Plain JSON values. `sources`: how many samples each has, where there is a server to pick from them."""
    # The page's script has no copy of any rule: whatever it draws, and every sentence on it, is worked out here.
    subject, config = found.subject, found.subject.assets.config
    has_look = found.has_actions and subject.trained  # where random weights look says nothing

    return _show_sequence(found) | {
        "subject": {
            "name": subject.name,
            "model": config.name,
            "parameters": subject.parameters,
            "certified": subject.certified,
            "seed": found.seed,
        },
        "others": [_show_sequence(other) for other in found.others],
        "lacks_subtask": _lacks_subtask(found),
        "sources": sources,
        "cameras": _show_cameras(found.sample.batch, config),
        "gradients": found.proof and _show_gradients(found, found.proof),
        "influence": found.influence and _show_influence(found.influence),
        "look": found.measured and has_look and _show_look(found.measured, config),
        "outcome": found.outcome,
        "verdict": found.verdict,
        "faults": found.faults,
    }


def _show_sequence(found: Findings) -> dict[str, Any]:
    """What the page shows of every sequence of a frame, whichever was asked for."""
    sample, config = found.sample, found.subject.assets.config

    return {
        "about": {
            "title": TITLES[form_of(sample.source)],
            "sample": sample.where,
            "source": sample.name,
            "number": sample.number,
            "count": len(sample.source),
            "scored": int(found.seen.loss_mask.sum()),
            "real_steps": int(np.asarray(sample.batch.action_mask)[0].any(1).sum()),
            "cut": [config.num_image_tokens, len(found.seen.id)],  # where text begins, and where it ends
        },
        "tokens": _show_tokens(found.seen, config),
        "chunk": _show_chunk(found),
        "attention": _show_attention(found, config),
        "losses": found.measured and _show_losses(found, found.measured),
        "speech": show_speech(found),
    }


def _lacks_subtask(found: Findings) -> bool:
    """Whether the robot learns subtasks, and this frame has none."""
    robots = found.subject.forms_beside(found.sample.source)
    return not found.others and any(other.form.has_subtask for other in robots.values())


def _show_cameras(batch: Batch, config: ModelConfig) -> list[dict[str, Any]]:
    """As the model sees them: resized, padded, and cut into patches."""
    size = config.vision.image_size
    found = []

    for n, name in enumerate(config.cameras):
        # The model's own resizing, and back to gray levels: what is shown is what the encoder reads.
        pixels = np.asarray(resize(jnp.asarray(batch.observation.images[name][:1]), size))[0]
        image = np.clip(np.round((pixels + 1) * 127.5), 0, 255).astype(np.uint8)

        present = bool(np.asarray(batch.observation.image_mask[name])[0])
        png = base64.b64encode(encode_png(image)).decode("ascii")
        found.append(
            {
                "name": name,
                "present": present,
                "size": size,
                "grid": config.vision.grid,
                "first": n * config.vision.num_patches,
                "original": list(batch.observation.images[name].shape[1:3]),
                # What an absent camera holds is arbitrary, and no token of it is real.
                "png": f"data:image/png;base64,{png}" if present else None,
            }
        )

    return found


def _show_tokens(seen: TokenColumns, config: ModelConfig) -> list[dict[str, Any]]:
    """Every text column: what it holds, and its masks as 0 or 1."""
    return [
        {
            "column": n,
            "kind": seen.kind[n],
            "id": int(seen.id[n]),
            "text": seen.text[n],
            "position": int(seen.position[n]),
            **{mask: int(getattr(seen, mask)[n]) for mask in ("token_mask", "ar_mask", "loss_mask", "visible")},
        }
        for n in range(config.num_image_tokens, len(seen.id))
    ]


def _show_chunk(found: Findings) -> dict[str, Any] | None:
    """The chunk before and after its tokens, or why it has none. None for an answer in words."""
    source = found.sample.source
    if not isinstance(source, Samples) or source.form is Form.SUBTASK:
        return None

    assets = found.subject.assets
    try:
        seen = read_chunk(found.sample.batch, source.robot, found.seen, assets.tokenizer)
    except FASTRangeError as error:
        return {"invalid": f"because {error}"}

    # The policy answers in the model's sizes; the robot has the first of them.
    h, d = seen.actions.shape
    measured = found.measured
    policy = np.asarray(measured.flow.chunk)[:h, :d] if measured and found.subject.trained else None

    return {
        "names": dim_names(source.dataset, source.data.actions),
        "actions": rounded_rows(seen.actions),
        "action_mask": seen.action_mask.astype(int).tolist(),
        "decoded": None if seen.decoded is None else rounded_rows(seen.decoded),
        "invalid": seen.invalid,
        "error": None if seen.decoded is None else rounded(np.sqrt(np.mean((seen.decoded - seen.actions) ** 2))),
        "policy": None if policy is None else rounded_rows(policy),
        "coefficients": seen.coefficients.tolist(),
        "scale": seen.scale,
        "spans": {str(column): list(span) for column, span in seen.spans.items()},
    }


def _show_attention(found: Findings, config: ModelConfig) -> dict[str, Any]:
    # Every variant's cells are indices into `reasons`, which are sent once.
    return {
        "actions": found.expert_positions,
        "state_token": config.state_input == "token",
        "own": "joint" if config.objective.flow_reaches_backbone else "insulated",
        "reasons": [{"name": cell.name.lower(), **vars(reason)} for cell, reason in REASONS.items()],
        "variants": [{"name": drawn.name, "about": drawn.about, "cells": pack(drawn.cells)} for drawn in found.drawn],
    }


def _show_losses(found: Findings, measured: SampleMeasures) -> dict[str, Any]:
    scores, flow, config = measured.tokens, measured.flow, found.subject.assets.config
    action_mask = np.asarray(found.sample.batch.action_mask)[0]

    # A loss that the sample lacks counts as 0, as in training.
    valid = np.asarray(scores.valid)
    fast = float(np.asarray(scores.loss)[valid].mean()) if valid.any() else 0.0
    flow_loss = float(flow.loss) if found.has_actions else 0.0

    # Sums over what is scored, divided by how much that is: padded steps and dimensions hold 0.
    error = None
    if found.has_actions:
        steps, dims = action_mask.any(1), action_mask.any(0)
        error = {
            "times": list(TIMES),
            "draws": DRAWS,
            "steps": steps.astype(int).tolist(),
            "dims": dims.astype(int).tolist(),
            "by_step": rounded_rows(flow.error.sum(2) / np.maximum(action_mask.sum(1), 1)),
            "by_dim": rounded_rows(flow.error.sum(1) / np.maximum(action_mask.sum(0), 1)),
        }

    return {
        "tokens": show_scores(scores, found.subject.assets.tokenizer),
        "fast": rounded(fast),
        "flow": rounded(flow_loss),
        "flow_draws": EXPECTED_DRAWS,
        "weight": config.objective.ki_fast_loss_weight,
        "total": rounded(flow_loss + config.objective.ki_fast_loss_weight * fast),
        "horizon": config.horizon,
        "real_dims": int(action_mask.any(0).sum()),
        "action_dim": config.action_dim,
        "error": error,
    }


def _show_gradients(found: Findings, proof: Proof) -> dict[str, Any]:
    # All of the table, and which columns of it say something about this sample.
    columns = [{"loss": loss, "scheme": scheme, "title": column_title(loss, scheme)} for loss, scheme in found.columns]
    table = {
        part: {loss: {scheme: rounded(norm) for scheme, norm in norms.items()} for loss, norms in row.items()}
        for part, row in proof.table.items()
    }
    cosine = proof.cosine if found.shows_insulation else {}

    return {
        "columns": columns,
        "table": table,
        "cosine": {part: None if value is None else rounded(value, 3) for part, value in cosine.items()},
        "outcome": proof.outcome if found.shows_insulation else None,
    }


def _show_influence(measured: Influence) -> dict[str, Any]:
    """`rows[n].moved` lacks what the change has nothing to do with; None is a number that is not finite."""
    # An absent key and None are two things in JSON, which has no NaN.
    labels = [change.label for change in measured.table]
    rows = [
        {**row, "label": label, "moved": {effect: rounded(value) for effect, value in row["moved"].items()}}
        for label, row in zip(labels, measured.to_json(), strict=True)
    ]

    return {"effects": list(Effect), "rows": rows, "outcome": measured.outcome}


def _show_look(measured: SampleMeasures, config: ModelConfig) -> dict[str, Any]:
    return {"times": list(LOOK_TIMES), "memory": config.num_memory, "weights": pack(np.asarray(measured.look))}
