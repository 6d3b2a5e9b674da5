"""From a data set to batches: chunks, padding, tokens, and an order that resumes exactly."""

import dataclasses
import logging
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest

from insula.data import loader as loading
from insula.data import normalize as normalize
from insula.data.chunks import chunk_indices
from insula.data.fitting import action_chunks, fit_stats
from insula.data.lerobot import LeRobotDataset, LeRobotWriter
from insula.data.lerobot.info import Feature, image_feature
from insula.data.loader import Loader
from insula.data.mapping import Columns, RobotData
from insula.data.mixture import Mixture, Order
from insula.data.observe import Sizes
from insula.data.robot import Robot
from insula.data.samples import Samples
from insula.data.waiting import is_due
from insula.errors import DatasetError, WorkerError
from insula.tokens import text
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer

LENGTHS, HORIZON, SIZE = (9, 4, 12), 6, 8
FEATURES = {
    "observation.images.front": image_feature(SIZE, SIZE),
    "observation.state": Feature("float32", (3,), ("x", "y", "z")),
    "action": Feature("float32", (2,), ("dx", "grip")),
}
SIZES = Sizes(HORIZON, 3, 2, {"front": (SIZE, SIZE)})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
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
    return RobotData(root, {"front": "observation.images.front"})


@pytest.fixture(scope="module")
def dataset(data):
    return LeRobotDataset(data.path)


@pytest.fixture(scope="module")
def robot(data):
    return Robot(fit_stats(data, HORIZON), ("front",), HORIZON)


