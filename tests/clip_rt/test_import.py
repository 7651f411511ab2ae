"""Importing the client is quick, loads no model library, and does no work."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest

LIMIT_S = 0.3
HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "torchvision", "open_clip", "tyro")
MODULES = ("clip_rt", "clip_rt.inputs.images", "clip_rt.inputs.tokenizer", "clip_rt.inputs.prompts")

PROGRAM = """
import json, sys, time
opened = []
sys.addaudithook(lambda event, args: opened.append([event, str(args[0])])
                 if event in ("open", "socket.__new__", "subprocess.Popen", "os.fork") else None)
start_s = time.process_time()
__import__(sys.argv[1])
seconds = time.process_time() - start_s
print(json.dumps([seconds, sorted({name.split(".")[0] for name in sys.modules}), opened]))
"""


def import_in_a_new_process(module: str) -> tuple[float, set[str], list[tuple[str, str]]]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""
    seconds, loaded, opened = json.loads(done.stdout)
    return seconds, set(loaded), opened


@pytest.mark.parametrize("module", MODULES)
def test_import_loads_no_model_library(module):
    _, loaded, _ = import_in_a_new_process(module)
    assert "clip_rt" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.parametrize("module", MODULES)
def test_import_is_quick(module):
    # The first run may compile bytecode. Processor time, as the machine may be busy otherwise.
    seconds = [import_in_a_new_process(module)[0] for _ in range(6)][1:]
    assert statistics.median(seconds) < LIMIT_S


@pytest.mark.parametrize("module", MODULES)
def test_import_opens_no_data_file_and_no_socket(module):
    _, _, opened = import_in_a_new_process(module)
    assert {event for event, _ in opened} <= {"open"}
    assert not [path for _, path in opened if "/clip_rt/inputs/data" in path]


def test_text_and_image_libraries_load_when_they_are_used():
    _, loaded, _ = import_in_a_new_process("clip_rt.inputs.tokenizer")
    assert loaded.isdisjoint({"ftfy", "tokenizers", "PIL"})
    _, loaded, _ = import_in_a_new_process("clip_rt.inputs.images")
    assert loaded.isdisjoint({"ftfy", "tokenizers"})
