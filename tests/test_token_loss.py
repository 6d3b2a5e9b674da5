"""The token loss: causal FAST tokens, exactly the scored positions, and a cross-entropy in vocabulary chunks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small import SMALL, difference, gradients, jit, largest, loss, model, prefix, replace_observation, transformer

from insula.batch import Batch
from insula.losses import count_scored, language_share
from insula.model.cross_entropy import cross_entropy
from insula.model.params import abstract_params
from insula.testing import fake_batch, randomize

IMAGES = SMALL.num_image_tokens


def bidirectional(batch: Batch) -> Batch:
    """The wrong mask: FAST tokens in the prefix's block."""
    return dataclasses.replace(batch, ar_mask=jnp.zeros_like(batch.ar_mask))


def test_fast_tokens_are_causal() -> None:
    """A changed token changes nothing before it, and everything from it on."""
    params, batch = model()
    tokens = batch.observation.tokens
    first = int(jnp.argmax(batch.ar_mask[0]))
    for j in (first, first + 1):
        changed = replace_observation(batch, tokens=tokens.at[0, j].set((tokens[0, j] + 5) % SMALL.vocab_size))
        a, b = (prefix(params, SMALL, case).hidden[0] for case in (batch, changed))
        assert difference(a[: IMAGES + j], b[: IMAGES + j]) == 0.0
        assert np.all(jnp.max(jnp.abs(a - b), axis=-1)[IMAGES + j : IMAGES + first + 3] > 1e-4)
        a, b = (prefix(params, SMALL, bidirectional(case)).hidden[0] for case in (batch, changed))
        assert difference(a[: IMAGES + j], b[: IMAGES + j]) > 1e-2


