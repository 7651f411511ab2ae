"""The model repository: parses as Triton's own schema, and changes all at once or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from google.protobuf import text_format
from processes import running
from tritonclient.grpc import model_config_pb2

from clip_rt.errors import InputError
from clip_rt.specs import CLIP_MEAN, CLIP_STD
from clip_rt.wire.manifest import Manifest
from export import repository, version_folder
from export.models import list_versions, served_version
from export.repository import (
    RepositoryConfig,
    configure,
    main,
    publish,
    switch_version,
)
from export.triton_config import (
    Serving,
    read_config,
    read_manifest,
    read_serving,
    render_config,
)
from export.version_folder import PYTHON_MODEL

MANIFEST = Manifest(
    model="shop-v3",
    architecture="ViT-B/32",
    fingerprint="0" * 64,
    embedding_dim=512,
    side_px=224,
    context_length=77,
    text_buckets=(),
    logit_scale=100.0,
    logit_bias=0.0,
    activation="quick_gelu",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    precision="fp32",
    libraries={"torch": "2.13.0"},
)


@pytest.fixture
def towers(tmp_path):
    """ONNX files of nothing; publishing looks only for weights kept elsewhere."""
    files = {"image": tmp_path / "a.onnx", "text": tmp_path / "b.onnx"}
    for tower, path in files.items():
        path.write_bytes(onnx.ModelProto(doc_string=f"{tower} tower").SerializeToString())
    return files


PUBLISH = """
import sys
from pathlib import Path
from dataclasses import replace
sys.path[:0] = sys.argv[4:]
from test_repository import MANIFEST
from export.repository import publish
fingerprint, models, image = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
manifest = replace(MANIFEST, fingerprint=fingerprint * 64)
publish(models, manifest, image=image, text=image.with_name("b.onnx"))
"""


@contextmanager
def publishing(code, models, towers, fingerprint):
    """Publish from another process."""
    here = Path(__file__).parent
    arguments = [fingerprint, models, towers["image"], here, here.parent]
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with running(command, stdout=subprocess.PIPE, text=True) as process:
        yield process


@contextmanager
def failing(monkeypatch, number, how=KeyboardInterrupt, happened=True):
    """Let the n-th rename or replacement raise, after or before it has happened."""
    calls = []

    def wrap(move):
        def moves(source, target):
            calls.append(source)
            if len(calls) == number and not happened:
                raise how
            move(source, target)
            if len(calls) == number:
                raise how

        return moves

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(repository.os, name, wrap(getattr(os, name)))
        yield


def read_manifest_of(version_folder):
    config = text_format.Parse(
        (version_folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig()
    )
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    return Manifest.from_parameters(parameters, served="x")


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestConfig:
    def test_image_tower(self):
        config = render_config(MANIFEST, "image", Serving())
        assert (config.name, config.backend, config.max_batch_size) == (
            "shop_v3_image",
            "python",
            64,
        )
        (pixels,), (embeddings,) = config.input, config.output
        assert (pixels.name, list(pixels.dims)) == ("pixels", [224, 224, 3])
        assert pixels.data_type == model_config_pb2.TYPE_UINT8
        assert (embeddings.name, list(embeddings.dims)) == ("embeddings", [512])

    def test_text_tower_reads_any_length(self):
        config = render_config(MANIFEST, "text", Serving())
        assert config.name == "shop_v3_text"
        assert (config.input[0].name, list(config.input[0].dims)) == ("tokens", [-1])
        assert config.input[0].data_type == model_config_pb2.TYPE_INT32
        assert config.parameters["vocab_size"].string_value == "49408"

    @pytest.mark.parametrize("tower", ["image", "text"])
    @pytest.mark.parametrize("backend", ["python", "onnxruntime"])
    def test_parses_and_carries_the_manifest(self, tower, backend):
        manifest = replace(MANIFEST, libraries={"x": '"\\\n{}\u00fc'})
        config = render_config(manifest, tower, Serving(backend=backend))
        parsed = text_format.Parse(
            text_format.MessageToString(config), model_config_pb2.ModelConfig()
        )
        assert parsed == config
        parameters = {key: value.string_value for key, value in parsed.parameters.items()}
        assert Manifest.from_parameters(parameters, served="x") == manifest

    def test_a_queue_policy_is_there_only_when_asked_for(self):
        batching = render_config(MANIFEST, "image", Serving()).dynamic_batching
        assert not batching.HasField("default_queue_policy"), "it would cost 500 ms now and then"
        assert batching.max_queue_delay_microseconds <= 2000
        bounded = render_config(MANIFEST, "image", Serving(max_queue_size=8)).dynamic_batching
        assert bounded.default_queue_policy.max_queue_size == 8

    def test_how_long_a_request_waits_can_be_bounded(self):
        config = render_config(MANIFEST, "image", Serving(queue_timeout_us=5000))
        policy = config.dynamic_batching.default_queue_policy
        assert (policy.default_timeout_microseconds, policy.max_queue_size) == (5000, 0)
        assert policy.timeout_action == model_config_pb2.ModelQueuePolicy.REJECT

    def test_cuda_graphs_have_explicit_sizes_for_every_length(self):
        manifest = replace(MANIFEST, text_buckets=(16, 32, 77))
        serving = Serving(backend="tensorrt", device="gpu", cuda_graph_batch_sizes=(1, 4))
        image, text = (
            [
                (spec.batch_size, list(spec.input[name].dim))
                for spec in render_config(manifest, tower, serving).optimization.cuda.graph_spec
            ]
            for tower, name in (("image", "pixels"), ("text", "tokens"))
        )
        assert image == [(1, [224, 224, 3]), (4, [224, 224, 3])]
        assert text == [(size, [length]) for size in (1, 4) for length in (16, 32, 77)]

    @pytest.mark.parametrize("sizes", [(0,), (65,)])
    def test_cuda_graphs_of_no_batch_are_refused(self, sizes):
        with pytest.raises(InputError, match="1 to max_batch_size, 64"):
            Serving(backend="tensorrt", device="gpu", cuda_graph_batch_sizes=sizes)
        with pytest.raises(InputError, match="tensorrt backend only"):
            Serving(cuda_graph_batch_sizes=(1,))

    def test_a_gpu_is_warmed_up_for_one_and_for_the_largest_batch_of_every_length(self):
        manifest = replace(MANIFEST, text_buckets=(16, 32, 77))
        config = render_config(manifest, "text", Serving(backend="tensorrt", device="gpu"))
        found = [
            (each.batch_size, list(each.inputs["tokens"].dims)) for each in config.model_warmup
        ]
        assert found == [(size, [length]) for size in (1, 64) for length in (16, 32, 77)]
        assert len({each.name for each in config.model_warmup}) == 6

    @pytest.mark.parametrize(
        "serving",
        [
            Serving(),
            Serving(backend="onnxruntime", device="gpu", num_instances=2, max_queue_delay_us=0),
            Serving(max_queue_size=9, queue_timeout_us=7, max_batch_size=3, device="auto"),
            Serving(backend="tensorrt", device="gpu", cuda_graph_batch_sizes=(1, 8)),
            Serving(runtime="onnxruntime"),
            Serving(runtime="openvino", num_instances=2),
        ],
    )
    @pytest.mark.parametrize("tower", ["image", "text"])
    def test_how_it_is_served_can_be_read_back(self, serving, tower):
        config = render_config(replace(MANIFEST, text_buckets=(16, 77)), tower, serving)
        assert read_serving(config) == serving

    def test_a_config_that_names_no_runtime_leaves_it_open(self):
        config = render_config(MANIFEST, "image", Serving(runtime="openvino"))
        del config.parameters["runtime"]
        assert read_serving(config) == Serving(runtime="auto")
        config.parameters["runtime"].string_value = "tensorflow"
        with pytest.raises(InputError, match="runtime is 'tensorflow'; it must be auto, onnx"):
            read_serving(config)

    @pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
    @pytest.mark.parametrize(
        ("backend", "device"),
        [("python", "gpu"), ("python", "auto"), ("onnxruntime", "cpu"), ("tensorrt", "gpu")],
    )
    def test_a_runtime_where_it_means_nothing_is_refused(self, runtime, backend, device):
        Serving(backend=backend, device=device)
        with pytest.raises(InputError, match=f"is {backend} on {device}: leave it auto"):
            Serving(runtime=runtime, backend=backend, device=device)

    def test_onnxruntime_backend(self):
        config = render_config(MANIFEST, "image", Serving(backend="onnxruntime", device="gpu"))
        assert (config.backend, config.platform) == ("onnxruntime", "onnxruntime_onnx")
        assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU

    def test_warm_up_never_sends_random_tokens(self):
        (warmup,) = render_config(MANIFEST, "text", Serving()).model_warmup
        assert warmup.inputs["tokens"].zero_data

    @pytest.mark.parametrize(
        "field", ["num_instances", "max_batch_size", "max_queue_delay_us", "max_queue_size"]
    )
    def test_impossible_numbers_are_refused(self, field):
        with pytest.raises(InputError, match=f"{field} is -1"):
            Serving(**{field: -1})


class TestPublish:
    def test_writes_both_models_and_nothing_else(self, tmp_path, towers):
        folders = publish(tmp_path / "models", MANIFEST, **towers, report={"passed": True})
        assert [folder.name for folder in folders] == ["shop_v3_image", "shop_v3_text"]
        for folder, tower in zip(folders, ("image", "text"), strict=True):
            files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            assert files == {
                "config.pbtxt", "1/config.pbtxt", "1/parity.json", "1/model.onnx", "1/model.py",
                "1/dlpack.py", "1/processor.py", "1/runtime_choice.py", "1/runtimes.py",
            }  # fmt: skip
            assert (folder / "1/model.onnx").read_bytes() == towers[tower].read_bytes()
            assert (folder / "1/model.py").read_bytes() == PYTHON_MODEL.read_bytes()
            assert read_manifest(folder) == MANIFEST
        assert {path.name for path in tmp_path.iterdir()} == {"models", "a.onnx", "b.onnx"}

    def test_folders_can_be_read_by_the_server_of_another_user(self, tmp_path, towers):
        folders = publish(tmp_path / "models", MANIFEST, **towers)
        umask = os.umask(0o022)
        os.umask(umask)
        for folder in folders:
            assert folder.stat().st_mode & 0o777 == 0o777 & ~umask

    def test_the_onnxruntime_backend_gets_no_python(self, tmp_path, towers):
        for folder in publish(
            tmp_path / "models", MANIFEST, **towers, serving=Serving(backend="onnxruntime")
        ):
            assert {path.name for path in (folder / "1").iterdir()} == {
                "config.pbtxt",
                "model.onnx",
            }

    def test_replaces_its_own_earlier_model_and_spares_others(self, tmp_path, towers):
        models = tmp_path / "models"
        publish(models, replace(MANIFEST, model="other"), **towers)
        other = snapshot(models)
        publish(models, MANIFEST, **towers)
        publish(models, replace(MANIFEST, fingerprint="1" * 64), **towers)
        assert read_manifest(models / "shop_v3_text").fingerprint == "1" * 64
        assert {
            path: content for path, content in snapshot(models).items() if path in other
        } == other

    @pytest.mark.parametrize("how", [OSError, KeyboardInterrupt])
    @pytest.mark.parametrize("happened", [False, True])
    @pytest.mark.parametrize("failing_move", range(1, 5))
    def test_a_failure_leaves_the_earlier_model(
        self, tmp_path, towers, monkeypatch, failing_move, happened, how
    ):
        models = tmp_path / "models"
        publish(models, MANIFEST, **towers)
        before = snapshot(tmp_path)
        with failing(monkeypatch, failing_move, how, happened), pytest.raises(how):
            publish(models, replace(MANIFEST, fingerprint="1" * 64), **towers)
        assert snapshot(tmp_path) == before
        publish(models, replace(MANIFEST, fingerprint="1" * 64), **towers)
        assert {served_version(folder) for folder in models.iterdir()} == {2}

    @pytest.mark.parametrize("failing_move", range(1, 5))
    def test_a_first_export_that_fails_leaves_nothing(
        self, tmp_path, towers, monkeypatch, failing_move
    ):
        with failing(monkeypatch, failing_move), pytest.raises(KeyboardInterrupt):
            publish(tmp_path / "models", MANIFEST, **towers)
        assert not list((tmp_path / "models").iterdir())

    def test_a_full_disk_leaves_the_earlier_model(self, tmp_path, towers, monkeypatch):
        models = tmp_path / "models"
        publish(models, MANIFEST, **towers)
        before = snapshot(tmp_path)

        def full(source, target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

        monkeypatch.setattr(version_folder.shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            publish(models, MANIFEST, **towers)
        assert snapshot(tmp_path) == before

    def test_what_a_killed_export_leaves_is_put_right_by_the_next(self, tmp_path, towers):
        """Killed at the worst moment: one tower is of the new version, the other of the old."""
        models = tmp_path / "models"
        publish(models, MANIFEST, **towers)
        stop = """
