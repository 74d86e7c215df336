"""Text of the live student: sampling on Megatron's schedule, and training steps on what was sampled."""
