"""Where everything of a LeRobot data set is: which rows of which file, which part of which video, for either version.

The tables of the metadata say it, the rows are asked whether it is true (`insula.data.lerobot.counting`), and the
rows are believed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from insula.data.lerobot.counting import count_rows, recounted
from insula.data.lerobot.crosscheck import Contradiction
from insula.data.lerobot.info import Info, read_info
from insula.data.lerobot.places import Clips, Episodes, Spans
from insula.data.lerobot.tables import Tasks, read_tables


@dataclass(frozen=True)
class Layout:
    """`clips[camera][episode]`, for cameras stored as video; `spans` in the order of their frames. Totals in `info` are
    true ones, and its features say which of them cannot be read. `contradictions`: what the files disagree about."""

    root: Path
    info: Info
    task_table: Tasks
    episodes: Episodes
    spans: Spans
    clips: Mapping[str, Clips] = field(default_factory=dict)
    contradictions: tuple[Contradiction, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """The texts, in the order of their numbers."""
        return self.task_table.text


def read_layout(root: Path) -> Layout:
    """Metadata, the footers of the data files and (v3.0) which episode each row names. Raises DatasetError for metadata
    that is missing or damaged; what is only inconsistent is in `contradictions`."""
    counted = count_rows(read_tables(root, read_info(root)))
    info, totals = recounted(counted)
    # A camera with a problem has no clips, so that nobody comes upon them unasked.
    clips = {key: clips for key, clips in counted.tables.clips.items() if info.features[key].is_camera}
    found = (*counted.contradictions, *totals)
    return Layout(root, info, counted.tables.tasks, counted.episodes(), counted.spans, clips, found)