import os, time
replace_file, calls = os.replace, []
def stop(*paths):
    calls.append(paths)
    if len(calls) == 2:
        print("now", flush=True)
        time.sleep(60)
    replace_file(*paths)
os.replace = stop
manifest ="""
        code = PUBLISH.replace("\nmanifest =", stop)
        with publishing(code, models, towers, "1") as process:
            assert process.stdout.readline() == "now\n"
            process.kill()
        served = {served_version(folder) for folder in models.iterdir()}
        assert served == {1, 2}
        assert len(list(tmp_path.glob(".clip_rt-*"))) == 1
        publish(models, replace(MANIFEST, fingerprint="2" * 64), **towers)
        assert {served_version(folder) for folder in models.iterdir()} == {3}
        assert {read_manifest(folder).fingerprint[0] for folder in models.iterdir()} == {"2"}
        assert not list(tmp_path.glob(".clip_rt-*"))

    def test_two_exports_at_once_become_two_versions(self, tmp_path, towers):
        models = tmp_path / "models"
        publish(models, MANIFEST, **towers)
        with (
            publishing(PUBLISH, models, towers, "1") as first,
            publishing(PUBLISH, models, towers, "2") as second,
        ):
            assert (first.wait(60), second.wait(60)) == (0, 0)
        for folder in models.iterdir():
            assert (list_versions(folder), served_version(folder)) == ([3, 2], 3)
        fingerprints = [
            {read_manifest_of(folder / str(version)).fingerprint[0] for folder in models.iterdir()}
            for version in (2, 3)
        ]
        assert sorted(fingerprints, key=min) == [{"1"}, {"2"}]

    def test_a_version_that_config_names_outlives_an_undo_that_fails(
        self, tmp_path, towers, monkeypatch
    ):
        models = tmp_path / "models"
        publish(models, MANIFEST, **towers)
        calls, replace_file = [], repository.os.replace

        def fail_from_the_second_on(source, target):
            calls.append(source)
            if len(calls) > 1:
                raise OSError("the disk is gone")
            replace_file(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(repository.os, "replace", fail_from_the_second_on)
            with pytest.raises(OSError, match="the disk is gone"):
                publish(models, MANIFEST, **towers)
        versions = {folder.name: served_version(folder) for folder in models.iterdir()}
        assert versions == {"shop_v3_image": 2, "shop_v3_text": 1}
        for folder in models.iterdir():
            assert (folder / str(versions[folder.name]) / "model.onnx").is_file()

    def test_an_export_spares_what_one_into_a_neighbour_is_making(self, tmp_path, towers):
        (tmp_path / "models-v2").mkdir()
        with repository.staging_folder(tmp_path / "models-v2") as staging:
            publish(tmp_path / "models", MANIFEST, **towers)
            assert staging.is_dir()

    def test_a_name_taken_while_it_waits_is_refused(self, tmp_path, towers, monkeypatch):
        models, alone = tmp_path / "models", repository.alone

        @contextmanager
        def wait_for_another(folder):
            with monkeypatch.context() as patch:
                patch.setattr(repository, "alone", alone)
                publish(models, replace(MANIFEST, model="Shop v3"), **towers)
            with alone(folder):
                yield

        monkeypatch.setattr(repository, "alone", wait_for_another)
        with pytest.raises(InputError, match="holds the model 'Shop v3'"):
            publish(models, MANIFEST, **towers)
        assert {served_version(folder) for folder in models.iterdir()} == {1}

    def test_an_int8_model_comes_with_its_weights(self, tmp_path, towers):
        for tower in towers:
            folder = tmp_path / tower
            folder.mkdir()
            (folder / "model.xml").write_text("<net/>")
            (folder / "model.bin").write_bytes(b"weights")
            towers[tower] = folder / "model.xml"
        folder, _ = publish(tmp_path / "models", MANIFEST, **towers)
        names = sorted(path.name for path in (folder / "1").iterdir())
        assert names == [
            "config.pbtxt", "dlpack.py", "model.bin", "model.py", "model.xml", "processor.py",
            "runtime_choice.py", "runtimes.py",
        ]  # fmt: skip

    def test_the_tensorrt_backend_gets_engines_and_a_profile_for_each_length(
        self, tmp_path, towers
    ):
        manifest = replace(MANIFEST, text_buckets=(16, 32, 77))
        serving = Serving(backend="tensorrt", device="gpu")
        folders = publish(tmp_path / "models", manifest, **towers, serving=serving)
        for folder, profiles in zip(folders, ([], ["0", "1", "2"]), strict=True):
            names = sorted(path.name for path in (folder / "1").iterdir())
            assert names == ["config.pbtxt", "model.plan"]
            config = read_config(folder)
            assert config.platform == "tensorrt_plan"
            assert list(config.instance_group[0].profile) == profiles

    def test_a_fleet_of_mixed_gpus_has_an_engine_for_each(self, tmp_path, towers):
        models, serving = tmp_path / "models", Serving(backend="tensorrt", device="gpu")
        manifest = replace(MANIFEST, text_buckets=(16, 77))

        def export(capability, **changes):
            for path in towers.values():
                path.write_bytes(f"{path.name} for {capability}".encode())
            return publish(
                models,
                replace(manifest, **changes),
                **towers,
                serving=serving,
                compute_capability=capability,
                join=True,
            )

        export("8.9")
        for folder in export("9.0"):
            names = {"8.9": "model-8.9.plan", "9.0": "model-9.0.plan"}
            assert dict(read_config(folder).cc_model_filenames) == names
            for capability, name in names.items():
                tower = towers[folder.name.removeprefix("shop_v3_")].name
                assert (folder / "2" / name).read_text() == f"{tower} for {capability}"
        configure(models, "shop-v3", num_instances=2)
        assert dict(read_config(models / "shop_v3_text").cc_model_filenames) == names
        before = snapshot(models)
        for changes in ({"fingerprint": "1" * 64}, {"libraries": {"tensorrt": "11.0"}}):
            with pytest.raises(InputError, match=f"{next(iter(changes))} differ"):
                export("7.5", **changes)
        assert snapshot(models) == before
        # The same kind of GPU again replaces its own.
        folder, _ = export("9.0")
        assert dict(read_config(folder).cc_model_filenames) == names

    def test_a_missing_tower_publishes_nothing(self, tmp_path, towers):
        towers["text"].unlink()
        with pytest.raises(FileNotFoundError):
            publish(tmp_path / "models", MANIFEST, **towers)
        assert not list((tmp_path / "models").iterdir())

    def test_a_repository_on_a_volume_of_its_own(self, tmp_path, towers, monkeypatch):
        monkeypatch.setattr(repository.os, "access", lambda *_: False)
        publish(tmp_path / "models", MANIFEST, **towers)
        names = {path.name for path in (tmp_path / "models").iterdir()}
        assert names == {"shop_v3_image", "shop_v3_text"}

    def test_the_repository_may_be_a_link(self, tmp_path, towers):
        (tmp_path / "real").mkdir()
        (tmp_path / "models").symlink_to(tmp_path / "real")
        publish(tmp_path / "models", MANIFEST, **towers)
        assert (tmp_path / "real" / "shop_v3_image" / "config.pbtxt").exists()


class TestNames:
    @pytest.mark.parametrize(
        "name", ["", "../etc", "a/../b", "/abs", "-rf", "a\nb", 'a"b', "a;b", "a$b", "x" * 65, "…"]
    )
    def test_unsafe_names_are_refused(self, tmp_path, towers, name):
        with pytest.raises(InputError):
            publish(tmp_path / "models", replace(MANIFEST, model=name), **towers)
        assert not (tmp_path / "models").exists()

    @pytest.mark.parametrize("name", ["ViT-L/14@336px", "shop-v3", "shop v3", "RN26@64px", "a"])
    def test_usual_names_are_accepted(self, tmp_path, name):
        repository.check_name(name, tmp_path)

    def test_two_names_with_one_slug_do_not_replace_each_other(self, tmp_path, towers):
        publish(tmp_path, MANIFEST, **towers)
        before = snapshot(tmp_path)
        with pytest.raises(InputError, match=r"holds the model 'shop-v3'.*another --name"):
            publish(tmp_path, replace(MANIFEST, model="Shop v3"), **towers)
        assert snapshot(tmp_path) == before

    @pytest.mark.parametrize("content", [None, "not a config {", 'name: "shop_v3_image"'])
    def test_a_folder_that_is_not_ours_is_never_replaced(self, tmp_path, towers, content):
        folder = tmp_path / "shop_v3_image"
        folder.mkdir()
        if content is not None:
            (folder / "config.pbtxt").write_text(content)
        with pytest.raises(InputError, match="holds no clip_rt model"):
            publish(tmp_path, MANIFEST, **towers)
        assert not (tmp_path / "shop_v3_text").exists()


class TestVersions:
    """Each export is a version; the one before stays, and can be served again."""

    @pytest.fixture
    def models(self, tmp_path, towers):
        models = tmp_path / "models"
        for number in (1, 2, 3):
            publish(models, replace(MANIFEST, fingerprint=str(number) * 64), **towers)
        return models

    def fingerprints(self, models):
        return {read_manifest(folder).fingerprint[0] for folder in models.iterdir()}

    def test_the_newest_is_served_and_one_before_it_kept(self, models):
        for folder in models.iterdir():
            assert list_versions(folder) == [3, 2]
            assert served_version(folder) == 3
        assert self.fingerprints(models) == {"3"}

    def test_rolling_back_serves_the_one_before_and_again_the_newest(self, models):
        assert switch_version(models, "shop-v3") == 2
        assert self.fingerprints(models) == {"2"}
        assert {served_version(folder) for folder in models.iterdir()} == {2}
        assert switch_version(models, "shop-v3", 3) == 3
        assert self.fingerprints(models) == {"3"}

    def test_what_is_not_there_is_refused_with_what_is(self, models):
        before = snapshot(models)
        with pytest.raises(InputError, match=r"no version 1 to go to .* has 2, 3, and serves"):
            switch_version(models, "shop-v3", 1)
        switch_version(models, "shop-v3", 2)
        with pytest.raises(InputError, match=r"no version before 2"):
            switch_version(models, "shop-v3")
        switch_version(models, "shop-v3", 3)
        with pytest.raises(InputError, match="holds no model 'other'"):
            switch_version(models, "other")
        assert snapshot(models) == before

    @pytest.mark.parametrize("failing_move", [1, 2])
    def test_a_failed_roll_back_changes_nothing(self, models, monkeypatch, failing_move):
        before = snapshot(models)
        with failing(monkeypatch, failing_move), pytest.raises(KeyboardInterrupt):
            switch_version(models, "shop-v3")
        assert snapshot(models) == before

    def test_a_version_is_removed_as_a_whole_or_not_at_all(self, models, towers, monkeypatch):
        def interrupted(folder, *_, **__):
            """Remove a file, and be killed."""
            next(path for path in sorted(Path(folder).rglob("model.onnx"))).unlink()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", interrupted)
            patch.setattr("tempfile._shutil.rmtree", interrupted)
            with pytest.raises(KeyboardInterrupt):
                publish(models, replace(MANIFEST, fingerprint="4" * 64), **towers)
        for folder in models.iterdir():
            for version in list_versions(folder):
                assert (folder / str(version) / "model.onnx").is_file()

    def test_version_0_is_no_roll_back(self, models):
        with pytest.raises(InputError, match=r"no version 0 to go to .* has 2, 3, and serves 3"):
            switch_version(models, "shop-v3", 0)

    def test_what_was_served_before_is_kept_though_it_is_not_the_newest(self, models, towers):
        switch_version(models, "shop-v3")
        publish(models, MANIFEST, **towers)
        for folder in models.iterdir():
            assert list_versions(folder) == [4, 2]

    def test_a_version_without_a_config_of_its_own_is_not_gone_back_to(self, models):
        for folder in models.iterdir():
            (folder / "2/config.pbtxt").unlink()
        with pytest.raises(InputError, match=r"no version before 3 to go to .* has 3, and serves"):
            switch_version(models, "shop-v3")

    def test_a_version_after_a_roll_back_has_a_new_number(self, models, towers):
        switch_version(models, "shop-v3")
        publish(models, MANIFEST, **towers, keep_versions=3)
        for folder in models.iterdir():
            assert (list_versions(folder), served_version(folder)) == ([4, 3, 2], 4)

    def test_serving_changes_without_an_export_and_stays_with_its_version(self, models):
        before = snapshot(models)
        serving = configure(models, "shop-v3", max_queue_size=5, num_instances=3)
        assert serving == Serving(max_queue_size=5, num_instances=3)
        after = snapshot(models)
        changed = {path.relative_to(models) for path in after if after[path] != before.get(path)}
        assert changed == {
            Path(f"shop_v3_{tower}/{where}config.pbtxt")
            for tower in ("image", "text")
            for where in ("", "3/")
        }
        switch_version(models, "shop-v3", 2)
        assert read_serving(read_config(models / "shop_v3_text")) == Serving()
        switch_version(models, "shop-v3", 3)
        assert read_serving(read_config(models / "shop_v3_text")) == serving

    def test_another_backend_gets_what_it_needs_or_is_refused(self, models):
        configure(models, "shop-v3", backend="onnxruntime", device="gpu")
        config = read_config(models / "shop_v3_image")
        assert (config.platform, config.version_policy.specific.versions[0]) == (
            "onnxruntime_onnx",
            3,
        )
        (models / "shop_v3_image/3/model.py").unlink()
        configure(models, "shop-v3", backend="python", device="cpu")
        assert (models / "shop_v3_image/3/model.py").is_file()
        before = snapshot(models)
        with pytest.raises(InputError, match=r"tensorrt backend runs model\.plan.*holds none"):
            configure(models, "shop-v3", backend="tensorrt", device="gpu")
        assert snapshot(models) == before

    def test_the_runtime_changes_without_an_export(self, models):
        main(RepositoryConfig(repository=models, name="shop-v3", runtime="openvino"))
        for folder in models.iterdir():
            assert read_config(folder).parameters["runtime"].string_value == "openvino"
        with pytest.raises(InputError, match="runtime openvino is of the python backend on cpu"):
            configure(models, "shop-v3", device="gpu")
        configure(models, "shop-v3", device="gpu", runtime="auto")
        assert read_serving(read_config(models / "shop_v3_text")) == Serving(device="gpu")

    def test_int8_is_not_given_to_onnx_runtime(self, models):
        for folder in models.iterdir():
            (folder / "3/model.onnx").rename(folder / "3/model.xml")
        before = snapshot(models)
        with pytest.raises(InputError, match="only OpenVINO runs: leave --runtime auto"):
            configure(models, "shop-v3", runtime="onnxruntime")
        assert snapshot(models) == before
        assert configure(models, "shop-v3", runtime="openvino") == Serving(runtime="openvino")

    @pytest.mark.parametrize("failing_move", range(1, 5))
    def test_a_failed_change_of_serving_changes_nothing(self, models, monkeypatch, failing_move):
        before = snapshot(models)
        with failing(monkeypatch, failing_move), pytest.raises(KeyboardInterrupt):
            configure(models, "shop-v3", num_instances=2)
        assert snapshot(models) == before

    def test_the_command_lists_and_rolls_back(self, models, capsys):
        main(RepositoryConfig(repository=models, name="shop-v3", rollback=True))
        printed = capsys.readouterr().out
        assert "shop-v3 is published in version 2" in printed
        assert "python -m clip_rt reload --port PORT" in printed
        assert "Client.reload()" in printed
        assert "2, 3" in printed
        with pytest.raises(InputError, match="pass --name"):
            main(RepositoryConfig(repository=models, rollback=True))
        with pytest.raises(InputError, match="no folder"):
            main(RepositoryConfig(repository=models / "none"))

    @pytest.mark.parametrize("change", [{"rollback": True}, {"version": 1}, {"backend": "python"}])
    def test_an_unknown_name_is_told_what_there_is(self, models, tmp_path, change):
        with pytest.raises(InputError, match=r"'shop'; it holds shop-v3\. .* --repository"):
            main(RepositoryConfig(repository=models, name="shop", **change))
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"it holds none\."):
            main(RepositoryConfig(repository=tmp_path / "empty", name="shop", **change))
        (tmp_path / "file").touch()
        for absent in (tmp_path / "none", tmp_path / "file"):
            with pytest.raises(InputError, match=r"no folder .*; name one with --repository"):
                main(RepositoryConfig(repository=absent, name="shop", **change))
