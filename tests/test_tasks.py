"""The tabletop's tasks: `put` is what it always was, the others draw the scenes and say the words that they should."""

import hashlib
import re
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
from task_worlds import NEW, both_goals, draws, undrawn_worlds

from insula.collect.command import CollectConfig, QuestionsConfig
from insula.errors import InputError
from insula.tokens.text import embedded
from insula.worlds.tabletop import demonstrator, make_tabletop, scene
from insula.worlds.tabletop.instructions import COLORS, instruction
from insula.worlds.tabletop.scene import BOWL_RADIUS, BOWL_WALL
from insula.worlds.tabletop.tasks import TASKS, find_task, named_tasks
from insula.worlds.tabletop.tasks.moving import SPEEDS
from insula.worlds.tabletop.tasks.pairs import SENTENCE
from insula.worlds.tabletop.tasks.unseen_pairs import HELD_OUT_PAIRS, asks_held_out


@pytest.fixture(scope="module")
def worlds():
    with undrawn_worlds() as made:
        yield made


# --- put is what it was ---------------------------------------------------------------------------------------------

# Made with the code before there were other tasks.
MODEL = "530bd4e984beb99b"
PINNED = {
    0: ("8906c4e2e5b10ab8", "1d4f28a477253caf", (169.0, 161.17, 176.01)),
    1: ("35fb8496143e3e48", "d136bc060c03dea5", (171.06, 170.09, 173.44)),
    7: ("0100ac65211c4320", "1ebd642c880ac5c3", (169.87, 172.38, 170.08)),
    1_000_000: ("047e88285c35c810", "8b4f01a38e71a6cb", (162.38, 170.09, 170.79)),
}


def digest(*parts: Any) -> str:
    """Of texts, and of numbers to a tenth of a millimeter: another processor rounds the last digits otherwise."""
    whole = hashlib.sha256()
    for part in parts:
        text = isinstance(part, str)
        whole.update(part.encode() if text else (np.round(np.asarray(part, np.float64), 4) + 0.0).tobytes())
    return whole.hexdigest()[:16]


def test_put_is_pinned():
    """Scene, words, model, pictures, the expert's actions and what came of them."""
    assert digest(scene.mjcf(64)) == MODEL != digest(scene.mjcf(64, bowls=3))
    env = make_tabletop("put")
    for seed, (start, actions, colors) in PINNED.items():
        observation, _ = env.reset(seed=seed)
        assert np.allclose(observation["images"]["front"].mean(axis=(0, 1)), colors, atol=0.5)
        table = env.unwrapped.table()
        swapped, _ = env.reset(seed=seed, options={"swap": True})
        things = [*table.blocks, *table.bowls]
        places = [thing.position for thing in things]
        words = [observation["task"], swapped["task"], *(thing.color for thing in things)]
        assert digest(*words, *places, observation["state"]) == start

        episode = demonstrator.rollout(env, np.random.default_rng([seed, 1]), 0.3, seed=seed)
        states = [seen["state"] for seen in episode.observations]
        assert digest(episode.labels, episode.executed, *states) == actions
        assert set(episode.subtasks) == {observation["task"]}
    env.close()


def test_put_has_one_sentence_in_training():
    assert {goal.instruction for goal in both_goals("put", "train")} == {
        goal.placements[0].text for goal in both_goals("put", "train")
    }
    assert SENTENCE.format(block="red", bowl="blue") == instruction("red", "blue")
    held_out = both_goals("put", "held_out", 50)
    assert not any(goal.instruction == goal.placements[0].text for goal in held_out)  # the control: other words


# --- scenes and words -----------------------------------------------------------------------------------------------


def scene_of(env: Any, seed: int, **options: Any) -> tuple[list[float], str]:
    env.reset(seed=seed, options=options)
    table = env.unwrapped.table()
    return [float(x) for b in (*table.blocks, *table.bowls) for x in b.position], env.unwrapped.goal.instruction


