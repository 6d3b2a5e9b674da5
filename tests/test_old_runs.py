"""Runs of insula 0.1, whose settings had other names: every command refuses them by name, and says what to do."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_convert import POLICY, STATS, folder_of_run

from insula.cli import execute
from insula.errors import InsulaError
from insula.policy import Policy
from insula.train.config import TrainConfig, to_dict

EXPECTED = "written by an insula before 0.2, whose settings had other names"


def flat(model: dict[str, Any]) -> dict[str, Any]:
    """Settings of a model as 0.1 wrote them: all in one, two of them under other names."""
    old = {name: value for name, value in model.items() if name not in ("objective", "compute")}
    compute = model["compute"]
    layers = "scan" if compute["scan_layers"] else "unrolled"
    old |= model["objective"] | {"compute_dtype": compute["dtype"], "layers": layers}
    return old | {"vocab_chunk": compute["vocab_chunk"]}


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = folder_of_run(tmp_path_factory.mktemp("old") / "run", STATS)
    path = run / "checkpoints" / "1" / "assets" / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({"insula": "0.1.0", "model": flat(written["model"])}))

    settings = json.loads(json.dumps(to_dict(TrainConfig(run=run, model=POLICY))))
    (run / "train.json").write_text(json.dumps(settings | {"model": flat(settings["model"])}))
    return run


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate", "RUN"),
        ("inspect", "--run", "RUN"),
        ("train", "--run", "RUN", "--resume"),
        ("convert", "RUN", "OUT", "--to", "insula"),
        ("convert", "RUN", "OUT", "--to", "lerobot"),
    ],
)
def test_every_command_says_so(
    command: tuple[str, ...], old_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(old_run), "OUT": str(tmp_path / "out")}
    assert execute([places.get(word, word) for word in command]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert EXPECTED in said and "Read it with that version" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_python_says_so_too(old_run: Path) -> None:
    with pytest.raises(InsulaError, match=EXPECTED):
        Policy.load(old_run)
