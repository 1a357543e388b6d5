"""ddpm.py: equations 6–11 against closed forms; samplers against oracles, diffusers and the exact ODE."""

import math

import pytest
import torch

import ddpm
from conftest import close, randn
from ddpm import (Schedule, guide, lookup, p_step, predict_x0, q_sample, q_step, rescale_guidance,
                  sample)

SD = Schedule.stable_diffusion()


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def oracle(x_0, schedule=SD):
    """The ε̂ of a model that knows x₀: eq. 8 solved for ε."""
    return lambda x_t, t: (x_t - schedule.alpha_bar[t].sqrt() * x_0) / (1 - schedule.alpha_bar[t]).sqrt()


def gaussian_model(std, schedule=SD):
    """The exact E[ε | x_t] when the data are N(0, std²)."""
    return lambda x, t: (1 - schedule.alpha_bar[t]).sqrt() * x / (1 + schedule.alpha_bar[t] * (std**2 - 1))


def curved_model(x, t):
    """Any nonlinear function of x and t will do where two samplers must agree."""
    return torch.tanh(1.3 * x) * (0.4 + t / 1000) + 0.1 * torch.sin(x * t / 100)


def test_schedules_have_the_published_numbers():
    close(SD.beta[[0, -1]], numbers(0.00085, 0.012))
    close(SD.alpha_bar[[0, -1]], numbers(0.99915, 0.00466), 5e-6)
    close(SD.beta[[500]].sqrt(), numbers((0.00085**0.5 * 499 + 0.012**0.5 * 500) / 999))
    linear = Schedule.ddpm()
    close(linear.beta[[0, 500, -1]], numbers(1e-4, 1e-4 + 0.0199 * 500 / 999, 0.02))
    close(linear.alpha_bar[2], (1 - linear.beta[0]) * (1 - linear.beta[1]) * (1 - linear.beta[2]))
    for table in (SD.beta, SD.alpha, SD.alpha_bar):
        assert table.dtype == torch.float64 and table.shape == (1000,)


@pytest.mark.parametrize("beta", [[0.1, 1.0], [0.0, 0.1], [float("nan")], [[0.1]]])
def test_impossible_beta_is_refused(beta):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        Schedule(beta)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 4, 4)])
def test_lookup_broadcasts_a_table_over_every_shape_of_x(shape):
    table = numbers(10, 20, 30, 40)
    x = torch.zeros(shape)
    rows = lookup(table, torch.tensor([3, 0, 1]), x)
    assert rows.dtype == x.dtype and rows.ndim == x.ndim
    for row, value in zip(x + rows, (40, 10, 20)):
        assert (row == value).all()
    assert (x + lookup(table, 2, x) == 30).all()


def test_eq6_closed_form():
    x_t = q_step(numbers(3), 1, numbers(-2), Schedule([0.5, 0.19]))
    close(x_t, numbers(0.9 * 3 - 0.19**0.5 * 2))
    x, eps, t = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), torch.tensor([0, 400, 999])
    for row, step in enumerate(t.tolist()):
        expected = (1 - SD.beta[step]).sqrt() * x[row] + SD.beta[step].sqrt() * eps[row]
        close(q_step(x, t, eps, SD)[row], expected)
        close(q_step(x, step, eps, SD)[row], expected)


def assert_standard_normal(z):
    moments = torch.stack([z.mean(), z.var(), (z**4).mean()])
    close(moments, numbers(0, 1, 3), 0.02)


def test_eq7_step_is_gaussian_with_mean_sqrt_alpha_x_and_variance_beta():
    x = torch.full((400_000,), 2.0, dtype=torch.float64)
    x_t = q_step(x, 1, randn(400_000), Schedule([0.5, 0.3]))
    assert_standard_normal((x_t - 0.7**0.5 * 2) / 0.3**0.5)


def test_eq8_marginal_equals_iterated_eq6():
    x_0, zero, one = randn(5), torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    mean, variance = x_0, zero
    for t in range(1000):
        gain, std = q_step(one, t, zero, SD), q_step(zero, t, one, SD)
        mean, variance = q_step(mean, t, zero, SD), gain**2 * variance + std**2
        if t in (0, 1, 10, 500, 999):
            close(q_sample(x_0, t, zero, SD), mean)
            close(q_sample(zero, t, one, SD) ** 2, variance)


def test_eq9_marginal_is_gaussian_with_mean_sqrt_alpha_bar_x0_and_variance_1_minus_alpha_bar():
    x_0 = torch.full((400_000,), 2.0, dtype=torch.float64)
    x_t = q_sample(x_0, 1, randn(400_000), Schedule([0.5, 0.3]))  # ᾱ = 0.5·0.7
    assert_standard_normal((x_t - 0.35**0.5 * 2) / 0.65**0.5)
    x, eps, t = randn(3, 2, 4), randn(3, 2, 4, seed=1), torch.tensor([0, 400, 999])
    for row, step in enumerate(t.tolist()):
        close(q_sample(x, t, eps, SD)[row], q_sample(x[row], step, eps[row], SD))


