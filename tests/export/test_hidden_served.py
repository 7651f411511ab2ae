"""Hidden states of texts, served: those of transformers' CLIPTextModel, and what goes wrong."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from types import SimpleNamespace

import external_models
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import clip_rt
from clip_rt import served_tokenizer
from clip_rt.deadline import Deadline
from clip_rt.specs import END_OF_TEXT, HIDDEN_STATES, MODELS
from export import bundle, hidden
from export.graphs import TextHiddenGraph
from export.models import served_version
from export.onnx import OnnxConfig, export
from export.onnx_writer import write_onnx
from export.pipeline import random_clip
from export.repository import configure, publish, switch_version
from export.triton_config import MAX_HIDDEN_BATCH_SIZE, read_config, read_manifest
from training.encoders.find import load_encoder

pytestmark = [
    *(pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(900)),
    pytest.mark.usefixtures("open_clip"),
]

BAR = 1e-5
LENGTH = 77
TEXTS = [
    "a photo of an astronaut riding a horse on mars",
    "",
    "A castle, by the sea; oil on canvas",
    "cat",
    "trending on artstation, " * 3 + "4k",
]
OWN = MODELS["RN26@64px"]
LAYERS = tuple(HIDDEN_STATES)


# The same weights as transformers has them


def to_transformers(clip, num_layers=None):
    """Return a CLIPTextModelWithProjection with the weights of one of our text towers."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    text = clip.spec.text
    num_layers = num_layers or text.layers
    config = CLIPTextConfig(
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        num_hidden_layers=num_layers,
        num_attention_heads=text.heads,
        projection_dim=clip.spec.embedding_dim,
        hidden_act=clip.spec.activation,
        max_position_embeddings=text.context_length,
        **external_models.CLIP,
    )
    ours = clip.state_dict()
    theirs = {
        "text_model.embeddings.token_embedding.weight": ours["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": ours["positional_embedding"],
        "text_projection.weight": ours["text_projection"].T.contiguous(),
    }
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        theirs[f"text_model.final_layer_norm.{kind}"] = ours[f"ln_final.{kind}"]
        for index in range(num_layers):
            old, new = f"transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
            for ours_name, name in names.items():
                theirs[f"{new}.{name}.{kind}"] = ours[f"{old}.{ours_name}.{kind}"]
            parts = ours[f"{old}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                theirs[f"{new}.self_attn.{name}_proj.{kind}"] = part.contiguous()
    model = CLIPTextModelWithProjection(config)
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert unexpected == []
    assert all("position_ids" in name for name in missing)
    return model.eval()


@torch.inference_mode()
def ask_transformers(model, ids):
    """Return what each layer is, and the projected embeddings."""
    found = model(input_ids=ids, output_hidden_states=True)
    text = model.text_model
    penultimate = found.hidden_states[-2]
    return {
        "last": found.last_hidden_state.numpy(),
        "penultimate": penultimate.numpy(),
        "penultimate_norm": text.final_layer_norm(penultimate).numpy(),
    }, found.text_embeds.numpy()


def tokenize(texts, pad_id=END_OF_TEXT):
    """By transformers' tokenizer, as a pipeline does, but for what texts are filled up with."""
    tokenizer = external_models.clip_tokenizer(LENGTH)
    found = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    ids, mask = found["input_ids"], found["attention_mask"].bool()
    return torch.where(mask, ids, torch.full_like(ids, pad_id)), mask.numpy()


# What is served


def make_own(folder):
    """A checkpoint of one of our own architectures."""
    clip = random_clip(OWN, seed=3)
    external_models.disturb(clip)
    tensors = {name: each.contiguous().clone() for name, each in clip.state_dict().items()}
    save_file(tensors, folder / "clip.safetensors", metadata={"activation": "quick_gelu"})
    return clip, {"model": OWN.name, "weights": str(folder / "clip.safetensors")}


def make_external(folder):
    """A folder as transformers saves one."""
    external_models.write_clip(folder, length=LENGTH)
    from transformers import CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection.from_pretrained(folder).eval()
    return model, {"model": f"hf:{folder}"}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    place = tmp_path_factory.mktemp("own")
    clip, options = make_own(place)
    options |= {"activation": "quick_gelu", "name": "sd", "cache": place / "cache"}
    export(OnnxConfig(**options, repository=place / "models", text_output="hidden"))
    return SimpleNamespace(
        clip=clip, model=to_transformers(clip), options=options, place=place, pad_id=END_OF_TEXT
    )


@pytest.fixture(scope="module")
def external(tmp_path_factory):
    place = tmp_path_factory.mktemp("external")
    (place / "folder").mkdir()
    model, options = make_external(place / "folder")
    options |= {"name": "sd", "cache": place / "cache"}
    export(OnnxConfig(**options, repository=place / "models", text_output="hidden"))
    # Its tokenizer says what texts are filled up with.
    return SimpleNamespace(model=model, options=options, place=place, pad_id=None)


@pytest.fixture(scope="module", params=["own", "external"])
def made(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["embedded", "in_process"])
def served(made, request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(made.place / "home"))
        served_tokenizer._loaded.clear()
        repository = made.place / "models"
        with clip_rt.Client(repository=repository, server=request.param, timeout_s=120) as client:
            yield SimpleNamespace(client=client, model=made.model, pad_id=made.pad_id)


@pytest.fixture(scope="module")
def client(own):
    """Of our own tower, in this process."""
    with clip_rt.Client(repository=own.place / "models", server="in_process") as client:
        yield client


@pytest.mark.parametrize("layer", LAYERS)
def test_they_are_those_of_transformers(served, layer):
    ids, mask = tokenize(TEXTS)
    expected, text_embeds = ask_transformers(served.model, ids)
    found = served.client.encode_text_hidden(TEXTS, layer=layer, pad_id=served.pad_id)
    assert found.hidden_states.dtype == np.float32
    assert found.hidden_states.flags.c_contiguous
    np.testing.assert_allclose(found.hidden_states, expected[layer], rtol=0, atol=BAR)
    np.testing.assert_allclose(found.text_embeds, text_embeds, rtol=0, atol=BAR)
    # The end of a text and what fills it up have one id there; theirs tells neither apart from it.
    np.testing.assert_array_equal(found.attention_mask, mask)
    assert found.indices.tolist() == list(range(len(TEXTS)))


def test_any_number_of_texts_in_any_batch_has_them(served):
    texts = [f"{'very ' * (number % 7)}different text {number}" for number in range(19)]
    texts += texts[:3]
    ids, _ = tokenize(texts)
    expected, _ = ask_transformers(served.model, ids)
    found = served.client.encode_text_hidden(texts, pad_id=served.pad_id)
    np.testing.assert_allclose(found.hidden_states, expected["last"], rtol=0, atol=BAR)
    np.testing.assert_array_equal(found.hidden_states[:3], found.hidden_states[-3:])
    for index in (0, 6, 18):
        alone = served.client.encode_text_hidden(texts[index], pad_id=served.pad_id)
        np.testing.assert_allclose(
            alone.hidden_states[0], found.hidden_states[index], rtol=0, atol=BAR
        )


def test_embeddings_are_what_they_were_and_carry_none(served):
    found = served.client.encode_texts(TEXTS[2:4])
    hidden_states = served.client.encode_text_hidden(TEXTS[2:4])
    unit = hidden_states.text_embeds
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(found, unit, atol=1e-5)
    before = count_rows(served.client)
    served.client.encode_texts(["something else"])
    assert count_rows(served.client) == before


def count_rows(client):
    """Rows that the model of hidden states was asked for."""
    with client._session.begun(None) as (model, _):
        (replica,) = model.connection.pool.replicas
        found = replica.transport.read_statistics(["sd_text_hidden"], Deadline.after(10))
    return found["sd_text_hidden"].num_rows


@pytest.mark.parametrize("pad_id", [0, END_OF_TEXT])
def test_what_fills_a_text_up_is_read(client, own, pad_id):
    ids, mask = tokenize(TEXTS, pad_id)
    expected, _ = ask_transformers(own.model, ids)
    found = client.encode_text_hidden(TEXTS, pad_id=pad_id)
    np.testing.assert_allclose(found.hidden_states, expected["last"], rtol=0, atol=BAR)
    other = client.encode_text_hidden(TEXTS, pad_id=END_OF_TEXT - pad_id).hidden_states
    difference = np.abs(found.hidden_states - other).max(axis=2)
    # After the end of a text; before it nothing can reach from there.
    assert (difference[~mask] > 1e-3).all()
    assert (difference[mask] <= BAR).all()


def test_our_own_manifest_fills_up_with_0(client):
    found = client.encode_text_hidden(TEXTS)
    np.testing.assert_array_equal(
        found.hidden_states, client.encode_text_hidden(TEXTS, pad_id=0).hidden_states
    )


def test_through_the_norm_they_are_the_last_of_a_tower_of_a_layer_less(client, own):
    """As Stable Diffusion 2's text encoder in diffusers, of 23 of 24 layers."""
    shorter = to_transformers(own.clip, num_layers=OWN.text.layers - 1)
    expected, _ = ask_transformers(shorter, tokenize(TEXTS, 0)[0])
    found = client.encode_text_hidden(TEXTS, layer="penultimate_norm")
    np.testing.assert_allclose(found.hidden_states, expected["last"], rtol=0, atol=BAR)


def test_awaited_they_are_the_same(client, own):
    async def ask():
        async with clip_rt.AsyncClient(
            repository=own.place / "models", server="in_process"
        ) as other:
            return await other.encode_text_hidden(TEXTS, layer="penultimate")

    found = asyncio.run(ask())
    expected = client.encode_text_hidden(TEXTS, layer="penultimate")
    np.testing.assert_array_equal(found.hidden_states, expected.hidden_states)


def test_no_texts_have_none(client):
    found = client.encode_text_hidden([])
    assert found.hidden_states.shape == (0, LENGTH, OWN.text.width)
    assert found.attention_mask.shape == (0, LENGTH)
    assert found.text_embeds.shape == (0, OWN.embedding_dim)


# What cannot be used


LONG = "a very long prompt " * 40


def test_too_long_a_text_is_refused_skipped_or_cut(client):
    with pytest.raises(clip_rt.TextTooLongError) as caught:
        client.encode_text_hidden(["cat", LONG])
    assert (caught.value.index, caught.value.context_length) == (1, LENGTH)
    found = client.encode_text_hidden(["cat", LONG, None, "dog"], on_error="skip")
    assert found.indices.tolist() == [0, 3]
    assert [error.index for error in found.failures] == [1, 2]
    expected = client.encode_text_hidden(["cat", "dog"])
    np.testing.assert_allclose(found.hidden_states, expected.hidden_states, rtol=0, atol=BAR)
    np.testing.assert_array_equal(found.attention_mask, expected.attention_mask)
    assert client.encode_text_hidden(LONG, truncate=True).attention_mask.all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": "first"}, "layer is 'first'; it must be one of 'last', 'penultimate'"),
        ({"pad_id": -1}, "pad_id is -1"),
        ({"pad_id": 49408}, "knows the ids 0 to 49407"),
        ({"pad_id": "0"}, "pad_id is '0'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
    ],
)
def test_arguments_that_cannot_be_used_are_said(client, options, words):
    with pytest.raises(clip_rt.InputError, match=words):
        client.encode_text_hidden(["cat"], **options)


@pytest.mark.parametrize("server", ["embedded", "in_process"])
def test_a_model_without_them_says_how_to_export_it(server):
    with clip_rt.Client(repository="model_repository", server=server) as client:
        with pytest.raises(clip_rt.UnknownModelError, match="--text-output hidden") as caught:
            client.encode_text_hidden(["cat"])
        assert caught.value.model == "drawings_text_hidden"
        # All else goes on.
        assert client.encode_texts(["cat"]).shape == (1, client.manifest.embedding_dim)


def test_those_of_other_weights_are_refused(own, tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(own.place / "models", copy)
    changed = {"weights": "random", "repository": copy, "cache": tmp_path / "cache"}
    export(OnnxConfig(**{**own.options, **changed}))
    assert served_version(copy / "sd_text") == 2
    with clip_rt.Client(repository=copy, server="in_process") as client:
        with pytest.raises(clip_rt.ContractError, match="fingerprint differ") as caught:
            client.encode_text_hidden(["cat"])
        assert caught.value.expected["fingerprint"] == client.manifest.fingerprint
    # Back to the version that has them.
    switch_version(copy, "sd")
    with clip_rt.Client(repository=copy, server="in_process") as client:
        assert client.encode_text_hidden(["cat"]).hidden_states.shape[0] == 1


# The repository


def test_the_towers_are_as_they_are_without_them(own, tmp_path):
    """What older clients read."""
    export(OnnxConfig(**own.options, repository=tmp_path))
    for tower in ("image", "text"):
        with_them = read_config(own.place / "models" / f"sd_{tower}")
        assert read_config(tmp_path / f"sd_{tower}") == with_them
        assert [each.name for each in with_them.output] == ["embeddings"]
    manifest = read_manifest(own.place / "models/sd_text_hidden")
    assert manifest == read_manifest(tmp_path / "sd_text")
    assert manifest.contract_version == 1
    assert not (tmp_path / "sd_text_hidden").exists()


def test_how_it_is_served_goes_for_them_too(own, tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(own.place / "models", copy)
    configure(copy, "sd", num_instances=2, max_batch_size=4, runtime="onnxruntime")
    config = read_config(copy / "sd_text_hidden")
    assert config.instance_group[0].count == 2
    assert config.max_batch_size == 4
    assert config.parameters["runtime"].string_value == "onnxruntime"
    configure(copy, "sd", max_batch_size=64)
    assert read_config(copy / "sd_text_hidden").max_batch_size == MAX_HIDDEN_BATCH_SIZE
    with clip_rt.Client(repository=copy, server="in_process") as client:
        assert client.encode_text_hidden(["cat"]).hidden_states.shape == (1, LENGTH, 192)


def test_with_the_last_version_that_has_them_they_go(own, tmp_path):
    copy = tmp_path / "models"
    shutil.copytree(own.place / "models", copy)
    image, text = (copy / f"sd_{tower}/1/model.onnx" for tower in ("image", "text"))
    manifest = replace(read_manifest(copy / "sd_text"), precision="fp16_weights")
    publish(copy, manifest, image=image, text=text)
    # The same weights: those of version 1 are still right.
    with clip_rt.Client(repository=copy, server="in_process") as client:
        assert client.encode_text_hidden(["cat"]).hidden_states.shape[0] == 1
    publish(copy, manifest, image=image, text=text)
    assert not (copy / "sd_text_hidden").exists()


def test_a_bundle_carries_them(own, tmp_path):
    bundle.pack(own.place / "models", "sd", tmp_path / "sd.tar")
    found, _ = bundle.unpack(tmp_path / "sd.tar", tmp_path / "models")
    assert found.hidden_width == OWN.text.width
    source, target = own.place / "models/sd_text_hidden", tmp_path / "models/sd_text_hidden"
    assert read_config(target) == read_config(source)
    assert (target / "1/model.onnx").read_bytes() == (source / "1/model.onnx").read_bytes()


# The export


def test_the_report_says_how_near_they_are(own):
    import json

    report = json.loads((own.place / "models/sd_text_hidden/1/parity.json").read_text())
    cases = report["hidden"]["cases"]
    assert {case["output"] for case in cases} == {*HIDDEN_STATES.values(), "text_embeds"}
    assert all(case["passed"] for case in cases)
    assert max(case["max_difference"] for case in cases) < BAR


def test_a_file_of_other_weights_does_not_pass(own, tmp_path):
    other = random_clip(OWN, seed=4)
    write_onnx(TextHiddenGraph(other), other.facts, tmp_path / "model.onnx")
    with pytest.raises(clip_rt.ParityError, match="Nothing was published") as caught:
        hidden.check_hidden(own.clip, tmp_path / "model.onnx", precision="fp32", by=["onnxruntime"])
    assert not all(case["passed"] for case in caught.value.report["cases"])


def test_weights_in_fp16_are_within_their_tolerance(own, tmp_path):
    options = {**own.options, "cache": tmp_path / "cache", "repository": tmp_path / "models"}
    export(OnnxConfig(**options, precision="fp16_weights", text_output="hidden"))
    ids, _ = tokenize(TEXTS, 0)
    expected, _ = ask_transformers(own.model, ids)
    with clip_rt.Client(repository=tmp_path / "models", server="in_process") as client:
        found = client.encode_text_hidden(TEXTS).hidden_states
    np.testing.assert_allclose(found, expected["last"], rtol=0, atol=2e-2)


@pytest.mark.parametrize("kind", ["open_clip's CLIP", "transformers' SigLIP", "transformers' BERT"])
def test_a_source_that_has_none_is_refused_before_any_work(tmp_path, kind):
    model = external_models.write_kind(tmp_path / "model", kind)
    with pytest.raises(clip_rt.InputError, match=r"RN50.*hf:owner/name.*--text-output") as caught:
        export(OnnxConfig(model=model, repository=tmp_path / "models", text_output="hidden"))
    assert "clip or metaclip_2" in str(caught.value)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_precisions_that_change_them_are_refused(precision):
    with pytest.raises(clip_rt.InputError, match="exported in fp32 or fp16_weights"):
        OnnxConfig(model="RN26@64px", precision=precision, text_output="hidden")


@torch.inference_mode()
def test_metaclip_2_has_them_too(tmp_path):
    from transformers import MetaClip2TextModelWithProjection

    folder = external_models.write_family(tmp_path, "metaclip_2")
    encoder = load_encoder(f"hf:{folder}", weights="openai")
    assert encoder.has_text_hidden
    model = MetaClip2TextModelWithProjection.from_pretrained(folder).eval()
    ids = torch.randint(3, 400, (3, external_models.CONTEXT_LENGTH))
    ids[:, 5:] = 1
    expected, text_embeds = ask_transformers(model, ids)
    found = encoder.encode_text_hidden(ids)
    for rows, layer in zip(found, LAYERS, strict=False):
        np.testing.assert_allclose(rows.numpy(), expected[layer], rtol=0, atol=BAR)
    np.testing.assert_allclose(found.text_embeds_BE.numpy(), text_embeds, rtol=0, atol=BAR)
