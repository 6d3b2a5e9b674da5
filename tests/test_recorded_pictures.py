"""Pictures and videos as recorders leave them: damaged, upside down, too long, adrift, of 16 bits. Each is shown as it
is meant, or refused by name, by the reader and by the doctor; and the sound one beside it is neither."""

import io
import json
import logging
import os
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_files import ACTION, CAMERA, FPS, HEIGHT, LENGTHS, WIDTH, picture, png, v21, v30, write_video
from PIL import Image

from insula.data.describe import describe
from insula.data.images import decode_any, decode_image
from insula.data.lerobot import LeRobotDataset
from insula.data.lerobot.bookkeeping import off_the_grid
from insula.data.lerobot.command import DoctorConfig, run_doctor
from insula.data.lerobot.conversion import convert_dataset
from insula.data.lerobot.doctor import examine
from insula.data.lerobot.reader import camera_problems
from insula.data.lerobot.remedies import NOTES, Finding, grouped
from insula.data.lerobot.timing import NEAREST_WITHIN, deviation, match, misfit
from insula.data.lerobot.video import VideoReader
from insula.errors import DatasetError

VIDEO = f"videos/chunk-000/{CAMERA}/episode_000001.mp4"  # of v2.1
SHARED = f"videos/{CAMERA}/chunk-000/file-000.mp4"  # of v3.0: episodes 0 and 1
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
SIZE = (HEIGHT, WIDTH)
CODEC_ERROR = 4  # gray levels; neighboring frames differ by 12
QUADRANTS = np.repeat(np.repeat(np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [0, 0, 0]]]), 24, 0), 32, 1)
QUADRANTS = QUADRANTS.astype(np.uint8)


def found(root: Path) -> dict[str, Finding]:
    return {finding.fault: finding for finding in examine(root)}


def faults(root: Path) -> set[str]:
    return {finding.fault for finding in examine(root) if not finding.is_note}


def is_shown(root: Path, episode: int, step: int) -> bool:
    """Whether the reader shows that step's picture."""
    dataset = LeRobotDataset(root)
    image = dataset.image(CAMERA, int(dataset.episodes.start[episode]) + step)
    return float(np.abs(image.astype(float) - picture(episode, step)).mean()) < CODEC_ERROR


def pictures(episode: int, start: int = 0, stop: int | None = None) -> list[np.ndarray]:
    return [picture(episode, step) for step in range(start, LENGTHS[episode] if stop is None else stop)]


def edit_places(root: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = pq.read_table(root / EPISODES).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), root / EPISODES)


def start_of(row: dict[str, Any], seconds: float) -> None:
    row[f"videos/{CAMERA}/from_timestamp"] = seconds


# --- videos whose frames are damaged ---------------------------------------------------------------------------------


def flip_bits(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    begin = raw.index(b"mdat") + at
    for k in range(6):
        raw[begin + 97 * k] ^= 0x10
    path.write_bytes(raw)


def noisy(path: Path, groups: int = 6) -> list[np.ndarray]:
    """Frames that fill their packets, in groups of `groups`."""
    noise = np.random.default_rng(0).integers(0, 60, (HEIGHT, WIDTH, 3))
    frames = [np.clip(picture(1, step) + noise, 0, 255).astype(np.uint8) for step in range(LENGTHS[1])]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"g": str(groups), "crf": "18", "bf": "0"}
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return frames


