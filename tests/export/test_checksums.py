"""A repository is compared with its list, and whatever is not as it was is named."""

import hashlib
import shutil
import subprocess

import pytest

from clip_rt.errors import InputError
from export.checksums import LIST, main, verify, write


@pytest.fixture
def repository(tmp_path):
    for name in ("shop_image/1/model.onnx", "shop_image/config.pbtxt", "shop text/1/model.onnx"):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 1000)
    return tmp_path / "models"


def test_what_was_written_is_verified(repository, capsys):
    digest = write(repository)
    assert digest == hashlib.sha256((repository / LIST).read_bytes()).hexdigest()
    assert verify(repository, expect=digest.upper()) == 3
    assert write(repository) == digest, "the list does not list itself"
    assert main(["--repository", str(repository)]) == 0
    assert "3 files are what" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="coreutils are not installed")
def test_the_list_is_that_of_sha256sum(repository):
    write(repository)
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", LIST],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    names = [each.name for each in repository.iterdir() if each.is_dir()]
    said = subprocess.run(
        ["sha256sum", *(f"{name}/1/model.onnx" for name in names)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert set(said.splitlines()) <= set((repository / LIST).read_text().splitlines())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "shop_image/config.pbtxt").unlink(), "config.pbtxt is missing"),
        (
            lambda folder: (folder / "shop_image/1/model.py").write_text("import os"),
            "shop_image/1/model.py is not listed",
        ),
        (
            lambda folder: (folder / "shop text/1/model.onnx").write_bytes(b"other"),
            "shop text/1/model.onnx is not what was listed",
        ),
        (
            lambda folder: (folder / "more").symlink_to(folder / "shop_image"),
            "more is not listed",
        ),
        (lambda folder: (folder / LIST).unlink(), "cannot be read"),
        (lambda folder: (folder / LIST).write_text(""), "is no list"),
        (lambda folder: (folder / LIST).write_text("what is this\n"), "is no list"),
        (lambda folder: (folder / LIST).write_bytes(b"\xff"), "cannot be read"),
    ],
)
def test_what_is_not_as_it_was_is_refused(repository, change, words):
    write(repository)
    change(repository)
    with pytest.raises(InputError, match=words):
        verify(repository)


def test_many_files_are_named_by_the_first(repository):
    write(repository)
    for number in range(9):
        (repository / f"extra{number}").touch()
    with pytest.raises(InputError, match=r"extra4 and 4 more are not listed"):
        verify(repository)


def test_a_list_that_was_changed_with_the_files_is_told_by_its_own_digest(repository):
    digest = write(repository)
    (repository / "shop_image/1/model.onnx").write_bytes(b"other")
    write(repository)
    assert verify(repository) == 3
    with pytest.raises(InputError, match=f"{digest} is expected"):
        verify(repository, expect=digest)


def test_nothing_to_list_is_an_error(tmp_path, capsys):
    with pytest.raises(InputError, match="there is no folder"):
        write(tmp_path / "none")
    with pytest.raises(InputError, match="holds no file"):
        write(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--repository", str(tmp_path)])
    assert ended.value.code == 1
    assert "--write" in capsys.readouterr().err
