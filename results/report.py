"""Tables and figures of the README from the runs under results/.

    python results/report.py  # rewrites the table between the markers in README.md, and results/<script>.png

A run is a folder results/<script>/<variant>/<seed>/ with the summary.json and metrics.jsonl of its run folder.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).resolve().parent
TITLES = {
    "full": "full method",
    "no-reevaluate": "no re-evaluation",
    "no-align": "no alignment",
    "no-constrain": "no constraint",
    "naive": "neither",
    "full-8000": "full method, 8,000 steps",
}


def load(script):
    """-> {variant: [(summary, metrics rows)]}, seeds in order; only complete runs."""
    runs = defaultdict(list)
    for path in sorted(RESULTS.glob(f"{script}/*/*/summary.json")):
        summary = json.loads(path.read_text())
        rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
        assert summary["status"] == "complete", path
        runs[path.parent.parent.name].append((summary, rows))
    return {variant: runs[variant] for variant in TITLES if variant in runs}


def mean_of(values):
    values = [value for value in values if value is not None]
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else "–"


def table(runs):
    columns = ("variant", "seeds", "offline", "aligned", "initial drop", "lowest online", "mean online")
    columns += ("last 5 evaluations", "best")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for variant, group in runs.items():
        summaries = [summary for summary, _ in group]
        lowest = [min(score for _, score in summary["scores"]) for summary in summaries]
        before = ("offline_score", "aligned_score", "initial_drop")
        cells = [mean_of(summary[key] for summary in summaries) for key in before] + [mean_of(lowest)]
        cells += [mean_of(summary[key] for summary in summaries) for key in ("auc", "final_score", "best_score")]
        lines.append(f"| {TITLES[variant]} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(runs, path):
    """Score during alignment and online, the mean over seeds with their range."""
    seen = {row["stage"] for group in runs.values() for _, rows in group for row in rows}
    stages = [stage for stage in ("align", "online") if stage in seen]
    settings = {"layout": "constrained", "squeeze": False, "sharey": True}
    drawing, axes = plt.subplots(1, len(stages), figsize=(5 * len(stages), 3.8), **settings)
    for axis, stage in zip(axes[0], stages, strict=True):
        for i, (variant, group) in enumerate(runs.items()):
            curves = [[(r["step"], r[f"{stage}/score"]) for r in rows if r["stage"] == stage] for _, rows in group]
            longer = variant == "full" and "full-8000" in runs  # the same runs, continued
            if all(curves) and not longer:
                steps, scores = [step for step, _ in curves[0]], np.array([[s for _, s in curve] for curve in curves])
                axis.plot(steps, scores.mean(0), label=TITLES[variant], color=f"C{i}")
                axis.fill_between(steps, scores.min(0), scores.max(0), color=f"C{i}", alpha=0.15)
        offline = np.mean([summary["offline_score"] for group in runs.values() for summary, _ in group])
        axis.axhline(offline, color="black", linestyle="--", label="offline policy")
        axis.set_title({"align": "alignment", "online": "online fine-tuning"}[stage])
        axis.set_xlabel({"align": "updates", "online": "environment steps"}[stage])
    axes[0, 0].set_ylabel("normalised score")
    axes[0, -1].legend(fontsize=8)
    drawing.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(drawing)


def main():
    readme = RESULTS.parent / "README.md"
    text = readme.read_text()
    for script in re.findall(r"<!-- results: (\w+) -->", text):
        runs = load(script)
        figure(runs, RESULTS / f"{script}.png")
        marked = rf"(<!-- results: {script} -->\n).*?(<!-- end -->)"
        text = re.sub(marked, lambda match, runs=runs: match[1] + table(runs) + "\n" + match[2], text, flags=re.S)
    readme.write_text(text)


if __name__ == "__main__":
    main()
