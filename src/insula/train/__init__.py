"""Training: configuration, optimizer, step, loop."""