def test_what_a_decoder_made_up_is_never_shown(tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    noisy(root / VIDEO)
    assert faults(root) == set()  # the control: the same video, whole
    LeRobotDataset(root).images(CAMERA, range(sum(LENGTHS)))

    flip_bits(root / VIDEO, 1200)
    finding = found(root)["video damaged"]
    assert finding.episode == 1 and finding.file == VIDEO and not finding.is_note
    dataset = LeRobotDataset(root)
    with pytest.raises(DatasetError, match=r"episode 1, .* the frame at 0\.0000 s is damaged") as error:
        dataset.images(CAMERA, [LENGTHS[0]])
    assert error.value.fault == "video damaged"
    dataset.images(CAMERA, [0, LENGTHS[0] + 6])  # another episode, and the next group of this one


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_frames_that_depend_on_a_damaged_one_are_refused_too(cache_bytes: int, tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    noisy(root / VIDEO)
    flip_bits(root / VIDEO, 1200)
    refused = []
    for step in range(LENGTHS[1]):
        dataset = LeRobotDataset(root, cache_bytes=cache_bytes)
        try:
            dataset.image(CAMERA, LENGTHS[0] + step)
        except DatasetError:
            refused.append(step)
    assert refused == list(range(6))


def test_a_conversion_without_the_damaged_episode_is_sound(tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    noisy(root / VIDEO)
    flip_bits(root / VIDEO, 1200)
    with pytest.raises(DatasetError, match="is damaged"):
        convert_dataset(root, tmp_path / "made")
    made = convert_dataset(root, tmp_path / "made", drop_episodes=[1])
    assert len(made) == LENGTHS[0] + LENGTHS[2] and examine(tmp_path / "made") == []
    with pytest.raises(ValueError, match="no episode 7"):
        convert_dataset(root, tmp_path / "made", drop_episodes=[7], overwrite=True)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 5145\n"


@pytest.mark.parametrize(
    ("make", "fault", "message"),
    [
        (os.mkfifo, "video damaged", "is a named pipe, expected a file"),
        (lambda path: path.symlink_to("/dev/zero"), "video damaged", "is a device"),
        (lambda path: path.write_text(POINTER), "git lfs", "is a Git LFS pointer"),
        (lambda path: path.write_bytes(b""), "empty file", "is empty"),
        (lambda path: path.write_text("<html>"), "video damaged", "not a readable video"),
        (Path.mkdir, "video damaged", "is a directory"),
        (lambda path: None, "file missing", "missing; restore"),
    ],
)
def test_what_is_no_video_is_named(make: Callable[[Path], Any], fault: str, message: str, tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    (root / VIDEO).unlink()
    make(root / VIDEO)
    assert message in found(root)[fault].message
    with pytest.raises(DatasetError, match=message) as error:
        LeRobotDataset(root).images(CAMERA, [LENGTHS[0]])
    assert error.value.fault == fault


# --- videos whose frames are not as many as the rows -----------------------------------------------------------------


def test_frames_left_over_behind_an_episode_are_said(tmp_path: Path, caplog: Any) -> None:
    root = v21(tmp_path / "set")
    write_video(root / VIDEO, pictures(1, 0, 17))
    finding = found(root)["frames left over"]
    assert "17 frames for 12 rows: 5 are left over" in finding.message and finding.episode == 1 and not finding.is_note
    with caplog.at_level(logging.WARNING):
        assert is_shown(root, 1, 0) and is_shown(root, 1, 11)
    assert "the first ones are taken, 5 are left over" in caplog.text

    write_video(root / VIDEO, pictures(1))  # the remedy, followed
    assert examine(root) == []


def test_frames_left_over_between_episodes_shift_nothing_in_silence(tmp_path: Path) -> None:
    root = v30(tmp_path / "set")
    assert is_shown(root, 1, 3) and examine(root) == []
    stray = [*pictures(0), picture(2, 9), picture(2, 9), *pictures(1)]
    write_video(root / SHARED, stray)
    finding = found(root)["frames left over"]
    assert "has 21 frames, its 2 episodes have 19 rows: if the 2 left over" in finding.message
    for frame in (0, LENGTHS[0] + 3):
        with pytest.raises(DatasetError, match="has 21 frames, its 2 episodes have 19 rows"):
            LeRobotDataset(root).images(CAMERA, [frame])

    edit_places(root, lambda rows: start_of(rows[1], 0.9))  # the remedy, followed
    assert is_shown(root, 0, 3) and is_shown(root, 1, 3) and faults(root) == set()
    assert found(root)["frames unused"].is_note


def test_frames_left_over_at_the_end_are_fine_where_the_table_says_so(tmp_path: Path) -> None:
    root = v30(tmp_path / "set")
    write_video(root / SHARED, [*pictures(0), *pictures(1, 0, 15)])
    assert "to_timestamp 2.2000 for the last" in found(root)["frames left over"].message
    edit_places(root, lambda rows: rows[1].update({f"videos/{CAMERA}/to_timestamp": 2.2}))
    assert faults(root) == set() and is_shown(root, 1, 11)


def test_a_frame_lost_between_episodes_shifts_nothing_in_silence(tmp_path: Path) -> None:
    root = v30(tmp_path / "set")
    write_video(root / SHARED, [*pictures(0)[1:], *pictures(1)])
    assert "either its end is missing, or frames were lost" in found(root)["video too short"].message
    with pytest.raises(DatasetError, match="has 18 frames, its 2 episodes have 19 rows"):
        LeRobotDataset(root).images(CAMERA, [LENGTHS[0] + 3])


def test_episodes_that_share_frames_are_found(tmp_path: Path) -> None:
    root = v30(tmp_path / "set")
    edit_places(root, lambda rows: start_of(rows[1], 0.3))
    assert found(root)["video overlap"].episode == 1


def test_one_file_for_all_episodes_is_no_camera(tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    path = root / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"video_path": "videos/{video_key}.mp4"}))
    with pytest.raises(DatasetError, match="all episodes would show the same file"):
        LeRobotDataset(root).images(CAMERA, [0])


# --- videos whose times are not the rows' ----------------------------------------------------------------------------


def at_times(path: Path, frames: list[np.ndarray], seconds: list[float]) -> None:
    """Each frame at its own time, to a ten-thousandth of a second."""
    base = Fraction(1, 10_000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"g": "4", "crf": "10", "bf": "0"}
        stream.codec_context.time_base = base
        for image, at in zip(frames, seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = round(at * 10_000)
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_a_small_drift_between_episodes_is_a_note_and_a_conversion_mends_it(tmp_path: Path) -> None:
    root = v30(tmp_path / "set")
    edit_places(root, lambda rows: start_of(rows[1], 0.7003))
    finding = found(root)["clock"]
    assert finding.is_note and "0.0003 s" in finding.message and faults(root) == set()
    assert is_shown(root, 0, 6) and is_shown(root, 1, 0) and is_shown(root, 1, 11)
    convert_dataset(root, tmp_path / "made")
    assert examine(tmp_path / "made") == [] and is_shown(tmp_path / "made", 1, 11)


@pytest.mark.parametrize(
    ("seconds", "fault", "said", "near"),
    [
        ([0.1 * i + 0.01 for i in range(12)], "clock", "a constant offset: every frame lies 0.0100 s behind", True),
        ([0.1 * i + 0.001 * i for i in range(12)], "clock", "a drift: the first frame lies 0.0000 s", True),
        ([0.1 * i + 0.01 * (i % 2) for i in range(12)], "clock", "jitter: frames lie up to 0.0100 s", True),
        ([0.1 * i + 0.05 for i in range(12)], "video offset", "every frame lies 0.0500 s", False),
        ([0.1 * i + 0.1 for i in range(12)], "video offset", "every frame lies 0.1000 s behind its row", False),
        ([0.11 * i for i in range(12)], "video rate", "0.1100 s apart, the rows 0.1000 s", False),
        ([0.1 * i + (0.4 if i > 5 else 0) for i in range(12)], "video gap", "frames are missing there", False),
        ([0.1 * i for i in range(9)], "video too short", "the video was cut, it ends at 0.8000 s", False),
    ],
)
def test_drift_offset_gap_and_cut_are_told_apart(
    seconds: list[float], fault: str, said: str, near: bool, tmp_path: Path
) -> None:
    root = v21(tmp_path / "set")
    at_times(root / VIDEO, pictures(1)[: len(seconds)], seconds)
    finding = found(root)[fault]
    assert said in finding.message and finding.is_note == near
    if near:
        assert all(is_shown(root, 1, step) for step in range(12))
    else:
        with pytest.raises(DatasetError, match="episode 1"):
            LeRobotDataset(root).images(CAMERA, range(LENGTHS[0], LENGTHS[0] + 12))


def test_a_video_that_begins_a_frame_late_shows_no_row_the_picture_of_another(tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    at_times(root / VIDEO, pictures(1), [0.1 * i + 0.1 for i in range(12)])
    with pytest.raises(DatasetError, match="every frame lies"):  # though a frame lies at exactly 0.5 s
        LeRobotDataset(root).images(CAMERA, [LENGTHS[0] + 5])


def test_a_video_of_twice_the_rate_is_read_by_its_times(tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    between = [frame for step in range(12) for frame in (picture(1, step), picture(2, step))]
    write_video(root / VIDEO, between, fps=2 * FPS)
    assert faults(root) == set() and is_shown(root, 1, 7)


def test_timestamps_of_hours_are_as_exact_as_float32_can_be() -> None:
    step = np.arange(3 * 3600 * 30)
    stored = (step / 30).astype(np.float32)
    assert off_the_grid(stored, step, 30).max() == 0 and np.abs(stored - step / 30).max() > 1e-4
    assert match(step / 30, stored.astype(np.float64)).is_near.all()
    assert off_the_grid(np.array([0.0, np.nan, 0.05]), np.arange(3), 30).tolist() == pytest.approx(
        [0.0, np.inf, 2 / 30 - 0.05], abs=1e-6
    )


def test_which_frame_is_near_enough() -> None:
    times = np.arange(10) / 10
    due = np.array([0.0, 0.1 + 0.099 * NEAREST_WITHIN, 0.3 - 0.101 * NEAREST_WITHIN, 0.45, 0.9, 1.0, np.nan])
    assert match(times, due).is_near.tolist() == [True, True, False, False, True, False, False]
    assert match(times, due).nearest[:3].tolist() == [0, 1, 3]
    assert misfit(times, times, np.inf, 10) is None and deviation(times, times) is None


# --- orientation -----------------------------------------------------------------------------------------------------

MATRICES = {
    "180": ((-1, 0, 0, -1, WIDTH, HEIGHT), lambda image: np.rot90(image, 2)),
    "90 clockwise": ((0, 1, -1, 0, HEIGHT, 0), lambda image: np.rot90(image, -1)),
    "90 counterclockwise": ((0, -1, 1, 0, 0, WIDTH), lambda image: np.rot90(image, 1)),
}


def display_matrix(path: Path, a: float, b: float, c: float, d: float, x: int, y: int) -> None:
    """What a phone, or a camera mounted upside down, leaves in the track's header."""
    raw = bytearray(path.read_bytes())
    header = raw.index(b"tkhd") + 4
    at = header + (36 if raw[header] == 0 else 48) + 4
    raw[at : at + 36] = struct.pack(">9i", *(int(value * 65536) for value in (a, b, 0, c, d, 0, x, y)), 1 << 30)
    path.write_bytes(raw)


@pytest.mark.parametrize("turn", MATRICES)
def test_a_display_matrix_is_applied(turn: str, tmp_path: Path) -> None:
    matrix, turned = MATRICES[turn]
    path = tmp_path / "video.mp4"
    write_video(path, [QUADRANTS] * 3)
    np.testing.assert_allclose(VideoReader().frames(path, [0.1], SIZE, "here")[0], QUADRANTS, atol=40)
    display_matrix(path, *matrix)
    expected = turned(QUADRANTS)
    np.testing.assert_allclose(VideoReader().frames(path, [0.1], expected.shape[:2], "here")[0], expected, atol=40)


@pytest.mark.parametrize(
    ("matrix", "said"),
    [((-1, 0, 0, 1, WIDTH, 0), "mirrored"), ((0.7071, 0.7071, -0.7071, 0.7071, 0, 0), "turned by 315°")],
)
def test_any_other_matrix_is_refused_by_name(matrix: tuple, said: str, tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    display_matrix(root / VIDEO, *matrix)
    assert said in found(root)["orientation"].message
    with pytest.raises(DatasetError, match=said):
        LeRobotDataset(root).images(CAMERA, [LENGTHS[0]])


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(QUADRANTS), kind, exif=exif.tobytes(), **options)
    stored = QUADRANTS.transpose(1, 0, 2) if orientation in (5, 7) else QUADRANTS
    turns = {1: 0, 2: 0, 3: 2, 4: 2, 5: 0, 6: -1, 7: 2, 8: 1}
    expected = np.rot90(stored, turns[orientation])
    expected = expected[:, ::-1] if orientation in (2, 4) else expected
    size = expected.shape[:2]
    np.testing.assert_allclose(decode_image(data, size, "here"), expected, atol=30)
    np.testing.assert_allclose(decode_any(data, "here"), expected, atol=30)
    if size != SIZE:
        with pytest.raises(DatasetError, match="64×48"):
            decode_image(data, SIZE, "here")


# --- pictures that are not 8-bit color -------------------------------------------------------------------------------


def png_of_16_bit_color() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(6 * WIDTH) for _ in range(HEIGHT))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RGB = Image.fromarray(QUADRANTS)
NOT_COLOR: dict[str, tuple[bytes, str]] = {
    "16-bit depth": (encoded(Image.fromarray(np.full(SIZE, 700, np.uint16))), "16-bit gray"),
    "16-bit color": (png_of_16_bit_color(), "16-bit color"),
    "gray": (encoded(RGB.convert("L")), "8-bit gray, one channel"),
    "gray JPEG": (encoded(RGB.convert("L"), "JPEG"), "8-bit gray, one channel"),
    "gray with alpha": (encoded(RGB.convert("LA")), "8-bit gray with alpha"),
    "color with alpha": (encoded(RGB.convert("RGBA")), "color with alpha"),
    "WEBP with alpha": (encoded(Image.new("RGBA", (WIDTH, HEIGHT), (9, 9, 9, 7)), "WEBP"), "color with alpha"),
    "a palette": (encoded(RGB.convert("P")), "a palette"),
    "black and white": (encoded(RGB.convert("1")), "black and white"),
    "CMYK": (encoded(RGB.convert("CMYK"), "JPEG"), "CMYK"),
    "a transparent value": (encoded(RGB, transparency=(0, 0, 0)), "color with a transparent value"),
    "an animation": (encoded(RGB, save_all=True, append_images=[Image.new("RGB", RGB.size)]), "an animation of 2"),
}


@pytest.mark.parametrize("kind", [kind for kind in NOT_COLOR if kind not in ("gray", "gray JPEG")])
def test_pictures_that_are_no_8_bit_color_are_refused_by_name(kind: str) -> None:
    data, said = NOT_COLOR[kind]
    with pytest.raises(DatasetError, match=f"here: the picture is {said}.* expected 8-bit color") as error:
        decode_image(data, SIZE, "here")
    assert error.value.fault == "not 8-bit color"
    np.testing.assert_array_equal(decode_image(encoded(RGB), SIZE, "here"), QUADRANTS)  # the control


def test_gray_of_8_bits_is_shown_as_gray() -> None:
    gray = np.asarray(RGB.convert("L"))
    np.testing.assert_array_equal(decode_image(NOT_COLOR["gray"][0], SIZE, "here"), np.stack([gray] * 3, axis=-1))


@pytest.mark.parametrize("kind", NOT_COLOR)
def test_of_a_question_what_color_can_hold_is_shown(kind: str) -> None:
    data, said = NOT_COLOR[kind]
    if kind in ("gray", "gray JPEG", "a palette", "black and white"):
        with Image.open(io.BytesIO(data)) as image:
            np.testing.assert_array_equal(decode_any(data, "here"), np.asarray(image.convert("RGB")))
    else:
        with pytest.raises(DatasetError, match=said):
            decode_any(data, "here")


def add_depth(root: Path, feature: dict[str, Any], data: bytes) -> None:
    """A second camera beside the sound one."""
    path = root / "meta" / "info.json"
    raw = json.loads(path.read_text())
    raw["features"]["observation.images.depth"] = {"dtype": "image", "names": None, **feature}
    path.write_text(json.dumps(raw))
    for part in sorted(root.rglob("data/**/*.parquet")):
        rows = pq.read_table(part)
        column = pa.array([{"bytes": data, "path": None}] * len(rows))
        pq.write_table(rows.append_column("observation.images.depth", column), part)


@pytest.mark.parametrize(
    "feature",
    [
        {"shape": [HEIGHT, WIDTH, 1]},
        {"shape": [1, HEIGHT, WIDTH]},
        {"shape": [HEIGHT, WIDTH, 4]},
        {"shape": [HEIGHT, WIDTH, 3]},
        {"shape": [HEIGHT, WIDTH, 3], "info": {"video.is_depth_map": True}},
        {"shape": [HEIGHT, WIDTH, 3], "video_info": {"video.pix_fmt": "gray16le"}},
    ],
)
def test_a_depth_map_is_offered_to_nobody_and_blocks_nothing(feature: dict[str, Any], tmp_path: Path) -> None:
    root = v21(tmp_path / "set", video=False)
    add_depth(root, feature, NOT_COLOR["16-bit depth"][0])
    dataset = LeRobotDataset(root)
    with pytest.raises(DatasetError, match="8-bit color"):
        dataset.images("observation.images.depth", [0])
    assert dataset.images(CAMERA, [0]).shape == (1, *SIZE, 3)
    assert {"cannot be read", "not 8-bit color"} & found(root).keys()
    made = convert_dataset(root, tmp_path / "made")
    assert made.cameras == (CAMERA,) and examine(tmp_path / "made") == []

    told = camera_problems(dataset)
    assert (told.keys() == {"observation.images.depth"}) == dataset.features["observation.images.depth"].is_camera
    if not told:
        assert 'wrist = "observation.images.depth"' not in describe(root, ("front", "wrist"))


@pytest.mark.parametrize("form", ["gray16le", "gray", "yuv420p10le", "yuva420p"])
def test_a_video_of_another_kind_is_refused_by_name(form: str, tmp_path: Path) -> None:
    root = v21(tmp_path / "set")
    with av.open(str(root / VIDEO), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, form
        for image in pictures(1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=form)))
        container.mux(stream.encode())
    assert form in found(root)["not 8-bit color"].message
    with pytest.raises(DatasetError, match=rf"the video is {form} .* expected 8-bit color"):
        LeRobotDataset(root).images(CAMERA, [LENGTHS[0]])


# --- severities ------------------------------------------------------------------------------------------------------


def test_repeats_are_one_finding_with_their_number_and_first_places(tmp_path: Path) -> None:
    root = v21(tmp_path / "set", video=False)
    for part in sorted(root.rglob("data/**/*.parquet")):
        rows = pq.read_table(part)
        small = pa.array([{"bytes": png(np.zeros((9, 9, 3), np.uint8)), "path": "x"}] * len(rows))
        pq.write_table(rows.set_column(rows.column_names.index(CAMERA), CAMERA, small), part)
    (finding,) = examine(root)
    assert finding.count == 3 and len(finding.others) == 2 and finding.to_json()["severity"] == "fault"
    assert str(finding).count("\n") == 3 and "episode 2, frame 0" in str(finding)


def test_findings_are_bounded_however_many_there_are() -> None:
    many = grouped(Finding("wrong shape", "x", f"file {n}", n, subject=f"column {n % 1000}") for n in range(60_000))
    assert len(many) <= 51 and sum(finding.count for finding in many) == 60_000
    assert len("\n".join(map(str, many))) < 100_000


def test_notes_come_behind_faults_and_leave_the_exit_code_alone(tmp_path: Path) -> None:
    root = v21(tmp_path / "set", video=False)
    path = root / "meta" / "info.json"
    raw = json.loads(path.read_text())
    raw["total_frames"] = 99
    path.write_text(json.dumps(raw))
    assert [finding.fault for finding in examine(root)] == ["totals"] and run_doctor(DoctorConfig(root)) == 0
    part = root / "data/chunk-000/episode_000001.parquet"
    pq.write_table(pq.read_table(part).drop_columns([ACTION]), part)
    assert [finding.fault for finding in examine(root)] == ["column missing", "totals"]
    assert run_doctor(DoctorConfig(root)) == 1 and "totals" in NOTES
