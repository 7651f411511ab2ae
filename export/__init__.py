"""From a checkpoint to what Triton serves. `python -m export.onnx --model ViT-B/32`."""

import clip_rt_commands

clip_rt_commands.prepare(__name__, __path__[0])
