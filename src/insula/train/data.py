"""From a mapping to what a run trains on: robots fitted, a mixture to draw from, and what is held out of it."""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from insula.batch import LossName
from insula.data.chunks import chunk_horizon, frames_of, named_cameras
from insula.data.fitting import action_chunks, robot_stats
from insula.data.lerobot import LeRobotDataset
from insula.data.mapping import LINES, Mapping, RobotData, mapping_to_json, narrowed, parse_mapping, read_mapping
from insula.data.mixture import Mixture, SampleSource
from insula.data.observe import Sizes
from insula.data.questions import QuestionSamples, pictures
from insula.data.robot import Robot
from insula.data.samples import Samples
from insula.data.subtasks import read_subtasks
from insula.errors import DatasetError, InputError
from insula.files import read_json, write_json
from insula.model.config import ModelConfig
from insula.runs.assets import Assets
from insula.runs.folder import MAPPING_FILE, QUARANTINE_FILE
from insula.tokens import text
from insula.tokens.dialects import Form
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer
from insula.train.config import TrainConfig
from insula.train.split import (
    Part,
    episode_checksums,
    instructions_of,
    split_again,
    split_episodes,
    split_rows,
    split_to_json,
)

log = logging.getLogger(__name__)

FAST_FIT_CHUNKS = 20_000
LARGE = 500_000
"""From so many frames on, fitting is spread over all cores; below, starting processes takes longer than it saves."""
FRAME_CACHE = 4 * 2**30


@dataclass(frozen=True)
class RunData:
    """The mapping of a run, its data sets opened, and how each source is split.

    `units`: what tells the episodes of a robot, or the rows of questions, from those of another recording.
    """

    mapping: Mapping
    datasets: dict[str, LeRobotDataset]
    parts: dict[str, Part]
    units: dict[str, np.ndarray]
    episodes: int | None = None
    """How many of a robot's episodes are trained on; None: all that are not held out."""

    def trained_on(self, name: str) -> np.ndarray:
        """The episodes of a robot, or the rows of questions, that are trained on: int64, ascending."""
        rows = self.parts[name].train
        return rows[: self.episodes] if name in self.mapping.robots else rows


def open_data(config: TrainConfig, moved: Path | None = None) -> RunData:
    """The data of a new run, or with `resume` those the run was started with; `moved` says where they are now.

    Raises DatasetError for whatever is missing, damaged, does not fit the model, or is no longer what it was.
    """
    stored = read_json(config.run / MAPPING_FILE, "mapping", "split") if config.resume else None
    mapping = _stored_mapping(config, stored["mapping"], moved) if stored else _new_mapping(config)
    split = _stored_split(config.run / MAPPING_FILE, mapping, stored["split"]) if stored else {}
    datasets = _open_datasets(config, mapping)

    # A run that goes on keeps its split: drawn again, a data set that grew would train on episodes held out so far.
    parts, units = {}, {}
    for name, robot in mapping.robots.items():
        where = f"data set {robot.path}"
        units[name] = episode_checksums(datasets[name], robot)
        if stored:
            parts[name] = split_again(split[name], units[name], where, "episodes")
        else:
            shown = instructions_of(datasets[name], robot)
            parts[name] = split_episodes(shown, config.held_out_fraction, config.seed, where)

    # Questions are split by picture: one about a picture that was trained on is no unseen one.
    for name, questions in mapping.questions.items():
        where = f"questions {questions.path}"
        units[name] = pictures(questions)
        if stored:
            parts[name] = split_again(split[name], units[name], where, "rows")
        else:
            parts[name] = split_rows(units[name], config.held_out_fraction, config.seed, where)

    for name in mapping.robots:
        if config.episodes is not None and config.episodes > len(parts[name].train):
            raise InputError(
                f"episodes is {config.episodes}, but data set {mapping.robots[name].path} has {len(parts[name].train)} "
                "that are not held out"
            )

    return RunData(mapping, datasets, parts, units, config.episodes)


def write_data(config: TrainConfig, data: RunData) -> None:
    """What `open_data` reads when the run is resumed."""
    split = {name: split_to_json(part, data.units[name]) for name, part in data.parts.items()}
    write_json(config.run / MAPPING_FILE, {"mapping": mapping_to_json(data.mapping), "split": split})


def fingerprint(data: RunData) -> str:
    """Of what is trained on, and what is held out."""
    digest = hashlib.sha256(json.dumps(mapping_to_json(data.mapping), sort_keys=True).encode())
    for name, units in sorted(data.units.items()):
        digest.update(f"{name} {units.dtype} {units.shape}".encode() + np.ascontiguousarray(units).tobytes())
        digest.update(np.ascontiguousarray(data.parts[name].held_out).tobytes())
    return digest.hexdigest()


