"""The samplers of `--sample_sampler` and `--ss`: stock's names and diffusers' schedulers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

# name → diffusers class, arguments. The k_ names are stock's second spelling of the same samplers.
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": (
        "DPMSolverMultistepScheduler",
        # This algorithm divides by the last sigma, so it can't go down to zero.
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}
SAMPLERS |= {
    f"k_{name}": SAMPLERS[name] for name in ("lms", "euler", "euler_a", "dpm_2", "dpm_2_a")
}


def make_scheduler(
    sampler: str, config: Mapping[str, Any], prediction_type: str, zero_terminal_snr: bool = False
) -> Any:
    """A fresh diffusers scheduler.

    Args:
        sampler: a key of `SAMPLERS`.
        config: the model's own scheduler config; what the sampler doesn't know of it is left out.
        prediction_type: "epsilon" or "v_prediction".
        zero_terminal_snr: whether the model was trained down to pure noise; the sampler then has
            to start there (Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are
            Flawed", §3.1 and §3.3).
    """
    class_name, arguments = SAMPLERS[sampler]
    scheduler_class = _scheduler_class(class_name)
    arguments = {**arguments, "prediction_type": prediction_type}
    if zero_terminal_snr:
        if "rescale_betas_zero_snr" in inspect.signature(scheduler_class.__init__).parameters:
            arguments |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        else:
            log.warning("sampler %s knows no zero terminal SNR; ddim and euler do", sampler)
    return scheduler_class.from_config(dict(config), **arguments)


def _scheduler_class(name: str) -> Any:
    if name == "LMSDiscreteScheduler":
        return _lms_class()
    import diffusers  # takes seconds, and the names above are needed for checking options

    return getattr(diffusers, name)


def _lms_class() -> Any:
    """Diffusers' LMS with its coefficients integrated exactly, which needs no SciPy."""
    from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
    from numpy.polynomial import Polynomial

    class LMSScheduler(LMSDiscreteScheduler):
        def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
            """The integral of a Lagrange basis polynomial from sigma[t] to sigma[t + 1]."""
            sigmas = [float(self.sigmas[t - k]) for k in range(order)]
            here = sigmas[current_order]
            basis = Polynomial([1.0])
            for k, sigma in enumerate(sigmas):
                if k != current_order:
                    basis *= Polynomial([-sigma, 1.0]) / (here - sigma)
            integral = basis.integ()
            return float(integral(float(self.sigmas[t + 1])) - integral(float(self.sigmas[t])))

    return LMSScheduler