def test_predict_x0_inverts_eq8():
    x_0, eps, t = randn(3, 2, 4), randn(3, 2, 4, seed=1), torch.tensor([0, 400, 999])
    close(predict_x0(q_sample(x_0, t, eps, SD), t, eps, SD), x_0)


@pytest.mark.parametrize("t", [1, 20, 500, 999])
def test_eq10_mean_is_the_bayes_posterior(t):
    """x_{t−1} from its prior (eq. 9) and its likelihood (eq. 7), weighted by precision."""
    x_0, eps, zero = randn(50), randn(50, seed=1), torch.zeros(50, dtype=torch.float64)
    x_t = q_sample(x_0, t, eps, SD)
    prior, likelihood = 1 / (1 - SD.alpha_bar[t - 1]), SD.alpha[t] / SD.beta[t]
    mean = prior * SD.alpha_bar[t - 1].sqrt() * x_0 + likelihood * x_t / SD.alpha[t].sqrt()
    close(p_step(x_t, t, eps, zero, SD), mean / (prior + likelihood), 1e-10)


def test_eq10_noise_has_variance_beta_and_is_absent_at_t_0():
    x, eps, noise = randn(3, 2, 4), randn(3, 2, 4, seed=1), randn(3, 2, 4, seed=2)
    t = torch.tensor([0, 1, 999])
    added = p_step(x, t, eps, noise, SD) - p_step(x, t, eps, 0 * noise, SD)
    std = numbers(0, SD.beta[1] ** 0.5, SD.beta[999] ** 0.5)
    close(added, std[:, None, None] * noise)
    close(p_step(x, 0, eps, noise, SD), predict_x0(x, 0, eps, SD))
    assert SD.beta[0] > 0


def test_eq10_noise_left_out_at_t_0_would_have_the_sizes_that_p_step_names():
    assert round(SD.beta[0].sqrt().item(), 2) == 0.03
    assert round(SD.shorten(ddpm.leading(1000, 50)).beta[0].sqrt().item(), 2) == 0.04


def test_eq10_parity_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample=False)
    reference.alphas_cumprod, reference.one = SD.alpha_bar, torch.ones((), dtype=torch.float64)
    x, eps = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for t in (999, 500, 1, 0):
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
        expected = reference.step(eps, t, x, generator=torch.Generator().manual_seed(7)).prev_sample
        close(p_step(x, t, eps, noise, SD), expected, 1e-10)


def test_eq11_guidance_extrapolates_from_the_unconditional_prediction():
    cond, uncond = randn(2, 3), randn(2, 3, seed=1)
    close(guide(cond, uncond, 7.5), uncond + 7.5 * (cond - uncond))
    close(guide(cond, uncond, 1), cond)
    close(guide(cond, uncond, 0), uncond)


def test_rescaled_guidance_is_that_of_diffusers_and_keeps_the_deviation():
    eps_cond = randn(3, 4, 8, 8)
    eps_hat = guide(eps_cond, randn(3, 4, 8, 8), 6.0)
    whole = rescale_guidance(eps_hat, eps_cond, 1.0)
    close(whole.std(dim=(1, 2, 3)), eps_cond.std(dim=(1, 2, 3)))
    close(rescale_guidance(eps_hat, eps_cond, 0.0), eps_hat)
    pipelines = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    theirs = pipelines.rescale_noise_cfg(eps_hat, eps_cond, guidance_rescale=0.7)
    close(rescale_guidance(eps_hat, eps_cond, 0.7), theirs)


def test_time_steps_are_the_published_ones():
    assert ddpm.leading(1000, 50) == list(range(1, 982, 20))
    assert ddpm.linspace(1000, 20) == [round(49.95 * i) for i in range(1, 21)]


def test_time_steps_of_the_docstrings_examples():
    assert ddpm.leading(10, 3) == [1, 4, 7]
    assert ddpm.linspace(10, 3) == [3, 6, 9]
    for steps, first in ((7, 853), (600, 600), (1, 1)):  # the first step a sampler visits
        assert ddpm.leading(1000, steps)[-1] == first


def test_a_shortened_schedule_keeps_alpha_bar_and_makes_longer_strides():
    schedule = Schedule.stable_diffusion(10)
    short = schedule.shorten([1, 4, 7])
    alpha_bar = schedule.alpha_bar
    close(short.alpha_bar, alpha_bar[[1, 4, 7]])
    close(short.alpha, torch.stack([alpha_bar[1], alpha_bar[4] / alpha_bar[1], alpha_bar[7] / alpha_bar[4]]))
    close(schedule.shorten(list(range(10))).beta, schedule.beta)


