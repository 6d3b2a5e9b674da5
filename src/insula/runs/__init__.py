"""What a run folder and a checkpoint hold, by name, and how they are read back."""
