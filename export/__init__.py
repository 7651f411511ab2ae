"""From a checkpoint to what Triton serves. `python -m export.onnx --model ViT-B/32`."""

from training.extras import begin

begin()
