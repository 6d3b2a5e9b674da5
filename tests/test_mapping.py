"""The TOML that maps data sets to the model: read, refused by name, written by `insula data describe`."""

import json
from pathlib import Path

import lerobot_files
import pyarrow.parquet as pq
import pytest

from insula.data.describe import describe, pair_cameras
from insula.data.lerobot.info import Feature, Info, image_feature
from insula.data.mapping import Columns, Mapping, RobotData, mapping_to_json, parse_mapping, read_mapping
from insula.errors import DatasetError

CAMERAS = ("front", "wrist")
WHOLE = """
[robots.arm]
path = "arm"
cameras = { front = "observation.images.top" }
state = ["observation.state", { column = "observation.gripper", dims = [1] }]
actions = ["action"]
weight = 3
horizon = 8
delta = [0, 1]
normalization = "mean_std"
statistics = "norm_stats.json"
instruction = "language"
losses = ["flow"]
units = { state = "m", actions = "m/s" }

[questions.scenes]
path = "/data/questions"
camera = "wrist"
weight = 0.5
"""


def read(folder: Path, text: str) -> Mapping:
    (folder / "data.toml").write_text(text)
    return read_mapping(folder / "data.toml", CAMERAS)


def test_every_setting_is_read(tmp_path: Path) -> None:
    mapping = read(tmp_path, WHOLE)
    arm = mapping.robots["arm"]
    assert arm == RobotData(
        path=tmp_path / "arm",
        cameras={"front": "observation.images.top"},
        state=(Columns("observation.state"), Columns("observation.gripper", (1,))),
        weight=3,
        horizon=8,
        delta=(0, 1),
        normalization="mean_std",
        statistics=tmp_path / "norm_stats.json",
        instruction="language",
        losses=("flow",),
        units={"state": "m", "actions": "m/s"},
    )
    assert mapping.questions["scenes"].path == Path("/data/questions")
    assert mapping.weights == [3, 0.5]


def test_json_and_back_from_anywhere(tmp_path: Path) -> None:
    mapping = read(tmp_path, WHOLE)
    stored = json.loads(json.dumps(mapping_to_json(mapping)))
    assert parse_mapping(stored, Path("/elsewhere"), "stored") == mapping


def test_a_folder_is_a_mapping_of_one(tmp_path: Path) -> None:
    (robot,) = read_mapping(tmp_path / "arm", CAMERAS).robots.values()
    assert robot == RobotData(tmp_path / "arm", {name: f"observation.images.{name}" for name in CAMERAS})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("[robots.arm]", "[robot.arm]"), "no table 'robot'.*did you mean 'robots'"),
        (('path = "arm"', ""), "robots.arm: 'path' is missing"),
        (("weight = 3", "wieght = 3"), "no setting 'wieght'.*did you mean 'weight'"),
        (("weight = 3", 'weight = "3"'), "weight is '3', expected int or float"),
        (("weight = 3", "weight = 0"), "weight is 0, expected a number > 0"),
        (("weight = 3", "weight = inf"), "weight is inf, expected a number > 0 and < 1e"),
        (("weight = 3", "weight = nan"), "weight is nan, expected a number > 0"),
        (("horizon = 8", "horizon = 0"), "horizon is 0, expected at least 1"),
        (("horizon = 8", "horizon = true"), "horizon is True, expected int"),
        (("delta = [0, 1]", "delta = [0.5]"), "delta is .0.5., expected a list of int"),
        (("mean_std", "mean_sdt"), "'mean_sdt' .did you mean 'mean_std'"),
        (('losses = ["flow"]', 'losses = ["flwo"]'), "no loss 'flwo'.*did you mean 'flow'"),
        (('losses = ["flow"]', "losses = []"), "losses is empty"),
        (('actions = ["action"]', "actions = []"), "actions is empty"),
        (('actions = ["action"]', "actions = [3]"), "actions: got 3, expected a table"),
        (("dims = [1]", "dims = [-1]"), "expected .*dims = .0, 1."),
        (("front = ", "fornt = "), "no camera of the model 'fornt'.*did you mean 'front'"),
        (('camera = "wrist"', 'camera = "wrsit"'), "questions.scenes.camera: .*did you mean 'wrist'"),
        (("[questions.scenes]", "[questions.arm]"), "'arm' names both"),
        (("units = {", "units = { stat = 'm',"), "no entry 'stat'.*did you mean 'state'"),
        (("weight = 3", "weight 3"), "not readable as TOML"),
        (("[robots.arm]", '[robots."../arm"]'), "'../arm' is no name; .* such as 'arm'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, wrong: tuple[str, str], message: str) -> None:
    assert wrong[0] in WHOLE
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, WHOLE.replace(*wrong, 1))


