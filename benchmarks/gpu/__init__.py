"""Rates, parity, speed, training and preprocessing on a GPU, by one command: `benchmarks.gpu`."""
