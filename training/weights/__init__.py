"""Weights of other projects, into `training.model.CLIP`."""
