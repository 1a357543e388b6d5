"""Diffusion: the forward process, the reverse process, and three samplers (paper, section 3.1).

    x_t = √(1−β_t)·x_{t−1} + √β_t·ε                                (6)   q_step
    x_t | x_{t−1} ~ N(√(1−β_t)·x_{t−1}, β_t·I)                     (7)   q_step
    x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε,   α_t = 1−β_t,  ᾱ_t = Π_{s≤t} α_s   (8)   q_sample
    x_t | x₀ ~ N(√ᾱ_t·x₀, (1−ᾱ_t)·I)                               (9)   q_sample
    x̂_{t−1} = (x̂_t − (1−α_t)/√(1−ᾱ_t)·ε̂_t)/√α_t + √β_t·ε           (10)  p_step
    ε̂ = w·ε_θ(x_t, c, t) + (1−w)·ε_θ(x_t, t)                       (11)  guide

Everywhere t runs 0…T−1 and is the paper's t−1: `q_sample` at t = 0 is already one step noisy.
Where we deviate: eq. 10 adds no noise in its last step (see `p_step`), and besides eq. 10 there
are DDIM and DPM-Solver++(2M), usual with 50 and with 20 steps.
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

    def shorten(self, timesteps):
        """The schedule that visits only `timesteps` (increasing): the same ᾱ there, larger steps.

        Eq. 8 knows a step only by its ᾱ. So a schedule of few steps is a table of a few of the ᾱ,
        and α is what is left: α'_i = ᾱ'_i/ᾱ'_{i−1}, β'_i = 1 − α'_i.
        Example, T = 10 and timesteps = [1, 4, 7] (`leading(10, 3)`):

            index i in the short schedule     0         1          2
            step t of the long one            1         4          7
            ᾱ'_i                              ᾱ_1       ᾱ_4        ᾱ_7
            α'_i                              ᾱ_1       ᾱ_4/ᾱ_1    ᾱ_7/ᾱ_4

        That is why two indices run in a sampler: eq. 10 reads its tables at i, the model was
        trained on t and wants to be told t.
        """
        alpha_bar = self.alpha_bar[timesteps]
        one = alpha_bar.new_ones(1)
        alpha_bar_before = torch.cat([one, alpha_bar[:-1]])
        return Schedule(1 - alpha_bar / alpha_bar_before)


def lookup(table, t, x):
    """table[t] in x's dtype and on its device, shaped to broadcast over x (B, …).

    t: an int, or (B,) integers.
    """
    value = table.to(x.dtype).to(x.device)[t]
    if value.ndim == 0:
        return value
    return value.reshape(-1, *[1] * (x.ndim - 1))  # (B, 1, …, 1)


# ---------------------------------------------------------------- the equations

def q_step(x_prev, t, eps, schedule):
    """x_t = √(1−β_t)·x_{t−1} + √β_t·ε   (eq. 6)

    With ε ~ N(0, I) this draws from x_t | x_{t−1} ~ N(√(1−β_t)·x_{t−1}, β_t·I)   (eq. 7).
    x_prev, eps: (B, …); t: int or (B,). Returns (B, …).
    """
    signal = lookup((1 - schedule.beta).sqrt(), t, x_prev)
    noise = lookup(schedule.beta.sqrt(), t, x_prev)
    return signal * x_prev + noise * eps


def q_sample(x_0, t, eps, schedule):
    """x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε   (eq. 8)

    With ε ~ N(0, I) this draws from x_t | x₀ ~ N(√ᾱ_t·x₀, (1−ᾱ_t)·I)   (eq. 9).
    x_0, eps: (B, …); t: int or (B,). Returns (B, …).
    """
    signal = lookup(schedule.alpha_bar.sqrt(), t, x_0)
    noise = lookup((1 - schedule.alpha_bar).sqrt(), t, x_0)
    return signal * x_0 + noise * eps


def p_step(x_t, t, eps_hat, noise, schedule):
    """x̂_{t−1} = (x̂_t − (1−α_t)/√(1−ᾱ_t)·ε̂_t)/√α_t + √β_t·ε   (eq. 10)

    At t = 0 the result is x̂₀ and `noise` (the ε above) is not added (Ho et al. 2020, Algorithm 2).
    It would never be removed again: noise of σ = √β₀ ≈ 0.03 on every number of a latent of Stable
    Diffusion, 0.04 in a schedule of 50 steps, whose first step is larger.
    x_t, eps_hat, noise: (B, …); t: int or (B,). Returns (B, …).
    """
    eps_coef = (1 - schedule.alpha) / (1 - schedule.alpha_bar).sqrt()
    eps_coef = lookup(eps_coef, t, x_t)
    sqrt_alpha = lookup(schedule.alpha.sqrt(), t, x_t)
    mean = (x_t - eps_coef * eps_hat) / sqrt_alpha
    std = schedule.beta.sqrt()
    std[0] = 0
    return mean + lookup(std, t, x_t) * noise


def guide(eps_cond, eps_uncond, w):
    """ε̂ = w·ε_θ(x_t, c, t) + (1−w)·ε_θ(x_t, t)   (eq. 11)

    w = 1 is the conditional model alone, w = 0 the unconditional one; w > 1 exaggerates the
    condition.
    """
    return w * eps_cond + (1 - w) * eps_uncond


def rescale_guidance(eps_hat, eps_cond, phi):
    """φ·ε̂·σ(ε_cond)/σ(ε̂) + (1−φ)·ε̂   (Lin et al. 2023, eq. 14–16). Not in the paper.

    Large w can make ε̂ longer than any ε is, and pictures too bright; φ = 1 gives every row (B, …)
    the standard deviation of the conditional answer, φ = 0 changes nothing.
    """
    over = tuple(range(1, eps_hat.ndim))
    ratio = eps_cond.std(over, keepdim=True) / eps_hat.std(over, keepdim=True)
    return phi * ratio * eps_hat + (1 - phi) * eps_hat


def predict_x0(x_t, t, eps_hat, schedule):
    """x̂₀ = (x_t − √(1−ᾱ_t)·ε̂)/√ᾱ_t   (eq. 8 solved for x₀)

    x_t, eps_hat: (B, …); t: int or (B,). Returns (B, …).
    """
    noise = lookup((1 - schedule.alpha_bar).sqrt(), t, x_t)
    signal = lookup(schedule.alpha_bar.sqrt(), t, x_t)
    return (x_t - noise * eps_hat) / signal


# ---------------------------------------------------------------- which steps to visit

def leading(T, steps):
    """`steps` increasing time steps 1, 1+r, 1+2r, … with r = ⌊T/steps⌋; steps = T: all of 0…T−1.

    Stable Diffusion's "leading" spacing with steps_offset 1: 50 of 1000 steps are 1, 21, …, 981;
    3 of 10 are 1, 4, 7. As published, a number that does not divide T may begin far from pure noise
    (7 at t = 853, 600 at t = 600); 1 step begins at t = 1, almost clean: there, prefer "dpm".
    """
    if steps == T:
        return list(range(T))
    stride = T // steps
    return [1 + stride * i for i in range(steps)]


def linspace(T, steps):
    """`steps` increasing time steps, evenly from (T−1)/steps to T−1; 3 of 10 are 3, 6, 9."""
    if steps == T:
        return list(range(T))
    stride = (T - 1) / steps
    return [round(i * stride) for i in range(1, steps + 1)]


# ---------------------------------------------------------------- the samplers

def sample_ddpm(eps_fn, x, schedule, steps, generator=None):
    """Eq. 10 from noise to x̂₀; with fewer than T steps, eq. 10 of the shortened schedule."""
    timesteps = leading(len(schedule.beta), steps)
    short = schedule.shorten(timesteps)
    device = generator.device if generator else x.device
    for i in reversed(range(steps)):
        eps_hat = eps_fn(x, timesteps[i])
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
        x = p_step(x, i, eps_hat, noise.to(x.device), short)
    return x


def sample_ddim(eps_fn, x, schedule, steps, generator=None):
    """x_s = √ᾱ_s·x̂₀(x_t, ε̂) + √(1−ᾱ_s)·ε̂   for each stride from t down to s

    (Song et al. 2021, eq. 12 with σ = 0): guess x̂₀, then noise it again, less, with the same ε̂.
    As published for Stable Diffusion, the last stride ends at ᾱ₀, not at ᾱ = 1. Nothing is drawn.
    """
    timesteps = leading(len(schedule.beta), steps)
    for i in reversed(range(steps)):
        t = timesteps[i]
        s = timesteps[i - 1] if i > 0 else 0
        eps_hat = eps_fn(x, t)
        x_0 = predict_x0(x, t, eps_hat, schedule)
        x = q_sample(x_0, s, eps_hat, schedule)
    return x


def sample_dpm(eps_fn, x, schedule, steps, generator=None):
    """x_s = σ_s/σ_t·x_t − √ᾱ_s·(e^{−h}−1)·D,   D = x̂₀ + h/(2h')·(x̂₀ − x̂₀')

    DPM-Solver++(2M) (Lu et al. 2022, Algorithm 2), σ = √(1−ᾱ), ℓ = log(√ᾱ/σ). Where it comes from:
    by eq. 8, x/σ = e^ℓ·x̂₀ + ε̂. An infinitely small step of DDIM moves ℓ and keeps x̂₀ and ε̂, so
    d(x/σ) = e^ℓ·x̂₀ dℓ. Integrated from ℓ_t to ℓ_s = ℓ_t + h and multiplied by σ_s:
        x_s = σ_s/σ_t·x_t + σ_s·∫ e^ℓ·x̂₀(ℓ) dℓ
    Only x̂₀ on the way has to be guessed. With a constant x̂₀ = D the integral is (e^{ℓ_s} − e^{ℓ_t})·D,
    and σ_s·e^{ℓ_s} = √ᾱ_s gives the first formula. The second takes D from the line through the
    last two guesses, x̂₀ here and x̂₀' one step h' before, extrapolated to the middle of this step.

    Example, T = 10 and 3 steps (`linspace`): t = 9, 6, 3.
        9 → 6     D = x̂₀(9)                                     first order: there is no x̂₀' yet
        6 → 3     D = x̂₀(6) + h/(2h')·(x̂₀(6) − x̂₀(9))           second order
        3 → end   D = x̂₀(3); ᾱ = 1, so h = ∞ and x = D          first order: h/h' would be ∞
    Same time steps as diffusers' DPMSolverMultistepScheduler. `generator` is not used.
    """
    timesteps = linspace(len(schedule.beta), steps)[::-1]
    end = torch.ones(1, dtype=torch.float64)
    alpha_bar = torch.cat([schedule.alpha_bar[timesteps], end])  # (steps + 1,)
    signal = alpha_bar.sqrt()
    sigma = (1 - alpha_bar).sqrt()
    h = (signal / sigma).log().diff()  # (steps,)
    x_0_before = None
    for i, t in enumerate(timesteps):
        x_0 = predict_x0(x, t, eps_fn(x, t), schedule)
        is_second_order = 0 < i < steps - 1
        if is_second_order:
            slope = (h[i] / (2 * h[i - 1])).item()
            D = x_0 + slope * (x_0 - x_0_before)
        else:
            D = x_0
        x_coef = (sigma[i + 1] / sigma[i]).item()
        D_coef = (signal[i + 1] * torch.expm1(-h[i])).item()
        x = x_coef * x - D_coef * D
        x_0_before = x_0
    return x


SAMPLERS = {"ddpm": sample_ddpm, "ddim": sample_ddim, "dpm": sample_dpm}


@torch.no_grad()
def sample(eps_fn, x_T, schedule, steps, sampler="ddim", generator=None, progress=True):
    """Turn noise x_T ~ N(0, I) into a picture by `steps` calls of the model.

    eps_fn(x_t, t: int) -> eps_hat; x_T: (B, C, H, W). sampler: "ddpm" (noise drawn from
    `generator`), "ddim" or "dpm" (deterministic). progress: show a bar. Returns x̂₀ (B, C, H, W).
    ValueError for an unknown sampler, or if steps is not a whole number from 1 to T.
    """
    T = len(schedule.beta)
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    if steps not in range(1, T + 1):
        raise ValueError(f"steps must be a whole number from 1 to {T}, not {steps!r}")
    bar = tqdm(total=steps, desc=sampler, unit="step", disable=not progress)

    def count_and_call(x_t, t):
        eps_hat = eps_fn(x_t, t)
        bar.update()
        return eps_hat

    with bar:
        return SAMPLERS[sampler](count_and_call, x_T, schedule, steps, generator)
