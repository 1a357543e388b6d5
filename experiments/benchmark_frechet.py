"""FID (eq. 4) of 10,000 × 2,048 features in three ways: the same numbers, one run.

    python -m experiments.benchmark_frechet        needs pytorch-fid

  ours          metrics.frechet_distance
  textbook      metrics.textbook_frechet_distance, the formula as it is written
  pytorch-fid   calculate_frechet_distance
Exit code 1 unless all three agree and ours is at least ten times faster than pytorch-fid.
"""

import os

# One core for each: what else runs on the machine disturbs none of them. The libraries read this
# when they are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402

import torch  # noqa: E402
from pytorch_fid.fid_score import calculate_frechet_distance  # noqa: E402

from metrics import Gaussian, frechet_distance, textbook_frechet_distance  # noqa: E402

CONTENDERS = {
    "ours": frechet_distance,
    "textbook": textbook_frechet_distance,
    "pytorch-fid": calculate_frechet_distance,
}


def draw_features(seed, n=10_000, d=2_048, factors=512):
    """(n, d) numbers like Inception's: not negative, correlated, with a decaying spectrum.

    All seeds share the directions `mix`, as photos and pictures of photos do.
    """
    size = torch.arange(1, factors + 1) ** -0.7  # of each direction
    mix = torch.randn(factors, d, generator=torch.Generator().manual_seed(9)) * size[:, None]
    generator = torch.Generator().manual_seed(seed)
    correlated = torch.randn(n, factors, generator=generator) @ mix
    own = 0.1 * torch.randn(n, d, generator=generator)
    shift = 0.05 * seed
    return (correlated + own + shift).relu()


def measure(x, y):
    """{contender: (FID, seconds)} of two sets of features (n, d)."""
    p = Gaussian(x)
    q = Gaussian(y)
    arrays = [value.numpy() for value in (p.mu, p.sigma, q.mu, q.sigma)]
    frechet_distance(*arrays)  # the libraries start their threads
    results = {}
    for name, function in CONTENDERS.items():
        start = time.perf_counter()
        value = function(*arrays)
        results[name] = (value, time.perf_counter() - start)
    return results


def report(results):
    """Print all results; True if they are as the docstring of this file promises."""
    ours, our_seconds = results["ours"]
    passed = True
    print(f"{torch.get_num_threads()} thread(s)")
    for name, (value, seconds) in results.items():
        difference = abs(ours / value - 1)
        ratio = seconds / our_seconds
        times = f"{seconds:6.2f} s  {ratio:5.1f} × ours"
        print(f"{name:12} {value:.8f}  off ours {difference:.1e}  {times}")
        passed = passed and difference <= 1e-6
    _, their_seconds = results["pytorch-fid"]
    return passed and their_seconds >= 10 * our_seconds


def main():
    warnings.simplefilter("ignore")  # SciPy: sqrtm(disp=…), which pytorch-fid uses, is deprecated
    results = measure(draw_features(0), draw_features(1))
    sys.exit(0 if report(results) else 1)


if __name__ == "__main__":
    main()
