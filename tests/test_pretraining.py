"""What makes weights/: the optimiser that goes on where it was stopped, and the parts of the losses that are ours."""

import pytest
import torch
from pretrain_clip import CONFIG, contrastive_loss, new_clip
from pretrain_tiny import divergence
from pretraining import Training, newton_schulz
from torch import nn


def test_newton_schulz_keeps_directions_and_evens_lengths():
    x = torch.randn(3, 20, 4, 3, generator=torch.Generator().manual_seed(0))
    for before, after in zip(x.flatten(2), newton_schulz(x).flatten(2), strict=True):
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        assert torch.linalg.svdvals(after).sub(1).abs().max() < 0.35  # five steps come so near
        assert (u.T @ after @ v.T).diagonal().min() > 0.6


def test_divergence_is_that_of_gaussians():
    x = torch.randn(4, 500, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.5], [1.0], [2.0], [3.0]])
    x[1] += 0.7 * x[0]
    fitted = torch.distributions.MultivariateNormal(torch.zeros(4), torch.cov(x, correction=0) + 1e-4 * torch.eye(4))
    standard = torch.distributions.MultivariateNormal(torch.zeros(4), torch.eye(4))
    torch.testing.assert_close(divergence(x), torch.distributions.kl_divergence(fitted, standard), rtol=1e-4, atol=1e-5)


def training(path, minutes: float = 10.0, threads: int = 1) -> Training:
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))

    def loss(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (network(x) - y).float().square().mean()

    return Training(path, network, loss, 0.02, minutes, threads)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].sin()


def test_it_learns(tmp_path):
    job = training(tmp_path / "state.safetensors")
    losses = [job.step(batch(step)).item() for step in range(300)]
    assert sum(losses[-20:]) < 0.2 * sum(losses[:20])
    x, y = batch(1000)
    assert (job.average(x) - y).square().mean() < 0.2 * y.square().mean()


@pytest.mark.parametrize("threads", [2, 3, 7])  # 16 samples in shares of 8, of 6, 6 and 4, and in six shares
def test_threads_share_a_batch(tmp_path, threads):
    jobs = [training(tmp_path / f"{count}.safetensors", threads=count) for count in (1, threads)]
    losses = [[job.step(batch(step)).item() for step in range(5)] for job in jobs]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-2, atol=1e-3)  # products are in bf16


def test_a_restart_goes_on(tmp_path):
    path, shown = tmp_path / "state.safetensors", []
    first = training(path, minutes=0.01)
    first.run(batch, lambda: shown.append(1))
    again = training(path, minutes=10.0)
    assert shown == [1] and again.seconds == first.seconds >= 0.6 and again.clock.equal(first.clock)
    assert all(x.equal(first.state[name]) for name, x in again.state.items())


def test_a_call_without_budget_shows(tmp_path):
    """As one does that was stopped between its last step and the export."""
    path, shown = tmp_path / "state.safetensors", []
    training(path, minutes=0.01).run(batch, lambda: None)
    training(path, minutes=0.01).run(batch, lambda: shown.append(1))
    assert shown == [1]


def test_threads_part_no_family(tmp_path):
    """Each picture's partner is in its own thread's share."""
    network = new_clip(CONFIG | {"text_config": CONFIG["text_config"] | {"vocab_size": 9, "eos_token_id": 8}})
    job = Training(tmp_path / "state.safetensors", network, contrastive_loss, 0.02, 10.0, threads=3)
    pixels, ids = torch.rand(4, 2, 3, 64, 64), torch.tensor([7, 1, 8]).expand(4, 2, 3)
    assert job.step((pixels, ids)).isfinite()
