"""The paper's measures on cases computed by hand."""

import math

import pytest
import torch

from minibooth.dreambooth.metrics import agreement, ceiling, cosines, diversity, likeness

X, Y, XY = [2.0, 0.0], [0.0, 0.5], [3.0, 3.0]  # two axes and the diagonal between them, of any length
HALF = math.sqrt(0.5)


def test_cosines_are_of_every_row_with_every_row():
    expected = torch.tensor([[1, HALF], [0, HALF], [-1, -HALF]])
    assert torch.allclose(cosines(torch.tensor([X, Y, [-1.0, 0.0]]), torch.tensor([X, XY])), expected)


def test_likeness_is_the_mean_over_all_pairs():
    assert likeness(torch.tensor([X, Y]), torch.tensor([X, XY, XY])) == pytest.approx((1 + 0 + 4 * HALF) / 6)


def test_the_ceiling_leaves_out_each_picture_with_itself():
    assert ceiling(torch.tensor([X, Y, XY])) == pytest.approx((0 + HALF + HALF) / 3)
    assert ceiling(torch.tensor([X, X])) == pytest.approx(1)
    assert math.isnan(ceiling(torch.tensor([X])))


def test_agreement_is_of_each_picture_with_its_own_prompt():
    assert agreement(torch.tensor([X, Y]), torch.tensor([XY, X])) == pytest.approx(HALF / 2)
    assert agreement(torch.tensor([X, Y]), torch.tensor([XY])) == pytest.approx(HALF)


def test_diversity_is_the_mean_over_different_pairs():
    shades = torch.tensor([0.0, 0.1, 0.4])[:, None, None, None].expand(3, 3, 2, 2)
    assert diversity(shades, lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))) == pytest.approx((0.1 + 0.4 + 0.3) / 3)


def test_many_pairs_are_measured_a_few_at_a_time():
    shades, seen = torch.rand((20, 3, 2, 2), generator=torch.Generator().manual_seed(0)), []

    def distance(a, b):
        seen.append(len(a))
        return (a - b).abs().mean(dim=(1, 2, 3))

    pairs = [(a - b).abs().mean().item() for i, a in enumerate(shades) for b in shades[:i]]
    assert diversity(shades, distance) == pytest.approx(sum(pairs) / 190)
    assert sum(seen) == 190 and max(seen) <= 32


def test_half_precision_is_measured_in_full():
    draw = torch.randn((4, 300), generator=torch.Generator().manual_seed(0)).bfloat16()
    assert likeness(draw, draw) == pytest.approx(likeness(draw.float(), draw.float()), abs=1e-7)
    assert agreement(draw, draw) == pytest.approx(1, abs=1e-6)
    assert agreement(draw[:2], draw[2:]) == pytest.approx(agreement(draw[:2].float(), draw[2:].float()), abs=1e-7)
