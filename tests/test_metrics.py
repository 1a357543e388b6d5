"""Metrics: closed forms, invariances, and parity with pytorch-fid, torch-fidelity and torchmetrics."""

import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models.inception import Inception3

import metrics
from conftest import randn
from metrics import (Gaussian, bootstrap_ci, fid, frechet_distance, inception_score, kernel_distance,
                     load_judge, read_folder, textbook_frechet_distance)
from support.inception import InceptionV3
from support.program import run
from toyfaces.judge import FeatureNet


def covariance(d, seed, rank=None):
    A = randn(d, rank or 2 * d, seed=seed)
    return A @ A.T / d


def skewed(n, d, seed):
    """Correlated features that are not negative, like Inception's."""
    return (randn(n, d, seed=seed) @ randn(d, d, seed=99) / d**0.5 + 0.1 * seed).relu()


# --------------------------------------------------------------------------- eq. 4


def test_eq4_equal_covariances_leave_the_squared_distance_of_the_means():
    S, m, k = covariance(7, 1), randn(7, seed=2), randn(7, seed=3)
    assert frechet_distance(m, S, k, S) == pytest.approx(float((m - k).square().sum()), rel=1e-12)
    assert frechet_distance(m, S, m, S) == pytest.approx(0, abs=1e-12)


def test_eq4_commuting_covariances_are_distances_of_standard_deviations():
    Q, m = torch.linalg.qr(randn(6, 6))[0], torch.zeros(6)
    a, b = randn(6, seed=1).abs() + 0.1, randn(6, seed=2).abs() + 0.1
    expected = float((a - b).square().sum())
    assert frechet_distance(m, Q @ (a**2).diag() @ Q.T, m, Q @ (b**2).diag() @ Q.T) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("distance", [textbook_frechet_distance, frechet_distance])
def test_eq4_in_one_dimension_is_a_distance_of_means_and_standard_deviations(distance):
    mu_p, mu_q = np.array([1.0]), np.array([-2.0])
    sigma_p, sigma_q = np.array([[4.0]]), np.array([[25.0]])
    value = distance(mu_p, sigma_p, mu_q, sigma_q)
    assert value == pytest.approx(3**2 + (2 - 5) ** 2, rel=1e-12)


def test_eq4_textbook_form_of_commuting_covariances():
    Q = torch.linalg.qr(randn(6, 6))[0].numpy()
    a, b, mean = np.arange(1.0, 7), np.array([3.0, 1, 4, 1, 5, 9]), np.arange(6.0)
    value = textbook_frechet_distance(mean, Q @ np.diag(a**2) @ Q.T, 0 * mean, Q @ np.diag(b**2) @ Q.T)
    assert value == pytest.approx((mean**2).sum() + ((a - b) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("d", [2, 24])
def test_eq4_is_the_textbook_formula(d):
    p, q = Gaussian(skewed(300, d, 1)), Gaussian(skewed(200, d, 2))
    arrays = [v.numpy() for v in (p.mu, p.sigma, q.mu, q.sigma)]
    expected = textbook_frechet_distance(*arrays)
    assert expected > 0.01
    assert frechet_distance(*arrays) == pytest.approx(expected, rel=1e-9)
    assert fid(skewed(300, d, 1), skewed(200, d, 2)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rank_p, rank_q", [(1, 1), (1, None), (None, 1)])
def test_eq4_rank_one_covariances_have_a_closed_form(rank_p, rank_q):
    # Tr((aaᵀ Σ)^½) = √(aᵀΣa), for Σ = bbᵀ too
    A, B = covariance(50, 1, rank_p), covariance(50, 2, rank_q)
    trace = (A @ B).trace() ** 0.5
    z = torch.zeros(50)
    expected = float(A.trace() + B.trace() - 2 * trace)
    assert frechet_distance(z, A, z, B) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [3, 19, 20, 60])
def test_eq4_is_zero_between_equal_singular_covariances(rank):
    S, m = covariance(20, 5, rank), randn(20)
    assert frechet_distance(m, S, m, S) == pytest.approx(0, abs=1e-11)
    assert frechet_distance(m, S, m, 0 * S) == pytest.approx(float(S.trace()), rel=1e-12)


def test_eq4_is_symmetric_and_blind_to_rotation():
    A, B, m, k = covariance(9, 1), covariance(9, 2), randn(9, seed=3), randn(9, seed=4)
    R = torch.linalg.qr(randn(9, 9, seed=5))[0]
    value = frechet_distance(m, A, k, B)
    assert frechet_distance(k, B, m, A) == pytest.approx(value, rel=1e-12)
    assert frechet_distance(R @ m, R @ A @ R.T, R @ k, R @ B @ R.T) == pytest.approx(value, rel=1e-11)


@pytest.mark.parametrize("n, m", [(200, 100), (30, 100), (12, 7), (2, 2)])
def test_eq4_from_few_features_equals_eq4_from_covariances(n, m, monkeypatch):
    x, y = skewed(n, 24, 1), skewed(m, 24, 2)
    p, q = (Gaussian(v) for v in (x, y))
    assert fid(x, y) == pytest.approx(frechet_distance(p.mu, p.sigma, q.mu, q.sigma), rel=1e-10)
    assert fid(x, y) == pytest.approx(frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)), rel=1e-10)
    assert fid(x, x.flip(0)) == pytest.approx(0, abs=1e-10)
    monkeypatch.setattr(metrics, "frechet_distance", lambda *a: "covariances")
    assert (fid(x, y) == "covariances") == (min(n, m) > 24)   # few pictures never make a (d, d) matrix


