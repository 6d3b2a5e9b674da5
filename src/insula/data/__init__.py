"""From data sets on disk to batches.

mapping ─► lerobot ─► fitting (normalisation, FAST) ─► samples, questions ─► mixture ─► loader ─► train
"""