@pytest.fixture(scope="module")
def codec(data, robot):
    return FASTCodec.fit(action_chunks(data, robot)[0], vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer(codec):
    return FASTTokenizer(text.embedded(), codec, max_token_len=96)


@pytest.fixture(scope="module")
def samples(data, robot, tokenizer):
    return Samples(data, robot, tokenizer, SIZES)


ALL = np.arange(sum(LENGTHS))


# --- samples ---------------------------------------------------------------------------------------------------------


def test_a_chunk_clamps_at_the_end_of_its_episode():
    index, is_pad = chunk_indices(np.array([2, 7]), np.array([9, 9]), 4)
    assert index.tolist() == [[2, 3, 4, 5], [7, 8, 8, 8]]
    assert is_pad.tolist() == [[False] * 4, [False, False, True, True]]


def test_a_batch_holds_exactly_the_frames_values(dataset, samples, robot):
    rows = [0, 8, 9, 24, 3]
    batch = samples.batch(rows)
    observation = batch.observation
    key = "observation.images.front"
    np.testing.assert_array_equal(observation.images["front"], dataset.images(key, rows))
    assert observation.images["front"].dtype == np.uint8 and observation.image_mask["front"].tolist() == [True] * 5
    np.testing.assert_array_equal(
        observation.state, robot.stats["state"].normalize(dataset.column("observation.state")[rows])
    )
    actions = dataset.column("action")
    np.testing.assert_allclose(robot.stats["actions"].unnormalize(batch.actions[0]), actions[0:6], atol=1e-5)
    np.testing.assert_allclose(robot.stats["actions"].unnormalize(batch.actions[1]), actions[[8] * 6], atol=1e-5)
    assert batch.action_is_pad.sum(1).tolist() == [0, 5, 2, 5, 0]
    assert batch.action_dim_mask.all() and batch.action_dim_mask.shape == (5, 2)
    assert batch.actions.dtype == observation.state.dtype == np.float32 and observation.tokens.dtype == np.int32


def test_no_chunk_reaches_into_the_next_episode(dataset, samples):
    ends = np.repeat(dataset.episodes.stop, dataset.episodes.length)
    batch = samples.batch(np.arange(len(samples)))
    np.testing.assert_array_equal((~batch.action_is_pad).sum(1), np.minimum(HORIZON, ends - np.arange(25)))


def test_tokens_are_the_tokenizers_and_decode_to_the_chunk(dataset, samples, tokenizer):
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


def test_some_episodes_only(data, dataset, robot, tokenizer):
    eye = dataclasses.replace(data, cameras={"eye": "observation.images.front"})
    sizes = dataclasses.replace(SIZES, cameras={"eye": (SIZE, SIZE)})
    chosen = Samples(eye, robot, tokenizer, sizes, episodes=[1])
    assert len(chosen) == LENGTHS[1] and chosen.frames.index.tolist() == [9, 10, 11, 12]
    assert set(chosen.batch([0]).observation.images) == {"eye"}
    found = fit_stats(data, HORIZON, [1])["actions"].max
    np.testing.assert_array_equal(found, dataset.column("action")[9:13].max(0))


def test_chunks_to_fit_on_are_those_that_are_tokenized(data, robot, samples):
    chunks, clipped = action_chunks(data, robot)
    np.testing.assert_array_equal(chunks, samples.batch(ALL).actions)
    assert clipped == 0 and action_chunks(data, robot, limit=7)[0].shape == (7, HORIZON, 2)


def test_outliers_are_clipped_and_counted(data, tokenizer, robot):
    narrow = robot.stats | {"actions": normalize.NormStats(*(np.array([v, v]) for v in (0.0, 1.0, -0.1, 0.1)))}
    clipped = dataclasses.replace(robot, stats=narrow)
    assert np.abs(Samples(data, clipped, tokenizer, SIZES).batch(ALL).actions).max() == clipped.clip
    assert 0 < action_chunks(data, clipped)[1] < 1


def test_a_projected_state_is_not_in_the_prompt(data, robot, tokenizer, samples):
    silent = Samples(data, robot, tokenizer, SIZES, state_in_prompt=False).batch(ALL)
    spoken = samples.batch(ALL)
    np.testing.assert_array_equal(silent.observation.state, spoken.observation.state)
    assert (silent.observation.token_mask.sum(1) < spoken.observation.token_mask.sum(1)).all()


@pytest.fixture(scope="module")
def lengths(samples):
    return samples.batch(ALL).observation.token_mask.sum(1)


def test_an_overlong_sample_is_an_error_naming_it(data, dataset, robot, codec, lengths):
    tight = FASTTokenizer(text.embedded(), codec, max_token_len=int(lengths.max()) - 1)
    episode, step = dataset.episodes.locate(int(lengths.argmax()))
    with pytest.raises(DatasetError, match=f"episode {episode}, frame {step} .*tokens, the limit is .*drop_token_loss"):
        Samples(data, robot, tight, SIZES).tokenize_ahead()


def test_an_overlong_sample_keeps_its_flow_loss_when_asked(data, robot, codec, samples, lengths, caplog):
    limit = int(np.median(lengths))
    tight = FASTTokenizer(text.embedded(), codec, max_token_len=limit)
    kept = Samples(data, robot, tight, SIZES, on_overflow="drop_token_loss")
    with caplog.at_level(logging.WARNING):
        kept.tokenize_ahead()
    over = lengths > limit
    assert 0 < kept.dropped == over.sum() < len(samples) and f"{over.sum()} of 25 samples" in caplog.text
    found, whole = kept.batch(ALL), samples.batch(ALL)
    np.testing.assert_array_equal(found.loss_mask.any(1), ~over)
    np.testing.assert_array_equal(found.ar_mask.any(1), ~over)
    prompt = (whole.observation.token_mask & ~whole.ar_mask)[over]
    np.testing.assert_array_equal(found.observation.token_mask[over].sum(1), prompt.sum(1))  # what serving sees
    np.testing.assert_array_equal(found.actions, whole.actions)


def test_an_overlong_prompt_is_always_an_error(data, robot, codec):
    tight = FASTTokenizer(text.embedded(), codec, max_token_len=90, max_prompt_len=6)
    with pytest.raises(DatasetError, match=r"episode 0, frame 0 .*the prompt takes"):
        Samples(data, robot, tight, SIZES, on_overflow="drop_token_loss").tokenize_ahead()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": {"front": "observation.images.fornt"}}, "did you mean 'observation.images.front'"),
        ({"cameras": {"front": "action"}}, "'action' is no camera"),
        ({"actions": (Columns("actions"),)}, "did you mean 'action'"),
        ({"state": (Columns("action"),)}, "'state' have 3 dimensions, data set .* has 2"),
        ({"state": (Columns("observation.state", (0, 1, 3)),)}, "has dimensions 0 to 2, the mapping asks for .3."),
        ({"delta": (2,)}, "delta names dimension 2"),
        ({"instruction": "action"}, "holds float32 values of shape .2.; an instruction is a column of text"),
        ({"episodes": [3]}, "episode 3 does not exist; it has episodes 0 to 2"),
        ({"episodes": []}, "no episode was chosen"),
        ({"on_overflow": "cut"}, "got 'cut', expected 'error' or 'drop_token_loss'"),
        ({"sizes": Sizes(HORIZON, 3, 1, SIZES.cameras)}, "action_dim is 2, the model's 1"),
        ({"sizes": Sizes(HORIZON - 1, 3, 2, SIZES.cameras)}, "horizon is 6, the model's 5"),
    ],
)
def test_wrong_requests_are_named(data, robot, tokenizer, change, message, unchecked):
    mapped = {key: change[key] for key in change if key not in ("episodes", "on_overflow", "sizes")}
    others = {key: change[key] for key in change if key not in mapped}
    right = {"data": dataclasses.replace(data, **mapped), "robot": robot, "tokenizer": tokenizer, "sizes": SIZES}
    with pytest.raises(ValueError, match=message):
        Samples(**(right | others))


