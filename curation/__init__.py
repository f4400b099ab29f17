"""From videos to three-scene manifests: sources, shots, clips, embeddings, windows, manifests."""
