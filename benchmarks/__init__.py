"""Measurements, each with its command, its machine and its date."""

import os

import clip_rt_commands

clip_rt_commands.prepare(__name__, __path__[0])
# ONNX Runtime reads it when it is loaded. Without, it keeps an identifier in the user's cache
# folder and sends to its maker what it runs.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
