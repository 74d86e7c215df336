"""Training data: text to Megatron's indexed datasets, and checks of them."""
