"""Fine-tuning of models of other libraries: what moves, and that it can be exported again."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import external_models
import numpy as np
import pytest
import tiny_run
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from clip_rt.errors import CheckpointError, InputError, UnknownModelError
from export.onnx import OnnxConfig, export
from export.triton_config import read_manifest
from training.build import build_external, load_teacher
from training.data.pair_batches import PairBatches
from training.data.sources import open_sources
from training.encoders.find import load_encoder
from training.evaluate import EvaluateConfig, evaluate
from training.evaluation.embed import open_model
from training.interpolate import InterpolateConfig
from training.interpolate import run as interpolate
from training.journal import read_journal
from training.optimizer import adamw, count_layers, layer_of
from training.run import main
from training.weights.load import fingerprint

pytestmark = [pytest.mark.torch, pytest.mark.usefixtures("open_clip")]

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module", params=external_models.KINDS)
def named(request, open_clip, tmp_path_factory):
    return external_models.write_kind(tmp_path_factory.mktemp("model") / "m", request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.write_classes(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def table(data):
    rows = [
        f"{path.relative_to(data)},a photo of a {path.parent.name}."
        for path in sorted(data.rglob("*.png"))
    ]
    file = data / "table.csv"
    file.write_text("\n".join(["image,caption", *rows]), "utf-8")
    return file


def config(named, table, out_dir, **changes):
    options = {"model": named, "ema_decay": 0.0, "peak_lr": 1e-3, "total_steps": 6}
    options |= {"eval_every_steps": 3, "eval_data": (table,)}
    return tiny_run.config(table, out_dir, **{**options, **changes})


def moved(named, file):
    """Return the towers of the weights that a run changed, and the names that were not changed."""
    encoder = load_encoder(named, weights="openai")
    before, after = encoder.weights(), load_file(file)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return {encoder.tower_of(f"model.{name}") for name in changed}, changed


def test_fine_tuning_learns_and_its_weights_are_loaded_and_exported(named, table, tmp_path):
    main(config(named, table, tmp_path / "run", total_steps=30, eval_every_steps=15))
    losses = [line["loss"] for line in read_journal(tmp_path / "run/log.jsonl") if "loss" in line]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:3])
    file = tmp_path / "run/checkpoint.safetensors"
    towers, changed = moved(named, file)
    assert towers == {"image", "text", None}
    assert {name for name in changed if name.startswith("logit_")} == (
        {"logit_scale", "logit_bias"} & load_file(file).keys()
    )

    tuned = open_model(file, model=named)
    assert fingerprint(tuned.weights()) == fingerprint(load_file(file))
    for name in ("logit_scale", "logit_bias"):
        if name in changed:
            assert getattr(tuned, name).item() == load_file(file)[name].item()
    # What the run measured last is what the file is measured by.
    found = evaluate(EvaluateConfig(model=named, checkpoint=str(file), data=(table,))).retrieval
    logged = [line for line in read_journal(tmp_path / "run/log.jsonl") if "recall1_texts" in line]
    assert {f"recall{k}_texts": share for k, share in found.text_at.items()} == pytest.approx(
        {name: share for name, share in logged[-1].items() if name.endswith("_texts")}
    )

    report = export(
        OnnxConfig(
            model=named,
            weights=str(file),
            name="tuned",
            repository=tmp_path / "models",
            cache=tmp_path / "cache",
        )
    )
    assert report.passed
    manifest = read_manifest(tmp_path / "models/tuned_text")
    assert manifest.fingerprint == fingerprint(tuned.weights())
    assert manifest.logit_scale == pytest.approx(float(tuned.logit_scale.exp()))


def test_an_image_tower_that_is_locked_does_not_move(named, table, tmp_path):
    main(config(named, table, tmp_path / "run", lock="image"))
    towers, _ = moved(named, tmp_path / "run/checkpoint.safetensors")
    assert towers == {"text", None}


def test_a_run_that_was_stopped_ends_as_one_that_was_not(named, table, tmp_path):
    whole = config(named, table, tmp_path / "whole", ema_decay=0.9)
    main(whole)
    stopped = replace(whole, out_dir=tmp_path / "stopped")
    main(stopped)
    # As a kill after the first snapshot would leave it.
    (tmp_path / "stopped/snapshots/step_00000006.safetensors").unlink()
    (tmp_path / "stopped/checkpoint.safetensors").unlink()
    main(replace(stopped, resume=True))
    name = "checkpoint.safetensors"
    one, two = load_file(tmp_path / "whole" / name), load_file(tmp_path / "stopped" / name)
    assert all(torch.equal(one[each], two[each]) for each in one)


def test_gradients_of_chunks_are_those_of_the_batch(named, table, tmp_path):
    # Of a tower that moves, dropout would draw others for other chunks.
    options = {"total_steps": 1, "warmup_steps": 0, "lock": "text", "eval_every_steps": 1}
    for size in (0, 2):
        main(config(named, table, tmp_path / str(size), chunk_size=size, **options))
    norms = [
        next(
            line["grad_norm"]
            for line in read_journal(tmp_path / f"{size}/log.jsonl")
            if "grad_norm" in line
        )
        for size in (0, 2)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_two_processes_train_as_one(open_clip, table, tmp_path):
    named = external_models.write_kind(tmp_path / "m", "open_clip's SigLIP")
    options = "--batch-size 6 --total-steps 3 --warmup-steps 1 --eval-every-steps 3".split()
    options += "--log-every-steps 1 --num-workers 0 --num-threads 1 --device cpu".split()
    losses = []
    for size in ("1", "2"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", size, "-m", "training.run", "--model", named]
        command += ["--data", str(table), "--out-dir", str(tmp_path / size), "--precision", "fp32"]
        done = subprocess.run(
            [*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        journal = read_journal(tmp_path / size / "log.jsonl")
        losses.append([line["loss"] for line in journal if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_batches_are_what_the_library_makes_of_the_captions(named, table, tmp_path):
    encoder = load_encoder(named, weights="openai")
    facts = encoder.facts
    batches = PairBatches(
        open_sources([str(table)]),
        batch_size=6,
        facts=facts,
        tokenizer=encoder.text_tokenizer,
        seed=0,
    )
    batch = next(batches.stream(0))
    expected = {
        tuple(row)
        for row in encoder.source.tokens([f"a photo of a {each}." for each in COLOURS]).tolist()
    }
    length = batch.tokens_BL.shape[1]
    assert (length == facts.context_length) or facts.is_any_length_exact
    assert {tuple(row) for row in batch.tokens_BL.tolist()} <= {row[:length] for row in expected}
    mean, std = (torch.tensor(each)[:, None, None] for each in (facts.mean, facts.std))
    levels = 255 * (batch.image_BCSS * std + mean)
    assert (levels - levels.round()).abs().max() < 1e-2
    assert (levels.round().amin(), levels.round().amax()) >= (0, 120)


def test_every_layer_has_its_place(named):
    encoder = load_encoder(named, weights="openai")
    tops = count_layers(encoder)
    assert tops == {"image": 3, "text": 3}
    found: dict[tuple[str, int], list[str]] = {}
    for name, _ in encoder.named_parameters():
        if (tower := encoder.tower_of(name)) is not None:
            found.setdefault((tower, layer_of(name, tops[tower])), []).append(name)
    assert sorted(found) == [(tower, layer) for tower in ("image", "text") for layer in range(4)]
    for (tower, layer), names in found.items():
        for name in names:
            if layer == 0:
                assert "embed" in name or "conv1" in name or "pre" in name, name
            if layer == tops[tower]:
                assert not any(part.isdecimal() for part in name.split(".")), name
    encoder.requires_grad_(True)
    optimizer = adamw(encoder, peak_lr=1.0, weight_decay=0.1, layer_decay=0.5)
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0, 0.5, 0.25, 0.125}


def test_weights_before_and_after_are_mixed(named, table, tmp_path):
    main(config(named, table, tmp_path / "run", total_steps=3))
    file = tmp_path / "run/checkpoint.safetensors"
    interpolate(
        InterpolateConfig(
            zero_shot="openai", fine_tuned=file, model=named, out=tmp_path / "mixed.safetensors"
        )
    )
    before = load_encoder(named, weights="openai").weights()
    after, mixed = (
        load_file(file),
        load_encoder(named, weights=str(tmp_path / "mixed.safetensors")).weights(),
    )
    for name, tensor in mixed.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (before[name] + after[name]) / 2)


def test_a_teacher_must_read_what_the_student_reads(named, table, tmp_path):
    student = load_encoder(named, weights="openai")
    asked = config(named, table, tmp_path, teacher="openai", teacher_model=named)
    assert load_teacher(asked, student).facts == student.facts
    other = external_models.write_open_clip(
        tmp_path / "other", preprocessing={"mean": [0.1, 0.2, 0.3]}
    )
    asked = replace(asked, teacher_model=f"open_clip:{other}")
    with pytest.raises(InputError, match=r"must read the same images and texts, and mean differs"):
        load_teacher(asked, student)
    main(config(named, table, tmp_path / "run", teacher="openai", teacher_model=named))


def test_a_checkpoint_says_what_it_is_of_and_is_of_nothing_else(named, table, tmp_path):
    main(config(named, table, tmp_path / "run", total_steps=3))
    file = tmp_path / "run/checkpoint.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["architecture"] == load_encoder(named, weights=None).facts.name
    with pytest.raises(CheckpointError, match=r"is a fine-tuned .* Pass --model"):
        open_model(file)
    folder = external_models.write_open_clip(tmp_path / "wide", text={"width": 32})
    with pytest.raises(CheckpointError, match=r"were trained as .* is configured otherwise"):
        load_encoder(f"open_clip:{folder}", weights=str(file))


def test_weights_are_fed_as_they_were_trained(open_clip, table, tmp_path):
    """Two folders of one architecture, whose images are prepared otherwise."""
    folder = external_models.write_open_clip(tmp_path / "first")
    main(config(f"open_clip:{folder}", table, tmp_path / "run", total_steps=1))
    file = tmp_path / "run/checkpoint.safetensors"
    assert load_encoder(f"open_clip:{folder}", weights=str(file))
    said = {"mean": [0.1, 0.2, 0.3]}
    other = external_models.write_open_clip(tmp_path / "second", preprocessing=said)
    with pytest.raises(CheckpointError, match=r"trained with mean .*--model open_clip:FOLDER"):
        load_encoder(f"open_clip:{other}", weights=str(file))


def test_a_teacher_of_one_length_is_no_teacher_of_cut_texts(open_clip, table, tmp_path):
    student = load_encoder(
        f"open_clip:{external_models.write_open_clip(tmp_path / 'causal')}", weights="openai"
    )
    assert student.facts.is_any_length_exact
    folder = external_models.write_open_clip(tmp_path / "whole", text={"no_causal_mask": True})
    asked = config(
        f"open_clip:{tmp_path / 'causal'}",
        table,
        tmp_path,
        teacher="openai",
        teacher_model=f"open_clip:{folder}",
    )
    with pytest.raises(InputError, match="reads them at one length only"):
        load_teacher(asked, student)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("laion2b_s34b_b79k", "hf:laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("openai", "no weights of its own"),
        ("nothing", "name one, hf:owner/name"),
    ],
)
def test_names_of_weights_lead_to_where_they_lie(open_clip, weights, said):
    with pytest.raises(CheckpointError, match=said):
        load_encoder("open_clip:ViT-B-32", weights=weights)
    with pytest.raises(UnknownModelError, match="has no model 'ViT-B32'"):
        load_encoder("open_clip:ViT-B32", weights=weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_dropout": 0.5}, "--patch-dropout is for"),
        ({"grad_checkpointing": True}, "--chunk-size saves memory"),
        ({"parallel": "fsdp"}, "--parallel ddp"),
        ({"data": ()}, "name --data"),
        ({"activation": "gelu"}, "leave --activation out"),
    ],
)
def test_what_is_for_own_architectures_is_refused(named, table, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        build_external(replace(config(named, table, tmp_path), **changes))


def test_the_objective_is_the_models_own(named, table, tmp_path):
    is_sigmoid = load_encoder(named, weights=None).facts.score == "sigmoid"
    right, wrong = ("sigmoid", "infonce") if is_sigmoid else ("infonce", "sigmoid")
    build_external(config(named, table, tmp_path, objective=right))
    with pytest.raises(InputError, match=f"was trained by the objective {right}"):
        build_external(config(named, table, tmp_path, objective=wrong))


def test_a_model_without_a_temperature_is_not_trained(open_clip, table, tmp_path):
    folder = external_models.write_family(tmp_path / "blip", "blip")
    with pytest.raises(InputError, match="has no temperature to learn"):
        build_external(config(f"hf:{folder}", table, tmp_path))


def test_a_temperature_that_divides_is_written_back_as_one(open_clip, table, tmp_path):
    folder = external_models.write_family(tmp_path / "align", "align")
    main(config(f"hf:{folder}", table, tmp_path / "run", total_steps=3))
    file = tmp_path / "run/checkpoint.safetensors"
    tuned = load_encoder(f"hf:{folder}", weights=str(file))
    before = load_encoder(f"hf:{folder}", weights="openai")
    temperature = float(load_file(file)["temperature"])
    assert temperature != float(before.weights()["temperature"])
    assert float(tuned.logit_scale.exp()) == pytest.approx(1 / temperature)


def test_a_sigmoids_temperature_has_no_limit(open_clip, tmp_path):
    found = load_encoder(f"open_clip:{external_models.write_siglip(tmp_path / 'm')}", weights=None)
    with torch.no_grad():
        found.logit_scale.fill_(5.0)  # 148; SigLIP's own weights have 117.
    found.clamp_logit_scale()
    assert found.logit_scale.item() == 5.0
