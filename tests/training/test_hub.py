"""Weights from the hub are pinned, verified and resumed; without a network, the way out is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_clip as tiny
import torch
from hub_server import COMMIT, REPOSITORY, Hub, serve
from safetensors.torch import save, save_file

from clip_rt.errors import CheckpointError
from clip_rt.specs import MODELS
from training.weights import hub
from training.weights.load import load_clip

ROOT = Path(__file__).parents[2]
MODEL = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
IDENTIFIER = f"hf:{REPOSITORY}"

FETCH = """
import json, logging, sys
from clip_rt.errors import ClipRTError
from training.weights.hub import fetch
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
try:
    found = fetch(sys.argv[1])
    print(json.dumps({"folder": str(found.folder), "files": [f.name for f in found.files],
                      "commit": found.commit}))
except ClipRTError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


def fetch(home: Path, identifier: str, *, endpoint: str = "", offline: bool = False):
    """Run `hub.fetch` as a user does: what is in the environment counts at import."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = kept | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint or "http://127.0.0.1:9"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, "-c", FETCH, identifier],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1]) | {"log": result.stderr}


@pytest.fixture(scope="module")
def weights() -> bytes:
    return save(tiny.make(tiny.VIT).state_dict())


def open_clip_config(**model_cfg) -> bytes:
    config = {
        "embed_dim": 48,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2},
    }
    return json.dumps({"model_cfg": config | model_cfg, "preprocess_cfg": {}}).encode()


@pytest.fixture
def repository(weights):
    files = {
        MODEL: weights,
        CONFIG: open_clip_config(),
        "pytorch_model.bin": b"never asked for",
        "README.md": b"never asked for",
    }
    with serve(Hub(files, large=frozenset({MODEL, "pytorch_model.bin"}))) as server:
        yield server


class TestDownload:
    def test_a_revision_is_pinned_and_only_what_is_needed_is_fetched(self, repository, tmp_path):
        found = fetch(tmp_path, IDENTIFIER, endpoint=repository.url)
        assert found["commit"] == COMMIT
        assert found["files"] == [MODEL]
        assert f"{IDENTIFIER} is commit {COMMIT}" in found["log"]
        folder = Path(found["folder"])
        assert folder.name == COMMIT
        assert {path.name for path in folder.iterdir()} == {MODEL, CONFIG}
        loaded = load_clip(tiny.VIT, folder)
        assert torch.equal(loaded.visual.proj, tiny.make(tiny.VIT).visual.proj)

        again = fetch(tmp_path, f"{IDENTIFIER}@{COMMIT}", endpoint=repository.url)
        assert again["folder"] == found["folder"]
        assert repository.downloads(MODEL) == [None]

    def test_a_broken_connection_is_taken_up_where_it_stopped(self, repository, tmp_path, weights):
        repository.break_off.add(MODEL)
        found = fetch(tmp_path, IDENTIFIER, endpoint=repository.url)
        first, second = repository.downloads(MODEL)
        assert first is None
        # The client keeps whole chunks of 10 MiB; half a chunk is fetched again.
        assert second == f"bytes={10 * 2**20}-"
        assert (Path(found["folder"]) / MODEL).read_bytes() == weights

    @pytest.mark.parametrize("name", [MODEL, CONFIG])
    def test_content_with_another_checksum_is_removed(self, repository, tmp_path, name):
        content = repository.files[name]
        repository.served[name] = content[:-2] + b"  "
        found = fetch(tmp_path, IDENTIFIER, endpoint=repository.url)
        assert found["error"] == "CheckpointError"
        assert f"the hub states {repository.checksum(name)}" in found["message"]
        repository.served.clear()
        repaired = fetch(tmp_path, IDENTIFIER, endpoint=repository.url)
        assert (Path(repaired["folder"]) / name).read_bytes() == content

    def test_an_unknown_repository(self, repository, tmp_path):
        found = fetch(tmp_path, "hf:someone/else", endpoint=repository.url)
        assert found["error"] == "CheckpointError"
        assert "the hub has no hf:someone/else, or it is private" in found["message"]

    def test_shards_are_all_fetched(self, repository, tmp_path):
        tensors = tiny.make(tiny.VIT).state_dict()
        names = sorted(tensors)
        shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
        index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
        repository.files = {"model.safetensors.index.json": json.dumps(index).encode()} | {
            file: save({name: tensors[name] for name in part}) for file, part in shards.items()
        }
        repository.large = frozenset(shards)
        found = fetch(tmp_path, IDENTIFIER, endpoint=repository.url)
        assert found["files"] == sorted(shards)
        loaded = load_clip(tiny.VIT, found["folder"])
        assert all(torch.equal(loaded.state_dict()[name], tensors[name]) for name in names)


class TestOffline:
    def test_the_error_says_what_to_run_and_what_to_copy(self, tmp_path):
        found = fetch(tmp_path, f"{IDENTIFIER}@v1", offline=True)
        assert found["error"] == "CheckpointError"
        assert "HF_HUB_OFFLINE is set" in found["message"]
        assert f"hf download {REPOSITORY} --revision v1 " in found["message"]
        assert "copy the folder some-clip here and pass its path" in found["message"]

    def test_no_network_is_the_same_error(self, tmp_path):
        found = fetch(tmp_path, IDENTIFIER)
        assert found["error"] == "CheckpointError"
        assert "the hub cannot be reached" in found["message"]

    def test_the_cache_answers_and_is_verified(self, repository, tmp_path):
        online = fetch(tmp_path, IDENTIFIER, endpoint=repository.url)
        for arguments in ({"offline": True}, {}):
            offline = fetch(tmp_path, IDENTIFIER, **arguments)
            assert offline["folder"] == online["folder"]
            assert offline["commit"] == COMMIT
            assert "is read from the cache" in offline["log"]
        blob = (Path(online["folder"]) / MODEL).resolve()
        blob.chmod(0o644)
        blob.write_bytes(blob.read_bytes()[:-1] + b"!")
        damaged = fetch(tmp_path, IDENTIFIER, offline=True)
        assert "is damaged and was removed" in damaged["message"]
        assert not blob.exists()

    def test_weights_whose_config_is_missing_are_not_taken_for_whole(self, repository, tmp_path):
        """As another program leaves them: nothing would say which activation they have."""
        online = fetch(tmp_path, IDENTIFIER, endpoint=repository.url)
        (Path(online["folder"]) / CONFIG).unlink()
        offline = fetch(tmp_path, f"{IDENTIFIER}@{COMMIT}", offline=True)
        assert offline["error"] == "CheckpointError"
        again = fetch(tmp_path, f"{IDENTIFIER}@{COMMIT}", endpoint=repository.url)
        assert (Path(again["folder"]) / CONFIG).is_file()
        assert repository.downloads(MODEL) == [None]

    def test_a_missing_shard_is_fetched(self, repository, tmp_path):
        tensors = tiny.make(tiny.VIT).state_dict()
        index = {"weight_map": dict.fromkeys(tensors, "one.safetensors")}
        repository.files = {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "one.safetensors": save(tensors),
            CONFIG: b"{}",
        }
        repository.large = frozenset({"one.safetensors"})
        online = fetch(tmp_path, IDENTIFIER, endpoint=repository.url)
        (Path(online["folder"]) / "one.safetensors").unlink()
        again = fetch(tmp_path, f"{IDENTIFIER}@{COMMIT}", endpoint=repository.url)
        assert again["files"] == ["one.safetensors"]
        assert (Path(again["folder"]) / "one.safetensors").is_file()


class TestFolders:
    def test_a_repository_of_the_cache_is_read_by_its_main(self, tmp_path, weights):
        snapshot = tmp_path / "snapshots" / COMMIT
        (tmp_path / "blobs").mkdir()
        snapshot.mkdir(parents=True)
        (tmp_path / "blobs" / "abc").write_bytes(weights)
        (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
        with pytest.raises(CheckpointError, match=f"no snapshot of main.*{COMMIT}"):
            hub.open_folder(tmp_path)
        (tmp_path / "refs").mkdir()
        (tmp_path / "refs" / "main").write_text(COMMIT)
        found = hub.open_folder(tmp_path)
        assert (found.folder, found.commit) == (snapshot, COMMIT)
        assert load_clip(tiny.VIT, tmp_path).spec == tiny.VIT

    def test_the_preferred_file_is_taken(self, tmp_path):
        for name in reversed(hub.WEIGHTS):
            if name == hub.INDEX:
                content = {"weight_map": {"a": "model.safetensors"}}
                (tmp_path / name).write_text(json.dumps(content))
                continue
            (tmp_path / name).write_bytes(b"")
            assert hub.open_folder(tmp_path).files == (tmp_path / name,)

    def test_a_folder_without_weights(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"holds no weights.*looked for open_clip_model"):
            hub.open_folder(tmp_path)

    @pytest.mark.parametrize(
        "index",
        [
            {"weight_map": {"a": "../model.safetensors"}},
            {"weight_map": {"a": "missing.safetensors"}},
            {"weight_map": {"a": "/etc/passwd"}},
            {"weight_map": {"a": 3}},
            {"weight_map": {}},
            {},
        ],
    )
    def test_an_index_that_points_elsewhere(self, tmp_path, index):
        (tmp_path / "index").mkdir()
        (tmp_path / "model.safetensors").write_bytes(b"")
        (tmp_path / "index" / hub.INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"must be a \.safetensors file beside it"):
            hub.open_folder(tmp_path / "index")

    def test_shards_that_repeat_a_tensor(self, tmp_path):
        for name in ("one", "two"):
            save_file({"ln_final.bias": torch.zeros(64)}, tmp_path / f"{name}.safetensors")
        index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
        (tmp_path / hub.INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"repeats ln_final\.bias"):
            load_clip(tiny.VIT, tmp_path)


@pytest.mark.parametrize(
    "identifier",
    [
        "hf:clip",
        "hf:a/b/c",
        "hf:a/b@",
        "hf:../b@main",
        "hf:a/b@x y",
        "hf:a b/c",
        "hf:-a/b",
        "hf:a--b/c",
    ],
)
def test_what_is_no_identifier_is_refused(identifier):
    with pytest.raises(CheckpointError, match="no identifier of the hub"):
        hub.fetch(identifier)


def test_openais_weights_come_from_where_open_clip_has_them(open_clip):
    for name, repository in hub.OPENAI.items():
        theirs = name.replace("/", "-").replace("@", "-").removesuffix("px")
        config = open_clip.pretrained.get_pretrained_cfg(theirs, "openai")
        assert config["hf_hub"].rstrip("/") == repository
        assert config["quick_gelu"] == (MODELS[name].activation == "quick_gelu")


def test_openai_published_no_weights_for_the_larger_ones():
    with pytest.raises(CheckpointError, match="OpenAI published no weights for ViT-H/14"):
        load_clip(MODELS["ViT-H/14"], "openai")
