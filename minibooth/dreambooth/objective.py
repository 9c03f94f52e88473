"""The objective of DreamBooth: the subject's error plus lambda times the class's. Ruiz et al. 2022, arXiv 2208.12242, eq. 2.

The paper's errors are of x0, weighted by w_t. Ours are of the noise, which is w_t = SNR(t), or of v, w_t = SNR(t) + 1; its
alpha_t and sigma_t are sqrt(a_t) and sqrt(1 - a_t) of `diffusion/scheduler.py`.

Shapes: B batch; with prior preservation its first half is the subject, its second the class.
"""

import torch
from torch import Tensor

from minibooth.diffusion.scheduler import DDPMScheduler


def min_snr_weight(timesteps: Tensor, scheduler: DDPMScheduler, gamma: float) -> Tensor:
    """[B] weights min(SNR, gamma) / SNR, or / (SNR + 1) where the network predicts v. Hang et al. 2023, section 3.4."""
    snr = scheduler.snr(timesteps)
    if scheduler.prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return (gamma / snr).clamp(max=1)


def dreambooth_loss(
    prediction: Tensor, target: Tensor, timesteps: Tensor, scheduler: DDPMScheduler,
    prior_loss_weight: float | None = None, snr_gamma: float | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Scalars {"loss", "subject", "prior"} with loss = subject + prior_loss_weight * prior.

    prediction, target: [B, C, h, w] at timesteps [B]. One squared error per sample, weighted for its own timestep where
    `snr_gamma` is given; only then split into halves, each its own mean. Without `prior_loss_weight` all of the batch is
    the subject and prior is 0. Raises ValueError for another shape of the target, and for halves of unequal size.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"the prediction is {[*prediction.shape]}, its target {[*target.shape]}")
    errors = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    if snr_gamma is not None:
        errors = errors * min_snr_weight(timesteps, scheduler, snr_gamma)
    if prior_loss_weight is None:
        subject = errors.mean()
        return {"loss": subject, "subject": subject, "prior": torch.zeros_like(subject)}
    if len(errors) % 2:
        raise ValueError(f"a batch of {len(errors)} has no halves: as many class samples as subject samples are needed")
    subject, prior = (half.mean() for half in errors.chunk(2))
    return {"loss": subject + prior_loss_weight * prior, "subject": subject, "prior": prior}
