"""From embeddings to probabilities and classes."""
