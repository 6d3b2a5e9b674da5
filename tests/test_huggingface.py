"""Our tokenizers written for `transformers`: the same ids there, and nothing fetched."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_text import train_sentencepiece
from tokenizers import Tokenizer

from insula.errors import InputError
from insula.tokens.huggingface import save_huggingface
from insula.tokens.text import PALIGEMMA_TOKENS, TextTokenizer, embedded, load_text_tokenizer

PIECES = ["put", "the", "red", " block", "  bowl", "\n", "\n\n", "ü", "日本", "<eos>", "<loc0003>", "<seg127>", "0 1 2"]
PIECES += ["|", " 128", " ", "▁", "\t", "<bos>", "�", "a\u0301", "<unk>", "</s>"]
SYMBOLS = {"bare": [], "with blanks": ["\n", "\n\n", "▁▁", "▁▁▁", "<unused0>"], "with locations": PALIGEMMA_TOKENS}


def texts(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(PIECES, rng.integers(1, 20))) for _ in range(count)]


@pytest.fixture(params=["embedded", *SYMBOLS])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TextTokenizer:
    if request.param == "embedded":
        return embedded()
    return load_text_tokenizer(train_sentencepiece(tmp_path / "text.model", SYMBOLS[request.param]))


def test_the_same_ids_come_out(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_huggingface(tokenizer, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    for text in texts(500):
        assert theirs(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)], text

    padded = theirs("put", max_length=6, padding="max_length", truncation=True, padding_side="right")
    assert padded["input_ids"][-2:] == [tokenizer.pad_id] * 2 and padded["attention_mask"][-2:] == [0, 0]


def test_what_is_written_is_read_back(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    save_huggingface(tokenizer, tmp_path)
    again = load_text_tokenizer(tmp_path)
    assert [again.encode(text) for text in texts(200)] == [tokenizer.encode(text) for text in texts(200)]
    assert (again.bos_id, again.eos_id, again.pad_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)


def test_a_tokenizer_that_would_become_another_is_refused(tmp_path: Path) -> None:
    """One that puts a blank before every text, as many SentencePiece models do."""
    pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    path = train_sentencepiece(tmp_path / "text.model", [])
    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    proto.normalizer_spec.add_dummy_prefix = True
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"cannot be written as a tokenizer\.json: 'Task: put the red"):
        save_huggingface(load_text_tokenizer(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()

    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="is no BPE"):
        save_huggingface(load_text_tokenizer(path), tmp_path / "out")


@pytest.mark.usefixtures("unchecked")
def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    class Other:
        bos_id = 0

    with pytest.raises(InputError, match="Other cannot be written"):
        save_huggingface(Other(), tmp_path)  # type: ignore[arg-type]


def test_bos_comes_once_whatever_the_file_said(tmp_path: Path) -> None:
    save_huggingface(embedded(), tmp_path / "first")  # puts BOS in front by itself
    again = load_text_tokenizer(tmp_path / "first")
    save_huggingface(again, tmp_path / "second")
    ids = Tokenizer.from_file(str(tmp_path / "second" / "tokenizer.json")).encode("put").ids
    assert ids == [embedded().bos_id, *embedded().encode("put")]
    assert json.loads((tmp_path / "second" / "tokenizer_config.json").read_text())["bos_token"] == "<bos>"
