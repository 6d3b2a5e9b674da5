"""Several processes that train one model: real ones, over the loopback."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small import by_leaf

from insula.checkpoints.store import CheckpointStore
from insula.collect.demonstrations import collect
from insula.data.config import DataConfig
from insula.errors import InputError
from insula.files import write_json
from insula.model.config import TINY, LoraConfig, ModelConfig, TransformerConfig, VisionConfig
from insula.model.params import abstract_params
from insula.parallel import processes
from insula.parallel.mesh import ONE_DEVICE, MeshConfig
from insula.parallel.processes import EXIT_LOST, Heard, ProcessesConfig, on_main
from insula.train import run as training
from insula.train.config import TrainConfig, to_dict
from insula.train.optimizer import OptimizerConfig

ROOT = Path(__file__).resolve().parents[1]
MODEL = dataclasses.replace(
    TINY.with_compute(dtype="float32"),
    name="small",
    vision=VisionConfig(64, (16,), (), width=128, depth=1, mlp_dim=128, num_heads=2),
    backbone=TransformerConfig(128, 1, 128, 2, 1, 16),
    expert=TransformerConfig(128, 1, 128, 2, 1, 16),
    max_fast_len=40,
)
"""Weights large enough to be split."""
RECIPES = {
    "insulated": MODEL,
    "joint": MODEL.with_objective(knowledge_insulation=False),
    "lora": dataclasses.replace(MODEL, lora=LoraConfig(rank=4)),
    "frozen": MODEL.with_objective(freeze_backbone=True),
}
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect(tmp_path_factory.mktemp("data") / "demos", episodes=4, processes=1).root


def settings(data: Path, run: Path, **changes: object) -> TrainConfig:
    config = TrainConfig(
        run=run,
        data=data,
        model=MODEL,
        optimizer=OptimizerConfig(warmup_steps=2),
        steps=STEPS,
        batch_size=8,
        mesh=MeshConfig(),
        from_scratch=True,
        held_out_fraction=0.0,  # else a program more to compile
        evaluate_every=10,
        checkpoint_every=10,
        log_every=1,
        reading=DataConfig(fast_vocab=512),
        certify=False,
    )
    return dataclasses.replace(config, **changes)


def written(config: TrainConfig, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, to_dict(config))
    return path


def start(config: TrainConfig, count: int, devices: int, *more: str, **of_one: str) -> list[subprocess.Popen]:
    """The processes of one training. `of_one`: an argument more for process n, as `process_n`."""
    path = written(config, config.run.parent / f"{config.run.name}.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"

    # Compiled well, as for a user: compiled in haste, the messages of two processes may come in different orders.
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return [
        subprocess.Popen(
            [sys.executable, "tests/one_of_several.py", str(path), coordinator, str(count), str(i), *more]
            + ([of_one[f"process_{i}"]] if f"process_{i}" in of_one else []),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(started: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str]]:
    """Exit code and all output of each."""
    try:
        found = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, out + error) for process, (out, error) in zip(started, found, strict=True)]


def losses(run: Path) -> dict[int, float]:
    """By step; of those that were made twice, the last."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["total"] for row in rows if "total" in row}


def params(run: Path, model: ModelConfig) -> dict[str, np.ndarray]:
    with CheckpointStore(run / "checkpoints") as store:
        return by_leaf(jax.device_get(store.restore("params", abstract_params(model))))


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, one device, insulated."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert training.train(settings(data, run, mesh=ONE_DEVICE), quiet=True)
    return run


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_train_what_one_does(recipe: str, data: Path, tmp_path: Path) -> None:
    """Four devices each. One of them speaks, and its checkpoints hold all of the model, its certificate too."""
    model = RECIPES[recipe]
    single = settings(data, tmp_path / "single", model=model, mesh=ONE_DEVICE, held_out_fraction=0.25)
    assert training.train(single, quiet=True)
    config = dataclasses.replace(single, run=tmp_path / "run", mesh=MeshConfig(), certify=recipe == "insulated")
    found = finish(start(config, 2, 4))
    assert [code for code, _ in found] == [0, 0], found
    assert f"done {config.run}" in found[0][1] and "done" not in found[1][1]

    assert losses(config.run).keys() == losses(single.run).keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses(config.run).values()), list(losses(single.run).values()), rtol=1e-5)
    ours, theirs = params(config.run, model), params(single.run, model)
    for name, leaf in ours.items():
        # A key's bias adds the same to every score of a query: its gradient is rounding, of which Adam makes steps.
        assert np.abs(leaf - theirs[name]).max() < (1e-2 if name == "vision.layers.key.bias" else 1e-4), name
    for step in ("10", "20") if config.certify else ():
        certificate = json.loads((config.run / "checkpoints" / step / "assets" / "certificate.json").read_text())
        assert certificate["outcome"] == "holds", certificate["findings"]


