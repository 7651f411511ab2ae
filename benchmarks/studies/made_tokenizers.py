"""Tokenizers of every kind that dual encoders have, made here: no vocabulary is fetched."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np

from benchmarks.studies.scripts import RANGES, draw_texts, letters, word

GEMMA_TOKENS = 256_000
GEMMA_MERGES = 514_906
"""Of google/siglip2-base-patch16-224, whose tokenizer.json has 34.4 MB."""
NUM_CORPUS_TEXTS = 3000
SPACE = "\u2581"


@cache
def corpus() -> tuple[str, ...]:
    """Return the texts that tokenizers are trained on, none of which are measured."""
    return draw_texts(NUM_CORPUS_TEXTS, seed=1)


def byte_level(vocab_size: int = 2000) -> str:
    """Return a tokenizer.json like GPT-2's: BPE of bytes, with its own regular expression."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(corpus(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return str(made.to_str())


def word_piece(vocab_size: int = 4000) -> str:
    """Return a tokenizer.json like BERT's: words of pieces between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return str(made.to_str())


def unigram(vocab_size: int = 12000) -> str:
    """Return a tokenizer.json like XLM-V's and mT5's: pieces with scores, by Viterbi."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(corpus(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return str(made.to_str())


@cache
def gemma(num_tokens: int = GEMMA_TOKENS, num_merges: int = GEMMA_MERGES) -> str:
    """Return a tokenizer.json like Gemma's, as many tokens of BPE, with bytes for the rest.

    Tokens are the beginnings of words in twenty scripts, so that each can be reached by merges;
    merges are all splits of a token into two others, as of a converted sentencepiece model.
    """
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    numbers = [f"<0x{each:02X}>" for each in range(256)]
    vocab = dict.fromkeys([*special, *numbers, SPACE])
    for script in RANGES:
        vocab.update(dict.fromkeys(sum(letters(script), ())))
    rng = np.random.default_rng(2)
    scripts = list(RANGES)
    while len(vocab) < num_tokens:
        # Half of Gemma's are of Latin letters.
        script = "latin" if rng.random() < 0.5 else scripts[rng.integers(len(scripts))]
        drawn = "".join(word(script, rng) for _ in range(rng.integers(1, 4)))
        for marked in (drawn, SPACE + drawn):
            for end in range(2, len(marked) + 1):
                vocab.setdefault(marked[:end])
    tokens = list(vocab)[:num_tokens]
    ids = {token: index for index, token in enumerate(tokens)}
    # A token that begins a word must come before those it begins: the order of the merges.
    splits = [
        [token[:place], token[place:]]
        for token in tokens[len(special) + len(numbers) :]
        for place in range(len(token) - 1, 0, -1)
        if token[:place] in ids and token[place:] in ids
    ]
    document: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[each], "content": each, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False, "special": True}
            for each in special
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}}
        | {"behavior": "MergedWithPrevious", "invert": False},
        "post_processor": _ending(ids["<eos>"]),
        "decoder": None,
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>"}
        | {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True}
        | {"byte_fallback": True, "ignore_merges": False, "vocab": ids}
        | {"merges": splits[:num_merges]},
    }
    return json.dumps(document, ensure_ascii=False)


def _ending(eos_id: int) -> dict[str, Any]:
    text = {"Sequence": {"id": "A", "type_id": 0}}
    eos = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    special = {"<eos>": {"id": "<eos>", "ids": [eos_id], "tokens": ["<eos>"]}}
    return {
        "type": "TemplateProcessing",
        "single": [text, eos],
        "pair": [text, eos, text],
        "special_tokens": special,
    }
