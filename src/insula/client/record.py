"""What a robot's loop saw and did, as JSON lines: one row a control step, one a reply, one an error.

{"step": 12, "time": 1.2, "state": [...], "action": [...] or null, "origin": 10, "connected": true}
{"step": 12, "of": 10, "chunk": [[...]], "round_trip_ms": 31.2, "infer_ms": 24.9, "server_ms": 25.6}
                            of a server that acts on subtasks also "subtask": "...", "subtask_age": 3
{"step": 12, "error": "..."}

Pictures are kept as PNG files beside it, every `every` steps: pictures/000012_front.png. `insula replay` shows it.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from insula.client.connection import Reply
from insula.errors import FileError

LOG_FILE, PICTURES_FOLDER = "log.jsonl", "pictures"
_UNSAFE = re.compile(r"[^\w.-]")


@dataclasses.dataclass(frozen=True, eq=False)
class Tick:
    """One control step, `time` seconds after the first; the action was predicted from what was seen at `origin`."""

    step: int
    time: float
    seen: Mapping[str, Any]
    action: np.ndarray | None
    origin: int | None
    connected: bool


class Recorder:
    """Writes into a folder, which is made. `every`: steps between pictures; 0 keeps none. Raises FileError where there
    is a log already: what a robot did is not written over."""

    def __init__(self, folder: Path, every: int = 10) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{folder}: no folder can be made there ({error.strerror})") from None
        self.folder = folder
        self.every = every
        try:
            self._file = (folder / LOG_FILE).open("x", encoding="utf-8")
        except FileExistsError:
            raise FileError(f"{folder / LOG_FILE}: is there already; name another folder, or move it away") from None

    def step(self, tick: Tick) -> None:
        """One control step, held or not."""
        action = None if tick.action is None else _numbers(tick.action)
        self._write(
            {
                "step": tick.step,
                "time": round(tick.time, 6),
                "state": _numbers(tick.seen["state"]),
                "action": action,
                "origin": tick.origin,
                "connected": tick.connected,
            }
        )
        if self.every and tick.step % self.every == 0:
            self._keep_pictures(tick)

    def reply(self, of: int, step: int, reply: Reply) -> None:
        """A chunk for what was seen at step `of`, there at `step`."""
        times = {"round_trip_ms": reply.round_trip_ms, "infer_ms": reply.infer_ms, "server_ms": reply.server_ms}
        subtask = {"subtask": reply.subtask, "subtask_age": reply.subtask_age} if reply.subtask is not None else {}
        self._write({"step": step, "of": of, "chunk": [_numbers(row) for row in reply.actions], **times, **subtask})

    def error(self, step: int, message: str) -> None:
        """What was asked at `step` was not answered."""
        self._write({"step": step, "error": message})

    def close(self) -> None:
        """A second call does nothing."""
        self._file.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep_pictures(self, tick: Tick) -> None:
        folder = self.folder / PICTURES_FOLDER
        folder.mkdir(exist_ok=True)
        for camera, picture in tick.seen["images"].items():
            pixels = np.asarray(picture)
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
                # Said, but no reason to stop a robot: what it may do is the server's to judge.
                found = f"{pixels.dtype}{list(pixels.shape)}"
                self.error(tick.step, f"images.{camera}: {found} is not kept, expected uint8[height, width, 3]")
                continue

            # Little compression: writing must not take the time of a control step.
            name = f"{tick.step:06d}_{_UNSAFE.sub('_', camera)}.png"
            Image.fromarray(pixels).save(folder / name, compress_level=1)

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")


def _numbers(values: Any) -> list[float]:
    return [round(float(value), 6) for value in np.asarray(values).ravel()]