def test_samplers_tell_the_model_the_long_schedules_time_steps():
    visited = {}
    for sampler in ddpm.SAMPLERS:

        def eps_fn(x_t, t):
            visited.setdefault(sampler, []).append(t)
            return x_t

        sample(eps_fn, randn(1), Schedule.stable_diffusion(10), 3, sampler, progress=False)
    assert visited == {"ddpm": [7, 4, 1], "ddim": [7, 4, 1], "dpm": [9, 6, 3]}


@pytest.mark.parametrize("spacing", [ddpm.leading, ddpm.linspace])
def test_every_number_of_steps_has_distinct_valid_time_steps(spacing):
    for steps in range(1, 1001):
        timesteps = spacing(1000, steps)
        assert len(set(timesteps)) == steps and timesteps == sorted(timesteps)
        assert 0 <= timesteps[0] and timesteps[-1] <= 999


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
def test_oracle_model_gives_x0_back(steps):
    x_0, eps = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    start = q_sample(x_0, ddpm.leading(1000, steps)[-1], eps, SD)
    close(sample(oracle(x_0), start, SD, steps, "ddim", progress=False), q_sample(x_0, 0, eps, SD), 1e-9)
    for sampler in ("dpm", "ddpm"):
        close(sample(oracle(x_0), eps, SD, steps, sampler, progress=False), x_0, 1e-9)


@pytest.mark.parametrize("steps", [50, 500, 1000])
@pytest.mark.parametrize("std", [0.5, 1.7])
@pytest.mark.parametrize("sampler, bound", [("ddpm", 0.03), ("ddim", 0.04), ("dpm", 0.02)])
def test_gaussian_data_come_out_with_their_own_spread(sampler, bound, std, steps):
    schedule = Schedule.ddpm()
    model = gaussian_model(std, schedule)
    x_T = randn(10_000)
    x_T = x_T / x_T.std()
    generator = torch.Generator().manual_seed(2)
    x = sample(model, x_T, schedule, steps, sampler, generator, progress=False)
    if sampler != "dpm":
        bound = bound + 2.5 / steps  # eq. 10 and DDIM are first-order methods
    assert abs(x.std() / std - 1) < bound


@pytest.mark.parametrize("sampler, order, end", [("ddim", 1, 201), ("dpm", 2, 200)])
def test_order_of_the_method(sampler, order, end):
    """Twice the steps, about 2^order times less error when the sampler comes by t = `end`.

    The exact solution of the ODE for N(0, 0.5²) data is x_s = x_t·√(variance_s / variance_t).
    """
    schedule, errors = Schedule.stable_diffusion(1001), []  # 1000 = T−1 divides evenly
    variance = 1 + schedule.alpha_bar * (0.5**2 - 1)
    for steps in (20, 40, 100):
        visited = {}

        def eps_fn(x_t, t):
            visited[t] = x_t.item()
            return gaussian_model(0.5, schedule)(x_t, t)

        sample(eps_fn, torch.ones(1, dtype=torch.float64), schedule, steps, sampler, progress=False)
        errors.append(abs(visited[end] / (variance[end] / variance[max(visited)]).sqrt().item() - 1))
    orders = [math.log(errors[0] / errors[1], 2), math.log(errors[1] / errors[2], 2.5)]
    assert orders == pytest.approx([order, order], abs=0.25)


def test_ddpm_with_all_steps_is_eq10_iterated():
    schedule, x = Schedule.ddpm(40), randn(2, 3)
    expected, generator = x, torch.Generator().manual_seed(5)
    for t in reversed(range(40)):
        noise = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        expected = p_step(expected, t, curved_model(expected, t), noise, schedule)
    generator = torch.Generator().manual_seed(5)
    close(sample(curved_model, x, schedule, 40, "ddpm", generator, progress=False), expected)


@pytest.mark.parametrize("steps", [7, 50])
def test_ddpm_with_fewer_steps_parity_with_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDPMScheduler(
        variance_type="fixed_large", clip_sample=False, timestep_spacing="leading", steps_offset=1
    )
    reference.alphas_cumprod, reference.one = SD.alpha_bar, torch.ones((), dtype=torch.float64)
    reference.set_timesteps(steps)
    assert reference.timesteps.tolist() == ddpm.leading(1000, steps)[::-1]
    x, visited, generator = randn(2, 3), [], torch.Generator().manual_seed(5)

    def eps_fn(x_t, t):
        visited.append(x_t)
        return curved_model(x_t, t)

    sample(eps_fn, x, SD, steps, "ddpm", torch.Generator().manual_seed(5), progress=False)
    for i, t in enumerate(reference.timesteps.tolist()):
        close(visited[i], x, 1e-10)
        x = reference.step(curved_model(x, t), t, x, generator=generator).prev_sample


