"""Plots of the numbers visualize_diffusion.py finds: schedules, solvers, one step, losses."""

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from convergence import SOLVERS
from images import COLOURS, LINES, mark, new_figure, save_figure, show, wrapped
from predictors import NO_PREDICTION
from schedules import SPACINGS


def decibels(alpha_bar):
    """Signal over noise as an engineer writes it: 0 dB is as much of one as of the other."""
    return 10 * np.log10(alpha_bar / (1 - alpha_bar))


def schedule_table(curves, timesteps):
    """Lines of text: alpha_bar and dB of each schedule, and the first t below 0 dB.

    curves: {name of the schedule: alpha_bar, a float64 array [T]}.
    """
    lines = ["     t" + "".join(f"{name + ' alpha_bar':>20}{'dB':>8}" for name in curves)]
    for t in timesteps:
        lines.append(f"{t:>6}" + "".join(f"{ab[t]:>20.6g}{decibels(ab[t]):>8.2f}"
                                         for ab in curves.values()))
    crossings = [f"{name} t = {int(np.argmax(ab < 0.5))}" for name, ab in curves.items()]
    return [*lines, "first below 0 dB: " + ", ".join(crossings)]


def schedules_figure(curves, path):
    """Betas, alpha_bar, weights of image and noise, signal over noise, of each schedule along t."""
    figure, axes = new_figure(9, 6.4, 2, 2)
    for (name, ab), colour, line in zip(curves.items(), COLOURS, LINES):
        t, style = np.arange(len(ab)), dict(color=colour, linestyle=line, label=name)
        axes[0, 0].plot(t, 1 - ab / np.append(1, ab[:-1]), **style)
        axes[0, 1].plot(t, ab, **style)
        axes[1, 0].plot(t, np.sqrt(ab), **style)
        axes[1, 0].plot(t, np.sqrt(1 - ab), color=colour, linestyle=line, alpha=0.45)
        axes[1, 1].plot(t, decibels(ab), **style)
    axes[0, 0].set_yscale("log")
    axes[1, 1].axhline(0, color="black", linewidth=0.8)
    titles = (r"noise added in a step, $\beta_t$",
              r"signal left, $\bar\alpha_t$ (share of the variance)",
              r"weights of image $\sqrt{\bar\alpha_t}$ (falling), "
              r"noise $\sqrt{1-\bar\alpha_t}$ (rising)",
              "signal over noise in dB")
    for one, title in zip(axes.flat, titles):
        one.set_title(title, fontsize=10.5)
        one.set_xlabel("timestep t")
    axes[0, 1].legend(frameon=False)
    save_figure(figure, path)


def solvers_figure(tables, evaluations, path):
    """Error against evaluations: a row of panels for each kind of data, a panel for each sampler.

    tables: {name of the data: what solver_errors returns}.
    """
    figure, axes = new_figure(9, 3.2 * len(tables), len(tables), len(SOLVERS),
                              sharex=True, sharey=True)
    counts = np.array(evaluations)
    for panels, (data, errors) in zip(axes, tables.items()):
        for axis, sampler in zip(panels, SOLVERS):
            for spacing, colour, line in zip(SPACINGS, COLOURS, LINES):
                axis.loglog(counts, errors[sampler, spacing], color=colour, linestyle=line,
                            marker="o", markersize=3, label=spacing)
            for order, line in ((1, "-"), (2, "--")):
                axis.loglog(counts, 0.3 * (counts[0] / counts)**order, line, color="#999999",
                            linewidth=0.9, label=f"slope of order {order}")
            axis.set_title(f"{sampler}, {data}", fontsize=10.5)
            axis.xaxis.set_major_locator(FixedLocator(evaluations))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for axis in axes[-1]:
        axis.set_xlabel("evaluations of the model")
    for axis in axes[:, 0]:
        axis.set_ylabel("mean distance to the exact flow")
    axes[0, 0].legend(frameon=False, fontsize=9, loc="lower left")
    save_figure(figure, path)