@pytest.mark.parametrize("name", NEW)
def test_a_scene_is_the_same_for_its_seed_and_another_in_every_task(worlds, name):
    env = worlds[name]
    first = scene_of(env, 3)
    assert first == scene_of(env, 3) and first[0] != scene_of(env, 4)[0]
    assert all(first[0] != scene_of(other, 3)[0] for task, other in worlds.items() if task != name)


@pytest.mark.parametrize("name", list(TASKS))
def test_another_goal_of_the_same_scene(worlds, name):
    env = worlds[name]
    own = scene_of(env, 5)
    goal = env.unwrapped.goal
    assert scene_of(env, 5, swap=True)[0] == own[0]
    other = env.unwrapped.goal
    if goal.ordered:
        assert set(other.placements) == set(goal.placements)
        assert all(a != b for a, b in zip(other.placements, goal.placements, strict=True))
    else:
        assert not set(goal.placements) & set(other.placements)


def test_held_out_pairs_are_never_trained_and_always_asked():
    assert sorted(b for b, _ in HELD_OUT_PAIRS) == sorted(w for _, w in HELD_OUT_PAIRS) == sorted(COLORS * 2)
    assert not any(asks_held_out(goal) for goal in both_goals("unseen-pairs", "train"))
    assert all(asks_held_out(goal) for goal in both_goals("unseen-pairs", "held_out"))
    assert any(asks_held_out(goal) for goal in both_goals("put", "train"))  # the control
    words = {goal.instruction for goal in both_goals("unseen-pairs", "train")}
    assert len(words) == 24  # every other pair is trained


def test_a_pair_that_is_held_out_is_asked_beside_one_that_is_shown():
    """A policy that has learned where a block goes, and not what the words say, is wrong there."""
    for one in draws("unseen-pairs", "held_out", 300):
        for goal in (one.goal, one.other):
            (asked,) = goal.placements
            (other,) = set(one.layout.bowl_colors) - {asked.target}
            assert (asked.block, other) not in HELD_OUT_PAIRS

    # The control: in training the bowl that is not asked for may be of either kind, and tells nothing.
    kinds = {
        (one.goal.placements[0].block, color) in HELD_OUT_PAIRS
        for one in draws("unseen-pairs", "train", 50)
        for color in set(one.layout.bowl_colors) - {one.goal.placements[0].target}
    }
    assert kinds == {True, False}


def template(text: str) -> str:
    """A sentence without what the scene decides: colors, sizes and relations."""
    text = re.sub(rf"\b({'|'.join(COLORS)})\b", "C", text)
    text = re.sub(r"the (largest|smallest) block|the block (left|right) of the C bowl", "B", text)
    return re.sub(r"the block (nearest to|farthest from) the C bowl", "B", text)


def test_words_that_are_held_out_are_never_trained_and_made_of_words_that_are():
    trained = {template(goal.instruction) for name in TASKS for goal in both_goals(name, "train", 80)}
    vocabulary = {word for sentence in trained for word in sentence.split()} | {"C", "B"}
    for name in TASKS:
        if name == "unseen-pairs":  # known words throughout: what is held out are pairs
            continue
        held_out = {template(goal.instruction) for goal in both_goals(name, "held_out", 40)}
        assert held_out and not held_out & trained
        assert {word for sentence in held_out for word in sentence.split()} <= vocabulary, held_out
    assert len({template(goal.instruction) for goal in both_goals("sort", "train", 40)}) > 2  # the control


def test_sentences_are_short():
    goals = [goal for name in TASKS for split in ("train", "held_out") for goal in both_goals(name, split, 100)]
    assert max(len(embedded().encode(goal.instruction)) for goal in goals) <= 16
    assert max(len(embedded().encode(place.text)) for goal in goals for place in goal.placements) <= 9
    with make_tabletop("relation", 16) as env:
        assert all(env.observation_space["task"].contains(goal.instruction) for goal in goals)


