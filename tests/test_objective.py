"""DreamBooth's loss is two plain losses added up, and it moves a UNet just as diffusers' script moves its own."""

import pytest
import torch
import torch.nn.functional as F
from comparing import normals
from conftest import SCHEDULER
from torch import Tensor

import minibooth
from minibooth.diffusion.scheduler import DDPMScheduler
from minibooth.dreambooth.objective import dreambooth_loss, min_snr_weight

B, SHAPE = 4, (4, 4, 6)
SCHEDULES = {
    "epsilon": SCHEDULER,
    "v": SCHEDULER | {"prediction_type": "v_prediction"},
    "v, zero SNR": SCHEDULER | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.fixture(params=SCHEDULES)
def scheduler(request) -> DDPMScheduler:
    return DDPMScheduler.from_config(SCHEDULES[request.param])


@pytest.fixture(params=[None, 5.0], ids=["unweighted", "min-snr"])
def gamma(request) -> float | None:
    return request.param


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Prediction (a leaf), target, and timesteps that min-SNR weighs very differently."""
    return normals(B, *SHAPE).requires_grad_(), normals(B, *SHAPE, seed=1), torch.tensor([3, 990, 400, 40])


def value_and_gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_without_lambda_it_is_plain_training_on_the_subject(scheduler, gamma):
    prediction, target, t = batch()
    joint = dreambooth_loss(prediction, target, t, scheduler, prior_loss_weight=0.0, snr_gamma=gamma)
    value, gradient = value_and_gradient(joint["loss"], prediction)
    subject = slice(0, B // 2)
    plain = dreambooth_loss(prediction[subject], target[subject], t[subject], scheduler, snr_gamma=gamma)
    expected, expected_gradient = value_and_gradient(plain["loss"], prediction)
    assert value == expected == joint["subject"]
    assert torch.equal(gradient, expected_gradient)
    if gamma is None:
        assert torch.allclose(value, F.mse_loss(prediction[subject], target[subject]))


def test_the_joint_batch_equals_two_passes(scheduler, gamma):
    prediction, target, t = batch()
    joint = dreambooth_loss(prediction, target, t, scheduler, prior_loss_weight=0.7, snr_gamma=gamma)
    value, gradient = value_and_gradient(joint["loss"], prediction)
    halves = [slice(0, B // 2), slice(B // 2, B)]
    subject, prior = (dreambooth_loss(prediction[h], target[h], t[h], scheduler, None, gamma)["loss"] for h in halves)
    expected, expected_gradient = value_and_gradient(subject + 0.7 * prior, prediction)
    assert torch.allclose(value, expected, rtol=1e-6)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-6, atol=0)
    assert torch.allclose(joint["subject"], subject) and torch.allclose(joint["prior"], prior)


@pytest.mark.parametrize("name", SCHEDULES)
def test_min_snr_weighs_each_sample_by_its_own_timestep(name):
    """Against Hang et al. 2023 by hand, in float64, sample by sample."""
    scheduler, gamma = DDPMScheduler.from_config(SCHEDULES[name]), 5.0
    prediction, target, t = batch()
    t[1] = 999
    by_hand = []
    for i, step in enumerate(t.tolist()):
        a = scheduler.alphas_cumprod[step].item()
        snr = a / (1 - a)
        weight = min(snr, gamma) / (snr if name == "epsilon" else snr + 1)
        assert min_snr_weight(t[i : i + 1], scheduler, gamma).item() == pytest.approx(weight, rel=1e-4)
        by_hand.append(weight * (prediction[i] - target[i]).detach().double().square().mean().item())
    losses = dreambooth_loss(prediction, target, t, scheduler, prior_loss_weight=2.0, snr_gamma=gamma)
    subject, prior = sum(by_hand[:2]) / 2, sum(by_hand[2:]) / 2
    assert losses["subject"].item() == pytest.approx(subject, rel=1e-4)
    assert losses["prior"].item() == pytest.approx(prior, rel=1e-4)
    assert losses["loss"].item() == pytest.approx(subject + 2 * prior, rel=1e-4)


def test_zero_terminal_snr_stays_finite():
    """At the last timestep the SNR is 0: v has no weight there, epsilon's is the limit 1."""
    for name, weight in (("v_prediction", 0.0), ("epsilon", 1.0)):
        scheduler = DDPMScheduler.from_config(SCHEDULES["v, zero SNR"] | {"prediction_type": name})
        last = torch.tensor([scheduler.num_train_timesteps - 1])
        assert scheduler.snr(last) == 0
        assert min_snr_weight(last, scheduler, 5.0) == weight


def test_halves_of_unequal_size_are_refused(scheduler):
    prediction, target, t = (x[:3] for x in batch())
    with pytest.raises(ValueError, match="3 has no halves"):
        dreambooth_loss(prediction, target, t, scheduler, prior_loss_weight=1.0)


def test_a_target_of_another_shape_is_refused(scheduler):
    prediction, target, t = batch()
    with pytest.raises(ValueError, match="its target"):
        dreambooth_loss(prediction, target[:1], t, scheduler)


def test_the_error_is_taken_in_fp32():
    scheduler = DDPMScheduler.from_config(SCHEDULER)
    prediction, target, t = batch()
    half = prediction.detach().bfloat16()
    losses = dreambooth_loss(half, target, t, scheduler)
    assert losses["loss"].dtype == torch.float32
    assert losses["loss"] == dreambooth_loss(half.float(), target, t, scheduler)["loss"]


@pytest.mark.parametrize("model, prior_loss_weight", [("sd1", None), ("sd2", 0.5)])
def test_ten_steps_change_diffusers_unet_and_ours_alike(model, prior_loss_weight, request):
    """The loop of train_dreambooth.py on fixed latents, noise and timesteps, beside ours."""
    diffusers, checkpoint = pytest.importorskip("diffusers"), request.getfixturevalue(model)
    ours = minibooth.load(checkpoint)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(checkpoint, subfolder="unet")
    before = {name: x.detach().clone() for name, x in theirs.state_dict().items()}
    schedule = diffusers.DDPMScheduler.from_pretrained(checkpoint, subfolder="scheduler")
    x0, noise = normals(10, B, 4, 8, 8), normals(10, B, 4, 8, 8, seed=1)
    context = normals(B, 77, ours.unet.config.cross_attention_dim, seed=2)
    timesteps = torch.randint(1000, (10, B), generator=torch.Generator().manual_seed(3))

    def our_loss(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        prediction = ours.unet(ours.scheduler.add_noise(x0, noise, t), t, context)
        target = ours.scheduler.target(x0, noise, t)
        return dreambooth_loss(prediction, target, t, ours.scheduler, prior_loss_weight)["loss"]

    def their_loss(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        prediction = theirs(schedule.add_noise(x0, noise, t), t, context, return_dict=False)[0]
        velocity = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(x0, noise, t) if velocity else noise
        if prior_loss_weight is None:
            return F.mse_loss(prediction.float(), target.float(), reduction="mean")
        prediction, prior_prediction = torch.chunk(prediction, 2, dim=0)
        target, prior_target = torch.chunk(target, 2, dim=0)
        prior_loss = F.mse_loss(prior_prediction.float(), prior_target.float(), reduction="mean")
        return F.mse_loss(prediction.float(), target.float(), reduction="mean") + prior_loss_weight * prior_loss

    for network, loss in ((ours.unet, our_loss), (theirs, their_loss)):
        network.train().requires_grad_(True)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-2)
        for step in range(10):
            loss(x0[step], noise[step], timesteps[step]).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    changed = {name: x - before[name] for name, x in theirs.state_dict().items()}
    differs = {name: x - before[name] - changed[name] for name, x in ours.unet.state_dict().items()}
    assert norm(changed) > 0
    assert norm(differs) < 1e-3 * norm(changed)


def norm(tensors: dict[str, Tensor]) -> float:
    return torch.cat([x.detach().double().flatten() for x in tensors.values()]).norm().item()
