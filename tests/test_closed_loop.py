"""Closed-loop evaluation: it says 100 % of an expert, 0 % of an idler, and catches a policy that does not listen."""

import contextlib
import json
import time
from typing import Any

import av
import gymnasium
import numpy as np
import pytest
from PIL import Image

from insula.errors import DecodeError, InputError, InsulaError
from insula.evaluate.closed_loop import ClosedLoop, evaluate, measure_latency
from insula.evaluate.episodes import EpisodeResult, Recording
from insula.evaluate.intervals import wilson
from insula.evaluate.rollout_video import reel, write_video
from insula.worlds.seeds import DEMONSTRATIONS, EVALUATION
from insula.worlds.tabletop import demonstrator, make_tabletop

HORIZON, SCENES = 3, 5


class Privileged(gymnasium.ObservationWrapper):
    """Shows the scripted double the truth, with the scene's own goal, beside what a policy sees."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.env.reset(seed=seed)
        self.env.unwrapped.own = self.env.unwrapped.goal
        return super().reset(seed=seed, options=options)

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        return observation | {"truth": self.env.unwrapped}


def privileged() -> gymnasium.Env:
    return Privileged(make_tabletop(image_size=16))


class ScriptedPolicy:
    """The scripted expert; with `listens` False it does the scene's own task whatever is asked."""

    def __init__(self, listens: bool = True):
        self.listens, self.batches = listens, set[int]()

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        truth = observation["truth"]
        goal = truth.goal if self.listens else truth.own
        return np.repeat(demonstrator.act(truth.table(), goal)[None], HORIZON, axis=0)

    def act_batch(self, observations: list[dict[str, Any]], seeds: Any) -> np.ndarray:
        self.batches.add(len(observations))
        return np.stack([self.act(o) for o in observations])


class Constant:
    """The same chunk for everything."""

    def __init__(self, chunk: np.ndarray):
        self.chunk = chunk

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        return self.chunk

    def act_batch(self, observations: list[dict[str, Any]], seeds: Any) -> np.ndarray:
        return np.stack([self.chunk] * len(observations))


def run(policy: Any, episodes: int = SCENES, **options: Any) -> ClosedLoop:
    return evaluate(policy, episodes, replan_steps=1, num_envs=4, environment=privileged, **options)


@pytest.fixture(scope="module")
def of_expert() -> tuple[ScriptedPolicy, ClosedLoop, list[tuple[int, int]]]:
    policy, told = ScriptedPolicy(), list[tuple[int, int]]()
    done = run(policy, record=2, progress=lambda done, total: told.append((done, total)))
    return policy, done, told


# --- what it measures -----------------------------------------------------------------------------------------------


def test_an_expert_succeeds_with_either_instruction(of_expert) -> None:
    _, done, _ = of_expert
    assert done.success.rate == done.swapped_success.rate == 1
    assert done.wrong_object.rate == done.swapped_wrong_object.rate == 0
    assert 10 < done.mean_steps < 60 and done.mean_steps == done.mean_steps_of_successes


def test_doing_nothing_never_succeeds() -> None:
    done = run(Constant(np.zeros((HORIZON, 7), np.float32)), 2, record=0)
    assert done.success.count == done.swapped_success.count == 0
    assert done.wrong_object.count == 0 and done.mean_steps == 100
    assert done.mean_steps_of_successes is None and done.recordings == ()


def test_not_listening_shows_under_swap_and_only_there() -> None:
    done = run(ScriptedPolicy(listens=False), record=0)
    assert done.success.rate == 1 and done.wrong_object.rate == 0
    assert done.swapped_success.rate == 0 and done.swapped_wrong_object.rate == 1


def test_rows_are_in_order_and_swapped_tasks_differ(of_expert) -> None:
    policy, done, told = of_expert
    first = EVALUATION.start
    rows = [(e.seed, e.swapped) for e in done.episodes]
    assert rows == [(first + i, s) for i in range(SCENES) for s in (False, True)]
    for own, other in zip(done.episodes[::2], done.episodes[1::2], strict=True):
        (_, _, a, *_, c, _), (_, _, b, *_, d, _) = own.task.split(), other.task.split()
        assert a != b and c != d
    assert told == [(i + 1, 2 * SCENES) for i in range(2 * SCENES)]
    assert policy.batches == {4}  # padded to one size, down to the last episode


