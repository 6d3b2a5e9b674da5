"""From demonstrations on disk to batches.

schema ─► lerobot (writer, reader) ─► normalise ─► samples ─► loader ─► train
collect: demonstrations of the tabletop's scripted expert, written as a LeRobot data set like any user's.
"""
