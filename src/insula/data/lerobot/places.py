"""Where the parts of a data set are. Paths are made when asked for: there may be a million of them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from insula.data.lerobot.info import DATA_PATH
from insula.data.lerobot.metadata import shown, visible
from insula.errors import DatasetError


@dataclass(frozen=True)
class Episodes:
    """The episodes: number e of ours is `number[e]` in the data set's files, has the frames start[e] .. stop[e] - 1,
    and the texts tasks[e]."""

    number: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    tasks: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.start)

    @property
    def length(self) -> np.ndarray:
        """Frames of each episode."""
        return self.stop - self.start

    def of_frame(self, frames: np.ndarray) -> np.ndarray:
        """The episode of each frame index."""
        return np.searchsorted(self.stop, frames, side="right")

    def between(self, start: int, stop: int) -> range:
        """The episodes of the frames start .. stop - 1."""
        first, last = self.of_frame(np.array([start, stop - 1])).tolist()
        return range(first, last + 1)

    def locate(self, frame: int) -> tuple[int, int]:
        """(what the files call its episode, step within it) of one frame index, for a person to find it."""
        episode = int(np.searchsorted(self.stop, frame, side="right"))
        return int(self.number[episode]), frame - int(self.start[episode])


@dataclass(frozen=True)
class Span:
    """A data file: the frames start .. stop - 1."""

    path: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Clip:
    """The part of a video file that shows one episode: frame i is at `start + timestamp[i]` seconds."""

    path: Path
    start: float


@dataclass(frozen=True)
class Places(Sequence[Path]):
    """Paths below `root` that a template makes: field by field, one number (or text) for each path."""

    root: Path
    template: str
    values: dict[str, np.ndarray | str]
    size: int

    def __post_init__(self) -> None:
        """Raises DatasetError where the template knows other fields, or leads outside."""
        # Nothing but plain fields: a format string can reach any attribute, or pad to a gigabyte.
        fields = "|".join(map(re.escape, self.values))
        if not re.fullmatch(rf"(?:[^{{}}\0]|\{{(?:{fields})(?::0?\d?d)?\}})+", self.template):
            raise DatasetError(
                f"data set {self.root}: path is {shown(self.template)}, expected something like {DATA_PATH!r} of "
                f"{', '.join(self.values)}"
            )

        texts = {key: value for key, value in self.values.items() if isinstance(value, str)}
        try:
            # Any numbers will do: they cannot make a path leave the folder, only texts and the template can.
            path = self._path(dict.fromkeys(self.values, 0) | texts)
        except ValueError:  # a text with the format of a number
            raise DatasetError(f"data set {self.root}: path {shown(self.template)} cannot be filled in") from None

        inside = path.is_relative_to(self.root) and ".." not in path.relative_to(self.root).parts
        if not inside or "\0" in str(path):  # symbolic links into a cache are fine
            raise DatasetError(f"data set {self.root}: path {self.template!r} leaves the data set", "path outside")

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, number: int) -> Path: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Path]: ...
    def __getitem__(self, number: int | slice) -> Path | Sequence[Path]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(self.size))]
        if not -self.size <= number < self.size:
            raise IndexError(number)
        return self._path({k: v if isinstance(v, str) else int(v[number]) for k, v in self.values.items()})

    def _path(self, values: dict[str, int | str]) -> Path:
        return self.root / self.template.format(**values)

    def taken(self, numbers: np.ndarray) -> "Places":
        """Those of these numbers, in their order."""
        values = {key: value if isinstance(value, str) else value[numbers] for key, value in self.values.items()}
        return Places(self.root, self.template, values, len(numbers))

    def given(self, **values: np.ndarray) -> "Places":
        """The same with other numbers."""
        return Places(self.root, self.template, {**self.values, **values}, self.size)

    def on_disk(self) -> dict[tuple[int, ...], Path]:
        """Every file there is that the template could have named, by the numbers in its name, in their order."""
        fields = [key for key, value in self.values.items() if not isinstance(value, str)]
        given = {key: value for key, value in self.values.items() if isinstance(value, str)}
        # The template as a pattern, so that what is on disk can be asked for its numbers.
        pattern, names = "", list[str]()
        for text, field in re.findall(r"([^{}]*)(?:\{(\w+)[^{}]*\})?", self.template):
            pattern += re.escape(text)
            if field in given:
                pattern += re.escape(given[field])
            elif field in names:
                # A field that comes twice must have one value.
                pattern += rf"(?P={field})"
            elif field:
                pattern += rf"(?P<{field}>\d{{1,18}})"
                names.append(field)

        found = {}
        # No walk through the whole data set: from the part of the path without fields, as deep as it goes.
        fixed = self.template.split("{")[0].rpartition("/")[0]
        for path in _below(self.root / fixed, self.template.count("/") - (fixed.count("/") + bool(fixed)) + 1):
            if match := re.fullmatch(pattern, path.relative_to(self.root).as_posix()):
                found[tuple(int(match[name]) if name in names else 0 for name in fields)] = path

        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Spans(Sequence[Span]):
    """The data files, in the order of their frames."""

    places: Places
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    @overload
    def __getitem__(self, number: int) -> Span: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Span]: ...
    def __getitem__(self, number: int | slice) -> Span | Sequence[Span]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        return Span(self.places[number], int(self.start[number]), int(self.stop[number]))


@dataclass(frozen=True)
class Clips(Sequence[Clip]):
    """A camera's part of a video file for each episode, in seconds. `stop` is NaN where no table says it."""

    places: Places
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    @overload
    def __getitem__(self, number: int) -> Clip: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Clip]: ...
    def __getitem__(self, number: int | slice) -> Clip | Sequence[Clip]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        return Clip(self.places[number], float(self.start[number]))

    def taken(self, episodes: np.ndarray) -> "Clips":
        """Those of these episodes, in their order."""
        return Clips(self.places.taken(episodes), self.start[episodes], self.stop[episodes])

    def in_one_file(self, episode: int) -> np.ndarray:
        """The numbers of all episodes in the same file as `episode`, by their starts."""
        file, order, begins = self._by_file
        number = int(file[episode])
        return order[begins[number] : begins[number + 1]]

    def files(self) -> Iterator[np.ndarray]:
        """`in_one_file` of each file, in the order of their first episodes."""
        file, _, begins = self._by_file
        # The order of the episodes, rather than of the files' numbers: findings read alike.
        first = np.full(len(begins) - 1, len(file))
        np.minimum.at(first, file, np.arange(len(file)))
        for episode in np.sort(first).tolist():
            yield self.in_one_file(episode)

    @cached_property
    def _by_file(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The file of each episode, all episodes file by file, and where each file begins among them."""
        fields = [values for values in self.places.values.values() if not isinstance(values, str)]
        _, file = np.unique(np.stack(fields), axis=1, return_inverse=True)
        file = file.reshape(-1)
        # By file, and within it by start.
        order = np.lexsort((self.start, file))
        return file, order, np.searchsorted(file[order], np.arange(int(file.max()) + 2))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for path in visible(folder):
        if depth == 1:
            yield path
        elif path.is_dir():
            yield from _below(path, depth - 1)
