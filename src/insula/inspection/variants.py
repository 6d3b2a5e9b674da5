"""Who may look at whom: the model's own attention mask, and how others draw it, each cell with its reason.

         keys     i i p f f f | a a
queries  i p f    make_attn_mask  | never
         a        visible to it   | suffix mask
"""

import enum
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from insula.model.config import ModelConfig
from insula.shapes import Bool, UInt8
from insula.tokens import masks


class Cell(enum.IntEnum):
    """What a cell of the attention matrix is, in this model or in another's. `REASONS` says why."""

    # The numbers are what a page holds, one byte a cell.
    PADDING = 0
    BLOCK = 1
    BLIND = 2
    READS = 3
    PAST = 4
    FUTURE = 5
    APART = 6
    INSULATED = 7
    HIDDEN = 8
    CHUNK = 9
    STATE = 10
    FIRST = 11
    JOINT = 12
    ONE_MODEL = 13
    ANSWER = 14
    COPY = 15
    UNLIKE = 16
    BLOCKED = 17
    TOLD = 18


@dataclass(frozen=True)
class Reason:
    """Whether a cell is on, and why. `leak`: it is on and must not be. `withheld`: it is off so that nobody sees the
    answer too early, which the page draws apart from what has nothing to see."""

    on: bool
    why: str
    leak: bool = False
    withheld: bool = False


REASONS: dict[Cell, Reason] = {
    Cell.PADDING: Reason(False, "padding or an absent camera: it neither sees nor is seen"),
    Cell.BLOCK: Reason(True, "bidirectional block: images and prompt all see each other"),
    Cell.BLIND: Reason(False, "causal: images and prompt do not see the tokens that answer them", withheld=True),
    Cell.READS: Reason(True, "causal: what is to be predicted reads all of images and prompt"),
    Cell.PAST: Reason(True, "causal: an earlier token of the answer, or itself"),
    Cell.FUTURE: Reason(
        False, "causal: a later token of the answer, which is not yet predicted when this one is", withheld=True
    ),
    Cell.APART: Reason(False, "the backbone never sees the action expert"),
    Cell.INSULATED: Reason(True, "insulated: the expert reads this key and value, and no gradient comes back"),
    Cell.HIDDEN: Reason(False, "FAST hidden from the expert: the same actions in another script", withheld=True),
    Cell.CHUNK: Reason(True, "bidirectional block: the action tokens of one chunk all see each other"),
    Cell.STATE: Reason(True, "the action tokens see the state's token"),
    Cell.FIRST: Reason(False, "the state's token comes first and does not see the actions"),
    Cell.JOINT: Reason(
        True, "not insulated: the expert reads this key and value, and its gradient flows into the backbone"
    ),
    Cell.ONE_MODEL: Reason(True, "one sequence: the FAST tokens come after the noisy actions and read them"),
    Cell.ANSWER: Reason(True, "the expert reads ground-truth FAST tokens, which serving does not have", leak=True),
    Cell.COPY: Reason(True, "FAST tokens see later ones, so the backbone copies what it is to predict", leak=True),
    Cell.UNLIKE: Reason(True, "the model's mask is on where it must be off", leak=True),
    Cell.BLOCKED: Reason(False, "the model's mask is off where it must be on"),
    Cell.TOLD: Reason(True, "images and prompt see the ground truth, and whatever reads them reads it too", leak=True),
}
IS_ON = np.array([REASONS[cell].on for cell in Cell])
"""`IS_ON[cells]` is a mask."""


@dataclass(frozen=True, eq=False)
class MaskVariant:
    """One way to mask: `cells[q, k]` is a `Cell`, over the columns of the backbone and then the expert's positions."""

    name: str
    about: str
    cells: UInt8[np.ndarray, "queries keys"]

    def faults(self) -> list[tuple[int, int]]:
        """Cells (query, key) where the model's mask is not as it must be."""
        # The leaky variant's mistakes are another model's and have kinds of their own.
        wrong = np.isin(self.cells, (Cell.UNLIKE, Cell.BLOCKED))
        return [(int(q), int(k)) for q, k in np.argwhere(wrong)]