def test_a_mapping_without_robots_or_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no \[robots.NAME\] table"):
        read(tmp_path, WHOLE[WHOLE.index("[questions") :])
    with pytest.raises(DatasetError, match=r"no such file; insula data describe DATA > other.toml"):
        read_mapping(tmp_path / "other.toml", CAMERAS)


# --- describe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lerobot_files.v21, lerobot_files.v30])
def test_a_description_is_a_mapping_ready_to_read(tmp_path: Path, make: object) -> None:
    root = make(tmp_path / "my robot (1)", video=False)
    text = describe(root, CAMERAS)
    mapping = read(tmp_path, text)
    (name, robot), *_ = mapping.robots.items()
    assert name == "my-robot-1" and robot.path == root.resolve()
    assert robot.cameras == {"front": "observation.images.front"}
    assert robot.state == (Columns("observation.state"),) and robot.actions == (Columns("action"),)
    for said in ("so100: 3 episodes, 24 frames", "2: x, y", "3: dx, dy, grip", "48×64", "# wrist: no camera is left"):
        assert said in text
    assert "--model.state-dim 2 --model.action-dim 3" in text


def info(*cameras: str) -> Info:
    features = {name: image_feature(8, 8) for name in cameras} | {"action": Feature("float32", (2,))}
    return Info("v3.0", 10, features, 1, 1, 1)


@pytest.mark.parametrize(
    ("wanted", "found", "pairs"),
    [
        (CAMERAS, ("observation.images.wrist", "observation.images.front"), "wf"),
        (CAMERAS, ("observation.images.hand", "observation.images.top"), "wf"),
        (CAMERAS, ("observation.image", "observation.wrist_image"), "fw"),
        (
            ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
            ("observation.images.cam_right_wrist", "observation.images.cam_left_wrist", "observation.images.cam_high"),
            "rlb",
        ),
    ],
)
def test_cameras_are_paired_by_what_they_are_called(
    wanted: tuple[str, ...], found: tuple[str, ...], pairs: str
) -> None:
    paired = pair_cameras(wanted, list(found))
    assert {feature: camera[0] for camera, feature in paired.items()} == dict(zip(found, pairs, strict=True))


def test_unused_cameras_are_said_and_odd_columns_found(tmp_path: Path) -> None:
    root = lerobot_files.v30(tmp_path / "set", video=False)
    path = root / "meta" / "info.json"
    raw = json.loads(path.read_text())
    features = raw["features"]
    features["observation.images.side"] = features["observation.images.front"]
    features["observation.joints"] = features.pop("observation.state")
    features["observation.tactile"] = {"dtype": "float8", "shape": [4]}
    path.write_text(json.dumps(raw))
    for file in (root / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        table = table.append_column("observation.images.side", table["observation.images.front"])
        names = [name.replace("observation.state", "observation.joints") for name in table.column_names]
        pq.write_table(table.rename_columns(names), file)
    text = describe(root, ("front",))
    assert '# not used: "observation.images.side"' in text and 'state = ["observation.joints"]' in text
    assert '# cannot be read: "observation.tactile": dtype is "float8"' in text
    features.pop("action")
    path.write_text(json.dumps(raw))
    with pytest.raises(DatasetError, match=r"no column is called 'action' or like it; .* numbers: observation.joints"):
        describe(root, ("front",))
