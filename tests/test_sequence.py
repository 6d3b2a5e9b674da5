"""Sequences and their masks: what is seen, what is causal, what is scored, and what is refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from insula.errors import TokenBudgetError, did_you_mean
from insula.tokens.dialects import DIALECTS, dialect
from insula.tokens.fast import FASTCodec
from insula.tokens.sequence import FASTTokenizer, Tokenized, state_bins
from insula.tokens.text import JSONText, embedded

PROMPT = "put the red block in the blue bowl"
STATE = np.array([-1.0, 0.0, 0.5, 0.999, 1.0], np.float32)


def smooth(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 3, (2, count, 1, 7))
    return np.sin(phase + speed * np.linspace(0, 1, 6)[:, None]).astype(np.float32)


@pytest.fixture(scope="module")
def codec() -> FASTCodec:
    return FASTCodec.fit(smooth(300), vocab_size=1024)


@pytest.fixture(scope="module")
def tokenizer(codec: FASTCodec) -> FASTTokenizer:
    return FASTTokenizer(embedded(), codec, max_token_len=80, max_prompt_len=32)


@pytest.fixture(scope="module")
def pi0_fast(codec: FASTCodec) -> FASTTokenizer:
    return FASTTokenizer(embedded(), codec, dialect="pi0_fast", max_token_len=80, max_prompt_len=32)


def columns(sample: Tokenized, mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def test_a_training_sequence_column_by_column(tokenizer: FASTTokenizer, codec: FASTCodec) -> None:
    text, chunk = tokenizer.text, smooth(1, seed=1)[0]
    prefix = [text.bos_id, *text.encode(f"Task: {PROMPT}, State: 0 128 192 255 255;\nAction: ")]
    fast = [tokenizer.fast_last_id - i for i in codec.encode(chunk)]
    expected = [*prefix, *fast, tokenizer.stop_id, text.eos_id]
    sample = tokenizer.tokenize(PROMPT, STATE, chunk)

    assert sample.tokens.dtype == np.int32
    assert {mask.dtype for mask in (sample.token_mask, sample.ar_mask, sample.loss_mask)} == {np.dtype(bool)}
    assert {getattr(sample, field.name).shape for field in dataclasses.fields(sample)} == {(80,)}
    assert sample.tokens.tolist() == expected + [text.pad_id] * (80 - len(expected))
    assert columns(sample, sample.token_mask) == list(range(len(expected)))
    assert columns(sample, sample.ar_mask) == list(range(len(prefix), len(expected)))
    assert columns(sample, sample.loss_mask) == list(range(len(prefix), len(expected) - 1))
    assert len(fast) > 3


def test_scoring_eos_is_a_setting(tokenizer: FASTTokenizer, codec: FASTCodec) -> None:
    scoring = FASTTokenizer(embedded(), codec, max_token_len=80, score_eos=True)
    without, with_eos = (t.tokenize(PROMPT, STATE, smooth(1)[0]) for t in (tokenizer, scoring))
    assert columns(with_eos, with_eos.loss_mask) == columns(with_eos, with_eos.ar_mask)
    assert with_eos.loss_mask.sum() == without.loss_mask.sum() + 1


@pytest.mark.parametrize("state", [STATE, None])
@pytest.mark.parametrize("name", list(DIALECTS))
def test_serving_sees_exactly_the_training_prefix(codec: FASTCodec, name: str, state: np.ndarray | None) -> None:
    tokenizer = FASTTokenizer(embedded(), codec, dialect=name, max_token_len=80)
    for chunk in smooth(5, seed=2):
        training, serving = tokenizer.tokenize(PROMPT, state, chunk), tokenizer.tokenize(PROMPT, state)
        prefix = training.token_mask & ~training.ar_mask
        np.testing.assert_array_equal(serving.token_mask, prefix)
        np.testing.assert_array_equal(serving.tokens[prefix], training.tokens[prefix])
        assert training.ar_mask.any() and not serving.ar_mask.any()
        assert training.loss_mask.any() and not serving.loss_mask.any()
        assert (serving.tokens[~serving.token_mask] == tokenizer.text.pad_id).all()


@pytest.mark.parametrize(
    ("name", "state", "written"),
    [
        ("pi05", [0, 255], "Task: Put the  Red block , State: 0 255;\nAction: "),
        ("pi05", None, "Task: Put the  Red block ;\nAction: "),
        ("pi0", None, "Put the  Red block \n"),
        ("pi0_fast", [0, 255], "Task:  put the\n red block, State: 0 255;\n"),
        ("pi0_fast", None, "Task:  put the\n red block;\n"),
    ],
)
def test_dialects_write_what_their_owners_do(name: str, state: list[int] | None, written: str) -> None:
    """pi05 and pi0: strip, then "_" and newline become spaces; pi0_fast: lower case, strip, then "_"."""
    task = "\n_Put the\n Red_block " if name == "pi0_fast" else " Put the\n Red_block_\n"
    assert dialect(name).write(task, state) == written


@pytest.mark.parametrize("name", DIALECTS)
def test_the_state_is_found_where_it_was_written(name: str) -> None:
    bins = [0, 127, 255]
    for task in (PROMPT, "a, State: 1 2;\nAction: b", ""):
        written = dialect(name).write(task, bins)
        span = dialect(name).state_span(written)
        assert span is not None and written[slice(*span)] == "0 127 255"
        assert dialect(name).state_span(dialect(name).write(task, None)) is None or "State: 1 2" in task


def test_braces_in_an_instruction_are_text() -> None:
    assert dialect("pi05").write("put {state} {0}", [1]) == "Task: put {state} {0}, State: 1;\nAction: "


def test_pi0_fast_generates_its_head_and_scores_all_of_the_causal_part(pi0_fast: FASTTokenizer) -> None:
    sample, text = pi0_fast.tokenize(PROMPT, STATE, smooth(1)[0]), pi0_fast.text
    causal = sample.tokens[sample.ar_mask].tolist()
    head = text.encode("Action: ")
    assert causal[: len(head)] == head
    assert causal[-2:] == [pi0_fast.stop_id, text.eos_id]
    np.testing.assert_array_equal(sample.loss_mask, sample.ar_mask)


def test_unknown_names_get_the_nearest(codec: FASTCodec) -> None:
    with pytest.raises(ValueError, match=r"no prompt dialect 'pi0fast' \(did you mean 'pi0_fast'\?\); known: pi05"):
        FASTTokenizer(embedded(), codec, dialect="pi0fast", max_token_len=80)
    assert did_you_mean("nothing like it", DIALECTS) == ""


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_state_bins_are_the_reference_clipped(state: list[float]) -> None:
    reference = np.digitize(state, np.linspace(-1, 1, 257)[:-1]) - 1
    assert state_bins(np.array(state)) == np.clip(reference, 0, 255).tolist()


def test_state_bins_at_the_edges() -> None:
    assert state_bins(np.array([-9, -1, -1 + 1 / 128, 0, 1 - 1e-6, 1, 9])) == [0, 0, 1, 128, 255, 255, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_bad_values_are_refused_by_name(tokenizer: FASTTokenizer, value: float) -> None:
    state, chunk = STATE.copy(), smooth(1)[0]
    state[3] = value
    with pytest.raises(ValueError, match=rf"state\[3\] is {value}"):
        tokenizer.tokenize(PROMPT, state)
    chunk[2, 5] = value
    with pytest.raises(ValueError, match=rf"actions\[2, 5\] is {value}"):
        tokenizer.tokenize(PROMPT, STATE, chunk)
    with pytest.raises(ValueError, match=r"expected real numbers \[S\]"):
        tokenizer.tokenize(PROMPT, STATE[None])


def test_what_is_too_long_is_an_error_with_length_and_limit(codec: FASTCodec) -> None:
    chunk = smooth(1, seed=3)[0]
    whole = FASTTokenizer(embedded(), codec, max_token_len=80).tokenize(PROMPT, STATE, chunk)
    total, causal = int(whole.token_mask.sum()), int(whole.ar_mask.sum())
    prompt = total - causal

    exact = FASTTokenizer(embedded(), codec, max_token_len=total, max_prompt_len=prompt).tokenize(PROMPT, STATE, chunk)
    assert exact.token_mask.all()
    for limits, length, limit in [
        ({"max_token_len": total - 1}, total, total - 1),
        ({"max_token_len": 80, "max_prompt_len": prompt - 1}, prompt, prompt - 1),
        ({"max_token_len": total + 9, "max_prompt_len": prompt + 10}, causal, causal - 1),
        ({"max_token_len": 5}, prompt, 5),
    ]:
        with pytest.raises(TokenBudgetError, match=f"takes {length} tokens, the limit is {limit}") as error:
            FASTTokenizer(embedded(), codec, **limits).tokenize(PROMPT, STATE, chunk)
        assert (error.value.length, error.value.limit) == (length, limit)


def test_a_question_scores_its_answer_and_eos(tokenizer: FASTTokenizer) -> None:
    text = tokenizer.text
    asked, answered = tokenizer.question("where is it"), tokenizer.question("where is it", "<loc0003><loc0100>")
    prefix = [text.bos_id, *text.encode("where is it\n")]
    answer = [text.encode("<loc0003>")[0], text.encode("<loc0100>")[0], text.eos_id]
    assert asked.tokens[asked.token_mask].tolist() == prefix
    assert not asked.ar_mask.any() and not asked.loss_mask.any()
    assert answered.tokens[answered.token_mask].tolist() == prefix + answer
    assert columns(answered, answered.ar_mask) == columns(answered, answered.loss_mask) == [5, 6, 7]
    with pytest.raises(TokenBudgetError, match=r"prompt takes 4[0-9] tokens, the limit is 32"):
        tokenizer.question("why " * 40)
    with pytest.raises(TokenBudgetError, match="answer takes 61 tokens, the limit is 48"):
        tokenizer.question("why", " so" * 60)


@pytest.mark.parametrize("name", list(DIALECTS))
def test_generated_ids_become_the_chunk(codec: FASTCodec, name: str) -> None:
    tokenizer = FASTTokenizer(embedded(), codec, dialect=name, max_token_len=80)
    for chunk in smooth(5, seed=4):
        sample = tokenizer.tokenize(PROMPT, STATE, chunk)
        direct = codec.decode(codec.encode(chunk), 6, 7).actions
        decoded = tokenizer.actions_from(sample.tokens[sample.ar_mask], 6, 7)
        np.testing.assert_array_equal(decoded.actions, direct)
        assert np.abs(direct).max() > 0.1


def test_generated_ids_that_are_no_chunk_say_why(tokenizer: FASTTokenizer, codec: FASTCodec) -> None:
    ids = [tokenizer.fast_last_id - i for i in codec.encode(smooth(1)[0])]
    stop, eos = tokenizer.stop_id, tokenizer.text.eos_id
    assert tokenizer.actions_from([*ids, stop, eos, 0, 0], 6, 7).invalid is None
    for wrong, why in [
        (ids, "no '|' ends the action"),
        ([], "no '|'"),
        ([stop], "0 coefficients"),
        ([*ids, 5, stop], f"token 5 at position {len(ids)} is no FAST token"),
        ([*ids, eos, stop], "no FAST token"),
        ([tokenizer.fast_last_id + 1, stop], "no FAST token"),
        ([*ids, *ids, stop], "84 coefficients"),
    ]:
        decoded = tokenizer.actions_from(wrong, 6, 7)
        assert decoded.actions is None
        assert why in decoded.invalid


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(-9, 3300), max_size=40))
def test_any_generated_ids_are_a_chunk_or_say_why(tokenizer: FASTTokenizer, ids: list[int]) -> None:
    decoded = tokenizer.actions_from([*ids, tokenizer.stop_id], 6, 7)
    assert (decoded.actions is None) != (decoded.invalid is None)
    assert isinstance(tokenizer.text_from(ids), str)


def test_generated_text_ends_at_eos(tokenizer: FASTTokenizer) -> None:
    answer = tokenizer.text.encode("in the bœwl")
    assert tokenizer.text_from([*answer, tokenizer.text.eos_id, *answer]) == "in the bœwl"
    assert tokenizer.text_from([*answer, 3199]) == "in the bœwl<3199>"


def test_fast_ids_live_after_the_text_or_where_they_are_put(codec: FASTCodec, tokenizer: FASTTokenizer) -> None:
    assert (tokenizer.fast_last_id, tokenizer.vocab_size) == (2176 + 1024 - 1, 2176 + 1024)
    inside = FASTTokenizer(embedded(), codec, max_token_len=80, fast_last_id=2175 - 128)
    assert inside.vocab_size == 2176
    sample, fast = inside.tokenize(PROMPT, STATE, smooth(1)[0]), codec.encode(smooth(1)[0])
    assert sample.tokens[sample.loss_mask][:-1].tolist() == [2175 - 128 - i for i in fast]
    for last, name in [(1022, "BOS at 2"), (1025, "BOS at 2"), (1100, r"\| at 9")]:
        with pytest.raises(ValueError, match=f"expected all ≥ 0 and clear of {name}"):
            FASTTokenizer(embedded(), codec, max_token_len=80, fast_last_id=last)


def test_a_stop_of_many_tokens_is_refused(codec: FASTCodec) -> None:
    bare = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1, "<bos>": 2}, []))
    with pytest.raises(ValueError, match=r"gives 0 tokens for '\|', expected 1"):
        FASTTokenizer(JSONText(bare, "bare"), codec, max_token_len=80)


@pytest.mark.parametrize("limits", [(0, None), (10, 11), (10, 0)])
def test_contradicting_limits_are_refused(codec: FASTCodec, limits: tuple[int, int | None]) -> None:
    with pytest.raises(ValueError, match="max_prompt_len"):
        FASTTokenizer(embedded(), codec, max_token_len=limits[0], max_prompt_len=limits[1])


@pytest.mark.parametrize("name", list(DIALECTS))
def test_a_saved_tokenizer_is_all_there_is(codec: FASTCodec, tmp_path: Path, name: str) -> None:
    settings = {"max_token_len": 70, "max_prompt_len": 30, "score_eos": True}
    tokenizer = FASTTokenizer(embedded(), codec, dialect=name, **settings)
    tokenizer.save(tmp_path)
    again = FASTTokenizer.load(tmp_path)
    assert (again.dialect, again.fast_last_id, again.vocab_size) == (DIALECTS[name], 3199, 3200)
    for before, after in [
        (tokenizer.tokenize(PROMPT, STATE, smooth(1)[0]), again.tokenize(PROMPT, STATE, smooth(1)[0])),
        (tokenizer.question("where is it", "here"), again.question("where is it", "here")),
    ]:
        for field in dataclasses.fields(Tokenized):
            np.testing.assert_array_equal(getattr(before, field.name), getattr(after, field.name))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"score_eoss": True}, r"unknown setting 'score_eoss' \(did you mean 'score_eos'\?\)"),
        ({"max_token_len": "80"}, "max_token_len is '80', expected int"),
        ({"dialect": None}, "dialect is None, expected str"),
        ({"dialect": "pi06"}, "no prompt dialect 'pi06'"),
        ({"fast_last_id": None}, "fast_last_id is None"),
    ],
)
def test_malformed_settings_are_named(tokenizer: FASTTokenizer, tmp_path: Path, change: dict, match: str) -> None:
    tokenizer.save(tmp_path)
    file = tmp_path / "sequence.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=match):
        FASTTokenizer.load(tmp_path)