def test_the_first_scenes_are_recorded_with_either_instruction(of_expert) -> None:
    _, done, _ = of_expert
    kept = [(r.episode.seed - EVALUATION.start, r.episode.swapped) for r in done.recordings]
    assert kept == [(0, False), (0, True), (1, False), (1, True)]
    own, swapped = done.recordings[:2]
    assert own.frames.shape == (own.episode.steps + 1, 16, 32, 3) and own.frames.dtype == np.uint8
    assert np.array_equal(own.frames[0], swapped.frames[0])  # the same scene
    assert not np.array_equal(own.frames[0], own.frames[-1])


def test_without_swap() -> None:
    done = run(ScriptedPolicy(), 2, swap=False, record=0)
    assert len(done.episodes) == 2 and done.success.rate == 1
    assert done.swapped_success is None and done.to_json()["swapped_success"] is None
    assert "swapped" not in done.summary()


def test_json_and_summary(of_expert) -> None:
    _, done, _ = of_expert
    raw = json.loads(json.dumps(done.to_json(), allow_nan=False))
    assert raw["success"]["rate"] == 1 and raw["success"]["low"] == pytest.approx(wilson(5, 5).low)
    assert raw["scenes"] == SCENES and raw["first_seed"] == EVALUATION.start
    assert raw["episodes"][1] == vars(done.episodes[1])
    assert 0 <= raw["latency_ms"]["p50"] <= raw["latency_ms"]["p90"] <= raw["latency_ms"]["p99"]
    summary = done.summary()
    assert "swapped" in summary and "100% (57% to 100%)" in summary and "p99" in summary


def test_executes_as_many_steps_as_told_before_looking_again() -> None:
    class Counting(Constant):
        calls = 0

        def act_batch(self, observations: list[dict[str, Any]], seeds: Any) -> np.ndarray:
            self.calls += 1
            return super().act_batch(observations, seeds)

    calls = {}
    for replan_steps in (1, 3):
        policy = Counting(np.zeros((HORIZON, 7)))
        evaluate(policy, 1, replan_steps=replan_steps, swap=False, environment=privileged)
        calls[replan_steps] = policy.calls
    assert calls == {1: 100, 3: 34}


def test_latency_calls_act_alone(of_expert) -> None:
    calls = []

    class Noting(Constant):
        def act(self, observation: dict[str, Any]) -> np.ndarray:
            calls.append(observation["n"])
            return self.chunk

    measure_latency(Noting(np.zeros((1, 7))), [{"n": 0}, {"n": 1}], calls=4)
    assert calls == [0, 1, 0, 1, 0, 1, 0, 1, 0]  # warm-up first


@pytest.mark.parametrize(("error", "is_one"), [(DecodeError, False), (InputError, True)])
def test_a_chunk_that_was_not_said_has_its_latency_too(error: type[InsulaError], is_one: bool) -> None:
    class Mute(Constant):
        def act(self, observation: dict[str, Any]) -> np.ndarray:
            time.sleep(0.002)
            raise error("nothing was said")

    with pytest.raises(error) if is_one else contextlib.nullcontext():
        assert measure_latency(Mute(np.zeros((1, 7))), [{}], calls=4)["p50"] >= 2


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_chunk_that_is_not_finite_is_refused(bad: float) -> None:
    chunk = np.zeros((HORIZON, 7))
    chunk[2, 4] = bad  # beyond what is executed
    with pytest.raises(FloatingPointError, match=r"action\[2\]\[4\] is .* step 0 of seed 1000000"):
        run(Constant(chunk))


