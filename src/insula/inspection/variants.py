"""Who may look at whom: the model's own attention mask, and how others draw it, each cell with its reason.

         keys     i i p f f f | a a
queries  i p f    make_attn_mask  | never
         a        visible to it   | suffix mask
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from insula.model.config import ModelConfig
from insula.shapes import Bool, UInt8
from insula.tokens import masks

REASONS: tuple[tuple[str, bool, str], ...] = (
    ("padding", False, "padding or an absent camera: it neither sees nor is seen"),
    ("block", True, "bidirectional block: images and prompt all see each other"),
    ("blind", False, "causal: images and prompt do not see the tokens that answer them"),
    ("reads", True, "causal: what is to be predicted reads all of images and prompt"),
    ("past", True, "causal: an earlier token of the answer, or itself"),
    ("future", False, "causal: a later token of the answer, which is yet to be predicted"),
    ("apart", False, "the backbone never sees the action expert"),
    ("insulated", True, "insulated: the expert reads this key and value, and no gradient comes back"),
    ("hidden", False, "FAST hidden from the expert: the same actions in another script"),
    ("chunk", True, "bidirectional block: the action tokens of one chunk all see each other"),
    ("state", True, "the action tokens see the state's token"),
    ("first", False, "the state's token comes first and does not see the actions"),
    (
        "joint",
        True,
        "not insulated: the expert reads this key and value, and its gradient flows into the backbone",
    ),
    ("one model", True, "one sequence: the FAST tokens come after the noisy actions and read them"),
    ("answer", True, "LEAK: the expert reads ground-truth FAST tokens, which serving does not have"),
    ("copy", True, "LEAK: FAST tokens see later ones, so the backbone copies what it is to predict"),
    ("unlike", True, "LEAK: the model's mask is on, where it must be off"),
    ("blocked", False, "the model's mask is off, where it must be on"),
    ("told", True, "LEAK: images and prompt see the ground truth, and whoever reads them reads it, too"),
)
"""Name, whether the cell is on, and why."""
CODE = {name: code for code, (name, _, _) in enumerate(REASONS)}
ON = np.array([on for _, on, _ in REASONS])


@dataclass(frozen=True, eq=False)
class Variant:
    """`codes[q, k]` is an index into REASONS; `ON[codes]` is the mask."""

    name: str
    about: str
    codes: UInt8[np.ndarray, "N N"]

    def unlike(self) -> list[tuple[int, int]]:
        """Cells (query, key) of the model's mask that are not as they must be."""
        return [(int(q), int(k)) for q, k in np.argwhere(np.isin(self.codes, (CODE["unlike"], CODE["blocked"])))]


def model_mask(config: ModelConfig, real: np.ndarray, ar: np.ndarray, actions: int) -> Bool[np.ndarray, "N N"]:
    """The mask of the model: T columns of the backbone [T], then `actions` of the expert, from the very functions it
    calls."""
    inputs = jnp.asarray(real)[None], jnp.asarray(ar)[None]
    mask = np.zeros((len(real) + actions,) * 2, bool)
    size = len(real)
    mask[:size, :size] = masks.make_attn_mask(*inputs)[0]
    if actions:
        mask[size:, : config.num_memory] = masks.visible_to_expert(*inputs)[0, : config.num_memory]
        mask[size:, size:] = _suffix(config, actions)
    return mask


def _suffix(config: ModelConfig, actions: int) -> np.ndarray:
    state = config.state_input == "token"
    ar = masks.suffix_ar_mask(actions - state, state)[None]
    return np.asarray(masks.make_attn_mask(jnp.ones_like(ar), ar))[0]


def variants(config: ModelConfig, real: np.ndarray, ar: np.ndarray, actions: int) -> list[Variant]:
    """insulated (the model), joint, HybridVLA-like and leaky. `actions`: positions of the expert, 0 without actions.

    The reasons are derived here a second time, cell by cell; where the model's mask is another, that is the reason.
    """
    reasons, mask = _reasons(config, real, ar, actions), model_mask(config, real, ar, actions)
    ours = np.where(mask & ~ON[reasons], CODE["unlike"], np.where(~mask & ON[reasons], CODE["blocked"], reasons))
    ours = ours.astype(np.uint8)
    size = len(real)
    causal = np.zeros(len(ours), bool)
    causal[:size] = real & np.asarray(masks.is_suffix(ar))
    expert = np.arange(len(ours)) >= size

    joint = np.where(ours == CODE["insulated"], CODE["joint"], ours)
    hybrid = np.where(causal[:, None] & expert, CODE["one model"], joint)
    leaky = np.where(expert[:, None] & causal, CODE["answer"], ours)
    leaky = np.where(leaky == CODE["future"], CODE["copy"], leaky)
    leaky = np.where(leaky == CODE["blind"], CODE["told"], leaky)
    return [
        Variant(
            "insulated",
            "π0.5 + KI: the expert reads images and prompt through a stop-gradient, and never a FAST token.",
            ours,
        ),
        Variant(
            "joint",
            "FAST and flow trained jointly: the same cells, but the flow loss reaches all of the backbone.",
            joint.astype(np.uint8),
        ),
        Variant(
            "HybridVLA-like",
            "One model, one sequence: noisy actions come before the tokens, which read them; no insulation.",
            hybrid.astype(np.uint8),
        ),
        Variant(
            "leaky",
            "Two mistakes: FAST tokens in a bidirectional block, and visible to the expert. Training looks splendid.",
            leaky.astype(np.uint8),
        ),
    ]


def _reasons(config: ModelConfig, real: np.ndarray, ar: np.ndarray, actions: int) -> np.ndarray:
    size = len(real)
    block = np.cumsum(ar)
    causal = block > 0
    codes = np.full((size + actions,) * 2, CODE["padding"], np.uint8)
    codes[:size, size:] = CODE["apart"]

    query, key = causal[:, None], causal[None]
    text = np.select(
        [~query & ~key, ~query, ~key, block[None] <= block[:, None]],
        [CODE["block"], CODE["blind"], CODE["reads"], CODE["past"]],
        CODE["future"],
    )
    codes[:size, :size] = np.where(real[:, None] & real, text, CODE["padding"])
    codes[size:, :size] = np.where(real, np.where(causal, CODE["hidden"], CODE["insulated"]), CODE["padding"])
    codes[size:, size:] = CODE["chunk"]
    if config.state_input == "token" and actions:
        codes[size:, size] = CODE["state"]
        codes[size, size + 1 :] = CODE["first"]
    return codes
