"""From a mapping to what a run trains on: robots fitted, a mixture to draw from, and what is held out of it."""

import os
from dataclasses import dataclass

import numpy as np

from insula.data.chunks import named_cameras, split
from insula.data.fitting import action_chunks, robot_stats
from insula.data.lerobot import LeRobotDataset
from insula.data.mapping import Mapping, RobotData, parse_mapping, read_mapping, to_json
from insula.data.mixture import Mixture, SampleSource
from insula.data.observe import Sizes
from insula.data.questions import QuestionSamples, pictures
from insula.data.robot import Robot
from insula.data.samples import Samples
from insula.errors import DatasetError, InputError
from insula.files import read_json, write_json
from insula.model.config import ModelConfig
from insula.runs.assets import Assets
from insula.runs.folder import MAPPING_FILE, QUARANTINE_FILE
from insula.tokens import text
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer
from insula.train.config import TrainConfig

FAST_FIT_CHUNKS = 20_000
LARGE = 500_000
"""From so many frames on, fitting is spread over all cores; below, starting processes takes longer than it saves."""
FRAME_CACHE = 4 * 2**30


@dataclass(frozen=True)
class Part:
    """A source's episodes (rows of questions) to train on, and those held out."""

    train: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class RunData:
    """The mapping of a run, its data sets opened, and how each source is split."""

    mapping: Mapping
    datasets: dict[str, LeRobotDataset]
    parts: dict[str, Part]


def open_data(config: TrainConfig) -> RunData:
    """Raises DatasetError for whatever is missing, damaged or does not fit the model."""
    mapping = _mapping(config)
    cache = FRAME_CACHE // (len(mapping.robots) * max(1, config.workers))
    datasets = {name: LeRobotDataset(robot.path, cache) for name, robot in mapping.robots.items()}
    for name, robot in mapping.robots.items():
        named_cameras(datasets[name], robot)
    sizes = {name: len(dataset.episodes) for name, dataset in datasets.items()}
    parts = {name: Part(*split(size, config.held_out_fraction, config.seed)) for name, size in sizes.items()}
    for name, questions in mapping.questions.items():
        about = pictures(questions)
        asked = split(len(np.unique(about)), config.held_out_fraction, config.seed)
        parts[name] = Part(*(np.flatnonzero(np.isin(about, some)) for some in asked))
    return RunData(mapping, datasets, parts)


def _mapping(config: TrainConfig) -> Mapping:
    """What the run was started with where it is resumed: the file may have changed since."""
    stored = config.run / MAPPING_FILE
    if config.resume and stored.is_file():
        return parse_mapping(read_json(stored), config.run, str(stored))
    if config.data is None:
        raise InputError("no data set; give --data, a LeRobot folder (insula collect makes one) or a .toml mapping")
    return read_mapping(config.data, config.model.cameras)


def write_mapping(config: TrainConfig, mapping: Mapping) -> None:
    path = config.run / MAPPING_FILE
    write_json(path, to_json(mapping))


def fit_assets(config: TrainConfig, data: RunData) -> Assets:
    """Normalization of each robot and FAST, fitted on the training episodes, and the tokenizer made of them."""
    model = config.model
    robots = {name: _robot(config, data, name, robot) for name, robot in data.mapping.robots.items()}
    if config.fast:
        codec = FASTCodec.load(config.fast)
    else:
        limit = FAST_FIT_CHUNKS // len(robots)
        chunks = [
            chunk
            for name, robot in data.mapping.robots.items()
            if "fast" in robot.losses
            for chunk in action_chunks(robot, robots[name], data.parts[name].train, limit)[0]
        ]
        if not chunks:
            raise InputError("FAST: no robot of the mapping has the loss 'fast', so nothing teaches the backbone")
        codec = FASTCodec.fit(chunks, config.fast_vocab, config.fast_scale)
    tokenizer = FASTTokenizer(
        text.load(config.text_tokenizer) if config.text_tokenizer else text.embedded(),
        codec,
        config.dialect,
        max_token_len=model.max_token_len,
        max_prompt_len=model.max_prompt_len,
        fast_last_id=config.fast_last_id,
    )
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"text and FAST tokens need {tokenizer.vocab_size} entries, config {model.name!r} has "
            f"vocab_size {model.vocab_size}; raise it, or lower fast_vocab"
        )
    return Assets(model, tokenizer, robots)


def _robot(config: TrainConfig, data: RunData, name: str, robot: RobotData) -> Robot:
    model = config.model
    horizon = robot.horizon or model.horizon
    stats = robot_stats(
        robot,
        horizon,
        data.parts[name].train,
        processes=(os.cpu_count() or 1) if len(data.datasets[name]) >= LARGE else 1,
        skip_non_finite=config.on_bad_sample == "quarantine",
    )
    for part, width in (("state", model.state_dim), ("actions", model.action_dim)):
        if stats[part].dim > width:
            raise DatasetError(
                f"data set {robot.path}: {part} has {stats[part].dim} dimensions, config {model.name!r} "
                f"expects at most {width}; set {'state_dim' if part == 'state' else 'action_dim'}={stats[part].dim}"
            )
    if horizon > model.horizon:
        raise DatasetError(f"robots.{name}: horizon is {horizon}, the model's is {model.horizon}; raise that")
    cameras = tuple(camera for camera in model.cameras if camera in robot.cameras)
    return Robot(stats, cameras, horizon, robot.delta, robot.units)


def sizes(model: ModelConfig, data: RunData) -> Sizes:
    """A camera whose pictures have one size in all robot data sets keeps it, and is resized on the device. Of several
    sizes, and where no robot has it, the model's own is made while reading."""
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
    sources = _sources(config, assets, data, {name: part.train for name, part in data.parts.items()})
    for source in sources.values():
        source.tokenize_ahead()
    return Mixture(sources, data.mapping.weights, config.on_bad_sample, config.run / QUARANTINE_FILE)


def training_sources(config: TrainConfig, assets: Assets, data: RunData) -> dict[str, SampleSource]:
    """What batches are drawn from, by source; tokenized when first asked for."""
    return dict(_sources(config, assets, data, {name: part.train for name, part in data.parts.items()}))


def held_out_sources(config: TrainConfig, assets: Assets, data: RunData) -> dict[str, SampleSource]:
    """What no batch is ever drawn from, by source; none where nothing is held out."""
    kept = {name: part.held_out for name, part in data.parts.items() if len(part.held_out)}
    return dict(_sources(config, assets, data, kept))


def _sources(
    config: TrainConfig, assets: Assets, data: RunData, rows: dict[str, np.ndarray]
) -> dict[str, Samples | QuestionSamples]:
    padded = sizes(config.model, data)
    robots = {
        name: Samples(
            robot,
            assets.robots[name],
            assets.tokenizer,
            padded,
            rows[name],
            config.on_overflow,
            state_in_prompt=config.model.state_input == "prompt",
            skip_non_finite=config.on_bad_sample == "quarantine",
            dataset=data.datasets[name],
        )
        for name, robot in data.mapping.robots.items()
        if name in rows
    }
    questions = {
        name: QuestionSamples(entry, assets.tokenizer, padded, rows[name])
        for name, entry in data.mapping.questions.items()
        if name in rows
    }
    return robots | questions
