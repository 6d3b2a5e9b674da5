"""Decoding with a cache: its logits are those of the one training pass; what a grammar allows, and what ends it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import SMALL, VARIANTS, jit, model

from insula.batch import Observation
from insula.decode.tokens import Generated, Sampling, bucket, check_limit, generate, token_logits
from insula.errors import InputError
from insula.model.backbone import run_backbone
from insula.model.config import ModelConfig
from insula.model.params import Params
from insula.tokens.fast import FASTCodec
from insula.tokens.fast_grammar import action_grammar
from insula.tokens.grammar import Grammar, any_of, anything, one_of
from insula.tokens.sequence import FASTTokenizer
from insula.tokens.text import embedded

STOP, COLUMNS = 3, 8
MODELS: dict[str, ModelConfig] = {name: dataclasses.replace(SMALL, **fields) for name, fields in VARIANTS.items()}


def asked(config: ModelConfig, batch_size: int = 3, seed: int = 0) -> tuple[Params, Observation, np.ndarray]:
    """Parameters, prompts of several lengths without an answer, and those lengths."""
    params, batch = model(config, batch_size, seed)
    observation = batch.observation
    lengths = np.array(jnp.sum(jnp.asarray(observation.token_mask) & ~jnp.asarray(batch.ar_mask), axis=1))
    width = config.max_prompt_len
    tokens = np.asarray(observation.tokens)[:, :width]
    real = np.arange(width)[None] < lengths[:, None]
    return params, dataclasses.replace(observation, tokens=tokens, token_mask=real), lengths


def say(
    params: Params,
    config: ModelConfig,
    observation: Observation,
    grammar: Grammar,
    limit: int = 6,
    sampling: Sampling | None = None,
    keys: jax.Array | None = None,
) -> Generated:
    run = jit(partial(generate, config=config, grammar=grammar, columns=bucket(limit), sampling=sampling))
    return jax.device_get(run(params, observation=observation, limit=limit, keys=keys))


def one_pass(
    params: Params, config: ModelConfig, observation: Observation, lengths: np.ndarray, said: Generated
) -> np.ndarray:
    """Logits [B, n, V] that the training pass has where each generated token is predicted."""
    rows, width = len(lengths), config.max_prompt_len + COLUMNS
    tokens = np.zeros((rows, width), np.int32)
    real, causal = np.zeros((2, rows, width), bool)
    for row, length in enumerate(lengths):
        answer = said.row(row)
        end = length + len(answer)
        tokens[row, :end] = [*observation.tokens[row, :length], *answer]
        real[row, :end] = True
        causal[row, length:end] = True

    whole = dataclasses.replace(observation, tokens=tokens, token_mask=real)
    read = jit(lambda p, o, ar: run_backbone(p.vision, p.backbone, config, o, ar).hidden)
    hidden = read(params, whole, causal)
    at = config.num_image_tokens + lengths[:, None] - 1 + np.arange(said.tokens.shape[1])[None]
    hidden = np.take_along_axis(np.asarray(hidden), np.minimum(at, hidden.shape[1] - 1)[..., None], axis=1)
    return np.stack([np.asarray(token_logits(params.backbone, jnp.asarray(rows))) for rows in hidden])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("absent", [(), ("wrist",)], ids=["two cameras", "one absent"])
def test_the_cache_has_the_logits_of_the_one_pass(name: str, absent: tuple[str, ...]) -> None:
    """For every layer kind, with prompts of several lengths and with a camera missing in one row of the batch."""
    config = MODELS[name]
    params, observation, lengths = asked(config)
    assert len(set(lengths)) > 1
    present = {camera: np.ones(3, bool) for camera in config.cameras}
    for camera in absent:
        present[camera][1] = False
    observation = dataclasses.replace(observation, image_mask=present)

    said = say(params, config, observation, anything(config.vocab_size, STOP))
    logits = one_pass(params, config, observation, lengths, said)
    log_probs = np.asarray(jax.nn.log_softmax(logits, axis=-1))

    assert said.length.sum() >= 12
    for row in range(3):
        answer = said.row(row)
        assert answer == logits[row, : len(answer)].argmax(-1).tolist()  # greedy, step by step
        found = log_probs[row, np.arange(len(answer)), answer]
        np.testing.assert_allclose(said.log_probs[row, : len(answer)], found, atol=1e-5)

    # The control: the same tokens after another prompt have other probabilities.
    other = dataclasses.replace(observation, tokens=(np.asarray(observation.tokens) + 1) % config.vocab_size)
    moved = np.asarray(jax.nn.log_softmax(one_pass(params, config, other, lengths, said), axis=-1))
    assert np.abs(moved - log_probs).max() > 1e-3


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    params, observation, _ = asked(SMALL, 3)
    grammar, keys = anything(SMALL.vocab_size, STOP), jax.random.split(jax.random.key(1), 3)
    together = say(params, SMALL, observation, grammar, sampling=Sampling(), keys=keys)
    for row in range(3):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], observation)
        assert say(params, SMALL, alone, grammar, sampling=Sampling(), keys=keys[row : row + 1]).row(0) == together.row(
            row
        )

    # The controls: another key, and another row.
    again = say(params, SMALL, observation, grammar, sampling=Sampling(), keys=jax.random.split(jax.random.key(2), 3))
    assert [again.row(i) for i in range(3)] != [together.row(i) for i in range(3)]
    assert together.row(0) != together.row(1)


def test_padding_of_the_prompt_changes_nothing() -> None:
    params, observation, _ = asked(SMALL)
    grammar = anything(SMALL.vocab_size, STOP)
    wide = dataclasses.replace(SMALL, max_prompt_len=9)
    pad = ((0, 0), (0, 4))
    padded = dataclasses.replace(
        observation,
        tokens=np.pad(observation.tokens, pad, constant_values=7),
        token_mask=np.pad(observation.token_mask, pad),
    )
    one, other = say(params, SMALL, observation, grammar), say(params, wide, padded, grammar)
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)


def test_sampling_follows_its_distribution_and_top_k_cuts_it() -> None:
    params, observation, _ = asked(SMALL, 1)
    rows = 400
    many = jax.tree.map(lambda x: np.repeat(np.asarray(x), rows, axis=0), observation)
    grammar = anything(SMALL.vocab_size, STOP)
    keys = jax.random.split(jax.random.key(0), rows)

    greedy = say(params, SMALL, observation, grammar, limit=1)
    free = say(params, SMALL, many, grammar, limit=1, sampling=Sampling(), keys=keys)
    few = say(params, SMALL, many, grammar, limit=1, sampling=Sampling(top_k=2), keys=keys)
    cold = say(params, SMALL, many, grammar, limit=1, sampling=Sampling(temperature=1e-3), keys=keys)

    # A draw's mean log-probability is minus the entropy, here within five standard errors.
    seen = free.log_probs[:, 0]
    values, counts = np.unique(free.tokens[:, 0], return_counts=True)
    assert len(values) > 2 and counts.max() / rows == pytest.approx(np.exp(greedy.log_probs[0, 0]), abs=0.12)
    assert np.exp(seen).max() <= np.exp(greedy.log_probs[0, 0]) + 1e-6
    assert len(np.unique(few.tokens[:, 0])) == 2
    assert set(cold.tokens[:, 0]) == {greedy.tokens[0, 0]}


def test_the_stop_token_ends_a_row_and_the_limit_does_not_pretend_to() -> None:
    params, observation, _ = asked(SMALL)
    free = say(params, SMALL, observation, anything(SMALL.vocab_size, STOP))
    assert not free.ended.any() and (free.length == 6).all()  # never said STOP: told, not cut and called an answer

    # The same answers, with the third token of the first row as the stop.
    stop = free.row(0)[2]
    ended = say(params, SMALL, observation, anything(SMALL.vocab_size, stop))
    assert ended.ended[0] and ended.row(0) == free.row(0)[: free.row(0).index(stop) + 1]
    assert (ended.tokens[0, ended.length[0] :] == 0).all()
    for row in range(3):
        assert ended.row(row) == free.row(row)[: int(ended.length[row])]


def test_grammars_bind_and_end_within_their_limit() -> None:
    params, observation, _ = asked(SMALL)
    answers = [[10, 11, 12], [10, 11], [10, 20, 21, 22, 23], [30]]
    choice = one_of(answers, SMALL.vocab_size, STOP)
    for answer in answers:
        assert choice.accepts([*answer, STOP]) and not choice.accepts(answer)
    assert not choice.accepts([10, STOP]) and not choice.accepts([11, STOP])

    for limit in (2, 3, 6):
        said = say(params, SMALL, observation, choice, limit, Sampling(5.0), jax.random.split(jax.random.key(limit), 3))
        assert said.ended.all() and (said.length <= limit).all()
        assert all(choice.accepts(said.row(row)) for row in range(3))

    places = any_of([40, 41, 42], 3, SMALL.vocab_size, STOP)
    said = say(params, SMALL, observation, places)
    assert said.ended.all() and all(set(said.row(row)[:3]) <= {40, 41, 42} for row in range(3))
    assert all(said.row(row)[3:] == [STOP] for row in range(3))


def test_impossible_grammars_are_refused() -> None:
    with pytest.raises(InputError, match="no answers to choose from"):
        one_of([], 10, STOP)
    with pytest.raises(InputError, match="has no tokens"):
        one_of([[]], 10, STOP)
    with pytest.raises(InputError, match="0 tokens out of 1"):
        any_of([1], 0, 10, STOP)
    with pytest.raises(InputError, match="shortest answer takes 3 tokens, the limit is 2"):
        check_limit(one_of([[1, 2]], 10, STOP), 2)
    with pytest.raises(InputError, match="temperature"):
        Sampling(temperature=0.0)
    with pytest.raises(InputError, match="top_k"):
        Sampling(top_k=0)


@pytest.fixture(scope="module")
def codec() -> FASTCodec:
    rng = np.random.default_rng(0)
    return FASTCodec.fit(0.3 * rng.normal(size=(200, 4, 3)).cumsum(axis=1), vocab_size=400)


@pytest.mark.parametrize("dialect", ["pi05", "pi0_fast"])
def test_the_grammar_of_actions_is_what_decodes(codec: FASTCodec, dialect: str) -> None:
    """Every encoded chunk is in it, and a thousand random walks through it decode, ids within symbols among them."""
    tokenizer = FASTTokenizer(embedded(), codec, dialect, max_token_len=64)
    grammar = action_grammar(tokenizer, 4, 3)
    rng = np.random.default_rng(1)

    for chunk in rng.normal(size=(50, 4, 3)):
        ids = [*tokenizer.action_head, *(tokenizer.fast_last_id - i for i in codec.encode(chunk)), tokenizer.stop_id]
        assert grammar.accepts(ids)
        assert not grammar.accepts(ids[:-1]) and not grammar.accepts([*ids[:-2], ids[-1]])
        assert tokenizer.actions_from(ids[:-2] + ids[-1:], 4, 3).actions is None

    members = [np.flatnonzero(grammar.token_class == kind) for kind in range(grammar.following.shape[1])]
    split_symbols = 0
    for _ in range(1000):
        state, ids = 0, []
        while state != grammar.end:
            kind = rng.choice(np.flatnonzero(grammar.following[state] >= 0))
            ids.append(int(rng.choice(members[kind])))
            state = grammar.following[state, kind]
        decoded = tokenizer.actions_from(ids, 4, 3)
        assert decoded.actions is not None, decoded.invalid
        fast = [tokenizer.fast_last_id - i for i in ids[len(tokenizer.action_head) : -1]]
        split_symbols += any(not is_whole(codec.bytes_of([i])) for i in fast)

    assert split_symbols > 100


def is_whole(spelled: bytes) -> bool:
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_random_weights_speak_whole_chunks_within_the_budget(codec: FASTCodec) -> None:
    tokenizer = FASTTokenizer(embedded(), codec, max_token_len=64)
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size + 5)  # rows that no token has
    params, observation, _ = asked(config)
    grammar = action_grammar(tokenizer, 4, 3)
    keys = jax.random.split(jax.random.key(0), 3)
    for limit in (int(grammar.needed[0]), 10, 16):
        said = say(params, config, observation, grammar, limit, Sampling(3.0), keys)
        for row in range(3):
            assert said.ended[row] and tokenizer.actions_from(said.row(row), 4, 3).actions is not None

    # The control: without the grammar none of them is a chunk.
    free = say(params, config, observation, anything(tokenizer.vocab_size, tokenizer.stop_id), 16)
    assert all(tokenizer.actions_from(free.row(row), 4, 3).invalid for row in range(3))


def test_a_codec_without_single_bytes_has_no_grammar(codec: FASTCodec) -> None:
    class Poor(FASTCodec):
        """Ids of three coefficients alone: four can never be spelled."""

        size = 1

        def bytes_of(self, ids: list[int]) -> bytes:
            return b"abc" * len(ids)

    poor = Poor(codec.tokenizer, codec.scale, codec.min_token, codec.vocab_size)
    tokenizer = FASTTokenizer(embedded(), poor, max_token_len=64)
    with pytest.raises(InputError, match="cannot spell every chunk"):
        action_grammar(tokenizer, 2, 2)
    assert action_grammar(tokenizer, 3, 2).needed[0] == 3  # two ids and the stop
