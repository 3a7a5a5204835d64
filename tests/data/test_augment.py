import numpy as np
import pytest
import torchvision.transforms.functional as TF
from PIL import Image
from sklearn.datasets import load_sample_images

from lowmem.data.augment import Draws, _blurred, _coloured, augmented, crop_box, hue_shifted
from lowmem.recipe import AugmentRecipe

PHOTOS = [Image.fromarray(array) for array in load_sample_images().images]


def decibels(a, b):
    """Peak signal-to-noise ratio of two pictures of 8 bits."""
    return 10 * np.log10(255**2 / max(1e-9, np.mean((np.asarray(a, float) - np.asarray(b, float)) ** 2)))


def draws(**values):
    made = Draws(0, 0, 0)
    for name, value in values.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize("shift", [-12, -5, 3, 12])
def test_hue_is_true_to_hsv(photo, shift):
    literal = TF.adjust_hue(photo, shift / 255)
    assert decibels(hue_shifted(photo, shift), literal) > 42
    assert decibels(photo, literal) < decibels(hue_shifted(photo, shift), literal) - 6, (
        "leaving hue out is much further off"
    )


def test_no_hue_shift_is_no_change():
    assert hue_shifted(PHOTOS[0], 0) is PHOTOS[0]


@pytest.mark.parametrize("photo", PHOTOS)
@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation", "grey"),
    [(0.85, 1.15, 1.1, False), (1.1, 0.9, 0.8, False), (0.9, 1.1, 1.0, True)],
)
def test_colour_as_one_matrix_is_close_to_the_literal_operations(photo, brightness, contrast, saturation, grey):
    recipe = AugmentRecipe(brightness=0.2, contrast=0.2, saturation=0.2, grey_prob=1.0 if grey else 0.0)
    u = {
        name: (factor - 1) / 0.4 + 0.5
        for name, factor in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation))
    }
    literal = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(photo, brightness), contrast), saturation)
    if grey:
        literal = TF.rgb_to_grayscale(literal, 3)
    ours = _coloured(photo, recipe, draws(**u, grey=0.0 if grey else 1.0))
    assert decibels(ours, literal) > 44
    assert decibels(photo, literal) < decibels(ours, literal) - 6, "doing nothing is further off"


@pytest.mark.parametrize("photo", PHOTOS)
def test_blur_after_the_crop_is_close_to_blur_before_it(photo):
    recipe, px, sigma = AugmentRecipe(blur_prob=1.0), 224, 1.8
    box = (40, 30, 440, 400)
    literal = TF.gaussian_blur(photo, 15, sigma).resize((px, px), Image.Resampling.BILINEAR, box=box)
    cropped = photo.resize((px, px), Image.Resampling.BILINEAR, box=box)
    ours = _blurred(cropped, recipe, draws(blur=0.0, sigma=(sigma - 0.1) / 1.9), box, px)
    assert decibels(ours, literal) > 38
    assert decibels(cropped, literal) < decibels(ours, literal) - 6


def test_pixels_depend_on_seed_epoch_and_index_alone(tmp_path):
    PHOTOS[0].save(tmp_path / "a.jpg")
    recipe = AugmentRecipe(
        blur_prob=0.5, sharpen_prob=0.5, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, grey_prob=0.1
    )
    one = augmented(tmp_path / "a.jpg", recipe, 64, Draws(0, 1, 2))
    np.random.seed(5)
    assert np.array_equal(one, augmented(tmp_path / "a.jpg", recipe, 64, Draws(0, 1, 2)))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not np.array_equal(one, augmented(tmp_path / "a.jpg", recipe, 64, Draws(*other)))


def test_an_operation_that_is_switched_off_moves_no_other_draw(tmp_path):
    PHOTOS[0].save(tmp_path / "a.png")
    plain = augmented(tmp_path / "a.png", AugmentRecipe(), 64, Draws(0, 1, 2))
    nearly_plain = augmented(
        tmp_path / "a.png", AugmentRecipe(sharpen_prob=1.0, sharpen_factor=1.0), 64, Draws(0, 1, 2)
    )
    assert np.array_equal(plain, nearly_plain)


def test_crops_have_the_areas_and_ratios_of_the_recipe():
    recipe = AugmentRecipe(crop_scale=(0.2, 0.8), crop_ratio=(0.75, 1.25))
    boxes = [crop_box(400, 300, recipe, Draws(0, 0, index)) for index in range(500)]
    areas = np.array([(r - l) * (b - t) / 120000 for l, t, r, b in boxes])
    ratios = np.array([(r - l) / (b - t) for l, t, r, b in boxes])
    assert all(0 <= l < r <= 400 and 0 <= t < b <= 300 for l, t, r, b in boxes)
    assert 0.19 < areas.min() and areas.max() < 0.81 and abs(areas.mean() - 0.48) < 0.03
    assert 0.73 < ratios.min() and ratios.max() < 1.27
