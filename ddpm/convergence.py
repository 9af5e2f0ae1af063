"""How far a few steps of DPM-Solver++ end up from many, along the same noise.

path = NoisePath(schedule, seeds, (3, 64, 64))
converged = path.solve(estimate, range(999, -1, -1), eta=1.0)
few = path.solve(estimate, log_snr_timesteps(schedule, 10), eta=1.0)
distance = (few - converged).square().flatten(1).mean(1).sqrt()  # [N]
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ddpm.process import Threshold, dpm_solver_step
from ddpm.sampling import Estimate, iterative_denoise, noise_source
from ddpm.schedule import Schedule


class NoisePath:
    """One path of noise for each image: x_T, and what is added from each timestep to the next.

    The noise of a long step is made of that of the short ones within it, so that all numbers of steps go the same way.
    The noise of all timesteps is in memory.

    seeds: of the images; shape: of each, such as (3, 64, 64); device: on which they are drawn
    """

    def __init__(
        self, schedule: Schedule, seeds: Sequence[int], shape: Sequence[int], device: str | torch.device = "cpu"
    ):
        noise = noise_source(seeds, shape, device)
        self.schedule, self.x_T, self.noise = schedule, noise(), [noise() for _ in range(schedule.num_timesteps)]
        self.log_snr = 0.5 * torch.logit(schedule.alphas_cumprod)  # λ_t of the papers

    def between(self, t: int, t_prev: int) -> Tensor:
        """The noise of a step of SDE-DPM-Solver++ from t to t_prev, [N, C, H, W] of variance 1."""
        parts = [
            math.exp(self.log_snr[k] - self.log_snr[t_prev]) * self._unit(k + 1, k) * self.noise[k]
            for k in range(t_prev, t)
        ]
        return sum(parts) / self._unit(t, t_prev)

    def start(self, t: int, eta: float) -> Tensor:
        """x_t [N, C, H, W] where all is noise still."""
        last = self.schedule.num_timesteps - 1
        if not eta or t == last:
            return self.x_T
        return math.exp(self.log_snr[last] - self.log_snr[t]) * self.x_T + self._unit(last, t) * self.between(last, t)

    def solve(
        self, estimate: Estimate, timesteps: Sequence[int], *, threshold: Threshold | None = None, eta: float = 0.0
    ) -> Tensor:
        """Images [N, C, H, W] by DPM-Solver++ through these timesteps; eta, threshold: as in `denoise_along`."""
        steps = itertools.pairwise(timesteps)  # the step to the clean image asks for no noise

        def noise() -> Tensor:
            return self.between(*next(steps)) if eta else self.x_T

        loop = {"noise": noise, "step": partial(dpm_solver_step, eta=eta), "threshold": threshold}
        return iterative_denoise(estimate, self.start(timesteps[0], eta), timesteps, self.schedule, **loop)

    def _unit(self, t: int, t_prev: int) -> float:
        """The standard deviation of the noise of a step, as a share of that at t_prev."""
        return math.sqrt(-math.expm1(2 * (self.log_snr[t] - self.log_snr[t_prev])))
