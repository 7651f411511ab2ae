"""From arrays to embeddings: batches, retries, and which of several servers is asked."""
