"""Every mask of the system, drawn.

`make_attn_mask` is the rule for one sequence of blocks (big_vision's). An `ar_mask` of 1 starts a new block; a token
sees its own block and all earlier ones::

    ar_mask 0 0 0 1 1 1          keys  i i p f f f     i image, p prompt, f FAST
                          queries  i   ■ ■ ■ · · ·     prefix: bidirectional, blind to FAST
                                   i   ■ ■ ■ · · ·
                                   p   ■ ■ ■ · · ·
                                   f   ■ ■ ■ ■ · ·     FAST: causal, one block each
                                   f   ■ ■ ■ ■ ■ ·
                                   f   ■ ■ ■ ■ ■ ■

The action expert reads the prefix and itself, never FAST (`visible_to_expert`), here with H = 2 actions::

                          keys  i i p f f f | a a
                 queries  a     ■ ■ ■ · · · | ■ ■
                          a     ■ ■ ■ · · · | ■ ■
"""

import jax.numpy as jnp

from insula.errors import InputError
from insula.shapes import AnyArray, Array, Bool, Int


def make_attn_mask(token_mask: Bool[Array, "B T"], ar_mask: Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
    """`mask[b, q, k]`: may query q attend to key k? Padding (`token_mask` False) neither sees nor is seen.

    Raises InputError where the two masks differ in shape.
    """
    if token_mask.shape != ar_mask.shape:
        raise InputError(
            f"make_attn_mask: token_mask is {token_mask.shape}, ar_mask {ar_mask.shape}; expected the same [B, T]"
        )

    # Each 1 of `ar_mask` opens a block, so the running sum numbers the blocks: a key is seen if its block is not later.
    block = jnp.cumsum(jnp.asarray(ar_mask, jnp.int32), axis=1)
    seen = block[:, None, :] <= block[:, :, None]

    # Padding counts to the last block, which would see everything: it is masked both as key and as query.
    real = jnp.asarray(token_mask, bool)
    return seen & real[:, None, :] & real[:, :, None]


def is_suffix(ar_mask: Bool[AnyArray, "*b T"]) -> Bool[Array, "*b T"]:
    """From the first causal step on: the answer, which may be generated, and the padding behind it."""
    # A running sum and not `ar_mask` itself: padding has 0 there, and so would a bidirectional block after FAST.
    return jnp.cumsum(jnp.asarray(ar_mask, jnp.int32), axis=-1) > 0


def visible_to_expert(token_mask: Bool[Array, "B T"], ar_mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """The columns the action expert may read: real tokens of the bidirectional prefix, so never a FAST token.

    An expert that reads FAST tokens copies the actions they spell out: its training loss looks splendid, no gradient is
    wrong, and serving, which has no FAST tokens, fails.
    """
    return jnp.asarray(token_mask, bool) & ~is_suffix(ar_mask)


def suffix_ar_mask(horizon: int, state_token: bool) -> Bool[Array, "A"]:
    """Blocks inside the action expert: the state token alone, then all action tokens together (π0, appendix B).

        ar_mask 1 1 0          keys  s a a     s state, a action
                      queries  s     ■ · ·
                               a     ■ ■ ■
                               a     ■ ■ ■

    So the state's token is the same at every flow time: it sees no noisy action.
    """
    # The first 1 opens a block of its own after the prefix, which must not see any of these.
    first = jnp.ones(1, bool)
    rest = jnp.zeros(horizon - 1, bool)
    return jnp.concatenate([first, first, rest] if state_token else [first, rest])


def positions(token_mask: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Rotary positions count real tokens only, so padding shifts nothing: an absent camera leaves no gap."""
    # Padding before the first real token would get −1. It is read by nobody, but an index below 0 invites surprises.
    return jnp.maximum(jnp.cumsum(jnp.asarray(token_mask, jnp.int32), axis=1) - 1, 0)