@pytest.mark.parametrize(
    ("chunk", "replan_steps", "message"),
    [
        (np.zeros((2, 6)), 1, r"got a chunk \[2, 6\], expected \[H, 7\]"),
        (np.zeros(7), 1, r"got a chunk \[7\]"),
        (np.zeros((2, 7)), 3, "chunks have only 2 steps"),
        (np.zeros((2, 7)), 0, "replan_steps is 0"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(chunk: np.ndarray, replan_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Constant(chunk), 1, replan_steps=replan_steps, environment=privileged)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_seed": 0}, "expected seeds from 1000000 to 1999999; these are kept for demonstrations"),
        ({"first_seed": EVALUATION.stop - 1}, "kept for pretraining"),
        ({"episodes": 0}, "expected at least 1"),
        ({"used_seeds": [EVALUATION.start + 1]}, "1 seeds were used before, first 1000001"),
        ({"first_seed": 3, "allow_any_seed": True, "used_seeds": range(5)}, "2 seeds were used before, first 3"),
    ],
)
def test_seeds_of_another_purpose_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(Constant(np.zeros((1, 7))), **{"episodes": 2} | options)


def test_any_seed_when_asked_for() -> None:
    done = run(ScriptedPolicy(), 1, first_seed=DEMONSTRATIONS.start, allow_any_seed=True, record=0)
    assert done.success.rate == 1


# --- intervals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),  # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published_values(count: int, total: int, low: float, high: float) -> None:
    rate = wilson(count, total)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson(total - count, total)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_and_confidence() -> None:
    assert wilson(0, 4).low == 0 and wilson(4, 4).high == 1
    assert wilson(5, 10, 0.99).low < wilson(5, 10).low < wilson(500, 1000).low < 0.5
    assert str(wilson(9, 10)) == "90% (60% to 98%)"


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 3), (4, 3), (1, 2, 1.0)])
def test_wilson_refuses(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="expected"):
        wilson(*arguments)


# --- video ----------------------------------------------------------------------------------------------------------


def recording(success: bool) -> Recording:
    ramp = np.linspace(0, 255, 6).astype(np.uint8)[:, None, None, None]
    return Recording(EpisodeResult(1, False, success, False, 5, "put"), np.broadcast_to(ramp, (6, 17, 34, 3)).copy())


def test_mp4_reads_back(tmp_path) -> None:
    frames = recording(True).frames
    path = write_video(tmp_path / "new" / "rollout.mp4", frames, fps=10)
    with av.open(str(path)) as container:
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 10
    assert len(read) == 6 and read[0].shape == (18, 34, 3)  # an odd side gains a row
    assert np.abs(read[3].astype(int) - frames[3, 0, 0, 0]).mean() < 8


def test_gif_reads_back(tmp_path) -> None:
    with Image.open(write_video(tmp_path / "rollout.gif", recording(True).frames, fps=5)) as image:
        assert image.n_frames == 6 and image.size == (34, 17) and image.info["duration"] == 200


def test_a_reel_ends_each_episode_on_its_color() -> None:
    frames = list(reel([recording(True), recording(False)]))
    assert len(frames) == 2 * (6 + 8)
    (r, g, _), (r2, g2, _) = frames[13][0, 0].tolist(), frames[-1][0, 0].tolist()
    assert g > r and r2 > g2
    assert np.array_equal(frames[13][20, 20], recording(True).frames[-1, 5, 5])
    assert np.array_equal(frames[5][:68, :136], recording(True).frames[5].repeat(4, 0).repeat(4, 1))  # not before it
    assert np.any(frames[13][68:] != frames[-1][68:])  # nor is the end told by color alone


def test_videos_that_cannot_be_written_say_why(tmp_path) -> None:
    frames = recording(True).frames
    with pytest.raises(ValueError, match=r"ending '.mp3', expected one of .mp4, .gif \(did you mean '.mp4'\?\)"):
        write_video(tmp_path / "a.mp3", frames)
    with pytest.raises(ValueError, match=r"frame 0 is float64\[17, 34, 3\], expected uint8"):
        write_video(tmp_path / "a.mp4", frames / 255)
    with pytest.raises(ValueError, match=r"frame 1 is uint8\[17, 30, 3\], expected .* all of one size"):
        write_video(tmp_path / "b.gif", [frames[0], frames[0][:, :30]])
    with pytest.raises(ValueError, match="fps is 0"):
        write_video(tmp_path / "a.gif", frames, fps=0)
    with pytest.raises(ValueError, match="no frame"):
        write_video(tmp_path / "a.gif", frames[:0])
    assert not (tmp_path / "a.mp4").exists() and not (tmp_path / "a.gif").exists()
    with pytest.raises(ValueError, match="record=1"):
        reel([])
