"""Rendered tabletop scenes with questions the simulator can answer, as batches for the token loss."""

import dataclasses
import multiprocessing
from collections.abc import Sequence
from typing import Any

import numpy as np

from insula.batch import Batch, Observation
from insula.model.config import ModelConfig
from insula.tokens.sequence import FASTTokenizer, Tokenized
from insula.worlds.tabletop import make_tabletop
from insula.worlds.tabletop.instructions import COLORS

KIND_WEIGHTS = {
    "block": 1.5,
    "bowl": 1.0,
    "gripper": 0.5,
    "scene": 4.0,
    "view": 2.0,
    "wrist": 2.0,
    "colors": 0.5,
    "count": 0.5,
    "side": 0.5,
    "holding": 1.0,
    "inside": 1.0,
    "offset": 2.0,
    "offsets": 4.0,
    "task": 3.0,
    "reach": 5.0,
}
"""How often each kind of question is asked: mostly the ones about where things are, and among them lists. A list scores
up to 24 tokens for one look at the image, a single place two, and that was too little to learn from (docs/log.md, "Many
places from one look")."""

DEFAULT_NOISE = 0.3
"""Of demonstrations: deviation of what is added to the expert's moves, in action units."""

TASK_KIND_WEIGHTS = {"size": 1.0, "beside": 1.0, "distance": 1.0, "stacked": 2.0, "next": 6.0}
"""As `KIND_WEIGHTS`, and asked beside those, of scenes of the harder tasks alone: what pretraining asks stays."""

THING_NAMES = (*(f"{color} {noun}" for noun in ("block", "bowl") for color in COLORS), "gripper")


@dataclasses.dataclass(frozen=True)
class Scenes:
    """`images[camera]` uint8 [n, h, w, 3]; `places[camera]` float32 [n, len(THING_NAMES), 2] is where each of these
    things shows (y, x as fractions of the image; NaN where it does not); `questions[i]` lists (kind, question, answer)
    of scene i."""

    images: dict[str, np.ndarray]
    places: dict[str, np.ndarray]
    questions: list[list[tuple[str, str, str]]]


