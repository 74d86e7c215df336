"""Plain torch in place of flash-linear-attention's kernels, as far as Megatron's GatedDeltaNet uses them.

Only ranks of tests import it, from their PYTHONPATH.
"""