# --- order and loader ------------------------------------------------------------------------------------------------


def rows_of(order, steps):
    return [order[step][1].tolist() for step in steps]


def test_every_sample_once_an_epoch_and_another_order_each():
    order = Order([12], [1.0], 4, seed=0)
    first, second = (np.concatenate(rows_of(order, range(e * 3, e * 3 + 3))) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist() and first.tolist() != list(range(12))


def test_the_order_depends_on_seed_and_position_alone():
    forward = rows_of(Order([10], [1.0], 4, seed=5), range(9))
    again = Order([10], [1.0], 4, seed=5)
    assert rows_of(again, reversed(range(9))) == forward[::-1]
    assert rows_of(Order([10], [1.0], 4, seed=6), range(9)) != forward
    assert again[10_000_000][1].shape == (4,)


def same(a, b):
    np.testing.assert_array_equal(a.observation.tokens, b.observation.tokens)
    np.testing.assert_array_equal(a.observation.images["front"], b.observation.images["front"])
    np.testing.assert_array_equal(a.observation.state, b.observation.state)
    np.testing.assert_array_equal(a.actions, b.actions)
    np.testing.assert_array_equal(a.action_is_pad, b.action_is_pad)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_loader_continues_the_same_order(samples, workers):
    """200 samples after a resume, for a thread, one process and two."""
    mixture = Mixture({"robot": samples})
    order = mixture.order(8, 2)
    with Loader(mixture, 8, seed=2, start_step=5, workers=workers) as resumed:
        for step in range(5, 30):
            same(next(resumed), mixture.batch(*order[step]))
    assert order[5][1].tolist() != order[6][1].tolist()


def test_hosts_share_a_batch(samples):
    mixture = Mixture({"robot": samples})
    whole = mixture.batch(*mixture.order(4, 0)[0])
    parts = []
    for host in (0, 1):
        with Loader(mixture, 4, seed=0, rows=slice(2 * host, 2 * host + 2)) as batches:
            parts.append(next(batches).observation.tokens)
    assert len(parts[0]) == 2
    np.testing.assert_array_equal(np.concatenate(parts), whole.observation.tokens)


def test_close_ends_its_threads(samples):
    before = threading.active_count()
    loader = Loader(Mixture({"robot": samples}), 4, seed=0)
    next(loader)
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="after close"):
        next(loader)
    for thread in threading.enumerate()[before:]:
        thread.join(timeout=10)
    assert threading.active_count() <= before


def test_an_error_in_the_thread_reaches_the_consumer(samples, monkeypatch):
    good, mixture = samples.batch, Mixture({"robot": samples})

    def failing(rows):
        if 7 in rows:
            raise DatasetError("frame 7 is damaged")
        return good(rows)

    order = mixture.order(4, 0)
    due = next(step for step in range(9) if 7 in order[step][1])
    monkeypatch.setattr(type(samples), "batch", lambda self, rows: failing(rows))
    with Loader(mixture, 4, seed=0) as loader:
        for _ in range(due):
            next(loader)
        with pytest.raises(DatasetError, match="frame 7"):
            next(loader)
        with pytest.raises(RuntimeError, match="after an error"):
            next(loader)


