"""Folders of images in, (image, caption) pairs out: captioned by class name, or by text files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from clip_rt.errors import InputError
from clip_rt.inputs.prompts import fill, find_templates
from training.data.pairs import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    BadSampleError,
    Pair,
    Strings,
    check_caption,
)
from training.data.tables import resolve
from training.data.tree import Tree, read_tree

_log = logging.getLogger(__name__)


class ClassFolder:
    """Images in one folder per class, at any depth below it; the label is the folder's name."""

    def __init__(
        self,
        folder: str | Path | Tree,
        *,
        templates: str | Iterable[str] | None = None,
        labels: Mapping[str, str] | None = None,
        allow_outside: bool = False,
    ) -> None:
        """List the images; none is opened yet.

        Args:
            folder: Holds a folder per class; a folder that holds nothing but that is stepped into.
            templates: Captions are these, filled with the label; as in `clip_rt.inputs.prompts`.
            labels: Label by folder name, such as ImageNet's n01440764. Otherwise the label is
                the folder's name with spaces for underscores.
            allow_outside: Whether links may lead out of the folder.

        Raises:
            InputError: there is no such folder, no image in it, or a class has no label.
            TemplateError: the templates are none.
        """
        tree = folder if isinstance(folder, Tree) else read_tree(Path(folder))
        self.folder = tree.folder
        self.skips = tree.skips
        self._allow_outside = allow_outside
        self._templates = find_templates(templates)
        class_by_name = {name: tree.class_of(name) for name in tree.images}
        class_names = sorted({each for each in class_by_name.values() if each is not None})
        if labels is not None and (unknown := set(class_names) - set(labels)):
            raise InputError(
                f"{len(unknown)} classes of {self.folder} have no label, such as {min(unknown)!r}."
            )
        number_by_class = {name: number for number, name in enumerate(class_names)}
        self.labels = [
            labels[name] if labels is not None else name.replace("_", " ") for name in class_names
        ]
        names, classes = [], []
        for name, class_name in class_by_name.items():
            if class_name is None:
                self.skips.add("image in no class folder", name)
            else:
                names.append(name)
                classes.append(number_by_class[class_name])
        tree.note_empty_classes()
        if not classes:
            raise InputError(
                f"{self.folder} holds no folders of images ({', '.join(IMAGE_EXTENSIONS)}), one "
                f"for each class, nor images with captions in a .txt beside them. Left out: "
                f"{self.skips}."
            )
        if len(class_names) == 1:
            _log.warning(
                "%s has one class only, %r: nothing can be told apart.",
                *(self.folder, class_names[0]),
            )
        self._images = Strings(names)
        self._class = np.array(classes, np.int32)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Pair:
        name = self._images[index]
        label = check_caption(self.labels[self._class[index]], name)
        captions = tuple(fill(template, label) for template in self._templates)
        image = resolve(self.folder, name, allow_outside=self._allow_outside)
        return Pair(image, captions, f"{self.folder}, {name!r}", label)


class CaptionFolder:
    """Images at any depth, each with its caption in a .txt of the same name beside it."""

    def __init__(self, folder: str | Path | Tree, *, allow_outside: bool = False) -> None:
        """List the images; nothing is opened yet.

        Args:
            folder: Where images and texts are.
            allow_outside: Whether links may lead out of the folder.

        Raises:
            InputError: there is no such folder, or no image in it.
        """
        tree = folder if isinstance(folder, Tree) else read_tree(Path(folder))
        self.folder = tree.folder
        self.skips = tree.skips
        self._allow_outside = allow_outside
        if not tree.images:
            raise InputError(
                f"{self.folder} holds no images ({', '.join(IMAGE_EXTENSIONS)}). Left out: "
                f"{self.skips}."
            )
        self._images = Strings(list(tree.images))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Pair:
        name = self._images[index]
        place = f"{self.folder}, {name!r}"
        text = resolve(
            self.folder, f"{os.path.splitext(name)[0]}.txt", allow_outside=self._allow_outside
        )
        if not text.is_file():
            raise BadSampleError("no caption", place)
        try:
            with text.open("rb") as file:
                caption = file.read(MAX_CAPTION_BYTES + 1)
        except OSError as error:
            raise BadSampleError("caption cannot be read", place) from error
        if len(caption) > MAX_CAPTION_BYTES:
            raise BadSampleError("caption too long", place)
        image = resolve(self.folder, name, allow_outside=self._allow_outside)
        return Pair(image, (check_caption(caption, place),), place)
