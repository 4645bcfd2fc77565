"""Curves of run folders in one figure: score against environment steps, mean and min-max band over seeds.

    python tools/plot.py runs/a runs/b --output figure.png
    python tools/plot.py results/o2o_sac/hopper-medium-v2/{naive,full} --labels naive O2SAC --output sac.png

A folder that holds runs instead of being one stands for all of them. Runs of one label are seeds of one curve, each
task has a panel of its own, and the dashed lines are the offline policies. A mean goes as far as its shortest run.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure


@dataclass
class Args:
    folders: tyro.conf.Positional[tuple[Path, ...]]  # run folders, or folders of run folders
    output: Path = Path("figure.png")  # the figure: .png, .pdf or .svg
    labels: tuple[str, ...] = ()  # one for each folder; none: the --exp-name of the runs, else their algorithm
    stage: str = "online"  # stage whose scores are drawn
    metric: str = "score"  # number that is drawn, as metrics.jsonl names it behind the stage
    title: str | None = None  # above the figure


class UserError(Exception):
    """Something the user can put right: `run_cli` prints it as one sentence and exits with code 2."""


def run_folders(folder):
    """-> the folder itself if it is one of a run, else all run folders in it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    found = [folder] if (folder / "metrics.jsonl").exists() else sorted(p.parent for p in folder.rglob("metrics.jsonl"))
    if not found:
        raise UserError(f"{folder} is no run folder and holds none: there is no metrics.jsonl in it")
    return found


def load_json(path):
    return json.loads(path.read_text()) if path.exists() else {}


def load_run(folder, stage, metric):
    """-> (task, label, [(step, value)], offline score or None) of one run, finished or not. None if it has no such
    points. Raises UserError."""
    try:
        known = load_json(folder / "args.json") | {k: v for k, v in load_json(folder / "summary.json").items() if v}
        lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]  # a line that is being written has no end yet
        rows = [row for row in map(json.loads, lines) if row["stage"] == stage and f"{stage}/{metric}" in row]
        points = sorted((int(row["step"]), float(row[f"{stage}/{metric}"])) for row in rows)
        offline = known.get("offline_score") if metric == "score" else None
        label = known.get("exp_name") or known.get("algorithm") or folder.name
        task = known.get("env_id", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is damaged or no run folder ({type(error).__name__}: {error})") from error
    if not points:
        print(f"left out {folder}, which has no {stage}/{metric}")
        return None
    return task, label, points, offline


def over_seeds(curves):
    """Curves [(step, value)] of the same thing -> steps (N,), and mean, lowest and highest value (N,) at each of them.
    Steps are those of all curves, as far as the shortest goes; between the points of a curve, lines."""
    first, last = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    steps = sorted({step for curve in curves for step, _ in curve if first <= step <= last})
    if not steps:
        raise UserError("runs of one label have no environment steps in common; give them different --labels")
    values = np.array([np.interp(steps, *zip(*curve, strict=True)) for curve in curves])
    return np.array(steps), values.mean(0), values.min(0), values.max(0)


def draw_panels(panels, args):
    """Writes args.output: a panel for each task, {task: {label: [(curve, offline score)]}}."""
    figure = Figure(figsize=(5 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (task, labels) in zip(axes[0], panels.items(), strict=True):
        for n, (label, runs) in enumerate(labels.items()):
            steps, mean, low, high = over_seeds([curve for curve, _ in runs])
            axis.plot(steps, mean, color=f"C{n}", label=f"{label} ({len(runs)})")
            axis.fill_between(steps, low, high, color=f"C{n}", alpha=0.2, linewidth=0)
            offline = [score for _, score in runs if score is not None]
            if offline:
                axis.axhline(np.mean(offline), color=f"C{n}", linestyle="--", linewidth=1)
        axis.set(title=task, xlabel="environment steps" if args.stage == "online" else "updates", ylabel=args.metric)
        axis.legend(fontsize=8)
    if args.title:
        figure.suptitle(args.title)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=120)


def main(args: Args):
    if not args.folders or (args.labels and len(args.labels) != len(args.folders)):
        raise UserError("name at least one run folder, and as many --labels as folders, or none")
    if args.output.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output {args.output} has to end with .png, .pdf or .svg")
    panels = defaultdict(lambda: defaultdict(list))
    for i, parent in enumerate(args.folders):
        for folder in run_folders(parent):
            if run := load_run(folder, args.stage, args.metric):
                task, label, curve, offline = run
                panels[task][args.labels[i] if args.labels else label].append((curve, offline))
    if not panels:
        raise UserError(f"none of these runs has {args.stage}/{args.metric} yet")
    draw_panels(panels, args)
    print(f"{sum(len(runs) for panel in panels.values() for runs in panel.values())} runs in {args.output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
