"""What this processor can do: the instruction sets that decide how fast matrices are multiplied.

Python's standard library only, and nothing else of this package: an export copies this file beside
the model that Triton runs, where clip_rt may be missing.

Sources: oneDNN, "CPU Dispatcher Control" (what ONEDNN_MAX_CPU_ISA names and which sets each
includes); Linux, `arch/x86/include/asm/cpufeatures.h` and `Documentation/arch/arm64/elf_hwcaps.rst`
(the words in /proc/cpuinfo).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
FLAGS = (
    *("avx2", "avx512f", "avx512_fp16", "avx512_bf16", "avx512_vnni", "avx_vnni"),
    *("amx_bf16", "amx_int8", "amx_tile"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve"),
)
"""Of /proc/cpuinfo, those that matter here; the last row is Arm's."""

_NAMES = (
    ("AVX-512", ("avx512f",)),
    ("AVX2", ("avx2",)),
    ("SVE", ("sve",)),
    ("NEON", ("asimd",)),
    ("VNNI", ("avx512_vnni",)),
    ("AVX-VNNI", ("avx_vnni",)),
    ("dot product", ("asimddp",)),
    ("I8MM", ("i8mm",)),
    ("BF16", ("avx512_bf16", "bf16")),
    ("AMX", ("amx_tile",)),
)
"""Names of sets in the order they are said, each with the flags any of which is it."""
_IMPLIED = {"AVX2": "AVX-512", "AVX-VNNI": "VNNI", "NEON": "SVE", "dot product": "I8MM"}
"""What a label leaves out where the processor has the other, which is more."""

ONEDNN_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""They hold oneDNN, and with it PyTorch and OpenVINO, to less; the first that is set counts."""
CAP_VARIABLES = (
    *ONEDNN_VARIABLES,
    *("OV_CPU_MAX_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS"),
)
"""All that hold a library to less than the processor can: of oneDNN, OpenVINO, PyTorch, MKL. ONNX
Runtime has none."""

_AVX2 = frozenset({"avx2"})
_AVX512 = _AVX2 | {"avx512f"}
_AVX512_VNNI = _AVX512 | {"avx512_vnni"}
_AVX512_BF16 = _AVX512_VNNI | {"avx512_bf16"}
_AVX512_FP16 = _AVX512_BF16 | {"avx512_fp16", "avx_vnni"}
_AMX = _AVX512_FP16 | {"amx_tile", "amx_int8", "amx_bf16"}
_ALLOWED_BY_CAP: dict[str, frozenset[str]] = {
    "SSE41": frozenset(),
    "AVX": frozenset(),
    "AVX2": _AVX2,
    "AVX2_VNNI": _AVX2 | {"avx_vnni"},
    "AVX2_VNNI_2": _AVX2 | {"avx_vnni"},
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": _AVX512_VNNI,
    "AVX512_CORE_BF16": _AVX512_BF16,
    "AVX512_CORE_FP16": _AVX512_FP16,
    "AVX10_1_512": _AVX512_FP16,
    "AVX512_CORE_AMX": _AMX,
    "AVX512_CORE_AMX_FP16": _AMX,
    "AVX10_1_512_AMX": _AMX,
    "AVX10_1_512_AMX_FP16": _AMX,
}
"""What oneDNN still uses; of another word, such as DEFAULT, it takes no notice."""


@dataclass(frozen=True)
class Processor:
    """A processor, and what the environment lets libraries use of it."""

    name: str
    """As the kernel has it, such as AMD EPYC; not empty."""
    flags: tuple[str, ...]
    """Those of `FLAGS` it has, in their order."""
    caps: tuple[tuple[str, str], ...] = ()
    """Variables of `CAP_VARIABLES` that are set, with their values."""

    @property
    def usable_flags(self) -> frozenset[str]:
        """Those of `flags` that oneDNN, and so PyTorch and OpenVINO, uses."""
        caps = dict(self.caps)
        word = next((caps[name] for name in ONEDNN_VARIABLES if name in caps), "")
        allowed = _ALLOWED_BY_CAP.get(word.upper())
        return frozenset(self.flags if allowed is None else allowed.intersection(self.flags))

    @property
    def has_fast_int8(self) -> bool:
        """Whether INT8 is faster than FP32 in OpenVINO; with AVX2 alone it is a little slower.

        AVX-512 without VNNI halves the time. Source: `python -m benchmarks.studies.defaults`.
        """
        fast = {"avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
        return bool(self.usable_flags & fast)

    @property
    def has_fast_bf16(self) -> bool:
        """Whether PyTorch multiplies BF16 as such; without, it goes by FP32 and back.

        Arm's is left out: nobody has measured a training step there.
        """
        return bool(self.usable_flags & {"avx512_bf16", "amx_bf16"})

    @property
    def label(self) -> str:
        """The name with the sets: "AMD EPYC (AVX-512, VNNI, BF16)"; caps are said too."""
        return f"{self.name}{in_brackets(self.flags, dict(self.caps))}"

    def lacks(self, *names: str) -> str:
        """Say that sets are missing: "has no VNNI or AMX", or that a cap keeps libraries off."""
        missing = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
        if self.caps and self.usable_flags != frozenset(self.flags):
            caps = ", ".join(f"{name}={value[:40]}" for name, value in self.caps)
            return f"may use no {missing} ({caps})"
        return f"has no {missing}"


def read(text: str | None = None, environment: Mapping[str, str] | None = None) -> Processor:
    """Describe the processor this process runs on.

    Args:
        text: Of /proc/cpuinfo; read if None. The first core's part counts.
        environment: `os.environ` if None.
    """
    fields = read_cpuinfo(text)
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    given = os.environ if environment is None else environment
    return Processor(
        name=fields.get("model name") or platform.processor() or platform.machine() or "unnamed",
        flags=tuple(flag for flag in FLAGS if flag in flags),
        caps=tuple((name, given[name]) for name in CAP_VARIABLES if given.get(name)),
    )


def read_cpuinfo(text: str | None = None) -> dict[str, str]:
    """Return what the kernel says of the first core, empty where it says nothing.

    Args:
        text: Of /proc/cpuinfo; read if None.
    """
    if text is None:
        try:
            text = CPUINFO.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
    pairs = (line.partition(":") for line in text.strip().split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def name_sets(flags: Iterable[str]) -> tuple[str, ...]:
    """Name all sets of these flags for a person: ("AVX-512", "AVX2", "VNNI", "BF16")."""
    found = set(flags)
    return tuple(name for name, any_of in _NAMES if found.intersection(any_of))


def in_brackets(flags: Iterable[str], caps: Mapping[str, object]) -> str:
    """Return the sets and the caps as they follow a processor's name; nothing where there are none.

    Args:
        flags: Some of `FLAGS`.
        caps: Values by variable.
    """
    names = name_sets(flags)
    sets = ", ".join(name for name in names if _IMPLIED.get(name) not in names)
    said = "; ".join(
        filter(None, [sets, *(f"{key}={str(value)[:40]}" for key, value in caps.items())])
    )
    return f" ({said})" if said else ""
