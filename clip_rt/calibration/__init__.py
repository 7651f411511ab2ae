"""Policies fitted on labelled images, and what they are worth; rates of labels by group."""
