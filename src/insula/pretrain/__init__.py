"""The embedded backbone: how it was made, on questions about rendered scenes."""
