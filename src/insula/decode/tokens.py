"""Autoregressive decoding with a key/value cache: what the backbone says after its prefix (Gemma, arXiv 2403.08295).

    columns    images | prompt, padded | generated ...        the prefix is read in one pass, the same that the
    cache      ██████   ██████ · · ·     █ █ █ · · ·           expert reads; then one column for each token

A token's rotary position counts real tokens, so where the padding stands changes nothing, and its logits are those of
the one pass over the whole sequence in training. Rows of a batch do not know of each other: each ends by itself, and
the loop ends with the last of them.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from insula.batch import Observation
from insula.checks import check_integer, check_number
from insula.errors import InputError
from insula.model import layers
from insula.model.attention import attend_with_memory
from insula.model.backbone import (
    Backbone,
    BackboneLayer,
    BackboneOutput,
    embed_tokens,
    keys_and_values,
    run_backbone,
    update,
)
from insula.model.config import ModelConfig
from insula.model.params import Params
from insula.shapes import AnyArray, Array, Bool, Float, Int, Shaped
from insula.tokens.grammar import REFUSED, Grammar

SMALLEST_BUCKET = 8


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits; without one, the likeliest is taken. `temperature` divides them; `top_k`
    leaves only the k likeliest. Raises InputError for values that cannot be."""

    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, "> 0; leave sampling out for the likeliest", lambda t: t > 0)
        if self.top_k is not None:
            check_integer("top_k", self.top_k, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer for J columns: those of the prefix, then one for each token to come.

    `mask`: which columns hold a real token; `length`: how many do, the rotary position of the next one.
    """

    keys: Float[Array, "X B J G E"]
    values: Float[Array, "X B J G E"]
    mask: Bool[Array, "B J"]
    length: Int[Array, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """`tokens`, of which the first `length` of a row count; `log_probs` of each under the model alone, whatever a
    grammar refused; `ended`: whether the row came to the end of its grammar, rather than to its limit."""

    tokens: Int[AnyArray, "B n"]
    log_probs: Float[AnyArray, "B n"]
    length: Int[AnyArray, "B"]
    ended: Bool[AnyArray, "B"]

    def row(self, index: int) -> list[int]:
        """The tokens of one row, its stop token included."""
        return [int(token) for token in self.tokens[index][: int(self.length[index])]]


def bucket(limit: int) -> int:
    """Columns to generate into: powers of two, so that limits near each other share a compiled program."""
    return max(SMALLEST_BUCKET, 1 << (limit - 1).bit_length())


def check_limit(grammar: Grammar, limit: int) -> None:
    """Raises InputError where not even the shortest answer fits in `limit` tokens."""
    if limit < 1 or grammar.needed[0] > limit:
        raise InputError(f"the shortest answer takes {max(1, int(grammar.needed[0]))} tokens, the limit is {limit}")


def start_cache(prefix: BackboneOutput, columns: int) -> Cache:
    """Room for `columns` tokens behind what one backbone pass has read."""
    behind = ((0, 0), (0, 0), (0, columns), (0, 0), (0, 0))
    return Cache(
        keys=jnp.pad(prefix.keys, behind),
        values=jnp.pad(prefix.values, behind),
        mask=jnp.pad(prefix.token_mask, ((0, 0), (0, columns))),
        length=jnp.sum(prefix.token_mask, axis=1, dtype=jnp.int32),
    )


def append(
    backbone: Backbone,
    config: ModelConfig,
    cache: Cache,
    token: Int[Array, "B"],
    column: Int[Array, ""],
    real: Bool[Array, "B"],
) -> tuple[Float[Array, "B W"], Cache]:
    """Read one more token of each row into `column`: the final hidden state after it, and the cache with it. Rows that
    are not `real` have ended: what is read there is never seen."""
    x = embed_tokens(backbone, config, token[:, None])
    rotary = cache.length[:, None]
    alone = jnp.ones((1, 1), bool)

    def layer(x: Array, inputs: tuple[BackboneLayer, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        p, cached_k, cached_v = inputs
        y = layers.rms_norm(x, p.attention_norm)
        k, v = keys_and_values(p, config, y, rotary)

        def look(q: Array) -> Array:
            # As the expert reads its memory: one softmax over the cache and the token itself, and no copy of the cache.
            q, own_k, own_v = (part[:, None] for part in (q, k, v))
            return attend_with_memory(q, own_k, own_v, cached_k, cached_v, cache.mask, alone)[:, 0]

        return update(p, config, x, y, rotary, look), (k, v)

    x, (keys, values) = layers.walk(layer, x, (backbone.layers, cache.keys, cache.values), config.compute)

    def put(whole: Array, new: Array, axis: int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, new.astype(whole.dtype), column, axis)

    grown = Cache(
        keys=put(cache.keys, keys, 2),
        values=put(cache.values, values, 2),
        mask=put(cache.mask, real[:, None], 1),
        length=cache.length + real,
    )
    return layers.rms_norm(x, backbone.norm)[:, 0], grown


def token_logits(backbone: Backbone, hidden: Float[Array, "B W"]) -> Float[Array, "B V"]:
    """Of the token that follows a final hidden state: the embedding is the token head, too."""
    return hidden.astype(jnp.float32) @ backbone.embedding.T.astype(jnp.float32)


class _Loop(NamedTuple):
    """What one round hands to the next. `token` is chosen, but not read yet."""

    chosen: Array
    cache: Cache
    token: Array
    state: Array
    tokens: Array
    log_probs: Array
    length: Array


def generate(
    params: Params,
    config: ModelConfig,
    observation: Observation,
    grammar: Grammar,
    limit: Int[AnyArray, ""] | int,
    columns: int,
    sampling: Sampling | None = None,
    keys: Shaped[AnyArray, "B"] | None = None,
) -> Generated:
    """What the backbone says after the prefix of `observation`: at most `limit` tokens, of at most `columns`, the stop
    token among them. Made to be compiled, with `columns` and `sampling` static; `check_limit` first.

    `keys`: a random key for each row, needed with `sampling`: a row draws the same whatever is beside it.
    """
    prefix = run_backbone(params.vision, params.backbone, config, observation, positions=_last(config, observation))
    rules = jax.tree.map(jnp.asarray, grammar)
    batch, first = prefix.hidden.shape[0], prefix.token_mask.shape[1]

    def choose(hidden: Array, state: Array, count: Array) -> tuple[Array, Array, Array]:
        """The next token of each row, the state after it, and its log-probability."""
        logits = token_logits(params.backbone, hidden)
        bound, after = _bind(logits, rules, state, limit - count)
        ranked = bound if sampling is None else _draw(bound, sampling, keys, count)
        token = jnp.argmax(ranked, axis=-1).astype(jnp.int32)

        picked = (jnp.arange(batch), token)
        return token, after[picked], jax.nn.log_softmax(logits, axis=-1)[picked]

    def ended(state: Array) -> Array:
        return state == grammar.end

    def note(loop: _Loop, token: Array, state: Array, log_prob: Array) -> _Loop:
        """A chosen token, of the rows that had not ended before it."""
        going = ~ended(loop.state)
        state = jnp.where(going, state, loop.state)
        return loop._replace(
            chosen=loop.chosen + 1,
            token=token,
            state=state,
            tokens=loop.tokens.at[:, loop.chosen].set(jnp.where(going, token, 0)),
            log_probs=loop.log_probs.at[:, loop.chosen].set(jnp.where(going, log_prob, 0.0)),
            length=loop.length + going,
        )

    def unfinished(loop: _Loop) -> Array:
        return (loop.chosen < limit) & ~jnp.all(ended(loop.state))

    def step(loop: _Loop) -> _Loop:
        column = first + loop.chosen - 1
        hidden, cache = append(params.backbone, config, loop.cache, loop.token, column, ~ended(loop.state))
        return note(loop._replace(cache=cache), *choose(hidden, loop.state, loop.chosen))

    none = jnp.zeros(batch, jnp.int32)
    empty = jnp.zeros((batch, columns))
    start = _Loop(jnp.int32(0), start_cache(prefix, columns), none, none, empty.astype(jnp.int32), empty, none)
    start = note(start, *choose(prefix.hidden[:, 0], none, jnp.int32(0)))

    done = jax.lax.while_loop(unfinished, step, start)
    return Generated(done.tokens, done.log_probs, done.length, ended(done.state))


def _bind(logits: Array, rules: Grammar, state: Array, left: Array | int) -> tuple[Array, Array]:
    """Logits without those of refused tokens, and the state after each token; `left` more tokens may come."""
    known = logits[:, : rules.token_class.size]  # a model may have more rows than its tokenizer has entries
    after = rules.following[state[:, None], rules.token_class[None]]
    allowed = (after != REFUSED) & (rules.needed[after] < left)
    return jnp.where(allowed, known, -jnp.inf), after


def _draw(logits: Array, sampling: Sampling, keys: Array | None, count: Array) -> Array:
    """Logits whose largest is a draw (Gumbel's trick)."""
    assert keys is not None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)

    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, count), logits.shape[-1:]))(keys)
    return logits / sampling.temperature + noise


def _last(config: ModelConfig, observation: Observation) -> Int[Array, "B 1"]:
    """Where the last token of each prompt stands, images counted."""
    assert observation.token_mask is not None
    real = jnp.asarray(observation.token_mask, jnp.int32)
    return config.num_image_tokens + jnp.sum(real, axis=1, keepdims=True) - 1
