"""ToonWorld: cartoon videos drawn from a seed, with everything about them known."""