def render_scenes(
    seeds: range, questions_each: int, image_size: int, processes: int = 2, tasks: Sequence[str] = ("put",)
) -> Scenes:
    """One independent scene per seed, with this many questions each. The `tasks` take turns by seed: scenes of `put`
    are out of nowhere, those of others are met along an episode of the expert, where it has a meaning what is next.

    The result does not depend on the number of processes, which are spawned: a script must call this under
    `if __name__ == "__main__":`. Raises InputError for an unknown task.
    """
    processes = min(processes, len(seeds))  # one without a scene would know no camera
    parts = [seeds[i::processes] for i in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:  # a GL context does not survive a fork
        done = pool.starmap(_render, [(part, questions_each, image_size, tuple(tasks)) for part in parts])

    # Dealt out like cards, one to each process in turn; the inverse permutation brings them back in order.
    order = np.argsort(np.concatenate([np.arange(len(seeds))[i::processes] for i in range(processes)]))

    def merge(arrays: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {name: np.concatenate([part[name] for part in arrays])[order] for name in arrays[0]}

    asked = [q for part in done for q in part.questions]
    return Scenes(merge([p.images for p in done]), merge([p.places for p in done]), [asked[i] for i in order])


def _render(seeds: range, questions_each: int, image_size: int, tasks: tuple[str, ...]) -> Scenes:
    from insula.worlds.tabletop.tasks.unseen_pairs import UNSEEN_PAIRS, asks_held_out

    environments: dict[str, Any] = {name: make_tabletop(name, image_size).unwrapped for name in tasks}
    images: dict[str, np.ndarray] = {}  # allocated whole: 60,000 scenes as lists, then stacked, would be there twice
    places: dict[str, np.ndarray] = {}
    asked = []

    for n, seed in enumerate(seeds):
        rng = np.random.default_rng(seed)
        task = tasks[seed % len(tasks)]
        env = environments[task]
        observation = env.randomize(rng) if task == "put" else _met(env, seed, rng)
        for name, image in observation["images"].items():
            images.setdefault(name, np.empty((len(seeds), *image.shape), np.uint8))[n] = image

        facts = env.facts()
        for camera, pixels in facts.pixels.items():
            places.setdefault(camera, np.full((len(seeds), len(THING_NAMES), 2), np.nan, np.float32))
            for name, pixel in pixels.items():
                if name in THING_NAMES and pixel.in_frame and pixel.visible > 0:
                    places[camera][n, THING_NAMES.index(name)] = pixel.y / image_size, pixel.x / image_size
        goal = None if task == "put" else env.goal
        # What is next is told in the words of a demonstration, which must not show a pair that is to be unseen.
        told = goal is not None and not (UNSEEN_PAIRS.name in tasks and asks_held_out(goal))
        asked.append(_draw(facts, rng, questions_each, goal, () if told else ("next",)))

    for env in environments.values():
        env.close()
    return Scenes(images, places, asked)


def _met(env: Any, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    """The observation after a random number of steps of the expert, disturbed as in demonstrations. An episode may end
    before; its last scene is one, too."""
    from insula.worlds.tabletop.demonstrator import act, disturb

    observation, _ = env.reset(seed=seed)
    for _ in range(rng.integers(env.task.max_steps // 3)):  # about what the expert takes
        observation, _, done, _, _ = env.step(disturb(act(env.table(), env.goal), rng, DEFAULT_NOISE))
        if done:
            break

    return observation


def _draw(
    facts: Any, rng: np.random.Generator, count: int, goal: Any = None, but: Sequence[str] = ()
) -> list[tuple[str, str, str]]:
    """`count` questions, kinds drawn by weight among those that have a plain answer in this scene; where it has a
    `goal`, those of the harder tasks among them; none of the kinds of `but`."""
    from insula.worlds.tabletop.quiz import questions
    from insula.worlds.tabletop.task_quiz import task_questions

    known = KIND_WEIGHTS if goal is None else KIND_WEIGHTS | TASK_KIND_WEIGHTS
    pairs = {kind: questions(facts, kind) for kind in KIND_WEIGHTS}
    if goal is not None:
        pairs |= {kind: task_questions(facts.table, goal, kind) for kind in TASK_KIND_WEIGHTS}

    kinds = [kind for kind in known if pairs[kind] and kind not in but]
    weights = np.array([known[kind] for kind in kinds])
    chosen = rng.choice(len(kinds), count, p=weights / weights.sum())
    return [(kinds[k], *pairs[kinds[k]][rng.integers(len(pairs[kinds[k]]))]) for k in chosen]


FIELDS = ("tokens", "token_mask", "ar_mask", "loss_mask")


def tokenize(scenes: Scenes, tokenizer: FASTTokenizer) -> Tokenized:
    """Every question of every scene: each field [n, questions, L], padding cut off as far as the longest allows.

    Raises TokenBudgetError where a question or an answer is longer than the tokenizer allows.
    """
    rows = [tokenizer.question(question, answer) for asked in scenes.questions for _, question, answer in asked]
    longest = max(int(row.token_mask.sum()) for row in rows)  # tokens are what a step costs; one shape for all
    shape = (len(scenes.questions), -1, longest)
    return Tokenized(*(np.stack([getattr(row, name)[:longest] for row in rows]).reshape(shape) for name in FIELDS))


def question_batch(
    scenes: Scenes, tokens: Tokenized, index: np.ndarray, which: np.ndarray, config: ModelConfig
) -> Batch:
    """Scene `index[b]` with its question `which[b]`, int [B] both. No actions: every step is padding, so the flow loss
    is 0."""
    rows = len(index)
    pick = {name: getattr(tokens, name)[index, which] for name in FIELDS}

    return Batch(
        observation=Observation(
            images={name: scenes.images[name][index] for name in config.cameras},
            image_mask={name: np.ones(rows, bool) for name in config.cameras},
            state=np.zeros((rows, config.state_dim), np.float32),
            tokens=pick["tokens"],
            token_mask=pick["token_mask"],
        ),
        actions=np.zeros((rows, config.horizon, config.action_dim), np.float32),
        action_is_pad=np.ones((rows, config.horizon), bool),
        action_dim_mask=np.ones((rows, config.action_dim), bool),
        ar_mask=pick["ar_mask"],
        loss_mask=pick["loss_mask"],
    )