def test_ddim_is_its_formula_stride_by_stride():
    schedule = Schedule.stable_diffusion(10)
    alpha_bar = schedule.alpha_bar
    told = []

    def eps_fn(x_t, t):
        told.append(t)
        return curved_model(x_t, t)

    expected = randn(2, 3)
    for t, s in ((7, 4), (4, 1), (1, 0)):
        eps_hat = curved_model(expected, t)
        x_0 = (expected - (1 - alpha_bar[t]).sqrt() * eps_hat) / alpha_bar[t].sqrt()
        expected = alpha_bar[s].sqrt() * x_0 + (1 - alpha_bar[s]).sqrt() * eps_hat
    close(ddpm.sample_ddim(eps_fn, randn(2, 3), schedule, 3), expected)
    assert told == [7, 4, 1]


def test_ddim_of_a_model_that_knows_x0_ends_one_step_noisy():
    x_0, eps = randn(2, 3), randn(2, 3, seed=1)
    for steps in (1, 7, 50):
        start = q_sample(x_0, ddpm.leading(1000, steps)[-1], eps, SD)
        close(ddpm.sample_ddim(oracle(x_0), start, SD, steps), q_sample(x_0, 0, eps, SD), 1e-9)


@pytest.mark.parametrize("steps", [1, 7, 50, 999])
def test_ddim_trajectory_parity_with_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    close(reference.alphas_cumprod.double(), SD.alpha_bar, 1e-5)
    reference.alphas_cumprod, reference.final_alpha_cumprod = SD.alpha_bar, SD.alpha_bar[0]  # float64
    reference.set_timesteps(steps)
    x, visited = randn(2, 3), []

    def eps_fn(x_t, t):
        visited.append((t, x_t))
        return curved_model(x_t, t)

    final = sample(eps_fn, x, SD, steps, "ddim", progress=False)
    for (t, x_t), t_reference in zip(visited, reference.timesteps.tolist(), strict=True):
        assert t == t_reference
        close(x_t, x, 1e-10)
        x = reference.step(curved_model(x, t), t, x).prev_sample
    close(final, x, 1e-10)


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 999])
def test_dpm_parity_with_diffusers(steps):
    """DPMSolverMultistepScheduler as it comes (2M, midpoint, linspace, final sigma 0), lifted to float64."""
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    reference.set_timesteps(steps)
    timesteps = reference.timesteps.tolist()
    ratio = (1 - SD.alpha_bar[timesteps]) / SD.alpha_bar[timesteps]
    sigmas = torch.cat([ratio.sqrt(), torch.zeros(1, dtype=torch.float64)])
    close(reference.sigmas.double(), sigmas, 1e-4)
    reference.sigmas = sigmas
    expected, x_0 = randn(2, 3), []
    for i, t in enumerate(timesteps):  # its `step`, less the casts to float32
        reference._step_index = i
        x_0.append(reference.convert_model_output(curved_model(expected, t), sample=expected))
        if 0 < i < steps - 1:
            expected = reference.multistep_dpm_solver_second_order_update(x_0[-2:], sample=expected)
        else:
            expected = reference.dpm_solver_first_order_update(x_0[-1], sample=expected)
    close(sample(curved_model, randn(2, 3), SD, steps, "dpm", progress=False), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equations_answer_in_the_dtype_of_x(dtype):
    x, eps, t = randn(3, 2).to(dtype), randn(3, 2, seed=1).to(dtype), torch.tensor([0, 400, 999])
    for equation in (q_step, q_sample, predict_x0):
        assert equation(x, t, eps, SD).dtype == dtype
    assert p_step(x, t, eps, eps, SD).dtype == dtype


@pytest.mark.parametrize("sampler", list(ddpm.SAMPLERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_is_reproducible_and_keeps_the_dtype(sampler, dtype):
    def run(seed):
        x_T = torch.ones(1, 2, 3, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        return sample(curved_model, x_T, SD, 4, sampler, generator, progress=False)

    assert run(1).dtype == dtype and torch.equal(run(1), run(1))
    assert torch.equal(run(1), run(2)) == (sampler != "ddpm")


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "7"])
def test_wrong_number_of_steps_is_one_clear_line(steps):
    with pytest.raises(ValueError, match=r"^steps must be a whole number from 1 to 1000, not .*$"):
        sample(curved_model, randn(1), SD, steps)


def test_unknown_sampler_is_one_clear_line():
    with pytest.raises(ValueError, match="^unknown sampler 'euler': choose one of ddpm, ddim, dpm$"):
        sample(curved_model, randn(1), SD, 7, "euler")


def test_progress_bar_counts_the_steps(capsys):
    sample(curved_model, randn(1), SD, 7)
    assert "7/7" in capsys.readouterr().err
