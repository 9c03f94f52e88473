"""Every picture comes once per epoch; its crop depends on the seed and the sample's number; its noise is always fresh."""

import weakref

import pytest
import torch
from small_run import photographs, small, tiny, trainer

import minibooth
from minibooth.diffusion.noise import generator
from minibooth.dreambooth.data import crop, open_picture
from minibooth.dreambooth.latents import Latents
from minibooth.dreambooth.stages import TextToImage


@pytest.fixture(scope="module")
def vae():
    return minibooth.load(tiny()).vae


@pytest.fixture
def latents(tmp_path):
    """latents(**changes): those of five photographs."""
    pictures = sorted(photographs(tmp_path / "five", count=5).iterdir())
    return lambda name="subject", seed=7, **changes: Latents(
        name, pictures, TextToImage(small(tmp_path, **changes), None, pictures), seed
    )


def test_every_picture_comes_once_per_epoch_in_an_order_of_its_own(latents):
    sequence = latents()
    epochs = [tuple(sequence.pick(n)[0] for n in range(5 * epoch, 5 * epoch + 5)) for epoch in range(20)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len(set(epochs)) > 10


def test_crops_are_drawn_evenly(latents):
    sequence = latents(crops_per_image=4)
    numbers = [sequence.pick(n)[1] for n in range(400)]
    assert set(numbers) == {0, 1, 2, 3}
    assert all(60 < numbers.count(number) < 140 for number in range(4))


def test_which_crop_depends_on_seed_and_number_alone(latents):
    expected = [latents().pick(n) for n in range(40)]
    other = latents(train_batch_size=1, gradient_accumulation_steps=3, max_train_steps=99, random_flip=True)
    assert [other.pick(n) for n in reversed(range(40))] == expected[::-1]
    for different in (latents(seed=8), latents(name="class")):
        assert [different.pick(n) for n in range(40)] != expected


@pytest.mark.parametrize("changes", [{}, {"center_crop": True}, {"image_interpolation_mode": "nearest"}, {"random_flip": True}])
def test_a_posterior_is_the_encoded_crop_times_the_scaling_factor(changes, latents, vae):
    sequence = latents(**changes)
    sequence.prepare(vae, range(12))
    filter = changes.get("image_interpolation_mode", "lanczos")
    for n in range(12):
        picture, number = sequence.pick(n)
        place = generator(7, "subject", "place", picture, number)
        options = changes.get("center_crop", False), changes.get("random_flip", False)
        square = crop(open_picture(sequence.pictures[picture]), 64, *options, place, filter)
        with torch.no_grad():
            expected = vae.encode(square.pixels[None])
        for found, wanted in ((sequence[n][0].mean, expected.mean), (sequence[n][0].std, expected.std)):
            assert found.shape == (1, 4, 8, 8) and found.dtype == torch.float32
            assert torch.allclose(found, wanted * 0.18215, rtol=1e-6, atol=1e-6)
        assert sequence[n][1].tolist() == [[*square.original_size, *square.top_left, 64, 64]]


def test_posteriors_are_fp32_whatever_the_vae_computes_in(latents):
    sequence = latents()
    sequence.prepare(minibooth.load(tiny(), torch.bfloat16).vae, range(3))
    assert sequence[0][0].mean.dtype == sequence[0][0].std.dtype == torch.float32


def test_once_prepared_the_vae_may_go(latents):
    """Only the crops that will be wanted were encoded."""
    pipe = minibooth.load(tiny())
    reference, sequence = weakref.ref(pipe.vae), latents(crops_per_image=50)
    sequence.prepare(pipe.vae, range(10, 20))
    pipe.release("vae")
    assert reference() is None
    assert sequence.encoded.keys() == {sequence.pick(n) for n in range(10, 20)}
    assert all(sequence[n][0].mean.isfinite().all() for n in range(10, 20))


def test_on_the_fly_no_crop_comes_twice(latents, vae):
    sequence = latents(crops_per_image=0)
    sequence.prepare(vae, range(20))
    assert not sequence.encoded
    assert len({sequence.pick(n) for n in range(1000)}) == 1000
    means = [tuple(sequence[n][0].mean.flatten().tolist()) for n in range(20)]
    assert len(set(means)) > 15  # some pairs of crops fall on the same pixels
    assert torch.equal(sequence[3][0].mean, sequence[3][0].mean)


def test_a_centred_crop_without_flips_is_always_the_same(latents, vae):
    sequence = latents(center_crop=True, crops_per_image=6)
    sequence.prepare(vae, range(30))
    assert len({tuple(sequence[n][0].mean.flatten().tolist()) for n in range(30)}) == 5


def test_crops_that_are_equal_are_encoded_once(latents, vae, monkeypatch):
    sequence, encoded = latents(center_crop=True, crops_per_image=6), []
    encode = sequence.encode
    monkeypatch.setattr(sequence, "encode", lambda vae, pixels: encoded.append(pixels) or encode(vae, pixels))
    sequence.prepare(vae, range(60))
    assert len(encoded) == 5 and len(sequence.encoded) > 5


def test_posterior_noise_is_drawn_anew_each_step(tmp_path):
    run = trainer(small(tmp_path, crops_per_image=1, max_train_steps=20))
    run.prepare()
    subject = run.sets[0]
    same = [n for n in range(40) if subject.pick(n) == subject.pick(0)]
    assert len(same) == 13 + (subject.pick(39) == subject.pick(0))
    drawn = torch.cat([run.sample(subject, n)[0] for n in same])
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == len(same)
    mean, std = subject[0][0].mean, subject[0][0].std
    z = (drawn - mean) / std
    assert z.mean().abs() < 0.1 and abs(z.std() - 1) < 0.1
