"""From what callers hold, images and texts, to arrays that a model reads."""
