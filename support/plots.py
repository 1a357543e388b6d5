"""Plots by matplotlib, which is imported only when something is drawn."""

from support.files import write_whole


def new_figure(columns=1, width=5.0, height=4.0):
    """A figure and its axes, side by side; without pyplot, so no window is ever asked for."""
    from matplotlib.figure import Figure  # here: it takes half a second

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save_figure(path, figure, dpi=120):
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=dpi))


def plot_training(path, rows, title):
    """The log of a training -> training and validation against steps and, if known, bands of t.

    rows: dicts with step, train, validation and perhaps "t 0-249", … (train.fit).
    """
    bands = [name for name in rows[0] if name.startswith("t ")]
    figure, axes = new_figure(2 if bands else 1)
    steps = [row["step"] for row in rows]
    train = [row["train"] for row in rows[1:]]  # nothing is trained before the first row
    validation = [row["validation"] for row in rows]
    axes[0].plot(steps[1:], train, "o-", label="training", alpha=0.6, markersize=3)
    axes[0].plot(steps, validation, "o-", label="validation", markersize=3)
    axes[0].set_title(title, parse_math=False)  # a user's word may hold a $
    axes[0].set(xlabel="step", ylabel="loss")
    axes[0].legend()
    for name in bands:
        start = rows[0][name]
        change = [100 * (row[name] / start - 1) for row in rows]
        axes[1].plot(steps, change, "o-", label=f"{name}: from {start:.4f}", markersize=3)
    if bands:
        axes[1].set(title="validation, change since the start", xlabel="step", ylabel="percent")
        axes[1].legend()
    save_figure(path, figure)


def plot_curves(path, curves, x_label, y_label, title):
    """Curves with error bands. curves: {name: list of (x, y, low, high)}."""
    figure, (axis,) = new_figure(width=6.5)
    for name, points in curves.items():
        x, y, low, high = zip(*points)
        (line,) = axis.plot(x, y, "o-", label=name, markersize=3)
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(title=title, xlabel=x_label, ylabel=y_label)
    axis.legend()
    save_figure(path, figure)


def plot_plane(path, points, x_label, y_label, title):
    """Named points with error bars in both directions.

    points: {name: (x, y)}, each of them (value, low, high).
    """
    figure, (axis,) = new_figure(width=7.5, height=5.0)
    for name, ((x, x_low, x_high), (y, y_low, y_high)) in points.items():
        axis.errorbar(
            x,
            y,
            xerr=[[x - x_low], [x_high - x]],
            yerr=[[y - y_low], [y_high - y]],
            fmt="o",
            capsize=2,
            label=name,
        )
    axis.set(title=title, xlabel=x_label, ylabel=y_label)
    axis.legend(fontsize="small")
    save_figure(path, figure)


def plot_paths(path, paths, x_labels, y_label, title):
    """Curves through several planes side by side, with the same y; a thin cross is an interval.

    paths: {name: list of (number to write beside the point, one x a plane, y)}; every x and y is
    (value, low, high). Planes whose x is None are left out.
    """
    spots = [spot for curve in paths.values() for spot in curve]
    planes = [k for k in range(len(x_labels)) if spots[0][1 + k] is not None]
    figure, axes = new_figure(len(planes), width=6.5, height=5.5)
    for axis, k in zip(axes, planes):
        for number, (name, curve) in enumerate(paths.items()):
            x, x_low, x_high = zip(*[spot[1 + k] for spot in curve])
            y, y_low, y_high = zip(*[spot[-1] for spot in curve])
            color = f"C{number % 10}"
            style = "o-" if number < 10 else "s--"  # ten colours
            axis.plot(x, y, style, color=color, label=name, markersize=3)
            axis.hlines(y, x_low, x_high, color=color, alpha=0.25, linewidth=1)
            axis.vlines(x, y_low, y_high, color=color, alpha=0.25, linewidth=1)
            for spot in (curve[0], curve[-1]):
                axis.annotate(spot[0], (spot[1 + k][0], spot[-1][0]), fontsize=7, color=color)
        axis.set(xlabel=x_labels[k], ylabel=y_label)
    axes[0].set_title(title)
    axes[-1].legend(fontsize="x-small")
    save_figure(path, figure)
