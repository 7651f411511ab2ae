"""A bundle arrives as it was packed and is served, or it is refused and nothing changes."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_repository import MANIFEST

import clip_rt
from clip_rt.errors import InputError
from export import bundle, probes
from export.repository import publish
from export.triton_config import Serving, read_manifest, read_serving
from export.triton_config import read_config as config_of

MODEL = "drawings"


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    """The bundled model."""
    file = tmp_path_factory.mktemp("bundle") / "drawings.tar"
    bundle.pack("model_repository", MODEL, file)
    return file


def read(file: Path) -> dict[str, bytes]:
    with tarfile.open(file) as tar:
        return {each.name: tar.extractfile(each).read() for each in tar.getmembers()}


def write(file: Path, members, kind=tarfile.REGTYPE, odd=None) -> Path:
    """Write pairs of name and content; the member `odd` is of another kind."""
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            if name == odd:
                header.type, header.linkname, header.size = kind, "/etc/passwd", 0
            tar.addfile(header, io.BytesIO(content))
    return file


def relist(contents: dict[str, bytes], **changes) -> dict[str, bytes]:
    """Return them with an index that is right about each file, and some fields changed."""
    index = json.loads(contents[bundle.INDEX])
    index["files"] = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
        if name != bundle.INDEX
    }
    return contents | {bundle.INDEX: json.dumps(index | changes).encode()}


def test_what_arrives_is_served_with_the_same_embeddings(tmp_path, packed):
    with clip_rt.Client() as client:
        expected = client.encode_texts(["a drawing of a ship"])
        pixels = list(probes.images(client.manifest.side_px)[:2])
        images = client.encode_images(pixels)
    target = tmp_path / "new" / "models"
    command = [sys.executable, "-m", "export.bundle", "unpack"]
    command += ["--file", str(packed), "--repository", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with clip_rt.Client(repository=target) as client:
        np.testing.assert_array_equal(client.encode_texts(["a drawing of a ship"]), expected)
        np.testing.assert_array_equal(client.encode_images(pixels), images)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert sorted(path.name for path in target.parent.iterdir()) == ["models"]


def test_the_same_model_gives_the_same_bytes(tmp_path, packed):
    bundle.pack("model_repository", MODEL, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == packed.read_bytes()


def test_a_file_that_exists_is_not_replaced(packed):
    before = packed.read_bytes()
    with pytest.raises(InputError, match="exists"):
        bundle.pack("model_repository", MODEL, packed)
    assert packed.read_bytes() == before


def test_an_unknown_model_is_named(tmp_path):
    with pytest.raises(InputError, match="holds no model 'nothing'"):
        bundle.pack("model_repository", "nothing", tmp_path / "x.tar")
    assert list(tmp_path.iterdir()) == []


def test_how_it_is_served_and_what_the_gate_measured_travel_too(tmp_path, packed):
    contents = read(packed)
    plan = {tower: tmp_path / f"{tower}.plan" for tower in ("image", "text")}
    for each in plan.values():
        each.write_bytes(b"an engine")
    serving = Serving(
        backend="tensorrt", device="gpu", num_instances=3, max_batch_size=16, max_queue_delay_us=7
    )
    manifest = replace(MANIFEST, model="fleet")
    for capability in ("8.0", "8.9"):
        publish(
            tmp_path / "models", manifest, **plan, serving=serving, report={"passed": True},
            compute_capability=capability, join=True,
        )  # fmt: skip
    sent = bundle.pack(tmp_path / "models", "fleet", tmp_path / "fleet.tar")
    found, folders = bundle.unpack(tmp_path / "fleet.tar", tmp_path / "there")
    assert sent.report == found.report == {"passed": True}
    assert found.serving == read_serving(config_of(folders[0])) == serving
    assert read_manifest(folders[1]) == manifest
    names = {path.name for path in (folders[0] / "1").iterdir()}
    assert names == {"config.pbtxt", "parity.json", "model-8.0.plan", "model-8.9.plan"}
    assert dict(config_of(folders[0]).cc_model_filenames) == {
        "8.0": "model-8.0.plan",
        "8.9": "model-8.9.plan",
    }
    assert bundle.VOCABULARY in contents


def flipped(contents):
    name = "image/model.onnx"
    return contents | {name: contents[name][:-1] + bytes([contents[name][-1] ^ 1])}


def other_tower(contents):
    config = contents["text/config.pbtxt"]
    fingerprint = read_manifest(Path("model_repository/drawings_text")).fingerprint.encode()
    config = config.replace(fingerprint, fingerprint[::-1])
    return relist(contents | {"text/config.pbtxt": config})


TAMPERED = {
    "a changed byte": (flipped, "sha256"),
    "a longer file": (lambda c: c | {"parity.json": b" " * 10**5}, "parity.json|does not list"),
    "no weights": (
        lambda c: relist({k: v for k, v in c.items() if k != "text/model.onnx"}),
        "a model",
    ),
    "no index": (lambda c: {k: v for k, v in c.items() if k != "bundle.json"}, "begin with"),
    "an unlisted file": (lambda c: c | {"image/model.xml": b"x"}, "does not list"),
    "a path upwards": (lambda c: relist(c | {"image/../../x": b"x"}), "no bundle has"),
    "code": (lambda c: relist(c | {"image/model.py": b"x"}), "no bundle has"),
    "another format": (lambda c: relist(c, format=3), "format 3"),
    "an index that is a list": (lambda c: c | {"bundle.json": b"[]"}, "not what clip_rt writes"),
    "an index nested deeply": (lambda c: c | {"bundle.json": b"[" * 10**5}, "not what clip_rt"),
    "a huge index": (lambda c: c | {"bundle.json": b" " * 2**21}, "at most"),
    "another vocabulary": (
        lambda c: relist(c | {bundle.VOCABULARY: b"words"}),
        "vocabulary is not that",
    ),
    "two models": (other_tower, "two models"),
    "a config that is none": (
        lambda c: relist(c | {"image/config.pbtxt": b"nonsense {"}),
        "image/config.pbtxt.*nonsense",
    ),
    "another backend": (
        lambda c: relist(
            c
            | {
                "image/config.pbtxt": c["image/config.pbtxt"].replace(
                    b'backend: "python"', b'backend: "dali"'
                )
            }
        ),
        "'dali'",
    ),
    "weights elsewhere": (lambda c: relist(c | {"image/model.onnx": b"\x08"}), "no ONNX file"),
}


def refuse(file: Path, match: str, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    repository.mkdir()
    with pytest.raises(InputError, match=match):
        bundle.verify(file)
    with pytest.raises(InputError, match=match):
        bundle.unpack(file, repository)
    assert list(repository.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "models"]


@pytest.mark.parametrize("case", TAMPERED)
def test_what_was_changed_is_refused(tmp_path, packed, case):
    change, match = TAMPERED[case]
    file = write(tmp_path / "bad.tar", change(read(packed)).items())
    refuse(file, match, tmp_path)


def test_a_file_that_comes_twice_is_refused(tmp_path, packed):
    members = [*read(packed).items()]
    refuse(write(tmp_path / "bad.tar", [*members, members[-1]]), "does not list", tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_a_link_or_device_is_refused(tmp_path, packed, kind):
    members = read(packed).items()
    file = write(tmp_path / "bad.tar", members, kind, "text/config.pbtxt")
    refuse(file, "does not list", tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 600, 5_000, -200_000])
def test_a_file_that_was_cut_off_is_refused(tmp_path, packed, keep):
    file = tmp_path / "bad.tar"
    file.write_bytes(packed.read_bytes()[:keep])
    refuse(file, "no bundle|damaged|cut off|not what", tmp_path)


def test_other_templates_are_a_warning(tmp_path, packed):
    changed = relist(read(packed) | {bundle.TEMPLATES: b"{}"})
    file = write(tmp_path / "other.tar", changed.items())
    (warning,) = bundle.verify(file).warnings
    assert "templates" in warning


def test_a_full_disk_leaves_no_bundle(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        bundle.pack("model_repository", MODEL, tmp_path / "x.tar")
    assert list(tmp_path.iterdir()) == []


def test_the_command_packs_and_verifies(tmp_path):
    file = tmp_path / "drawings.tar"
    for arguments, expected in (
        (["pack", "--name", MODEL, "--file", str(file)], 0),
        (["verify", "--file", str(file)], 0),
        (["verify", "--file", str(tmp_path / "none.tar")], 1),
    ):
        command = [sys.executable, "-m", "export.bundle", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == expected, done.stdout + done.stderr
        assert done.stderr.startswith("error: there is no file") == bool(expected)
