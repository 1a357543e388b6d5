"""Diffusion: the forward process, the reverse process, and three samplers (paper, section 3.1).

    x_t = √(1−β_t)·x_{t−1} + √β_t·ε                                (6)   q_step
    x_t | x_{t−1} ~ N(√(1−β_t)·x_{t−1}, β_t·I)                     (7)   q_step
    x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε,   α_t = 1−β_t,  ᾱ_t = Π_{s≤t} α_s   (8)   q_sample
    x_t | x₀ ~ N(√ᾱ_t·x₀, (1−ᾱ_t)·I)                               (9)   q_sample
    x̂_{t−1} = (x̂_t − (1−α_t)/√(1−ᾱ_t)·ε̂_t)/√α_t + √β_t·ε           (10)  p_step
    ε̂ = w·ε_θ(x_t, c, t) + (1−w)·ε_θ(x_t, t)                       (11)  guide

Everywhere t runs 0…T−1 and is the paper's t−1: `q_sample` at t = 0 is already one step noisy.
Where we deviate: eq. 10 adds no noise in its last step (DDPM, Algorithm 2), and besides eq. 10
there are DDIM and DPM-Solver++(2M), which reach the same pictures in 50 and in 20 steps.
Tables are float64; every function answers in the dtype and on the device of its x.
"""

import torch
from tqdm import tqdm


class Schedule:
    """The tables β, α = 1−β and ᾱ = Πα, each (T,) float64 on the CPU, indexed [t].

    beta: (T,) noise variances, each strictly between 0 and 1; otherwise ValueError.
    """

    def __init__(self, beta):
        self.beta = torch.as_tensor(beta, dtype=torch.float64, device="cpu")
        if self.beta.ndim != 1 or not ((self.beta > 0) & (self.beta < 1)).all():
            raise ValueError("beta must be a list of numbers strictly between 0 and 1")
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)

    @classmethod
    def stable_diffusion(cls, T=1000):
        """√β linear from √0.00085 to √0.012 ("scaled linear", Stable Diffusion 1.x)."""
        return cls(torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64) ** 2)

    @classmethod
    def ddpm(cls, T=1000):
        """β linear from 1e-4 to 0.02 (Ho et al. 2020, section 4)."""
        return cls(torch.linspace(1e-4, 0.02, T, dtype=torch.float64))

    def subsequence(self, timesteps):
        """The schedule that visits only `timesteps` (increasing): the same ᾱ there, longer strides."""
        alpha_bar = self.alpha_bar[timesteps]
        return Schedule(1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]]))


def at(table, t, x):
    """table[t] in x's dtype and device, shaped to broadcast over x (B, …). t: int, or (B,) integers."""
    value = table.to(x.dtype).to(x.device)[t]
    return value if value.ndim == 0 else value.reshape(-1, *[1] * (x.ndim - 1))


def q_step(x_prev, t, eps, schedule):
    """x_t = √(1−β_t)·x_{t−1} + √β_t·ε   (eq. 6)

    With ε ~ N(0, I) this draws from x_t | x_{t−1} ~ N(√(1−β_t)·x_{t−1}, β_t·I)   (eq. 7).
    x_prev, eps: (B, …); t: int or (B,). Returns (B, …).
    """
    return at((1 - schedule.beta).sqrt(), t, x_prev) * x_prev + at(schedule.beta.sqrt(), t, x_prev) * eps


def q_sample(x_0, t, eps, schedule):
    """x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε   (eq. 8)

    With ε ~ N(0, I) this draws from x_t | x₀ ~ N(√ᾱ_t·x₀, (1−ᾱ_t)·I)   (eq. 9).
    x_0, eps: (B, …); t: int or (B,). Returns (B, …).
    """
    return at(schedule.alpha_bar.sqrt(), t, x_0) * x_0 + at((1 - schedule.alpha_bar).sqrt(), t, x_0) * eps


def p_step(x_t, t, eps_hat, noise, schedule):
    """x̂_{t−1} = (x̂_t − (1−α_t)/√(1−ᾱ_t)·ε̂_t)/√α_t + √β_t·ε   (eq. 10)

    At t = 0 the result is x̂₀ and `noise` (the ε above) is not added (Ho et al. 2020, Algorithm 2).
    x_t, eps_hat, noise: (B, …); t: int or (B,). Returns (B, …).
    """
    eps_scale = (1 - schedule.alpha) / (1 - schedule.alpha_bar).sqrt()
    mean = (x_t - at(eps_scale, t, x_t) * eps_hat) / at(schedule.alpha.sqrt(), t, x_t)
    std = schedule.beta.sqrt()
    std[0] = 0
    return mean + at(std, t, x_t) * noise


def guide(eps_cond, eps_uncond, w):
    """ε̂ = w·ε_θ(x_t, c, t) + (1−w)·ε_θ(x_t, t)   (eq. 11)

    w = 1 is the conditional model alone, w = 0 the unconditional one, w > 1 exaggerates the condition.
    """
    return w * eps_cond + (1 - w) * eps_uncond


