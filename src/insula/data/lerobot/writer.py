"""Writing LeRobot v3.0: an episode at a time, in bounded memory, all or nothing."""

import contextlib
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from insula.data.images import EncodedVideo
from insula.data.lerobot.arrow import arrow_array, arrow_schema, texts_table
from insula.data.lerobot.info import BOOKKEEPING, DATA_PATH, EPISODES_PATH, VERSION, Feature, Info
from insula.data.lerobot.statistics import histogram_stats, numeric_stats
from insula.data.lerobot.tables import VIDEO_PATH
from insula.data.lerobot.writable import (
    Encoded,
    Values,
    check_episode,
    check_subtasks,
    checked,
    checked_features,
    numbered,
)
from insula.errors import DatasetError
from insula.files import write_json

PENDING = 100  # episode rows kept in memory
SUBTASK_INDEX = "subtask_index"


class LeRobotWriter:
    """Writes beside `root` and moves the finished data set there in `close()`; an exception leaves nothing behind.

        with LeRobotWriter(root, fps=10, features=features, robot_type="tabletop") as writer:
            writer.add_episode({"observation.state": state, "action": action, ...}, task="put the ...")

    `features` names what `add_episode` will be given; the bookkeeping columns (timestamp, index, ...) are added.
    NaN and infinity are refused, or, with `keep_non_finite`, written as they are, left out of the statistics and
    counted in `non_finite`. Raises DatasetError when `root` holds something already and `overwrite` is not set,
    ValueError for a bad feature.
    """

    def __init__(
        self,
        root: str | Path,
        fps: float | int,
        features: Mapping[str, Feature],
        robot_type: str | None = None,
        *,
        overwrite: bool = False,
        keep_non_finite: bool = False,
        file_megabytes: float | int = 100,
    ):
        self.root = Path(root)
        self.fps = fps
        self.robot_type = robot_type
        self.features = checked_features(features)
        self.non_finite = 0
        self._keep_non_finite = keep_non_finite
        self._overwrite = overwrite
        self._file_megabytes = file_megabytes
        if self.root.exists() and not overwrite and (self.root.is_file() or any(self.root.iterdir())):
            raise DatasetError(f"{self.root}: exists and is not empty; choose another place or ask for overwriting")

        self._tasks: dict[str, int] = {}
        self._subtasks: dict[str, int] = {}
        self._episodes = 0
        self._counted = dict(BOOKKEEPING)
        self._start_columns()
        self._pending: list[dict[str, Any]] = []
        self._videos: dict[str, dict[Path, int]] = {}
        self._episode_table: pq.ParquetWriter | None = None
        self._frames = 0
        self._file = 0
        self._sink: pa.NativeFile | None = None
        self._rows: pq.ParquetWriter | None = None
        self.root.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.root.parent / f".{self.root.name}.partial-{uuid.uuid4().hex[:8]}"
        (self._partial / "meta").mkdir(parents=True)
        self._open = True

    def add_episode(
        self, frames: Mapping[str, Values], task: str | Sequence[str], subtasks: str | Sequence[str] | None = None
    ) -> int:
        """Append one episode and return its index.

        `frames[name]` is [T, *shape] of that feature; cameras are uint8 [T, h, w, 3] or EncodedImages, those of dtype
        "video" EncodedVideo, whose file is copied. `task` is one text, or one for each frame; so is `subtasks`, where
        given: a column `subtask_index`, with the texts in meta/subtasks.parquet. All episodes have subtasks, or none.
        Raises InputError naming feature, shapes, and the frame and dimension of any NaN or infinity.
        """
        if not self._open:
            raise RuntimeError(f"{self.root}: add_episode() after close()")

        episode, steps = self._episodes, check_episode(frames, self.features, self._episodes)
        self._label(subtasks)
        values = {k: checked(k, f, frames[k], steps, episode) for k, f in self.features.items()}
        for name, array in values.items():
            if isinstance(array, np.ndarray):
                self.non_finite += self._non_finite(array, self.features[name], f"episode {episode}, feature {name!r}")

        number = np.arange(steps)
        values |= {
            "timestamp": (number / self.fps).astype(np.float32),
            "frame_index": number,
            "episode_index": np.full(steps, episode),
            "index": self._frames + number,
            "task_index": numbered(task, self._tasks, steps, episode, "tasks"),  # they may change within an episode
        }
        if subtasks is not None:
            values[SUBTASK_INDEX] = numbered(subtasks, self._subtasks, steps, episode, "subtasks")

        file = self._write_rows(values)
        self._pending.append(
            {
                "episode_index": episode,
                "tasks": list(dict.fromkeys([task] if isinstance(task, str) else task)),
                "length": steps,
                "data/chunk_index": file // 1000,
                "data/file_index": file % 1000,
                "dataset_from_index": self._frames,
                "dataset_to_index": self._frames + steps,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **self._copy_videos(values),
                **{f"stats/{k}/{name}": v.tolist() for k, s in self._note(values).items() for name, v in s.items()},
            }
        )
        self._frames += steps
        self._episodes += 1
        if len(self._pending) == PENDING:
            self._write_pending()

        return episode

    def close(self) -> None:
        """Write the metadata and move the data set into place. A second call does nothing."""
        if not self._open:
            return

        try:
            if not self._episodes:
                raise DatasetError(f"{self.root}: no episode was added, so there is nothing to write")
            self._close_files()
            meta = self._partial / "meta"
            write_json(meta / "info.json", self._info().to_json())
            write_json(meta / "stats.json", {k: _listed(s) for k, s in self._global_stats().items()})
            pq.write_table(texts_table("task", self._tasks), meta / "tasks.parquet")
            if self._subtasks:
                pq.write_table(texts_table("subtask", self._subtasks), meta / "subtasks.parquet")
            _move_into_place(self._partial, self.root, self._overwrite)
            self._open = False
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Forget everything written so far."""
        self._open = False
        with contextlib.suppress(OSError, pa.ArrowException):  # a full disk, perhaps; what matters is that it goes
            self._close_files()
        shutil.rmtree(self._partial, ignore_errors=True)

    def __enter__(self) -> "LeRobotWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    @property
    def frames(self) -> int:
        """Frames added so far."""
        return self._frames

    # --- inside ------------------------------------------------------------------------------------------------------

    def _all_features(self) -> list[tuple[str, Feature]]:
        return list((self.features | self._counted).items())

    def _start_columns(self) -> None:
        self._schema = arrow_schema(dict(self._all_features()))
        self._columns: dict[str, list[np.ndarray]] = {k: [] for k, f in self._all_features() if f.is_numeric}
        self._histograms = {k: np.zeros((3, 256), np.int64) for k, f in self._all_features() if f.is_camera}

    def _label(self, subtasks: str | Sequence[str] | None) -> None:
        """The first episode decides whether frames have subtasks. Raises DatasetError for one that differs."""
        check_subtasks(subtasks, self.features, self._episodes, SUBTASK_INDEX)
        labels = {} if subtasks is None else {SUBTASK_INDEX: Feature("int64", (1,))}
        if self._episodes == 0:
            self._counted = BOOKKEEPING | labels
            self._start_columns()

        if self._counted != BOOKKEEPING | labels:
            found = "subtasks" if labels else "no subtasks"
            raise DatasetError(f"episode {self._episodes} has {found}, unlike those before; expected all or none")

    def _non_finite(self, values: np.ndarray, feature: Feature, where: str) -> int:
        """How many values are NaN or infinite. Raises DatasetError naming the first, unless they are to be kept."""
        flat = values.reshape(len(values), -1)
        bad = np.argwhere(~np.isfinite(flat))
        if not len(bad) or self._keep_non_finite:
            return len(bad)

        frame, dim = bad[0].tolist()
        label = feature.names[dim] if feature.names else dim
        raise DatasetError(
            f"{where}: {flat[frame, dim]} at frame {frame}, dimension {label} ({len(bad)} such values); expected "
            "finite numbers"
        )

    def _write_rows(self, values: Mapping[str, Any]) -> int:
        """One row group. Returns the number of the file it went to."""
        # By size as LeRobot does: readers open whole files.
        if self._sink is not None and self._sink.tell() >= self._file_megabytes * 2**20:
            self._close_data_file()
            self._file += 1

        if self._rows is None:
            path = self._partial / DATA_PATH.format(chunk_index=self._file // 1000, file_index=self._file % 1000)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._sink = pa.OSFile(str(path), "wb")
            cameras = {k for k, f in self.features.items() if f.dtype == "image"}
            # Dictionaries pay for columns that repeat; timestamps and index never do.
            coded = [k for k in self._counted if k not in ("timestamp", "index")]
            packing = {f.name: "snappy" for f in self._schema if f.name not in cameras}
            packing |= {f"{k}.{part}": "none" for k in cameras for part in ("bytes", "path")}  # PNG is packed already
            self._rows = pq.ParquetWriter(self._sink, self._schema, compression=packing, use_dictionary=coded)

        arrays = [arrow_array(f, values[k]) for k, f in self._all_features() if f.dtype != "video"]
        self._rows.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

        return self._file

    def _copy_videos(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Each file once, however many episodes it shows; where they are, for the episode table."""
        row: dict[str, Any] = {}
        for key, video in values.items():
            if not isinstance(video, EncodedVideo):
                continue

            copied = self._videos.setdefault(key, {})
            is_new = video.path not in copied
            # Several episodes of one v3.0 file keep sharing it.
            number = copied.setdefault(video.path, len(copied))
            place = {"chunk_index": number // 1000, "file_index": number % 1000}
            if is_new:
                path = self._partial / VIDEO_PATH.format(video_key=key, **place)
                path.parent.mkdir(parents=True, exist_ok=True)
                # Bytes, not frames: coding again would lose quality each time.
                shutil.copyfile(video.path, path)

            times = {"from_timestamp": video.start, "to_timestamp": video.start + video.frames / self.fps}
            row |= {f"videos/{key}/{name}": value for name, value in (place | times).items()}

        return row

    def _write_pending(self) -> None:
        """Episode rows with their statistics are large as Python objects; few are kept."""
        table = pa.Table.from_pylist(self._pending)
        if self._episode_table is None:
            path = self._partial / EPISODES_PATH.format(chunk_index=0, file_index=0)
            path.parent.mkdir(parents=True)
            self._episode_table = pq.ParquetWriter(path, table.schema)

        self._episode_table.write_table(table)
        self._pending.clear()

    def _close_data_file(self) -> None:
        if self._rows is not None and self._sink is not None:
            self._rows.close()
            self._sink.close()
        self._rows = self._sink = None

    def _close_files(self) -> None:
        self._close_data_file()
        if self._pending:
            self._write_pending()
        if self._episode_table is not None:
            self._episode_table.close()
            self._episode_table = None

    def _note(self, values: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
        """This episode's statistics; its values are kept for the global ones."""
        stats = {}
        for name, feature in self._all_features():
            # Pictures are counted, numbers kept: quantiles over all episodes need every value.
            if isinstance(encoded := values[name], Encoded):
                self._histograms[name] += encoded.histogram
                stats[name] = histogram_stats(encoded.histogram) | {"count": np.array([len(encoded)])}
            elif feature.is_numeric:
                self._columns[name].append(values[name])
                stats[name] = numeric_stats(values[name])

        return stats

    def _global_stats(self) -> dict[str, dict[str, np.ndarray]]:
        """True ones: over all values at once, not an envelope of the episodes'."""
        stats = {k: numeric_stats(np.concatenate(parts)) for k, parts in self._columns.items()}
        counted = {k: histogram_stats(c) | {"count": np.array([self._frames])} for k, c in self._histograms.items()}
        return stats | counted

    def _info(self) -> Info:
        return Info(
            codebase_version=VERSION,
            fps=self.fps,
            features=dict(self._all_features()),
            total_episodes=self._episodes,
            total_frames=self._frames,
            total_tasks=len(self._tasks),
            robot_type=self.robot_type,
            video_path=VIDEO_PATH if any(f.dtype == "video" for f in self.features.values()) else None,
            data_files_size_in_mb=self._file_megabytes,
        )


def _listed(stats: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in stats.items()}


def _move_into_place(partial: Path, root: Path, overwrite: bool) -> None:
    """Rename; what was at `root` goes aside first and is removed last."""
    # Never a moment without a complete data set at `root`, or a way back to it.
    aside = None
    if root.exists() and overwrite:
        aside = partial.with_name(partial.name.replace("partial", "replaced"))
        root.rename(aside)
    elif root.exists():
        root.rmdir()  # an empty directory; anything else appeared meanwhile, and must not be lost

    try:
        partial.rename(root)
    except OSError:
        if aside is not None:
            aside.rename(root)
        raise

    if aside is not None:
        shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
