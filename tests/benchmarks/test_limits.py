"""Operations and bytes by the spec, held against what torch counts of our own modules."""

import pytest
import torch
from findings_made_up import peaks
from tiny_clip import RESNET, VIT
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.findings import Interval
from benchmarks.limits import limit_s, share_of_limit
from clip_rt.planning.work import BYTES, flop_per_image, flop_per_text, weight_bytes
from clip_rt.specs import MODELS, ModelSpec
from export.graphs import ImageGraph, TextGraph
from training.model import CLIP

SPECS = {spec.name: spec for spec in (VIT, RESNET, *MODELS.values())}
COUNTED = ["tiny-ViT", "tiny-RN", "RN26@64px", "RN50", "RN50x4", "RN101"]
COUNTED += ["ViT-B/32", "ViT-B/16", "ViT-L/14@336px", "ViT-H/14", "ViT-bigG/14"]
NUM_ITEMS = 2


@pytest.fixture(scope="module", params=COUNTED)
def clip(request: pytest.FixtureRequest) -> CLIP:
    """Without memory for its weights: torch counts by shapes."""
    with torch.device("meta"):
        return CLIP(SPECS[request.param]).eval()


def counted(module: object, *inputs: torch.Tensor) -> float:
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(*inputs)  # type: ignore[operator]
    return counter.get_total_flops() / NUM_ITEMS


def test_operations_of_an_image(clip: CLIP) -> None:
    side = clip.spec.side_px
    image = torch.empty(NUM_ITEMS, 3, side, side, device="meta")
    pixels = torch.empty(NUM_ITEMS, side, side, 3, device="meta", dtype=torch.uint8)
    assert flop_per_image(clip.spec, is_pruned=False) == counted(clip.encode_image, image)
    with torch.device("meta"):
        graph = ImageGraph(clip)
    assert flop_per_image(clip.spec, is_pruned=True) == counted(graph, pixels)


@pytest.mark.parametrize("length", [7, 77])
def test_operations_of_a_text(clip: CLIP, length: int) -> None:
    tokens = torch.zeros(NUM_ITEMS, length, device="meta", dtype=torch.int32)
    expected = counted(clip.encode_text, tokens)
    assert flop_per_text(clip.spec, length, is_pruned=False) == expected
    with torch.device("meta"):
        graph = TextGraph(clip)
    assert flop_per_text(clip.spec, length, is_pruned=True) == counted(graph, tokens)


def test_bytes_of_the_matrices(clip: CLIP) -> None:
    def numel(towers: tuple[str, ...]) -> int:
        return sum(
            parameter.numel()
            for name, parameter in clip.named_parameters()
            if name.startswith(towers) and parameter.ndim > 1 and "embedding" not in name
        )

    assert weight_bytes(clip.spec, "image", "fp32") == 4 * numel(("visual.",))
    assert weight_bytes(clip.spec, "text", "int8") == numel(("transformer.", "text_projection"))


def test_the_bundled_figures_of_the_study() -> None:
    # open_clip, docs/model_profile.csv, in GFLOP.
    assert flop_per_image(MODELS["ViT-B/32"], is_pruned=False) / 1e9 == pytest.approx(
        8.82, abs=0.01
    )
    assert flop_per_text(MODELS["ViT-L/14"], 77, is_pruned=False) / 1e9 == pytest.approx(13.3, 0.01)


def test_the_roofline_has_two_sides() -> None:
    rates = {"flop_per_s": 100.0, "bytes_per_s": 10.0, "precision": "fp32"}
    much = limit_s(flop=1000, num_bytes=10, **rates)  # type: ignore[arg-type]
    assert (much.seconds, much.name) == (10.0, "fp32 GEMM")
    little = limit_s(flop=10, num_bytes=50, **rates)  # type: ignore[arg-type]
    assert (little.seconds, little.name) == (5.0, "memory")
    cached = limit_s(flop=10, num_bytes=50, cache_bytes=60, **rates)  # type: ignore[arg-type]
    assert (cached.seconds, cached.name) == (0.1, "fp32 GEMM")


PEAKS = peaks(400.0, 380.0, 1600.0)


def share(samples_s: list[float], probe_s: list[float], **changes: object) -> tuple[Interval, str]:
    options = {
        "flop": 180e9,
        "num_bytes": 1e9,
        "precision": "fp32",
        "peaks": PEAKS,
        "flop_while_probe": 20e9,
        "cache_bytes": 0,
    }
    found = share_of_limit([samples_s], [probe_s], **(options | changes))  # type: ignore[arg-type]
    assert found is not None
    return found


def test_the_share_is_of_what_the_machine_did_in_the_same_rounds() -> None:
    # 20 GFLOP in 0.05 s are 400 GFLOP/s; 180 GFLOP in 0.5 s are 360. Some rounds are twice as slow.
    slowness = [1.0, 2.0, 1.0, 2.0, 1.5, 1.0]
    found, name = share([0.5 * each for each in slowness], [0.05 * each for each in slowness])
    assert (found.low, found.median, found.high) == pytest.approx((0.9, 0.9, 0.9))
    assert name == "fp32 GEMM"
    int8, name = share([0.5] * 6, [0.05] * 6, precision="int8")
    assert int8.median == pytest.approx(0.9 / 4)
    assert name == "int8 GEMM"


def test_the_share_of_reading_weights() -> None:
    found, name = share([0.1] * 6, [0.05] * 6, flop=1e9)
    assert (found.median, name) == (pytest.approx(0.5), "memory")
    found, name = share([0.1] * 6, [0.05] * 6, flop=1e9, cache_bytes=2 * 10**9)
    assert (found.median, name) == (pytest.approx(0.025), "fp32 GEMM")


def test_no_share_without_a_peak() -> None:
    unknown = peaks(400.0, 380.0)
    for precision in ("fp16", "int8"):
        assert (
            share_of_limit(
                [[0.1] * 6],
                [[0.1] * 6],
                flop=1e9,
                num_bytes=1e9,
                precision=precision,  # type: ignore[arg-type]
                peaks=unknown,
                flop_while_probe=20e9,
                cache_bytes=0,
            )
            is None
        )


@pytest.mark.parametrize("precision", BYTES)
def test_fewer_bits_are_fewer_bytes(precision: str) -> None:
    spec: ModelSpec = MODELS["ViT-B/32"]
    found = weight_bytes(spec, "image", precision)  # type: ignore[arg-type]
    assert found * 4 == weight_bytes(spec, "image", "fp32") * BYTES[precision]  # type: ignore[index]
