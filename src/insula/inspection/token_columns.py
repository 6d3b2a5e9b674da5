"""Every column of one sample's sequence: what it is, where it stands, and its four masks; and its chunk of actions,
as written in FAST tokens and read back."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from insula.batch import Batch
from insula.data.mixture import SampleSource
from insula.data.robot import Robot
from insula.data.samples import Samples
from insula.errors import TokenBudgetError
from insula.model.backbone import column_masks
from insula.model.config import ModelConfig
from insula.shapes import Bool, Float, Int
from insula.tokens import masks
from insula.tokens.dialects import Form
from insula.tokens.sequence import FASTTokenizer


class ColumnKind(enum.StrEnum):
    """What a column holds. The page's style sheet has a color for each."""

    IMAGE = "image"
    ABSENT = "absent"
    """A patch of a camera that this sample lacks."""
    BOS = "BOS"
    PROMPT = "prompt"
    """The dialect's words and the instruction; in some dialects also a few words before the FAST tokens."""
    STATE = "state"
    FAST = "FAST"
    STOP = "end"
    """The token that ends the FAST tokens."""
    ANSWER = "answer"
    """In words: of a question, or a subtask."""
    EOS = "EOS"
    PADDING = "padding"


@dataclass(frozen=True, eq=False)
class TokenColumns:
    """All image tokens, then all text tokens: T columns.

    `id` is the token, −1 of an image; `text` what it says, "" of an image; `position` rotary. The masks are the model's
    own: `token_mask` real, `ar_mask` starts a causal step, `loss_mask` scored by the token loss, `visible` to the
    action expert.
    """

    kind: list[ColumnKind]
    id: Int[np.ndarray, "T"]
    text: list[str]
    position: Int[np.ndarray, "T"]
    token_mask: Bool[np.ndarray, "T"]
    ar_mask: Bool[np.ndarray, "T"]
    loss_mask: Bool[np.ndarray, "T"]
    visible: Bool[np.ndarray, "T"]

    def where(self, *kinds: ColumnKind) -> Int[np.ndarray, "n"]:
        """The columns of these kinds, in order."""
        return np.flatnonzero([kind in kinds for kind in self.kind])


def lay_out_columns(batch: Batch, config: ModelConfig, tokenizer: FASTTokenizer, form: Form | None) -> TokenColumns:
    """The columns of a batch of one, masked by the functions the model calls. `form`: None of a question."""
    # Not masks worked out here: the page would then show what they should be, and hide what they are.
    observation, images = batch.observation, config.num_image_tokens
    assert observation.tokens is not None and batch.loss_mask is not None

    tokens_real, starts = column_masks(config, observation, batch.ar_mask)
    token_mask, ar_mask = np.asarray(tokens_real)[0], np.asarray(starts)[0]

    ids = np.asarray(observation.tokens)[0].astype(np.int64)
    text = text_pieces(ids, token_mask[images:], tokenizer)
    kinds = [ColumnKind.IMAGE if there else ColumnKind.ABSENT for there in token_mask[:images]]
    kinds += _text_kinds(ids, text, token_mask[images:], ar_mask[images:], tokenizer, form)

    return TokenColumns(
        kind=kinds,
        id=np.concatenate([np.full(images, -1), ids]),
        text=[""] * images + text,
        position=np.asarray(masks.positions(tokens_real))[0],
        token_mask=token_mask,
        ar_mask=ar_mask,
        loss_mask=np.concatenate([np.zeros(images, bool), np.asarray(batch.loss_mask, bool)[0]]),
        visible=np.asarray(masks.visible_to_expert(tokens_real, starts))[0],
    )


def token_text(token: int, tokenizer: FASTTokenizer) -> str:
    """What a single token of the vocabulary says, for a person."""
    # Asked first: in text these three are written as nothing.
    text = tokenizer.text
    control = {text.bos_id: "<bos>", text.eos_id: "<eos>", text.pad_id: "<pad>"}
    if token in control:
        return control[token]

    # Before text: where FAST ids lie over rare words, the sequence means the action.
    fast = tokenizer.fast_last_id - token
    if 0 <= fast < tokenizer.fast.vocab_size:
        return f"FAST\u202f{fast}"  # a narrow space that does not break

    return tokenizer.text_from([token])


def text_pieces(ids: np.ndarray, token_mask: np.ndarray, tokenizer: FASTTokenizer) -> list[str]:
    """What each token adds to the text before it."""
    text, pieces = tokenizer.text, []
    run: list[int] = []

    for token, is_real in zip(ids.tolist(), token_mask.tolist(), strict=True):
        is_control = token in (text.bos_id, text.eos_id, text.pad_id) or not is_real
        if is_control or not 0 <= token < text.vocab_size:
            # What comes after one of these is a text of its own, with nothing before its first piece.
            pieces.append(token_text(token, tokenizer) if is_real else "")
            run = []
            continue

        # A token decoded alone would lose its leading space, and half a character would become a question mark.
        before = text.decode(run)
        run.append(token)
        pieces.append(text.decode(run)[len(before) :])

    return pieces


