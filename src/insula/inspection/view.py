"""All that the page shows of one sample, as plain values: the page's script reads exactly this."""

import base64
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from insula.batch import Batch
from insula.certificate import LOSSES, Proof
from insula.data.chunks import dim_names
from insula.data.images import encode_png
from insula.data.samples import Samples
from insula.errors import FASTRangeError
from insula.inspection.findings import Findings
from insula.inspection.measure import DRAWS, EXPECTED_DRAWS, LOOK_TIMES, TIMES, SampleMeasures
from insula.inspection.token_columns import Chunk, TokenColumns, chunk, token_text
from insula.inspection.variants import REASONS
from insula.model.config import ModelConfig
from insula.model.vision import resize


def view(found: Findings, sources: dict[str, int] | None = None) -> dict[str, Any]:
    """Plain JSON values. `sources`: of the sample picker, where there is a server to pick for."""
    subject, sample, config = found.subject, found.sample, found.subject.assets.config
    return {
        "about": {
            "subject": subject.name,
            "model": config.name,
            "parameters": subject.parameters,
            "sample": sample.where,
            "source": sample.name,
            "number": sample.number,
            "count": len(sample.source),
            "seed": found.seed,
            "fast_weight": config.objective.ki_fast_loss_weight,
            "scored": int(found.seen.loss_mask.sum()),
            "real_steps": int(np.asarray(sample.batch.action_mask)[0].any(1).sum()),
            "cut": [config.num_image_tokens, len(found.seen.id)],
        },
        "sources": sources,
        "cameras": _cameras(sample.batch, config),
        "tokens": _tokens(found.seen, config),
        "chunk": _chunk(found),
        "attention": _attention(found, config),
        "losses": found.measured and _losses(found, found.measured),
        "gradients": found.proof and _gradients(found, found.proof),
        "influence": found.influence and {"table": found.influence.table, "outcome": found.influence.outcome},
        "look": found.measured and found.has_actions and subject.trained and _look(found.measured, config),
        "outcome": found.outcome,
        "faults": found.faults,
    }


def pack(array: np.ndarray) -> dict[str, Any]:
    """Deflated, in base64: masks of a million cells take a few kilobytes. float32 keeps four digits."""
    if array.dtype.kind == "f":
        whole = np.ascontiguousarray(array, np.float32).view(np.uint32)
        array = (whole & np.uint32(0xFFFFE000)).view(np.float32)
    assert array.dtype in (np.uint8, np.float32)
    raw = zlib.compress(np.ascontiguousarray(array).tobytes(), 9)
    return {"dtype": str(array.dtype), "shape": array.shape, "data": base64.b64encode(raw).decode("ascii")}


def _number(value: Any, digits: int = 5) -> float | None:
    """JSON has no NaN; a page has no use for sixteen digits."""
    return float(f"{float(value):.{digits}g}") if np.isfinite(value) else None


def _numbers(array: np.ndarray) -> Any:
    """Of any rank, as nested lists."""
    return [_numbers(row) if row.ndim else _number(row) for row in array]


def _cameras(batch: Batch, config: ModelConfig) -> list[dict[str, Any]]:
    """As the model sees them: resized, padded, and cut into patches."""
    size, found = config.vision.image_size, []
    for n, name in enumerate(config.cameras):
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
                "png": f"data:image/png;base64,{png}" if present else None,
            }
        )
    return found


def _tokens(seen: TokenColumns, config: ModelConfig) -> list[dict[str, Any]]:
    """Text columns, up to the last real one and the first few of padding; `hidden` columns of padding follow."""
    return [
        {
            "column": n,
            "part": seen.part[n],
            "id": int(seen.id[n]),
            "text": seen.text[n],
            "position": int(seen.position[n]),
            **{mask: int(getattr(seen, mask)[n]) for mask in ("token_mask", "ar_mask", "loss_mask", "visible")},
        }
        for n in range(config.num_image_tokens, len(seen.id))
    ]


