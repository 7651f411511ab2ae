"""A batch in chunks has the gradient of the whole batch, and the memory of a chunk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import tiny_clip as tiny
import torch
from torch import Tensor

from clip_rt.errors import InputError
from clip_rt.specs import END_OF_TEXT, START_OF_TEXT
from training.accumulate import cached_backward, split_batch
from training.data.batches import Batch, count_tokens
from training.loss import contrastive_loss, sigmoid_loss
from training.model import CLIP

BF16 = partial(torch.autocast, "cpu", torch.bfloat16)


def make(spec=tiny.VIT, **options) -> CLIP:
    torch.manual_seed(0)
    clip = CLIP(spec, logit_bias=-3.0, **options)
    return clip.train()


def make_batch(spec=tiny.VIT, num_pairs: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(1)
    image_BCSS = torch.randn(num_pairs, 3, spec.side_px, spec.side_px, generator=generator)
    tokens_BL = torch.zeros(num_pairs, 24, dtype=torch.int64)
    for row in range(num_pairs):
        words = 2 + row
        tokens_BL[row, 0] = START_OF_TEXT
        tokens_BL[row, 1 : 1 + words] = torch.randint(1, 49000, (words,), generator=generator)
        tokens_BL[row, 1 + words] = END_OF_TEXT
    group_B = torch.arange(num_pairs)
    group_B[-1] = group_B[0]
    return Batch(image_BCSS, tokens_BL, group_B, count_tokens(tokens_BL))


def infonce(clip: CLIP) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda image_BE, text_BE, group_B: contrastive_loss(
        image_BE, text_BE, clip.logit_scale.exp(), group_B=group_B
    )


def sigmoid(clip: CLIP) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda image_BE, text_BE, group_B: sigmoid_loss(
        image_BE, text_BE, clip.logit_scale.exp(), clip.logit_bias, group_B=group_B
    )


def gradients(clip: CLIP) -> dict[str, Tensor]:
    return {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", [infonce, sigmoid])
def test_chunks_give_the_loss_and_gradients_of_the_whole_batch(objective, checkpointing):
    whole, cached = make(), make()
    cached.set_grad_checkpointing(checkpointing)
    batch = make_batch()
    expected = objective(whole)(*whole(batch.image_BCSS, batch.tokens_BL), batch.group_B)
    expected.backward()
    chunks = split_batch(batch, 5)
    assert [len(chunk.group_B) for chunk in chunks] == [5, 5, 2]
    assert [chunk.tokens_BL.shape[1] for chunk in chunks] == [8, 13, 15]
    found = cached_backward(cached, chunks, objective(cached))
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-5)
    wanted = gradients(whole)
    assert len(wanted) >= len(list(whole.parameters())) - 1, "only the bias may have none"
    for name, gradient in gradients(cached).items():
        expected_gradient = wanted.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert wanted.keys() <= gradients(cached).keys()
    assert max(float(gradient.abs().max()) for gradient in wanted.values()) > 1e-2


def test_chunks_are_cut_after_the_end_of_text_not_at_an_exclamation_mark():
    batch = make_batch(num_pairs=4)
    batch.tokens_BL[0, 2] = 0  # "!" has the id that also pads.
    assert [chunk.tokens_BL.shape[1] for chunk in split_batch(batch, 1)] == [4, 5, 6, 7]


def test_one_chunk_is_embedded_once():
    clip, batch, calls = make(), make_batch(), []
    clip.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    cached_backward(clip, [batch], infonce(clip))
    assert calls == [True]
    cached_backward(clip, split_batch(batch, 6), infonce(clip))
    assert calls == [True, False, False, True, True]


def test_gradients_are_added_to_those_already_there():
    clip, batch = make(), make_batch()
    cached_backward(clip, split_batch(batch, 6), infonce(clip))
    once = {name: gradient.clone() for name, gradient in gradients(clip).items()}
    cached_backward(clip, split_batch(batch, 4), infonce(clip))
    for name, gradient in gradients(clip).items():
        torch.testing.assert_close(gradient, 2 * once[name], rtol=0, atol=1e-5)


def test_patch_dropout_drops_the_same_patches_both_times():
    batch, size = make_batch(), 4
    kept: list[Tensor] = []
    clip = make(patch_dropout=0.5)
    clip.visual.transformer.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    torch.manual_seed(7)
    cached_backward(clip, split_batch(batch, size), infonce(clip))
    after = torch.rand(3)
    first, second = kept[:3], kept[3:]
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)
    assert first[0].shape[1] == 9, "the class token and half of 16 patches"
    # Random numbers go on as after the first passes alone.
    torch.manual_seed(7)
    with torch.no_grad():
        for chunk in split_batch(batch, size):
            clip(chunk.image_BCSS, chunk.tokens_BL)
    assert torch.equal(torch.rand(3), after)


def test_running_statistics_move_once_for_each_chunk():
    batch = make_batch(tiny.RESNET, 8)
    chunks = split_batch(batch, 4)
    cached, plain = make(tiny.RESNET), make(tiny.RESNET)
    cached_backward(cached, chunks, infonce(cached))
    with torch.no_grad():
        for chunk in chunks:
            plain(chunk.image_BCSS, chunk.tokens_BL)
    before = dict(make(tiny.RESNET).named_buffers())
    expected = dict(plain.named_buffers())
    for name, buffer in cached.named_buffers():
        assert torch.equal(buffer, expected[name]), name
        if name.endswith("num_batches_tracked"):
            assert buffer == 2
        elif name.endswith("running_mean"):
            assert not torch.equal(buffer, before[name]), name


def test_a_locked_tower_takes_no_gradient():
    clip = make()
    clip.visual.requires_grad_(False)
    cached_backward(clip, split_batch(make_batch(), 6), infonce(clip))
    assert all(parameter.grad is None for parameter in clip.visual.parameters())
    assert clip.text_projection.grad.abs().max() > 1e-3


@pytest.mark.parametrize("around", [nullcontext, BF16], ids=["plain", "inside another autocast"])
def test_autocast_gives_the_gradients_of_the_whole_batch(around):
    whole, cached, batch = make(), make(), make_batch()
    with BF16():
        image_BE, text_BE = whole(batch.image_BCSS, batch.tokens_BL)
    infonce(whole)(image_BE, text_BE, batch.group_B).backward()
    with around():
        cached_backward(cached, split_batch(batch, 4), infonce(cached), autocast=BF16)
    expected = gradients(whole)
    for name, gradient in gradients(cached).items():
        if name != "logit_bias":
            scale = float(expected[name].abs().max()) + 1e-4
            torch.testing.assert_close(
                gradient / scale, expected[name] / scale, rtol=0, atol=0.05, msg=name
            )


def test_fp16_gradients_are_scaled_and_the_loss_is_not():
    autocast = partial(torch.autocast, "cpu", torch.float16)
    plain, scaled, batch = make(), make(), make_batch()
    expected = cached_backward(plain, split_batch(batch, 4), infonce(plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.0)
    found = cached_backward(
        scaled, split_batch(batch, 4), infonce(scaled), autocast=autocast, scaler=scaler
    )
    assert abs(found - expected) < 0.05
    ratio = scaled.text_projection.grad.norm() / plain.text_projection.grad.norm()
    assert 1000 < ratio < 1050
    scaler.unscale_(optimizer)
    torch.testing.assert_close(
        scaled.logit_scale.grad, plain.logit_scale.grad, rtol=0.05, atol=1e-3
    )
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10, "no gradient was infinite"


def test_no_chunks_are_refused():
    clip = make()
    with pytest.raises(InputError, match="at least one"):
        cached_backward(clip, [], infonce(clip))


PEAK_MEMORY = """
import sys
sys.path[:0] = {path!r}
import torch
from test_accumulate import LazyChunks, infonce, make
from training.accumulate import cached_backward

torch.set_num_threads(1)
clip = make()
cached_backward(clip, LazyChunks({num_chunks}, 16), infonce(clip))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) / 1024)
"""


class LazyChunks:
    """Chunks that exist only while they are looked at."""

    def __init__(self, num_chunks: int, chunk_size: int) -> None:
        self.num_chunks, self.chunk_size = num_chunks, chunk_size

    def __len__(self) -> int:
        return self.num_chunks

    def __getitem__(self, index: int) -> Batch:
        batch = make_batch(num_pairs=self.chunk_size)
        return replace(batch, image_BCSS=batch.image_BCSS + index)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_does_not_grow_with_the_batch():
    def peak_mib(num_chunks: int) -> float:
        code = PEAK_MEMORY.format(path=sys.path, num_chunks=num_chunks)
        return float(
            subprocess.run(
                [sys.executable, "-c", code],
                check=True,
                capture_output=True,
                text=True,
                timeout=120,
            ).stdout
        )

    small, large = peak_mib(4), peak_mib(40)
    logits_and_embeddings_mib = (6 * 640**2 + 8 * 640 * 48) * 4 / 2**20
    assert large - small < logits_and_embeddings_mib + 10
