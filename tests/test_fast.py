"""FAST against the reference (scipy + tokenizers, written out here), and what happens to what cannot be coded."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.fft import dct, idct
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders

from insula.errors import FASTRangeError
from insula.tokens.fast import FAST_PLUS_MIN_TOKEN, FASTCodec

SHAPES = [(1, 1), (6, 7), (16, 8), (50, 14)]


def chunks(kind: str, shape: tuple[int, int], count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.uniform(-1, 1, (count, *shape))
    time = np.linspace(0, 1, shape[0])[:, None]
    phase, speed = rng.uniform(0, 6, (2, count, 1, shape[1]))
    return np.sin(phase + speed * time)


def reference_encode(tokenizer: Tokenizer, config: dict, chunk: np.ndarray) -> list[int]:
    coefficients = np.around(dct(chunk[None], axis=1, norm="ortho") * config["scale"])[0]
    symbols = np.maximum(coefficients.flatten() - config["min_token"], 0).astype(int)
    return tokenizer.encode("".join(map(chr, symbols))).ids


def reference_decode(tokenizer: Tokenizer, config: dict, ids: list[int], shape: tuple[int, int]) -> np.ndarray:
    symbols = np.array(list(map(ord, tokenizer.decode(ids)))) + config["min_token"]
    return idct(symbols.reshape(shape) / config["scale"], axis=0, norm="ortho")


@pytest.fixture(scope="session")
def fast_plus(reference_dir: Path) -> Path:
    path = reference_dir / "fast-plus"
    if not path.is_dir():
        pytest.skip(f"no released FAST+ at {path}")
    return path


@pytest.fixture(scope="module")
def narrow() -> FASTCodec:
    """Fitted on next to nothing: small, slow motions."""
    return FASTCodec.fit(0.05 * chunks("smooth", (6, 7), 50), vocab_size=512)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "smooth"])
def test_released_fast_plus_equals_the_reference(
    fast_plus: Path, kind: str, shape: tuple[int, int], dtype: type
) -> None:
    codec = FASTCodec.load(fast_plus)
    config = json.loads((fast_plus / "processor_config.json").read_text())
    tokenizer = Tokenizer.from_file(str(fast_plus / "tokenizer.json"))
    assert (codec.scale, codec.min_token, codec.vocab_size) == (10, -354, 2048)
    for chunk in chunks(kind, shape, 20).astype(dtype):
        ids = codec.encode(chunk)
        assert ids == reference_encode(tokenizer, config, chunk)
        decoded = codec.decode(ids, *shape)
        assert decoded.invalid is None
        np.testing.assert_array_equal(decoded.actions, reference_decode(tokenizer, config, ids, shape))


def test_low_frequencies_come_first(narrow: FASTCodec) -> None:
    """Constant motions: only the first D symbols differ from zero's."""
    ids = narrow.encode(np.tile([0.3, -0.2], (4, 1)))
    text = b"".join(narrow._token_bytes[i] for i in ids).decode()
    zero = chr(-narrow.min_token)
    assert zero not in text[:2]
    assert text[2:] == zero * 6


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, (6, 7), elements=st.floats(-4, 4)))
def test_any_chunk_survives_to_half_a_quantum(chunk: np.ndarray) -> None:
    codec = FASTCodec.fit(np.zeros((2, 6, 7)), vocab_size=256)
    decoded = codec.decode(codec.encode(chunk), 6, 7)
    quantized = np.around(dct(chunk, axis=0, norm="ortho") * 10) / 10
    np.testing.assert_array_equal(decoded.actions, idct(quantized, axis=0, norm="ortho"))


def test_an_unseen_coefficient_survives_a_narrow_corpus(narrow: FASTCodec) -> None:
    wide = np.random.default_rng(1).uniform(-2, 2, (6, 7))
    quantized = np.around(dct(wide, axis=0, norm="ortho") * 10)
    np.testing.assert_array_equal(
        narrow.decode(narrow.encode(wide), 6, 7).actions, idct(quantized / 10, axis=0, norm="ortho")
    )