def test_random_strings_cannot_be_learned() -> None:
    """K = 4 symbols, drawn again for each sample: no loss below ln K, but for a model that sees what it predicts."""
    symbols, batch_size, steps = 4, 16, 250
    config = dataclasses.replace(
        SMALL, backbone=transformer(16, 2), vocab_size=8, max_prompt_len=1, max_fast_len=6, cameras=("front",)
    )
    params = jit(lambda key: randomize(abstract_params(config), key))(jax.random.key(0))
    params = jax.tree.map(lambda leaf: 0.5 * leaf, params)
    optimizer = optax.adam(1e-2)
    like = jit(lambda key: fake_batch(config, batch_size, key))(jax.random.key(1))
    real = jnp.ones((batch_size, config.max_token_len), bool)
    fast = real.at[:, 0].set(False)
    absent = {"front": jnp.zeros(batch_size, bool)}

    def train(ar_mask):
        def step(carry, key):
            params, state = carry
            tokens = jax.random.randint(key, real.shape, 1, symbols + 1).at[:, 0].set(0)
            batch = dataclasses.replace(like, ar_mask=ar_mask, loss_mask=fast)
            batch = replace_observation(batch, tokens=tokens, token_mask=real, image_mask=absent)
            whole = count_scored(batch, None)
            value, gradient = jax.value_and_grad(lambda p: language_share(p, config, batch, None, whole)[0])(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        keys = jax.random.split(jax.random.key(2), steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

    run = jit(train)
    causal, copied = (np.asarray(run(mask))[-50:].mean() for mask in (fast, jnp.zeros_like(fast)))
    assert causal == pytest.approx(np.log(symbols), abs=0.05)
    assert copied < 0.5 * np.log(symbols)


def plain_loss(params, batch, scored):
    """Full-sequence logits, log-softmax, shifted by one: the literal form."""
    logits = prefix(params, SMALL, batch).hidden[:, IMAGES - 1 : -1] @ params.backbone.embedding.T
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.observation.tokens[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * scored) / jnp.sum(scored)


def test_it_scores_exactly_the_mask() -> None:
    """Prompt, state, EOS and padding add nothing. Control: the mask unshifted, and a mask with one hole."""
    params, batch = model()
    for mask in (batch.loss_mask, batch.loss_mask.at[0, int(jnp.argmax(batch.loss_mask[0])) + 1].set(False)):
        _, metrics = loss(params, SMALL, dataclasses.replace(batch, loss_mask=mask))
        assert float(metrics["scored_tokens"]) == int(jnp.sum(mask))
        assert float(metrics["fast"]) == pytest.approx(float(plain_loss(params, batch, mask)), rel=1e-4)
        wrong = float(plain_loss(params, batch, jnp.roll(mask, 1, axis=1)))
        assert float(metrics["fast"]) != pytest.approx(wrong, rel=1e-2)

    # Labels outside the mask, EOS and padding, may be anything.
    unscored = ~batch.loss_mask & (jnp.cumsum(batch.loss_mask, axis=1) > 0)
    assert np.any(unscored)
    other = jnp.where(unscored, (batch.observation.tokens + 9) % SMALL.vocab_size, batch.observation.tokens)
    changed = replace_observation(batch, tokens=other)
    assert float(loss(params, SMALL, changed)[1]["fast"]) == float(loss(params, SMALL, batch)[1]["fast"])
    scored = jnp.where(batch.loss_mask, (batch.observation.tokens + 9) % SMALL.vocab_size, batch.observation.tokens)
    changed = replace_observation(batch, tokens=scored)
    assert float(loss(params, SMALL, changed)[1]["fast"]) != float(loss(params, SMALL, batch)[1]["fast"])


def test_nothing_to_score_is_zero() -> None:
    """No tokenized prompt, or no scored token: 0, finite gradients, and the flow loss as ever."""
    params, batch = model()
    assert largest(gradients(params, SMALL, batch)["fast"]) > 0
    unscored = dataclasses.replace(batch, loss_mask=jnp.zeros_like(batch.loss_mask))
    no_tokens = dataclasses.replace(
        replace_observation(batch, tokens=None, token_mask=None), ar_mask=None, loss_mask=None
    )
    for case in (unscored, no_tokens):
        total, metrics = loss(params, SMALL, case)
        assert float(metrics["fast"]) == float(metrics["scored_tokens"]) == float(metrics["token_accuracy"]) == 0.0
        assert float(total) == float(metrics["flow"]) > 0
        found = gradients(params, SMALL, case)
        assert largest(found["fast"]) == 0.0 < largest(found["total"])


def test_nothing_is_cut_silently() -> None:
    """One scored token more than the model has room for is NaN; exactly as many, or a longer sequence, is not."""
    params, batch = model()
    length, room = batch.loss_mask.shape[1], SMALL.max_fast_len
    column = np.arange(length)

    def fast(scored: int, start: int = SMALL.max_prompt_len - 1) -> float:
        suffix = np.broadcast_to(column >= start, batch.loss_mask.shape)
        mask = suffix & (column < start + scored)
        whole = replace_observation(batch, token_mask=jnp.ones(mask.shape, bool))
        changed = dataclasses.replace(whole, ar_mask=jnp.asarray(suffix), loss_mask=jnp.asarray(mask))
        return loss(params, SMALL, changed)[1]

    assert np.isfinite(float(fast(room)["fast"])) and np.isnan(float(fast(room + 1)["fast"]))
    longest = SMALL.max_prompt_len
    assert np.isfinite(float(fast(1, longest)["flow"])) and np.isnan(float(fast(1, longest + 1)["flow"]))


@pytest.mark.parametrize("chunk", [None, 12, 1])
def test_chunked_cross_entropy_is_logsumexp(chunk: int | None) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, embedding = jax.random.normal(keys[0], (20, 8)), jax.random.normal(keys[1], (36, 8))
    labels = jax.random.randint(keys[2], (20,), 0, 36).at[:10].set(jnp.argmax(hidden[:10] @ embedding.T, axis=1))
    pull = jax.random.normal(keys[3], (20,))

    def plain(hidden, embedding):
        logits = hidden @ embedding.T
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - own, jnp.argmax(logits, axis=1) == labels

    def run(function):
        (values, right), back = jax.vjp(function, hidden, embedding)
        return values, right, back((pull, np.zeros(20, jax.dtypes.float0)))

    def chunked(dtype):
        return lambda h, e: cross_entropy(h, e, labels, dtype, chunk)

    wanted, found, low = (jit(lambda f=f: run(f))() for f in (plain, chunked("float32"), chunked("bfloat16")))
    assert difference(found[0], wanted[0]) < 1e-5 and difference(found[2], wanted[2]) < 1e-5
    assert np.array_equal(found[1], wanted[1]) and 10 <= int(jnp.sum(found[1])) < 20
    assert 0 < difference(low[0], wanted[0]) < 0.1 and difference(low[2], wanted[2]) < 0.1
    assert difference(jnp.roll(wanted[0], 1), wanted[0]) > 1


def test_a_label_that_is_likeliest_is_right() -> None:
    """At real sizes two products of the same vectors differ in the last bits: both must come from the same one."""
    hidden, embedding = (
        jax.random.normal(jax.random.key(0), (64, 128)),
        jax.random.normal(jax.random.key(1), (512, 128)),
    )
    for dtype in ("float32", "bfloat16"):
        logits = jnp.dot(hidden.astype(dtype), embedding.astype(dtype).T, preferred_element_type=jnp.float32)
        _, right = jax.jit(lambda labels, dtype=dtype: cross_entropy(hidden, embedding, labels, dtype, 128))(
            jnp.argmax(logits, axis=1)
        )
        assert np.all(right)


def test_a_chunk_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_chunk is 7, expected a divisor of the vocabulary's 36"):
        cross_entropy(jnp.zeros((2, 8)), jnp.zeros((36, 8)), jnp.zeros(2, jnp.int32), "float32", 7)


def test_random_parameters_are_near_ln_v() -> None:
    """The scale of it: an uninformed model pays about ln V per token."""
    params, batch = model()
    small = dataclasses.replace(
        params, backbone=dataclasses.replace(params.backbone, embedding=params.backbone.embedding * 1e-3)
    )
    assert float(loss(small, SMALL, batch)[1]["fast"]) == pytest.approx(np.log(SMALL.vocab_size), rel=0.01)
