"""Masks against pictures: ■ sees, · does not. Rows are queries, columns keys."""

import jax.numpy as jnp
import numpy as np
import pytest

import insula
from insula.tokens import masks


def row(bits: str) -> jnp.ndarray:
    return jnp.array([[bit == "1" for bit in bits.split()]])


def picture(text: str) -> np.ndarray:
    return np.array([[cell == "■" for cell in line.split()] for line in text.strip().splitlines()])


PICTURES = {
    "prefix and FAST": (
        "1 1 1 1 1 1",
        "0 0 0 1 1 1",
        """
        ■ ■ ■ · · ·
        ■ ■ ■ · · ·
        ■ ■ ■ · · ·
        ■ ■ ■ ■ · ·
        ■ ■ ■ ■ ■ ·
        ■ ■ ■ ■ ■ ■
        """,
    ),
    "an absent camera and padding": (
        "0 1 1 1 1 0",
        "0 0 0 1 1 0",
        """
        · · · · · ·
        · ■ ■ · · ·
        · ■ ■ · · ·
        · ■ ■ ■ · ·
        · ■ ■ ■ ■ ·
        · · · · · ·
        """,
    ),
    "causal": ("1 1 1", "1 1 1", "■ · ·\n■ ■ ·\n■ ■ ■"),
    "bidirectional": ("1 1 1", "0 0 0", "■ ■ ■\n■ ■ ■\n■ ■ ■"),
    "two blocks": ("1 1 1 1", "1 0 1 0", "■ ■ · ·\n■ ■ · ·\n■ ■ ■ ■\n■ ■ ■ ■"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_make_attn_mask(name: str) -> None:
    real, causal, wanted = PICTURES[name]
    assert np.array_equal(masks.make_attn_mask(row(real), row(causal))[0], picture(wanted))
    assert insula.make_attn_mask is masks.make_attn_mask


def test_each_sample_has_its_own() -> None:
    real = jnp.concatenate([row("1 1 0"), row("1 1 1")])
    causal = jnp.concatenate([row("0 1 0"), row("0 0 1")])
    both = masks.make_attn_mask(real, causal)
    for i in range(2):
        assert np.array_equal(both[i], masks.make_attn_mask(real[i : i + 1], causal[i : i + 1])[0])
    assert not np.array_equal(both[0], both[1])


def test_wrong_shapes_are_refused(unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"token_mask is \(1, 3\), ar_mask \(1, 2\)"):
        masks.make_attn_mask(row("1 1 1"), row("0 0"))


def test_the_expert_sees_the_real_prefix_only() -> None:
    seen = masks.visible_to_expert(row("0 1 1 1 1 1 0"), row("0 0 0 0 1 0 0"))
    assert np.array_equal(seen, row("0 1 1 1 0 0 0"))  # after the first causal token, nothing


def test_blocks_of_the_expert() -> None:
    for state_token, wanted in ((False, "■ ■\n■ ■"), (True, "■ · ·\n■ ■ ■\n■ ■ ■")):
        ar = masks.suffix_ar_mask(2, state_token)[None]
        assert np.array_equal(masks.make_attn_mask(jnp.ones_like(ar), ar)[0], picture(wanted))


def test_positions_count_what_is_real() -> None:
    assert masks.positions(row("0 1 1 0 1 0")).tolist() == [[0, 0, 1, 1, 2, 2]]
