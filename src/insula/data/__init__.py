"""From data sets on disk to batches.

mapping ─► lerobot ─► fitting (normalization, FAST) ─► samples, questions ─► mixture ─► loader ─► train
"""
