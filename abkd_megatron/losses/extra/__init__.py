"""Losses that do not separate over the vocabulary, each from a single paper."""
