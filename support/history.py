"""The log and the checkpoint of a training."""

import csv
import io
import time
import warnings
import zipfile
from contextlib import contextmanager

import torch

from support.claim import claim
from support.devices import autocast
from support.distributed import is_first
from support.files import write_text, write_whole
from support.plots import plot_training

MOST_SKIPPED = 20  # steps in a row that fp16 may skip; each halves the factor of the loss

RESULTS = {  # what train.py writes after the last step
    "adapter": ["ip-adapter.safetensors"],
    "dreambooth": ["model_index.json", "pytorch_lora_weights.safetensors"],
}
FIELDS = {  # of a checkpoint
    "module": dict,
    "optimizer": dict,
    "scaler": dict,
    "step": int,
    "rows": list,
    "losses": list,
    "seconds": float,
    "settings": dict,
}


class History:
    """Log and checkpoint of the loop of train.py: out/<name>.csv and out/<name>.pt.

    rows: dicts with step, train (the mean loss since the row before), validation and the like of
    it, and seconds. task, options: train.Task, train.Options. settings: what else the result depends
    on; a checkpoint with other ones is refused.
    """

    def __init__(self, task, out, options, settings, optimizer, scaler):
        out.mkdir(parents=True, exist_ok=True)
        self.task = task
        self.options = options
        self.optimizer = optimizer
        self.scaler = scaler
        self.log = out / f"{task.name}.csv"
        self.checkpoint = out / f"{task.name}.pt"
        names = ("steps", "batch", "lr", "accumulate", "seed", "precision")
        settings = {**settings, **{name: getattr(options, name) for name in names}}
        self.settings = {name: str(value) for name, value in settings.items()}
        self.machine = describe_machine(options.device)
        self.rows = []
        self.losses = []  # since the last row
        self.saved = None  # the step of the checkpoint
        self.skipped = 0  # steps in a row, up to the last one
        self.scale = scaler.get_scale()
        self.began = time.perf_counter()

    def start(self):
        """Take up the checkpoint if that is asked for. Returns the first step to make.

        ValueError if it is not asked for, and there is one of an unfinished run.
        """
        if self.options.resume and self.checkpoint.exists():
            return self.load()
        if not self.options.resume and is_first():
            refuse_unfinished(self.checkpoint)
            self.checkpoint.unlink(missing_ok=True)  # a finished run's is not this one's
        self.validate(0)
        return 0

    def load(self):
        state = read_checkpoint(self.checkpoint)
        wrong = []
        for name, value in self.settings.items():
            old = state["settings"].get(name)
            if old != value:
                wrong.append(f"--{name.replace('_', '-')} {old}, not {value}")
        if wrong:
            text = f"was trained with other options: {', '.join(wrong)}"
            raise ValueError(f"--resume: {self.checkpoint} {text}")
        self.load_tensors(state)
        self.rows = state["rows"]
        self.losses = state["losses"]
        self.began -= state["seconds"]
        self.saved = state["step"]
        self.scale = self.scaler.get_scale()
        if self.saved >= self.options.steps:
            print(f"{self.checkpoint}: all {self.saved} steps are done already")
        else:
            self.warn_of_another_machine(state)
        return self.saved

    def load_tensors(self, state):
        try:
            self.task.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            for weight, moments in self.optimizer.state.items():  # PyTorch does not compare these
                if not weight.shape == moments["exp_avg"].shape == moments["exp_avg_sq"].shape:
                    raise ValueError("AdamW's moments have other shapes than the weights")
        except Exception as error:  # each of them fails in its own ways
            reason = str(error).splitlines()[-1].strip()
            problem = f"does not fit what is trained here: {reason}"
            raise ValueError(f"--resume: {self.checkpoint} {problem}") from error

    def warn_of_another_machine(self, state):
        old = dict(state.get("machine", {}))  # older versions did not write it
        changes = []
        for name, value in self.machine.items():
            if old.get(name, value) != value:
                changes.append(f"{name} {old[name]}, now {value}")
        if changes:
            result = "the result will not be bit for bit that of a run that was never stopped"
            warnings.warn(f"--resume: {self.checkpoint} was made with {', '.join(changes)}: {result}")

    def save(self, step):
        """Write checkpoint and log. ValueError if a weight is not finite: the old ones stay."""
        for name, weight in self.task.module.named_parameters():
            if weight.requires_grad and not weight.isfinite().all():
                self.fail(f"the weight {name} is not finite at step {step}")
        state = dict(
            module=self.task.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            step=step,
            rows=self.rows,
            losses=self.losses,
            seconds=time.perf_counter() - self.began,
            settings=self.settings,
            machine=self.machine,
        )
        text = io.StringIO()
        table = csv.DictWriter(text, self.rows[0], lineterminator="\n")
        table.writeheader()
        for row in self.rows:
            table.writerow({name: f"{value:.6g}" for name, value in row.items()})
        if is_first():
            write_whole(self.checkpoint, lambda part: torch.save(state, part))
            write_text(self.log, text.getvalue())
        self.saved = step

    def validate(self, step):
        """Add a row to the log."""
        train = sum(self.losses) / max(1, len(self.losses))
        with torch.inference_mode(), autocast(self.options.device, self.options.precision):
            values = self.task.validate()
        seconds = time.perf_counter() - self.began
        self.rows.append({"step": step, "train": train, **values, "seconds": seconds})
        self.losses.clear()

    def add_losses(self, losses, step):
        for loss in losses:
            self.check_finite("loss", loss, step)
            self.losses.append(loss.item())

    def check_finite(self, name, value, step):
        if not torch.isfinite(value):
            self.fail(f"the {name} is {value.item()} at step {step}")

    def count_skipped(self, step):
        """ValueError if fp16 has skipped so many steps in a row that it will not learn any more.

        It skips a step when a gradient overflows, and then makes its factor of the loss smaller.
        """
        scale = self.scaler.get_scale()
        self.skipped = self.skipped + 1 if scale < self.scale else 0
        self.scale = scale
        if self.skipped == MOST_SKIPPED:
            self.fail(f"fp16 overflowed in {MOST_SKIPPED} steps in a row, up to step {step}")

    def fail(self, what):
        kept = "no checkpoint was written yet"
        if self.saved is not None:
            kept = f"{self.checkpoint} holds the last good state, of step {self.saved}"
        advice = "Start again with a smaller learning rate (--lr) or with --precision fp32"
        raise ValueError(f"{self.task.name}: {what}; {kept}. {advice}")

    def end_step(self, step, bar, interrupted):
        """Validate and save when it is time; save and stop after Ctrl-C (interrupted())."""
        self.count_skipped(step)
        is_time = step % self.options.every == 0 or step == self.options.steps
        if is_time:
            self.validate(step)
            row = self.rows[-1]
            bar.set_postfix_str(f"loss {row['train']:.4f}, validation {row['validation']:.4f}")
        stops = interrupted()
        if is_time or stops:
            self.save(step)
        if stops or (self.saved == step and interrupted()):  # or while it was saved
            bar.close()
            hint = "the same command with --resume goes on from there"
            raise KeyboardInterrupt(f"stopped at step {self.saved}; {hint}")


