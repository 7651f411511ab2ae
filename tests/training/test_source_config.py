"""What a source says about its weights is believed, and a contradiction is an error."""

from __future__ import annotations

import json

import pytest
import tiny_clip as tiny
import torch
from safetensors.torch import save_file

from clip_rt.errors import CheckpointError
from training.weights.load import load_clip

OPEN_CLIP = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
HUGGING_FACE = {
    "model_type": "clip",
    "text_config": {"hidden_act": "quick_gelu", "num_attention_heads": 2},
    "vision_config": {"hidden_act": "quick_gelu", "num_attention_heads": 2},
}


@pytest.fixture(scope="module")
def state_dict():
    return tiny.make(tiny.VIT).state_dict()


@pytest.fixture
def from_open_clip(tmp_path, state_dict):
    """A folder as open_clip leaves it, with some settings changed."""

    def make(*, vision=None, text=None, preprocess=None, **model):
        config = OPEN_CLIP | model
        config["vision_cfg"] = config["vision_cfg"] | (vision or {})
        config["text_cfg"] = config["text_cfg"] | (text or {})
        content = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        save_file(state_dict, tmp_path / "open_clip_model.safetensors")
        return tmp_path

    return make


@pytest.fixture
def from_hugging_face(tmp_path, state_dict):
    def make(*, vision=None, text=None, preprocessor=None, **top):
        config = HUGGING_FACE | {
            "vision_config": HUGGING_FACE["vision_config"] | (vision or {}),
            "text_config": HUGGING_FACE["text_config"] | (text or {}),
        }
        (tmp_path / "config.json").write_text(json.dumps(config | top))
        if preprocessor is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
        save_file(state_dict, tmp_path / "model.safetensors")
        return tmp_path

    return make


GELU = {"hidden_act": "gelu"}


class TestActivation:
    @pytest.mark.parametrize("said", ["quick_gelu", "gelu"])
    def test_the_source_is_believed(self, from_open_clip, from_hugging_face, said):
        folder = from_open_clip(quick_gelu=said == "quick_gelu")
        assert load_clip(tiny.VIT, folder).spec.activation == said
        assert load_clip(tiny.VIT, folder, activation=said).spec.activation == said
        (folder / "open_clip_model.safetensors").unlink()
        section = {"hidden_act": said}
        folder = from_hugging_face(vision=section, text=section)
        assert load_clip(tiny.VIT, folder).spec.activation == said

    def test_open_clip_means_gelu_when_it_says_nothing(self, from_open_clip):
        assert load_clip(tiny.VIT, from_open_clip(quick_gelu=None)).spec.activation == "gelu"

    def test_hugging_face_means_quick_gelu_when_it_says_nothing(self, from_hugging_face):
        folder = from_hugging_face(
            text_config={"num_attention_heads": 2}, vision_config={"num_attention_heads": 2}
        )
        assert load_clip(tiny.VIT, folder).spec.activation == "quick_gelu"
        with pytest.raises(CheckpointError, match="trained with quick_gelu, but gelu was asked"):
            load_clip(tiny.VIT, folder, activation="gelu")

    def test_a_contradiction_names_both(self, from_open_clip):
        with pytest.raises(
            CheckpointError,
            match=r"open_clip_config\.json.* trained with quick_gelu, but gelu was asked for",
        ):
            load_clip(tiny.VIT, from_open_clip(), activation="gelu")

    def test_a_contradiction_with_hugging_face(self, from_hugging_face):
        folder = from_hugging_face(vision=GELU, text=GELU)
        with pytest.raises(CheckpointError, match="trained with gelu, but quick_gelu was asked"):
            load_clip(tiny.VIT, folder, activation="quick_gelu")

    def test_older_sections_of_hugging_face_count(self, from_hugging_face):
        section = GELU | {"num_attention_heads": 2}
        folder = from_hugging_face(vision_config_dict=section, text_config_dict=section)
        assert load_clip(tiny.VIT, folder).spec.activation == "gelu"

    def test_our_own_checkpoints_say_it_in_their_metadata(self, tmp_path, state_dict):
        path = tmp_path / "clip.safetensors"
        save_file(state_dict, path, metadata={"activation": "gelu"})
        assert load_clip(tiny.VIT, path).spec.activation == "gelu"
        with pytest.raises(CheckpointError, match=r"metadata of .*trained with gelu"):
            load_clip(tiny.VIT, path, activation="quick_gelu")
        save_file(state_dict, path, metadata={"activation": "relu"})
        with pytest.raises(CheckpointError, match="activation 'relu'"):
            load_clip(tiny.VIT, path)

    def test_a_silent_file_gets_what_is_asked_for_or_the_specs(self, tmp_path, state_dict):
        path = tmp_path / "clip.safetensors"
        save_file(state_dict, path, metadata={"format": "pt"})
        assert load_clip(tiny.VIT, path).spec.activation == "quick_gelu"
        assert load_clip(tiny.VIT, path, activation="gelu").spec.activation == "gelu"


