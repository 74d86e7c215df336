"""Training data: preparation of text, and checks of Megatron's indexed datasets."""
