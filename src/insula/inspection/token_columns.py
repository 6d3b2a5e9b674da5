"""Every column of one sample's sequence: what it is, where it stands, and its four masks; and its chunk of actions,
as written in FAST tokens and read back."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from insula.batch import Batch
from insula.data.questions import QuestionSamples
from insula.data.robot import Robot
from insula.errors import TokenBudgetError
from insula.model.backbone import column_masks
from insula.model.config import ModelConfig
from insula.tokens import masks
from insula.tokens.sequence import FASTTokenizer


@dataclass(frozen=True, eq=False)
class TokenColumns:
    """[T] each: all image tokens, then all text tokens.

    part: "image", "absent" (a camera this sample lacks), "BOS", "prompt", "state", "FAST", "end" (the stop after the
    FAST tokens), "answer", "EOS" or "padding". id: the token, −1 of an image. text: what it says, "" of an image.
    position: rotary. The masks are the model's own: `token_mask` real, `ar_mask` starts a causal step, `loss_mask`
    scored by the token loss, `visible` to the action expert.
    """

    part: list[str]
    id: np.ndarray
    text: list[str]
    position: np.ndarray
    token_mask: np.ndarray
    ar_mask: np.ndarray
    loss_mask: np.ndarray
    visible: np.ndarray

    def where(self, *parts: str) -> np.ndarray:
        """TokenColumns of these parts."""
        return np.flatnonzero(np.isin(self.part, parts))


def columns(batch: Batch, config: ModelConfig, tokenizer: FASTTokenizer, is_question: bool) -> TokenColumns:
    """Of a batch of one."""
    real, ar = column_masks(config, batch.observation, batch.ar_mask)
    images = config.num_image_tokens
    assert batch.observation.tokens is not None and batch.loss_mask is not None
    ids = np.asarray(batch.observation.tokens)[0].astype(np.int64)
    token_mask, ar_mask = np.asarray(real)[0], np.asarray(ar)[0]
    text = _pieces(ids, token_mask[images:], tokenizer)
    parts = ["image" if there else "absent" for there in token_mask[:images]]
    parts += _parts(ids, text, token_mask[images:], ar_mask[images:], tokenizer, is_question)
    return TokenColumns(
        part=parts,
        id=np.concatenate([np.full(images, -1), ids]),
        text=[""] * images + text,
        position=np.asarray(masks.positions(real))[0],
        token_mask=token_mask,
        ar_mask=ar_mask,
        loss_mask=np.concatenate([np.zeros(images, bool), np.asarray(batch.loss_mask, bool)[0]]),
        visible=np.asarray(masks.visible_to_expert(real, ar))[0],
    )


def token_text(token: int, tokenizer: FASTTokenizer) -> str:
    """What a single token of the vocabulary says, for a person."""
    text = tokenizer.text
    control = {text.bos_id: "<bos>", text.eos_id: "<eos>", text.pad_id: "<pad>"}
    if token in control:
        return control[token]
    fast = tokenizer.fast_last_id - token
    if 0 <= fast < tokenizer.fast.vocab_size:
        return f"FAST\u202f{fast}"
    return tokenizer.text_from([token])


def _pieces(ids: np.ndarray, real: np.ndarray, tokenizer: FASTTokenizer) -> list[str]:
    """What each token adds to the text before it: a piece alone would lose its leading space."""
    text, pieces = tokenizer.text, []
    run: list[int] = []
    for token, there in zip(ids.tolist(), real.tolist(), strict=True):
        control = token in (text.bos_id, text.eos_id, text.pad_id) or not there
        if control or not 0 <= token < text.vocab_size:
            pieces.append("" if not there else token_text(token, tokenizer))
            run = []
            continue
        before = text.decode(run)
        run.append(token)
        pieces.append(text.decode(run)[len(before) :])
    return pieces


def _parts(
    ids: np.ndarray, pieces: Sequence[str], real: np.ndarray, ar: np.ndarray, tokenizer: FASTTokenizer, question: bool
) -> list[str]:
    prefix = real & ~np.asarray(masks.is_suffix(ar))
    written = "".join(piece for piece, there in zip(pieces[1:], prefix[1:], strict=True) if there)
    span = None if question else tokenizer.dialect.state_span(written)
    parts, done = [], 0
    for n, (token, there) in enumerate(zip(ids.tolist(), real.tolist(), strict=True)):
        if not there:
            parts.append("padding")
        elif n == 0:
            parts.append("BOS")
        elif prefix[n]:
            start, done = done, done + len(pieces[n])
            inside = span is not None and pieces[n].strip() and start < span[1] and done > span[0]
            parts.append("state" if inside else "prompt")
        elif token == tokenizer.text.eos_id:
            parts.append("EOS")
        elif not question and 0 <= tokenizer.fast_last_id - token < tokenizer.fast.vocab_size:
            parts.append("FAST")
        elif not question and token == tokenizer.stop_id:
            parts.append("end")
        else:
            parts.append("answer" if question else "prompt")  # the action's head, in a dialect that has one
    return parts


@dataclass(frozen=True, eq=False)
class Chunk:
    """Normalized actions [h, d] of the robot's own sizes, their rounded DCT coefficients, what the tokens decode to, or
    why they do not. `spans`: for each FAST column, the coefficients [start, stop) it carries."""

    actions: np.ndarray
    real: np.ndarray
    coefficients: np.ndarray
    scale: float
    decoded: np.ndarray | None
    invalid: str | None
    spans: dict[int, tuple[int, int]]


def chunk(batch: Batch, robot: Robot, seen: TokenColumns, tokenizer: FASTTokenizer) -> Chunk:
    """Of a batch of one, of that robot. Raises FASTRangeError where the codec cannot write the chunk."""
    h, d = robot.horizon, robot.action_dim
    actions = np.asarray(batch.actions)[0, :h, :d]
    at = seen.where("FAST")
    ids = [tokenizer.fast_last_id - int(i) for i in seen.id[at]]
    decoded = tokenizer.actions_from(seen.id[seen.where("FAST", "end")].tolist(), h, d) if len(at) else None
    invalid = decoded.invalid if decoded else _why_none(actions, tokenizer)
    return Chunk(
        actions=actions,
        real=np.asarray(batch.action_mask)[0, :h, :d],
        coefficients=tokenizer.fast.coefficients(actions),
        scale=tokenizer.fast.scale,
        decoded=None if decoded is None else decoded.actions,
        invalid=invalid,
        spans=dict(zip(at.tolist(), tokenizer.fast.spans(ids), strict=True)),
    )


def _why_none(actions: np.ndarray, tokenizer: FASTTokenizer) -> str:
    try:
        tokenizer.tokenize("", None, actions)
    except TokenBudgetError as error:
        return f"because {error}"
    return "because its robot learns from the flow loss alone"


def is_question(source: object) -> bool:
    return isinstance(source, QuestionSamples)
