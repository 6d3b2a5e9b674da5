"""Environments side by side: one thread each, all of them closed, and nothing drawn that nobody looks at."""

import threading
from typing import Any

import gymnasium
import numpy as np
import pytest

from insula.evaluate.closed_loop import evaluate
from insula.evaluate.housing import housed
from insula.worlds.seeds import EVALUATION
from insula.worlds.tabletop import make_tabletop
from insula.worlds.tabletop.environment import TabletopEnv


class Traced(gymnasium.Wrapper):
    """Notes which thread does what."""

    made: list["Traced"]

    def __init__(self) -> None:
        super().__init__(make_tabletop(image_size=16))
        self.calls = [("make", threading.get_ident())]
        Traced.made.append(self)

    def reset(self, **options: Any) -> Any:
        self.calls.append(("reset", threading.get_ident()))
        return super().reset(**options)

    def step(self, action: np.ndarray) -> Any:
        self.calls.append(("step", threading.get_ident()))
        return super().step(action)

    def close(self) -> None:
        self.calls.append(("close", threading.get_ident()))
        super().close()


@pytest.fixture(autouse=True)
def made() -> list[Traced]:
    Traced.made = []
    return Traced.made


class Swaying:
    """Moves by its seeds, and keeps the pictures it was shown."""

    def __init__(self) -> None:
        self.shown: dict[tuple[int, ...], dict[str, np.ndarray]] = {}

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        return self.chunk((0,))

    def act_batch(self, observations: list[dict[str, Any]], seeds: Any) -> np.ndarray:
        for observation, seed in zip(observations, seeds, strict=True):
            self.shown[tuple(seed)] = observation["images"]
        return np.stack([self.chunk(seed) for seed in seeds])

    def chunk(self, seed: Any) -> np.ndarray:
        return np.random.default_rng([abs(part) for part in seed]).uniform(-1, 1, (3, 7))


def test_each_stays_in_its_thread_and_is_closed(made) -> None:
    with housed(Traced, 5, threads=2) as places:
        assert len({place.home for place in places}) == 2
        for place in places:
            place.home.submit(place.env.reset, seed=0).result()
    threads = [{thread for _, thread in env.calls} for env in made]
    assert all(len(one) == 1 for one in threads) and threading.get_ident() not in set.union(*threads)
    assert len(set.union(*threads)) == 2
    assert all([name for name, _ in env.calls] == ["make", "reset", "close"] for env in made)


def test_those_that_were_made_are_closed_where_a_later_one_cannot_be(made) -> None:
    def make() -> Traced:
        if len(made) == 2:
            raise RuntimeError("no third")
        return Traced()

    with pytest.raises(RuntimeError, match="no third"), housed(make, 3, threads=2):
        raise AssertionError("unreachable")
    assert [env.calls[-1][0] for env in made] == ["close", "close"]


def test_what_fails_in_an_environment_is_told_and_all_are_closed(made) -> None:
    class Broken(Traced):
        def step(self, action: np.ndarray) -> Any:
            raise RuntimeError("the arm is stuck")

    with pytest.raises(RuntimeError, match="the arm is stuck"):
        evaluate(Swaying(), 2, environment=Broken)
    assert len(made) == 4 and all(env.calls[-1][0] == "close" for env in made)


class Staring(Traced):
    """Somebody's wrapper, that looks at each picture."""

    def step(self, action: np.ndarray) -> Any:
        observation, *others = super().step(action)
        assert observation["images"]["front"].any()
        return observation, *others


def test_somebody_elses_environments_are_at_home_with_the_caller_and_see_everything(made) -> None:
    evaluate(Swaying(), 2, environment=Staring, record=0)
    threads = {thread for env in made for _, thread in env.calls}
    assert len(made) == 4 and threads == {threading.get_ident()}

    # Gymnasium's own, whose checker looks at each observation.
    evaluate(Swaying(), 1, environment=lambda: gymnasium.make("insula/Tabletop-v0", image_size=64), record=0)


def test_a_policy_sees_the_pictures_of_its_step_and_no_others_are_drawn(monkeypatch) -> None:
    drawn, draw = [], TabletopEnv._draw
    monkeypatch.setattr(TabletopEnv, "_draw", lambda self, cameras: drawn.append(cameras) or draw(self, cameras))

    policy, every = Swaying(), 3
    done = evaluate(policy, 2, replan_steps=every, record=0, swap=False)
    assert {e.steps for e in done.episodes} == {100}
    # At its reset, and after every third of its steps: the hundredth is the first of three, and nobody looks.
    assert len(drawn) == 2 * (1 + 33)

    env = make_tabletop()
    env.reset(seed=EVALUATION.start)
    for step in range(100):
        if step % every == 0:
            chunk = policy.chunk((EVALUATION.start, 0, step))
            seen = policy.shown[EVALUATION.start, 0, step]
            again = env.unwrapped._draw(("front", "wrist"))
            assert all(np.array_equal(seen[camera], again[camera]) for camera in again)
        env.step(chunk[step % every])
    env.close()


def test_a_recording_has_every_frame_and_is_the_same_episode() -> None:
    watched = evaluate(Swaying(), 1, replan_steps=3, record=1, swap=False)
    unwatched = evaluate(Swaying(), 1, replan_steps=3, record=0, swap=False)
    assert watched.episodes == unwatched.episodes
    frames = watched.recordings[0].frames
    assert len(frames) == 101 and all(frame.any() for frame in frames)
    assert len(np.unique(frames.reshape(101, -1), axis=0)) > 90
