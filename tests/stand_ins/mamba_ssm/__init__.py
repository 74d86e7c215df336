"""Plain torch in place of mamba-ssm's kernels, as far as Megatron's MambaMixer uses them in training.

For short sequences: memory is quadratic in their length. Only ranks of tests import it, from their PYTHONPATH.
"""
