"""What `insula collect` and `insula questions` do."""

import dataclasses
from pathlib import Path

from insula.checks import check_integer, check_number
from insula.collect.demonstrations import collect, collect_questions
from insula.collect.scenes import DEFAULT_NOISE
from insula.worlds.seeds import DEMONSTRATIONS
from insula.worlds.tabletop.tasks import named_tasks


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Write demonstrations of the tabletop's scripted expert as a LeRobot v3.0 data set."""

    out: Path
    """Folder of the new data set."""
    task: str = "put"
    """put, sort, stack, relation, unseen-pairs, distractors or moving; all: one after the other, in one data set."""
    episodes: int = 400
    """Successful demonstrations to write."""
    first_seed: int = DEMONSTRATIONS.start
    """Scene seeds count up from here."""
    noise: float = DEFAULT_NOISE
    """DART noise on the executed moves, in action units; the clean action is recorded."""
    image_size: int = 64
    """Width and height of the pictures: the preset `small` looks at 224."""
    overwrite: bool = False
    """Replace what is in `out`."""

    def __post_init__(self) -> None:
        named_tasks(self.task)  # for what it raises
        check_integer("episodes", self.episodes, 1)
        check_integer("image_size", self.image_size, 16, 1024)  # as the world has it
        # No upper bound: where the expert begins to fail too often is found by trying, and `collect` says so.
        check_number("noise", self.noise, "≥ 0", lambda noise: noise >= 0)


def run_collect(config: CollectConfig) -> None:
    """Write them, and say how many. Raises as `collect`."""
    done = collect(
        config.out,
        config.episodes,
        config.first_seed,
        config.noise,
        task=config.task,
        image_size=config.image_size,
        overwrite=config.overwrite,
    )
    print(f"{len(done.seeds)} demonstrations, {done.frames} frames, {len(done.discarded)} discarded: {done.root}")


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    """Write questions about rendered tabletop scenes, with answers: vision-language samples to mix into training."""

    out: Path
    """Folder for questions.jsonl and images."""
    task: str = "put"
    """Whose scenes; all: of one task after the other. Those of put are anything, those of others are met along the
    expert's episodes, and some questions ask for what is next there."""
    scenes: int = 1500
    """Scenes to render, of seeds that no episode has."""
    each: int = 8
    """Questions about each."""
    overwrite: bool = False
    """Replace what is in `out`."""

    def __post_init__(self) -> None:
        named_tasks(self.task)  # for what it raises
        check_integer("scenes", self.scenes, 1)  # more than there are is refused by `PRETRAINING`
        check_integer("each", self.each, 1)


def run_questions(config: QuestionsConfig) -> None:
    """Write them, and say how many. Raises as `collect_questions`."""
    count = collect_questions(config.out, config.scenes, config.each, task=config.task, overwrite=config.overwrite)
    print(f"{count} questions about {config.scenes} scenes: {config.out}")