class TestArchitecture:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vision": {"head_width": 16}}, "image tower has 4 attention heads; tiny-ViT has 2"),
            ({"text": {"heads": 4}}, "text tower has 4 attention heads"),
            ({"vision": {"timm_model_name": "vit_x"}}, "sets 'timm_model_name' to 'vit_x'"),
            ({"text": {"hf_model_name": "roberta"}}, "sets 'hf_model_name'"),
            ({"text": {"no_causal_mask": True}}, "sets 'no_causal_mask'"),
            ({"text": {"pool_type": "last"}}, "sets 'pool_type' to 'last'"),
            ({"vision": {"pool_type": "avg"}}, "sets 'pool_type' to 'avg'"),
            ({"vision": {"norm_kwargs": {"eps": 1e-6}}}, "sets 'norm_kwargs'"),
            ({"vision": {"head_width": 0}}, "is not the configuration of a CLIP"),
            ({"vision_cfg": 3}, "is not the configuration of a CLIP"),
        ],
    )
    def test_another_network_of_open_clip_is_refused(self, from_open_clip, changes, message):
        if "vision_cfg" in changes:
            folder = from_open_clip()
            (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": changes}))
        else:
            folder = from_open_clip(**changes)
        with pytest.raises(CheckpointError, match=message):
            load_clip(tiny.VIT, folder)

    def test_settings_of_training_and_neutral_ones_are_accepted(self, from_open_clip):
        vision = {"patch_dropout": 0.5, "pool_type": "tok", "ls_init_value": None}
        text = {"pool_type": "argmax", "hf_tokenizer_name": "someone/clip", "no_causal_mask": False}
        load_clip(tiny.VIT, from_open_clip(vision=vision, text=text))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model_type": "siglip"}, "a model of type 'siglip'; only clip is read"),
            ({"vision": {"num_attention_heads": 4}}, "image tower has 4 attention heads"),
            ({"text": {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
            ({"text": GELU}, r"hidden_act \['gelu', 'quick_gelu'\]"),
            ({"text": {"hidden_act": "gelu_new"}}, "hidden_act"),
            ({"text_config": [1]}, "is not the configuration of a CLIP"),
        ],
    )
    def test_another_network_of_hugging_face_is_refused(self, from_hugging_face, changes, message):
        with pytest.raises(CheckpointError, match=message):
            load_clip(tiny.VIT, from_hugging_face(**changes))

    @pytest.mark.parametrize("content", ["{", "[]", '"clip"', "[" * 100_000, "\x00"])
    def test_what_is_no_json_object_is_refused(self, from_open_clip, content):
        folder = from_open_clip()
        (folder / "open_clip_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
            load_clip(tiny.VIT, folder)

    def test_a_huge_file_is_not_read(self, from_open_clip):
        folder = from_open_clip()
        with (folder / "open_clip_config.json").open("wb") as file:
            file.truncate(2**34)
        with pytest.raises(CheckpointError, match="17179869184 bytes"):
            load_clip(tiny.VIT, folder)


class TestPreprocessing:
    def test_other_colours_are_folded_into_the_weights(self, from_open_clip, state_dict):
        mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        plain = tiny.make(tiny.VIT)
        clip = load_clip(
            tiny.VIT, from_open_clip(preprocess={"mean": mean, "std": std, "size": 32})
        )
        assert not torch.equal(clip.visual.conv1.weight, plain.visual.conv1.weight)
        # Black under CLIP's normalisation must look as black did under theirs.
        from training.data.augment import normalise

        black = torch.zeros(1, 3, 32, 32)
        expected = plain.encode_image((black - 0.5) / 0.5)
        torch.testing.assert_close(clip.encode_image(normalise(black)), expected)

    def test_clips_own_colours_change_nothing(self, from_hugging_face, state_dict):
        from clip_rt.specs import CLIP_MEAN, CLIP_STD

        preprocessor = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
        clip = load_clip(tiny.VIT, from_hugging_face(preprocessor=preprocessor))
        assert torch.equal(clip.visual.conv1.weight, state_dict["visual.conv1.weight"])

    @pytest.mark.parametrize(
        "preprocess", [{"resize_mode": "squash"}, {"interpolation": "bilinear"}]
    )
    def test_another_way_to_resize_is_refused_unless_the_file_is_passed(
        self, from_open_clip, preprocess
    ):
        folder = from_open_clip(preprocess=preprocess)
        with pytest.raises(CheckpointError, match="resized in another way"):
            load_clip(tiny.VIT, folder)
        load_clip(tiny.VIT, folder / "open_clip_model.safetensors")

    @pytest.mark.parametrize("std", [[0, 1, 1], [1, 1], ["a", 1, 1], [1, 1, float("nan")], 3])
    def test_colours_that_cannot_be_are_refused(self, from_open_clip, std):
        folder = from_open_clip(preprocess={"mean": [0, 0, 0], "std": std})
        with pytest.raises(CheckpointError, match="is not the configuration of a CLIP"):
            load_clip(tiny.VIT, folder)
