"""Questions: every answer is recomputed from the facts, and the told location shows the told color."""

import re

import numpy as np
import pytest

from insula.worlds.tabletop import make_tabletop
from insula.worlds.tabletop import quiz as q
from insula.worlds.tabletop.instructions import COLORS
from insula.worlds.tabletop.scene import RGBA

PLACE = r"((<loc\d{4}>){2,3}|not visible)"
LISTED = r"[a-z ]+(<loc\d{4}>){2,3}"
ANSWER = re.compile(rf"{PLACE}( and {PLACE})?|{LISTED}( {LISTED})*|[a-z0-9 ,]+")


@pytest.fixture(scope="module")
def scenes():
    """(observation, facts) of scenes of every sort."""
    env = make_tabletop()
    env.reset(seed=0)
    rng, found = np.random.default_rng(0), []
    for _ in range(60):
        observation = env.unwrapped.randomize(rng)
        found.append((observation, env.unwrapped.facts()))
    env.close()
    return found


def numbers(answer):
    return [int(n) for n in re.findall(r"<loc(\d{4})>", answer)]


def nearest_color(pixel):
    """The palette's color by direction: shading scales a color, it does not turn it."""
    directions = np.array([RGBA[c][:3] for c in COLORS])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return COLORS[int(np.argmax(directions @ (pixel / np.linalg.norm(pixel))))]


def test_told_location_shows_the_told_color(scenes):
    checked = 0
    for observation, facts in scenes:
        for camera in ("front", "wrist"):
            for block in facts.table.blocks:
                pixel = facts.pixels[camera][f"{block.color} block"]
                place = q.place(facts, camera, f"{block.color} block")
                if not (pixel.in_frame and pixel.visible == 1.0):
                    continue
                y, x = (min(int((n + 0.5) / q.LOCATION_BINS * 64), 63) for n in numbers(place))
                patch = observation["images"][camera][y, x].astype(float)
                assert nearest_color(patch) == block.color, (camera, block, pixel, patch)
                checked += 1
    assert checked > 100


def test_hidden_things_are_not_visible_and_half_hidden_ones_not_asked(scenes):
    kinds = {"seen": 0, "hidden": 0, "edge": 0}
    for _, facts in scenes:
        for pixels in facts.pixels.values():
            for name, pixel in pixels.items():
                camera = next(c for c in facts.pixels if facts.pixels[c] is pixels)
                place = q.place(facts, camera, name)
                if pixel.visible == 0:
                    assert place == q.NOT_VISIBLE
                    kinds["hidden"] += 1
                elif pixel.in_frame:
                    assert numbers(place) == [int(pixel.y * 2), int(pixel.x * 2)]
                    kinds["seen"] += 1
                else:
                    assert place is None
                    kinds["edge"] += 1
    assert min(kinds.values()) > 0, kinds


def test_not_visible_means_no_such_color_in_the_image(scenes):
    """A block said to be hidden (and not sharing its color with a bowl) leaves almost no pixel of its color."""
    hidden, shown = [], []
    for observation, facts in scenes:
        bowls = {b.color for b in facts.table.bowls}
        image = observation["images"]["wrist"].astype(float)
        for block in facts.table.blocks:
            if block.color in bowls:
                continue
            colorful = np.ptp(image, axis=-1) > 40
            count = sum(nearest_color(p) == block.color for p in image[colorful])
            visible = facts.pixels["wrist"][f"{block.color} block"].visible
            if visible in (0, 1):
                (hidden if visible == 0 else shown).append(count)
    assert len(hidden) > 10 and max(hidden) < 30 and np.mean(np.array(hidden) > 0) < 0.3
    assert min(shown) > 10


def test_words_agree_with_the_table(scenes):
    said = {"holding": set(), "inside": set(), "count": set(), "side": set()}
    for _, facts in scenes:
        table = facts.table
        for kind, question, answer in q.all_questions(facts):
            if kind in said:
                said[kind].add(answer)
            words = question.split()
            if question == "what is the gripper holding":
                assert answer == ("nothing" if table.held is None else f"the {table.held} block")
            elif question.startswith("in which bowl"):
                bowl = table.container(words[5])
                assert answer == ("none" if bowl is None else f"the {bowl} bowl")
            elif question.startswith("how many blocks"):
                assert answer == str(int(words[-1] in {b.color for b in table.blocks}))
            elif question == "which colours are the bowls":
                assert sorted(answer.split(", ")) == sorted(b.color for b in table.bowls)
            elif kind == "side":
                one, other = re.fullmatch(r"is the (.+) left or right of the (.+)", question).groups()
                view = facts.pixels["front"]
                assert answer == ("left" if view[one].x < view[other].x else "right")
    assert said["side"] == {"left", "right"} and said["count"] == {"0", "1"}
    assert {"yes", "no", "nothing"} < said["holding"] and {"yes", "no", "none"} < said["inside"]


