"""What a model sees and learns from, looked at."""
