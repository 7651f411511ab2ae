"""One exported model, served by the real Triton with OpenVINO and with ONNX Runtime: the same."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

import clip_rt
from clip_rt.deadline import Deadline
from clip_rt.embedded.server import EmbeddedServer
from clip_rt.specs import image_model, text_model
from clip_rt.wire.canary import TEXT
from clip_rt.wire.transport import Transport
from export import probes
from export.pipeline import make_manifest
from export.repository import configure, publish
from export.triton_config import Serving

RUNTIMES = ("onnxruntime", "openvino")

pytest.importorskip("openvino")
pytestmark = pytest.mark.skipif(
    # Not imported: other tests put another wheel in its place.
    importlib.util.find_spec("pytriton") is None,
    reason="the embedded server is not installed",
)


@pytest.fixture(scope="module")
def repository(exported_vit, exported_resnet, tmp_path_factory):
    """Each model under a name for each runtime."""
    folder = tmp_path_factory.mktemp("models")
    for kind, exported in (("vit", exported_vit), ("resnet", exported_resnet)):
        for runtime in RUNTIMES:
            publish(
                folder,
                make_manifest(
                    exported.clip,
                    f"{kind} {runtime}",
                    precision="fp32",
                    weights_fingerprint="a" * 64,
                ),
                image=exported.image,
                text=exported.text,
                serving=Serving(runtime=runtime),
            )
    return folder


@pytest.fixture(scope="module")
def server(repository):
    with EmbeddedServer(repository) as server:
        yield server


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_both_runtimes_answer_the_same(server, kind, exported_vit, exported_resnet):
    clip = {"vit": exported_vit, "resnet": exported_resnet}[kind].clip
    pixels = list(probes.images(clip.spec.side_px))
    # Every length up to the whole context, alone, and merged with others.
    texts = [" ".join(["so"] * length) for length in range(1, 76, 5)]
    found = []
    for runtime in RUNTIMES:
        with clip_rt.Client(server.url, model=f"{kind} {runtime}") as client:
            alone = np.concatenate([client.encode_texts([text]) for text in texts])
            found.append((client.encode_images(pixels), client.encode_texts(texts), alone))
    (images, together, alone), (images_too, together_too, alone_too) = found
    assert np.abs(images[0] - images[-1]).max() > 1e-3
    np.testing.assert_allclose(images, images_too, atol=4e-6)
    np.testing.assert_allclose(together, together_too, atol=4e-6)
    np.testing.assert_allclose(alone, alone_too, atol=4e-6)
    np.testing.assert_allclose(together_too, alone_too, atol=4e-6)


def test_what_runs_it_is_told(server):
    transport = Transport(server.url, may_cancel=False)
    try:
        for runtime in RUNTIMES:
            name = f"vit {runtime}"
            for tower in transport.describe(
                [image_model(name), text_model(name)], Deadline.after(9)
            ):
                assert tower.runs_on == f"the python backend, 1 on CPU, runtime {runtime}"
    finally:
        transport.close()


def test_the_switch_needs_no_export(repository):
    configure(repository, "vit onnxruntime", runtime="auto")
    with clip_rt.Client(repository=repository, model="vit onnxruntime") as client:
        assert np.linalg.norm(client.encode_texts([TEXT])[0]) == pytest.approx(1, abs=1e-5)
