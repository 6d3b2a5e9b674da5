"""Evaluation: the closed loop, and what the backbone still knows."""
