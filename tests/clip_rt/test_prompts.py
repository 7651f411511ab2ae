"""Templates are data and labels are inert."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_rt.errors import TemplateError, TextError
from clip_rt.inputs.prompts import (
    DEFAULT_TEMPLATE,
    check_template,
    fill,
    find_templates,
    template_names,
)


def test_the_named_sets_are_the_published_ones(open_clip):
    from open_clip import zero_shot_metadata

    for name, lambdas in {
        "openai_imagenet": zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES,
        "simple": zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES,
    }.items():
        assert find_templates(name) == tuple(each("{}") for each in lambdas)
    assert [len(find_templates(name)) for name in template_names()] == [80, 18, 7]


def test_the_cifar_set_is_nine_templates_with_a_and_the():
    templates = find_templates("openai_cifar")
    assert templates[0] == "a photo of a {}."
    assert templates[7:9] == ("a photo of a small {}.", "a photo of a big {}.")
    assert templates[16:] == ("a photo of the small {}.", "a photo of the big {}.")
    assert len(set(templates)) == 18


def test_every_packaged_template_is_sound():
    for name in template_names():
        templates = find_templates(name)
        assert len(set(templates)) == len(templates)
        for template in templates:
            assert check_template(template) == template


def test_no_templates_means_the_default():
    assert find_templates() == find_templates(None) == (DEFAULT_TEMPLATE,) == ("a photo of a {}.",)


def test_templates_of_ones_own_keep_their_order():
    own = ["b {}", "a {}", "b {}"]
    assert find_templates(own) == find_templates(iter(own)) == tuple(own)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(TemplateError, match=r"'imagenet'; known are openai_imagenet, openai_cifar"):
        find_templates("imagenet")


def test_one_template_without_a_list_is_told_to_use_one():
    with pytest.raises(TemplateError, match="goes into a list"):
        find_templates("a drawing of a {}.")


@pytest.mark.parametrize("templates", [b"a {}", {"a {}": 1}, {"a {}"}, 3])
def test_what_is_no_list_of_templates_is_refused(templates):
    with pytest.raises(TemplateError, match="Pass a list"):
        find_templates(templates)


def test_no_template_at_all_is_refused():
    with pytest.raises(TemplateError, match="no template"):
        find_templates([])


@pytest.mark.parametrize(
    "template",
    ["", "a photo", "{} {}", "{0}", "{label}", "{0.__init__}", "{:>9999999999}", "{ }", None, 3],
)
def test_a_template_without_exactly_one_slot_is_refused(template):
    with pytest.raises(TemplateError, match="template 1") as caught:
        find_templates(["a {}", template])
    assert caught.value.index == 1
    with pytest.raises(TemplateError):
        fill(template, "cat")


@pytest.mark.parametrize(
    "label", ["{}", "{0.__class__}", "{", "}", "%s", "$x", "{:>99999999999}", "\\g<0>", "a{}b{}"]
)
def test_labels_are_inert(label):
    assert fill("a {} here", label) == "a " + label + " here"


def test_other_braces_in_a_template_are_inert():
    assert fill("{x} {} {0.__class__}", "cat") == "{x} cat {0.__class__}"


@given(st.text(), st.text(), st.text().filter(str.strip))
def test_filling_is_concatenation(before, after, label):
    template = before + "{}" + after
    if template.count("{}") == 1:
        assert fill(template, label) == before + label + after


@pytest.mark.parametrize("label", ["", " ", "\t\n", None, 3, b"cat"])
def test_a_label_that_says_nothing_is_refused_with_its_index(label):
    with pytest.raises(TextError, match="label 5") as caught:
        fill("a {}", label, index=5)
    assert caught.value.index == 5
