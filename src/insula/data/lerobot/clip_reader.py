"""Cameras stored as video: the frames of an episode, once its clip and its file are known to fit the rows."""

import logging
from collections.abc import Mapping

import numpy as np

from insula.data.lerobot import timing
from insula.data.lerobot.footage import Footage, footage, left_over, miscounted
from insula.data.lerobot.info import Info
from insula.data.lerobot.places import Clip, Clips, Episodes
from insula.data.lerobot.video import VideoReader
from insula.errors import DatasetError

log = logging.getLogger(__name__)


class ClipReader:
    """`clips[camera][episode]` of a data set. Safe to use from several threads."""

    def __init__(self, info: Info, episodes: Episodes, clips: Mapping[str, Clips]):
        self._info = info
        self._episodes = episodes
        self._clips = clips
        self._videos = VideoReader()
        self._sound: set[tuple[str, int]] = set()
        self._warned: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._clips

    def clip(self, key: str, episode: int) -> Clip:
        """Where a camera shows an episode."""
        return self._clips[key][episode]

    def frames(self, key: str, episode: int, timestamps: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """The frames of `steps` [n] of an episode, uint8 [n, h, w, 3]; `timestamps` are of all its rows.

        Raises DatasetError where the file is missing, damaged or does not fit the rows (`insula.data.lerobot.timing`
        and `footage`).
        """
        where = self._where(key, episode)
        clip = self.clip(key, episode)
        # float32 seconds are too coarse once a file is an hour long.
        due = clip.start + timestamps.astype(np.float64)
        self._check(key, episode, due)

        return self._videos.frames(clip.path, due[steps].tolist(), self._info.features[key].size, where)

    def aligned(self, key: str, episode: int, timestamps: np.ndarray) -> Clip:
        """The clip with the start that its frames really have, for whoever writes it down again. Raises DatasetError
        as `frames` does, and where rows at multiples of 1 / fps would show other frames."""
        clip = self.clip(key, episode)
        times = self._videos.times(clip.path, self._where(key, episode))
        due = clip.start + timestamps.astype(np.float64)
        if bad := timing.misfit(times, due, self._end(key, episode), self._info.fps):
            raise self._error(bad, key, episode)

        # v3.0 readers look for frames at start + frame_index / fps, whatever the timestamps here were.
        shown = timing.match(times, due).nearest
        start = float(times[shown[0]])
        # As its new readers will look for them: at start + frame_index / fps, whatever the timestamps were.
        steady = timing.match(times, start + np.arange(len(due)) / self._info.fps)
        if not steady.is_near.all() or not np.array_equal(steady.nearest, shown):
            row = int(np.argmax(~steady.is_near | (steady.nearest != shown)))
            message = f"its frame is not the one at a multiple of 1 / fps ({self._info.fps}); correct fps or timestamps"
            raise self._error(timing.Misfit("video rate", message, row), key, episode)

        return Clip(clip.path, start)

    def _check(self, key: str, episode: int, due: np.ndarray) -> None:
        """Once for each clip. What a single row lacks is said when that row is asked for."""
        if (key, episode) in self._sound:
            return

        fps = self._info.fps
        path = self.clip(key, episode).path
        times = self._videos.times(path, self._where(key, episode))
        # What is wrong with the file as a whole comes first: a single clip can look sound in it.
        shown = self._footage(key, episode)
        if bad := miscounted(shown, times, fps):
            raise self._error(bad, key, episode)

        end = self._end(key, episode)
        if len(times) and timing.is_shifted(times, due, end, fps) and (bad := timing.misfit(times, due, end, fps)):
            raise self._error(bad, key, episode)
        # Once for a camera: where a recorder kept filming, it did so in every episode.
        if (count := left_over(shown, times, fps)) and key not in self._warned:
            self._warned.add(key)
            log.warning(
                "%s, %s: the video has %d frames for %d rows; the first ones are taken, %d are left over (insula data "
                "doctor says which videos are like that)",
                *(self._where(key, episode), path, len(times), len(due), count),
            )

        self._sound.add((key, episode))

    def _footage(self, key: str, episode: int) -> Footage:
        clips = self._clips[key]
        return footage(clips, self._episodes, clips.in_one_file(episode))

    def _end(self, key: str, episode: int) -> float:
        shown = self._footage(key, episode)
        return float(shown.ends()[np.flatnonzero(shown.episodes == episode)[0]])

    def _where(self, key: str, episode: int) -> str:
        return f"{key!r}, episode {self._episodes.number[episode]}"

    def _error(self, bad: timing.Misfit, key: str, episode: int) -> DatasetError:
        path = self.clip(key, episode).path
        return DatasetError(f"{self._where(key, episode)}, frame {bad.row}, {path}: {bad.message}", bad.fault)
