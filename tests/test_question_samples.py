"""Images with questions: read from JSON lines or parquet, every malformed row named."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from insula.data.mapping import QuestionData
from insula.data.observe import Sizes
from insula.data.questions import QuestionSamples, pictures
from insula.errors import DatasetError
from insula.model.config import TINY
from insula.pretrain.run import question_tokenizer
from insula.tokens.sequence import FASTTokenizer

SIZES = Sizes(6, 5, 7, {"front": (16, 16), "wrist": (16, 16)})


@pytest.fixture(scope="module")
def tokenizer() -> FASTTokenizer:
    return question_tokenizer(TINY)


def png(grey: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write(folder: Path, *rows: Any) -> QuestionData:
    folder.mkdir(exist_ok=True)
    for grey in (10, 20):
        (folder / f"{grey}.png").write_bytes(png(grey))
    text = "\n\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    (folder / "questions.jsonl").write_text(text + "\n")
    return QuestionData(folder, "front")


ASKED = {"question": "what is this", "answer": "a block"}


def test_a_row_becomes_tokens_and_pictures(tmp_path: Path, tokenizer: FASTTokenizer) -> None:
    data = write(tmp_path / "q", ASKED | {"image": "10.png"}, ASKED | {"images": {"wrist": "20.png"}}, ASKED)
    assert len(set(pictures(data))) == 3
    batch = QuestionSamples(data, tokenizer, SIZES).batch([0, 1, 2])
    seen = batch.observation
    assert seen.image_mask["front"].tolist() == [True, False, False]
    assert seen.image_mask["wrist"].tolist() == [False, True, False]
    assert (seen.images["front"][0] == 10).all() and (seen.images["wrist"][1] == 20).all()
    assert not seen.images["front"][1:].any() and not seen.images["wrist"][[0, 2]].any()
    expected = tokenizer.question(ASKED["question"], ASKED["answer"])
    for n in range(3):
        np.testing.assert_array_equal(seen.tokens[n], expected.tokens)
        np.testing.assert_array_equal(batch.loss_mask[n], expected.loss_mask)
    assert not batch.action_mask.any() and not seen.state.any()
    assert tokenizer.text_from(seen.tokens[0][batch.loss_mask[0]]) == "a block"


def test_questions_about_one_picture_belong_together(tmp_path: Path) -> None:
    images = [{"front": "10.png", "wrist": "20.png"}, {"wrist": "20.png", "front": "10.png"}]
    rows = [ASKED | {"image": "10.png"}, ASKED | {"images": images[0]}, ASKED | {"image": "10.png"}]
    found = pictures(write(tmp_path / "q", *rows, ASKED | {"images": images[1]}, ASKED, ASKED, "{not json"))
    assert found.tolist() == [0, 1, 0, 1, 2, 3, 4]


def test_one_picture_is_one_whichever_way_it_is_written(tmp_path: Path) -> None:
    """Else a picture that was trained on could be held out as well."""
    data = write(tmp_path / "q", ASKED | {"image": "10.png"}, ASKED | {"images": {"front": "10.png"}})
    assert data.camera == "front" and pictures(data).tolist() == [0, 0]
    assert pictures(dataclasses.replace(data, camera="wrist")).tolist() == [0, 1]


def test_some_rows_only(tmp_path: Path, tokenizer: FASTTokenizer) -> None:
    data = write(tmp_path / "q", *(ASKED | {"answer": str(n)} for n in range(5)))
    some = QuestionSamples(data, tokenizer, SIZES, rows=[4, 1])
    assert len(some) == 2 and some.where(0).endswith("row 5")
    assert tokenizer.text_from(some.batch([1]).observation.tokens[0][some.batch([1]).loss_mask[0]]) == "1"


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_parquet(tmp_path: Path, tokenizer: FASTTokenizer, kind: str) -> None:
    (tmp_path / "10.png").write_bytes(png(10))
    image: Any = {"bytes": png(10), "struct": {"bytes": png(10), "path": None}, "path": "10.png"}[kind]
    rows = [ASKED | {"image": image}, ASKED | {"image": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mine.parquet")
    batch = QuestionSamples(QuestionData(tmp_path / "mine.parquet", "front"), tokenizer, SIZES).batch([0, 1])
    assert batch.observation.image_mask["front"].tolist() == [True, False]
    assert (batch.observation.images["front"][0] == 10).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", r"row 2: not JSON"),
        ([1], r"row 2: got \[1\], expected an object with question and answer"),
        ({"question": "what"}, "expected an object with question and answer"),
        (ASKED | {"answer": ""}, "the answer is empty"),
        (ASKED | {"image": 3}, "image is 3, expected a path"),
        (ASKED | {"images": ["10.png"]}, "images is .*expected an object"),
        (ASKED | {"image": "../10.png"}, "leaves the folder"),
        (ASKED | {"image": "/etc/hostname"}, "leaves the folder"),
        (ASKED | {"image": "99.png"}, "99.png cannot be read .No such file"),
        (ASKED | {"image": "questions.jsonl"}, "unreadable image"),
        (ASKED | {"images": {"fornt": "10.png"}}, r"no camera 'fornt' \(did you mean 'front'"),
        (ASKED | {"question": "why " * 400}, "the prompt takes"),
        (ASKED | {"answer": "so " * 400}, "the answer takes"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, tokenizer: FASTTokenizer, row: Any, message: str) -> None:
    data = write(tmp_path / "q", ASKED, row)
    samples = QuestionSamples(data, tokenizer, SIZES)
    samples.batch([0])
    with pytest.raises(DatasetError, match=message):
        samples.batch([1])


def test_an_image_without_a_camera_and_files_that_are_none(tmp_path: Path, tokenizer: FASTTokenizer) -> None:
    data = dataclasses.replace(write(tmp_path / "q", ASKED | {"image": "10.png"}), camera=None)
    with pytest.raises(DatasetError, match='which camera is "image"'):
        QuestionSamples(data, tokenizer, SIZES).batch([0])
    with pytest.raises(DatasetError, match=r"no questions.jsonl or questions.parquet"):
        QuestionSamples(QuestionData(tmp_path), tokenizer, SIZES)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DatasetError, match=r"bad.parquet: cannot be read"):
        QuestionSamples(QuestionData(tmp_path / "bad.parquet"), tokenizer, SIZES)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DatasetError, match=r"no questions"):
        QuestionSamples(QuestionData(tmp_path / "empty.jsonl"), tokenizer, SIZES)