def _text_kinds(
    ids: np.ndarray,
    pieces: Sequence[str],
    token_mask: np.ndarray,
    ar_mask: np.ndarray,
    tokenizer: FASTTokenizer,
    form: Form | None,
) -> list[ColumnKind]:
    """One kind for each text column."""
    prefix = token_mask & ~np.asarray(masks.is_suffix(ar_mask))

    # The state has no tokens of its own kind: it is digits in the prompt, found by where the dialect writes them.
    written = "".join(piece for piece, is_real in zip(pieces[1:], prefix[1:], strict=True) if is_real)
    state = None if form is None else tokenizer.dialect.state_span(written)

    kinds = []
    stop = 0  # where in `written` the piece at hand ends
    for column, token in enumerate(ids.tolist()):
        if not token_mask[column]:
            kinds.append(ColumnKind.PADDING)
        elif column == 0:
            kinds.append(ColumnKind.BOS)
        elif prefix[column]:
            start, stop = stop, stop + len(pieces[column])
            # By overlap: a token may hold a digit of the state and the comma after it. A space alone is not the
            # state's.
            in_state = state is not None and pieces[column].strip() and start < state[1] and stop > state[0]
            kinds.append(ColumnKind.STATE if in_state else ColumnKind.PROMPT)
        else:
            kinds.append(_suffix_kind(token, tokenizer, form))

    return kinds


def _suffix_kind(token: int, tokenizer: FASTTokenizer, form: Form | None) -> ColumnKind:
    if token == tokenizer.text.eos_id:
        return ColumnKind.EOS

    # An answer is text, and may hold a "|" or a word that lies where FAST ids do.
    if form in (None, Form.SUBTASK):
        return ColumnKind.ANSWER
    if 0 <= tokenizer.fast_last_id - token < tokenizer.fast.vocab_size:
        return ColumnKind.FAST

    return ColumnKind.STOP if token == tokenizer.stop_id else ColumnKind.PROMPT


@dataclass(frozen=True, eq=False)
class SampleChunk:
    """A chunk of the robot's own sizes, normalized; its rounded DCT coefficients; and what its tokens decode to, or why
    they do not. `action_mask` is False past the end of the episode. `spans`: for each
    FAST column, the coefficients [start, stop) it carries."""

    actions: Float[np.ndarray, "steps dims"]
    action_mask: Bool[np.ndarray, "steps dims"]
    coefficients: np.ndarray
    scale: float
    decoded: np.ndarray | None
    invalid: str | None
    spans: dict[int, tuple[int, int]]


def read_chunk(batch: Batch, robot: Robot, seen: TokenColumns, tokenizer: FASTTokenizer) -> SampleChunk:
    """Of a batch of one, of that robot. Raises FASTRangeError where the codec cannot write the chunk."""
    # The robot's own steps and dimensions come first; the rest of the model's is padding.
    h, d = robot.horizon, robot.action_dim
    actions = np.asarray(batch.actions)[0, :h, :d]

    # Read back from the sample's own tokens, as generated ones would be, and not encoded again.
    columns = seen.where(ColumnKind.FAST)
    written = seen.id[seen.where(ColumnKind.FAST, ColumnKind.STOP)].tolist()
    decoded = tokenizer.actions_from(written, h, d) if len(columns) else None
    fast_ids = [tokenizer.fast_last_id - int(token) for token in seen.id[columns]]

    return SampleChunk(
        actions=actions,
        action_mask=np.asarray(batch.action_mask)[0, :h, :d],
        coefficients=tokenizer.fast.coefficients(actions),
        scale=tokenizer.fast.scale,
        decoded=decoded.actions if decoded else None,
        invalid=decoded.invalid if decoded else _why_no_tokens(actions, tokenizer),
        spans=dict(zip(columns.tolist(), tokenizer.fast.spans(fast_ids), strict=True)),
    )


def _why_no_tokens(actions: np.ndarray, tokenizer: FASTTokenizer) -> str:
    # Without FAST tokens the sample itself no longer says why: writing its chunk again does. An empty prompt, because
    # only the action's own length is asked for.
    try:
        tokenizer.tokenize("", None, actions)
    except TokenBudgetError as error:
        return f"because {error}"

    return "because its robot learns from the flow loss alone"


def form_of(source: SampleSource) -> Form | None:
    """Of the samples of a robot; None of questions."""
    return source.form if isinstance(source, Samples) else None
