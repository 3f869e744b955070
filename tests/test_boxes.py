import pytest
import torch

from sam3_hf.boxes_sam3_lite import pack_boxes, relative_boxes


def test_pixels_become_shares_of_the_image():
    boxes = torch.tensor([[8.0, 4, 40, 20], [0, 0, 80, 40]])
    torch.testing.assert_close(relative_boxes(boxes, (40, 80)), torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.5, 0.5, 1, 1]]))
    assert relative_boxes(boxes.double(), (40, 80)).dtype == torch.float64


def test_prompts_are_padded_to_the_one_with_most_boxes():
    two, one = torch.rand(2, 4), torch.rand(1, 4)
    packed = pack_boxes([two, None, one, torch.zeros(0, 4)], [[1, 0], None, None, []])
    assert packed["input_boxes"].shape == (4, 2, 4) and packed["input_boxes"].dtype == torch.float32
    assert torch.equal(packed["input_boxes"][0], two) and torch.equal(packed["input_boxes"][2, :1], one)
    assert packed["input_boxes_labels"].tolist() == [[1, 0], [-10, -10], [1, -10], [-10, -10]]
    assert packed["input_boxes_labels"].dtype == torch.int64
    assert pack_boxes([one, two], padding_label=-1)["input_boxes_labels"].tolist() == [[1, -1], [1, 1]]
    assert pack_boxes([None])["input_boxes"].shape == (1, 0, 4)


def test_each_box_needs_a_label():
    with pytest.raises(ValueError, match="Prompt 1 has 2 boxes and 1 box labels"):
        pack_boxes([None, torch.rand(2, 4)], [None, [1]])
