"""The tabletop: the same seed is the same scene, the judge tells right from wrong, the expert solves it."""

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from insula.worlds import seeds
from insula.worlds.tabletop import MAX_EPISODE_STEPS, demonstrator, make_tabletop, rendering
from insula.worlds.tabletop.environment import FINGER_TRAVEL, MAX_STEP, TabletopEnv
from insula.worlds.tabletop.instructions import COLORS, all_instructions, instruction, parse
from insula.worlds.tabletop.scene import BOWL_RADIUS, GRIPPER_HIGH, GRIPPER_LOW
from insula.worlds.tabletop.tasks.pairs import pair_goal


@pytest.fixture(scope="module")
def env():
    made = make_tabletop()
    yield made
    made.close()


def drive(env, task, seed=0, options=None):
    """Let the expert do `task`, whatever the instruction was; info at the end."""
    _, info = env.reset(seed=seed, options=options)
    for _ in range(60):
        _, _, done, _, info = env.step(demonstrator.act(env.unwrapped.table(), pair_goal(task)))
        if done:
            break
    return info


def asked(env):
    (placement,) = env.unwrapped.goal.placements
    return placement.block, placement.target


def others(table, task):
    block = next(b.color for b in table.blocks if b.color != task[0])
    return block, next(b.color for b in table.bowls if b.color != task[1])


# --- scenes ---------------------------------------------------------------------------------------------------------


def test_same_seed_same_pixels_other_seed_differs(env):
    first, _ = env.reset(seed=7)
    other, _ = env.reset(seed=8)
    again, _ = env.reset(seed=7)
    for camera in ("front", "wrist"):
        assert np.array_equal(first["images"][camera], again["images"][camera])
        assert not np.array_equal(first["images"][camera], other["images"][camera])
    assert np.array_equal(first["state"], again["state"]) and first["task"] == again["task"]


def test_same_actions_same_pixels_in_another_environment(env):
    actions = np.random.default_rng(0).uniform(-1, 1, (15, 7))
    ends = []
    twin = TabletopEnv()
    for tabletop in (env, twin):
        tabletop.reset(seed=3)
        ends.append([tabletop.step(a)[0] for a in actions][-1])
    twin.close()
    assert np.array_equal(ends[0]["images"]["wrist"], ends[1]["images"]["wrist"])
    assert np.array_equal(ends[0]["state"], ends[1]["state"])


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_swap_keeps_the_scene_and_changes_block_and_bowl(env, seed):
    plain, _ = env.reset(seed=seed)
    swapped, _ = env.reset(seed=seed, options={"swap": True})
    assert np.array_equal(plain["images"]["front"], swapped["images"]["front"])
    (block, bowl), (other_block, other_bowl) = parse(plain["task"]), parse(swapped["task"])
    assert block != other_block and bowl != other_bowl
    facts = env.unwrapped.facts().table
    assert other_block in {b.color for b in facts.blocks} and other_bowl in {b.color for b in facts.bowls}


def test_task_option_asks_for_a_pair_and_refuses_absent_colors(env):
    env.reset(seed=5)
    table = env.unwrapped.table()
    pair = others(table, asked(env))
    assert env.reset(seed=5, options={"task": pair})[0]["task"] == instruction(*pair)
    absent = next(c for c in COLORS if c not in {b.color for b in table.blocks})
    with pytest.raises(ValueError, match=f"block color in this scene: got '{absent}'"):
        env.reset(seed=5, options={"task": (absent, pair[1])})
    with pytest.raises(ValueError, match="both 'swap' and 'task'"):
        env.reset(seed=5, options={"task": pair, "swap": True})
    with pytest.raises(ValueError, match="swop"):
        env.reset(seed=5, options={"swop": True})


def test_colors_are_distinct_and_nothing_overlaps(env):
    for seed in range(50):
        env.reset(seed=seed)
        table = env.unwrapped.table()
        assert len({b.color for b in table.blocks}) == 3 and len({b.color for b in table.bowls}) == 2
        spots = [b.position[:2] for b in table.blocks]
        gaps = [np.hypot(*(a - b)) for i, a in enumerate(spots) for b in spots[:i]]
        assert min(gaps) > 0.08
        assert min(np.hypot(*(s - bowl.position[:2])) for s in spots for bowl in table.bowls) > BOWL_RADIUS + 0.03


def test_image_size_is_free_and_checked():
    big = TabletopEnv(image_size=224, render_mode="rgb_array")
    observation, _ = big.reset(seed=0)
    assert observation["images"]["wrist"].shape == big.render().shape == (224, 224, 3)
    big.close()
    big.close()
    with pytest.raises(ValueError, match="image_size: got 8"):
        TabletopEnv(image_size=8)
    with pytest.raises(ValueError, match="render_mode: got 'human'"):
        TabletopEnv(render_mode="human")


