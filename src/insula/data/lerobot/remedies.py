"""What the doctor can find, as faults and as notes, and how findings of one kind become one."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from insula.data.images import NOT_COLOR
from insula.data.lerobot.metadata import FAULTS as METADATA

SHOWN = 10
"""Places listed of one finding; a data set may have a million episodes with the same fault."""
SUBJECTS = 50
"""Columns that have a finding of their own for one fault; those beyond are told as one."""
DROP = "insula data convert --drop-episodes writes the others"
QUARANTINE = "insula train --on-bad-sample quarantine leaves such samples out"

# Each is true as written, one way at least: who follows it does not get the same finding again.
REMEDIES = METADATA | {
    "metadata": "correct what is named above, or restore meta/ from the data set's source",
    "path outside": "correct data_path and video_path in meta/info.json: they must stay below the data set",
    "empty episode": "take its entry out of meta/, or copy its data file again",
    "episode repeated": "leave one entry of it in meta/; insula data convert does",
    "not listed": "add its entry to meta/, or leave it: it is not read",
    "wrong place": "write the numbers above into the table; insula data convert does",
    # Nobody but the person who recorded can know, so no command decides it unasked.
    "tasks differ": "decide which side is right: insula data convert --tasks-from rows, or episodes, writes it",
    "null": "fill the values in; or, where nobody needs the column, insula data convert --leave-out COLUMN",
    "file missing": f"copy the file again, or leave its episodes out: {DROP}",
    "file damaged": "copy the file again; v2.1: or take its episode's line out of meta/ and the file away",
    "column missing": "remove the feature from meta/info.json, or restore the column",
    "wrong dtype": "correct dtype in meta/info.json, or write the column again as it says there",
    "wrong shape": "where all rows have that length, write it into meta/info.json; otherwise record again, or, where "
    "nobody needs the column, insula data convert --leave-out COLUMN",
    "row count": "write the length above into the episode table (insula data convert does), or restore file and table "
    "from one copy",
    "index gap": "rows are missing or out of order: restore the file, or renumber its rows",
    "task index": "add the task to the task table, or correct task_index",
    "timestamps": "correct fps in meta/info.json, or write timestamps as frame_index / fps",
    "not finite": f"mend the sensor's values, or leave them out: {QUARANTINE}",
    "unreadable image": f"restore the image, or leave it out: {DROP}, {QUARANTINE}",
    "picture size": "where every picture has that size, write it into meta/info.json as [height, width, channels]; "
    "where only some have, leave their episodes out: insula data convert --drop-episodes",
    NOT_COLOR: "leave the camera out of the mapping (and out of insula data convert: --leave-out CAMERA), or write it "
    "as 8-bit color",
    "orientation": "encode the video upright",
    "video damaged": f"copy the video again, or leave the frames out: {DROP}, {QUARANTINE}",
    "video too short": f"copy the video again, or leave what is missing out: {DROP}, {QUARANTINE}",
    "video rate": "correct fps in meta/info.json if that is wrong, otherwise encode the video at that rate",
    "video offset": "v3.0: write the time of the first frame as from_timestamp; v2.1: encode the video to begin at 0",
    "video gap": f"encode the episode again, or leave the frames out: {DROP}, {QUARANTINE}",
    "video overlap": "correct from_timestamp in the episode table",
    # The same count has two causes, and cutting the wrong end would shift every picture.
    "frames left over": "where the camera only went on filming, nothing is shifted: cut its end off; where it "
    "began earlier, or rows were lost, cut the frames that have no row",
    "subtasks": "correct what is named above; or, where nobody needs them, insula data convert --leave-out COLUMN",
    "statistics": "compute them again: insula data convert writes true ones",
    "duplicate episode": f"it counts double in training; {DROP}",
    # Notes from here on: it can be read as it is, and trains.
    "cannot be read": "nothing needs to be done unless a mapping names it; insula data convert leaves it out",
    "names": "nothing needs to be done: dimensions are called by number; or correct the names in meta/info.json",
    "totals": "nothing needs to be done: they are counted; or write the number above, as insula data convert does",
    "numbering": "nothing needs to be done; insula data convert renumbers",
    "clock": "nothing needs to be done; insula data convert writes timestamps and starts of clips again",
    "frames unused": "nothing needs to be done: no row asks for them",
    "no statistics": "nothing needs to be done here, which fits its own; insula data convert writes them for LeRobot",
    # What makes no sense (`insula.data.lerobot.sanity`): mostly for a person to look at.
    "constant": "nothing needs to be done: training maps it to 0; if it should move, check that it was recorded",
    "jump": "unwrap the angle before recording, or record its sine and cosine: as it is, a small turn reads as a whole",
    "spike": "mend the frame or remove the episode; quantiles withstand it, min_max and mean_std do not",
    "copy": "check which column was recorded as the action: a policy learns to do nothing from a copy of the state",
    "black pictures": f"check the camera, or leave the episode out: {DROP}",
    "frozen pictures": "check that the camera was recorded: the numbers move and its pictures do not",
    "no text": "nothing needs to be done unless it is the instruction: annotate these frames, or leave them out",
    "one episode": "nothing can be held out: record more, or train with --held-out-fraction 0",
}
"""What to do about each fault and each note."""
NOTES = frozenset(
    {
        *("cannot be read", "names", "totals", "numbering", "clock", "frames unused", "no statistics", "constant"),
        *("one episode", "no text", "jump", "spike", "copy", "black pictures", "frozen pictures"),
    }
)
"""Those that leave nothing wrong in what is read; all others are faults."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fault or note. `file` is relative to the data set; `episode` and `frame` (within it) where they are known.

    `subject`: the column or camera it is about. Findings of one fault and subject are told as one: the first, with how
    often there is one (`count`) and where else (`others`, the first few).
    """

    fault: str
    message: str
    file: str | None = None
    episode: int | None = None
    frame: int | None = None
    subject: str | None = None
    count: int = 1
    others: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return REMEDIES[self.fault]

    @property
    def is_note(self) -> bool:
        """Whether nothing needs to be mended."""
        return self.fault in NOTES

    @property
    def place(self) -> str:
        """File, episode and frame in words."""
        place = [self.file] if self.file else []
        place += [f"episode {self.episode}"] if self.episode is not None else []
        place += [f"frame {self.frame}"] if self.frame is not None else []

        return ", ".join(place) or "data set"

    def to_json(self) -> dict[str, Any]:
        """Every field, and what follows from them."""
        severity = "note" if self.is_note else "fault"
        return {"severity": severity} | dataclasses.asdict(self) | {"remedy": self.remedy}

    def __str__(self) -> str:
        note = "note: " if self.is_note else ""
        lines = [f"{note}{self.fault}: {self.place}: {self.message}"]
        lines += [f"    also {other}" for other in self.others]
        if (more := self.count - 1 - len(self.others)) > 0:
            lines.append(f"    and {more:,} more such places")

        return "\n".join([*lines, f"    {self.remedy}"])


def grouped(found: Iterable[Finding]) -> list[Finding]:
    """One for each fault and subject: faults first, then notes, each in the order found. Bounded, whatever comes."""
    kept: dict[tuple[str, str | None], Finding] = {}
    counts: dict[tuple[str, str | None], int] = {}
    others: dict[tuple[str, str | None], list[str]] = {}
    subjects: dict[str, int] = {}
    for finding in found:
        key = (finding.fault, finding.subject)
        if key not in kept and finding.subject is not None:
            subjects[finding.fault] = subjects.get(finding.fault, 0) + 1

        # A file may list a million columns.
        if key not in kept and subjects.get(finding.fault, 0) > SUBJECTS:
            key = (finding.fault, None)

        # A finding may stand for several already.
        first = kept.setdefault(key, finding)
        counts[key] = counts.get(key, 0) + finding.count
        listed = others.setdefault(key, [])
        if finding is not first and len(listed) < SHOWN - 1:
            # Places alone where nothing else differs: ten files with one fault are read at a glance.
            same = finding.message == first.message
            listed.append(finding.place if same else f"{finding.place}: {finding.message}")

    # The rest are known by their number.
    told = [dataclasses.replace(first, count=counts[key], others=tuple(others[key])) for key, first in kept.items()]

    # Stable, so that each kind keeps the order in which it was found.
    return sorted(told, key=lambda finding: finding.is_note)
