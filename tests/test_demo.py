"""Which stages of a demo are done again: none. What is measured in them has tests of its own."""

from pathlib import Path

import pytest

from insula import demo as demos
from insula.demo import QUICK, REPORT_FILE, Stages, demo
from insula.errors import InputError


def test_a_stage_is_done_once(tmp_path: Path) -> None:
    """Also where the demo goes on in another process."""
    done = []
    for _ in range(2):
        stages = Stages(tmp_path, QUICK, seed=0)
        found = stages.do("collect", lambda: done.append("collect") or {"demonstrations": 3})
        assert found == {"demonstrations": 3} and not stages.finished
    assert done == ["collect"]


def test_a_finished_demo_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Nothing of it is run or removed. Control: one that is not finished is gone on with."""

    def collect(*_: object) -> None:
        raise RuntimeError("collects")

    monkeypatch.setattr(demos, "_collect", collect)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("of the user")
    with pytest.raises(InputError, match="is not empty and holds no demo"):
        demo(tmp_path, QUICK, 0)

    (tmp_path / "run" / "mine").rename(tmp_path.parent / "mine")
    (tmp_path / "run").rmdir()
    with pytest.raises(RuntimeError, match="collects"):
        demo(tmp_path, QUICK, 0)

    Stages(tmp_path, QUICK, 0).note("report", True)
    assert demo(tmp_path, QUICK, 0) == tmp_path / REPORT_FILE
    assert "nothing was run" in capsys.readouterr().out


def test_a_demo_of_another_seed_is_refused(tmp_path: Path) -> None:
    """With all that was made of it still there."""
    Stages(tmp_path, QUICK, 0).note("collect", {})
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"or another seed; delete it, or choose another folder"):
        Stages(tmp_path, QUICK, 1)
    assert (tmp_path / "data").is_dir()
