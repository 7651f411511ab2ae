"""What every stage is given: the device and its clock, how much to measure, and until when."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Turns, Way, inverse, scaled, take_turns
from clip_rt.specs import ModelSpec, TextSpec, ViTSpec, find_spec
from export.pipeline import random_clip
from training.model import CLIP, ResidualAttentionBlock

RESIDUAL_FACTOR = 32.0
"""Times what every block adds to its stream: values as large as those of trained weights."""
MIN_TURN_S = 0.03
PRECISE = 0.01
"""Half-width of the interval of a median at which no more rounds are made."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is measured; every size of a rehearsal is small, and nothing else differs."""

    models: tuple[ModelSpec, ...]
    """In order of worth."""
    batches: tuple[int, ...]
    """Images or texts of a call, in order of worth; the first is that of the goals."""
    gemm_side: int
    """Of the square matrices."""
    copy_mib: int
    parity_batch: int
    """Largest batch that is compared with torch."""
    text_lengths: tuple[int, ...]
    """Tokens of the texts that are compared."""
    pairs: dict[str, int]
    """Of a training step, by model."""
    jpegs: int
    jpeg_px: tuple[int, int]
    case_s: float
    """For the turns of a case."""
    power_s: float
    """How long a contender runs while its power is read."""
    compile_backend: str
    """Of torch.compile."""
    trained: str
    """Architecture of the run that is killed and resumed."""
    trained_batch: int


def full_scale(memory_gib: float) -> Scale:
    """Return what is measured on a GPU of so much memory."""
    is_large = memory_gib > 60
    return Scale(
        models=tuple(map(find_spec, ("ViT-L/14", "ViT-B/32"))),
        batches=(128, 1, 32, 8, 256),
        gemm_side=8192,
        copy_mib=2048,
        parity_batch=32,
        text_lengths=tuple(range(2, 78)),
        pairs={"ViT-L/14": 128 if is_large else 32, "ViT-B/32": 512 if is_large else 128},
        jpegs=64,
        jpeg_px=(640, 480),
        case_s=4.0,
        power_s=1.5,
        compile_backend="inductor",
        trained="ViT-B/32",
        trained_batch=64,
    )


def rehearsal_scale() -> Scale:
    """Return what a processor of two cores does in minutes."""
    full = full_scale(0.0)
    return replace(
        full,
        models=tuple(map(_shrink, full.models)),
        batches=(4, 1),
        gemm_side=256,
        copy_mib=16,
        parity_batch=4,
        text_lengths=(3, 16, 77),
        pairs={name: 4 for name in full.pairs},
        jpegs=4,
        jpeg_px=(320, 240),
        case_s=0.0,
        compile_backend="aot_eager",  # Traces all the same, and needs no compiler.
        trained="RN26@64px",
        trained_batch=8,
    )


def _shrink(spec: ModelSpec) -> ModelSpec:
    assert isinstance(spec.image, ViTSpec)
    side_px = 2 * spec.image.patch_px
    image = replace(spec.image, width=64, layers=2, heads=2, mlp_width=None)
    text: TextSpec = replace(spec.text, width=64, layers=2, heads=2)
    return replace(spec, side_px=side_px, image=image, text=text, embedding_dim=32)


@dataclass(kw_only=True)
class Bench:
    """What stages share; `earlier` and `ends_at_s` change from one to the next."""

    device: torch.device
    scale: Scale
    is_rehearsal: bool
    folder: Path
    """For what is made: ONNX files, engines, data."""
    found: Mapping[str, Mapping[str, str]]
    """What is installed; see `surroundings`."""
    earlier: Mapping[str, Any] = field(default_factory=dict)
    """Results of the stages before, by name."""
    ends_at_s: float = 0.0
    """On the monotonic clock; no case begins later."""
    _clips: dict[str, CLIP] = field(default_factory=dict)

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU that is measured."""
        return self.device.type == "cuda"

    def has_time(self, needed_s: float = 0.0) -> bool:
        """Whether something that takes so long may still begin."""
        return time.monotonic() + needed_s < self.ends_at_s

    def has(self, name: str) -> bool:
        """Whether something is installed and can be used here."""
        return "version" in self.found.get(name, {})

    def clip(self, spec: ModelSpec) -> CLIP:
        """Return random weights of an architecture, FP32 on the processor; the same each time."""
        if spec.name not in self._clips:
            clip = random_clip(spec)
            with torch.no_grad():
                for block in clip.modules():
                    if isinstance(block, ResidualAttentionBlock):
                        for name in ("attn.out_proj", "mlp.c_proj"):
                            for parameter in block.get_submodule(name).parameters():
                                parameter.mul_(RESIDUAL_FACTOR)
            self._clips[spec.name] = clip
        return self._clips[spec.name]

    def gemm_flop_per_s(self, precision: str) -> float | None:
        """Return the rate the first stage measured for products of large square matrices."""
        rates = self.earlier.get("device", {}).get("gemm_tflop_per_s", {})
        return 1e12 * rates[precision]["median"] if precision in rates else None

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object], num_calls: int) -> float:
        """Return how long the device takes for so many calls, one after the other."""
        if not self.is_cuda:
            start_s = time.perf_counter()
            for _ in range(num_calls):
                call()
            return time.perf_counter() - start_s
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(num_calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def device_way(self, call: Callable[[], object]) -> Way:
        """Make of a call a way that times the device over all calls of a turn together."""
        return lambda num_calls: [self.seconds(call, num_calls) / num_calls] * num_calls

    def turns(self, ways: Mapping[str, Way], *, budget_s: float | None = None) -> dict[str, Turns]:
        """Time ways by turns, in a rehearsal three times each."""
        if self.is_rehearsal:
            few: dict[str, Any] = {"budget_s": 0.0, "min_rounds": 3, "max_rounds": 3}
            return take_turns(ways, **few, min_turn_s=0.0, max_warm_up_turns=1)
        budget_s = self.scale.case_s if budget_s is None else budget_s
        return take_turns(ways, target=PRECISE, budget_s=budget_s, min_turn_s=MIN_TURN_S)

    def free(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


def spread(turns: Turns, factor: float = 1.0, *, is_rate: bool = False) -> dict[str, float]:
    """Return the median of a call in seconds times a factor, and its 95 % interval, as JSON.

    Args:
        turns: Of one way.
        factor: Of the seconds; of a rate, what is divided by them.
        is_rate: Whether it is so much a second that is asked for.
    """
    seconds = turns.interval_s
    interval = inverse(seconds, factor) if is_rate else scaled(seconds, factor)
    return {name: float(f"{each:.5g}") for name, each in asdict(interval).items()}


def error_in_words(error: BaseException) -> str:
    """Return the first sentence or line of what went wrong, with its kind."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:300]}"


@contextmanager
def noting(result: dict[str, Any], what: str) -> Iterator[None]:
    """Let one part fail without the others: why goes to `result["failed"]`."""
    try:
        yield
    except Exception as error:
        result.setdefault("failed", {})[what] = error_in_words(error)
