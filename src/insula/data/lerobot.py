"""LeRobot v3.0 data sets on disk: `LeRobotWriter` makes them, `LeRobotDataset` reads them.

meta/info.json                              features, counts, fps
meta/stats.json                             statistics of every feature
meta/tasks.parquet                          task, task_index
meta/episodes/chunk-000/file-000.parquet    a row per episode: length, tasks, which rows of which data file
data/chunk-000/file-000.parquet             a row per frame, a row group per episode; images are {bytes, path}
"""

from insula.data.lerobot_reader import Episodes, LeRobotDataset
from insula.data.lerobot_writer import LeRobotWriter

__all__ = ["Episodes", "LeRobotDataset", "LeRobotWriter"]