def step_rows(step):
    """What explain_step found at one pixel, on an edge, where no clamp acts: (row, column) of it,
    and rows (image, what it is, formula, the same with this pixel's numbers, the pixel's value)."""
    place = divmod(int((step["x_0"][0] - 0.3).abs().argmin()), step["x_0"].shape[-1])
    v = {name: float(step[name][(0, *place)])
         for name in ("x_t", "eps", "x_0", "mean", "noise", "x_prev")}
    # One digit more than the results have, so that these can be checked by hand.
    text = {name: f"{value:.5f}" if value >= 0 else f"({value:.5f})" for name, value in v.items()}
    n = {name: f"{step[name]:.5g}"
         for name in ("signal_weight", "noise_weight", "to_x_0", "to_x_t", "sigma")}
    rows = [("x_t", f"noisy image, t = {step['t']}", "$x_t$", "where the chain has come to"),
            ("eps", "predicted noise", r"$\epsilon$, from model$(x_t, t)$",
             "the model's answer" if step["objective"] == "eps"
             else f"from the model's answer ({step['objective']})"),
            ("x_0", "guess of the image",
             rf"$x_0 = (x_t - {n['noise_weight']}\,\epsilon)\,/\,{n['signal_weight']}$",
             f"({v['x_t']:.5f} - {n['noise_weight']} * {text['eps']}) / {n['signal_weight']}"),
            ("mean", "mean of the next", rf"$\mu = {n['to_x_0']}\,x_0 + {n['to_x_t']}\,x_t$",
             f"{n['to_x_0']} * {text['x_0']} + {n['to_x_t']} * {text['x_t']}"),
            ("noise", "fresh noise", r"$z$, unit Gaussian", "drawn"),
            ("x_prev", f"next image, t = {step['t_prev']}", rf"$\mu + {n['sigma']}\,z$",
             f"{v['mean']:.5f} + {n['sigma']} * {text['noise']}")]
    return place, [(*row, v[row[0]]) for row in rows]


def one_step_figure(step, path):
    """Six panels with formulas; one pixel is marked in all, and the table below has its numbers."""
    (y, x), rows = step_rows(step)
    figure = Figure(figsize=(8, 8.4))
    wide = "\nshown from -3 to 3"
    remarks = {"eps": wide, "noise": wide, "x_0": "\nthen kept in [-1, 1]"}
    for k, (name, title, formula, *_) in enumerate(rows):
        axes = figure.add_axes((0.02 + k % 3 * 0.335, 0.665 - k // 3 * 0.375, 0.29, 0.283))
        image = step[name] / (3 if remarks.get(name) == wide else 1)
        show(axes, image)
        mark(axes, y, x, 1)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(formula + remarks.get(name, ""), fontsize=10)
    axes = figure.add_axes((0.02, 0.0, 0.96, 0.21))
    axes.axis("off")
    cells = [["at the marked pixel", "how", "value"],
             *([title, how.replace("*", "×"), f"{value:.4f}"] for _, title, _, how, value in rows)]
    table = axes.table(cells, cellLoc="left", colWidths=[0.3, 0.55, 0.15], bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(9.5)
    for cell in table.get_celld().values():
        cell.visible_edges = "B"
        cell.set_edgecolor("#999999")
    save_figure(figure, path)


def timestep_loss_figure(edges, losses, names, path, title=None):
    """A heat map: how far a training has come (columns) at each noise level (rows).

    losses: [columns][rows].  names: of the columns.
    """
    width = max(5, 2 + 0.55 * len(names))
    figure, ((axes,),) = new_figure(width, 5)
    places = np.arange(len(names) + 1)
    mesh = axes.pcolormesh(places, edges, np.array(losses).T, norm=LogNorm(), cmap="viridis")
    axes.set_xticks(places[:-1] + 0.5, names, rotation=45, ha="right", rotation_mode="anchor")
    axes.grid(False)
    axes.set_ylabel("timestep t")
    axes.set_title(wrapped(title, width - 2, 10.5), fontsize=10.5)
    bar = figure.colorbar(mesh, label="loss (mean squared error)",
                          format=StrMethodFormatter("{x:g}"))
    lowest, highest = mesh.get_clim()
    if highest < 10 * lowest:                               # else the powers of ten will do
        bar.set_ticks(np.geomspace(lowest, highest, 6).round(4), minor=False)
        bar.ax.yaxis.set_minor_locator(NullLocator())
    save_figure(figure, path)


def predictors_figure(edges, errors, path, title=None):
    """Bars in groups, one for each range of t and in it a bar for each answer (predictors.py).

    errors: {answer: an error for each range}.
    """
    figure, ((axes,),) = new_figure(9, 4)
    width = 0.8 / len(errors)
    for k, (name, row) in enumerate(errors.items()):
        places = np.arange(len(row)) + (k - (len(errors) - 1) / 2) * width
        style = ({"color": "#999999", "hatch": "//", "edgecolor": "white"}
                 if name == NO_PREDICTION else {"color": COLOURS[k]})
        bars = axes.bar(places, row, 0.9 * width, label=name, **style)
        axes.bar_label(bars, [f"{value:.2f}" for value in row], fontsize=7, padding=1)
    axes.set_xticks(range(len(edges) - 1),
                    [f"t = {low} to {high - 1}" for low, high in zip(edges, edges[1:])])
    axes.set_ylabel("mean squared error")
    axes.set_title(wrapped(title, 8, 10.5), fontsize=10.5)
    axes.legend(frameon=False, ncols=len(errors), loc="upper center",
                bbox_to_anchor=(0.5, -0.1), fontsize=9)
    save_figure(figure, path)