@pytest.mark.parametrize("d, n", [(40, 300), (40, 30)])
def test_eq4_agrees_with_the_peers(d, n):
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    peer = pytest.importorskip("torch_fidelity.metric_fid")
    x, y = skewed(n, d, 1), skewed(n, d, 2)
    stats = [v.numpy() for s in (x, y) for v in (s.mean(0), s.T.cov())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # scipy drops sqrtm(disp=…) some day
        expected = fid_score.calculate_frechet_distance(*stats)
    a, b = ({"mu": stats[i], "sigma": stats[i + 1]} for i in (0, 2))
    rel = 1e-9 if n > d else 1e-5   # the peers take √ of rounding errors of singular covariances
    assert fid(x, y) == pytest.approx(expected, rel=rel)
    assert fid(x, y) == pytest.approx(peer.fid_statistics_to_metric(a, b, False)[peer.KEY_METRIC_FID], rel=rel)


@pytest.mark.slow   # the import of torchmetrics takes 5 s
def test_eq4_agrees_with_torchmetrics():
    peer = pytest.importorskip("torchmetrics.image.fid")
    x, y = skewed(300, 40, 1), skewed(300, 40, 2)
    assert fid(x, y) == pytest.approx(float(peer._compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())), rel=1e-9)


def test_eq4_refuses_what_has_no_answer():
    S, m = covariance(3, 1), torch.zeros(3)
    for bad in ((m, S, m, S[:2]), (m[:2], S, m, S), (m, S, torch.zeros(4), S), (m[0], S, m[0], S)):
        with pytest.raises(ValueError, match="do not fit together"):
            frechet_distance(*bad)
    for bad in ((m * torch.nan, S, m, S), (m, S, m, S / 0)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            frechet_distance(*bad)
    for n, k in ((1, 5), (5, 1), (0, 5)):
        with pytest.raises(ValueError, match="at least two"):
            fid(randn(n, 3), randn(k, 3))


# --------------------------------------------------------------------------- statistics in batches


@pytest.mark.parametrize("cuts", [[50], [1] * 50, [0, 7, 0, 43], [49, 1]])
def test_gaussian_is_the_same_in_any_split_and_far_from_zero(cuts):
    x = randn(50, 6) + 1e6
    g = Gaussian()
    for part in x.split(cuts):
        g.update(part)
    assert g.n == 50
    np.testing.assert_allclose(g.mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(g.sigma, np.cov((x - 1e6).T), rtol=1e-7, atol=1e-9)


def test_gaussian_merged_from_two_halves_equals_the_whole():
    x = randn(31, 5).float()
    whole, merged = Gaussian(x), Gaussian(x[:9]).update(Gaussian(x[9:]))
    assert whole.sigma.dtype == torch.float64
    torch.testing.assert_close(merged.mu, whole.mu, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(merged.sigma, whole.sigma, rtol=1e-12, atol=1e-14)


def test_gaussian_of_one_picture_has_no_covariance():
    for g in (Gaussian(), Gaussian(randn(1, 4))):
        with pytest.raises(ValueError, match="two pictures"):
            g.sigma


# --------------------------------------------------------------------------- eq. 5


@pytest.mark.parametrize("marginal", ["empirical", "uniform"])
def test_eq5_uniform_posteriors_give_1_and_balanced_certain_ones_give_K(marginal):
    assert inception_score(torch.full((12, 8), 1 / 8), marginal) == pytest.approx(1, rel=1e-12)
    assert inception_score(torch.eye(8).repeat(3, 1), marginal) == pytest.approx(8, rel=1e-12)


def test_eq5_marginals_differ_for_unbalanced_classes():
    certain = torch.eye(4)[[0, 0, 0, 1]]
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert inception_score(certain, "uniform") == pytest.approx(4, rel=1e-12)
    assert inception_score(certain, "empirical") == pytest.approx(np.exp(entropy), rel=1e-12)


def test_eq5_uniform_marginal_is_K_over_the_exponential_of_the_mean_entropy():
    p = (3 * randn(40, 9)).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    assert inception_score(p, "uniform") == pytest.approx(float(9 * torch.exp(-entropy)), rel=1e-12)


def test_eq5_does_not_depend_on_the_order_but_splits_depend_on_the_seed():
    p = (3 * randn(40, 9)).softmax(1)
    assert inception_score(p.flip(0)) == pytest.approx(inception_score(p, seed=7), rel=1e-12)
    assert inception_score(p, splits=4) == inception_score(p, splits=4)
    assert abs(inception_score(p, splits=4, seed=1) - inception_score(p, splits=4, seed=2)) > 1e-4


def test_eq5_every_split_has_its_own_marginal():
    certain = torch.eye(8)
    assert inception_score(certain, splits=8) == pytest.approx(1, rel=1e-12)  # one picture a split
    assert inception_score(certain, "uniform", splits=8) == pytest.approx(8, rel=1e-12)


def test_eq5_agrees_with_torch_fidelity():
    peer = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * randn(103, 20)
    for splits in (1, 10):
        theirs = peer.isc_features_to_metric(logits, splits, True, 2020)[peer.KEY_METRIC_ISC_MEAN]
        assert inception_score(logits.softmax(1), splits=splits) == pytest.approx(theirs, rel=1e-12)


def test_eq5_refuses_what_is_no_distribution():
    p = torch.full((4, 5), 0.2)
    for probs, options in ((2 * p, {}), (p * torch.nan, {}), (p + torch.tensor([0.4, -0.4, 0, 0, 0]), {}), (p[0], {}), (p[:0], {}),
                           (p, {"splits": 5}), (p, {"splits": 0}), (p, {"marginal": "mean"})):
        with pytest.raises(ValueError):
            inception_score(probs, **options)


# --------------------------------------------------------------------------- KID and intervals


def test_kid_is_the_unbiased_sum_over_pairs():
    x, y = randn(7, 5, seed=1), randn(4, 5, seed=2)

    def k(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    def pairs(a):
        return np.mean([k(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j])

    expected = pairs(x) + pairs(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_kid_is_unbiased():
    x = randn(4000, 3)
    values = [kernel_distance(a, b) for a, b in zip(x.split(8), x.flip(0).split(8))][:200]
    assert abs(np.mean(values)) < 4 * np.std(values) / len(values) ** 0.5 and min(values) < 0


def test_kid_agrees_with_torch_fidelity():
    peer = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = skewed(1100, 16, 1), skewed(1100, 16, 2)   # more rows than one slice
    options = {"kid_subsets": 1, "kid_subset_size": 1100, "verbose": False}
    theirs = peer.kid_features_to_metric(x, y, **options)[peer.KEY_METRIC_KID_MEAN]
    assert kernel_distance(x, y) == pytest.approx(theirs, rel=1e-10)
    with pytest.raises(ValueError, match="at least two"):
        kernel_distance(x, y[:1])


def test_bootstrap_interval_of_a_mean_is_the_textbook_one():
    values = randn(400).numpy()
    low, high = bootstrap_ci(values, np.mean, n=2000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert bootstrap_ci(values, np.mean, n=50, seed=1) == bootstrap_ci(values, np.mean, n=50, seed=1)
    assert bootstrap_ci(values, np.mean, n=50, seed=1) != bootstrap_ci(values, np.mean, n=50, seed=2)


def test_bootstrap_of_people_and_runs_has_the_variance_of_both():
    rng = np.random.default_rng(0)
    of_people = rng.normal(0, 1, 100)
    of_runs = rng.normal(0, 1, 50)

    def mean(people, runs):
        return np.mean(people) + np.mean([of_runs[run] for run in runs])

    low, high = bootstrap_ci(of_people, mean, n=4000, runs=range(50))
    width = 2 * 1.96 * (of_people.var() / 100 + of_runs.var() / 50) ** 0.5
    assert (high + low) / 2 == pytest.approx(of_people.mean() + of_runs.mean(), abs=0.02)
    assert high - low == pytest.approx(width, rel=0.06)
    alone = bootstrap_ci(of_people, lambda people, runs: np.mean(people), n=500, runs=range(3))
    assert alone == bootstrap_ci(of_people, np.mean, n=500)  # the same people are drawn


def test_bootstrap_draws_people_not_pictures():
    people = [v.repeat(100) for v in randn(25)]   # a hundred equal pictures a person carry no more than one
    low, high = bootstrap_ci(people, lambda drawn: float(torch.cat(drawn).mean()))
    assert high - low == pytest.approx(2 * 1.96 * float(torch.stack([p[0] for p in people]).std()) / 5, rel=0.2)


def test_bootstrap_interval_of_a_fid_is_around_the_fid():
    real, people, seen = skewed(300, 30, 1), list(skewed(150, 30, 2).split(3)), []

    def statistic(drawn):
        seen.append(fid(torch.cat(drawn), real))
        return seen[-1]

    low, high = bootstrap_ci(people, statistic, n=200)
    value = fid(torch.cat(people), real)
    assert low < value < high
    assert min(seen[:200]) > value   # drawn anew, every single FID lies above it


# --------------------------------------------------------------------------- Inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file like the official one, with random weights that keep the signal's size in every layer."""
    g = torch.Generator().manual_seed(0)
    state = Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    for name, v in state.items():
        if name.endswith("conv.weight"):
            v.normal_(0, (2 / v[0].numel()) ** 0.5, generator=g)
        elif name.endswith("fc.weight"):
            v.normal_(0, 0.1, generator=g)
        elif v.is_floating_point():   # bn and fc.bias
            v.uniform_(0.5, 1.5, generator=g) if name.endswith("weight") or "var" in name else v.normal_(0, 0.2, generator=g)
    path = tmp_path_factory.mktemp("hub") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of pictures: larger and smaller than 299, not square, greyscale, JPEG."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for folder, kinds in (("real", ("png RGB 420 310", "png L 60 90")), ("generated", ("png RGB 64 64", "jpg RGB 90 350"))):
        (root / folder).mkdir()
        for i, kind in enumerate(kinds):
            suffix, mode, w, h = kind.split()
            w, h = int(w), int(h)
            x = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((w, h)), int)
            x = (x + rng.integers(-20, 20, x.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(x).convert(mode).save(root / folder / f"{i}.{suffix}")
    return root / "real", root / "generated"


def peer_net(weights, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *a, **k: torch.load(weights, weights_only=True))
    return peer.InceptionV3()


def test_inception_agrees_with_pytorch_fid_in_float64(weights, monkeypatch):
    images = torch.rand(1, 3, 100, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.inference_mode():
        theirs = peer_net(weights, monkeypatch).double().eval()(images)[0].flatten(1)
        ours = InceptionV3(weights).double()(2 * images - 1)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_inception_agrees_with_torch_fidelity_in_float64(weights):
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    images = torch.randint(256, (1, 3, 100, 80), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    net = peer.FeatureExtractorInceptionV3("n", ["2048", "logits_unbiased"], str(weights), "float64")
    with torch.inference_mode():
        features, logits = net(images)
        ours, probs = InceptionV3(weights, "torch-fidelity").double().read(images.double() / 127.5 - 1)
    # the peer's own grid is float32
    torch.testing.assert_close(ours.float(), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probs, logits.double().softmax(1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("size", [(32, 32), (299, 299), (640, 301), (1, 2)])
def test_tensorflow_resize_agrees_with_torch_fidelity(size):
    peer = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = randn(2, 3, *size).float()
    theirs = peer.interpolate_bilinear_2d_like_tensorflow1x(images, (299, 299), align_corners=False)
    net = InceptionV3.__new__(InceptionV3)
    torch.nn.Module.__init__(net)
    net.like_tensorflow = True
    torch.testing.assert_close(net.resize(images), theirs, rtol=1e-5, atol=1e-5)


def test_pictures_to_number_as_torch_fidelity(weights, folders):
    peer = pytest.importorskip("torch_fidelity")
    theirs = peer.calculate_metrics(
        input1=str(folders[1]), input2=str(folders[0]), cuda=False, batch_size=1, save_cpu_ram=True, verbose=False,
        cache=False, fid=True, isc=True, isc_splits=1, kid=True, kid_subset_size=2, kid_subsets=1,
        feature_extractor_weights_path=str(weights))
    judge = InceptionV3(weights, "torch-fidelity")
    (y, probs), (x, _) = (read_folder(f, judge, batch=2) for f in folders[::-1])
    assert fid(x, y) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert inception_score(probs) == pytest.approx(theirs["inception_score_mean"], rel=1e-4)
    assert kernel_distance(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


def test_pictures_to_statistics_as_pytorch_fid(weights, folders, monkeypatch):
    net, judge = peer_net(weights, monkeypatch), InceptionV3(weights)
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    for folder in folders:
        ours = Gaussian(read_folder(folder, judge)[0])
        mu, sigma = fid_score.calculate_activation_statistics(sorted(folder.iterdir()), net, batch_size=1, num_workers=0)
        np.testing.assert_allclose(ours.mu, mu, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(ours.sigma, sigma, rtol=1e-4, atol=1e-4 * sigma.max())


@pytest.mark.slow   # its sqrtm of (2048, 2048) takes 15 s
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pictures_to_number_as_pytorch_fid(weights, tmp_path, monkeypatch):
    peer_net(weights, monkeypatch)
    rng = np.random.default_rng(0)
    for i in range(8):   # its command wants one size a batch
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        x = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(x).resize((90 + 10 * (i % 2), 100)).save(tmp_path / str(i % 2) / f"{i}.png")
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    theirs = fid_score.calculate_fid_given_paths([str(tmp_path / "0"), str(tmp_path / "1")], 2, "cpu", 2048, 0)
    x, y = (read_folder(tmp_path / name, InceptionV3(weights))[0] for name in "01")
    assert fid(x, y) == pytest.approx(theirs, rel=1e-4)


def test_the_two_resizes_are_not_the_same(weights):
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    a, b = (InceptionV3(weights, r).resize(images) for r in InceptionV3.RESIZE)
    assert (a - b).abs().max() > 0.1
    with pytest.raises(ValueError, match="antialias"):
        InceptionV3(weights, "antialias")


def test_inception_refuses_other_files(tmp_path, weights):
    state = torch.load(weights, weights_only=True)
    broken = {k: v for k, v in state.items() if k != "fc.weight"}
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    for bad, word in ((broken, "fc.weight"), (tmp_path / "text.pth", ""), (tmp_path / "empty.pth", ""),
                      (tmp_path / "none.pth", "none.pth")):
        with pytest.raises(ValueError, match=f"official FID.*{word}") as e:
            InceptionV3(bad)
        assert "\n" not in str(e.value)


# --------------------------------------------------------------------------- folders and the command line


def no_network(*_, **__):
    raise OSError("no network")


@pytest.fixture
def toy_judge(monkeypatch):
    """FeatureNet as it is born, and a torch.hub without a cache or a network."""
    torch.manual_seed(0)
    net = FeatureNet().eval()
    monkeypatch.setattr(FeatureNet, "load", lambda folder: net)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "nowhere")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    return net


@pytest.fixture
def command(monkeypatch, capsys):
    """python metrics.py … -> exit code, what it printed, last line of its errors."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, args)])
        try:
            code = run(metrics.main) or 0
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, (err.strip().splitlines() or [""])[-1]
    return call


def test_command_line_names_the_judge_and_prints_every_number(toy_judge, folders, command):
    code, out, _ = command(*folders, "--batch", 2)
    assert code == 0
    (x, _), (y, probs) = (read_folder(f, toy_judge) for f in folders)
    assert "FeatureNet" in out and "not comparable" in out and "2 real, 2 generated" in out
    table = {row.split("|")[1].strip(): float(row.split("|")[2]) for row in out.splitlines() if row[:3] in ("| F", "| K", "| I")}
    assert table == pytest.approx({"FID": fid(x, y), "KID": kernel_distance(x, y),
                                   "IS (uniform p(y))": inception_score(probs, "uniform"),
                                   "IS (empirical p(y))": inception_score(probs)}, rel=1e-4)
    assert "modes" in out and "far too high" in out


def test_judge_is_the_given_file_then_the_hub_then_the_toy_world(weights, toy_judge, tmp_path, monkeypatch):
    assert load_judge() is toy_judge
    assert "torch-fidelity" in load_judge(weights, "torch-fidelity").name
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / weights.name).symlink_to(weights)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert isinstance(load_judge(), InceptionV3)
    assert not isinstance(load_judge("toy"), InceptionV3)
    with pytest.raises(ValueError, match="other.pth"):
        load_judge(tmp_path / "other.pth")


def test_folder_is_read_in_order_whatever_the_batch(toy_judge, folders, tmp_path):
    by_one, by_two = (read_folder(folders[0], toy_judge, b)[0] for b in (1, 2))
    torch.testing.assert_close(by_one, by_two, rtol=1e-4, atol=1e-5)
    (tmp_path / "a").mkdir()
    for file in folders[0].iterdir():   # people's folders, as in LFW; other files are not pictures
        (tmp_path / "a" / file.name).symlink_to(file)
    (tmp_path / "a" / "notes.txt").write_text("hello")
    torch.testing.assert_close(read_folder(tmp_path, toy_judge, 4)[0], by_two)


def test_folder_is_read_in_the_order_of_the_names(toy_judge, tmp_path):
    names = [f"{(7 * i) % 20:02d}.png" for i in range(20)]
    for name in names:
        Image.new("RGB", (64, 64), (12 * int(name[:2]), 0, 99)).save(tmp_path / name)
    colours = torch.tensor([[12 * i, 0, 99] for i in range(20)]) / 127.5 - 1
    expected, _ = toy_judge.read(colours[:, :, None, None].expand(-1, -1, 64, 64))
    torch.testing.assert_close(read_folder(tmp_path, toy_judge)[0], expected.detach(), rtol=1e-4, atol=1e-4)


def test_pictures_of_other_modes_are_converted_and_named(toy_judge, tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 256, (70, 70, 3), dtype=np.uint8)
    Image.fromarray(x).save(tmp_path / "a.png")
    Image.fromarray(x).convert("RGBA").save(tmp_path / "b.png")
    Image.fromarray(x).convert("L").save(tmp_path / "c.png")
    features, _ = read_folder(tmp_path, toy_judge)
    torch.testing.assert_close(features[0], features[1])
    assert "RGB, RGBA, L" in capsys.readouterr().out


def test_bad_folders_are_one_clear_line(toy_judge, folders, tmp_path, command):
    (tmp_path / "empty").mkdir()
    for name, content in (("zero", b""), ("text", b"hello"), ("cut", (folders[0] / "0.png").read_bytes()[:900])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(content)
        code, _, line = command(folders[0], tmp_path / name)
        assert code == 2 and "x.png: not a readable picture" in line
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.png").symlink_to(folders[0] / "0.png")
    for folder, message in ((tmp_path / "empty", "no pictures"), (tmp_path / "none", "no such folder"),
                            (tmp_path / "one", "at least two pictures")):
        code, _, line = command(folder, folders[0])
        assert code == 2 and message in line


def test_broken_judge_is_named_instead_of_nan(toy_judge, folders, command):
    toy_judge.head.bias.data[:] = torch.nan
    code, _, line = command(*folders)
    assert code == 2 and "not finite" in line


def test_copy_is_the_nearest_reference_minus_the_held_out_photos_of_other_scenes():
    a, b = torch.eye(3)[:2]
    references = torch.stack([a, *[b] * 8])[None]
    held = torch.stack([2 * b, a + b, a])[None]   # a picture of scene k is not compared with held-out photo k
    clip_i, copied = metrics.compare_embeddings(torch.stack([a, a, b])[None], references, held, torch.tensor([0, 2, 1]))
    half = 0.5**0.5
    torch.testing.assert_close(clip_i, torch.tensor([(half + 1) / 2, (0 + half) / 2, (1 + 0) / 2]))
    torch.testing.assert_close(copied, 1 - clip_i)


def test_clip_cosines_of_folders_are_those_of_clip_itself(toy_judge, folders, tiny_folder, command, tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")
    ends = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config={**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 48},
                                vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (clip, tokenizer, processor):
        part.save_pretrained(tmp_path)

    real, made = folders
    pictures = [Image.open(f).convert("RGB") for folder in (made, real) for f in sorted(folder.iterdir())]
    with torch.inference_mode():
        seen = clip(**tokenizer(["a red hat"], return_tensors="pt"), **processor(pictures, return_tensors="pt"))
    inner = seen.image_embeds[:2] @ seen.image_embeds[2:].T
    code, out, _ = command(*folders, "--clip", tmp_path, "--prompt", "a red hat", "--references", made, "--device", "cpu")
    table = {row.split("|")[1].strip(): float(row.split("|")[2]) for row in out.splitlines() if row[:3] in ("| C", "| c")}
    assert code == 0 and table == pytest.approx({
        "CLIP-I": inner.mean().item(), "copy": 1 - inner.mean().item(),
        "CLIP-T": seen.logits_per_image[:2].mean().item() / clip.logit_scale.exp().item()}, abs=1e-5)
    assert command(*folders, "--prompt", "a hat")[0] == 2 and "nowhere" in command(*folders, "--clip", tmp_path / "nowhere")[2]
    (tmp_path / "model.safetensors").rename(tmp_path / "whole")
    save_file({"logit_scale": torch.ones(())}, tmp_path / "model.safetensors", {"format": "pt"})
    assert "not a whole CLIP" in command(*folders, "--clip", tmp_path)[2]
