"""What a video shows beside the pictures: words, the way of the gripper as it really goes, and what is looked at."""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import av
import gymnasium
import jax.numpy as jnp
import numpy as np
import pytest
from small import FAR, SMALL, VARIANTS, difference, draws, jit, model, prefix
from small_policy import policy

from insula.data.normalize import NormStats
from insula.data.robot import Robot
from insula.decode.look import expert_look
from insula.errors import DecodeError
from insula.evaluate import overlay
from insula.evaluate.closed_loop import ClosedLoop, evaluate
from insula.evaluate.delayed import Delay, DelayedPolicy
from insula.evaluate.episodes import Acts, Planned
from insula.evaluate.explained import explain, look_at
from insula.evaluate.overlay import CLOSED, LINE_HEIGHT, OPEN, SCALE, add_caption, add_look, add_way, draw_frame
from insula.evaluate.rollout_video import HOLD, reel, write_video
from insula.model.config import ModelConfig
from insula.model.insulation import insulate
from insula.policy import Policy
from insula.policy.modes import SubtaskPolicy
from insula.policy.speaking import Said
from insula.worlds.tabletop import demonstrator, make_tabletop

TASK = "put the red block in the blue bowl"
FRAME = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
WIDE = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)


def planned(frame: np.ndarray = WIDE, **known: Any) -> Planned:
    """A plan of a robot with two square cameras, side by side in `frame`."""
    images = dict(zip(("front", "wrist"), np.split(frame, 2, axis=1), strict=True))
    chunk = np.array([[0, 0, 0, -1], [0, 0, 0, 1]], np.float32)
    return dataclasses.replace(Planned(0, {"images": images}, chunk), **known)


