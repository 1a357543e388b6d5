"""The log and the checkpoint of a training."""

import csv
import io
import time

import torch

from support.devices import autocast
from support.distributed import is_first
from support.files import write_text, write_whole
from support.plots import plot_training


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
        self.rows = []
        self.losses = []  # since the last row
        self.began = time.perf_counter()

    def start(self):
        """Take up the checkpoint if that is asked for. Returns the first step to make."""
        if self.options.resume and self.checkpoint.exists():
            return self.load()
        if not self.options.resume and is_first():
            self.checkpoint.unlink(missing_ok=True)  # an older run's is not this one's
        self.validate(0)
        return 0

    def load(self):
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if "losses" not in state:
            raise ValueError(f"--resume: {self.checkpoint} was made by another version of this code")
        wrong = []
        for name, value in self.settings.items():
            old = state["settings"].get(name)
            if old != value:
                wrong.append(f"--{name.replace('_', '-')} {old}, not {value}")
        if wrong:
            text = f"was trained with other options: {', '.join(wrong)}"
            raise ValueError(f"--resume: {self.checkpoint} {text}")
        self.task.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.rows = state["rows"]
        self.losses = state["losses"]
        self.began -= state["seconds"]
        return state["step"]

    def save(self, step):
        state = dict(
            module=self.task.module.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict(),
            step=step,
            rows=self.rows,
            losses=self.losses,
            seconds=time.perf_counter() - self.began,
            settings=self.settings,
        )
        if is_first():
            write_whole(self.checkpoint, lambda part: torch.save(state, part))
        text = io.StringIO()
        table = csv.DictWriter(text, self.rows[0], lineterminator="\n")
        table.writeheader()
        for row in self.rows:
            table.writerow({name: f"{value:.6g}" for name, value in row.items()})
        if is_first():
            write_text(self.log, text.getvalue())

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
            kept = f"{self.checkpoint} holds the last good state, if there is one"
            advice = "Start again with a smaller learning rate (--lr) or with --precision fp32"
            what = f"the {name} is {value.item()} at step {step}"
            raise ValueError(f"{self.task.name}: {what}; {kept}. {advice}")

    def end_step(self, step, bar, interrupted):
        """Validate and save when it is time; save and stop after Ctrl-C (interrupted())."""
        is_time = step % self.options.every == 0 or step == self.options.steps
        if is_time:
            self.validate(step)
            row = self.rows[-1]
            bar.set_postfix_str(f"loss {row['train']:.4f}, validation {row['validation']:.4f}")
        stops = interrupted()
        if is_time or stops:
            self.save(step)
        if stops or interrupted():  # or while it was saved
            bar.close()
            hint = "the same command with --resume goes on from there"
            raise KeyboardInterrupt(f"stopped at step {step}; {hint}")


def report(rows, out, title, written):
    """Draw the log as out/curve.png, and say what was reached and which file or folder was written."""
    plot_training(out / "curve.png", rows, title)
    start = rows[0]["validation"]
    end = rows[-1]["validation"]
    print(f"validation loss {start:.4f} -> {end:.4f} in {rows[-1]['seconds']:.0f} s")
    print(f"wrote {written}, and beside it the log as .csv and {out / 'curve.png'}")