def test_an_alphabet_of_seen_symbols_is_caught(tmp_path: Path, narrow: FASTCodec) -> None:
    """Control of the above: the known trap loses unseen coefficients without a word, in a file we would load."""
    trap = Tokenizer(models.BPE())
    trap.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trap.decoder = token_decoders.ByteLevel()
    zero = chr(-FAST_PLUS_MIN_TOKEN)
    trap.train_from_iterator([zero * 42], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    narrow.save(tmp_path)
    trap.save(str(tmp_path / "tokenizer.json"))
    unseen = np.zeros((6, 7))
    unseen[2, 3] = 1.0
    assert len(trap.decode(trap.encode(zero * 41 + chr(-FAST_PLUS_MIN_TOKEN + 200)).ids)) < 42
    codec = FASTCodec.load(tmp_path)
    assert codec.decode(codec.encode(np.zeros((6, 7))), 6, 7).invalid is None
    with pytest.raises(FASTRangeError, match="has no token"):
        codec.encode(unseen)


def test_smooth_motion_takes_fewer_tokens_than_values(narrow: FASTCodec) -> None:
    codec = FASTCodec.fit(chunks("smooth", (16, 7), 400), vocab_size=1024)
    held_out = chunks("smooth", (16, 7), 20, seed=1)
    assert np.mean([len(codec.encode(chunk)) for chunk in held_out]) < 16 * 7 / 2


def test_fit_knows_its_corpus_and_leaves_room() -> None:
    codec = FASTCodec.fit(chunks("smooth", (16, 8), 20), vocab_size=400, scale=5)
    assert (codec.vocab_size, codec.scale, codec.action_dim, codec.time_horizon) == (400, 5.0, 8, 16)
    assert codec.min_token == FAST_PLUS_MIN_TOKEN
    low = FASTCodec.fit(np.full((3, 4, 2), -30.0), vocab_size=300)
    assert low.min_token == 2 * -600
    mixed = FASTCodec.fit([np.zeros((4, 2)), np.zeros((5, 2))], vocab_size=300)
    assert (mixed.action_dim, mixed.time_horizon) == (None, None)


@pytest.mark.parametrize(("value", "match"), [(np.nan, r"\[2, 1\] is nan"), (-np.inf, r"\[2, 1\] is -inf")])
def test_nan_and_infinity_are_refused(narrow: FASTCodec, value: float, match: str) -> None:
    chunk = np.zeros((6, 7))
    chunk[2, 1] = value
    with pytest.raises(ValueError, match=match):
        narrow.encode(chunk)
    with pytest.raises(ValueError, match="chunk 1" + match):
        FASTCodec.fit([np.zeros((6, 7)), chunk])


@pytest.mark.parametrize("wrong", [np.zeros(7), np.zeros((1, 6, 7)), np.zeros((0, 7)), np.full((2, 2), "a")])
def test_wrong_arrays_are_refused(narrow: FASTCodec, wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        narrow.encode(wrong)


@pytest.mark.parametrize("value", [-40.0, 5_600.0, 1e30])
def test_coefficients_without_a_symbol_are_refused(narrow: FASTCodec, value: float) -> None:
    """Below min_token, a surrogate, beyond Unicode: `chr` would crash or the text not survive."""
    assert narrow.encode(np.array([[35.0, 1.0]]))
    with pytest.raises(FASTRangeError, match=r"frequency 0, dimension 1 is .*min_token"):
        narrow.encode(np.array([[0.0, value]]))


@pytest.mark.parametrize(
    ("options", "match"), [({"vocab_size": 255}, "≥ 256"), ({"scale": 0.0}, "> 0"), ({"scale": float("nan")}, "> 0")]
)
def test_unusable_settings_are_refused(options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FASTCodec.fit(np.zeros((1, 2, 2)), **options)
    with pytest.raises(ValueError, match="no chunks"):
        FASTCodec.fit(np.zeros((0, 2, 2)))


def test_what_cannot_be_decoded_is_invalid_never_zeros(narrow: FASTCodec) -> None:
    ids = narrow.encode(chunks("random", (6, 7), 1)[0])  # the last symbol is two ids, two bytes
    assert np.any(narrow.decode(ids, 6, 7).actions)
    half_a_symbol = narrow.tokenizer.token_to_id("Å")  # the byte 0xC5, the first of two
    for wrong, why in [
        (ids[:-2], "coefficients, expected horizon 6 × action_dim 7 = 42"),
        ([*ids, *ids], "84 coefficients"),
        ([], "0 coefficients"),
        ([*ids[:-1], 511_000], "id 511000 at position"),
        ([-1], "id -1 at position 0"),
        ([half_a_symbol] * 42, "whole symbols"),
    ]:
        decoded = narrow.decode(wrong, 6, 7)
        assert decoded.actions is None
        assert decoded.invalid.startswith("because") and why in decoded.invalid
    with pytest.raises(ValueError, match="expected both ≥ 1"):
        narrow.decode(ids, 0, 7)


def test_ids_of_the_vocabulary_that_were_never_learned_are_invalid() -> None:
    codec = FASTCodec.fit(np.zeros((2, 3, 2)), vocab_size=1024)
    assert "outside" in codec.decode([1000], 3, 2).invalid


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-5, 600), max_size=60))
def test_any_ids_decode_or_say_why(ids: list[int]) -> None:
    codec = FASTCodec.fit(np.zeros((2, 3, 2)), vocab_size=512)
    decoded = codec.decode(np.array(ids, np.int64), 3, 2)
    assert (decoded.actions is None) != (decoded.invalid is None)