def test_offsets_decode_to_metres(scenes):
    for _, facts in scenes:
        for question, answer in q.questions(facts, "offset"):
            color, noun = question.split()[-2:]
            thing = facts.table.block(color) if noun == "block" else facts.table.bowl(color)
            y, x, z = ((n + 0.5) / q.LOCATION_BINS for n in numbers(answer))
            span, tall = q.OFFSET[1] - q.OFFSET[0], q.HEIGHT[1] - q.HEIGHT[0]
            got = np.array([q.OFFSET[0] + x * span, q.OFFSET[0] + y * span, -(q.HEIGHT[0] + z * tall)])
            assert np.abs(got - (thing.position - facts.table.gripper)).max() <= span / q.LOCATION_BINS / 2 + 1e-9


def test_compound_questions_join_the_simple_answers(scenes):
    for _, facts in scenes[:20]:
        simple = {question: answer for _, question, answer in q.all_questions(facts)}
        for question, answer in q.questions(facts, "task"):
            block, bowl = re.match(r"put the (\w+) block in the (\w+) bowl", question).groups()
            assert answer == f"{simple[f'where is the {block} block']} and {simple[f'where is the {bowl} bowl']}"
        for question, answer in q.questions(facts, "reach"):
            block, bowl = re.match(r"put the (\w+) block in the (\w+) bowl", question).groups()
            parts = (simple[f"from the gripper to the {name}"] for name in (f"{block} block", f"{bowl} bowl"))
            assert answer == " and ".join(parts)


def test_lists_join_the_simple_answers_from_left_to_right(scenes):
    """Each listed place is the answer to the question about that thing alone, and nothing in sight is left out."""
    for _, facts in scenes:
        simple = {question: answer for _, question, answer in q.all_questions(facts)}
        shown = {c: {n for n, p in facts.pixels[c].items() if p.in_frame and p.visible > 0} for c in facts.pixels}
        things = {f"{b.color} block" for b in facts.table.blocks} | {f"{b.color} bowl" for b in facts.table.bowls}
        for question, single, names in (
            ("what is on the table", "where is the {}", shown["front"]),
            ("what is in the wrist camera", "where is the {} in the wrist camera", shown["wrist"] - {"gripper"}),
            ("from the gripper to the blocks", "from the gripper to the {}", {n for n in things if "block" in n}),
            ("from the gripper to the bowls", "from the gripper to the {}", {n for n in things if "bowl" in n}),
        ):
            listed = re.findall(r"([a-z]+(?: [a-z]+)?)((?:<loc\d{4}>)+)", simple[question])
            assert dict(listed) == {name: simple[single.format(name)] for name in names}
            across = [numbers(where)[1] for _, where in listed]
            assert across == sorted(across)


def test_every_kind_is_asked_and_no_question_has_two_answers(scenes):
    rng = np.random.default_rng(0)
    for _, facts in scenes[:20]:
        everything = q.all_questions(facts)
        assert len({question for _, question, _ in everything}) == len(everything)
        assert all(ANSWER.fullmatch(answer) for _, _, answer in everything)
        assert all((lambda pair: pair in q.questions(facts, kind))(q.ask(facts, rng, kind)) for kind in q.KINDS)
    asked = [q.ask(facts, rng) for _, facts in scenes for _ in range(10)]
    kind_of = {(question, answer): kind for _, f in scenes for kind, question, answer in q.all_questions(f)}
    assert {kind_of[pair] for pair in asked} == set(q.KINDS)


def test_unknown_kind_is_refused(scenes):
    with pytest.raises(ValueError, match="question kind: got 'color'"):
        q.ask(scenes[0][1], np.random.default_rng(0), "color")


def test_location_bins_cover_the_range():
    assert q.location(0.0) == "<loc0000>" and q.location(0.5) == "<loc0064>" and q.location(0.9999) == "<loc0127>"
    assert q.location(-3.0) == "<loc0000>" and q.location(7.0) == "<loc0127>"
