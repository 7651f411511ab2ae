"""Engines are built once for each key, and the key changes with whatever they depend on.

What builds them needs a GPU; here a program stands at its place, which does what it does with
`--repository`: all else is real.
"""

import json
import sys
from dataclasses import replace

import pytest

from clip_rt.errors import ExportError, InputError
from export.engine_cache import FACTS, EngineCacheConfig, Machine, describe, make_key, prepare

MACHINE = Machine(tensorrt="10.14.1", compute_capability="9.0", gpu="NVIDIA H100 80GB HBM3")
SOURCES = {"model.onnx": "a" * 64, "model.onnx.data": "b" * 64}
OPTIONS = ("--model=ViT-L/14", "--name=shop")
BUILDER = """
import pathlib, sys
log, mode, repository = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[-1])
log.open("a").write(" ".join(sys.argv[3:-2]) + "\\n")
if mode != "nothing":
    repository.mkdir(parents=True)
    (repository / "model.plan").write_text("an engine")
if mode == "taken":
    final = repository.parent.parent / repository.parent.name.split("-")[0].lstrip(".")
    (final / "models").mkdir(parents=True)
    (final / "models" / "model.plan").write_text("of another machine")
sys.exit(mode == "fails")
"""


def key(**changes):
    sources = changes.pop("sources", SOURCES)
    options = changes.pop("options", OPTIONS)
    return make_key(describe(sources, replace(MACHINE, **changes), options))


def test_the_key_is_stable_and_made_of_all_that_engines_depend_on():
    assert key() == key()
    assert len(key()) == 32
    others = {
        key(tensorrt="10.14.2"),
        key(compute_capability="8.9"),
        key(gpu="NVIDIA H100 80GB HBM3 MIG 1g.10gb"),
        key(sources=SOURCES | {"model.onnx": "c" * 64}),
        key(sources={"model.onnx": "a" * 64}),
        key(options=(*OPTIONS, "--precision=fp8")),
        key(options=OPTIONS[::-1]),
    }
    assert len({key(), *others}) == 8
    assert key(sources=dict(reversed(SOURCES.items()))) == key(), "the order does not matter"


@pytest.fixture
def config(tmp_path):
    source = tmp_path / "clip.safetensors"
    source.write_bytes(b"weights")
    return EngineCacheConfig(
        source=(source,), cache=tmp_path / "engines", serve=tmp_path / "served/models"
    )


@pytest.fixture
def builder(tmp_path):
    path = tmp_path / "builder.py"
    path.write_text(BUILDER)
    return lambda mode="works": (sys.executable, str(path), str(tmp_path / "log"), mode)


def count(tmp_path):
    return len((tmp_path / "log").read_text().splitlines())


def test_engines_are_built_once_and_served_by_the_link(config, builder, tmp_path):
    repository, is_new = prepare(config, MACHINE, OPTIONS, build=builder())
    assert is_new
    assert (config.serve / "model.plan").read_text() == "an engine"
    assert config.serve.resolve() == repository.resolve()
    assert (tmp_path / "log").read_text() == " ".join(OPTIONS) + "\n"
    facts = json.loads((repository.parent / FACTS).read_text())
    assert facts["tensorrt"] == MACHINE.tensorrt
    assert facts["options"] == list(OPTIONS)
    assert prepare(config, MACHINE, OPTIONS, build=builder()) == (repository, False)
    assert count(tmp_path) == 1


def test_another_kind_of_gpu_has_its_own_beside(config, builder, tmp_path):
    first, _ = prepare(config, MACHINE, OPTIONS, build=builder())
    other = replace(MACHINE, compute_capability="8.9", gpu="NVIDIA L4")
    second, is_new = prepare(config, other, OPTIONS, build=builder())
    assert is_new
    assert first != second
    assert config.serve.resolve() == second.resolve()
    assert {each.name for each in config.cache.iterdir()} == {
        first.parent.name,
        second.parent.name,
    }


def test_other_weights_are_built_anew(config, builder, tmp_path):
    prepare(config, MACHINE, OPTIONS, build=builder())
    config.source[0].write_bytes(b"other weights")
    assert prepare(config, MACHINE, OPTIONS, build=builder())[1]
    assert count(tmp_path) == 2


@pytest.mark.parametrize("mode", ["fails", "nothing"])
def test_a_build_that_fails_leaves_nothing_and_what_is_served_stays(config, builder, mode):
    before, _ = prepare(config, MACHINE, OPTIONS, build=builder())
    with pytest.raises(ExportError, match="no engines were built"):
        prepare(config, MACHINE, (*OPTIONS, "--opt-batch-size=1"), build=builder(mode))
    assert [each.name for each in config.cache.iterdir()] == [before.parent.name]
    assert config.serve.resolve() == before.resolve()


def test_of_two_machines_that_build_the_same_one_is_kept(config, builder):
    repository, _ = prepare(config, MACHINE, OPTIONS, build=builder("taken"))
    assert (config.serve / "model.plan").read_text() == "of another machine"
    assert [each.name for each in config.cache.iterdir()] == [repository.parent.name]


def test_what_cannot_be_meant_is_refused(config, builder, tmp_path):
    with pytest.raises(InputError, match="is chosen here"):
        prepare(config, MACHINE, ("--repository", "x"), build=builder())
    with pytest.raises(InputError, match="there is no file"):
        replace(config, source=(tmp_path / "none",))
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / config.source[0].name
    twin.write_bytes(b"")
    with pytest.raises(InputError, match="one name"):
        prepare(replace(config, source=(*config.source, twin)), MACHINE, (), build=builder())
    config.serve.mkdir(parents=True)
    with pytest.raises(InputError, match="no link"):
        prepare(config, MACHINE, OPTIONS, build=builder())
