"""Measurements of one question each, with the timer and the results of all: `python -m NAME`."""
