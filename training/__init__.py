"""The masked diffusion transformer, its objective, and its DeepSpeed training."""