def _open_datasets(config: TrainConfig, mapping: Mapping) -> dict[str, LeRobotDataset]:
    # Each worker process has a cache of its own for each data set: together they stay within the limit.
    cache = FRAME_CACHE // (len(mapping.robots) * max(1, config.workers))

    datasets = {}
    for name, robot in mapping.robots.items():
        if config.resume and not robot.path.exists():
            raise DatasetError(f"no directory {robot.path}; if the data moved, say where it is now: --data PATH")
        datasets[name] = LeRobotDataset(robot.path, cache)
        named_cameras(datasets[name], robot)  # now, rather than at the first batch
        if not robot.cameras:
            log.warning(
                "data set %s: the mapping gives %s no camera, so the model learns to act without seeing; where it has "
                "one that cannot be read, insula data doctor says why",
                robot.path,
                name,
            )

    return datasets


def _new_mapping(config: TrainConfig) -> Mapping:
    if config.data is None:
        raise InputError("no data set; give --data, a LeRobot folder (insula collect makes one) or a .toml mapping")

    return _read(config, config.data)


def _read(config: TrainConfig, path: Path) -> Mapping:
    """A mapping as this training takes it."""
    return narrowed(read_mapping(path, config.model.cameras), config.losses, config.questions)


def _stored_split(path: Path, mapping: Mapping, split: Any) -> dict[str, Any]:
    names = [*mapping.robots, *mapping.questions]
    missing = [name for name in names if not isinstance(split, dict) or name not in split]
    if missing:
        raise DatasetError(f"{path}: no split of {', '.join(missing)}; the file is damaged, start a new run")

    return split


def _stored_mapping(config: TrainConfig, stored: Any, moved: Path | None) -> Mapping:
    """What the run was started with: the file may have changed since, which is said."""
    mapping = parse_mapping(stored, config.run, str(config.run / MAPPING_FILE))

    if moved is not None:
        return moved_mapping(mapping, moved, lambda path: _read(config, path))

    if config.data is not None and config.data.is_file():
        try:
            changed = mapping_to_json(_read(config, config.data)) != mapping_to_json(mapping)
        except DatasetError:  # unreadable by now, which is no reason to stop: it is not needed
            changed = True

        if changed:
            log.warning(
                "%s has changed since the run was started, which goes on with what it was started with (%s)",
                config.data,
                config.run / MAPPING_FILE,
            )

    return mapping


def moved_mapping(stored: Mapping, moved: Path, read: Callable[[Path], Mapping]) -> Mapping:
    """`stored` with the paths of `moved`, a mapping of the same sources, by `read`, or the folder of the only one.

    Raises InputError where it says anything else than where the data is now.
    """
    if moved.suffix != ".toml":
        if len(stored.robots) != 1 or stored.questions:
            names = ", ".join([*stored.robots, *stored.questions])
            raise InputError(f"--data {moved}: a single folder, but the run learns from {names}; give a .toml mapping")

        ((name, robot),) = stored.robots.items()
        return Mapping({name: dataclasses.replace(robot, path=moved)})

    # Compared as plain values, so that the error can show what the file says.
    given = read(moved)
    before, after = mapping_to_json(stored), mapping_to_json(given)
    for kind in ("robots", "questions"):
        if list(before[kind]) != list(after[kind]):
            raise InputError(f"--data {moved}: {kind} are {list(after[kind])}, the run has {list(before[kind])}")

        for name, entry in before[kind].items():
            for key in sorted(entry.keys() | after[kind][name].keys()):
                old, new = entry.get(key), after[kind][name].get(key)
                if old != new and not _is_place(key, old, new):
                    raise InputError(
                        f"--data {moved}: {kind}.{name}.{key} is {new!r}, the run was started with {old!r}; "
                        "only paths can change while a run goes on"
                    )

    return given


def _is_place(key: str, *values: Any) -> bool:
    """Whether a setting says where files are, which may change: paths, and subtasks where they are a file of lines."""
    return key in ("path", "statistics") or (key == "subtasks" and all(str(value).endswith(LINES) for value in values))


def fit_assets(config: TrainConfig, data: RunData) -> Assets:
    """Normalization of each robot and FAST, fitted on the training episodes, and the tokenizer made of them."""
    model = config.model

    # Held-out episodes are not looked at, not even for their range: their losses would flatter the model.
    robots = {name: _robot(config, data, name, robot) for name, robot in data.mapping.robots.items()}

    if config.reading.fast:
        codec = FASTCodec.load(config.reading.fast)
    else:
        # The same number from each robot, whatever its size: the merges are for all of them.
        limit = FAST_FIT_CHUNKS // len(robots)
        chunks = [
            chunk
            for name, robot in data.mapping.robots.items()
            if LossName.FAST in robot.losses or LossName.FAST not in config.losses
            for chunk in action_chunks(robot, robots[name], data.trained_on(name), limit)[0]
        ]
        if not chunks:
            raise InputError("FAST: no robot of the mapping has the loss 'fast', so nothing teaches the backbone")
        codec = FASTCodec.fit(chunks, config.reading.fast_vocab, config.reading.fast_scale)

    tokenizer = FASTTokenizer(
        text.load_text_tokenizer(config.reading.text_tokenizer) if config.reading.text_tokenizer else text.embedded(),
        codec,
        config.reading.dialect,
        max_token_len=model.max_token_len,
        max_prompt_len=model.max_prompt_len,
        fast_last_id=config.reading.fast_last_id,
    )

    # An embedding looks up the nearest row for an id beyond its end, without a word.
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"text and FAST tokens need {tokenizer.vocab_size} entries, config {model.name!r} has "
            f"vocab_size {model.vocab_size}; raise it, or lower fast_vocab"
        )

    return Assets(model, tokenizer, robots)


