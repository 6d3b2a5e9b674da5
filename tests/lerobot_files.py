"""LeRobot data sets written file by file after the format's description, independently of our writer."""

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

FPS, HEIGHT, WIDTH = 10, 48, 64
LENGTHS = (7, 12, 5)
TASKS = ("put the red block in the blue bowl", "push the green block")
CAMERA, STATE, ACTION = "observation.images.front", "observation.state", "action"


def picture(episode: int, step: int) -> np.ndarray:
    """A smooth image that says which one it is: codecs keep it within a few grey levels."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / (HEIGHT, WIDTH)[1]
    channels = [40 + 60 * episode + 0 * y, 30 + 15 * step + 20 * x, 200 - 12 * step + 20 * y]
    return np.clip(np.stack(np.broadcast_arrays(*channels), axis=-1), 0, 255).astype(np.uint8)


def write_video(path: Path, frames: list[np.ndarray], codec: str = "libx264", fps: int = FPS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        stream.options = {"g": "4", "crf": "10"} | ({"bf": "2"} if codec == "libx264" else {"preset": "10"})
        for image in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def features(video: bool) -> dict[str, Any]:
    camera = {"dtype": "video" if video else "image", "shape": [HEIGHT, WIDTH, 3]}
    numbers = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
    return {
        CAMERA: camera | {"names": ["height", "width", "channels"]},
        STATE: {"dtype": "float32", "shape": [2], "names": ["x", "y"]},
        ACTION: {"dtype": "float32", "shape": [3], "names": ["dx", "dy", "grip"]},
        **{k: {"dtype": v, "shape": [1], "names": None} for k, v in (numbers | {"task_index": "int64"}).items()},
    }


def rows(episode: int, video: bool) -> dict[str, Any]:
    length, first = LENGTHS[episode], sum(LENGTHS[:episode])
    rng = np.random.default_rng(episode)
    columns: dict[str, Any] = {
        STATE: list(rng.normal(size=(length, 2)).astype(np.float32)),
        ACTION: list(rng.normal(size=(length, 3)).astype(np.float32)),
        "timestamp": (np.arange(length) / FPS).astype(np.float32),
        "frame_index": np.arange(length),
        "episode_index": np.full(length, episode),
        "index": np.arange(first, first + length),
        "task_index": np.full(length, episode % 2),
    }
    if not video:
        columns[CAMERA] = [{"bytes": png(picture(episode, i)), "path": f"frame-{i}.png"} for i in range(length)]
    return columns


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def table(columns: dict[str, Any]) -> pa.Table:
    return pa.table({name: pa.array(list(values)) for name, values in columns.items()})


def info(version: str, video: bool) -> dict[str, Any]:
    old = version != "v3.0"
    video_path = (
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        if old
        else "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
    )
    data_path = (
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
        if old
        else "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
    )
    return {
        "codebase_version": version,
        "robot_type": "so100",
        "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS),
        "total_tasks": len(TASKS),
        "chunks_size": 2 if old else 1000,
        "fps": FPS,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "data_path": data_path,
        "video_path": video_path if video else None,
        "features": features(video),
    }


def write_json(path: Path, *values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, values)) + "\n")


def v21(root: Path, video: bool = True, codec: str = "libx264") -> Path:
    """A file per episode; two episodes a chunk."""
    write_json(root / "meta" / "info.json", info("v2.1", video))
    write_json(root / "meta" / "tasks.jsonl", *({"task_index": i, "task": task} for i, task in enumerate(TASKS)))
    episodes = [{"episode_index": e, "tasks": [TASKS[e % 2]], "length": n} for e, n in enumerate(LENGTHS)]
    write_json(root / "meta" / "episodes.jsonl", *episodes)
    for e, length in enumerate(LENGTHS):
        path = root / f"data/chunk-{e // 2:03d}/episode_{e:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(rows(e, video)), path)
        if video:
            place = root / f"videos/chunk-{e // 2:03d}/{CAMERA}/episode_{e:06d}.mp4"
            write_video(place, [picture(e, i) for i in range(length)], codec)
    return root


def v30(root: Path, video: bool = True, codec: str = "libx264") -> Path:
    """Episodes 0 and 1 share a data file and a video; episode 2 has its own."""
    write_json(root / "meta" / "info.json", info("v3.0", video))
    tasks = pa.table({"task_index": list(range(len(TASKS))), "task": list(TASKS)})  # pandas calls its index "task"
    pq.write_table(tasks, root / "meta" / "tasks.parquet")
    files = ([0, 1], [2])
    episodes = []
    for number, members in enumerate(files):
        path = root / f"data/chunk-000/file-{number:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(table(rows(e, video)) for e in members), path)
        begin = 0.0
        for e in members:
            first = sum(LENGTHS[:e])
            row = {
                "episode_index": e,
                "tasks": [TASKS[e % 2]],
                "length": LENGTHS[e],
                "data/chunk_index": 0,
                "data/file_index": number,
                "dataset_from_index": first,
                "dataset_to_index": first + LENGTHS[e],
            }
            if video:
                end = begin + LENGTHS[e] / FPS
                row |= {f"videos/{CAMERA}/chunk_index": 0, f"videos/{CAMERA}/file_index": number}
                row |= {f"videos/{CAMERA}/from_timestamp": begin, f"videos/{CAMERA}/to_timestamp": end}
                begin = end
            episodes.append(row)
        if video:
            frames = [picture(e, i) for e in members for i in range(LENGTHS[e])]
            write_video(root / f"videos/{CAMERA}/chunk-000/file-{number:03d}.mp4", frames, codec)
    place = root / "meta/episodes/chunk-000/file-000.parquet"
    place.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(episodes), place)
    return root
