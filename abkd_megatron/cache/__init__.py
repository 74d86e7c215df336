"""Teacher cache: records of a teacher's distributions on disk, found by the content of a sample."""