def predict_x0(x_t, t, eps_hat, schedule):
    """x̂₀ = (x_t − √(1−ᾱ_t)·ε̂)/√ᾱ_t   (eq. 8 solved for x₀)

    x_t, eps_hat: (B, …); t: int or (B,). Returns (B, …).
    """
    return (x_t - at((1 - schedule.alpha_bar).sqrt(), t, x_t) * eps_hat) / at(schedule.alpha_bar.sqrt(), t, x_t)


def leading(T, steps):
    """`steps` increasing time steps 1, 1+r, 1+2r, … with r = ⌊T/steps⌋; steps = T takes all of 0…T−1.

    Stable Diffusion's "leading" spacing with steps_offset 1: 50 of 1000 steps are 1, 21, …, 981.
    As published, a number that does not divide T may begin far from pure noise (7 at t = 853, 600 at t = 600), and so
    does 1 (at t = 1): there, prefer "dpm".
    """
    return [int(steps < T) + T // steps * i for i in range(steps)]


def linspace(T, steps):
    """`steps` increasing time steps, evenly from (T−1)/steps to T−1; steps = T takes all of 0…T−1."""
    return [round(i * ((T - 1) / steps)) for i in range(1, steps + 1)] if steps < T else list(range(T))


def sample_ddpm(eps_fn, x, schedule, steps, generator=None):
    """Eq. 10 from noise to x̂₀; with fewer than T steps, eq. 10 of the schedule that visits only those."""
    timesteps = leading(len(schedule.beta), steps)
    schedule = schedule.subsequence(timesteps)
    device = generator.device if generator else x.device
    for i, t in reversed(list(enumerate(timesteps))):
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
        x = p_step(x, i, eps_fn(x, t), noise, schedule)
    return x


def sample_ddim(eps_fn, x, schedule, steps, generator=None):
    """x_s = √ᾱ_s·x̂₀(x_t, ε̂) + √(1−ᾱ_s)·ε̂ for each pair t > s (Song et al. 2021, eq. 12 with σ = 0).

    As published for Stable Diffusion, the last stride ends at ᾱ₀, not at ᾱ = 1, and x̂₀ is not clipped.
    """
    timesteps = leading(len(schedule.beta), steps)
    for t, s in reversed(list(zip(timesteps, [0, *timesteps[:-1]]))):
        eps_hat = eps_fn(x, t)
        x = q_sample(predict_x0(x, t, eps_hat, schedule), s, eps_hat, schedule)
    return x


def sample_dpm(eps_fn, x, schedule, steps, generator=None):
    """x_s = σ_s/σ_t·x_t − √ᾱ_s·(e^{−h}−1)·D,   D = x̂₀ + h/(2h')·(x̂₀ − x̂₀')

    DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2): σ = √(1−ᾱ), h the growth of log(√ᾱ/σ) in this
    stride; h' and x̂₀' belong to the stride before. First and last stride are first order (D = x̂₀);
    the last ends at ᾱ = 1. Same time steps and strides as diffusers' DPMSolverMultistepScheduler.
    """
    timesteps = linspace(len(schedule.beta), steps)[::-1]
    alpha_bar = torch.cat([schedule.alpha_bar[timesteps], torch.ones(1, dtype=torch.float64)])
    sqrt_alpha_bar, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    h = (sqrt_alpha_bar / sigma).log().diff()  # (steps,): the last is infinite
    x_0_before = None
    for i, t in enumerate(timesteps):
        x_0 = D = predict_x0(x, t, eps_fn(x, t), schedule)
        if 0 < i < steps - 1:
            D = x_0 + (h[i] / (2 * h[i - 1])).item() * (x_0 - x_0_before)
        x = (sigma[i + 1] / sigma[i]).item() * x - (sqrt_alpha_bar[i + 1] * torch.expm1(-h[i])).item() * D
        x_0_before = x_0
    return x


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpm": sample_dpm}


@torch.no_grad()
def sample(eps_fn, x_T, schedule, steps, sampler="ddim", generator=None, progress=True):
    """Turn noise x_T ~ N(0, I) into a picture by `steps` calls of the model.

    eps_fn(x_t, t: int) -> eps_hat; x_T: (B, C, H, W). sampler: "ddpm" (noise drawn from `generator`),
    "ddim" or "dpm" (deterministic). progress: show a bar. Returns x̂₀ (B, C, H, W).
    ValueError for an unknown sampler, or if steps is not a whole number from 1 to T.
    """
    T = len(schedule.beta)
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if steps not in range(1, T + 1):
        raise ValueError(f"steps must be a whole number from 1 to {T}, not {steps!r}")
    with tqdm(total=steps, desc=sampler, unit="step", disable=not progress) as bar:

        def counted(x_t, t):
            eps_hat = eps_fn(x_t, t)
            bar.update()
            return eps_hat

        return SAMPLERS[sampler](counted, x_T, schedule, steps, generator)