@pytest.mark.slow  # two processes compile a training each, well
def test_one_is_killed_and_one_goes_on(alone: Path, data: Path, tmp_path: Path) -> None:
    """The other ends with a line rather than waiting for ever; then a single process takes over."""
    config = settings(data, tmp_path / "run")
    kill = f"signal:{int(signal.SIGKILL)}:13"
    found = finish(start(config, 2, 2, process_1=kill))
    assert [code for code, _ in found] == [EXIT_LOST, -signal.SIGKILL], found
    assert "process" in found[0][1] and "of 2 is gone" in found[0][1] and "--resume" in found[0][1]

    assert training.train(TrainConfig(run=config.run, resume=True, mesh=ONE_DEVICE), quiet=True)
    np.testing.assert_allclose(list(losses(config.run).values()), list(losses(alone).values()), rtol=1e-5)


@pytest.mark.slow  # a minute and more, and gloo gives up on a process that is starved for half of one
def test_a_signal_to_one_ends_all_at_one_step(data: Path, tmp_path: Path) -> None:
    """With a checkpoint."""
    config = settings(data, tmp_path / "run", steps=200, checkpoint_every=100, evaluate_every=100)
    found = finish(start(config, 2, 2, process_1=f"signal:{int(signal.SIGTERM)}:3"))
    assert [code for code, _ in found] == [130, 130], found
    assert "go on with" in found[0][1]
    with CheckpointStore(config.run / "checkpoints") as store:
        step = store.latest()
    assert step is not None and 3 < step < 200


def test_different_settings_are_refused(data: Path, tmp_path: Path) -> None:
    """Each of them would train another model."""
    config = settings(data, tmp_path / "run", steps=2)
    other = dataclasses.replace(config, seed=1)
    found = finish(start(config, 2, 1, **{"process_1": f"settings:{written(other, tmp_path / 'other.json')}"}))
    assert {code for code, _ in found} <= {1, EXIT_LOST}, found
    assert any("settings of process 1 are not those of process 0" in said for _, said in found)


@pytest.mark.slow  # as the test before, to the word
def test_a_folder_that_they_do_not_share_is_refused(data: Path, tmp_path: Path) -> None:
    config = settings(data, tmp_path / "run", steps=2)
    elsewhere = written(settings(data, tmp_path / "elsewhere"), tmp_path / "elsewhere.json")
    found = finish(start(config, 2, 1, process_1=f"settings:{elsewhere}"))
    assert any("run's folder of process 1 are not" in said and "all share" in said for _, said in found), found
    assert not (config.run / "checkpoints" / "2").exists()


def test_the_reason_of_one_that_fails_is_told(data: Path, tmp_path: Path) -> None:
    """By itself, with exit code 1; the others say that it is gone."""
    config = settings(data, tmp_path / "run")
    found = finish(start(config, 2, 1, process_1="fail:the data are not on this host"))
    assert [code for code, _ in found] == [EXIT_LOST, 1], found
    assert "of 2 is gone" in found[0][1]
    assert found[1][1].rstrip().endswith("insula: the data are not on this host")


# --- alone -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"coordinator": "host:1"}, "count and index are missing"),
        ({"coordinator": "host:99999", "count": 2, "index": 0}, "expected HOST:PORT"),
        ({"coordinator": "host", "count": 2, "index": 0}, "expected HOST:PORT"),
        ({"coordinator": "host:1", "count": 2, "index": 2}, "index"),
    ],
)
def test_half_of_an_address_is_refused(values: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        ProcessesConfig(**values)


def test_who_is_lost() -> None:
    """Whose sign has not changed for long, by the clock of who looks."""
    heard = Heard(2, now=0.0)
    assert heard.lost({0: "1", 1: "1"}, now=1.0) == []
    assert heard.lost({0: "2", 1: "1"}, now=processes.LOST) == []
    assert heard.lost({0: "3", 1: "1"}, now=processes.LOST + 2) == [1]
    assert heard.lost({0: "4", 1: processes.GONE}, now=processes.LOST + 3) == []
    assert heard.lost({}, now=10 * processes.LOST) == [0]


def test_alone_the_main_process_decides() -> None:
    assert on_main(lambda: 3) == 3 and on_main(lambda: None) is None
