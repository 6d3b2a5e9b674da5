"""What the page shows of what the backbone says, and of any scored token, as plain values."""

from itertools import takewhile
from typing import Any

import numpy as np

from insula.inspection.findings import Findings
from insula.inspection.measure import TokenScores
from insula.inspection.plain import rounded, rounded_rows
from insula.inspection.speech import Speech, Utterance, teaches_backbone
from insula.inspection.token_columns import ColumnKind, text_pieces, token_text
from insula.tokens.sequence import FASTTokenizer


def show_scores(scores: TokenScores, tokenizer: FASTTokenizer) -> list[dict[str, Any]]:
    """Each scored token: what it cost, and the likeliest in its place."""
    return [
        {
            "column": int(scores.column[n]),
            "loss": rounded(scores.loss[n]),
            "probability": rounded(scores.probability[n]),
            "top": [
                {"id": int(i), "text": token_text(int(i), tokenizer), "probability": rounded(p)}
                for i, p in zip(scores.likeliest[n], scores.likelihood[n], strict=True)
            ],
        }
        for n in np.flatnonzero(scores.valid)
    ]


def show_speech(found: Findings) -> dict[str, Any]:
    """What was said beside what is true, or `missing`: why nothing was."""
    speech, seen = found.speech, found.seen
    if speech is None:
        return {"missing": _why_silent(found)}

    # Of an action the truth is the recorded chunk, which the page has already.
    answer = seen.where(ColumnKind.ANSWER)
    truth = found.subject.assets.tokenizer.text_from(seen.id[answer]) if len(answer) else None
    free, bound = _show_utterance(found, speech.free), speech.bound and _show_utterance(found, speech.bound)

    return {
        "truth": truth,
        "right": free["ended"] and free["text"] == truth,
        "free": free,
        "bound": bound,
        "unbound": speech.unbound,
        "alike": speech.bound is not None and speech.bound.tokens == speech.free.tokens,
        "common": _common_tokens(speech),
    }


def _why_silent(found: Findings) -> str:
    subject = found.subject
    if subject.params is None:
        return "the model was not run"
    if not subject.trained:
        return "random weights have learned to say nothing; needs a trained model: --run RUN"

    assert not teaches_backbone(found.sample)
    return "this robot learns from the flow loss alone, so its actions teach the backbone nothing to say"


def _common_tokens(speech: Speech) -> int | None:
    """With how many of the same tokens both begin, free and bound; None where nothing was said bound."""
    if speech.bound is None:
        return None

    pairs = zip(speech.free.tokens, speech.bound.tokens, strict=False)  # one may be longer
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _show_utterance(found: Findings, said: Utterance) -> dict[str, Any]:
    tokenizer = found.subject.assets.tokenizer
    if said.chunk is None:
        pieces = text_pieces(np.array(said.tokens), np.ones(len(said.tokens), bool), tokenizer)
    else:
        # One by one: where FAST ids lie over rare words, an action is no text.
        pieces = [token_text(token, tokenizer) for token in said.tokens]
    tokens = zip(said.tokens, pieces, show_scores(said.scores, tokenizer), strict=True)

    shown = {
        "tokens": [{"id": token, "text": text, **scored} for token, text, scored in tokens],
        "text": tokenizer.text_from(said.tokens),
        "ended": said.ended,
        "chunk": None,
        "invalid": None,
        "error": None,
    }
    if said.chunk is None or said.chunk.actions is None:
        return shown | {"invalid": said.chunk and said.chunk.invalid}

    h, d = said.chunk.actions.shape
    recorded = np.asarray(found.sample.batch.actions)[0, :h, :d]
    error = np.sqrt(np.mean((said.chunk.actions - recorded) ** 2))
    return shown | {"chunk": rounded_rows(said.chunk.actions), "error": rounded(error)}
