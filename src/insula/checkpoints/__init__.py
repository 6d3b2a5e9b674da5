"""Saving and loading: `store` for our own runs, one file per foreign format."""
