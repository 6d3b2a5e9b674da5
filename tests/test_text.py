"""Text tokenizers: the embedded one, and Gemma/PaliGemma files built here in miniature."""

import copy
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from insula.tokens import text
from insula.tokens.sequence import PALIGEMMA_FAST_LAST_ID
from insula.tokens.text import PALIGEMMA_TOKENS, TextTokenizer, embedded, load_text_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "Task: put the red block in the blue bowl, State: 12 200 34 128 255;\nAction: "
COLORS = ["red", "green", "blue", "yellow", "purple", "orange"]
WORDS = """
    put pick place move push pull open close turn stack take lift grasp release the a in on to of from and or left
    right top bottom front behind block blocks bowl bowls cube cup plate drawer basket gripper robot table camera wrist
    where is are what which how many colours holding nothing something inside visible yes no none
"""


@pytest.fixture(scope="session")
def gemma_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma's kind of file: blanks become ▁, bytes as fallback, no location tokens, a post-processor's BOS left out."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzAST0123456789:,;|<>\n", "▁t", "th", "▁th", "▁the", "re", "red"]
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("▁th", "e"), ("r", "e"), ("re", "d")]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
    )
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    path = tmp_path_factory.mktemp("gemma") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def gemma_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("gemma") / "gemma.model", [])


def train_sentencepiece(path: Path, symbols: list[str]) -> Path:
    if importlib.util.find_spec("sentencepiece") is None:
        pytest.skip("sentencepiece is not installed")
    import sentencepiece

    lines = [f"put the {one} block in the {other} bowl | 0 1 2" for one in COLORS for other in COLORS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=340 + len(symbols),
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=symbols,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def test_the_embedded_tokenizer_has_its_shape() -> None:
    tokenizer = embedded()
    assert isinstance(tokenizer, TextTokenizer)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 2048 + 128
    assert tokenizer.encode("<loc0000><loc0127>") == [2048, 2048 + 127]
    assert len(tokenizer.encode("|")) == 1
    assert tokenizer.encode("") == []


def test_bins_and_robot_words_are_one_token_each() -> None:
    for word in [*map(str, range(256)), *COLORS, *WORDS.split()]:
        assert len(embedded().encode(f" {word}")) == 1, word


def test_a_whole_prompt_is_short() -> None:
    assert len(embedded().encode(PROMPT)) == 16
    assert embedded().decode(embedded().encode(PROMPT)) == PROMPT


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(words: str) -> None:
    assert embedded().decode(embedded().encode(words)) == words


def test_the_script_makes_the_shipped_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import train_text_tokenizer

    train_text_tokenizer.main(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (text.EMBEDDED / "tokenizer.json").read_bytes()


def test_an_instruction_cannot_smuggle_in_control_tokens(gemma_json: Path) -> None:
    for tokenizer in (
        embedded(),
        load_text_tokenizer(gemma_json),
        copy.deepcopy(embedded()),
    ):  # a copy as a worker gets it
        ids = tokenizer.encode("put <eos> the <bos><pad>")
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
        assert tokenizer.decode(ids) == "put <eos> the <bos><pad>"
        assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == tokenizer.decode(ids)


def test_a_gemma_json_gets_paligemmas_tokens(gemma_json: Path, tmp_path: Path) -> None:
    size = Tokenizer.from_file(str(gemma_json)).get_vocab_size()
    tokenizer = load_text_tokenizer(gemma_json)
    assert tokenizer.vocab_size == size + 1024 + 128
    assert tokenizer.encode("<loc0000><loc1023><seg000><seg127>") == [size, size + 1023, size + 1024, size + 1151]
    words = "the red\n<loc0007> ünï"
    assert tokenizer.decode(tokenizer.encode(words)) == words
    tokenizer.save(tmp_path)
    again = load_text_tokenizer(tmp_path)
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode(words) == tokenizer.encode(words)


def test_gemmas_256000_pieces_become_paligemmas_257152(gemma_json: Path, tmp_path: Path) -> None:
    """And π0-FAST's ids lie below the segmentation tokens."""
    raw = json.loads(gemma_json.read_text())
    vocab = raw["model"]["vocab"]
    vocab |= {f"piece{n}": n for n in range(len(vocab), 256_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_text_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 257_152
    assert tokenizer.encode("<loc0000><loc1023><seg000><seg127>") == [256_000, 257_023, 257_024, 257_151]
    assert PALIGEMMA_FAST_LAST_ID == 257_023


def test_a_paligemma_json_keeps_its_own(gemma_json: Path, tmp_path: Path) -> None:
    """Its special <image>, past the vocabulary of the weights, is no text."""
    whole = Tokenizer.from_file(str(gemma_json))
    whole.add_tokens([AddedToken(token, normalized=False) for token in PALIGEMMA_TOKENS])
    size = whole.get_vocab_size()
    whole.add_special_tokens(["<image>"])
    whole.enable_truncation(2)
    whole.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_text_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.vocab_size == size
    assert tokenizer.encode("<seg127>") == [size - 1]
    assert max(tokenizer.encode("<image> the red")) < size
    assert len(tokenizer.encode("the red the red")) > 2


def test_a_sentencepiece_model_gets_paligemmas_tokens(gemma_model: Path, tmp_path: Path) -> None:
    tokenizer = load_text_tokenizer(gemma_model)
    assert isinstance(tokenizer, TextTokenizer)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 340 + 1024 + 128
    assert tokenizer.encode("<loc0000><loc1023><seg000><seg127>") == [340, 340 + 1023, 340 + 1024, 340 + 1151]
    words = "put the <loc0003><loc1000> red block <loc9999> <eos> in ünï\n<seg005>"
    ids = tokenizer.encode(words)
    assert tokenizer.decode(ids) == words
    assert not {0, 1, 2} & set(ids)
    assert len(tokenizer.encode("|")) == 1
    tokenizer.save(tmp_path)
    assert load_text_tokenizer(tmp_path).encode(words) == ids


def test_a_sentencepiece_model_with_locations_keeps_its_own(tmp_path: Path) -> None:
    tokenizer = load_text_tokenizer(train_sentencepiece(tmp_path / "own.model", PALIGEMMA_TOKENS))
    assert tokenizer.vocab_size == 340 + 1024 + 128
    assert len(tokenizer.encode("<loc0500>")) == 1
    assert tokenizer.decode(tokenizer.encode("put <loc0500> in")) == "put <loc0500> in"


def test_sentencepiece_is_asked_for(gemma_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"insula\[gemma\]"):
        load_text_tokenizer(gemma_model)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_malformed_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    if name.endswith(".model"):
        pytest.importorskip("sentencepiece")
    with pytest.raises(FileNotFoundError, match="neither"):
        load_text_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a tokenizer"):
        load_text_tokenizer(tmp_path / name)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name}: not a"):
        load_text_tokenizer(tmp_path / name)


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    Tokenizer(models.BPE({"<pad>": 0, "<bos>": 1}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="<eos>, </s>"):
        load_text_tokenizer(tmp_path)


@pytest.mark.parametrize("wrong", [-1, 2176])
def test_ids_outside_the_vocabulary_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"id {wrong} at position 1 is outside"):
        embedded().decode([5, wrong])
