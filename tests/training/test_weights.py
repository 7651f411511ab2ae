"""Weights come from every safe format, and nothing in a file ever runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import tiny_clip as tiny
import torch
from safetensors.torch import save_file

from clip_rt.errors import CheckpointError
from clip_rt.specs import MODELS, find_spec
from training.model import CLIP, QuickGELU
from training.weights.load import fingerprint, load_clip, load_state_dict, tensor_shapes


@pytest.fixture(scope="module")
def clip():
    return tiny.make(tiny.VIT)


@pytest.fixture(scope="module")
def resnet():
    return tiny.make(tiny.RESNET)


def save(state_dict, path):
    save_file({k: v.contiguous() for k, v in state_dict.items()}, path)
    return path


def assert_equal_weights(found: CLIP, expected: CLIP):
    expected_by_name = expected.state_dict()
    assert found.state_dict().keys() == expected_by_name.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, expected_by_name[name].to(tensor.dtype)), name


class TestFormats:
    def test_safetensors(self, clip, tmp_path):
        loaded = load_clip(tiny.VIT, save(clip.state_dict(), tmp_path / "clip.safetensors"))
        assert_equal_weights(loaded, clip)
        assert torch.equal(loaded.causal_mask_LL, clip.causal_mask_LL)
        assert not loaded.training

    def test_a_loaded_model_computes_what_the_saved_one_does(self, resnet, tmp_path):
        path = save(resnet.state_dict(), tmp_path / "clip.safetensors")
        image = torch.randn(2, 3, 64, 64)
        tokens = torch.tensor([[49406, 320, 49407], [49406, 1125, 49407]])
        loaded = load_clip(tiny.RESNET, path)
        for found, expected in zip(loaded(image, tokens), resnet(image, tokens), strict=True):
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
    def test_torch_archive(self, clip, tmp_path, suffix):
        path = tmp_path / f"clip{suffix}"
        torch.save(clip.state_dict(), path)
        assert_equal_weights(load_clip(tiny.VIT, path), clip)

    def test_training_checkpoint_of_open_clip(self, clip, tmp_path):
        state_dict = {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}
        # Older versions keep the mask; OpenAI's JIT files keep facts of the architecture.
        state_dict |= {"module.attn_mask": torch.zeros(77, 77), "context_length": torch.tensor(77)}
        path = tmp_path / "epoch_3.pt"
        torch.save({"epoch": 3, "name": "run", "state_dict": state_dict, "optimizer": {}}, path)
        assert_equal_weights(load_clip(tiny.VIT, path), clip)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_becomes_float32(self, clip, tmp_path, dtype):
        halves = {name: tensor.to(dtype) for name, tensor in clip.state_dict().items()}
        loaded = load_clip(tiny.VIT, save(halves, tmp_path / "clip.safetensors"))
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
        assert torch.equal(loaded.visual.proj, clip.visual.proj.to(dtype).float())

    def test_step_counters_may_be_missing(self, resnet, tmp_path):
        weights = {k: v for k, v in resnet.state_dict().items() if "num_batches" not in k}
        loaded = load_clip(tiny.RESNET, save(weights, tmp_path / "clip.safetensors"))
        assert fingerprint(loaded.state_dict()) == fingerprint(resnet.state_dict())

    @pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
    def test_open_clip_state_dict_has_exactly_our_names_and_shapes(self, open_clip, name):
        reference = open_clip.create_model(f"{name.replace('/', '-')}-quickgelu", device="meta")
        shapes = {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
        assert shapes == tensor_shapes(find_spec(name))

    def test_the_bias_of_the_sigmoid_loss_is_kept(self, clip, tmp_path):
        # A vector of one, as open_clip writes scalars for FSDP.
        state_dict = clip.state_dict() | {
            "logit_bias": torch.tensor([-10.5]),
            "logit_scale": torch.tensor([2.5]),
        }
        loaded = load_clip(tiny.VIT, save(state_dict, tmp_path / "clip.safetensors"))
        assert loaded.logit_bias.item() == -10.5
        assert loaded.logit_scale.item() == 2.5
        assert loaded.logit_bias.shape == loaded.logit_scale.shape == ()

    def test_activation_can_be_overridden(self, clip, tmp_path):
        path = save(clip.state_dict(), tmp_path / "clip.safetensors")
        assert isinstance(load_clip(tiny.VIT, path).transformer.resblocks[0].mlp.gelu, QuickGELU)
        loaded = load_clip(tiny.VIT, path, activation="gelu")
        assert isinstance(loaded.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)
        assert loaded.spec.activation == "gelu"


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class TestRefusals:
    def test_pickle_with_code_does_not_run(self, tmp_path):
        path, evidence = tmp_path / "clip.pt", tmp_path / "it-ran"
        torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Malicious(evidence)}, path)
        with pytest.raises(CheckpointError, match=r"can run code.*weights_only=False"):
            load_state_dict(path)
        assert not evidence.exists()

    def test_bare_pickle_with_code_does_not_run(self, tmp_path):
        path, evidence = tmp_path / "clip.pt", tmp_path / "it-ran"
        path.write_bytes(pickle.dumps(Malicious(evidence)))
        with pytest.raises(CheckpointError, match="neither a safetensors file nor a torch archive"):
            load_state_dict(path)
        assert not evidence.exists()

    def test_torch_files_of_before_2020(self, clip, tmp_path):
        path = tmp_path / "clip.pt"
        torch.save(clip.state_dict(), path, _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match="torch archive"):
            load_state_dict(path)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript_archive_names_the_conversion(self, tmp_path, monkeypatch):
        path = tmp_path / "ViT-B-32.pt"
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
        with pytest.raises(CheckpointError, match=r"TorchScript.*torch\.jit\.load") as caught:
            load_state_dict(path)
        command = str(caught.value).split('python -c "')[1].split('"')[0]
        monkeypatch.chdir(tmp_path)
        exec(compile(command, "<conversion>", "exec"), {})
        assert load_state_dict(tmp_path / "clip.safetensors").keys() == {"weight", "bias"}

    def test_zip_that_is_no_torch_archive(self, tmp_path):
        path = tmp_path / "clip.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("clip/readme.txt", "hello")
        with pytest.raises(CheckpointError, match=r"torch\.save did not write"):
            load_state_dict(path)

    def test_compressed_members_are_not_inflated(self, clip, tmp_path):
        path, packed = tmp_path / "clip.pt", tmp_path / "packed.pt"
        torch.save(clip.state_dict(), path)
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w") as target:
            for member in source.infolist():
                target.writestr(member.filename, source.read(member), zipfile.ZIP_DEFLATED)
        with pytest.raises(CheckpointError, match=r"torch\.save did not write"):
            load_state_dict(packed)

    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    @pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
    def test_truncated_files(self, clip, tmp_path, suffix, share):
        path = tmp_path / f"clip{suffix}"
        if suffix == ".pt":
            torch.save(clip.state_dict(), path)
        else:
            save(clip.state_dict(), path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError):
            load_state_dict(path)

    def test_safetensors_whose_header_is_longer_than_the_file(self, tmp_path):
        path = tmp_path / "clip.safetensors"
        path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="not a valid safetensors file"):
            load_state_dict(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint file at"):
            load_state_dict(tmp_path / "missing.safetensors")

    @pytest.mark.parametrize(
        "content", [[1, 2], {}, {"a": 1}, {3: torch.zeros(1)}, {"a": torch.zeros(1).to_sparse()}]
    )
    def test_archives_without_a_state_dict(self, tmp_path, content):
        path = tmp_path / "clip.pt"
        torch.save(content, path)
        with pytest.raises(CheckpointError):
            load_state_dict(path)


def header(entries: object, num_bytes: int) -> bytes:
    """A safetensors file with any header and zeros for tensors."""
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


LYING_HEADERS = {
    "overlap": header({"a": entry("F32", [4], 0, 16), "b": entry("F32", [4], 8, 24)}, 24),
    "dtype": header({"a": entry("F32", [2], 0, 16)}, 16),
    "short": header({"a": entry("F32", [4], 0, 16)}, 12),
    "long": header({"a": entry("F32", [4], 0, 16)}, 20),
    "hole": header({"a": entry("F32", [4], 4, 20)}, 20),
    "unknown dtype": header({"a": entry("F99", [4], 0, 16)}, 16),
    "negative": header({"a": entry("F32", [-4], 0, 16)}, 16),
    "overflow": header({"a": entry("F32", [2**62, 2**62], 0, 16)}, 16),
    "list": header([1, 2], 0),
    "no JSON": (10).to_bytes(8, "little") + b"not a json",
    "empty": b"",
}


class TestHostileFiles:
    """B22 and B23 of the bad-input list."""

    @pytest.mark.parametrize("content", LYING_HEADERS.values(), ids=LYING_HEADERS)
    def test_a_safetensors_header_that_lies(self, tmp_path, content):
        path = tmp_path / "clip.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a valid safetensors file"):
            load_state_dict(path)

    def test_a_hundred_thousand_entries_are_not_read(self, tmp_path):
        path = tmp_path / "clip.safetensors"
        path.write_bytes(header({f"t{i}": entry("F32", [0], 0, 0) for i in range(100_000)}, 0))
        with pytest.raises(CheckpointError, match=r"has 100000 entries; .* 1 to 10000"):
            load_state_dict(path)

    def test_a_legacy_tar_of_torch(self, tmp_path):
        path = tmp_path / "clip.pt"
        with tarfile.open(path, "w") as archive:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                member = tarfile.TarInfo(name)
                member.size = 4
                archive.addfile(member, io.BytesIO(b"\x80\x02N."))
        with pytest.raises(CheckpointError, match="neither a safetensors file nor a torch archive"):
            load_state_dict(path)

    @pytest.mark.parametrize("suffix", [".pt2", ".pt"])
    def test_an_exported_program_names_the_conversion(self, tmp_path, suffix):
        path = tmp_path / "exported.pt2"
        program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
        torch.export.save(program, path)
        path = path.rename(path.with_suffix(suffix))
        with pytest.raises(CheckpointError, match=r"exported program.*torch\.export\.load"):
            load_state_dict(path)

    def test_a_pickle_with_code_in_a_folder_of_the_hub_does_not_run(self, tmp_path):
        evidence = tmp_path / "it-ran"
        torch.save({"a": Malicious(evidence)}, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="can run code"):
            load_clip(tiny.VIT, tmp_path)
        assert not evidence.exists()

    def test_a_tensor_that_claims_more_than_its_file_holds(self, tmp_path):
        # Strides of zero make eight bytes look like a terabyte; the shape is refused first.
        path = tmp_path / "clip.pt"
        torch.save({"logit_scale": torch.zeros(2).as_strided((2**20, 2**18), (0, 0))}, path)
        assert path.stat().st_size < 10_000
        with pytest.raises(CheckpointError, match=r"logit_scale \(1048576, 262144\) instead of"):
            load_clip(tiny.VIT, path)


class TestFit:
    def test_missing_unexpected_and_misshapen_tensors_are_listed(self, clip, tmp_path):
        state_dict = dict(clip.state_dict())
        state_dict["visual.surplus"] = state_dict.pop("visual.ln_pre.weight")
        state_dict["visual.proj"] = torch.zeros(3, 4)
        with pytest.raises(CheckpointError) as caught:
            load_clip(tiny.VIT, save(state_dict, tmp_path / "clip.safetensors"))
        message = str(caught.value)
        assert "Missing: visual.ln_pre.weight" in message
        assert "Unexpected: visual.surplus" in message
        assert "visual.proj (3, 4) instead of (64, 48)" in message

    def test_the_architecture_that_fits_is_named(self, clip, tmp_path, monkeypatch):
        monkeypatch.setitem(MODELS, "tiny-ViT", tiny.VIT)
        other = replace(tiny.VIT, name="other", embedding_dim=16)
        path = save(clip.state_dict(), tmp_path / "clip.safetensors")
        with pytest.raises(CheckpointError, match=r"does not fit other.*pass --model tiny-ViT"):
            load_clip(other, path)

    def test_a_resnet_and_a_vit_are_told_apart(self, resnet, tmp_path):
        path = save(resnet.state_dict(), tmp_path / "clip.safetensors")
        with pytest.raises(CheckpointError, match=r"Missing: visual\.class_embedding"):
            load_clip(tiny.VIT, path)

    def test_towers_of_timm_are_named(self, clip, tmp_path):
        state_dict = {n: t for n, t in clip.state_dict().items() if not n.startswith("visual.")}
        state_dict["visual.trunk.cls_token"] = torch.zeros(1)
        path = save(state_dict, tmp_path / "clip.safetensors")
        with pytest.raises(CheckpointError, match="one of timm's"):
            load_clip(tiny.VIT, path)

    def test_an_fp8_checkpoint_is_quantised(self, clip, tmp_path):
        tensors = clip.state_dict() | {"visual.proj": clip.visual.proj.to(torch.float8_e4m3fn)}
        with pytest.raises(CheckpointError, match=r"quantised: visual\.proj"):
            load_clip(tiny.VIT, save(tensors, tmp_path / "clip.safetensors"))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_values_that_are_not_finite_are_named(self, clip, tmp_path, value):
        state_dict = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
        state_dict["ln_final.bias"][3] = value
        with pytest.raises(CheckpointError, match=r"ln_final\.bias"):
            load_clip(tiny.VIT, save(state_dict, tmp_path / "clip.safetensors"))

    def test_quantised_weights_are_refused(self, clip, tmp_path):
        state_dict = clip.state_dict() | {"visual.proj": clip.visual.proj.to(torch.int8)}
        with pytest.raises(CheckpointError, match=r"quantised: visual\.proj"):
            load_clip(tiny.VIT, save(state_dict, tmp_path / "clip.safetensors"))


class TestFingerprint:
    def test_is_the_same_for_the_same_weights_in_any_order(self, clip):
        state_dict = clip.state_dict()
        assert fingerprint(dict(reversed(state_dict.items()))) == fingerprint(state_dict)
        assert len(fingerprint(state_dict)) == 64

    def test_changes_with_one_bit_a_name_a_shape_or_a_dtype(self):
        weights = {"a": torch.zeros(4)}
        others = (
            {"a": torch.tensor(np.array([0, 0, 0, -0.0], np.float32))},
            {"b": torch.zeros(4)},
            {"a": torch.zeros(2, 2)},
            {"a": torch.zeros(4, dtype=torch.int32)},
        )
        found = {fingerprint(other) for other in (weights, *others)}
        assert len(found) == 1 + len(others)

    def test_reads_scalars_bfloat16_and_views(self):
        base = torch.arange(6.0).reshape(2, 3)
        assert fingerprint({"a": base.T}) == fingerprint({"a": base.T.contiguous()})
        fingerprint({"a": torch.tensor(1.0), "b": base.bfloat16()})