def _chunk(found: Findings) -> dict[str, Any] | None:
    source = found.sample.source
    if not isinstance(source, Samples):
        return None
    assets = found.subject.assets
    try:
        seen: Chunk = chunk(found.sample.batch, source.robot, found.seen, assets.tokenizer)
    except FASTRangeError as error:
        return {"invalid": f"because {error}"}
    h, d = seen.actions.shape
    measured = found.measured
    return {
        "names": dim_names(source.dataset, source.data.actions),
        "actions": _numbers(seen.actions),
        "real": seen.real.astype(int).tolist(),
        "decoded": None if seen.decoded is None else _numbers(seen.decoded),
        "invalid": seen.invalid,
        "error": None if seen.decoded is None else _number(np.sqrt(np.mean((seen.decoded - seen.actions) ** 2))),
        "policy": _numbers(np.asarray(measured.flow.chunk)[:h, :d]) if measured and found.subject.trained else None,
        "coefficients": seen.coefficients.tolist(),
        "scale": seen.scale,
        "spans": {str(column): list(span) for column, span in seen.spans.items()},
    }


def _attention(found: Findings, config: ModelConfig) -> dict[str, Any]:
    return {
        "actions": found.expert_positions,
        "state_token": config.state_input == "token",
        "own": "joint" if config.objective.flow_reaches_backbone else "insulated",
        "reasons": [{"name": name, "on": on, "why": why} for name, on, why in REASONS],
        "variants": [{"name": v.name, "about": v.about, "codes": pack(v.codes)} for v in found.drawn],
    }


def _losses(found: Findings, measured: SampleMeasures) -> dict[str, Any]:
    scores, flow, batch = measured.tokens, measured.flow, found.sample.batch
    tokenizer, config = found.subject.assets.tokenizer, found.subject.assets.config
    used = np.asarray(scores.used)
    fast = float(np.asarray(scores.loss)[used].mean()) if used.any() else 0.0
    real = np.asarray(batch.action_mask)[0]
    flow_loss = float(flow.loss) if found.has_actions else 0.0
    tokens = [
        {
            "column": int(scores.column[n]),
            "loss": _number(scores.loss[n]),
            "probability": _number(scores.probability[n]),
            "top": [
                {"id": int(i), "text": token_text(int(i), tokenizer), "probability": _number(p)}
                for i, p in zip(scores.likeliest[n], scores.likelihood[n], strict=True)
            ],
        }
        for n in np.flatnonzero(used)
    ]
    error = None
    if found.has_actions:
        steps, dims = real.any(1), real.any(0)
        error = {
            "times": list(TIMES),
            "draws": DRAWS,
            "steps": steps.astype(int).tolist(),
            "dims": dims.astype(int).tolist(),
            "by_step": _numbers(flow.error.sum(2) / np.maximum(real.sum(1), 1)),
            "by_dim": _numbers(flow.error.sum(1) / np.maximum(real.sum(0), 1)),
        }
    return {
        "tokens": tokens,
        "fast": _number(fast),
        "flow": _number(flow_loss),
        "flow_draws": EXPECTED_DRAWS,
        "weight": config.objective.ki_fast_loss_weight,
        "total": _number(flow_loss + config.objective.ki_fast_loss_weight * fast),
        "horizon": config.horizon,
        "real_dims": int(real.any(0).sum()),
        "action_dim": config.action_dim,
        "error": error,
    }


def _gradients(found: Findings, proof: Proof) -> dict[str, Any]:
    """Losses the sample does not have are left out: their zeros would say nothing."""
    there = dict(zip(LOSSES, (found.has_actions, found.has_answer), strict=True))
    table = {
        part: {name: _number(norm) for name, norm in row.items() if there[name.split("_")[0]]}
        for part, row in proof.table.items()
    }
    both = found.shows_insulation
    return {
        "table": table,
        "cosine": {part: None if value is None else _number(value, 3) for part, value in proof.cosine.items()}
        if both
        else {},
        "outcome": proof.outcome if both else None,
    }


def _look(measured: SampleMeasures, config: ModelConfig) -> dict[str, Any]:
    return {"times": list(LOOK_TIMES), "memory": config.num_memory, "weights": pack(np.asarray(measured.look))}
