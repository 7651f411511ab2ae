"""An index of images on disk: opened, brought up to date, asked."""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ContractError, InputError, SearchIndexError
from clip_rt.search.catalogue import Catalogue, Generation, is_below
from clip_rt.search.identity import Identity, Verdict
from clip_rt.search.locking import WriterLock
from clip_rt.search.query import Query
from clip_rt.search.results import Hit
from clip_rt.search.scan import Found, Scan
from clip_rt.search.store import Store
from clip_rt.search.where import EVERYWHERE, Where

if TYPE_CHECKING:
    from clip_rt.client import Client
    from clip_rt.search.update import Embedding, OnBad, OnProgress, Report
    from clip_rt.wire.manifest import Manifest

FOLDER_VARIABLE = "CLIP_RT_INDEX"
DATABASE, LOCK = "index.sqlite", "lock"
DUPLICATE_COSINE = 0.95
_MAX_TRIES = 3


def default_folder() -> Path:
    """Return where the index is that nobody names: one for each user.

    That is $CLIP_RT_INDEX, or `clip_rt/index` in $XDG_DATA_HOME or, where that is unset or
    relative, in ~/.local/share. Not in the user's cache: making it again may take hours.
    """
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME", "")
    base = Path(data) if os.path.isabs(data) else Path.home() / ".local" / "share"
    return base / "clip_rt" / "index"