def draw_variants(config: ModelConfig, token_mask: np.ndarray, ar_mask: np.ndarray, actions: int) -> list[MaskVariant]:
    """insulated (the model), joint, HybridVLA-like and leaky, for columns of `token_mask` and `ar_mask` [T].
    `actions`: positions of the expert, 0 without actions.

    The reasons are derived here a second time, cell by cell; where the model's mask is another, that is the reason.
    """
    # Twice, by other code: a mask that explained itself could never be found wrong.
    reasons = _reasons(config, token_mask, ar_mask, actions)
    mask = model_mask(config, token_mask, ar_mask, actions)
    ours = np.where(mask & ~IS_ON[reasons], Cell.UNLIKE, np.where(~mask & IS_ON[reasons], Cell.BLOCKED, reasons))

    columns = len(token_mask)
    is_answer = np.zeros(len(ours), bool)
    is_answer[:columns] = token_mask & np.asarray(masks.is_suffix(ar_mask))
    is_expert = np.arange(len(ours)) >= columns

    # Joint training changes no cell, only what comes back through them; HybridVLA (arXiv 2503.10631) also opens some.
    joint = np.where(ours == Cell.INSULATED, Cell.JOINT, ours)
    hybrid = np.where(is_answer[:, None] & is_expert, Cell.ONE_MODEL, joint)

    # Each mistake of the leaky one opens cells that are closed in ours.
    leaky = np.where(is_expert[:, None] & is_answer, Cell.ANSWER, ours)
    leaky = np.where(leaky == Cell.FUTURE, Cell.COPY, leaky)
    leaky = np.where(leaky == Cell.BLIND, Cell.TOLD, leaky)

    drawn = (
        (
            "insulated",
            "π0.5 + KI: the expert reads images and prompt through a stop-gradient, and never a FAST token.",
            ours,
        ),
        (
            "joint",
            "FAST and flow trained jointly: the same cells, but the flow loss reaches all of the backbone.",
            joint,
        ),
        (
            "HybridVLA-like",
            "One model, one sequence: noisy actions come before the tokens, which read them; no insulation.",
            hybrid,
        ),
        (
            "leaky",
            "Two mistakes: FAST tokens in a bidirectional block, and visible to the expert. Training looks splendid.",
            leaky,
        ),
    )
    return [MaskVariant(name, about, cells.astype(np.uint8)) for name, about, cells in drawn]


def model_mask(
    config: ModelConfig, token_mask: np.ndarray, ar_mask: np.ndarray, actions: int
) -> Bool[np.ndarray, "queries keys"]:
    """The mask of the model: T columns of the backbone, then `actions` of the expert, from the very functions that the
    model calls."""
    columns = len(token_mask)
    batched = jnp.asarray(token_mask)[None], jnp.asarray(ar_mask)[None]

    # The upper right stays False: the backbone has run before the expert does.
    mask = np.zeros((columns + actions,) * 2, bool)
    mask[:columns, :columns] = masks.make_attn_mask(*batched)[0]

    # Columns past the memory are not masked for the expert, they are not there.
    if actions:
        mask[columns:, : config.num_memory] = masks.visible_to_expert(*batched)[0, : config.num_memory]
        mask[columns:, columns:] = _mask_among_actions(config, actions)

    return mask


def _mask_among_actions(config: ModelConfig, actions: int) -> np.ndarray:
    # `actions` counts the state's token.
    has_state_token = config.state_input == "token"
    ar_mask = masks.suffix_ar_mask(actions - has_state_token, has_state_token)[None]
    return np.asarray(masks.make_attn_mask(jnp.ones_like(ar_mask), ar_mask))[0]


def _reasons(config: ModelConfig, token_mask: np.ndarray, ar_mask: np.ndarray, actions: int) -> np.ndarray:
    """What each cell must be. Only what is the answer is asked of `masks`; the rules are written out here."""
    columns = len(token_mask)
    suffix = np.asarray(masks.is_suffix(ar_mask))
    cells = np.full((columns + actions,) * 2, Cell.PADDING, np.uint8)
    cells[:columns, columns:] = Cell.APART

    query, key = suffix[:, None], suffix[None]
    not_later = np.tri(columns, dtype=bool)  # [q, k]: the key stands before the query, or is the query
    text = np.select(
        [~query & ~key, ~query, ~key, not_later], [Cell.BLOCK, Cell.BLIND, Cell.READS, Cell.PAST], Cell.FUTURE
    )

    # Padding last, over everything: it neither sees nor is seen, whatever block it would be counted to.
    cells[:columns, :columns] = np.where(token_mask[:, None] & token_mask, text, Cell.PADDING)

    to_expert = np.where(suffix, Cell.HIDDEN, Cell.INSULATED)
    cells[columns:, :columns] = np.where(token_mask, to_expert, Cell.PADDING)

    cells[columns:, columns:] = Cell.CHUNK
    if config.state_input == "token" and actions:
        cells[columns:, columns] = Cell.STATE
        cells[columns, columns + 1 :] = Cell.FIRST

    return cells
