"""Checks that run before the first optimizer step."""
