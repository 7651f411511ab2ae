"""What is in the folder of an index: the catalogue, a vector file for each generation, codes."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_rt.errors import ContractError, InputError, SearchIndexError
from clip_rt.search import codes
from clip_rt.search.catalogue import Catalogue, Generation
from clip_rt.search.identity import Identity
from clip_rt.search.nearest import EXACT_ROWS, FIRST_HITS, WIDER, Nearest, best
from clip_rt.search.results import Hit
from clip_rt.search.vectors import VectorFile
from clip_rt.search.where import Where

if TYPE_CHECKING:
    from clip_rt.wire.manifest import Manifest

MAX_UNUSED_SHARE, MIN_UNUSED = 0.25, 1000
"""When so many rows belong to no file any more, they are removed; until then a file that comes back
is not embedded again."""
_PART = 65_536
_FILE = re.compile(r"(?:vectors|codes)-(\d+)\b.*")


class Store:
    """The files of one index; of one thread at a time.

    Args:
        folder: Where they lie.
        catalogue: The database among them.
    """

    def __init__(self, folder: Path, catalogue: Catalogue) -> None:
        self.folder = folder
        self.catalogue = catalogue
        self._nearest: Nearest | None = None

    def close(self) -> None:
        """Let go of the files."""
        self.drop_nearest()
        self.catalogue.close()

    def begin_beside(self, model: int) -> Generation:
        """Return the generation that is written beside the current one, begun or gone on with."""
        catalogue = self.catalogue
        beside = catalogue.generation(is_current=False)
        if beside is not None and beside.model != model:
            with catalogue.transaction():
                catalogue.drop_generation(beside.id)
            self.remove_leftovers()
            beside = None
        if beside is None:
            with catalogue.transaction():
                catalogue.add_generation(catalogue.next_generation(), model, is_current=False)
            beside = catalogue.generation(is_current=False)
        assert beside is not None
        return beside

    def tidy(self) -> None:
        """Remove rows that nobody uses when they are many, and make the codes that are missing."""
        current = self.current()
        num_unused = current.num_rows - self.catalogue.count_used(current.id)
        is_worth_it = num_unused > max(MIN_UNUSED, MAX_UNUSED_SHARE * current.num_rows)
        if is_worth_it and self.catalogue.generation(is_current=False) is None:
            self.compact(current)
            current = self.current()
        if current.num_rows > EXACT_ROWS and codes.is_available():
            made = codes.Codes(self.folder, current.id)
            with contextlib.closing(made):
                made.extend(self.vectors(current).read(current.num_rows))
            self.drop_nearest()

    def compact(self, current: Generation) -> None:
        """Write the rows that are used into the next generation, and change over."""
        catalogue = self.catalogue
        number = catalogue.next_generation()
        target = self._file(number, current.identity)
        used = catalogue.used_rows(current.id)
        rows = self.vectors(current).read(current.num_rows)
        for start in range(0, len(used), _PART):
            part = [row for _, row in used[start : start + _PART]]
            target.write(start, rows[part])
        with catalogue.transaction():
            catalogue.add_generation(number, current.model, is_current=False)
            for model in catalogue.models_in_use(current.id):
                catalogue.use_model(number, model)
            catalogue.put_embeddings(number, [content for content, _ in used], 0)
            catalogue.remove_unused_contents()
            catalogue.make_current(number)
        self.drop_nearest()
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove files of generations that there are no more."""
        kept = set(self.catalogue.generations())
        for path in self.folder.iterdir():
            match = _FILE.fullmatch(path.name)
            if match and (int(match[1]) not in kept or path.name.endswith(".writing")):
                with contextlib.suppress(OSError):  # Open, on Windows: next time.
                    path.unlink()

    def find(
        self, vector: NDArray[np.float32], manifest: Manifest, top: int, where: Where
    ) -> list[Hit]:
        """Return the images nearest to an embedding (D,); see `Index.find`.

        Raises:
            FileNotFoundError: another process changed over, and removed the vectors meanwhile.
        """
        with self.catalogue.snapshot():
            current = self.current()
            self.check_asking(current, manifest.model, Identity.of(manifest))
            if vector.shape != (current.identity.embedding_dim,):
                raise InputError(
                    f"the vector has the shape {vector.shape}; embeddings of {manifest.model!r} "
                    f"have ({current.identity.embedding_dim},)."
                )
            nearest = self._use_nearest(current)
            rows, scores = nearest.rank(np.ascontiguousarray(vector, np.float32))
            # Of candidates the first ones: those further down may be less near than others are.
            num, limit = max(FIRST_HITS, 2 * top), len(rows) // WIDER
            while nearest.is_exact or top <= limit:
                hits = self._look_up(current, rows, scores, num, top, where)
                if len(hits) >= top or (nearest.is_exact and num >= len(rows)):
                    return hits
                if num >= limit:
                    break
                num = min(num * WIDER, limit)
            # So few satisfy that they are looked up before they are compared.
            rows = np.array(self.catalogue.find_rows(current.id, where), np.int64)
            scores = nearest.rank_rows(vector, rows)
            return self._look_up(current, rows, scores, len(rows), top, where)

    def _look_up(
        self,
        current: Generation,
        rows: NDArray[np.int64],
        scores: NDArray[np.float32],
        num: int,
        top: int,
        where: Where,
    ) -> list[Hit]:
        """Return the best of the first `num` rows whose files satisfy."""
        order = best(scores, num)
        found: list[Hit] = []
        # In steps: of many rows that satisfy, the first are enough.
        step = max(FIRST_HITS, 2 * top)
        for start in range(0, len(order), step):
            part = order[start : start + step]
            score_by_row = {int(rows[each]): float(scores[each]) for each in part}
            hits = self.catalogue.find_hits(current.id, score_by_row, where)
            found += [hits[row] for row in score_by_row if row in hits]
            if len(found) >= top:
                break
        return found[:top]

    def current(self) -> Generation:
        """Return the generation that searches use.

        Raises:
            SearchIndexError: there is none yet.
        """
        current = self.catalogue.generation(is_current=True)
        if current is None:
            raise SearchIndexError(
                f"the index {self.folder} is empty. Fill it with clip-rt index FOLDER."
            )
        return current

    def check_asking(self, current: Generation, name: str, identity: Identity) -> None:
        """Refuse a model whose vectors cannot be compared with those of a generation.

        Raises:
            ContractError: says in what they differ, and what to do.
        """
        catalogue = self.catalogue
        asking = catalogue.find_model(identity)
        for model in catalogue.models_in_use(current.id):
            if asking is not None and catalogue.has_verdict(model, asking):
                continue
            known, theirs = catalogue.describe_model(model)
            raise ContractError(
                f"the index {self.folder} has vectors of {known!r}, and {name!r} is another model: "
                f"{theirs.describe_difference(identity)}. Ask with that one; or embed all images "
                "again, with clip-rt index --migrate; or let python -m export.compare say whether "
                "both may fill one index, and pass its report to clip-rt index --accept-compare.",
                expected=theirs.values,
                found=identity.values,
            )

    def _use_nearest(self, current: Generation) -> Nearest:
        nearest = self._nearest
        is_same = (
            nearest is not None
            and nearest.generation == current.id
            and len(nearest.vectors) == current.num_rows
        )
        if nearest is None or not is_same:
            self.drop_nearest()
            vectors = self.vectors(current).read(current.num_rows)
            self._nearest = nearest = Nearest(self.folder, current.id, vectors)
        return nearest

    def drop_nearest(self) -> None:
        """Forget what was read for searches."""
        if self._nearest is not None:
            self._nearest.close()
            self._nearest = None

    def vectors(self, generation: Generation) -> VectorFile:
        """Return a generation's vectors."""
        return self._file(generation.id, generation.identity)

    def _file(self, number: int, identity: Identity) -> VectorFile:
        return VectorFile(self.folder / f"vectors-{number}.f32", identity.embedding_dim)
