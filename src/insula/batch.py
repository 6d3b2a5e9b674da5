"""What a model sees: `Observation` when acting, `Batch` when learning.

Padding and masks, explained once
---------------------------------
Text is one sequence per sample, contiguous, padding only at its end::

    tokens      BOS Task : ... Action :   f0  f1  f2  |   EOS  pad pad
    token_mask   1   1   1  1    1    1    1   1   1  1    1    0   0    a real token
    ar_mask      0   0   0  0    0    0    1   1   1  1    1    0   0    starts a causal step
    loss_mask    0   0   0  0    0    0    1   1   1  1    0    0   0    scored by the token loss

`image_mask` says whether a camera exists for a sample. `action_is_pad` marks steps past the end of the episode,
`action_dim_mask` the action dimensions this robot has. These two, and nothing else of a batch, mask the flow loss.
"""

import dataclasses
import enum

import jax

from insula.shapes import AnyArray, Bool, Float, Int, UInt8


class LossName(enum.StrEnum):
    """The two losses, by their names in a mapping's `losses` and in `compute_loss`'s metrics."""

    FLOW = "flow"
    FAST = "fast"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Observation:
    """Model inputs. Images are uint8 and become floats on the device; `tokens` is None without a tokenized prompt."""

    images: dict[str, UInt8[AnyArray, "B h w 3"]]  # a quarter of the bytes of float32, on their way to the device
    image_mask: dict[str, Bool[AnyArray, "B"]]
    state: Float[AnyArray, "B S"]
    tokens: Int[AnyArray, "B L"] | None = None
    token_mask: Bool[AnyArray, "B L"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Previous:
    """What is left of the last chunk when an observation is made, for real-time chunking: index 0 is the step of the
    observation.

    `actions` are normalized against this observation's state; those from `length` on are padding. The first `delay` of
    them will have been executed when the new chunk arrives: 0 ≤ delay ≤ length ≤ H. A row with neither has none.
    """

    actions: Float[AnyArray, "B H D"]
    delay: Int[AnyArray, "B"]
    length: Int[AnyArray, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """An observation with its targets: FAST tokens inside `observation.tokens`, and the normalized action chunk.

    Actions of a robot with fewer dimensions or steps than the model are padded with zeros and masked. `ar_mask` and
    `loss_mask` are None where no sample has an answer.
    """

    observation: Observation
    actions: Float[AnyArray, "B H D"]
    action_is_pad: Bool[AnyArray, "B H"]
    action_dim_mask: Bool[AnyArray, "B D"]
    ar_mask: Bool[AnyArray, "B L"] | None = None
    loss_mask: Bool[AnyArray, "B L"] | None = None

    @property
    def action_mask(self) -> Bool[AnyArray, "B H D"]:
        """True on every real action value: the only mask of the flow loss, but for steps given by a delay
        (`insula.losses`)."""
        # The two have opposite signs: LeRobot's column says what is padding, ours what is real.
        return ~self.action_is_pad[:, :, None] & self.action_dim_mask[:, None, :]
