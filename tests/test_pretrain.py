"""The embedded backbone's own training: stages, interruption, what it writes."""

import dataclasses
import json
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from small import SMALL, by_leaf

from insula.checkpoints.loading import load_params
from insula.errors import InputError
from insula.model.config import TINY
from insula.pretrain import run as pretraining
from insula.pretrain.run import PretrainConfig, pretrain, question_tokenizer
from insula.train.loop import Every
from insula.train.optimizer import OptimizerConfig
from insula.worlds.seeds import PRETRAINING

MODEL = dataclasses.replace(
    SMALL,
    vocab_size=TINY.vocab_size,
    max_prompt_len=TINY.max_prompt_len,
    max_fast_len=TINY.max_fast_len,
)


def settings(out: Path) -> PretrainConfig:
    return PretrainConfig(
        out,
        MODEL,
        scenes=12,
        held_out_scenes=4,
        questions_each=4,
        grounding_steps=2,
        pointing_steps=2,
        steps=6,
        batch_size=4,
        checkpoint_every=2,
        optimizer=OptimizerConfig(warmup_steps=1),
    )


def learned(out: Path) -> dict[str, np.ndarray]:
    params, _ = load_params(out / "backbone.safetensors", MODEL, jax.random.key(0), ["expert.*"])
    return by_leaf({"vision": params.vision, "backbone": params.backbone})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrain") / "whole"
    pretrain(settings(out), question_tokenizer(MODEL))
    return out


def test_it_records_what_made_the_weights(finished: Path) -> None:
    record = json.loads((finished / "backbone.json").read_text())
    assert record["seeds"] == [PRETRAINING.start, PRETRAINING.start + 16]
    assert record["config"]["steps"] == 6 and record["config"]["model"]["vocab_size"] == MODEL.vocab_size
    assert record["held_out"]["questions"] == 16 and 0 <= record["held_out"]["location_error"] <= 127
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in logged if "held_out/location_error" in row} == {2, 4, 6}


@pytest.mark.slow  # the same training twice more
def test_interrupted_and_started_again_equals_uninterrupted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pretraining.run_loop

    def interrupted(*args: object, hooks: tuple[Every, ...]) -> object:
        stop = Every(3, lambda _: signal.raise_signal(signal.SIGINT))
        return real(*args, hooks=(*hooks, stop))

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "run_loop", interrupted)
        with pytest.raises(KeyboardInterrupt, match="goes on where it stopped"):
            pretrain(settings(tmp_path), question_tokenizer(MODEL))
    assert not (tmp_path / "backbone.safetensors").exists()
    other = dataclasses.replace(settings(tmp_path), batch_size=3, seed=1)
    with pytest.raises(InputError, match=r"was begun with other settings \(batch_size, seed differ"):
        pretrain(other, question_tokenizer(MODEL))
    pretrain(settings(tmp_path), question_tokenizer(MODEL))

    whole, resumed = learned(finished), learned(tmp_path)
    assert all(np.array_equal(whole[name], resumed[name]) for name in whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 6 and steps.count(3) == 1


def test_pointing_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the kinds of POINTING are asked before everything is."""
    config = dataclasses.replace(settings(tmp_path), scenes=8, steps=40, pointing_steps=20, grounding_steps=0)
    scenes = pretraining.render_scenes(PRETRAINING.take(8), 8, MODEL.vision.image_size, processes=1)
    asked: list[set[str]] = []

    def note(scenes, tokens, index, which, model):
        asked.append({scenes.questions[i][w][0] for i, w in zip(index, which, strict=True)})

    monkeypatch.setattr(pretraining, "question_batch", note)
    list(pretraining._batches(scenes, question_tokenizer(MODEL), config, 0))
    assert set().union(*asked[:20]) <= set(pretraining.POINTING)
    assert not set().union(*asked[20:]) <= set(pretraining.POINTING)