def test_names_and_options_that_are_wrong_say_what_is_right(worlds):
    with pytest.raises(InputError, match=r"task: got 'stak', expected one of put, .* \(did you mean 'stack'\?\)"):
        make_tabletop("stak")
    with pytest.raises(InputError, match="moving, all"):
        named_tasks("everything")
    assert named_tasks("all") == tuple(TASKS) and named_tasks("sort") == ("sort",)
    for config in (CollectConfig, QuestionsConfig):
        with pytest.raises(InputError, match="did you mean 'moving'"):
            config(Path("x"), task="movin")
    with pytest.raises(InputError, match="did you mean 'held_out'"):
        worlds["put"].reset(seed=0, options={"split": "heldout"})
    with pytest.raises(InputError, match="a goal of 'stack' is no pair"):
        worlds["stack"].reset(seed=0, options={"task": ("red", "blue")})
    with pytest.raises(InputError, match="only 'put' has such scenes"):
        worlds["sort"].unwrapped.randomize(np.random.default_rng(0))
    for name in TASKS:
        assert worlds[name].spec.max_episode_steps == find_task(name).max_steps


# --- what is special about each -------------------------------------------------------------------------------------


def test_sort_has_a_bowl_of_each_block_s_color_in_an_order_of_its_own():
    scenes = draws("sort", "train", 60)
    assert all(sorted(one.layout.block_colors) == sorted(one.layout.bowl_colors) for one in scenes)
    assert any(one.layout.block_colors != one.layout.bowl_colors for one in scenes)
    for one in scenes:
        assert all(p.block == p.target for p in one.goal.placements) and len(one.goal.placements) == 3
        named = re.findall("|".join(COLORS), one.goal.instruction)
        assert [p.block for p in one.goal.placements] == named and one.goal.ordered
        gaps = [np.hypot(*(a - b)) for i, a in enumerate(one.layout.bowl_xy) for b in one.layout.bowl_xy[:i]]
        assert min(gaps) > 2 * (BOWL_RADIUS + BOWL_WALL)


def test_some_towers_have_three_blocks():
    heights = [len(goal.placements) for goal in both_goals("stack", "train", 200)]
    assert set(heights) == {1, 2} and 0.3 < np.mean(np.array(heights) == 2) < 0.7


def measured(layout: scene.SceneLayout, word: str, bowl: str | None) -> dict[str, float]:
    """How much each block is what the word says, the less the more."""
    at = None if bowl is None else layout.bowl_xy[layout.bowl_colors.index(bowl)]
    found = {}
    for color, pose, half in zip(layout.block_colors, layout.block_poses, layout.block_halves, strict=True):
        if at is None:
            found[color] = half if word == "smallest" else -half
        elif word in ("left", "right"):
            found[color] = (pose[0] - at[0]) * (1 if word == "left" else -1)
        else:
            found[color] = np.hypot(*(pose[:2] - at)) * (1 if word == "nearest" else -1)
    return found


def test_a_relation_is_plainly_true_of_one_block():
    """Recomputed from the scene, from the sentence's words alone."""
    pattern = re.compile(r"(largest|smallest|left|right|nearest|farthest)(?: \w+ the (\w+) bowl)?")
    seen = set()
    for one in draws("relation", "train", 200):
        for goal in (one.goal, one.other):
            word, bowl = pattern.search(goal.instruction).groups()
            found = measured(one.layout, word, bowl)
            first, second, _ = sorted(found, key=found.__getitem__)
            assert goal.placements[0].block == first, goal
            assert found[second] - found[first] > 0.003
            if word in ("left", "right"):
                assert found[first] <= -0.05 and found[second] >= 0.05
            seen.add(word)
    assert len(seen) == 6


