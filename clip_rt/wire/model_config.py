"""A model's config.pbtxt: protobuf's text format in, Triton's message out.

Source: triton-inference-server/common `protobuf/model_config.proto`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

CONFIG = "config.pbtxt"
ModelConfig: TypeAlias = model_config_pb2.ModelConfig
DataType = model_config_pb2.DataType


def read_config(folder: Path, *, allow_unknown_field: bool = False) -> ModelConfig:
    """Parse the config.pbtxt of a model folder.

    Args:
        folder: Of the model.
        allow_unknown_field: Leave out fields of a Triton newer than the installed tritonclient.

    Raises:
        OSError: there is none.
        UnicodeDecodeError: it is not UTF-8.
        google.protobuf.text_format.ParseError: it is not a model configuration.
    """
    text = (folder / CONFIG).read_text("utf-8")
    return text_format.Parse(text, ModelConfig(), allow_unknown_field=allow_unknown_field)
