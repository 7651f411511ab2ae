"""Paths of every kind: where a server lies, what it is made of, and what it serves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_repository
from owners import ROOT, find_remains

import clip_rt
from clip_rt.embedded import installation, sharing
from clip_rt.embedded import server as server_module
from clip_rt.embedded.installation import find_home
from clip_rt.embedded.server import EmbeddedServer

pytestmark = pytest.mark.slow

ODD = {
    "space and quotes": "my 'own' \"tmp\" ",
    "colon and letter": "a:b,é;c #1",
    "shell": "$(touch planted) `touch planted` \\ & | < > * ~ {x,y} !",
    "newline and tab": "line\nbreak\tand\rreturn",
    "no text": os.fsdecode(b"latin-1 \xe9\xff"),
    "long": "/".join(["n" * 200] * 7),
}

EVERYWHERE = """
import os, sys
from dataclasses import replace
from pathlib import Path
place = Path(sys.argv[1])
sys.path.insert(0, str(place / "site"))
import clip_rt
from clip_rt.embedded import server
find_home = server.find_home
# The interpreter, too, as in an environment of conda's.
python = place / "base" / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
server.find_home = lambda: replace(find_home(), python=python)
assert str(place) in str(find_home().stub), find_home()
with clip_rt.Client(repository=place / "models") as client:
    print(*client.zero_shot([str(place / "red.png")], ["blue", "red"], templates=["{}"]).best)
    (replica,) = client._session.connection.pool.replicas
    print(replica.server._run._folder)
"""


@pytest.mark.parametrize("name", ODD.values(), ids=ODD.keys())
def test_the_path_of_everything_may_be_anything(tmp_path: Path, name: str) -> None:
    import PIL.Image

    place = tmp_path / name
    for each in ("tmp", "run", "work", "site"):
        (place / each).mkdir(parents=True, mode=0o700)
    stub = find_home().stub
    before = stub.stat()
    for package in (stub.parents[4], ROOT):
        for path in package.iterdir():
            if not path.name.startswith(".") and not (place / "site" / path.name).exists():
                (place / "site" / path.name).symlink_to(path)
    (place / "base").symlink_to(sys.base_exec_prefix)
    tiny_repository.write(place / "models")
    PIL.Image.new("RGB", (64, 64), "red").save(place / "red.png")
    done = subprocess.run(
        [sys.executable, "-c", EVERYWHERE, str(place)],
        capture_output=True,
        cwd=place / "work",
        env=os.environ
        | {"TMPDIR": str(place / "tmp"), "XDG_RUNTIME_DIR": str(place / "run"), "PYTHONPATH": ""},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode("utf-8", "replace")
    best, folder = done.stdout.decode().splitlines()
    assert best == "red"
    assert sharing._SAFE_PATH.fullmatch(folder)
    assert (stub.stat().st_mode, stub.stat().st_ctime_ns) == (before.st_mode, before.st_ctime_ns)
    assert not list(tmp_path.rglob("planted"))


def test_a_runtime_folder_that_is_named_by_half_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "run")
    with sharing.open_folder(time.monotonic() + 5) as folder:
        assert folder.is_absolute()
        assert tmp_path not in folder.parents


def test_where_no_path_will_do_the_error_says_which_will(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "my tmp" / "clip_rt"
    monkeypatch.setattr(sharing, "_list_places", lambda: [odd])
    with (
        pytest.raises(clip_rt.ServerStartError, match=r"my tmp.*every path.*TMPDIR.*ASCII"),
        sharing.open_folder(time.monotonic() + 5),
    ):
        pass
    assert not odd.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("my model", "a;touch planted", "$(touch planted)", "it's", "a\nb", "a\x85b", "a\x7f"),
        *("a[1]", "a{1,2}", "a*", "a?"),  # would run another model's code
    ],
)
def test_a_model_whose_name_a_shell_would_read_is_refused(tmp_path: Path, name: str) -> None:
    tiny_repository.write_bare(tmp_path)
    (tmp_path / "bare").rename(tmp_path / name)
    with pytest.raises(clip_rt.ServerStartError, match=r"shell. Rename its folder"):
        EmbeddedServer(tmp_path).start()


def test_names_that_were_served_still_are(tmp_path: Path) -> None:
    names = ["é+v2", "a=b,c@d%e", "x~!#^:2", "e\u0301"]
    for name in names:
        tiny_repository.write_bare(tmp_path)
        config = tmp_path / "bare" / "config.pbtxt"
        config.write_text(config.read_text().replace('"bare"', f'"{name}"'))
        (tmp_path / "bare").rename(tmp_path / name)
    assert sorted(installation.find_models(tmp_path)) == sorted(names)


def put_stub(path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have servers use a script for the stub."""
    path.write_text(f'#!/bin/sh\n[ -n "$1" ] || exit 1\n{script}\n')
    path.chmod(0o755)
    home = replace(find_home(), stub=path)
    monkeypatch.setattr(server_module, "find_home", lambda: home)


