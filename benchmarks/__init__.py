"""Measurements, each with its command, its machine and its date."""

from training.extras import begin

begin()
