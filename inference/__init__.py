"""Multi-scene generation, scene extension, batches and evaluation."""
