"""A model repository in, a list of its files with their SHA-256 out; and back: is it what it was?

    python -m export.checksums --repository models --write      # where it was exported
    python -m export.checksums --repository models              # before it is served; exit status 1

The list is SHA256SUMS in the repository, as sha256sum reads and writes it. A file that the list
does not name is refused too: Triton would serve it, and run its code. It tells damage, and change
by whoever cannot write the list; against others compare the printed SHA-256 of the list itself.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from clip_rt.errors import InputError
from clip_rt_commands import program
from clip_rt_commands.errors import command

LIST = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
NUM_SHOWN = 5
"""Files that an error names."""
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ChecksumsConfig:
    """Verify a model repository against its list, or write the list."""

    repository: Path = Path("model_repository")
    """Triton model repository."""
    write: bool = False
    """Write the list of what is there now."""
    expect: str | None = None
    """SHA-256 that the list itself must have."""


def write(repository: Path) -> str:
    """Write the list of a repository.

    Returns:
        The list's own SHA-256, as hex digits.

    Raises:
        InputError: there is no such folder, it is empty, or a file's name has a line break.
    """
    files = _list_files(repository)
    broken = next((name for name in files if "\n" in name or "\\" in name), None)
    if broken is not None:
        raise InputError(f"{repository}: {broken!r} has no name that a list can hold; rename it.")
    if not files:
        raise InputError(f"{repository} holds no file; name a model repository by --repository.")
    text = "".join(f"{_digest(path)}  {name}\n" for name, path in files.items())
    (repository / LIST).write_text(text, "utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def verify(repository: Path, *, expect: str | None = None) -> int:
    """Compare a repository with its list.

    Args:
        repository: The folder.
        expect: SHA-256 that the list itself must have, as hex digits; None is any.

    Returns:
        How many files were compared.

    Raises:
        InputError: files are missing, changed, or not listed; names them.
    """
    try:
        content = (repository / LIST).read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{repository / LIST} cannot be read: {error}. Write it where models are exported: "
            "python -m export.checksums --write."
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if expect is not None and expect.lower() != found:
        raise InputError(f"{repository / LIST} has SHA-256 {found}, and {expect[:64]} is expected.")
    lines = [LINE.fullmatch(line) for line in text.splitlines()]
    if not lines or None in lines:
        raise InputError(f"{repository / LIST} is no list of sha256sum; write it again by --write.")
    expected = {match[2]: match[1] for match in lines if match is not None}
    files = _list_files(repository)
    _refuse(repository, "missing", expected.keys() - files.keys())
    _refuse(repository, "not listed", files.keys() - expected.keys())
    _refuse(
        repository,
        "not what was listed",
        {name for name, path in files.items() if _digest(path) != expected[name]},
    )
    return len(files)


def _refuse(repository: Path, what: str, names: set[str]) -> None:
    if names:
        shown = ", ".join(sorted(names)[:NUM_SHOWN])
        more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
        raise InputError(
            f"{repository}: {shown}{more} {'is' if len(names) == 1 else 'are'} {what}. Do not "
            "serve it; copy it anew."
        )


def _list_files(repository: Path) -> Mapping[str, Path]:
    """Return all files by their paths in the repository, as a list has them.

    A file that a link leads to is compared as what it leads to.
    """
    if not repository.is_dir():
        raise InputError(f"there is no folder {repository}; name one by --repository.")
    found = {str(path.relative_to(repository)): path for path in sorted(repository.rglob("*"))}
    return {
        name: path
        for name, path in found.items()
        # A folder that is a link is not walked into; it cannot be read as a file, and is refused.
        if name != LIST and (path.is_symlink() or not path.is_dir())
    }


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    with command():
        config = tyro.cli(
            ChecksumsConfig,
            prog=program("export.checksums"),
            description=__doc__,
            args=arguments,
        )
        if config.write:
            sys.stdout.write(f"{write(config.repository)}  {config.repository / LIST}\n")
        else:
            number = verify(config.repository, expect=config.expect)
            sys.stdout.write(f"{number} files are what {config.repository / LIST} says\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
