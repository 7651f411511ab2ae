"""Embeddings of any number of images or texts, in files; what is interrupted goes on."""
