"""Each setting of preprocessing in a published folder is obeyed, neutral, or refused by name."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import tiny_clip as tiny
import torch
from safetensors.torch import save_file

from clip_rt.errors import CheckpointError
from clip_rt.specs import CLIP_MEAN, CLIP_STD
from training.data.augment import normalise
from training.weights import claims
from training.weights.load import load_clip

CONFIG = {
    "model_type": "clip",
    "text_config": {"hidden_act": "quick_gelu", "num_attention_heads": 2},
    "vision_config": {"hidden_act": "quick_gelu", "num_attention_heads": 2},
}
# As transformers 5.23 writes it for the tiny model.
PROCESSOR = {
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(CLIP_MEAN),
    "image_processor_type": "CLIPImageProcessor",
    "image_std": list(CLIP_STD),
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 32},
}
# As transformers 4.24 and before did.
OLD_PROCESSOR = {
    "crop_size": 32,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "resample": 3,
    "size": 32,
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PREPROCESSOR_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"


@pytest.fixture(scope="module")
def plain():
    return tiny.make(tiny.VIT)


@pytest.fixture
def published(tmp_path, plain):
    """A folder as `save_pretrained` leaves it, with these files beside the weights."""

    def make(files, **text):
        section = CONFIG["text_config"] | text
        files = {"config.json": CONFIG | {"text_config": section}} | files
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
        save_file(plain.state_dict(), tmp_path / "model.safetensors")
        return tmp_path

    return make


def layouts(settings):
    """Every place where one version or another writes the settings of images."""
    return {
        "4": {PREPROCESSOR_FILE: settings},
        "5": {PROCESSOR_FILE: {"processor_class": "CLIPProcessor", "image_processor": settings}},
        "feature extractor": {PROCESSOR_FILE: {"feature_extractor": settings}},
        "flat": {PROCESSOR_FILE: settings},
        "both": {PREPROCESSOR_FILE: settings, PROCESSOR_FILE: {"image_processor": settings}},
    }


@pytest.mark.parametrize("layout", layouts({}))
class TestEveryLayout:
    def test_colours_are_folded_into_the_weights(self, published, plain, layout):
        clip = load_clip(tiny.VIT, published(layouts(PROCESSOR | HALF)[layout]))
        grey = torch.full((1, 3, 32, 32), 0.3)
        expected = plain.encode_image((grey - 0.5) / 0.5)
        torch.testing.assert_close(clip.encode_image(normalise(grey)), expected)

    def test_another_way_to_resize_is_refused_by_name(self, published, layout):
        with pytest.raises(CheckpointError, match=r"processor.* sets resample '2'"):
            load_clip(tiny.VIT, published(layouts(PROCESSOR | {"resample": 2})[layout]))


@pytest.mark.parametrize(
    "settings",
    [
        OLD_PROCESSOR,
        {"resample": "bicubic", "do_convert_rgb": False},
        {"size": 32, "crop_size": [32, 32], "default_to_square": False},
        {"do_pad": None, "pad_size": None, "device": None, "data_format": "channels_first"},
        {"image_processor_type": "CLIPImageProcessorFast", "rescale_factor": 1 / 255},
        {"image_processor_type": "ViTImageProcessor"},
        {"image_mean": None, "image_std": None, "size": None, "crop_size": None},
        {"do_pad": False, "use_square_size": False, "_valid_processor_keys": ["size", "do_pad"]},
    ],
)
def test_what_is_done_here_anyway_changes_nothing(published, plain, settings):
    clip = load_clip(tiny.VIT, published({PREPROCESSOR_FILE: PROCESSOR | settings}))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(clip.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"do_normalize": False}, lambda x: x),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [127.5] * 3}, None),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, None),
        ({"image_mean": 0.5, "image_std": 0.5}, None),
    ],
)
def test_the_range_of_pixels_is_obeyed(published, plain, settings, seen):
    clip = load_clip(tiny.VIT, published({PREPROCESSOR_FILE: PROCESSOR | settings}))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = plain.encode_image(seen(image) if seen else (image - 0.5) / 0.5)
    torch.testing.assert_close(clip.encode_image(normalise(image)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"do_resize": False}, "do_resize 'False'"),
        ({"do_center_crop": False}, "do_center_crop 'False'"),
        ({"size": {"height": 32, "width": 32}}, "size .*height"),
        ({"size": {"shortest_edge": 36}}, "shortest_edge.*36.* with crop_size '32'"),
        ({"size": 32, "default_to_square": True}, "size '32'"),
        ({"crop_size": {"height": 32, "width": 24}}, "crop_size"),
        ({"size": 64, "crop_size": 64}, "images of 64 px, and the weights read 32 px"),
        ({"resample": "bilinear"}, "resample 'bilinear'"),
        ({"do_pad": True}, "do_pad 'True'"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order 'True'"),
        ({"auto_map": {"AutoImageProcessor": "own.Code"}}, "auto_map"),
        ({"image_processor_type": "ViTImageProcessor", "resample": None}, "without resample"),
        ({"rescale_factor": 0}, "rescale_factor 0"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean \[0.5, 0.5\]"),
        ({"image_std": [0.5, 0.5, 0.0]}, "std"),
        ({"do_normalize": "perhaps"}, "do_normalize 'perhaps'"),
    ],
)
def test_what_is_not_done_here_is_refused_by_name(published, settings, named):
    with pytest.raises(CheckpointError, match=rf"(?s){named}.*pass the file"):
        load_clip(tiny.VIT, published({PROCESSOR_FILE: {"image_processor": PROCESSOR | settings}}))


@pytest.mark.parametrize("change", [HALF, {"resample": 2}, {"size": 64, "crop_size": 64}])
def test_two_files_that_contradict_each_other_are_both_shown(published, change):
    files = {PREPROCESSOR_FILE: PROCESSOR, PROCESSOR_FILE: {"image_processor": PROCESSOR | change}}
    with pytest.raises(
        CheckpointError, match=r"preprocessor_config.*/processor_config.* contradict"
    ):
        load_clip(tiny.VIT, published(files))


class TestTexts:
    @pytest.mark.parametrize(
        "settings",
        [
            {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
            {"model_max_length": 10**30, "pad_token": "!", "tokenizer_class": "TokenizersBackend"},
            {"bos_token": {"content": "<|startoftext|>"}, "eos_token": "<|endoftext|>"},
        ],
    )
    @pytest.mark.parametrize("end", [None, 2, 49407, [49407]])
    def test_what_is_done_here_anyway(self, published, settings, end):
        load_clip(tiny.VIT, published({"tokenizer_config.json": settings}, eos_token_id=end))

    @pytest.mark.parametrize(
        ("settings", "named"),
        [
            ({"do_lower_case": False}, "do_lower_case 'False'"),
            ({"model_max_length": 32}, "model_max_length '32'"),
            ({"tokenizer_class": "XLMRobertaTokenizer"}, "tokenizer_class 'XLMRobertaTokenizer'"),
            ({"eos_token": {"content": "</s>"}}, "eos_token '</s>'"),
        ],
    )
    def test_another_tokenizer(self, published, settings, named):
        with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json sets {named}"):
            load_clip(tiny.VIT, published({"tokenizer_config.json": settings}))

    def test_a_text_read_at_another_token(self, published):
        with pytest.raises(CheckpointError, match=r"config\.json sets eos_token_id '7'"):
            load_clip(tiny.VIT, published({}, eos_token_id=7))


class TestOneFile:
    """A file that is passed alone is what its folder says it is."""

    @pytest.mark.parametrize("said", ["gelu", "quick_gelu"])
    @pytest.mark.parametrize("name", ["model.safetensors", "clip.safetensors", "weights.pt"])
    def test_its_configuration_is_believed(self, published, plain, said, name):
        section = {"hidden_act": said, "num_attention_heads": 2}
        folder = published({"config.json": CONFIG | {"vision_config": section}}, hidden_act=said)
        if name.endswith(".pt"):
            torch.save(plain.state_dict(), folder / name)
        else:
            (folder / "model.safetensors").rename(folder / name)
        (folder / "config.json").write_text(
            json.dumps(CONFIG | {"vision_config": section, "text_config": section})
        )
        assert load_clip(tiny.VIT, folder / name).spec.activation == said

    def test_another_preparation_is_warned_of_and_the_rest_obeyed(self, published, plain, caplog):
        settings = PROCESSOR | HALF | {"resample": 2}
        folder = published({PREPROCESSOR_FILE: settings})
        caplog.set_level(logging.WARNING)
        clip = load_clip(tiny.VIT, folder / "model.safetensors")
        assert not torch.equal(clip.visual.conv1.weight, plain.visual.conv1.weight)
        assert "resample '2'" in caplog.text

    def test_a_network_that_is_not_built_is_refused_unless_the_activation_is_passed(
        self, published, caplog
    ):
        folder = published({"config.json": CONFIG | {"model_type": "siglip"}})
        with pytest.raises(CheckpointError, match="model of type 'siglip'"):
            load_clip(tiny.VIT, folder / "model.safetensors")
        caplog.set_level(logging.WARNING)
        clip = load_clip(tiny.VIT, folder / "model.safetensors", activation="gelu")
        assert clip.spec.activation == "gelu"
        assert "siglip" in caplog.text

    @pytest.mark.parametrize("content", ['{"model_type": "bert"}', "{", "[]"])
    def test_a_config_of_something_else_says_nothing(self, published, content):
        folder = published({})
        (folder / "config.json").write_text(content)
        load_clip(tiny.VIT, folder / "model.safetensors")


class TestUnknownActivation:
    @pytest.fixture
    def spec(self, monkeypatch):
        monkeypatch.setattr(claims, "TRAINED_BOTH_WAYS", frozenset({tiny.VIT.name}))
        return tiny.VIT

    def test_nobody_says_it(self, spec, published):
        folder = published({})
        (folder / "config.json").unlink()
        for source in (folder, folder / "model.safetensors"):
            with pytest.raises(CheckpointError, match="--activation quick_gelu or --act"):
                load_clip(spec, source)
            assert load_clip(spec, source, activation="gelu").spec.activation == "gelu"
        with pytest.raises(CheckpointError, match="--teacher-activation gelu"):
            load_clip(spec, folder, option="--teacher-activation")

    def test_openais_own_files_are_known_by_their_facts(self, spec, published, plain):
        folder = published({})
        (folder / "config.json").unlink()
        facts = {name: torch.tensor(1) for name in ("input_resolution", "context_length")}
        save_file(plain.state_dict() | facts, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="nothing says"):
            load_clip(spec, folder / "model.safetensors")
        facts |= {"vocab_size": torch.tensor(1)}
        save_file(plain.state_dict() | facts, folder / "model.safetensors")
        for source in (folder, folder / "model.safetensors"):
            assert load_clip(spec, source).spec.activation == "quick_gelu"
            with pytest.raises(CheckpointError, match="gelu was asked for"):
                load_clip(spec, source, activation="gelu")

    def test_an_architecture_trained_in_one_way_needs_no_word(self, spec, published):
        folder = published({})
        (folder / "config.json").unlink()
        other = replace(spec, name="of my own")
        assert load_clip(other, folder).spec.activation == "quick_gelu"

    def test_two_configurations_that_differ_need_a_word(self, spec, published):
        towers = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
        config = {"vision_cfg": towers, "text_cfg": {"heads": 2}, "quick_gelu": False}
        folder = published({"open_clip_config.json": {"model_cfg": config}})
        with pytest.raises(CheckpointError, match=r"(?s)config\.json .* or pass --activation"):
            load_clip(spec, folder)
        assert load_clip(spec, folder, activation="gelu").spec.activation == "gelu"


def test_every_published_architecture_but_one_of_a_kind_is_both():
    assert "ViT-B/32" in claims.TRAINED_BOTH_WAYS
    assert "RN26@64px" not in claims.TRAINED_BOTH_WAYS


def test_a_fold_is_exact_for_what_open_clip_writes_by_its_old_names(published, plain):
    towers = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    content = {
        "model_cfg": {"vision_cfg": towers, "text_cfg": {"heads": 2}, "quick_gelu": True},
        "preprocess_cfg": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "fill_color": 0},
    }
    folder = published({"open_clip_config.json": content})
    (folder / "config.json").unlink()
    black = torch.zeros(1, 3, 32, 32)
    clip = load_clip(tiny.VIT, folder)
    expected = plain.encode_image((black - 0.5) / 0.5)
    torch.testing.assert_close(clip.encode_image(normalise(black)), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_open_clips_images_of_other_modes_are_refused(published, mode):
    towers = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    content = {
        "model_cfg": {"vision_cfg": towers, "text_cfg": {"heads": 2}, "quick_gelu": True},
        "preprocess_cfg": {"mode": mode},
    }
    folder = published({"open_clip_config.json": content})
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=f"mode '{mode}'"):
        load_clip(tiny.VIT, folder)
