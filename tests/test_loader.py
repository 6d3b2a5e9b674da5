"""From a data set to batches: chunks, padding, tokens, and an order that resumes exactly."""

import logging
import threading

import numpy as np
import pytest

from insula.data import normalise
from insula.data.lerobot import LeRobotDataset, LeRobotWriter
from insula.data.loader import BatchOrder, Loader
from insula.data.samples import ACTION_CLIP, action_chunks, chunk_indices, fit_stats, prepare, split_episodes
from insula.data.schema import DatasetError, Feature, image_feature
from insula.tokens import text
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer

LENGTHS, HORIZON, SIZE = (9, 4, 12), 6, 8
FEATURES = {
    "observation.images.front": image_feature(SIZE, SIZE),
    "observation.state": Feature("float32", (3,), ("x", "y", "z")),
    "action": Feature("float32", (2,), ("dx", "grip")),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(1)
    root = tmp_path_factory.mktemp("data") / "set"
    with LeRobotWriter(root, 10, FEATURES) as writer:
        for e, steps in enumerate(LENGTHS):
            frames = {
                "observation.images.front": rng.integers(0, 256, (steps, SIZE, SIZE, 3), dtype=np.uint8),
                "observation.state": rng.normal(size=(steps, 3)).astype(np.float32),
                "action": rng.normal(size=(steps, 2)).astype(np.float32).cumsum(0),
            }
            writer.add_episode(frames, f"put the {('red', 'blue')[e % 2]} block in the green bowl")
    return LeRobotDataset(root)


@pytest.fixture(scope="module")
def stats(dataset):
    return fit_stats(dataset)


@pytest.fixture(scope="module")
def codec(dataset, stats):
    return FASTCodec.fit(action_chunks(dataset, stats, HORIZON), vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer(codec):
    return FASTTokenizer(text.embedded(), codec, max_token_len=96)


@pytest.fixture(scope="module")
def samples(dataset, stats, tokenizer):
    return prepare(dataset, tokenizer, stats, HORIZON, ["front"])


# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_chunk_clamps_at_the_end_of_its_episode():
    index, is_pad = chunk_indices(np.array([2, 7]), np.array([9, 9]), 4)
    assert index.tolist() == [[2, 3, 4, 5], [7, 8, 8, 8]]
    assert is_pad.tolist() == [[False] * 4, [False, False, True, True]]


def test_a_batch_holds_exactly_the_frames_values(dataset, samples, stats):
    rows = [0, 8, 9, 24, 3]
    batch = samples.batch(rows)
    observation = batch.observation
    key = "observation.images.front"
    np.testing.assert_array_equal(observation.images["front"], dataset.images(key, rows))
    assert observation.images["front"].dtype == np.uint8 and observation.image_mask["front"].tolist() == [True] * 5
    np.testing.assert_array_equal(
        observation.state, stats["state"].normalise(dataset.column("observation.state")[rows])
    )
    actions = dataset.column("action")
    np.testing.assert_allclose(stats["actions"].unnormalise(batch.actions[0]), actions[0:6], atol=1e-5)
    np.testing.assert_allclose(stats["actions"].unnormalise(batch.actions[1]), actions[[8] * 6], atol=1e-5)
    assert batch.action_is_pad.sum(1).tolist() == [0, 5, 2, 5, 0]
    assert batch.action_dim_mask.all() and batch.action_dim_mask.shape == (5, 2)
    assert batch.actions.dtype == observation.state.dtype == np.float32 and observation.tokens.dtype == np.int32


def test_no_chunk_reaches_into_the_next_episode(dataset, samples):
    ends = np.repeat(dataset.episodes.stop, dataset.episodes.length)
    batch = samples.batch(np.arange(len(samples)))
    np.testing.assert_array_equal((~batch.action_is_pad).sum(1), np.minimum(HORIZON, ends - np.arange(25)))


def test_tokens_are_the_tokenizers_and_decode_to_the_chunk(dataset, samples, stats, tokenizer):
    batch = samples.batch(range(len(samples)))
    for n in (0, 8, 20):
        task = dataset.tasks[dataset.column("task_index")[n]]
        expected = tokenizer.tokenize(task, batch.observation.state[n], batch.actions[n])
        np.testing.assert_array_equal(batch.observation.tokens[n], expected.tokens)
        np.testing.assert_array_equal(batch.observation.token_mask[n], expected.token_mask)
        np.testing.assert_array_equal(batch.ar_mask[n], expected.ar_mask)
        np.testing.assert_array_equal(batch.loss_mask[n], expected.loss_mask)
        decoded = tokenizer.actions_from(batch.observation.tokens[n][batch.loss_mask[n]], HORIZON, 2)
        np.testing.assert_allclose(decoded.actions, batch.actions[n], atol=0.15)
    np.testing.assert_array_equal(samples.action_tokens, batch.loss_mask.sum(1))


def test_some_episodes_only(dataset, stats, tokenizer):
    chosen = prepare(dataset, tokenizer, stats, HORIZON, {"eye": "observation.images.front"}, episodes=[1])
    assert len(chosen) == LENGTHS[1] and chosen.frames.tolist() == [9, 10, 11, 12]
    assert set(chosen.batch([0]).observation.images) == {"eye"}
    np.testing.assert_array_equal(fit_stats(dataset, [1])["actions"].max, dataset.column("action")[9:13].max(0))


def test_chunks_to_fit_on_are_those_that_are_tokenised(dataset, stats, samples):
    np.testing.assert_array_equal(action_chunks(dataset, stats, HORIZON), samples.batch(range(25)).actions)
    assert action_chunks(dataset, stats, HORIZON, limit=7).shape == (7, HORIZON, 2)


def test_outliers_are_clipped_and_counted(dataset, stats, tokenizer, samples):
    narrow = stats | {"actions": normalise.NormStats(*(np.array([v, v]) for v in (0.0, 1.0, -0.1, 0.1)))}
    clipped = prepare(dataset, tokenizer, narrow, HORIZON, ["front"])
    assert np.abs(clipped.actions).max() == ACTION_CLIP and 0 < clipped.clipped < 1
    assert samples.clipped == 0


def test_a_projected_state_is_not_in_the_prompt(dataset, stats, tokenizer, samples):
    silent = prepare(dataset, tokenizer, stats, HORIZON, ["front"], state_in_prompt=False)
    np.testing.assert_array_equal(silent.state, samples.state)
    assert (silent.token_mask.sum(1) < samples.token_mask.sum(1)).all()


def test_an_overlong_sample_is_an_error_naming_it(dataset, stats, codec, samples):
    longest = int(samples.token_mask.sum(1).argmax())
    tight = FASTTokenizer(text.embedded(), codec, max_token_len=int(samples.token_mask.sum(1).max()) - 1)
    episode, step = dataset.episodes.locate(longest)
    with pytest.raises(DatasetError, match=f"episode {episode}, frame {step} .*tokens, the limit is .*drop_token_loss"):
        prepare(dataset, tight, stats, HORIZON, ["front"])


def test_an_overlong_sample_keeps_its_flow_loss_when_asked(dataset, stats, codec, samples, caplog):
    lengths = samples.token_mask.sum(1)
    limit = int(np.median(lengths))
    tight = FASTTokenizer(text.embedded(), codec, max_token_len=limit)
    with caplog.at_level(logging.WARNING):
        kept = prepare(dataset, tight, stats, HORIZON, ["front"], on_overflow="drop_token_loss")
    over = lengths > limit
    assert 0 < kept.dropped == over.sum() < len(samples) and f"{over.sum()} of 25 samples" in caplog.text
    np.testing.assert_array_equal(kept.loss_mask.any(1), ~over)
    np.testing.assert_array_equal(kept.ar_mask.any(1), ~over)
    prompt = (samples.token_mask & ~samples.ar_mask)[over]
    np.testing.assert_array_equal(kept.token_mask[over].sum(1), prompt.sum(1))  # exactly what serving sees
    np.testing.assert_array_equal(kept.batch(range(25)).actions, samples.batch(range(25)).actions)


def test_an_overlong_prompt_is_always_an_error(dataset, stats, codec):
    tight = FASTTokenizer(text.embedded(), codec, max_token_len=90, max_prompt_len=6)
    with pytest.raises(DatasetError, match=r"episode 0, frame 0 .*the prompt takes"):
        prepare(dataset, tight, stats, HORIZON, ["front"], on_overflow="drop_token_loss")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": ["fornt"]}, "did you mean 'observation.images.front'"),
        ({"cameras": {"front": "action"}}, "'action' is no camera"),
        ({"episodes": [3]}, "episode 3 does not exist; it has episodes 0 to 2"),
        ({"episodes": []}, "no episode was chosen"),
        ({"action_key": "actions"}, "did you mean 'action'"),
        ({"stats": {}}, "no 'state'"),
        ({"on_overflow": "cut"}, "got 'cut', expected 'error' or 'drop_token_loss'"),
        ({"horizon": 0}, "expected at least 1 step"),
        ({"state_key": "action"}, "have 3 dimensions, feature 'action' .* has 2"),
    ],
)
def test_wrong_requests_are_named(dataset, stats, tokenizer, change, message, unchecked):
    right = {"dataset": dataset, "tokenizer": tokenizer, "stats": stats, "horizon": HORIZON, "cameras": ["front"]}
    with pytest.raises(ValueError, match=message):
        prepare(**(right | change))