def test_fit_and_save_are_deterministic_and_load_gives_it_back(tmp_path: Path) -> None:
    data = chunks("smooth", (6, 7), 200)
    FASTCodec.fit(data, vocab_size=512).save(tmp_path / "a")
    FASTCodec.fit(data, vocab_size=512).save(tmp_path / "b")
    loaded = FASTCodec.load(tmp_path / "a")
    loaded.save(tmp_path / "c")
    files = {"processor_config.json", "tokenizer.json"}
    for name in "abc":
        assert {path.name for path in (tmp_path / name).iterdir()} == files
    for file in files:
        first, second, third = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == second == third
    config = json.loads((tmp_path / "a" / "processor_config.json").read_text())
    assert config == {"scale": 10.0, "min_token": -354, "vocab_size": 512, "action_dim": 7, "time_horizon": 6}
    tokenizer = Tokenizer.from_file(str(tmp_path / "a" / "tokenizer.json"))
    assert loaded.encode(data[0]) == reference_encode(tokenizer, config, data[0])


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("processor_config.json", "{", "not JSON"),
        ("processor_config.json", "[]", "expected an object"),
        ("processor_config.json", '{"scale": 10, "vocab_size": 512}', "min_token is None"),
        ("processor_config.json", '{"scale": NaN, "min_token": 0, "vocab_size": 512}', "scale is nan"),
        ("processor_config.json", '{"scale": 10, "min_token": 0, "vocab_size": "512"}', "vocab_size is '512'"),
        ("processor_config.json", '{"scale": 10, "min_token": 0, "vocab_size": 9}', "vocab_size is 9"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer.json", "\x00", "not a tokenizer"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, narrow: FASTCodec, file: str, content: str, match: str) -> None:
    narrow.save(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=match) as error:
        FASTCodec.load(tmp_path)
    assert file in str(error.value)


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path: Path, narrow: FASTCodec) -> None:
    narrow.save(tmp_path)
    Tokenizer(models.WordLevel({"日本": 0}, unk_token="日本")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="byte-level"):
        FASTCodec.load(tmp_path)


def test_missing_files_are_named(tmp_path: Path, narrow: FASTCodec) -> None:
    narrow.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        FASTCodec.load(tmp_path)


def test_truncation_in_a_file_does_not_cut_chunks(tmp_path: Path, narrow: FASTCodec) -> None:
    narrow.save(tmp_path)
    cutting = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cutting.enable_truncation(3)
    cutting.save(str(tmp_path / "tokenizer.json"))
    chunk = chunks("random", (6, 7), 1)[0]
    assert len(narrow.encode(chunk)) > 3
    assert FASTCodec.load(tmp_path).encode(chunk) == narrow.encode(chunk)


@pytest.mark.parametrize("shape", SHAPES)
def test_spans_say_which_coefficients_an_id_carries(shape: tuple[int, int], narrow: FASTCodec) -> None:
    """Changing the coefficients of one id's span changes what that id says, and no id before it."""
    chunk = chunks("smooth", shape, 1)[0]
    ids, written = narrow.encode(chunk), narrow.coefficients(chunk)
    np.testing.assert_array_equal(written, np.around(dct(chunk, axis=0, norm="ortho") * narrow.scale))
    spans = narrow.spans(ids)
    assert spans[0][0] == 0 and spans[-1][1] == written.size
    for (_, stop), (start, _) in itertools.pairwise(spans):
        assert start in (stop, stop - 1)  # a coefficient two ids share belongs to both
    whole = narrow.bytes_of(ids).decode()
    for n, (start, stop) in enumerate(spans):
        said = narrow.bytes_of(ids[n : n + 1]).decode(errors="ignore")
        assert said in whole[start:stop] and len(whole[start:stop]) - len(said) <= 2
    with pytest.raises(ValueError, match="id 99999 is outside"):
        narrow.spans([99999])
