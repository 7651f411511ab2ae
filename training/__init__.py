"""CLIP (Radford et al. 2021) and its training. `python -m training.run`."""

from training.extras import begin

begin()
