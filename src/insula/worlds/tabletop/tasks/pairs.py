"""Goals that are one block and one bowl, both named by their colors: four of the tasks."""

from __future__ import annotations

from insula.worlds.tabletop.goals import Goal, Placement
from insula.worlds.tabletop.scene import BLOCKS, SceneLayout
from insula.worlds.tabletop.tasks.task import Phrasings

Pair = tuple[str, str]
"""Colors of a block and of a bowl."""
SENTENCE = "put the {block} block in the {bowl} bowl"
PHRASINGS = Phrasings(
    train=(
        SENTENCE,
        "move the {block} block to the {bowl} bowl",
        "place the {block} block into the {bowl} bowl",
        "the {block} block goes in the {bowl} bowl",
    ),
    held_out=("move the {block} block into the {bowl} bowl", "the {block} block goes to the {bowl} bowl"),
)


def pair_goal(pair: Pair, sentence: str = SENTENCE) -> Goal:
    """The block in the bowl; `sentence` has gaps for the colors of both."""
    block, bowl = pair
    return Goal(sentence.format(block=block, bowl=bowl), (Placement(block, bowl, "in"),))


def other_pair(layout: SceneLayout, pair: Pair) -> Pair:
    """Another block and the other bowl of this scene: both differ, so that an object moved by habit is a wrong one
    whichever it is."""
    block, bowl = layout.block_colors.index(pair[0]), layout.bowl_colors.index(pair[1])
    bowls = layout.bowl_colors
    return layout.block_colors[(block + 1) % BLOCKS], bowls[(bowl + 1) % len(bowls)]
