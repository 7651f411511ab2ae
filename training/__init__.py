"""CLIP (Radford et al. 2021) and its training. `python -m training.run`."""

import clip_rt_commands

clip_rt_commands.prepare(__name__, __path__[0])
