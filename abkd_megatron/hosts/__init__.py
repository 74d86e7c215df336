"""Entries into the training loops of the hosts."""
