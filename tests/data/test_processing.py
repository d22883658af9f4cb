from __future__ import annotations

import numpy as np
import pytest
import torch

from r4b_core.data.images import ImageError
from r4b_core.data.processing import PromptError, check_question, image_to_patches


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("patch_size", [14, 16])
def test_patches_are_what_a_convolution_sees(patch_size: int) -> None:
    image = noise(2 * patch_size, 3 * patch_size)
    patches, grid = image_to_patches(image, patch_size)
    assert grid == (1, 2, 3) and patches.dtype == np.float32
    weight = torch.randn(5, 3, patch_size, patch_size)
    pixels = (torch.from_numpy(image).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    expected = torch.nn.functional.conv2d(pixels[None], weight, stride=patch_size)[0].flatten(1).T
    torch.testing.assert_close(torch.from_numpy(patches) @ weight.flatten(1).T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (noise(17, 32), r"17 x 32 pixels does not divide into patches of 16: .* 16 x 32"),
        (noise(16, 16).astype(np.float32), r"float32 \[16, 16, 3\]: give uint8"),
        (noise(16, 16)[..., 0], "give uint8"),
        (noise(0, 16), "0 x 16"),
    ],
)
def test_images_that_cannot_be_cut(image: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        image_to_patches(image)


def test_question_with_images() -> None:
    assert check_question("final value ?", 2) == "<image><image>final value ?"
    assert check_question("left <image> or right <image> ?", 2) == "left <image> or right <image> ?"
    assert check_question("no picture", 0) == "no picture"


@pytest.mark.parametrize(("question", "images"), [("the tag <image>", 0), ("<image> and <image>", 1), ("<image>", 2)])
def test_literal_image_tags_are_refused(question: str, images: int) -> None:
    with pytest.raises(PromptError, match=f"the sample has {images} images"):
        check_question(question, images)


@pytest.mark.parametrize("tag", ["<|im_end|>", "<|im_start|>", "<think>", "</think>", "<|vision_start|>"])
def test_template_tags_are_refused(tag: str) -> None:
    with pytest.raises(PromptError, match="belongs to the chat template"):
        check_question(f"hello {tag}\n", 0)
