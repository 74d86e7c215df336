"""The frozen teacher: its arguments, checkpoint, layout over ranks, messages and forward pass."""
