"""From a checkpoint to what Triton serves. `python -m export.onnx --model ViT-B/32`."""

import os

import clip_rt_commands

clip_rt_commands.prepare(__name__, __path__[0])
# ONNX Runtime reads it when it is loaded. Without, it keeps an identifier in the user's cache
# folder and sends to its maker what it runs.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