class Index:
    """Images of some folders with their embeddings, searched by text and by image.

    Made by `open`; thread-safe; `close` it, or use it in a `with` statement. Any number of
    processes may read an index while one writes to it, and a process that is killed leaves it as it
    was at its last commit, some seconds before. Threads take turns: one that searches while another
    updates opens an index of its own. An index is of one model; `accept` and `migrate`
    are the ways to another.
    """

    def __init__(self, folder: Path, catalogue: Catalogue) -> None:
        self.folder = folder
        """Where it lies."""
        self._catalogue = catalogue
        self._store = Store(folder, catalogue)
        self._lock = threading.RLock()
        self._writers = 0

    @classmethod
    def open(cls, folder: str | os.PathLike[str] | None = None, *, create: bool = False) -> Index:
        """Open an index.

        Args:
            folder: Where it lies; `default_folder()` if None.
            create: Make an empty one where there is none.

        Raises:
            SearchIndexError: there is none, it is damaged, or of a later version.
            SearchIndexLockedError: another process is making it.
            OSError: the folder cannot be made.
        """
        path = default_folder() if folder is None else Path(folder)
        if create:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            if create and not (path / DATABASE).exists():
                # Two may want to make it.
                stack.enter_context(contextlib.closing(WriterLock(path / LOCK)))
            return cls(path, Catalogue(path / DATABASE, create=create))

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. Closing twice is harmless."""
        with self._lock:
            self._store.close()

    @property
    def folders(self) -> list[str]:
        """Folders and files that it is of, absolute, in order."""
        with self._lock:
            return self._catalogue.folders()

    def count(self) -> dict[str, int]:
        """Return how many `files` there are, how many of them `bad`, and distinct `images`."""
        with self._lock:
            return self._catalogue.count()

    def bad_files(self) -> list[tuple[str, str]]:
        """Return path and reason of each file that has no embedding, by path."""
        with self._lock:
            return self._catalogue.bad_files()

    def files(self, sha256: str) -> list[str]:
        """Return the files of a content, by path; its hash is as in `Hit.sha256`."""
        with self._lock:
            return self._catalogue.find_files(bytes.fromhex(sha256))

    # Writing

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keep other processes from writing; `update` and the like do so by themselves.

        Raises:
            SearchIndexLockedError: another process, or another `Index` of this one, is writing.
        """
        with self._lock:
            if self._writers:
                yield
                return
            with contextlib.closing(WriterLock(self.folder / LOCK)):
                self._writers += 1
                try:
                    self._store.remove_leftovers()
                    yield
                finally:
                    self._writers -= 1

    def update(
        self,
        client: Client,
        folders: Iterable[str | os.PathLike[str]] | None = None,
        *,
        on_progress: OnProgress = lambda report: None,
        on_bad: OnBad = lambda path, reason: None,
    ) -> Report:
        """Bring the index up to date with what folders hold now.

        Files whose size or time of change differ from before are read, and embedded if no file
        with their content was. Images that cannot be used are noted, and not tried again before
        they change. Files that are gone are forgotten, their embeddings only later: one that comes
        back, or was moved, is not embedded again.

        Args:
            client: Of the model that the index is of; the first one that comes.
            folders: Folders, image files and .tar shards; those given before if None. Hidden files
                are left out. What is within one that was given before, and is gone, is forgotten.
                If one of those given before is not there, as of a disk that is not mounted, it is
                noted as bad, and what it held is kept.
            on_progress: Called now and then.
            on_bad: Called for each file that cannot be used.

        Returns:
            What was done.

        Raises:
            InputError: a folder that was named is not there, or none of those given before is; or
                a shard cannot be read.
            ContractError: the index is of another model.
            SearchIndexLockedError: another process is writing.
            ServerError: see `Client.encode_images`; what was done before it is kept.
        """
        from clip_rt.search.files import find_files
        from clip_rt.search.update import Report

        report = Report()
        with self.writing():
            catalogue = self._catalogue
            manifest = client.manifest
            names = self.folders if folders is None else [os.path.abspath(each) for each in folders]
            if not names:
                raise InputError(
                    f"the index {self.folder} is of no folder yet; name one: clip-rt index FOLDER."
                )
            there = [each for each in names if os.path.exists(each)]
            absent = sorted(set(names) - set(there))
            if folders is not None or not there:
                self._check_gone(absent)
            generation, model = self._begin_update(manifest)
            scan = Scan(catalogue.db)
            scan.begin()
            part = []
            for file in find_files(there):
                part.append(file)
                if len(part) == 4096:
                    scan.add(part)
                    report.num_found += len(part)
                    part = []
                    on_progress(report)
            scan.add(part)
            if folders is None:
                scan.add([Found(each, -1, 0, each, problem=_not_there(each)) for each in absent])
            with catalogue.transaction():
                for each in there:
                    catalogue.add_folder(each)
                report.num_removed = sum(
                    catalogue.remove_files(each, but_found=True) for each in names
                )
            report.num_found, report.num_to_read = scan.count()
            on_progress(report)
            if report.num_to_read:
                embedding = self._embedding(
                    generation, model, manifest, report, on_progress, on_bad
                )
                embedding.run(client, embedding.changed_files(scan))
            self._store.tidy()
        return report

    def _embedding(
        self,
        generation: Generation,
        model: int,
        manifest: Manifest,
        report: Report,
        on_progress: OnProgress,
        on_bad: OnBad,
    ) -> Embedding:
        """Return what embeds images into a generation."""
        from clip_rt.search.update import Embedding

        return Embedding(
            catalogue=self._catalogue,
            vectors=self._store.vectors(generation),
            generation=generation.id,
            model=model,
            num_rows=generation.num_rows,
            manifest=manifest,
            report=report,
            on_progress=on_progress,
            on_bad=on_bad,
        )

    def forget(self, folder: str | os.PathLike[str]) -> int:
        """Take a folder out of the index, with all below it.

        Returns:
            How many files are forgotten.

        Raises:
            InputError: the index has neither the folder nor a file in it.
            SearchIndexLockedError: another process is writing.
        """
        path = os.path.abspath(folder)
        with self.writing(), self._catalogue.transaction():
            was_known = self._catalogue.remove_folder(path)
            num = self._catalogue.remove_files(path)
            if not was_known and not num:
                known = ", ".join(self._catalogue.folders()) or "nothing"
                raise InputError(f"the index has nothing of {path}; it is of {known}.")
        return num

    def accept(self, report: str | os.PathLike[str]) -> Verdict:
        """Go on with another model, as `export.compare` has found that it may.

        The report must compare the model that the index is of, as A, with the one to come, as B,
        and say that both may fill one index. B may then search, and update: new images get B's
        vectors. Where the vectors are of two models by then, a third one needs a report for each.

        Args:
            report: What `python -m export.compare A B --report PATH` wrote.

        Raises:
            InputError: it is no such report.
            ContractError: it is about another model, or says that the two do not mix.
            SearchIndexLockedError: another process is writing.
        """
        verdict = Verdict.read(Path(report))
        verdict.check()
        with self.writing():
            catalogue, current = self._catalogue, self._store.current()
            known = catalogue.find_model(verdict.a)
            if known is None or known not in catalogue.models_in_use(current.id):
                name, identity = catalogue.describe_model(current.model)
                raise ContractError(
                    f"{report} compares with another model than the index is of, {name!r}: "
                    f"{identity.describe_difference(verdict.a)}. Compare with that one as A.",
                    expected=identity.values,
                    found=verdict.a.values,
                )
            with catalogue.transaction():
                asking = catalogue.add_model(verdict.b_name, verdict.b)
                catalogue.add_verdict(known, asking, verdict)
        return verdict

    def migrate(
        self,
        client: Client,
        *,
        on_progress: OnProgress = lambda report: None,
        on_bad: OnBad = lambda path, reason: None,
    ) -> Report:
        """Embed all images again, with another model, and then update.

        The new vectors are written beside the old, which are searched until all are there; one
        transaction then changes over. If it is interrupted, calling again with the same model goes
        on; with another, it begins anew.

        Args:
            client: Of the model to come.
            on_progress: Called now and then.
            on_bad: As for `update`.

        Returns:
            What was done in all.

        Raises:
            InputError: a folder of the index is not there now.
            ServerError, SearchIndexLockedError: see `update`.
        """
        from clip_rt.search.update import Report

        with self.writing():
            catalogue, current = self._catalogue, self._store.current()
            self._check_gone(each for each in self.folders if not os.path.exists(each))
            manifest = client.manifest
            identity = Identity.of(manifest)
            with catalogue.transaction():
                model = catalogue.add_model(manifest.model, identity)
            report = Report()
            if catalogue.models_in_use(current.id) != [model]:
                beside = self._store.begin_beside(model)
                report.num_found = catalogue.count()["images"]
                report.num_to_read = catalogue.count_missing(beside.id)
                embedding = self._embedding(beside, model, manifest, report, on_progress, on_bad)
                embedding.run(client, embedding.contents_again())
                with catalogue.transaction():
                    catalogue.make_current(beside.id)
                self._store.drop_nearest()
                self._store.remove_leftovers()
            elif (given_up := catalogue.generation(is_current=False)) is not None:
                # Of a migration to another model.
                with catalogue.transaction():
                    catalogue.drop_generation(given_up.id)
            done = self.update(client, on_progress=on_progress, on_bad=on_bad)
        done.num_embedded += report.num_embedded
        done.num_bad += report.num_bad
        return done

    def _begin_update(self, manifest: Manifest) -> tuple[Generation, int]:
        """Return the current generation and the number of a model that may add to it."""
        catalogue, identity = self._catalogue, Identity.of(manifest)
        if catalogue.generation(is_current=True) is None:
            with catalogue.transaction():
                model = catalogue.add_model(manifest.model, identity)
                catalogue.add_generation(catalogue.next_generation(), model, is_current=True)
        current = self._store.current()
        self._store.check_asking(current, manifest.model, identity)
        model = catalogue.find_model(identity) or current.model
        return current, model

    def _check_gone(self, names: Iterable[str]) -> None:
        """Refuse names of what is not there, unless it was part of a folder of the index."""
        known = self.folders
        for name in names:
            if not any(is_below(name, folder) and os.path.exists(folder) for folder in known):
                raise InputError(
                    _not_there(name)
                    if name in known
                    else f"there is no folder or file {name!r:.200}."
                )

    # Reading

    def query(
        self,
        client: Client,
        query: str | Query,
        *,
        top: int = 10,
        where: Where = EVERYWHERE,
    ) -> list[Hit]:
        """Return the images that are nearest to a query, best first.

        Args:
            client: Of the model that the index is of.
            query: What is wanted, and what is not; a string as `Query.parse` reads it.
            top: How many at most.
            where: Which files to search among.

        Raises:
            InputError: the query cannot be used.
            ContractError: the index is of another model.
            SearchIndexError: the index is damaged.
            ServerError: see `Client.encode_images`.
        """
        asked = Query.parse(query) if isinstance(query, str) else query
        vector, manifest = asked.embed(client)
        return self.find(vector, manifest, top=top, where=where)

    def find(
        self,
        vector: NDArray[np.float32],
        manifest: Manifest,
        *,
        top: int = 10,
        where: Where = EVERYWHERE,
    ) -> list[Hit]:
        """Return the images that are nearest to an embedding, best first.

        All images are compared where there are `nearest.EXACT_ROWS` or fewer; beyond, the answer is
        approximate: what is near by its code is compared.

        Args:
            vector: float32 (D,), of length 1.
            manifest: Of the model that made it.
            top: How many at most.
            where: Which files to search among.

        Raises:
            InputError: top is below 1, or the vector has another length.
            ContractError: the index is of another model.
            SearchIndexError: the index is damaged.
        """
        if type(top) is not int or top < 1:
            raise InputError(f"top is {top!r:.40}; it must be a whole number from 1.")
        # Again where another process changed over, and removed the file that was to be read.
        for _ in range(_MAX_TRIES):
            with contextlib.suppress(FileNotFoundError), self._lock:
                return self._store.find(vector, manifest, top, where)
        raise SearchIndexError(
            f"the vectors of the index {self.folder} are missing. Restore them from a backup, or "
            "remove the folder and make the index anew with clip-rt index."
        )

    def duplicates(
        self,
        *,
        threshold: float = DUPLICATE_COSINE,
        where: Where = EVERYWHERE,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> list[list[Hit]]:
        """Return groups of images that are nearly the same, the largest first.

        A group is its first image, with those whose cosine with it is `threshold` or more; files of
        the same content are one image with `copies`, which is a group by itself. All pairs are
        compared, in memory of N x D float32.

        Args:
            threshold: Smallest cosine, from -1 to 1.
            where: Which files to compare.
            on_progress: Called with how many images are done, and how many there are.

        Returns:
            The score of each image is its cosine with the first of its group.

        Raises:
            InputError: the threshold is no cosine.
            SearchIndexError: the index is damaged.
        """
        from clip_rt.search.duplicates import group

        if not -1 <= threshold <= 1:
            raise InputError(f"threshold is {threshold!r:.40}; a cosine is between -1 and 1.")
        with self._reading() as current:
            rows = np.array(self._catalogue.find_rows(current.id, where), np.int64)
            vectors = self._store.vectors(current).read(current.num_rows)[rows]
            firsts = group(vectors, threshold, on_progress)
            members: dict[int, list[int]] = {}
            for position, first in enumerate(firsts.tolist()):
                members.setdefault(first, []).append(position)
            with_copies = set(self._catalogue.find_copies(current.id))
            groups = []
            for first, positions in members.items():
                if len(positions) == 1 and int(rows[first]) not in with_copies:
                    continue
                scores = vectors[positions] @ vectors[first]
                score_by_row = dict(zip(rows[positions].tolist(), scores.tolist(), strict=True))
                hits = self._catalogue.find_hits(current.id, score_by_row, where)
                groups.append([hits[row] for row in score_by_row if row in hits])
        kept = [each for each in groups if len(each) > 1 or (each and each[0].copies)]
        return sorted(kept, key=lambda one: (-sum(1 + len(hit.copies) for hit in one), one[0].path))

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Generation]:
        """Read one state of the index, whatever another process writes meanwhile."""
        with self._lock, self._catalogue.snapshot():
            yield self._store.current()


def _not_there(folder: str) -> str:
    """Say that a folder of the index is not there, and the way out."""
    return (
        f"there is no folder or file {folder!r:.200}. To take it out of the index: "
        f"clip-rt index --forget {shlex.quote(folder)}"
    )
