"""How ours is held against a reference: seeded inputs, and differences of tensors, gradients and pictures."""

import numpy as np
import torch


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(ours, theirs):
    """Largest difference, in units of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def pixels(pictures):
    return np.stack([np.asarray(picture, np.int16) for picture in pictures])


def difference(left, right):
    """In levels of 255, between pictures that show something."""
    left, right = pixels(left), pixels(right)
    assert left.shape == right.shape
    assert left.std(axis=(1, 2, 3)).min() > 10
    return np.abs(left - right).max()


def gradients(network, output, target):
    """Of the squared error of what the network has put out, by its parameters' names."""
    named = dict(network.named_parameters())
    return dict(zip(named, torch.autograd.grad((output - target).square().mean(), named.values()), strict=True))


def worst_error(ours, theirs):
    """Of two sets of tensors by name: the largest error, and whose it is."""
    assert ours.keys() == theirs.keys()
    return max((error(ours[name], theirs[name]), name) for name in ours)
