"""LeRobot data sets on disk: `LeRobotWriter` makes v3.0, `LeRobotDataset` reads v2.1 and v3.0.

meta/info.json                              features, counts, fps
meta/stats.json                             statistics of every feature
meta/tasks.parquet                          task, task_index
meta/episodes/chunk-000/file-000.parquet    a row per episode: length, tasks, which rows of which data file
data/chunk-000/file-000.parquet             a row per frame, a row group per episode; images are {bytes, path}
videos/CAMERA/chunk-000/file-000.mp4        cameras stored as video, which have no column in the rows
"""

from insula.data.lerobot.places import Episodes
from insula.data.lerobot.reader import LeRobotDataset
from insula.data.lerobot.writer import LeRobotWriter

__all__ = ["Episodes", "LeRobotDataset", "LeRobotWriter"]
