"""FID (eq. 4) of 10,000 × 2,048 features: frechet_distance against pytorch-fid, same arrays, one run.

    python tests/benchmark_frechet.py        needs pytorch-fid; prints both numbers, both times and their ratio
"""

import os
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")   # one core each: what else runs on the machine disturbs neither

import torch  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from metrics import Gaussian, frechet_distance  # noqa: E402
from pytorch_fid.fid_score import calculate_frechet_distance  # noqa: E402


def features(seed, n=10_000, d=2_048, factors=512):
    """Not negative, correlated, with a decaying spectrum, like Inception's."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(factors, d, generator=torch.Generator().manual_seed(9)) * torch.arange(1, factors + 1)[:, None] ** -0.7
    return (torch.randn(n, factors, generator=g) @ mix + 0.1 * torch.randn(n, d, generator=g) + 0.05 * seed).relu()


def timed(function, *arrays):
    start = time.perf_counter()
    value = function(*arrays)
    return value, time.perf_counter() - start


if __name__ == "__main__":
    warnings.simplefilter("ignore")   # scipy: sqrtm(disp=…) is deprecated
    p, q = Gaussian(features(0)), Gaussian(features(1))
    arrays = [v.numpy() for v in (p.mu, p.sigma, q.mu, q.sigma)]
    frechet_distance(*arrays)   # the threads of the libraries start
    (ours, seconds), (theirs, their_seconds) = (timed(f, *arrays) for f in (frechet_distance, calculate_frechet_distance))
    print(f"metrics.frechet_distance                {ours:.8f}  {seconds:6.2f} s")
    print(f"pytorch_fid calculate_frechet_distance  {theirs:.8f}  {their_seconds:6.2f} s")
    print(f"relative difference {abs(ours / theirs - 1):.1e}, {their_seconds / seconds:.1f} times faster, {torch.get_num_threads()} thread(s)")
    sys.exit(abs(ours / theirs - 1) > 1e-6 or their_seconds < 10 * seconds)
