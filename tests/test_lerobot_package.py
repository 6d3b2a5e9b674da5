"""Data sets written by code we did not write read the same here, and ours read the same there.

The package is `lerobot-dataset`, LeRobot's own reader and writer. Its decoding of videos needs torchvision, which is
built for another PyTorch than the tests': a stand-in takes the place of the one transform used for pictures.
"""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest

from insula.data.chunks import chunk_indices
from insula.data.lerobot import LeRobotDataset, LeRobotWriter
from insula.data.lerobot.info import Feature, image_feature

torch = pytest.importorskip("torch", reason="install the extra: parity")
pytest.importorskip("datasets", reason="install the extra: parity")  # before the stand-in, which it would look for
LENGTHS, FPS, SIZE = (7, 12, 5), 10, (48, 64)
FRONT, STATE, ACTION = "observation.images.front", "observation.state", "action"
FEATURES = {
    FRONT: image_feature(*SIZE),
    STATE: Feature("float32", (3,), ("x", "y", "z")),
    ACTION: Feature("float32", (2,), ("a", "b")),
}


@pytest.fixture(scope="module")
def theirs() -> Iterator[type]:
    class ToTensor:
        def __call__(self, image: object) -> object:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    stand_in, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    transforms.ToTensor, stand_in.transforms = ToTensor, transforms
    added = {"torchvision": stand_in, "torchvision.transforms": transforms}
    if importlib.util.find_spec("torchvision"):
        added = {}  # the real one will do
    sys.modules |= added
    try:
        module = pytest.importorskip(
            "ledataset.datasets.lerobot_dataset", reason="install lerobot-dataset, as make does"
        )
        yield module.LeRobotDataset
    finally:
        for name in added:
            sys.modules.pop(name)


def picture(episode: int, step: int) -> np.ndarray:
    """Smooth, and unlike every other: codecs keep it within a few grey levels."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.stack([40 + 50 * episode + 0 * y, 10 * step + x, 200 - 12 * step + y], -1).clip(0, 255).astype(np.uint8)


def episodes() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            FRONT: np.stack([picture(e, i) for i in range(n)]),
            STATE: rng.normal(size=(n, 3)).astype(np.float32),
            ACTION: rng.normal(size=(n, 2)).astype(np.float32),
        }
        for e, n in enumerate(LENGTHS)
    ]


@pytest.mark.parametrize("video", [False, True])
def test_theirs_reads_the_same_here(theirs: type, tmp_path: Path, video: bool) -> None:
    features = {name: feature.to_json() for name, feature in FEATURES.items()}
    for feature in features.values():
        feature["shape"] = tuple(feature["shape"])
    features[FRONT]["dtype"] = "video" if video else "image"
    written = theirs.create("me/theirs", FPS, features, root=tmp_path / "set", use_videos=video)
    for number, values in enumerate(episodes()):
        for i in range(LENGTHS[number]):
            written.add_frame({key: value[i] for key, value in values.items()} | {"task": f"task {number % 2}"})
        written.save_episode()
    written.finalize()

    dataset = LeRobotDataset(tmp_path / "set")
    whole = {key: np.concatenate([values[key] for values in episodes()]) for key in FEATURES}
    np.testing.assert_array_equal(dataset.column(STATE), whole[STATE])
    np.testing.assert_array_equal(dataset.column(ACTION), whole[ACTION])
    assert dataset.episodes.length.tolist() == list(LENGTHS) and dataset.tasks == ("task 0", "task 1")
    order = np.random.default_rng(1).permutation(sum(LENGTHS))
    seen = LeRobotDataset(tmp_path / "set", cache_bytes=0).images(FRONT, order)
    if not video:
        np.testing.assert_array_equal(seen, whole[FRONT][order])
        return
    assert np.abs(seen.astype(int) - whole[FRONT][order]).mean() < 6
    (path,) = (tmp_path / "set" / "videos").rglob("*.mp4")
    with av.open(str(path)) as container:  # from its first frame to its last
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    np.testing.assert_array_equal(seen, np.stack(frames)[order])


def test_ours_reads_the_same_there(theirs: type, tmp_path: Path) -> None:
    horizon = 4
    with LeRobotWriter(tmp_path / "ours", FPS, FEATURES, "arm") as writer:
        for number, values in enumerate(episodes()):
            writer.add_episode(values, f"task {number % 2}")
    read = theirs("me/ours", root=tmp_path / "ours", delta_timestamps={ACTION: [i / FPS for i in range(horizon)]})
    assert len(read) == sum(LENGTHS) and read.meta.total_episodes == 3
    index = 0
    for number, values in enumerate(episodes()):
        for i in range(LENGTHS[number]):
            sample = read[index]
            rows, is_pad = chunk_indices(np.array([i]), np.array([LENGTHS[number]]), horizon)
            np.testing.assert_array_equal(sample[STATE].numpy(), values[STATE][i])
            np.testing.assert_array_equal(sample[ACTION].numpy(), values[ACTION][rows[0]])
            np.testing.assert_array_equal(sample[f"{ACTION}_is_pad"].numpy(), is_pad[0])
            image = (sample[FRONT].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            np.testing.assert_array_equal(image, values[FRONT][i])
            assert sample["task"] == f"task {number % 2}"
            index += 1
    stats = read.meta.stats[ACTION]
    every = np.concatenate([values[ACTION] for values in episodes()])
    np.testing.assert_allclose(stats["q99"], np.quantile(every, 0.99, axis=0), rtol=1e-6)