def _robot(config: TrainConfig, data: RunData, name: str, robot: RobotData) -> Robot:
    model = config.model
    horizon = chunk_horizon(robot, name, model.horizon)

    # Of chunks rather than frames, where actions count from the state: how far they reach depends on the horizon.
    stats = robot_stats(
        robot,
        horizon,
        data.trained_on(name),
        processes=(os.cpu_count() or 1) if len(data.datasets[name]) >= LARGE else 1,
        skip_non_finite=config.reading.on_bad_sample == "quarantine",
    )

    for part, width in (("state", model.state_dim), ("actions", model.action_dim)):
        if stats[part].dim > width:
            raise DatasetError(
                f"data set {robot.path}: {part} has {stats[part].dim} dimensions, config {model.name!r} "
                f"expects at most {width}; set {'state_dim' if part == 'state' else 'action_dim'}={stats[part].dim}"
            )

    # In the model's order: it is the order of image tokens.
    cameras = tuple(camera for camera in model.cameras if camera in robot.cameras)
    return Robot(stats, cameras, horizon, robot.delta, robot.units, tuple(robot.shares), robot.losses)


def sizes(model: ModelConfig, data: RunData) -> Sizes:
    """A camera whose pictures have one size in all robot data sets keeps it, and is resized on the device. Of several
    sizes, and where no robot has it, the model's own is made while reading."""
    # One size in a batch is one program on the device, and pictures travel no larger than they were recorded.
    square = (model.vision.image_size, model.vision.image_size)
    cameras = {}
    for camera in model.cameras:
        found = {
            data.datasets[name].feature(robot.cameras[camera]).size
            for name, robot in data.mapping.robots.items()
            if camera in robot.cameras
        }
        cameras[camera] = found.pop() if len(found) == 1 else square

    return Sizes(model.horizon, model.state_dim, model.action_dim, cameras)


def training_mixture(config: TrainConfig, assets: Assets, data: RunData) -> Mixture:
    """All sources by their weights, tokenized ahead so that what does not fit is an error now."""
    sources = _sources(config, assets, data, _training_rows(data))

    # A minute now rather than an error after hours, at the first chunk that takes too many tokens.
    for source in sources.values():
        source.tokenize_ahead()

    return Mixture(sources, data.mapping.weights, config.reading.on_bad_sample, config.run / QUARANTINE_FILE)


def training_sources(config: TrainConfig, assets: Assets, data: RunData) -> dict[str, SampleSource]:
    """What batches are drawn from, by source; tokenized when first asked for."""
    return dict(_sources(config, assets, data, _training_rows(data)))


def held_out_sources(config: TrainConfig, assets: Assets, data: RunData) -> dict[str, SampleSource]:
    """What no batch is ever drawn from, by source; none where nothing is held out, or nothing of it has a subtask that
    the source's form needs."""
    kept = {}
    for name, source in data.mapping.sources.items():
        held_out = data.parts[source.entry].held_out
        if len(held_out) and (source.form in (None, Form.FLAT) or _has_subtasks(data, source.entry, held_out)):
            kept[name] = held_out
        elif len(held_out):
            log.warning("%s: no episode that is held out has a subtask, so nothing of it is measured", name)

    return dict(_sources(config, assets, data, kept))


def _training_rows(data: RunData) -> dict[str, np.ndarray]:
    # The forms of a robot share its episodes, so that a frame that is held out is so in all of them.
    return {name: data.trained_on(source.entry) for name, source in data.mapping.sources.items()}


def _has_subtasks(data: RunData, robot: str, episodes: np.ndarray) -> bool:
    dataset = data.datasets[robot]
    known = read_subtasks(dataset, data.mapping.robots[robot]).known
    return bool(known[frames_of(dataset, episodes)[0]].any())


def _sources(
    config: TrainConfig, assets: Assets, data: RunData, rows: dict[str, np.ndarray]
) -> dict[str, Samples | QuestionSamples]:
    padded = sizes(config.model, data)
    sources: dict[str, Samples | QuestionSamples] = {}
    for name, chosen in rows.items():
        entry, form = data.mapping.sources[name].entry, data.mapping.sources[name].form
        if form is None:
            sources[name] = QuestionSamples(data.mapping.questions[entry], assets.tokenizer, padded, chosen)
            continue

        sources[name] = Samples(
            data.mapping.robots[entry],
            assets.robots[entry],
            assets.tokenizer,
            padded,
            chosen,
            config.reading.on_overflow,
            form=form,
            state_in_prompt=config.model.state_input == "prompt",
            skip_non_finite=config.reading.on_bad_sample == "quarantine",
            dataset=data.datasets[entry],
        )

    return sources