def changed(a: np.ndarray, b: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns in which two pictures differ."""
    rows, columns = np.nonzero((a != b).any(axis=-1))
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


# --- words ------------------------------------------------------------------------------------------------------------


def test_a_caption_changes_its_strip_alone() -> None:
    one, other = draw_frame(WIDE, TASK), draw_frame(WIDE, "stack the red block")
    height = SCALE * len(WIDE)
    assert np.array_equal(one[:height], WIDE.repeat(SCALE, 0).repeat(SCALE, 1))
    assert height <= changed(one, other)[0].start and changed(one, other)[0].stop <= height + LINE_HEIGHT + 4


@pytest.mark.parametrize(
    "known",
    [
        {"said": Said([1, 2], [-0.1, -0.2], True, "reach for it")},
        {"said": Said([1, 2], [-0.1, -0.2], False, "reach for it")},
        {"observation": planned().observation | {"subtask": "reach for it"}},
    ],
)
def test_the_subtask_is_in_the_second_line(known: dict[str, Any]) -> None:
    plain, told = draw_frame(WIDE, TASK, planned()), draw_frame(WIDE, TASK, planned(**known))
    assert changed(plain, told)[0].start > SCALE * len(WIDE) + LINE_HEIGHT


def test_the_words_are_those_that_were_said(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(overlay, "add_caption", lambda picture, *words: (written.append(words), picture)[1])
    said = Said([1, 2], [-0.1, -0.2], True, "reach for it")
    draw_frame(WIDE, TASK, planned(said=said))
    draw_frame(WIDE, TASK, planned(said=dataclasses.replace(said, ended=False)), holds=True)
    draw_frame(WIDE, TASK, planned(observation=planned().observation | {"subtask": "let go"}))
    assert written == [
        (TASK, "reach for it  (74%)", ""),
        (TASK, "never ended: reach for it  (74%)", "no chunk: it holds"),
        (TASK, "told: let go", ""),
    ]


def test_where_the_robot_holds_there_is_a_mark_at_the_right() -> None:
    plain, held = draw_frame(WIDE, TASK, planned()), draw_frame(WIDE, TASK, planned(), holds=True)
    rows, columns = changed(plain, held)
    assert rows.start > SCALE * len(WIDE) + LINE_HEIGHT and columns.start > SCALE * WIDE.shape[1] / 2


def test_no_word_is_cut_off() -> None:
    """What is longer than its line is smaller, and ends before the edge, or before the mark."""
    picture = np.zeros((8, 300, 3), np.uint8)
    empty = add_caption(picture, "")
    for words in ("put " * 5, "put " * 60, "put\nit\nthere " * 6):
        assert changed(empty, add_caption(picture, words))[1].stop <= 300 - overlay.MARGIN
    marked = add_caption(picture, "", "", "it holds")
    where = changed(empty, marked)[1]
    assert changed(marked, add_caption(picture, "", "put " * 60, "it holds"))[1].stop <= where.start


# --- the way ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> Any:
    made = make_tabletop()
    yield made
    made.close()


def gripper(world: gymnasium.Env) -> np.ndarray:
    pixel = world.unwrapped.facts().pixels["front"]["gripper"]
    return np.array([pixel.x, pixel.y])


def test_the_way_is_where_the_gripper_really_goes(world: gymnasium.Env) -> None:
    world.reset(seed=3)
    chunk = np.stack(demonstrator.rollout(world, np.random.default_rng(0), seed=3).executed[:12])
    world.reset(seed=3)
    way = world.unwrapped.chunk_pixels(chunk, "front")
    idle = world.unwrapped.chunk_pixels(np.zeros_like(chunk), "front")

    went = [gripper(world)]
    for action in chunk:
        world.step(action)
        went.append(gripper(world))
    assert way.shape == (13, 2) and np.abs(way - went).max() < 0.7  # of 64 pixels
    assert np.abs(idle - went).max() > 8 and np.ptp(idle, axis=0).max() == 0  # the control

    # And so the line is drawn there.
    picture = world.render()
    plan = Planned(0, {"images": {"front": picture}}, chunk, way)
    drawn, plain = draw_frame(picture, TASK, plan), draw_frame(picture, TASK)
    line = (drawn != plain).any(axis=-1)
    for x, y in SCALE * np.array(went):
        assert line[int(y) - 3 : int(y) + 4, int(x) - 3 : int(x) + 4].any()
    rows, columns = changed(drawn, plain)
    x, y = SCALE * np.array(went).T
    assert rows.start > y.min() - 10 and rows.stop < y.max() + 10
    assert columns.start > x.min() - 10 and columns.stop < x.max() + 10


def test_the_way_ends_at_the_edge_of_the_workspace(world: gymnasium.Env) -> None:
    world.reset(seed=3)
    out = np.tile(np.array([3.0, 0, 0, 0, 0, 0, 1]), (30, 1))  # an action counts as 1 at most
    way = world.unwrapped.chunk_pixels(out, "front")
    for action in out:
        world.step(action)
    assert np.abs(way[-1] - gripper(world)).max() < 0.7 and np.array_equal(way[-1], way[-2])
    assert not np.array_equal(way[0], way[1])
    with pytest.raises(ValueError, match="camera: got 'top', expected one of front, wrist"):
        world.unwrapped.chunk_pixels(out, "top")


def test_the_gripper_colors_the_way() -> None:
    picture = np.full((40, 40, 3), 128, np.uint8)
    points = np.array([[5.0, 20], [20, 20], [35, 20]])
    drawn = add_way(picture, points, np.array([False, True]))
    assert tuple(drawn[20, 10]) == OPEN and tuple(drawn[20, 27]) == CLOSED
    assert not np.any(picture != 128) and np.all(drawn[:10] == 128)

    # A point behind the camera is nowhere: neither is the way to it, nor from it.
    points[1] = np.nan
    assert np.array_equal(add_way(picture, points, np.array([False, True])), picture)


def test_the_way_stays_in_its_own_picture() -> None:
    pixels = np.array([[40.0, 32], [90, 32], [60, 50]])
    plain, drawn = draw_frame(WIDE, TASK, planned()), draw_frame(WIDE, TASK, planned(pixels=pixels))
    columns = changed(plain, drawn)[1]
    assert columns.stop == SCALE * WIDE.shape[1] // 2 and columns.start <= SCALE * 40


# --- where the expert looks -------------------------------------------------------------------------------------------


def test_patches_are_brighter_where_the_weights_are() -> None:
    picture = np.full((64, 64, 3), 100, np.uint8)
    weights = np.arange(16, dtype=np.float32).reshape(4, 4) / 15
    light = add_look(picture, weights).reshape(4, 16, 4, 16, 3).mean(axis=(1, 3, 4))
    assert np.all(np.diff(light.ravel()) > 3)
    even = add_look(picture, np.full((4, 4), 0.5, np.float32))
    assert len(np.unique(even.reshape(-1, 3), axis=0)) == 1  # the control


def test_a_wide_picture_has_the_patches_of_its_square() -> None:
    """Those above and below it are of the black that was added."""
    weights = np.zeros((4, 4), np.float32)
    weights[0], weights[1, 3] = 1, 1
    picture = np.full((32, 64, 3), 100, np.uint8)
    shown = add_look(picture, weights)
    dark = add_look(picture, np.zeros((4, 4), np.float32))
    assert changed(shown, dark) == (slice(0, 16), slice(48, 64))


def test_both_cameras_are_on_one_scale() -> None:
    bright, faint = np.full((2, 2), 0.02, np.float32), np.full((2, 2), 0.01, np.float32)
    shown = draw_frame(
        np.full((16, 32, 3), 100, np.uint8), TASK, planned(FRAME, look={"front": bright, "wrist": faint})
    )
    front, wrist = np.split(shown[: SCALE * 16], 2, axis=1)
    assert np.all(front.min(axis=(0, 1)) > wrist.max(axis=(0, 1)) + 9)


@pytest.mark.parametrize("name", VARIANTS)
def test_looks_are_shares_in_every_variant(name: str) -> None:
    """Watching changes nothing, and layers that are scanned are watched one by one, too."""
    config: ModelConfig = dataclasses.replace(SMALL, **VARIANTS[name])
    params, batch = model(config)
    memory = insulate(prefix(params, config, batch), config.num_memory)
    noisy, time = draws(config, batch, samples=2)
    watch = jit(lambda *inputs: expert_look(params.expert, config, *inputs))
    look = np.asarray(watch(memory, batch.observation.state, noisy, time))

    tokens = config.horizon + (config.state_input == "token")
    assert look.shape == (2, 2, 2, 4, config.num_memory + tokens)
    np.testing.assert_allclose(look.sum(-1), 1, rtol=1e-5)
    hidden = np.broadcast_to(~np.asarray(memory.mask)[:, None, None, None], look[..., : config.num_memory].shape)
    assert (look[..., : config.num_memory][hidden] == 0).all() and (look[..., : config.num_memory][~hidden] > 0).all()
    later = np.asarray(watch(memory, batch.observation.state, noisy, jnp.full_like(time, 0.01)))
    assert np.abs(look - later).max() > 0
    assert difference(look[:, :, 0], look[:, :, 1]) > FAR  # layers look at other things


# --- all of it --------------------------------------------------------------------------------------------------------

CONFIG = dataclasses.replace(
    SMALL, vocab_size=2800, max_prompt_len=80, max_fast_len=40, state_dim=5, action_dim=8, horizon=5
)
STEPS, REPLAN = 5, 2
WORDS = ("reach for the block", "let go")


@pytest.fixture(scope="module")
def acting() -> Policy:
    """With chunks of one step and one dimension fewer than the model's."""

    def stats(size: int) -> NormStats:
        return NormStats(np.zeros(size), np.ones(size), np.full(size, -1.0), np.ones(size))

    robot = Robot({"state": stats(5), "actions": stats(7)}, CONFIG.cameras, horizon=4)
    return policy(config=CONFIG, robot=robot)


def short_world() -> gymnasium.Env:
    return gymnasium.wrappers.TimeLimit(make_tabletop(image_size=16), STEPS)


def run(policy: Acts, record: int = 1, **options: Any) -> ClosedLoop:
    return evaluate(policy, 1, replan_steps=REPLAN, record=record, num_envs=2, environment=short_world, **options)


@pytest.fixture(scope="module")
def spoken(acting: Policy) -> SimpleNamespace:
    speaking = SubtaskPolicy(acting, every=4, known=WORDS)
    done = run(speaking)
    return SimpleNamespace(policy=speaking, done=done, recordings=explain(speaking, done.recordings))


def test_plans_are_kept_of_what_is_recorded_and_change_no_number(acting: Policy, spoken: SimpleNamespace) -> None:
    for recording in spoken.done.recordings:
        assert [plan.step for plan in recording.plans] == [0, 2, 4]
        assert [recording.planned(step).step for step in range(STEPS + 1)] == [0, 0, 2, 2, 4, 4]
        for plan in recording.plans:
            assert plan.chunk.shape == (4, 7) and plan.pixels.shape == (5, 2)
            assert plan.look is None and plan.said is None
            seen = np.concatenate(list(plan.observation["images"].values()), axis=1)
            assert np.array_equal(seen, recording.frames[plan.step])

    own = spoken.done.recordings[0]
    assert not np.array_equal(own.plans[0].chunk, own.plans[1].chunk)
    unrecorded = run(SubtaskPolicy(acting, every=4, known=WORDS), record=0)
    assert unrecorded.episodes == spoken.done.episodes and unrecorded.recordings == ()


def test_every_plan_knows_its_subtask_and_its_look(acting: Policy, spoken: SimpleNamespace) -> None:
    assert len(spoken.recordings) == 2
    for recording in spoken.recordings:
        said = spoken.policy.spoken[recording.episode.job.name]
        assert [one.step for one in said] == [0, 4]
        assert [plan.said for plan in recording.plans] == [said[0].said, said[0].said, said[1].said]

        assert all(plan.said.text in WORDS and 0 < plan.said.probability < 1 for plan in recording.plans)
        for plan in recording.plans:
            assert set(plan.look) == {"front", "wrist"} and plan.look["front"].shape == (2, 2)
            shares = sum(weights.sum() for weights in plan.look.values())
            assert 0 < shares < 1  # the rest is read of the prompt, and of the chunk itself

    # The looks are those of what was acted on: of another subtask, or other noise, they differ.
    plan = spoken.recordings[1].plans[1]
    asked = plan.observation | {"subtask": plan.said.text}
    other = plan.observation | {"subtask": WORDS[plan.said.text == WORDS[0]]}
    seed = (*spoken.recordings[1].episode.job.name, plan.step)
    same, words, noise = look_at(acting, [asked, other, asked], [seed, seed, (1, 2, 3)])
    assert difference(same, dict(plan.look)) < 1e-6
    assert difference(words, same) > 1e-5 and difference(noise, same) > 1e-5


def test_told_and_plain_policies_have_a_look_and_no_said_subtask(acting: Policy) -> None:
    speaking = SubtaskPolicy(acting)
    told = explain(speaking, run(speaking, told=True, swap=False).recordings)
    assert told[0].plans[0].said is None and told[0].plans[0].look is not None
    assert "block" in told[0].plans[0].observation["subtask"]

    plain = explain(acting, run(acting, swap=False).recordings)
    assert plain[0].plans[0].look is not None and "subtask" not in plain[0].plans[0].observation


class Speechless:
    """Has a chunk for the first plan of an episode alone; weights that could be looked at it has none."""

    def act(self, observation: dict[str, Any]) -> np.ndarray:
        return np.full((3, 7), 0.5, np.float32)

    def act_batch(self, observations: list[dict[str, Any]], seeds: Sequence[Sequence[int]]) -> list[Any]:
        return [
            DecodeError("nothing") if seed[-1] else self.act(o) for o, seed in zip(observations, seeds, strict=True)
        ]


def test_a_video_shows_what_is_known(spoken: SimpleNamespace, tmp_path: Any) -> None:
    frames = list(reel(spoken.recordings))
    bare = list(reel([dataclasses.replace(one, plans=()) for one in spoken.recordings]))
    assert len(frames) == len(bare) == 2 * (STEPS + 1 + HOLD)
    assert all((a != b).any() for a, b in zip(frames[: STEPS + 1], bare, strict=False))
    assert np.array_equal(frames[-1], bare[-1])  # an episode that is over has no plan

    with av.open(str(write_video(tmp_path / "a.mp4", iter(frames)))) as container:
        assert len(list(container.decode(video=0))) == len(frames)


def test_steps_without_a_chunk_are_marked() -> None:
    hold = np.array([0.0] * 6 + [np.nan])
    waiting = DelayedPolicy(Speechless(), Delay(), REPLAN, hold)
    (recording,) = explain(waiting, run(waiting, swap=False).recordings)
    held = tuple(waiting.held[recording.episode.job.name])
    assert held[:2] == (3, 4) and recording.plans[1].look is None
    assert [len(plan.chunk) for plan in recording.plans] == [3, 2, 2]  # with what is left behind the first two steps

    known, unknown = (list(reel([dataclasses.replace(recording, held=steps)])) for steps in (held, ()))
    assert [bool((a != b).any()) for a, b in zip(known, unknown, strict=True)][:STEPS] == [False] * 3 + [True] * 2
