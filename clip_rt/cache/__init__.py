"""Class embeddings that were made once, in memory and in a folder."""
