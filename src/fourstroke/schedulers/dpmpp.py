"""DPM-Solver++: the multistep solver of order 1 to 3, and its stochastic form (Lu et al. 2022, "DPM-Solver++")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import UnsupportedConfig
from ..random import randn_tensor
from .base import Scheduler, SchedulerOutput, records_config
from .noise import (
    alpha_sigma,
    check_option,
    check_prediction_type,
    dynamic_threshold,
    exponential_sigmas,
    karras_sigmas,
    predict_x0,
    sigma_to_timestep,
    sigmas_of,
    spaced_timesteps,
)


def dpmpp_step(
    sample: Tensor, pictures: Sequence[Tensor], sigmas: Tensor, solver_type: str, noise: Tensor | None = None
) -> Tensor:
    """One multistep update in the log-SNR ``lambda = log(alpha / sigma)`` (DPM-Solver++, alg. 2; SDE: eq. 18-20).

    Args:
        sample: x_t at ``sigmas[1]``, (B, ...).
        pictures: the x_0 predicted at ``sigmas[1]``, ``sigmas[2]``, ...; their number, 1 to 3, is the order.
        sigmas: the next sigma, this one, and the earlier ones, newest first, on the CPU; the next may be 0.
        solver_type: ``midpoint`` or ``heun``, of order 2.
        noise: solve the SDE with it; orders 1 and 2.
    """
    alpha, sigma = alpha_sigma(sigmas)
    log_snr = alpha.log() - sigma.log()
    step = log_snr[0] - log_snr[1]
    span = step if noise is None else 2 * step
    decay = torch.exp(-span) - 1.0
    first = pictures[0]
    keep = sigma[0] / sigma[1] if noise is None else sigma[0] / sigma[1] * torch.exp(-step)
    result = keep * sample - alpha[0] * decay * first
    if len(pictures) > 1:
        ratio = (log_snr[1] - log_snr[2]) / step
        slope = (1.0 / ratio) * (first - pictures[1])
        curve = None
        if len(pictures) > 2:
            ratio_1 = (log_snr[2] - log_snr[3]) / step
            change = slope - (1.0 / ratio_1) * (pictures[1] - pictures[2])
            slope = slope + ratio / (ratio + ratio_1) * change
            curve = (1.0 / (ratio + ratio_1)) * change
        if solver_type == "midpoint" and curve is None:
            result = result - 0.5 * (alpha[0] * decay) * slope
        else:
            result = result + alpha[0] * (decay / span + 1.0) * slope
        if curve is not None:
            result = result - alpha[0] * ((decay + span) / span**2 - 0.5) * curve
    return result if noise is None else result + sigma[0] * torch.sqrt(-decay) * noise


class DPMSolverMultistepScheduler(Scheduler):
    """`dpmpp_step` behind diffusers' interface: "DPM++ 2M", "DPM++ 2M Karras", "DPM++ 2M SDE"."""

    @records_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False,
        flow_shift: float = 1.0,
        final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"),
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ):
        check_prediction_type(prediction_type)
        for name in ("use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"):
            check_option(name, self.config[name], False, None)
        check_option("variance_type", variance_type, None, "fixed_small", "fixed_large")
        check_option("final_sigmas_type", final_sigmas_type, "zero", "sigma_min")
        check_option("solver_order", solver_order, 1, 2, 3)
        # Sibling solvers' names for their own kinds, which come along with from_config.
        siblings = {"deis": "dpmsolver++", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
        ours = {name: siblings.get(self.config[name], self.config[name]) for name in ("algorithm_type", "solver_type")}
        self.config = self.config.with_values(ours)
        check_option("algorithm_type", ours["algorithm_type"], "dpmsolver++", "sde-dpmsolver++")
        check_option("solver_type", ours["solver_type"], "midpoint", "heun")
        if self._stochastic and solver_order == 3:
            raise UnsupportedConfig("solver_order 3 is not supported for sde-dpmsolver++; use solver_order 2.")
        if use_karras_sigmas and use_exponential_sigmas:
            raise ValueError("Only one of use_karras_sigmas and use_exponential_sigmas can be used.")
        self._init_schedule(finite_sigma=True)
        self.sigmas = sigmas_of(self.alphas_cumprod)
        self.timesteps = self.timesteps.float()
        self._pictures: list[Tensor] = []  # the latest predictions, newest first

    @property
    def _stochastic(self) -> bool:
        return self.config.algorithm_type.startswith("sde-")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps to run: how many, spaced as configured, or which ones, descending.

        Raises:
            ValueError: both or neither of the two given, or timesteps together with a configured choice of sigmas.
            UnsupportedConfig: ``mu`` was given (a shift for flow matching).
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give exactly one of num_inference_steps and timesteps.")
        c = self.config
        if mu is not None:
            raise UnsupportedConfig("mu, a shift for flow-matching models, is not supported; leave it out.")
        if timesteps is not None and (c.use_karras_sigmas or c.use_exponential_sigmas):
            raise ValueError("timesteps cannot be given when use_karras_sigmas or use_exponential_sigmas chooses them.")
        train_sigmas = sigmas_of(self.alphas_cumprod).cpu()
        if timesteps is not None:
            steps = np.asarray(timesteps, dtype=np.int64)
        else:
            log_snr = -train_sigmas.log().flip(0)
            usable = c.num_train_timesteps - int(torch.searchsorted(log_snr, c.lambda_min_clipped))
            spacing, train = c.timestep_spacing, c.num_train_timesteps
            steps = spaced_timesteps(spacing, num_inference_steps or 0, train, c.steps_offset, last=usable, extra=1)
            steps = steps.round()
        levels = train_sigmas.numpy()
        if c.use_karras_sigmas or c.use_exponential_sigmas:
            spread = karras_sigmas if c.use_karras_sigmas else exponential_sigmas
            chosen = spread(float(levels[0]), float(levels[-1]), len(steps))
            steps = sigma_to_timestep(chosen, levels)
            if c.use_karras_sigmas and c.beta_schedule != "squaredcos_cap_v2":
                steps = steps.round()
        else:
            chosen = np.interp(steps, np.arange(len(levels)), levels)
        last = levels[0] if c.final_sigmas_type == "sigma_min" else 0.0
        self._start(steps, device, torch.long)
        self.sigmas = torch.from_numpy(np.append(chosen, last).astype(np.float32))
        self._pictures = []

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """As in the base, but the last place for a timestep that is not in the schedule."""
        schedule = self.timesteps if schedule_timesteps is None else schedule_timesteps
        wanted = timestep.to(schedule.device) if isinstance(timestep, Tensor) else timestep
        places = (schedule == wanted).nonzero().flatten().tolist()
        return places[min(1, len(places) - 1)] if places else len(self.timesteps) - 1

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha x_0 + sigma eps``, at timesteps (B,) of the schedule; or where a loop with begin_index is."""
        alpha, sigma = alpha_sigma(self._sigmas_at(timesteps, original_samples))
        return alpha * original_samples + sigma * noise

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Take the sample one step on.

        Args:
            model_output: the network's output at ``sample``, (B, ...).
            timestep: one of ``timesteps``; used on the first step, to find its place.
            sample: (B, ...).
            generator: for the noise of ``sde-dpmsolver++``; one for the batch or a list with one a sample.
            variance_noise: that noise itself.
            return_dict: False returns the tuple ``(prev_sample,)``.

        Raises:
            ValueError: no schedule, or a step too many.
        """
        self._require_schedule()
        index = self._enter(timestep)
        c, count = self.config, len(self.timesteps)
        alpha, sigma = alpha_sigma(self.sigmas[index])
        x0 = predict_x0(model_output, sample, alpha, sigma, c.prediction_type)
        if c.thresholding:
            x0 = dynamic_threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        self._pictures = [x0, *self._pictures][: c.solver_order]
        noise = None
        if self._stochastic and variance_noise is not None:
            noise = variance_noise.to(model_output.device, torch.float32)
        elif self._stochastic:
            noise = randn_tensor(model_output.shape, generator, device=model_output.device, dtype=torch.float32)
        order = min(len(self._pictures), self._order_at(index, count))
        sigmas = self.sigmas[index - order + 1 : index + 2].flip(0)
        prev_sample = dpmpp_step(sample.float(), self._pictures[:order], sigmas, c.solver_type, noise)
        self.step_index = index + 1
        prev_sample = prev_sample.to(x0.dtype)
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _order_at(self, index: int, count: int) -> int:
        """The highest order that the configuration allows at a step: lower ones at the end, where they are steadier."""
        c = self.config
        short = c.lower_order_final and count < 15
        if index == count - 1 and (short or c.euler_at_final or c.final_sigmas_type == "zero"):
            return 1
        return 2 if index == count - 2 and short else 3
