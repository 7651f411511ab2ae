"""Measurements, each with its command, its machine and its date."""
