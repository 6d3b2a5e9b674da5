"""Images with questions and answers: samples that teach the backbone and have no action.

A .jsonl or .parquet file (in a folder: questions.jsonl or questions.parquet), a row per question:

    {"image": "images/000017.png", "question": "where is the red block", "answer": "<loc0031> <loc0088>"}
    {"images": {"front": "17f.png", "wrist": "17w.png"}, "question": "is it holding something", "answer": "yes"}

`image` is shown as the mapping's `camera`, `images` as the cameras it names: paths below the file's folder, or in
parquet also {bytes, path}. Without either the sample is text alone.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from insula.batch import Batch, Observation
from insula.data.images import decode_any, resize_with_pad
from insula.data.mapping import QuestionData
from insula.data.observe import Sizes
from insula.data.texts import is_blank, is_missing
from insula.data.token_table import TokenTable, ahead
from insula.errors import DatasetError, TokenBudgetError, did_you_mean
from insula.tokens.sequence import FASTTokenizer

# Bytes of resized pictures that are kept: several questions are about one picture.
IMAGE_CACHE = 2**30
QUESTION_FILES = ("questions.jsonl", "questions.parquet")


@dataclass(frozen=True)
class Question:
    """`images`: a path or the bytes of an image file for each camera it shows."""

    question: str
    answer: str
    images: dict[str, Path | bytes]


class QuestionSamples:
    """N questions, `batch(rows)` makes a Batch of them: no state, every action step padding, so the flow loss is 0.

    Raises DatasetError naming file and row where a row is malformed or does not fit.
    """

    def __init__(
        self,
        data: QuestionData,
        tokenizer: FASTTokenizer,
        sizes: Sizes,
        rows: Iterable[SupportsIndex] | None = None,
    ):
        self.data = data
        self.tokenizer = tokenizer
        self.sizes = sizes

        # What another process is sent instead of every token and picture. A list, since an iterator is spent here.
        rows = None if rows is None else list(rows)
        self._rebuild = functools.partial(QuestionSamples, data, tokenizer, sizes, rows)

        self.path = _file(data.path)
        self._all = _rows(self.path)
        chosen = range(len(self._all)) if rows is None else rows
        self.numbers = np.array(chosen, np.int64)
        self.table = TokenTable(len(self.numbers), tokenizer.max_token_len)

        # As `Samples` counts them; questions are refused when they do not fit, so both stay 0.
        self.dropped = self.quarantined = 0

        self._decoded: dict[tuple[str, Path | bytes], np.ndarray] = {}
        self._cache_left = IMAGE_CACHE

    def __len__(self) -> int:
        return len(self.numbers)

    def __reduce__(self) -> tuple:
        return self._rebuild, ()

    def batch(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The samples `rows` [B] as one Batch of numpy arrays."""
        rows, sizes = np.asarray(rows, np.int64), self.sizes
        count = len(rows)

        # All cameras of the model, in every batch: rows of robots and of questions lie in one array.
        images = {name: np.zeros((count, *size, 3), np.uint8) for name, size in sizes.cameras.items()}
        seen = {name: np.zeros(count, bool) for name in sizes.cameras}
        for n, row in enumerate(rows.tolist()):
            for camera, source in self._question(row).images.items():
                images[camera][n], seen[camera][n] = self._image(row, camera, source), True

        tokens = self.tokens(rows)

        return Batch(
            Observation(
                images,
                seen,
                np.zeros((count, sizes.state_dim), np.float32),
                tokens["tokens"],
                tokens["token_mask"],
            ),
            # No action: padding at every step and in every dimension, so that the flow loss has nothing to count.
            actions=np.zeros((count, sizes.horizon, sizes.action_dim), np.float32),
            action_is_pad=np.ones((count, sizes.horizon), bool),
            action_dim_mask=np.zeros((count, sizes.action_dim), bool),
            ar_mask=tokens["ar_mask"],
            loss_mask=tokens["loss_mask"],
        )

    def tokens(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """tokens, token_mask, ar_mask, loss_mask, each [B, L]."""
        return self.table.take(rows, self._tokenize)

    def tokenize_ahead(self) -> None:
        """All of them, or many spread evenly: what does not fit is an error now."""
        self.tokens(ahead(len(self)))

    def _tokenize(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            asked = self._question(row)
            try:
                self.table.put(row, self.tokenizer.question(asked.question, asked.answer))
            except TokenBudgetError as e:
                raise DatasetError(f"{self.where(row)} ({asked.question!r}): {e}") from e

    def where(self, row: int) -> str:
        """Which file and row a sample is, for a person: counted from 1, blank lines left out."""
        return f"{self.path}, row {self.numbers[row] + 1}"

    def _question(self, row: int) -> Question:
        raw = self._all[int(self.numbers[row])]
        if isinstance(raw, str):
            try:
                raw = json.loads(raw)
            except json.JSONDecodeError as e:
                raise DatasetError(f"{self.where(row)}: not JSON ({e})") from None

        if not isinstance(raw, dict) or not all(isinstance(raw.get(key), str) for key in ("question", "answer")):
            raise DatasetError(f"{self.where(row)}: got {str(raw)[:80]}, expected an object with question and answer")

        # An empty question is no fault, as of a caption nothing was asked; an empty answer would score EOS alone.
        if is_blank(raw["answer"]):
            raise DatasetError(f"{self.where(row)}: the answer is empty, so there is nothing to learn; leave it out")
        if is_missing(raw["question"]):
            raise DatasetError(f"{self.where(row)}: the question is {raw['question']!r}, a missing text; leave it out")

        return Question(raw["question"], raw["answer"], self._sources(row, raw))

    def _sources(self, row: int, raw: dict[str, Any]) -> dict[str, Path | bytes]:
        given = raw.get("images") or {}
        if not isinstance(given, dict):
            raise DatasetError(f"{self.where(row)}: images is {given!r}, expected an object of cameras and paths")

        # Parquet gives every row all cameras of the column, null where it has none.
        named = {camera: image for camera, image in given.items() if image is not None}
        if raw.get("image") is not None:
            if self.data.camera is None:
                raise DatasetError(f'{self.where(row)}: which camera is "image"? set camera = "..." in the mapping')

            named[self.data.camera] = raw["image"]

        for camera in named:
            if camera not in self.sizes.cameras:
                known = ", ".join(self.sizes.cameras)
                hint = did_you_mean(camera, self.sizes.cameras)
                raise DatasetError(f"{self.where(row)}: the model has no camera {camera!r}{hint}; it has {known}")

        return {camera: self._source(row, image) for camera, image in named.items()}

    def _source(self, row: int, image: Any) -> Path | bytes:
        if isinstance(image, dict):
            # Hugging Face writes {bytes, path}, with one of them null.
            image = image.get("bytes") or image.get("path")

        if isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise DatasetError(f"{self.where(row)}: image is {image!r}, expected a path below {self.path.parent}")

        # A question file from elsewhere must not read what lies beside it on this disk.
        if Path(image).is_absolute() or ".." in Path(image).parts:
            raise DatasetError(f"{self.where(row)}: image {image!r} leaves the folder {self.path.parent}")

        return self.path.parent / image

    def _image(self, row: int, camera: str, source: Path | bytes) -> np.ndarray:
        key = (camera, source)
        if key not in self._decoded:
            image = self._decode(self.where(row), self.sizes.cameras[camera], source)

            # When full, nothing is evicted: a row comes back an epoch later, by when its picture would be gone again.
            if self._cache_left < image.nbytes:
                return image

            self._cache_left -= image.nbytes
            self._decoded[key] = image

        return self._decoded[key]

    @staticmethod
    def _decode(where: str, size: tuple[int, int], source: Path | bytes) -> np.ndarray:
        if isinstance(source, Path):
            try:
                source = source.read_bytes()
            except OSError as e:
                raise DatasetError(f"{where}: image {source!s} cannot be read ({e.strerror}); restore it") from None

        return resize_with_pad(decode_any(source, where), size)


def pictures(data: QuestionData) -> np.ndarray:
    """Which picture each question is about, int64 [N]: questions about one are held out together. Pictures inside a
    parquet file, and texts alone, count as different."""
    rows = _rows(_file(data.path))
    numbers: dict[Any, int] = {}
    found = np.empty(len(rows), np.int64)
    for n in range(len(rows)):
        # A row number is no picture's text, so rows without a picture stay apart.
        found[n] = numbers.setdefault(_picture(rows[n], data) or n, len(numbers))

    return found


def _picture(row: Any, data: QuestionData) -> str | None:
    try:
        raw = json.loads(row) if isinstance(row, str) else row
        shown = raw.get("images") or {data.camera: raw.get("image")}  # one picture, whichever way it is written
        return json.dumps(shown, sort_keys=True) if any(shown.values()) else None
    except (TypeError, ValueError, AttributeError):  # bytes; or malformed, which is said when the row is read
        return None


def _file(path: Path) -> Path:
    if path.is_file():
        return path

    found = [path / name for name in QUESTION_FILES if (path / name).is_file()]
    if not found:
        raise DatasetError(f"questions: no {' or '.join(QUESTION_FILES)} in {path}, and it is no such file itself")

    return found[0]


# Split, training and held-out rows all ask for the same file.
@functools.lru_cache(maxsize=4)
def _rows(path: Path) -> "list[str] | _Table":
    """JSON lines, parsed when asked for, or the rows of a parquet file."""
    try:
        if path.suffix == ".parquet":
            rows: list[str] | _Table = _Table(pq.read_table(path, memory_map=True))
        else:
            # Parsed when drawn: a million dicts would take several times the memory of their lines.
            rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, pa.ArrowException) as e:
        because = str(e).splitlines()[0]
        raise DatasetError(f"{path}: cannot be read ({because}); expected JSON lines or parquet") from None

    if not len(rows):
        raise DatasetError(f"{path}: no questions; leave the entry out of the mapping")

    return rows


class _Table:
    """Rows of a parquet file as dicts, each made when asked for."""

    def __init__(self, table: pa.Table):
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self._table.slice(row, 1).to_pylist()[0]
