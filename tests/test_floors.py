"""Three floors: support/ and toyfaces/, the ten modules above them, then experiments/, course/ and tests/.

Imports go down only, never up and never in a circle.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = ["ddpm", "attention", "unet", "aggregators", "ip_adapter",  # from the bottom up
           "data", "dreambooth", "train", "sample", "metrics"]  # fmt: skip
BELOW = ["support", "toyfaces"]
ABOVE = ["experiments", "course", "tests"]
PEER = "diffusers"
PEER_USERS = ("tests/", "experiments/benchmark_diffusers.py")


def find_files():
    """All Python files of ours, as paths like support/files.py."""
    paths = list(ROOT.glob("*.py"))
    for folder in BELOW + ABOVE:
        paths.extend((ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


FILES = find_files()


def find_imports(file, source):
    """The dotted names that a file imports, anywhere in it, e.g. {"torch", "support.files"}."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:  # "from .files import …" is of the same folder
                start = ".".join([*Path(file).parent.parts, *start.split(".")]).strip(".")
            names.add(start)
            names.update(f"{start}.{alias.name}" for alias in node.names)  # perhaps a module, too
    return names


def is_ours(name):
    """Whether a top-level name is a module or a folder of this repository."""
    known = name in MODULES + BELOW + ABOVE
    return known or (ROOT / f"{name}.py").exists() or (ROOT / name).is_dir()


def allowed(file):
    """The top-level names of ours that a file may import."""
    place = file.split("/")[0].removesuffix(".py")
    if place in BELOW:
        return BELOW
    if place in MODULES:
        return BELOW + MODULES[: MODULES.index(place)]
    if place == "tests":
        return BELOW + MODULES + ABOVE
    return BELOW + MODULES + [place]  # experiments, course: each for itself


def find_faults(file, source):
    """What a file imports against the rules, one line each."""
    faults = []
    for name in sorted({name.split(".")[0] for name in find_imports(file, source)}):
        if is_ours(name) and name not in allowed(file):
            faults.append(f"{file} imports {name}: imports go down only")
        if name == PEER and not file.startswith(PEER_USERS):
            faults.append(f"{file} imports {PEER}: only {' and '.join(PEER_USERS)} may")
    return faults


def read(file):
    return (ROOT / file).read_text(encoding="utf-8")


def test_the_top_level_holds_the_ten_modules_and_no_other():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(MODULES)
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= {*BELOW, *ABOVE}


def test_imports_go_down_only_and_diffusers_is_only_a_peer():
    assert {"unet.py", "support/files.py", "toyfaces/judge.py", "experiments/plan.py"} <= set(FILES)
    for file in FILES:
        assert not find_faults(file, read(file))


def test_no_imports_go_in_a_circle():
    imports = {}
    for file in FILES:
        imported = {name.replace(".", "/") + ".py" for name in find_imports(file, read(file))}
        imports[file] = imported.intersection(FILES)
    assert imports["train.py"] >= {"unet.py", "support/files.py"}
    TopologicalSorter(imports).prepare()  # CycleError names a circle


@pytest.mark.parametrize("file, line", [
    ("support/files.py", "import ddpm"),
    ("support/files.py", "from experiments.plan import Plan"),
    ("toyfaces/judge.py", "from data import ToyFaces"),
    ("ddpm.py", "from attention import attention"),
    ("unet.py", "import ip_adapter as adapter"),
    ("train.py", "def f():\n    from metrics import frechet_distance"),
    ("metrics.py", "from experiments import plan"),
    ("sample.py", "import tests.conftest"),
    ("experiments/plan.py", "import tests.conftest"),
    ("experiments/plan.py", "import course.figures"),
    ("data.py", "import assets"),  # a new folder with code in it
    ("unet.py", "from diffusers import UNet2DConditionModel"),
    ("experiments/plan.py", "import diffusers.models"),
])  # fmt: skip
def test_imports_against_the_rules_are_found(file, line):
    assert find_faults(file, line)


@pytest.mark.parametrize("file, line", [
    ("support/files.py", "from support import pictures\nfrom toyfaces.judge import FeatureNet"),
    ("support/files.py", "from .pictures import load_image"),
    ("unet.py", "import torch, ddpm\nfrom support.files import digest"),
    ("metrics.py", "import train"),
    ("experiments/plan.py", "import metrics\nfrom experiments.scores import Table\nfrom . import scores"),
    ("experiments/benchmark_diffusers.py", "import diffusers"),
    ("tests/test_unet.py", "import diffusers\nfrom experiments.base_networks import make_tiny_world"),
])  # fmt: skip
def test_imports_within_the_rules_are_allowed(file, line):
    assert not find_faults(file, line)