def test_a_stub_that_is_killed_while_it_loads_ends_the_wait(
    bare_repository: Path, tmp_path: Path
) -> None:
    """As the kernel does for want of memory; Triton 2.51 itself would wait for ever."""
    tiny_repository.write_bare(tmp_path)
    program = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
    (tmp_path / "bare" / "1" / "model.py").write_text(program)
    start_s = time.monotonic()
    with pytest.raises(clip_rt.ServerStartError, match=r"bare|ended before its model"):
        EmbeddedServer(tmp_path).start()
    assert time.monotonic() - start_s < 15.0


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo error while loading shared libraries: libx.so >&2; exit 127", r"libx\.so.*Install"),
        ("exit 0", "ended before its model was loaded"),
        ("kill -SEGV $$", "ended before its model was loaded"),
    ],
)
def test_a_stub_that_ends_ends_the_wait_with_its_words(
    bare_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    stub = tmp_path / "triton_python_backend_stub"
    put_stub(stub, script, monkeypatch)
    before = set(find_remains(os.getpid()))
    start_s = time.monotonic()
    with pytest.raises(clip_rt.ServerStartError, match=words):
        EmbeddedServer(bare_repository).start()
    assert time.monotonic() - start_s < 15.0  # Of 60; most of it is what a server takes to start.
    assert set(find_remains(os.getpid())) == before


def test_a_stub_that_cannot_be_executed_keeps_its_mode(
    bare_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "triton_python_backend_stub"
    put_stub(stub, "", monkeypatch)
    stub.write_text("#!/nowhere\n")
    with pytest.raises(clip_rt.ServerStartError, match="triton_python_backend_stub"):
        EmbeddedServer(bare_repository).start()
    assert stub.stat().st_mode & 0o777 == 0o755


def test_what_only_has_the_name_of_a_package_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pytriton", "onnxruntime"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')\n")
    for name in ("numpy", "model", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    found = find_home()
    for first in (str(tmp_path), "", "."):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(first)
            assert find_home() == found


def test_a_repository_that_no_path_leads_to_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for path in ("a\0b", "x" * 300, "/x" * 3000, str(tmp_path / "loop"), "models", "/dev/null"):
        with (
            pytest.raises(clip_rt.ServerStartError, match=r"the model repository .* repository="),
            clip_rt.Client(repository=path) as client,
        ):
            client.encode_texts(["red"])


NOBODY = """
import os, pwd, sys
try:
    print(pwd.getpwuid(os.getuid()).pw_name)
except KeyError:
    print("nobody knows", os.getuid())
import clip_rt
with clip_rt.Client(repository=sys.argv[1], cache_dir="~/.cache/clip_rt") as client:
    print(client.class_embeddings(["red"]).shape)
"""


def test_a_user_whom_nobody_knows_and_who_has_no_home(repository: Path, tmp_path: Path) -> None:
    namespace = ["unshare", "--user", "--map-user=54321", "--map-group=54321"]
    if subprocess.run([*namespace, "true"], capture_output=True, timeout=30).returncode:
        pytest.skip("this user may not have a namespace of its own")
    environment = {
        key: value for key, value in os.environ.items() if key not in ("HOME", "XDG_RUNTIME_DIR")
    }
    done = subprocess.run(
        [*namespace, sys.executable, "-c", NOBODY, str(repository)],
        capture_output=True,
        text=True,
        cwd="/",
        env=environment | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "nobody knows 54321\n(1, 8)\n"


READ_ONLY = """
import subprocess, sys
import clip_rt
from clip_rt.embedded.server import EmbeddedServer
for target in ("/tmp", "/dev/shm")[: int(sys.argv[2])]:
    # Itself, read only: this checkout may lie there.
    for how in (("--bind", target), ("-o", "remount,bind,ro")):
        subprocess.run(["mount", *how, target], check=True)
try:
    with EmbeddedServer(sys.argv[1]):
        print("started")
except clip_rt.ServerStartError as error:
    print(error)
"""


@pytest.mark.parametrize(("num_places", "words"), [(1, "Its /tmp must be writable"), (2, "TMPDIR")])
def test_where_nothing_can_be_written_the_error_says_where_it_must(
    num_places: int, words: str
) -> None:
    namespace = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True, timeout=30).returncode:
        pytest.skip("this user may not mount anything in a namespace of its own")
    done = subprocess.run(
        [
            *(*namespace, sys.executable, "-c", READ_ONLY),
            *(str(ROOT / "model_repository"), str(num_places)),
        ],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": "/nowhere"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