def describe_machine(device):
    """What the last bits of a result depend on beside the options."""
    facts = {"PyTorch": str(torch.__version__), "device": device.type}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    if device.type == "cpu":
        facts["device"] = f"cpu ({torch.backends.cpu.get_cpu_capability()})"
        facts["threads"] = str(torch.get_num_threads())
    return facts


def read_checkpoint(path, whole=True):
    """What History.save wrote. ValueError if it is damaged, or something else: nothing is executed.

    whole: check all of it, which takes seconds for 10 GB; else only what is said beside tensors.
    """
    try:
        if whole:  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
        wrong = [name for name, kind in FIELDS.items() if not isinstance(state[name], kind)]
        if wrong or not state["rows"] or not 0 <= state["step"] <= int(state["settings"]["steps"]):
            raise ValueError("other content")
        return state
    except OSError:
        raise
    except Exception as error:  # of many kinds; PyTorch's text advises to execute what is in there
        problem = "is damaged, or no checkpoint of this version of the program"
        raise ValueError(f"{path} {problem}: move it away to start anew") from error


def refuse_unfinished(checkpoint, results=()):
    """ValueError if the run of this checkpoint is not finished: a new one would write over it.

    results: files one of which is written after the last step.
    """
    if not checkpoint.exists():
        return
    state = read_checkpoint(checkpoint, whole=False)
    step = state["step"]
    steps = int(state["settings"]["steps"])
    problem = None
    if step < steps:
        problem = f"holds a run that was stopped at step {step} of {steps}"
    elif results and not any(is_newer(path, checkpoint) for path in results):
        problem = f"holds a run with all its {steps} steps, but the result was not written"
    if problem:
        ways = "go on with --resume, or move it away (or choose another --out) to start anew"
        raise ValueError(f"{checkpoint} {problem}: {ways}")


def is_newer(path, other):
    return path.exists() and path.stat().st_mtime >= other.stat().st_mtime


@contextmanager
def own_run(out, method, resume):
    """Inside, the folder `out` is this program's alone and holds no unfinished run to write over.

    ValueError if another program works there, or if there is one and it is not to be resumed.
    """
    with claim(out):
        if not resume and is_first():
            results = [out / name for name in RESULTS[method]]
            refuse_unfinished(out / f"{method}.pt", results)
        yield


def report(rows, out, title, written):
    """Draw the log as out/curve.png, and say what was reached and which file or folder was written."""
    plot_training(out / "curve.png", rows, title)
    start = rows[0]["validation"]
    end = rows[-1]["validation"]
    print(f"validation loss {start:.4f} -> {end:.4f} in {rows[-1]['seconds']:.0f} s")
    print(f"wrote {written}, and beside it the log as .csv and {out / 'curve.png'}")
