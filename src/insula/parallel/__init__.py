"""Devices as a mesh, and what of a model lives where."""
