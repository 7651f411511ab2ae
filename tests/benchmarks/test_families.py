"""The study of other libraries' families, on two of them and few texts."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

import pytest

from benchmarks.studies import families
from benchmarks.studies.scripts import draw_texts

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.mark.usefixtures("open_clip")
@pytest.mark.parametrize("family", ["open_clip CLIPA", "transformers Chinese-CLIP"])
def test_a_client_answers_as_the_familys_own_library(family, tmp_path):
    found = families.measure(family, tmp_path, num_texts=60)
    assert found.num_texts > 50
    assert found.is_met, found
    assert found.max_levels < 0.01, "both resize by Pillow"
    for worse in ({"max_levels": 2.0}, {"num_other_ids": 1}, {"max_text_difference": 3e-5}):
        assert not replace(found, **worse).is_met


def test_texts_are_of_twenty_scripts_and_the_same_at_every_call():
    texts = draw_texts(1000)
    assert texts == draw_texts(1000)
    assert len(set(texts)) == 1000
    assert draw_texts(20, seed=1) != texts[:20]
    named = {
        unicodedata.name(letter, "?").split()[0]
        for text in texts
        for letter in text
        if letter.isalpha()
    }
    assert {"LATIN", "ARABIC", "HANGUL", "KHMER", "CJK", "ETHIOPIC", "THAI"} <= named
    assert len(named) >= 20
