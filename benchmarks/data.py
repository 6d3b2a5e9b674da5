"""How fast data is read: frames out of videos in any order, batches beside a train step, statistics of a large set.

    python benchmarks/data.py                # all tables
    python benchmarks/data.py --only video   # or: loader, statistics

Videos: 1,000 frames of 480 × 640 as LeRobot encodes them (a key frame every 2), and with a key frame every 30; read in
random order without a cache, and from the first to the last. Loader: batches of the tabletop (images in parquet, and a
quarter of questions) made while nothing else runs, before and after its pictures are in the cache, against the train
step that consumes them; then the step with the loader beside it against the same step on one batch, rounds alternating.
Statistics: a million frames of 14 dimensions without pictures, in files of 10 MB: exact quantiles and FAST, by one
process and by two.
"""

import argparse
import dataclasses
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import jax
import numpy as np

from insula.batch import Batch
from insula.collect.demonstrations import collect, collect_questions
from insula.data.config import DataConfig
from insula.data.fitting import action_chunks, fit_stats, measure_fast
from insula.data.lerobot import LeRobotWriter
from insula.data.lerobot.info import Feature
from insula.data.lerobot.video import VideoReader
from insula.data.loader import Loader
from insula.data.mapping import RobotData
from insula.data.robot import Robot
from insula.demo import MIXTURE
from insula.model.config import TINY_BFLOAT16
from insula.tokens.fast import FASTCodec
from insula.train.config import TrainConfig
from insula.train.data import fit_assets, open_data, training_mixture
from insula.train.optimizer import make_optimizer
from insula.train.run import start_params
from insula.train.step import make_train_state, make_train_step

FRAMES, HEIGHT, WIDTH, FPS = 1000, 480, 640, 30
READS = 1000
EPISODES, STEPS = 1000, 1000
BATCH = 32