def test_gymnasium_accepts_it():
    made = TabletopEnv()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*spec.*")
        check_env(made, skip_render_check=True)
    made.close()


def test_randomize_covers_heights_grasps_and_bowls(env):
    env.reset(seed=0)
    rng, tables = np.random.default_rng(0), []
    for _ in range(120):
        observation = env.unwrapped.randomize(rng)
        assert env.observation_space.contains(observation)
        tables.append(env.unwrapped.table())
    held = [t for t in tables if t.held]
    resting = [t for t in tables if any(t.container(b.color) for b in t.blocks)]
    heights = np.array([t.gripper[2] for t in tables])
    assert 0.12 < len(held) / 120 < 0.4 and 0.12 < len(resting) / 120 < 0.4
    assert heights.min() < 0.04 and heights.max() > 0.16
    for table in held:
        assert np.linalg.norm(table.block(table.held).position - table.gripper) < 0.025


# --- actions --------------------------------------------------------------------------------------------------------


def test_each_action_moves_its_own_axis(env):
    for axis, column in ((0, 0), (1, 1), (2, 2)):
        env.reset(seed=1)
        before = env.unwrapped.table().gripper
        action = np.zeros(7)
        action[column], action[6] = 1.0, -1.0
        env.step(action)
        moved = env.unwrapped.table().gripper - before
        assert abs(moved[axis] - MAX_STEP) < 0.002 and np.abs(np.delete(moved, axis)).max() < 0.001
    for ignored in (3, 4):
        env.reset(seed=1)
        before = env.unwrapped.table()
        env.step(np.eye(7)[ignored])
        after = env.unwrapped.table()
        assert np.abs(after.gripper - before.gripper).max() < 0.001 and abs(after.yaw - before.yaw) < 0.001


def test_gripper_closes_above_zero_and_opens_otherwise(env):
    env.reset(seed=1)
    env.step(np.array([0, 0, 0, 0, 0, 0, 0.1]))
    closing = env.unwrapped.table().opening
    env.step(np.array([0, 0, 0, 0, 0, 0, 0.0]))
    assert closing < 0.8 < env.unwrapped.table().opening


def test_the_gripper_stays_in_its_workspace(env):
    env.reset(seed=1)
    for _ in range(25):
        env.step(np.array([1, -1, -1, 0, 0, 1, -1]))
    assert np.all(env.unwrapped.table().gripper <= GRIPPER_HIGH + 0.005)
    assert np.all(env.unwrapped.table().gripper >= GRIPPER_LOW - 0.005)


