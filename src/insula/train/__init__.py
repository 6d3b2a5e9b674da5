"""Training: configuration, optimiser, step, loop."""
