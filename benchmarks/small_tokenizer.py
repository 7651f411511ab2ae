"""A tokenizer of a few words, for models of random weights whose own lies on the hub."""

from __future__ import annotations

from export import probes

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
"""In the order of their ids, as of T5 and Gemma."""
SPECIAL_OF_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>")
"""And of RoBERTa, XLM-V and NLLB, whose towers mask what has the id of their padding."""


def small_tokenizer(special: tuple[str, ...] = SPECIAL) -> str:
    """Return the tokenizer.json of a few words: a tower is asked for vectors, not for sense."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        probes.PROMPTS, trainers.BpeTrainer(special_tokens=list(special), show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    made.enable_padding(pad_id=special.index("<pad>"), pad_token="<pad>")
    return str(made.to_str())
