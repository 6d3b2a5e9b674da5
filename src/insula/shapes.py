"""Axis letters, used in every annotation and einsum of the package.

====  =====================================================================
B     batch
C     cameras
P     patches (tokens) of one image
L     text tokens of one sequence: prompt, then FAST tokens, then padding
T     backbone positions: C·P image tokens, then L text tokens
M     memory columns: the part of T the action expert may be shown
K     flow samples (noise draws) that share one backbone pass
s     scored tokens, or the positions read for them, at most max_fast_len
H     horizon: steps of one action chunk
A     action-expert positions: H action tokens, after one state token if any
D     action dimension
S     state dimension
W     width of a residual stream
F     width of a feed-forward layer
N     query heads
G     key/value heads (N is a multiple of G)
R     query heads per key/value head, N / G
E     head dimension
r     rank of a LoRA update
V     vocabulary
====  =====================================================================
"""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray, Shaped, UInt8

AnyArray = Any
"""On the device, or (numpy) still on the host; shapes and dtypes are checked all the same."""
Leaf = Any
"""A leaf of a parameter tree: an array, or what stands for one (`Weight`, a shape, a label, a sharding)."""

__all__ = ["AnyArray", "Array", "Bool", "Float", "Int", "Leaf", "PRNGKeyArray", "Shaped", "UInt8"]