def test_bad_actions_are_named(env):
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"dz=nan"):
        env.step(np.array([0, 0, np.nan, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"gripper=inf"):
        env.step(np.array([0, 0, 0, 0, 0, 0, np.inf]))
    with pytest.raises(ValueError, match=r"shape \(6,\), expected \(7,\): dx, dy"):
        env.step(np.zeros(6))
    with pytest.raises(ValueError, match="one step of a chunk"):
        env.step(np.zeros((10, 7)))
    env.step(np.zeros(7))  # and the environment is still well


def test_before_reset_nothing_works():
    made = TabletopEnv()
    with pytest.raises(RuntimeError, match="before reset"):
        made.step(np.zeros(7))
    with pytest.raises(RuntimeError, match="before reset"):
        made.table()


# --- the judge ------------------------------------------------------------------------------------------------------


def test_success_and_every_kind_of_wrong(env):
    env.reset(seed=0)
    task = asked(env)
    block, bowl = others(env.unwrapped.table(), task)
    right = drive(env, task)
    assert right["success"] and not right["wrong_object"]
    for wrong in ((block, task[1]), (task[0], bowl), (block, bowl)):
        info = drive(env, wrong)
        assert info["wrong_object"] and not info["success"]
    assert drive(env, wrong, options={"task": wrong})["success"]  # the same motion is right when asked for
    assert not env.reset(seed=0)[1]["wrong_object"]  # and forgotten with the next scene


def test_a_held_block_over_its_bowl_is_no_success_yet(env):
    env.reset(seed=0)
    tabletop, seen = env.unwrapped, 0
    for _ in range(60):
        table = tabletop.table()
        above = np.hypot(*(table.gripper - table.bowl(asked(env)[1]).position)[:2]) < BOWL_RADIUS
        _, _, done, _, info = env.step(demonstrator.act(table, tabletop.goal))
        if above and info["held"] == asked(env)[0]:
            seen += 1
            assert not info["success"]
        if done:
            break
    assert seen > 0 and info["success"]


def test_time_limit_truncates(env):
    env.reset(seed=0)
    ends = [env.step(np.zeros(7))[2:4] for _ in range(MAX_EPISODE_STEPS)]
    assert ends[-1] == (False, True) and not any(done for done, late in ends[:-1] if late)


# --- the expert -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_expert_solves_unseen_scenes(env, noise):
    rng = np.random.default_rng(0)
    episodes = [demonstrator.rollout(env, rng, noise, seed=seed) for seed in seeds.EVALUATION.take(12)]
    assert sum(e.success for e in episodes) >= 11
    assert np.mean([len(e.labels) for e in episodes]) < 45


def test_dart_executes_noise_and_records_the_clean_action(env):
    noisy = demonstrator.rollout(env, np.random.default_rng(0), 0.3, seed=2)
    clean = demonstrator.rollout(env, np.random.default_rng(0), 0.0, seed=2)
    assert np.array_equal(clean.labels, clean.executed)
    assert np.abs(noisy.labels - noisy.executed)[:, [0, 1, 2, 5]].max() > 0.1
    assert np.array_equal(noisy.labels[:, [3, 4, 6]], noisy.executed[:, [3, 4, 6]])
    assert noisy.labels.dtype == np.float32 and noisy.labels.shape == (len(noisy.observations), 7)


def test_expert_label_is_bounded_anywhere(env):
    tabletop, rng = env.unwrapped, np.random.default_rng(4)
    for _ in range(40):
        tabletop.randomize(rng)
        label = demonstrator.act(tabletop.table(), tabletop.goal)
        assert np.isfinite(label).all() and np.abs(label).max() <= 1


def test_expert_recovers_from_anywhere(env):
    env.reset(seed=0)
    tabletop, rng, solved = env.unwrapped, np.random.default_rng(1), 0
    for _ in range(10):
        tabletop.randomize(rng)
        for _ in range(80):
            if env.unwrapped.step(demonstrator.act(tabletop.table(), tabletop.goal))[2]:
                solved += 1
                break
    assert solved >= 8


# --- words, seeds, OpenGL -------------------------------------------------------------------------------------------


def test_instructions_parse_back():
    assert len(all_instructions()) == 36
    assert all(instruction(*parse(text)) == text for text in all_instructions())
    with pytest.raises(ValueError, match="did you mean 'purple'"):
        parse("put the purpel block in the red bowl")
    with pytest.raises(ValueError, match="expected 'put the"):
        parse("place the red block")


def test_seed_ranges_never_meet():
    assert (seeds.DEMONSTRATIONS.start, seeds.EVALUATION.start, seeds.PRETRAINING.start) == (0, 1_000_000, 2_000_000)
    assert 999_999 in seeds.DEMONSTRATIONS and 1_000_000 not in seeds.DEMONSTRATIONS
    with pytest.raises(ValueError, match="demonstrations seeds: asked for 2"):
        seeds.DEMONSTRATIONS.take(2, offset=999_999)
    with pytest.raises(ValueError, match=r"overlap: a ends at 9, b starts at 5"):
        seeds.refuse_overlap([seeds.SeedRange("b", 5, 5), seeds.SeedRange("a", 0, 10)])
    with pytest.raises(ValueError, match="evaluation: 1 seeds were used before, first 3"):
        seeds.refuse_seen([3, 4], [1, 2, 3], "evaluation")
    seeds.refuse_seen([4], [1, 2, 3], "evaluation")


def test_without_opengl_the_error_names_what_to_install(monkeypatch):
    def broken(backend, size):
        raise ImportError(f"no {backend} here")

    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(rendering, "_open", broken)
    monkeypatch.setattr(rendering, "_forget_pyopengl", lambda: None)
    made = TabletopEnv()
    with pytest.raises(rendering.GLError, match="libegl1 libgl1-mesa-dri libosmesa6") as caught:
        made.reset(seed=0)
    assert "no egl here" in str(caught.value) and "no osmesa here" in str(caught.value)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(rendering.GLError, match="MUJOCO_GL='glfw'"):
        made.reset(seed=0)


def test_a_closed_renderer_says_so(env):
    env.reset(seed=0)
    renderer = rendering.Renderer(TabletopEnv().model, 64)
    renderer.close()
    with pytest.raises(rendering.GLError, match="closed"):
        renderer.draw(env.unwrapped.data, ("front",))


def test_fingers_open_further_than_a_block_is_wide():
    assert 2 * FINGER_TRAVEL > 0.08
