"""Measurements, each with its command, its machine and its date."""

import clip_rt_commands

clip_rt_commands.prepare(__name__, __path__[0])
