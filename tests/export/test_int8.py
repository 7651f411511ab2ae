"""INT8: what it needs, what it costs, and that the gate refuses it when it costs too much."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clip_rt
from clip_rt.embedded.bundled import find_sample
from clip_rt.errors import InputError, ParityError
from export import int8, parity, parity_report, probes
from export.onnx import OnnxConfig
from export.samples import NO_TEXT, calibration_batches, load_samples

EXPORT_DIR = Path(int8.__file__).parent
OPENMOJI = find_sample() / "styles/openmoji.tar"


@pytest.fixture(scope="module")
def quantised(exported_vit, tmp_path_factory) -> dict[str, Path]:
    folder, spec = tmp_path_factory.mktemp("int8"), exported_vit.clip.spec
    batches = {
        "image": [row[None] for row in probes.images(spec.side_px)],
        "text": [row[None] for row in probes.tokens(spec.text.context_length)],
    }
    files = {tower: folder / tower / "model.xml" for tower in batches}
    for tower, file in files.items():
        file.parent.mkdir()
        int8.write_int8(getattr(exported_vit, tower), batches[tower], file)
    return files


def test_a_process_survives_its_childrens_end_after_int8(quantised):
    # OpenVINO's plugins leave a freed stack for signal handlers to the thread that loads them.
    files = [str(file) for file in quantised.values()]
    script = (
        "import signal, subprocess, sys\n"
        "from pathlib import Path\n"
        "from export.int8 import load_openvino\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "one, two = [load_openvino(Path(file), 1) for file in sys.argv[1:]]\n"
        "del one\n"
        "del two\n"
        "subprocess.run(['true'])\n"
        "print('alive')\n"
    )
    # With -X faulthandler signals are handled on a stack of their own, as they are under pytest.
    command = [sys.executable, "-X", "faulthandler", "-c", script, *files]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=EXPORT_DIR.parent, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_matrix_products_are_int8_and_the_embedding_is_not(quantised):
    import openvino

    for file in quantised.values():
        model = openvino.Core().read_model(file)
        types = [each.get_type_name() for each in model.get_ops()]
        assert types.count("FakeQuantize") >= 4
        (norm,) = [node for node in model.get_results()]
        assert norm.input_value(0).get_node().get_type_name() != "FakeQuantize"
        weights = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
        assert sum(str(node.get_element_type()).count("int8_t") for node in weights) >= 4


def test_it_is_near_torch_has_length_one_and_does_not_depend_on_the_batch(exported_vit, quantised):
    report = parity.check_files(exported_vit.clip, **quantised, precision="int8")
    assert report.passed
    assert max(case.norm_error for case in report.cases) < 1e-5
    assert max(case.batch_difference for case in report.cases) < 1e-5
    # Real: FP32 would be nearer.
    assert min(case.min_cosine for case in report.cases) < 0.99999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int8"}, "--calibration"),
        ({"precision": "int8", "calibration": (OPENMOJI,)}, "--samples"),
        ({"precision": "int8", "weights": "random", "device": "gpu"}, "--device cpu"),
        ({"precision": "int8", "weights": "random", "backend": "onnxruntime"}, "--backend python"),
        ({"precision": "int8", "weights": "random", "runtime": "onnxruntime"}, "--runtime auto"),
        ({"precision": "fp32", "calibration": (OPENMOJI,)}, "only int8 is calibrated"),
    ],
)
def test_what_it_needs_is_said_before_any_work(arguments, message):
    with pytest.raises(InputError, match=message):
        OnnxConfig(model="RN26@64px", **arguments)


class TestSamples:
    def test_are_the_same_ones_each_time_with_every_class_there_is(self, exported_vit):
        spec = exported_vit.clip.spec
        first, again = (load_samples(OPENMOJI, spec.facts, num_images=7) for _ in range(2))
        assert first.fingerprint() == again.fingerprint()
        assert first.pixels_NSSC.shape == (7, spec.side_px, spec.side_px, 3)
        assert len(first.token_ids) == 1923
        assert len(set(first.right_N.tolist())) == 7
        assert load_samples(OPENMOJI, spec.facts, num_images=8).fingerprint() != first.fingerprint()

    def test_captions_are_texts_where_there_are_no_classes(self, exported_vit, tmp_path):
        rng = np.random.default_rng(0)
        for name in ("a", "b"):
            pixels = rng.integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        (tmp_path / "table.csv").write_text("image,caption\na.png,a cat\na.png,my cat\nb.png,\n")
        samples = load_samples(tmp_path / "table.csv", exported_vit.clip.facts, num_images=9)
        assert len(samples.token_ids) == 1
        assert samples.right_N.tolist() == [0, NO_TEXT]
        images, texts = calibration_batches([samples])
        assert {each.shape[0] for each in (*images, *texts)} == {1}
        assert texts[0].shape == (1, len(samples.token_ids[0]))

    def test_a_loss_of_accuracy_on_them_is_refused(self, exported_vit):
        """A model that is near enough in cosine and chooses other texts."""
        clip, spec = exported_vit.clip, exported_vit.clip.spec
        samples = load_samples(OPENMOJI, spec.facts, num_images=64)
        token_ids = samples.token_ids[:64]
        encode_images = parity.onnx_encoder(exported_vit.image)
        encode_texts = parity.onnx_encoder(exported_vit.text)

        def check(noise: float) -> parity_report.ParityReport:
            rng = np.random.default_rng(0)
            offset = noise * rng.standard_normal(spec.embedding_dim).astype(np.float32)

            def encode(pixels):
                found = encode_images(pixels) + offset
                return found / np.linalg.norm(found, axis=1, keepdims=True)

            # The right text is what the reference chooses.
            right = (
                parity._reference_images(clip, samples.pixels_NSSC)
                @ np.concatenate([encode_texts(np.array([ids], np.int32)) for ids in token_ids]).T
            )
            known = samples.__class__(
                samples.name, samples.pixels_NSSC, token_ids, right.argmax(axis=1)
            )
            return parity.check(
                clip,
                encode_images=encode,
                encode_texts=encode_texts,
                precision="int8",
                samples=[known],
            )

        (choices,) = check(0.0).choices
        assert (choices.reference_top1, choices.agreement, choices.passed) == (1.0, 1.0, True)
        with pytest.raises(ParityError, match=r"right for 0\.\d+ of the 64 images of openmoji"):
            check(0.012)


def test_it_is_served_by_the_real_triton(tmp_path, exported_vit):
    """The command, INT8 from random weights, and what the server answers."""
    repository = tmp_path / "repository"
    command = [
        *(sys.executable, "-m", "export.onnx", "--model", "RN26@64px", "--weights", "random"),
        *("--precision", "int8", "--name", "small", "--repository", str(repository)),
        *("--cache", str(tmp_path / "cache"), "--max-batch-size", "8"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = r"INT8 is (faster|slower) than FP32 .*images (are|take) [\d.]+ times"
    assert re.search(found, done.stdout)
    assert sorted(path.name for path in (repository / "small_image/1").iterdir()) == [
        *("config.pbtxt", "dlpack.py", "model.bin", "model.py", "model.xml", "parity.json"),
        *("processor.py", "runtime_choice.py", "runtimes.py"),
    ]
    pixels = probes.images(64)
    direct = int8.load_openvino(repository / "small_image/1/model.xml", 1)
    with clip_rt.Client(repository=repository) as client:
        served = client.encode_images(list(pixels))
    np.testing.assert_allclose(served, direct(pixels), atol=1e-5)