@dataclasses.dataclass(frozen=True)
class Ending:
    """Samples, the making of which ends the process, and not as an error would."""

    samples: Samples
    quarantined: int = 0

    def __len__(self):
        return len(self.samples)

    def batch(self, rows):
        os._exit(0)

    def where(self, row):
        return self.samples.where(row)


def test_a_worker_that_is_killed_is_named(samples):
    """By what killed it, and with what to do; the batches it had made are still given."""
    others = set(multiprocessing.active_children())
    with Loader(Mixture({"robot": samples}), 4, seed=0, workers=1) as loader:
        next(loader)
        (worker,) = set(multiprocessing.active_children()) - others
        os.kill(worker.pid, signal.SIGKILL)
        said = r"killed by SIGKILL \(.* want of memory\); the batch of step \d+ will not come.*--resume.* --workers"
        with pytest.raises(WorkerError, match=said):
            for _ in range(20):
                next(loader)
        with pytest.raises(RuntimeError, match="after an error"):
            next(loader)


def test_a_worker_that_ends_by_itself_is_named(samples, monkeypatch):
    """Grain would wait for ever: it asks a process for its exit code, and 0 is none to it."""
    monkeypatch.setattr(loading, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(loading, "CLOSING", 0.3)
    with (
        Loader(Mixture({"robot": Ending(samples)}), 4, seed=0, start_step=6, workers=1) as loader,
        pytest.raises(WorkerError, match=r"ended with exit code 0.*the batch of step 7 will not come"),
    ):
        next(loader)


def test_a_loader_closes_though_a_worker_is_stuck(samples, monkeypatch):
    """As by a disk that hangs; stopped, it answers no signal but the last."""
    monkeypatch.setattr(loading, "CLOSING", 0.5)
    others = set(multiprocessing.active_children())
    with Loader(Mixture({"robot": samples}), 4, seed=0, workers=1) as loader:
        next(loader)
        (worker,) = set(multiprocessing.active_children()) - others
        os.kill(worker.pid, signal.SIGSTOP)
        assert worker.is_alive()
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


def test_a_batch_that_does_not_come_is_told_of(samples, data, dataset, monkeypatch, caplog):
    """Whose turn it is, and of what; twice, then it comes after all, and is the right one. Control: no word where each
    comes at once."""
    mixture = Mixture({"robot": samples})
    good, stuck = mixture.batch, threading.Event()

    class Heard(logging.Handler):
        def emit(self, record):
            if len(caplog.records) > 1:
                stuck.set()

    def late(source, rows):
        assert stuck.wait(60)
        return good(source, rows)

    with Loader(mixture, 4, seed=0) as loader:
        next(loader)
    assert not caplog.records

    monkeypatch.setattr(loading, "LOOK_EVERY", 0.01)
    monkeypatch.setattr(loading, "FIRST_WARNING", 0.0)
    monkeypatch.setattr(mixture, "batch", late)
    heard = Heard()
    loading.log.addHandler(heard)
    try:
        with Loader(mixture, 4, seed=0, start_step=3) as loader:
            same(next(loader), good(*mixture.order(4, 0)[3]))
    finally:
        loading.log.removeHandler(heard)

    assert len(caplog.records) >= 2
    episode, frame = dataset.episodes.locate(int(mixture.order(4, 0)[3][1][0]))
    said = f"robot (4 samples, the first is data set {data.path}, episode {episode}, frame {frame})"
    for record in caplog.records:
        assert "the batch of step 4 has not come for 0 s. A thread should make it from" in record.message
        assert said in record.message


def test_waits_are_told_of_less_and_less_often():
    told = [0.0]
    for waited in np.arange(1.0, 1000.0).tolist():
        if is_due(waited, told[-1], 60.0):
            told.append(waited)
    assert told[1:] == [60, 120, 240, 480, 960]


def test_a_loader_of_nothing_is_refused(samples):
    with pytest.raises(ValueError, match=r"got \[0\] samples and batch size 4"):
        Order([0], [1.0], 4, 0)
    with pytest.raises(ValueError, match=r"weights .* for 2 sources"):
        Order([3, 3], [1.0], 4, 0)
    with pytest.raises(ValueError, match="start_step -1"):
        Loader(Mixture({"robot": samples}), 4, 0, start_step=-1)