def write_video(path: Path, codec: str, key_frames: int) -> None:
    """A moving picture with some texture, at LeRobot's quality."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"g": str(key_frames), "crf": "30"} | ({"preset": "12"} if codec == "libsvtav1" else {})
        for n in range(FRAMES):
            square = ((x - 4 * n) % WIDTH < 80) & ((y - 2 * n) % HEIGHT < 80)
            image = np.where(square[..., None], np.uint8(220), texture + np.uint8(60))
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def frames_per_second(path: Path, order: np.ndarray, at_once: int) -> float:
    reader, began = VideoReader(), time.perf_counter()
    for start in range(0, len(order), at_once):
        seconds = (order[start : start + at_once] / FPS).tolist()
        reader.frames(path, seconds, (HEIGHT, WIDTH), "benchmark")
    return len(order) / (time.perf_counter() - began)


def video_table() -> None:
    print(f"\nframes per second of {HEIGHT}×{WIDTH} video, {READS} frames, no cache")
    print(f"{'codec':<12}{'key frame every':>16}{'in order':>12}{'random, by 32':>16}{'random, singly':>16}")
    order = np.random.default_rng(1).permutation(FRAMES)[:READS]
    with tempfile.TemporaryDirectory() as folder:
        for codec in ("libsvtav1", "libx264"):
            for key_frames in (2, 30):
                path = Path(folder) / f"{codec}-{key_frames}.mp4"
                write_video(path, codec, key_frames)
                figures = (
                    frames_per_second(path, np.arange(FRAMES), FRAMES),
                    frames_per_second(path, order, BATCH),
                    frames_per_second(path, order[: READS // 4], 1),
                )
                cells = (f"{figures[0]:>12.0f}", *(f"{figure:>16.0f}" for figure in figures[1:]))
                print(f"{codec:<12}{key_frames:>16}{''.join(cells)}")


def prepare(folder: Path, workers: int) -> TrainConfig:
    collect(folder / "data", 200)
    collect_questions(folder / "questions", 300)
    (folder / "data.toml").write_text(MIXTURE, encoding="utf-8")
    return TrainConfig(
        run=folder / "run",
        data=folder / "data.toml",
        batch_size=BATCH,
        reading=DataConfig(fast_vocab=512, fast_scale=5.0),
        workers=workers,
        model=dataclasses.replace(TINY_BFLOAT16),
    )


def seconds_each(next_batch: Callable[[], object], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        next_batch()
    return (time.perf_counter() - began) / count


def loader_table(rounds: int, steps: int, workers: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        config = prepare(Path(name), workers)
        data = open_data(config)
        mixture = training_mixture(config, fit_assets(config, data), data)
        order = mixture.order(BATCH, 0)
        numbers: Iterator[int] = iter(range(10**9))
        cold = seconds_each(lambda: mixture.batch(*order[next(numbers)]), 20)
        epoch = sum(map(len, mixture.sources.values())) // BATCH + 1
        for step in range(2 * epoch):  # until every picture is in the cache
            mixture.batch(*order[step])
        warm = seconds_each(lambda: mixture.batch(*order[next(numbers)]), 100)

        optimizer = make_optimizer(config.optimizer, config.model, 2500)
        state = make_train_state(start_params(config, jax.random.key(0)), optimizer)
        step = make_train_step(config.model, optimizer, 0.999, jax.random.key(1))
        one: Batch = mixture.batch(*order[0])
        state, _ = step(state, one)

        def run(next_batch: Callable[[], Batch]) -> float:
            nonlocal state
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = step(state, next_batch())
            jax.block_until_ready(metrics)
            return (time.perf_counter() - began) / steps

        alone, beside = [], []
        with Loader(mixture, BATCH, 0, workers=workers) as batches:
            for _ in range(rounds):
                alone.append(run(lambda: one))
                beside.append(run(lambda: next(batches)))
        ratio = statistics.median(b / a for a, b in zip(alone, beside, strict=True))
        train = statistics.median(alone)
        print(f"\nbatches of {BATCH}, tiny in bfloat16, {workers or 'a thread and no'} worker processes")
        print(f"train step on one batch      {train * 1e3:8.1f} ms")
        print(f"batch, pictures to decode    {cold * 1e3:8.1f} ms   {train / cold:6.1f} × what the step consumes")
        print(f"batch, pictures in the cache {warm * 1e3:8.1f} ms   {train / warm:6.1f} ×")
        print(f"step with the loader beside  {ratio:8.3f} of the step alone (median of {rounds} alternating rounds)")


def statistics_table() -> None:
    rng = np.random.default_rng(0)
    features = {"observation.state": Feature("float32", (14,)), "action": Feature("float32", (14,))}
    with tempfile.TemporaryDirectory() as name:
        with LeRobotWriter(Path(name) / "set", 50, features, file_megabytes=10) as writer:
            for _ in range(EPISODES):
                state = rng.normal(size=(STEPS, 14)).cumsum(0).astype(np.float32) / 20
                writer.add_episode({"observation.state": state, "action": np.roll(state, -1, axis=0)}, "move")
        robot_data = RobotData(Path(name) / "set", {}, delta=tuple(range(13)))
        print(f"\n{EPISODES * STEPS:,} frames of 14 dimensions, 13 of them relative to the state, chunks of 50 steps")
        for processes in (1, 2):
            began = time.perf_counter()
            robot = Robot(fit_stats(robot_data, 50, processes=processes), (), 50, robot_data.delta)
            fitted = time.perf_counter()
            chunks, clipped = action_chunks(robot_data, robot, limit=20_000, processes=processes)
            codec = FASTCodec.fit(chunks[:5000], 1024, 10.0)
            trained = time.perf_counter()
            report = measure_fast(codec, chunks, budget=256, clipped=clipped, processes=processes)
            done = time.perf_counter()
            print(
                f"{processes} processes: statistics {fitted - began:5.1f} s, FAST fitted {trained - fitted:5.1f} s, "
                f"{report.chunks:,} chunks measured {done - trained:5.1f} s"
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"largest memory of this process: {peak:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["video", "loader", "statistics"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.only in (None, "video"):
        video_table()
    if arguments.only in (None, "statistics"):
        statistics_table()
    if arguments.only in (None, "loader"):
        loader_table(arguments.rounds, arguments.steps, arguments.workers)


if __name__ == "__main__":
    main()
