"""Prompts that are drawn for an image."""

import numpy as np
import pytest

from sam3_hf.data.sampling import BOX_NOISE, PromptSampling, add_box, draw_box, draw_prompts, image_rng

CONCEPTS = ["cat", "dog", "car", "tree", "house", "boat"]


def draws(objects_by_concept, sampling, barred=(), count=500):
    return [
        draw_prompts(objects_by_concept, set(barred), CONCEPTS, sampling, image_rng(0, 0, index))
        for index in range(count)
    ]


def split(prompts):
    return [p.phrase for p in prompts if p.objects], [p.phrase for p in prompts if not p.objects]


def test_present_concepts_carry_all_their_objects():
    for prompts in draws({1: [0, 3], 4: [2]}, PromptSampling(prompts_per_image=4)):
        positives = {p.phrase: p.objects for p in prompts if p.objects}
        assert positives == {"dog": (0, 3), "house": (2,)}
        assert len(prompts) == 4 and len({p.phrase for p in prompts}) == 4
        assert all(CONCEPTS[p.concept] == p.phrase for p in prompts)


def test_negative_ratio_is_met_on_average():
    everything_but_boat = {concept: [concept] for concept in range(3)}
    for ratio in (0.0, 0.25, 0.5, 1.0):
        drawn = draws(everything_but_boat, PromptSampling(prompts_per_image=3, negative_ratio=ratio))
        negatives = np.mean([len(split(prompts)[1]) for prompts in drawn])
        assert negatives == pytest.approx(3 * ratio, abs=0.1)
        assert {len(prompts) for prompts in drawn} == {3}


def test_slots_without_negatives_go_to_present_concepts():
    everything = {concept: [concept] for concept in range(6)}
    for prompts in draws(everything, PromptSampling(prompts_per_image=4), count=20):
        assert len(split(prompts)[0]) == 4


def test_slots_without_positives_stay_empty():
    for prompts in draws({0: [0]}, PromptSampling(prompts_per_image=4), count=20):
        assert [len(part) for part in split(prompts)] == [1, 2]


def test_image_without_annotations_gets_a_negative_even_at_ratio_0():
    for prompts in draws({}, PromptSampling(prompts_per_image=4, negative_ratio=0), count=20):
        assert [len(part) for part in split(prompts)] == [0, 1]


def test_crowd_only_concepts_are_neither_present_nor_absent():
    seen = {
        p.phrase for prompts in draws({0: [0]}, PromptSampling(prompts_per_image=9), barred=[1, 2]) for p in prompts
    }
    assert seen == {"cat", "tree", "house", "boat"}


def test_concepts_with_too_many_objects_are_neither_present_nor_absent():
    crowd = {0: list(range(201)), 1: list(range(200))}
    seen = {p.phrase for prompts in draws(crowd, PromptSampling(prompts_per_image=9)) for p in prompts}
    assert seen == {"dog", "car", "tree", "house", "boat"}


@pytest.mark.parametrize("options, share", [({}, 0.5), ({"negative_words_ratio": 0.2}, 0.2)])
def test_a_share_of_the_negatives_are_negative_words(options, share):
    words = tuple(f"word {number}" for number in range(100))
    sampling = PromptSampling(prompts_per_image=4, negative_ratio=1, negative_words=words, **options)
    negatives = [phrase for prompts in draws({0: [0]}, sampling) for phrase in split(prompts)[1]]
    assert np.mean([phrase in words for phrase in negatives]) == pytest.approx(share, abs=0.05)
    only_words = draw_prompts({0: [0]}, set(), ["cat"], sampling, image_rng(0, 0, 0))
    assert len(set(split(only_words)[1])) == 4


def test_all_concepts_get_their_turn():
    everything = {concept: [concept] for concept in range(6)}
    drawn = [split(prompts)[0] for prompts in draws(everything, PromptSampling(prompts_per_image=2), count=600)]
    counts = [sum(name in phrases for phrases in drawn) for name in CONCEPTS]
    assert min(counts) > 0.8 * max(counts)


def test_jittered_box_stays_near_and_inside():
    boxes = np.array([[100.0, 200, 200, 240], [500, 500, 1008, 1008]])
    drawn = np.array([draw_box(boxes[:1], 1008, image_rng(0, 0, index)) for index in range(2000)])
    noise = drawn - boxes[0]
    assert np.abs(noise).max() <= 20 + 1e-9  # published limit at 1008 pixels
    assert noise[:, 1].std() == pytest.approx(BOX_NOISE * 40, rel=0.05)
    assert 8 < noise[:, 0].std() < 10  # 10 but for the limit
    drawn = np.array([draw_box(boxes, 1008, image_rng(0, 0, index)) for index in range(300)])
    assert drawn.min() >= 0 and drawn.max() <= 1008
    assert 100 < (drawn[:, 0] > 300).sum() < 200  # either object


def test_box_without_area_is_kept_as_it_was():
    line = np.array([[1000.0, 10, 1008, 10.0001]])
    for index in range(50):
        left, top, right, bottom = draw_box(line, 1008, image_rng(0, 0, index))
        assert right > left and bottom > top


def test_box_replaces_the_text_half_of_the_time():
    prompt = draw_prompts(
        {0: [0]}, set(), CONCEPTS, PromptSampling(prompts_per_image=1, negative_ratio=0), image_rng(0, 0, 0)
    )[0]
    boxes = np.array([[10.0, 10, 50, 50]])
    phrases = [add_box(prompt, boxes, 100, image_rng(0, 0, index)).phrase for index in range(400)]
    assert set(phrases) == {"cat", "visual"} and 150 < phrases.count("visual") < 250


@pytest.mark.parametrize(
    "field, value",
    [
        ("prompts_per_image", 0),
        ("max_objects", 0),
        ("negative_ratio", 1.1),
        ("negative_words_ratio", -0.1),
        ("box_prompt_probability", -0.1),
    ],
)
def test_sampling_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        PromptSampling(**{field: value})
