"""How much work an item is, by the spec of its model.

Counted are products of matrices, convolutions among them, 2 operations for a multiplication and an
addition; what is left out (softmax, activations, normalisation) is below 1 % of the operations and
takes time nevertheless, which is one reason why nothing reaches its limit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from clip_rt.specs import ModelSpec, ResNetSpec, Tower, ViTSpec

Precision = Literal["fp32", "fp16", "int8"]
BYTES: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}


@dataclass(frozen=True)
class Product:
    """A product of matrices: `rows` times, so many weights or so many values of another item."""

    rows: int
    """How often each of `terms` is multiplied and added for one item."""
    terms: int
    is_weight: bool = True
    """Whether the terms are weights; else both sides come from the item, as in attention."""

    @property
    def flop(self) -> int:
        """Operations for one item."""
        return 2 * self.rows * self.terms


def flop_per_image(spec: ModelSpec, *, is_pruned: bool) -> int:
    """Return the operations of one image.

    Args:
        spec: Of the model.
        is_pruned: Whether the last block computes only the position the embedding is read from,
            as `export.graphs` has it; other projects compute all. No difference to a ResNet,
            whose attention pooling has one query everywhere.
    """
    return sum(each.flop for each in _image_products(spec, is_pruned))


def flop_per_text(spec: ModelSpec, length: int, *, is_pruned: bool) -> int:
    """Return the operations of one text that is `length` tokens long with its padding."""
    return sum(each.flop for each in _text_products(spec, length, is_pruned))


def weight_bytes(spec: ModelSpec, tower: Tower, precision: Precision) -> int:
    """Return how much a call has to read of the weights, however many items it has.

    Matrices only. Of the token table a text needs a few rows; vectors are below 1 %; and what an
    INT8 model keeps in another precision is left out, so that this is the least there can be.
    """
    products = _image_products(spec, True) if tower == "image" else _text_products(spec, 1, True)
    return BYTES[precision] * sum(each.terms for each in products if each.is_weight)


def _image_products(spec: ModelSpec, is_pruned: bool) -> list[Product]:
    if isinstance(spec.image, ResNetSpec):
        return _resnet_products(spec, spec.image)
    return _vit_products(spec, spec.image, is_pruned)


def _vit_products(spec: ModelSpec, vit: ViTSpec, is_pruned: bool) -> list[Product]:
    patches = (spec.side_px // vit.patch_px) ** 2
    mlp_width = vit.mlp_width or 4 * vit.width
    return [
        Product(patches, 3 * vit.patch_px**2 * vit.width),
        *_blocks(vit.layers, patches + 1, vit.width, mlp_width, is_pruned),
        Product(1, vit.width * spec.embedding_dim),
    ]


def _text_products(spec: ModelSpec, length: int, is_pruned: bool) -> list[Product]:
    text = spec.text
    return [
        *_blocks(text.layers, length, text.width, 4 * text.width, is_pruned),
        Product(1, text.width * spec.embedding_dim),
    ]


def _blocks(
    layers: int, length: int, width: int, mlp_width: int, is_pruned: bool
) -> Iterable[Product]:
    """Residual attention blocks; of the pruned last one all but keys and values are of one row."""
    for layer in range(layers):
        rows = 1 if is_pruned and layer == layers - 1 else length
        yield Product(rows, width * width)  # queries
        yield Product(length, 2 * width * width)  # keys and values
        yield Product(2 * rows, length * width, is_weight=False)  # logits and mean
        yield Product(rows, width * width)  # out
        yield Product(rows, 2 * width * mlp_width)


def _resnet_products(spec: ModelSpec, resnet: ResNetSpec) -> list[Product]:
    width, side = resnet.width, spec.side_px // 2
    products = [
        Product(side**2, 9 * 3 * (width // 2)),
        Product(side**2, 9 * (width // 2) ** 2),
        Product(side**2, 9 * (width // 2) * width),
    ]
    channels_in, side = width, side // 2
    for stage, num_blocks in enumerate(resnet.layers):
        channels = width * 2**stage
        for block in range(num_blocks):
            side_out = side // 2 if stage > 0 and block == 0 else side
            channels_out = channels * resnet.expansion
            products += [
                Product(side**2, channels_in * channels),
                Product(side**2, 9 * channels**2),
                Product(side_out**2, channels * channels_out),
            ]
            if side_out != side or channels_in != channels_out:
                products.append(Product(side_out**2, channels_in * channels_out))
            channels_in, side = channels_out, side_out
    length = (spec.side_px // resnet.cell_px) ** 2 + 1
    return [
        *products,
        Product(1, channels_in**2),  # the query
        Product(length, 2 * channels_in**2),  # keys and values
        Product(2, length * channels_in, is_weight=False),
        Product(1, channels_in * spec.embedding_dim),
    ]
