"""Axis letters: one meaning each, in every annotation, einsum and weight table of the package.

A capital letter is an axis with a meaning. In einsums the same letters are lower case. What a letter's size is may
differ between towers (W, F, X), never its meaning.

====  =====================================================================
B     batch
C     cameras
I     images, each for itself: B·C
P     patches (tokens) of one image
Z     pixel values of one patch, row by row, color last
L     text tokens of one sequence: prompt, then FAST tokens, then padding
T     backbone positions: C·P image tokens, then L text tokens
J     key positions of one attention: those that are attended to
Q     query rows of one attention, after the heads that share keys are folded into them
M     memory columns: the part of T the action expert may be shown
K     flow samples (noise draws) that share one backbone pass
U     scored tokens, or the positions read for them, at most max_fast_len
H     horizon: steps of one action chunk
A     action-expert positions: H action tokens, after one state token if any
D     action dimensions
S     state dimensions
X     layers: depth, where weights or keys are stacked
W     width of a residual stream, and of each stage that leads to it
F     width of a feed-forward layer
N     query heads
G     key/value heads (N is a multiple of G)
R     query heads per key/value head: N / G
E     head dimension
Y     modulation of one adaRMS: scale, shift and gate, 3·W
O     outputs of a matrix that changes the width
V     vocabulary
====  =====================================================================

Lower case, in annotations: h and w are the height and width of an image in pixels, r is the rank of a LoRA update,
i and o are the inputs and outputs of any product, n is any number of rows. A name after a star stands for any axes.
"""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray, Shaped, UInt8

AnyArray = Any
"""On the device, or (numpy) still on the host; shapes and dtypes are checked all the same."""
Leaf = Any
"""A leaf of a parameter tree: an array, or what stands for one (`Weight`, a shape, a label, a sharding)."""

# jaxtyping's kinds come from here as well: one import gives a file its letters. They are hints at run time; under
# pytest every call of a function is checked against them.
__all__ = ["AnyArray", "Array", "Bool", "Float", "Int", "Leaf", "PRNGKeyArray", "Shaped", "UInt8"]
