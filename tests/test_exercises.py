"""The course's exercises: the grading is real, and nobody's work is lost.

WRONG is the proof: for every exercise at least three plausible wrong answers, each a text in our function
and what stands there instead. All must be graded wrong, the empty function "not begun", ours right.
"""

import ast
import os
import sys
import time
from dataclasses import replace

import pytest

from course import exercises
from course.grading import Verdict, grade, run_claims
from course.listing import EXERCISES
from course.stubs import ROOT, empty_functions, find_functions, make_handout, read_ours

WRONG = {
    1: [  # q_sample
        ("no root over ᾱ", "schedule.alpha_bar.sqrt(), t", "schedule.alpha_bar, t"),
        ("no root over 1−ᾱ", "(1 - schedule.alpha_bar).sqrt()", "(1 - schedule.alpha_bar)"),
        ("α for ᾱ", "schedule.alpha_bar.sqrt()", "schedule.alpha.sqrt()"),
        ("a minus", "signal * x_0 + noise * eps", "signal * x_0 - noise * eps"),
        ("the factors exchanged", "signal * x_0 + noise * eps", "noise * x_0 + signal * eps"),
        ("the paper's t", "schedule.alpha_bar.sqrt(), t,", "schedule.alpha_bar.sqrt(), t - 1,"),
        ("eq. 6", "schedule.alpha_bar", "(1 - schedule.beta)"),
    ],
    2: [  # p_step
        ("noise at the last step", "    std[0] = 0\n", ""),
        ("no noise at t = 1 either", "std[0] = 0", "std[:2] = 0"),
        ("no root over β", "std = schedule.beta.sqrt()", "std = schedule.beta.clone()"),
        ("no noise at all", "mean + lookup(std, t, x_t) * noise", "mean"),
        ("no root over 1−ᾱ", "(1 - schedule.alpha_bar).sqrt()", "(1 - schedule.alpha_bar)"),
        ("α for ᾱ", "(1 - schedule.alpha_bar)", "(1 - schedule.alpha)"),
        ("no root over α", "schedule.alpha.sqrt()", "schedule.alpha"),
        ("times √α", "/ sqrt_alpha", "* sqrt_alpha"),
        ("a plus", "x_t - eps_coef", "x_t + eps_coef"),
        ("the brackets", "(x_t - eps_coef * eps_hat) / sqrt_alpha", "x_t - eps_coef * eps_hat / sqrt_alpha"),
    ],
    3: [  # sample_ddim
        ("upwards", "reversed(range(steps))", "range(steps)"),
        ("ends at ᾱ = 1", "x = q_sample(x_0, s, eps_hat, schedule)",
         "x = q_sample(x_0, s, eps_hat, schedule) if i > 0 else x_0"),
        ("the last step left out", "range(steps)", "range(1, steps)"),
        ("noised to t again", "q_sample(x_0, s,", "q_sample(x_0, t,"),
        ("one step of the long schedule", "timesteps[i - 1] if i > 0 else 0", "max(t - 1, 0)"),
        ("the model is told i", "eps_fn(x, t)", "eps_fn(x, i)"),
        ("fresh noise", "q_sample(x_0, s, eps_hat,", "q_sample(x_0, s, torch.randn_like(x),"),
        ("x̂₀ from s", "predict_x0(x, t,", "predict_x0(x, s,"),
    ],
    4: [  # guide
        ("w and 1−w exchanged", "w * eps_cond + (1 - w) * eps_uncond", "(1 - w) * eps_cond + w * eps_uncond"),
        ("a minus", "+ (1 - w)", "- (1 - w)"),
        ("(1+w)ε − wε, another paper's w", "w * eps_cond + (1 - w)", "(1 + w) * eps_cond - w"),
        ("no unconditional part", "+ (1 - w) * eps_uncond", ""),
        ("from the conditional one", "w * eps_cond + (1 - w) * eps_uncond",
         "eps_cond + w * (eps_cond - eps_uncond)"),
    ],
    5: [  # attention
        ("no √d", "(Q / d**0.5)", "Q"),
        ("d for √d", "d**0.5", "d"),
        ("√d after the softmax", "(Q / d**0.5) @ K", "Q @ K"),
        ("softmax over the wrong axis", "dim=-1)", "dim=-2)"),
        ("softmax over the heads", "dim=-1)", "dim=1)"),
        ("no softmax", "torch.softmax(scores, dim=-1)", "scores / scores.sum(-1, keepdim=True)"),
        ("the number of tokens for d", "Q.shape[-1]", "K.shape[-2]"),
        ("times √d", "Q / d**0.5", "Q * d**0.5"),
    ],
    6: [  # CrossAttention.forward
        ("λ after to_out", "Z = Z + lam * scaled_dot_product(Q, K_ip, V_ip)\n"
         "        return self.to_out(self.merge_heads(Z))",
         "Z_ip = self.merge_heads(scaled_dot_product(Q, K_ip, V_ip))\n"
         "            return self.to_out(self.merge_heads(Z)) + lam * self.to_out(Z_ip)\n"
         "        return self.to_out(self.merge_heads(Z))"),
        ("no λ", "Z + lam * scaled", "Z + scaled"),
        ("λ in the softmax", "lam * scaled_dot_product(Q, K_ip", "scaled_dot_product(lam * Q, K_ip"),
        ("1−λ for the text", "Z = Z + lam *", "Z = (1 - lam) * Z + lam *"),
        ("the text's K", "K_ip = self.split_heads(to_k_ip(c_i))", "K_ip = self.split_heads(self.to_k(c_i))"),
        ("K' and V' exchanged", "to_k_ip, to_v_ip = self", "to_v_ip, to_k_ip = self"),
        ("one softmax over all tokens", "Z = Z + lam * scaled_dot_product(Q, K_ip, V_ip)",
         "Z = scaled_dot_product(Q, torch.cat([K, lam * K_ip], 2), torch.cat([V, lam * V_ip], 2))"),
        ("no to_out", "self.to_out(self.merge_heads(Z))", "self.merge_heads(Z)"),
        ("no adapter is an error", " and self.image_kv is not None", ""),
        ("no text is no attention", "c_t = x if c_t is None else c_t", "c_t = 0 * x if c_t is None else c_t"),
    ],
    7: [  # MaxPooling.forward, AveragePooling.forward
        ("mean for max", "embeds.amax(dim=1, keepdim=True)", "embeds.mean(dim=1, keepdim=True)"),
        ("sum for mean", "embeds.mean(", "embeds.sum("),
        ("over the width", "amax(dim=1", "amax(dim=-1"),
        ("over the people", "mean(dim=1", "mean(dim=0"),
        ("M is lost", "amax(dim=1, keepdim=True)", "amax(dim=1)"),
        ("the largest absolute value", "embeds.amax(", "embeds.abs().amax("),
        ("the longest embedding", "embeds.amax(dim=1, keepdim=True)",
         "embeds[torch.arange(len(embeds)), embeds.norm(dim=2).argmax(1)][:, None]"),
    ],
    8: [  # SelfAttention.forward
        ("no W_out", "self.to_out(Z)", "Z"),
        ("a residual", "self.to_out(Z)", "embeds + self.to_out(Z)"),
        ("Q and K exchanged", "attention(Q, K, V)", "attention(K, Q, V)"),
        ("V is not projected", "attention(Q, K, V)", "attention(Q, K, embeds)"),
        ("one output", "self.to_out(Z)", "self.to_out(Z).mean(1, keepdim=True)"),
        ("no √d", "attention(Q, K, V)", "torch.softmax(Q @ K.mT, dim=-1) @ V"),
        ("softmax over the wrong axis", "attention(Q, K, V)",
         "torch.softmax(Q @ K.mT / Q.shape[-1] ** 0.5, dim=1) @ V"),
    ],
    9: [  # leave_one_out
        ("target among its references", "others = shots[1:]", "others = shots"),
        ("the first photo is always the target", "groups[k][order[:n]]", "groups[k][:n]"),
        ("always the first n", "groups[k][order[:n]]", "groups[k][:n][order[order < n][:n]]"),
        ("everything is drawn with replacement",
         "choose_references(len(others), n - 1, generator=generator)",
         "torch.randint(len(others), (n - 1,), generator=generator)"),
        ("repeated before the target is left out", "    others = shots[1:]",
         "    shots = shots[choose_references(len(shots), n, generator=generator)]\n"
         "        others = shots[1:]"),
        ("positions for photos", "chosen = others[chosen]", "chosen = chosen.clone()"),
        ("of anybody", "others = shots[1:]", "others = torch.cat(groups)[1:]"),
    ],
    10: [  # noise_error, adapter_loss
        ("the clean latent", "unet(z_t, t,", "unet(z_0, t,"),
        ("compared with z_0", "(eps - eps_hat)", "(z_0 - eps_hat)"),
        ("absolute values", "(eps - eps_hat).square()", "(eps - eps_hat).abs()"),
        ("no image tokens", "unet(z_t, t, c_t, c_i)", "unet(z_t, t, c_t, None)"),
        ("the conditions exchanged", "c_t, c_i)\n    return (", "c_i, c_t)\n    return ("),
        ("a sum", ".mean()", ".sum()"),
        ("a norm", ".mean()", ".mean().sqrt()"),
        ("a sum over a picture", ".mean()", ".sum() / len(z_0)"),
    ],
    11: [  # drop_conditions
        ("independent of each other", "drop_text = (u < p) | ((u >= 2 * p) & (u < 3 * p))",
         "drop_text = torch.rand(len(c_t), generator=generator) < 2 * p"),
        ("never both", "(u < p) | ((u", "((u"),
        ("always both", "drop_text = (u < p) | ((u >= 2 * p) & (u < 3 * p))", "drop_text = u < 2 * p"),
        ("2p", "u < 2 * p\n", "u < 3 * p\n"),
        ("zeros for the empty prompt", "null_c_t, c_t)", "0 * null_c_t, c_t)"),
        ("kept for dropped", "null_c_t, c_t)", "c_t, null_c_t)"),
        ("another draw each time", "torch.rand(len(c_t), generator=generator, device=device)",
         "torch.rand(len(c_t), device=device)"),
        ("single references", "drop_embeds(embeds, drop_image)",
         "embeds * (torch.rand(embeds.shape[:2], generator=generator) > 2 * p)[..., None]"),
    ],
    12: [  # x0_loss
        ("no w_t", "weight * error.square()", "error.square()"),
        ("w_t squared", "weight * error.square()", "(weight * error).square()"),
        ("the inverse ratio", "rsqrt()", "sqrt()"),
        ("no root", "snr(schedule).rsqrt()", "(1 / snr(schedule))"),
        ("no factor", "lookup(snr(schedule).rsqrt(), t, eps) * (eps", "(eps"),
        ("a sum", ".mean()", ".sum()"),
        ("a sum of ε", "(eps - eps_hat)", "(eps + eps_hat)"),
    ],
    13: [  # prior_preservation_loss
        ("λ at the person", "loss + prior_weight * prior", "prior_weight * loss + prior"),
        ("no λ", "loss + prior_weight * prior", "loss + prior"),
        ("one mean over both", "loss + prior_weight * prior",
         "(n * loss + len(z_pr) * prior_weight * prior) / (n + len(z_pr))"),
        ("the mean of nothing", "    if len(z_pr) == 0:\n        return loss\n", ""),
        ("prompts exchanged", "[c_person, c_class]", "[c_pr.expand(n, -1, -1), c.expand(len(z_pr), -1, -1)]"),
        ("the person's prompt for all", "[c_person, c_class]", "[c.expand(len(z), -1, -1)]"),
        ("latents without noise", "unet(q_sample(z, t, eps, schedule), t,", "unet(z, t,"),
        ("not weighted", "w_t = snr(schedule)", "w_t = torch.ones(1000)"),
    ],
    14: [  # textbook_frechet_distance, frechet_distance, Gaussian.sigma
        ("population covariance", "self.scatter / (self.n - 1)", "self.scatter / self.n"),
        ("no root", "root = sqrtm(sigma_p @ sigma_q).real", "root = sigma_p @ sigma_q"),
        ("roots of the numbers", "sqrtm(sigma_p @ sigma_q).real", "np.sqrt(np.abs(sigma_p @ sigma_q))"),
        ("one root for two", "sqrtm(sigma_p @ sigma_q).real", "sqrtm(sigma_p).real"),
        ("no 2, textbook", "- 2 * root", "- root"),
        ("no 2", "traces - 2 * trace", "traces - trace"),
        ("a plus", "traces - 2", "traces + 2"),
        ("distance not squared", "difference @ difference", "np.linalg.norm(difference)"),
        ("no means", "means + traces", "traces"),
        ("all means squared apart", "(mu_p - mu_q) ** 2", "mu_p**2 - mu_q**2"),
        ("one trace twice", "np.trace(sigma_p) + np.trace(sigma_q)", "2 * np.trace(sigma_p)"),
        ("sums for traces", "np.trace(sigma_p + sigma_q - 2 * root)", "np.sum(sigma_p + sigma_q - 2 * root)"),
    ],
    15: [  # inception_score
        ("marginals exchanged", 'marginal == "empirical"', 'marginal == "uniform"'),
        ("no exp", "divergence.mean().exp()", "divergence.mean()"),
        ("exp before the mean", "divergence.mean().exp()", "divergence.exp().mean()"),
        ("the divergence turned around", "torch.xlogy(part, part) - torch.xlogy(part, q)",
         "torch.xlogy(q, q) - torch.xlogy(q, part)"),
        ("0·log 0 is NaN", "torch.xlogy(part, part)", "part * part.log()"),
        ("the entropy for the divergence", " - torch.xlogy(part, q)", ""),
        ("a mean over classes", ".sum(1)", ".mean(1)"),
        ("bits", "torch.xlogy(part, part) - torch.xlogy(part, q)",
         "(torch.xlogy(part, part) - torch.xlogy(part, q)) / np.log(2)"),
        ("the marginal of all parts", "part.mean(0) if", "p.mean(0) if"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Modules are imported anew for every answer: what Python compiles is kept, as it is at home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", False)
        patch.setattr(sys, "pycache_prefix", str(tmp_path_factory.mktemp("compiled")))
        yield


def make_wrong(exercise, old, new):
    """Our source with `old`, which stands in the exercise's functions once or more, replaced."""
    source = read_ours(exercise.file)
    functions = find_functions(ast.parse(source))
    bodies = [ast.get_source_segment(source, functions[name]) for name in exercise.functions]
    places = [body for body in bodies if old in body]
    assert len(places) == 1, f"stands in {len(places)} functions of {exercise.file}: {old}"
    return source.replace(places[0], places[0].replace(old, new))


def number_of(exercise):
    return str(exercise.number)


@pytest.mark.parametrize("exercise", EXERCISES, ids=number_of)
def test_ours_is_right_and_the_empty_function_is_not_begun_and_red(exercise):
    source = read_ours(exercise.file)
    assert grade(exercise, source, exercise.file).status == "right"
    empty = empty_functions(source, exercise)
    assert grade(exercise, empty, exercise.file).status == "not begun"
    assert run_claims(exercise, ast.parse(empty), exercise.file).status == "wrong"


@pytest.mark.parametrize("exercise", EXERCISES, ids=number_of)
def test_plausible_wrong_answers_are_wrong(exercise):
    answers = WRONG[exercise.number]
    assert len(answers) >= 3
    accepted = []
    for error, old, new in answers:
        verdict = grade(exercise, make_wrong(exercise, old, new), exercise.file)
        if verdict.status != "wrong" or not verdict.reason:
            accepted.append(error)
    assert not accepted, f"{exercise.title}: these wrong answers pass: {', '.join(accepted)}"


@pytest.mark.parametrize("change, says", [
    ({"functions": ["forget"]}, "ddpm.py has no function forget"),
    ({"given": {"q_sample": "x = 1"}}, "q_sample has no statement that begins with 'x = 1'"),
])
def test_a_list_that_went_stale_is_an_error(change, says):
    with pytest.raises(ValueError, match=says):
        empty_functions(read_ours("ddpm.py"), replace(EXERCISES[0], **change))


# ---------------------------------------------------------------- each by itself

def write_answer(exercise, body, source=None):
    """A source, by default the handout, with the body of the exercise's only function written by hand."""
    source = source or make_handout(exercise.file)
    (name,) = exercise.functions
    message = f"exercise {exercise.number}: {exercise.title}, {exercise.module}.{name}"
    line = f'raise NotImplementedError("{message}")'
    assert source.count(line) == 1
    return source.replace(line, body)


SAMPLE, DDIM, GUIDE = EXERCISES[0], EXERCISES[2], EXERCISES[3]


def test_an_exercise_is_right_while_those_it_stands_on_are_empty_or_wrong():
    body = """times = leading(len(schedule.beta), steps)
    for t, s in zip(times[::-1], [0, *times[:-1]][::-1]):
        eps = eps_fn(x, t)
        x = q_sample(predict_x0(x, t, eps, schedule), s, eps, schedule)
    return x"""
    answer = write_answer(DDIM, body)
    assert grade(DDIM, answer, "ddpm.py").status == "right"
    answer = write_answer(SAMPLE, "return x_0", answer)
    assert grade(DDIM, answer, "ddpm.py").status == "right"
    assert grade(SAMPLE, answer, "ddpm.py").status == "wrong"


def test_helpers_and_imports_of_the_student_are_used():
    source = "import math\n" + make_handout("ddpm.py") + "\n\ndef half(x):\n    return x / math.sqrt(4)\n"
    answer = write_answer(GUIDE, "return 2 * half(w * eps_cond + (1 - w) * eps_uncond)", source)
    assert grade(GUIDE, answer, "ddpm.py").status == "right"


@pytest.mark.parametrize("body, status, says", [
    ("return eps_cond +", "wrong", "Line {line}: invalid syntax"),
    ("return eps", "wrong", "Line {line}: NameError: name 'eps' is not defined"),
    ("return None", "wrong", "Not true yet: eq. 11: guidance extrapolates from the unconditional"),
    ("raise SystemExit", "wrong", "Line {line}: SystemExit"),
    ("raise NotImplementedError  # later", "wrong", "Line {line}: NotImplementedError"),
])
def test_what_is_wrong_is_said_with_the_line(body, status, says):
    answer = write_answer(GUIDE, body)
    line = answer.split("\n").index(f"    {body}") + 1
    verdict = grade(GUIDE, answer, "ddpm.py")
    assert verdict.status == status
    assert verdict.reason.startswith(says.format(line=line))


def test_a_failed_claim_shows_the_line_of_the_test_what_came_out_and_a_hint():
    verdict = grade(GUIDE, write_answer(GUIDE, "return eps_cond"), "ddpm.py")
    assert verdict.reason == "Not true yet: eq. 11: guidance extrapolates from the unconditional prediction"
    assert "close(guide(cond, uncond, 7.5), uncond + 7.5 * (cond - uncond)): Greatest" in verdict.seen
    assert "w = 1" in verdict.hint


def test_a_module_that_cannot_be_imported_or_has_lost_a_function_is_wrong():
    source = "import nothing_of_that_name\n" + write_answer(GUIDE, "return eps_cond")
    assert "Line 1: ModuleNotFoundError" in grade(GUIDE, source, "ddpm.py").reason
    source = make_handout("ddpm.py").replace("def guide(", "def guidance(")
    assert grade(SAMPLE, source, "ddpm.py").reason == "ddpm.py has no function guide any more"


def test_grading_leaves_the_modules_of_others_as_they_are():
    import ddpm
    import test_ddpm

    grade(GUIDE, write_answer(GUIDE, "return eps_cond"), "ddpm.py")
    assert sys.modules["ddpm"] is ddpm and sys.modules["test_ddpm"] is test_ddpm


# ---------------------------------------------------------------- the program

def program(monkeypatch, capsys, *words):
    """What `python -m course.exercises WORDS` prints, and its exit code."""
    monkeypatch.setattr(sys, "argv", ["exercises", *map(str, words)])
    code = 0
    try:
        exercises.run(exercises.main)
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    return printed.out + printed.err, code


def test_start_empties_every_exercise_and_leaves_the_rest_as_it_is(workdir, monkeypatch, capsys):
    text, code = program(monkeypatch, capsys, "start")
    assert code == 0 and f"{len(EXERCISES)} exercises" in text
    assert (workdir / "runs/course/weights/tiny/unet").is_dir()
    numbers = []
    for file in exercises.list_files():
        handout = (workdir / "runs" / "course" / file).read_text(encoding="utf-8")
        numbers += [line.split()[2] for line in handout.split("\n") if 'Error("exercise ' in line]
        compile(handout, file, "exec")
        if file not in {exercise.file for exercise in EXERCISES}:
            assert handout == read_ours(file)
    assert {int(number.strip(":")) for number in numbers} == {e.number for e in EXERCISES}
    assert [e.number for e in EXERCISES] == list(range(1, len(EXERCISES) + 1))
    assert sorted(e.lecture for e in EXERCISES) == [e.lecture for e in EXERCISES]


def test_a_second_start_leaves_work_alone_and_brings_back_what_is_missing(workdir, monkeypatch, capsys):
    program(monkeypatch, capsys, "start", "mine")
    (workdir / "mine/ddpm.py").write_text("my work")
    (workdir / "mine/train.py").unlink()
    text, code = program(monkeypatch, capsys, "start", "mine")
    assert code == 0 and "1 files written" in text
    assert text.splitlines()[-1] == "left alone, because they are not as handed out: ddpm.py"
    assert (workdir / "mine/ddpm.py").read_text() == "my work"
    assert (workdir / "mine/train.py").read_text(encoding="utf-8") == read_ours("train.py")


@pytest.mark.parametrize("words, says", [
    (["start", "others"], "others holds other things"),
    (["start", "others/file.txt"], "others/file.txt is a file"),
    (["check"], "runs/course is no folder of exercises; begin with"),
    (["check", "--folder", "others"], "others is no folder of exercises"),
    (["check", "16", "--folder", "mine"], "there is no exercise 16: they are 1 to 15"),
    (["solution", "0"], "there is no exercise 0"),
])
def test_bad_input_is_one_line_and_exit_2(words, says, workdir, monkeypatch, capsys):
    (workdir / "others").mkdir()
    (workdir / "others/file.txt").write_text("of somebody")
    (workdir / "mine").mkdir()
    (workdir / "mine" / exercises.MARK).touch()
    text, code = program(monkeypatch, capsys, *words)
    assert code == 2 and text.startswith("error: ") and says in text
    assert len(text.splitlines()) == 1
    assert os.listdir("others") == ["file.txt"]


def test_solution_shows_ours(monkeypatch, capsys):
    text, code = program(monkeypatch, capsys, "solution", 7)
    assert code == 0 and "embeds.amax(dim=1" in text and "embeds.mean(dim=1" in text


def test_check_grades_in_a_process_of_its_own(workdir, monkeypatch, capsys):
    program(monkeypatch, capsys, "start")
    folder = workdir / "runs/course"
    ddpm = write_answer(GUIDE, "print('noise')\n    return w * eps_cond + (1 - w) * eps_uncond")
    (folder / "ddpm.py").write_text(ddpm.replace("value = table", "value = 2 * table"), encoding="utf-8")
    data = (folder / "data.py").read_text(encoding="utf-8")
    (folder / "data.py").write_text(data.replace("def split(", "def cut("), encoding="utf-8")
    (folder / "attention.py").write_text("def attention(:", encoding="utf-8")
    pooling = (folder / "aggregators.py").read_text(encoding="utf-8")
    pooling = pooling.replace('raise NotImplementedError("exercise 7', 'return embeds[:, 1:2]  # ("')
    (folder / "aggregators.py").write_text(pooling, encoding="utf-8")
    (folder / "train.py").write_text("import", encoding="utf-8")
    (folder / "sample.py").unlink()
    text, code = program(monkeypatch, capsys, "check", 4, 5, 6, 7, 8)
    lines = text.splitlines()
    assert code == 1
    results = [line for line in lines if line[1:4].endswith("  ") and line[1].isdigit()]
    words = [line.split()[1] for line in results]
    assert words == ["right", "wrong", "wrong", "wrong", "not"]
    assert "Line 1: invalid syntax" in results[1]
    assert "the left side is [[[3.0, -2.0]]]" in text
    assert "1 of 5 right" in lines
    notes = text.split("1 of 5 right")[1]
    for words in ("ddpm.py: lookup differs", "data.py: split differs",
                  "train.py, line 1: invalid syntax", "sample.py is missing"):
        assert words in notes


def work_badly(folder, numbers, connection):
    """A process that hangs in exercise 2 and ends in exercise 4."""
    connection.send("ready")
    for number in numbers:
        if number == 2:
            time.sleep(600)
        if number == 4:
            os._exit(3)
        connection.send(Verdict("right"))


def test_a_process_that_hangs_or_ends_costs_one_exercise():
    results = list(exercises.grade_all(None, EXERCISES[:5], limit=2, work=work_badly))
    assert [exercise.number for exercise, _ in results] == [1, 2, 3, 4, 5]
    verdicts = [verdict for _, verdict in results]
    assert [verdict.status for verdict in verdicts] == ["right", "wrong", "right", "wrong", "right"]
    assert "endless loop" in verdicts[1].reason and "ends the whole program" in verdicts[3].reason


def test_readme_lists_the_exercises_as_they_are():
    text = (ROOT / "course" / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line[2:3].isdigit()]
    assert len(rows) == len(EXERCISES)
    for row, exercise in zip(rows, EXERCISES):
        functions = ", ".join(f"`{name}`" for name in exercise.functions)
        assert row.startswith(f"| {exercise.number} | {exercise.lecture} | {functions} |")
        assert row.endswith(f"| `{exercise.file}` |")