def test_blocks_of_other_sizes_lie_on_the_table_as_they_are(worlds):
    env = worlds["relation"]
    for seed in range(3):
        env.reset(seed=seed)
        for _ in range(5):
            env.step(np.zeros(7))
        blocks = env.unwrapped.table().blocks
        assert sorted(b.half for b in blocks) == [0.016, 0.020, 0.024]
        assert all(abs(b.position[2] - b.half) < 0.001 for b in blocks)
        model = env.unwrapped.model
        geoms = [model.geom(f"block{i}").id for i in range(3)]
        expected = [[b.half] * 3 for b in blocks]
        assert np.array_equal(model.geom_size[geoms], expected)
        assert np.allclose(model.geom_aabb[geoms, 3:], expected) and np.allclose(
            model.geom_rbound[geoms], [b.half * 3**0.5 for b in blocks]
        )


@pytest.mark.parametrize(("half", "touches"), [(0.024, True), (0.016, False)])
def test_a_block_of_another_size_is_met_at_its_new_faces(worlds, half, touches):
    """Not only drawn so: MuJoCo excludes collisions by boxes of its own, and would pass over what grew."""
    env = worlds["relation"]
    env.reset(seed=0)
    truth = env.unwrapped
    which = [block.half for block in truth.table().blocks].index(half)
    x, y, _ = truth.table().bowls[0].position
    # Outside, beside the wall: a half of 0.02 would end 1.5 mm before it.
    truth.data.qpos[6 + 7 * which : 13 + 7 * which] = [
        x + BOWL_RADIUS + BOWL_WALL + 0.0215,
        y,
        half + 0.003,
        1,
        0,
        0,
        0,
    ]
    mujoco.mj_forward(truth.model, truth.data)

    geom, bowl = truth.model.geom(f"block{which}").id, truth.model.body("bowl0").id
    bodies = [set(truth.model.geom_bodyid[pair]) for pair in truth.data.contact.geom if geom in pair]
    assert any(bowl in pair for pair in bodies) == touches


def test_distractors_have_the_blocks_colors_and_are_no_blocks(worlds):
    for one in draws("distractors", "train", 60):
        assert sorted(one.layout.distractor_colors) == sorted(one.layout.block_colors)
        spots = np.concatenate([one.layout.block_poses[:, :2], one.layout.distractor_xy])
        assert min(np.hypot(*(a - b)) for i, a in enumerate(spots) for b in spots[:i] if i >= 3) > 0.035
    env = worlds["distractors"]
    env.reset(seed=0)
    facts = env.unwrapped.facts()
    assert {f"{d.color} {d.shape}" for d in facts.table.distractors} < set(facts.pixels["front"])
    assert all(facts.pixels["front"][f"{d.color} {d.shape}"].visible > 0.5 for d in facts.table.distractors)
    assert len(facts.table.blocks) == 3
    worlds["put"].reset(seed=0)
    assert worlds["put"].unwrapped.table().distractors == ()


def test_bowls_drift_and_never_into_anything(worlds):
    env = worlds["moving"]
    for seed in range(6):
        env.reset(seed=seed)
        tables = [env.unwrapped.table()]
        for _ in range(90):
            env.step(np.array([0, 0, 1, 0, 0, 0, -1]))
            tables.append(env.unwrapped.table())
        bowls = np.array([[b.position[:2] for b in t.bowls] for t in tables])
        speeds = np.hypot(*np.moveaxis(np.diff(bowls, axis=0), -1, 0)) / 0.1
        assert np.all(speeds < SPEEDS[1] + 0.001)
        assert np.all(np.median(speeds, axis=0) > SPEEDS[0] - 0.001)  # slower only where it turns round
        assert np.hypot(*(bowls[:, 0] - bowls[:, 1]).T).min() > 2 * (BOWL_RADIUS + BOWL_WALL)
        for one in tables[0].blocks:
            moved = np.hypot(*(tables[-1].block(one.color).position - one.position)[:2])
            assert moved < 0.001  # nothing was run over
    worlds["put"].reset(seed=0)  # the control
    before = worlds["put"].unwrapped.table().bowls[0].position
    worlds["put"].step(np.zeros(7))
    assert np.array_equal(before, worlds["put"].unwrapped.table().bowls[0].position)