def test_split_by_episode():
    train, held_out = split_episodes(40, 0.1, seed=3)
    assert len(held_out) == 4 and sorted([*train, *held_out]) == list(range(40))
    again, other = (split_episodes(40, 0.1, seed)[1].tolist() for seed in (3, 4))
    assert held_out.tolist() == again != other
    assert len(split_episodes(5, 0.0, 0)[1]) == 0 and len(split_episodes(5, 0.01, 0)[1]) == 1
    with pytest.raises(ValueError, match="leaves none to train on"):
        split_episodes(1, 0.5, 0)
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        split_episodes(9, 1.0, 0)


# --- order and loader ------------------------------------------------------------------------------------------------


def test_every_sample_once_an_epoch_and_another_order_each():
    order = BatchOrder(12, 4, seed=0)
    first, second = (np.concatenate([order[step] for step in range(e * 3, e * 3 + 3)]) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist() and first.tolist() != list(range(12))


def test_the_order_depends_on_seed_and_position_alone():
    forward = [BatchOrder(10, 4, seed=5)[step].tolist() for step in range(9)]
    again = BatchOrder(10, 4, seed=5)
    assert [again[step].tolist() for step in reversed(range(9))] == forward[::-1]
    assert [BatchOrder(10, 4, seed=6)[step].tolist() for step in range(9)] != forward
    assert again[10_000_000].shape == (4,)


def test_a_resumed_loader_continues_the_same_order(samples):
    with Loader(samples, 4, seed=2) as straight:
        batches = [next(straight) for _ in range(9)]
    with Loader(samples, 4, seed=2) as interrupted:
        for _ in range(5):
            next(interrupted)
        position = interrupted.position
    assert position == 5
    with Loader(samples, 4, seed=2, start_step=position) as resumed:
        for expected in batches[5:]:
            batch = next(resumed)
            np.testing.assert_array_equal(batch.observation.tokens, expected.observation.tokens)
            np.testing.assert_array_equal(batch.observation.images["front"], expected.observation.images["front"])
            np.testing.assert_array_equal(batch.actions, expected.actions)
    assert (batches[0].observation.state != batches[1].observation.state).any()


def loader_threads() -> int:
    return sum(thread.name == "insula-loader" for thread in threading.enumerate())


def test_close_ends_the_thread(samples):
    loader = Loader(samples, 4, seed=0)
    next(loader)
    assert loader_threads() == 1
    loader.close()
    loader.close()
    assert loader_threads() == 0
    with pytest.raises(RuntimeError, match="after close"):
        next(loader)


def test_an_error_in_the_thread_reaches_the_consumer(samples, monkeypatch):
    good = samples.batch

    def failing(indices):
        if 7 in indices:
            raise DatasetError("frame 7 is damaged")
        return good(indices)

    due = next(step for step in range(9) if 7 in BatchOrder(len(samples), 4, 0)[step])
    monkeypatch.setattr(type(samples), "batch", lambda self, indices: failing(indices))
    with Loader(samples, 4, seed=0) as loader:
        for _ in range(due):
            next(loader)
        with pytest.raises(DatasetError, match="frame 7"):
            next(loader)
        assert loader.position == due
    assert loader_threads() == 0


def test_a_loader_of_nothing_is_refused(samples):
    with pytest.raises(ValueError, match="0 samples and batch size 4"):
        BatchOrder(0, 4, 0)
    with pytest.raises(ValueError, match="start_step -1"):
        Loader(samples, 4, 0, start_step=-1)
    assert loader_threads() == 0
