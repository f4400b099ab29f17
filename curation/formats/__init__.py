"""Manifests in other systems' formats: written and, where they can say enough, read back."""
