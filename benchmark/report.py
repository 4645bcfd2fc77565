"""From run folders to results/*.csv, the tables in README.md and results/README.md, and the figures.

    python benchmark/report.py                 # from results/: the tables go between the markers of both READMEs
    python benchmark/report.py --check         # writes nothing; exit code 1 if tables or CSV are not those of the runs
    python benchmark/report.py runs/benchmark  # from runs of your own: the tables go into runs/benchmark/report.md

A run is a folder <script>/<task>/<variant>/<seed>/ with the summary.json and metrics.jsonl of its run folder. Numbers
over seeds are interquartile means with 95 % bootstrap intervals, stratified by task where several are taken together.
The same runs give the same bytes. A folder that cannot be read is named in a warning and left out.
"""

import csv
import io
import json
import math
import pickle
import re
import sys
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
TASKS = [f"{env}-{data}-v2" for data in ("medium", "medium-replay") for env in ("hopper", "walker2d", "halfcheetah")]
MAZES = [f"antmaze-{maze}-v2" for maze in ("umaze", "umaze-diverse")]
KITCHENS = ["kitchen-complete-v0"]
ABLATIONS = {
    "full": "full method",
    "no-reevaluate": "no re-evaluation",
    "no-align": "no alignment",
    "no-constrain": "no constraint",
    "naive": "none of these (naive)",
    "interval": "full, reference replaced at intervals",
}
GROUPS = {  # table -> its script, and the title of each variant in it; the first is the method itself
    "o2o_sac": ("o2o_sac", {**ABLATIONS, "full-8000": "full method, 8,000 steps"}),
    "o2o_td3": ("o2o_td3", ABLATIONS),
    "o2o_ppo": ("o2o_ppo", ABLATIONS),
    "o3f_iql": ("o3f", {"iql": "O3F, ω = 0", "iql-omega-1": "O3F, ω = 1", "iql-noise": "action noise"}),
    "o3f_lapo": ("o3f", {"lapo": "O3F, ω = 0", "lapo-omega-1": "O3F, ω = 1", "lapo-noise": "action noise"}),
    "rlpd": ("rlpd", {"full": "RLPD, 4 updates a step"}),
    "wsrl": ("wsrl", {"full": "WSRL"}),
    "cal_ql": ("cal_ql", {"full": "Cal-QL", "no-calibrate": "CQL goes on"}),
    "iql": ("iql", {"full": "IQL goes on"}),
    "pex": ("pex", {"full": "PEX"}),
    "awac": ("awac", {"full": "AWAC"}),
    "proto": ("proto", {"full": "PROTO", "td3": "PROTO+TD3"}),
    "aca": ("aca", {"full": "ACA"}),
    "off2on": ("off2on", {"full": "Off2On"}),
    "alignment": ("o2o_sac", {f"alignment-{n}": f"{n:,} updates" for n in (25_000, 50_000, 100_000, 200_000)}),
}
METHODS = {  # title -> its table, its variant there
    "O2SAC, best": ("o2o_sac", "full"),
    "O2SAC, best, 8,000 steps": ("o2o_sac", "full-8000"),
    "O2TD3, best": ("o2o_td3", "full"),
    "O2PPO, best": ("o2o_ppo", "full"),
    "O3F on IQL": ("o3f_iql", "iql"),
    "O3F on LAPO": ("o3f_lapo", "lapo"),
    "RLPD": ("rlpd", "full"),
    "WSRL": ("wsrl", "full"),
    "Cal-QL": ("cal_ql", "full"),
    "IQL": ("iql", "full"),
    "PEX": ("pex", "full"),
    "AWAC": ("awac", "full"),
    "PROTO": ("proto", "full"),
    "ACA": ("aca", "full"),
    "Off2On": ("off2on", "full"),
}
INTERVAL = {  # the other way of replacing the reference policy, which has fewer runs
    "O2SAC, best": ("O2SAC, interval", "o2o_sac", "interval"),
    "O2TD3, best": ("O2TD3, interval", "o2o_td3", "interval"),
    "O2PPO, best": ("O2PPO, interval", "o2o_ppo", "interval"),
}
COMPARED = METHODS | {  # on one task
    **{title: (group, variant) for title, group, variant in INTERVAL.values()},
    "CQL": ("cal_ql", "no-calibrate"),
    "PROTO+TD3": ("proto", "td3"),
}
NAIVE = {  # the same online algorithms without the method, for the table in README.md
    "O2SAC, best": ("SAC, started naively", "o2o_sac", "naive"),
    "O2TD3, best": ("TD3, started naively", "o2o_td3", "naive"),
    "O2PPO, best": ("PPO, started naively", "o2o_ppo", "naive"),
    "O3F on IQL": ("O3F's IQL, with noise", "o3f_iql", "iql-noise"),
    "O3F on LAPO": ("O3F's LAPO, with noise", "o3f_lapo", "lapo-noise"),
}
STUDIED = [group for group, (script, _) in GROUPS.items() if script in ("o2o_sac", "o2o_td3", "o2o_ppo", "o3f")]
TITLES = {group: title for title, (group, variant) in METHODS.items() if group in STUDIED and variant != "full-8000"}
SOURCES = {"bc": "BC", "cql": "CQL", "td3_bc": "TD3+BC", "iql": "IQL", "lapo": "LAPO", "dt": "Decision Transformer"}
OWN = {"o2o_sac": ("cql", "full-8000"), "o2o_td3": ("td3_bc", "full"), "o2o_ppo": ("iql", "full")}  # their own class
METHOD_OF = {"o2o_sac": "O2SAC", "o2o_td3": "O2TD3", "o2o_ppo": "O2PPO"}
CRITICS = {"fixed": "re-evaluated, fixed", "iterated": "re-evaluated, iterated", "aligned": "aligned"}
COLUMNS = ["offline", "aligned", "initial_drop", "lowest", "auc", "final", "acting", "best", "closing"]
HEADINGS = ["offline", "aligned", "initial drop", "lowest online", "mean online", "last 5 evaluations", "while acting"]
STAGES = {"align": "alignment", "online": "online fine-tuning", "acting": "the actions as executed"}


@dataclass
class Args:
    results: tyro.conf.Positional[Path] = RESULTS  # folder of runs <script>/<task>/<variant>/<seed>
    check: bool = False  # compare tables and CSV with those that are there, and write nothing


class UserError(Exception):
    """Something the user can put right: `run_cli` prints it as one sentence and exits with code 2."""


@cache
def warn(text):
    """Once for each text: several tables come from the same file."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def readable(read, paths):
    """-> read(path) of every path that can be read; of the others a line says which and why. None: not wanted."""
    found = []
    for path in sorted(paths):
        try:
            found.append(read(path))
        except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, EOFError) as error:
            warn(f"left out {path}, which cannot be read ({type(error).__name__}: {error})")
        except pickle.UnpicklingError as error:
            warn(f"left out {path}, which is no checkpoint ({type(error).__name__})")
    return [item for item in found if item is not None]


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def shipped_policy(folder):
    """-> hopper-medium-v2/cql.pt, if the run started from that file of offline/checkpoints, else None."""
    if not (folder / "args.json").exists():
        return None
    args = json.loads((folder / "args.json").read_text())
    source = {"o2o_sac": "cql", "o2o_td3": "td3_bc", "o2o_ppo": "iql", "iql_online": "iql", "pex": "iql"}
    source = source.get(args.get("algorithm"))
    if args.get("base") == "iql":  # o3f.py takes two critics where there are no five
        source = "iql_5" if (ROOT / "offline/checkpoints" / args["env_id"] / "iql_5.pt").exists() else "iql"
    elif "base" in args:
        source = args["base"]
    if args.get("checkpoint", "") is None:  # the default one
        return source and f"{args['env_id']}/{source}.pt"
    parts = Path(args.get("checkpoint") or "").parts
    return "/".join(parts[-2:]) if parts[-4:-2] == ("offline", "checkpoints") else None


def load_run(folder):
    """-> the run as `load` describes it; None if it was cut off, or is one of pre-training."""
    script, task, variant, seed = folder.parts[-4:]
    summary = json.loads((folder / "summary.json").read_text())
    if summary["status"] != "complete" or "initial_drop" not in summary:
        return None
    rows = rows_of(folder)
    curve = [(row["stage"], row["step"], row.get(f"{row['stage']}/score")) for row in rows]
    acting = [row for row in rows if "online/score_acting" in row]
    curve += [("acting", row["step"], row["online/score_acting"]) for row in acting]
    keys = {"offline": "offline_score", "aligned": "aligned_score", "final": "final_score", "best": "best_score"}
    keys |= {"closing": "closing_score"}
    run = {"script": script, "task": task, "variant": variant, "seed": int(seed), "policy": shipped_policy(folder)}
    run |= {column: summary.get(keys.get(column, column)) for column in COLUMNS}
    run |= {"lowest": min((score for _, score in summary["scores"]), default=None)}
    scores, episodes = ([row[f"online/{key}"] for row in acting] for key in ("score_acting", "episodes"))
    run |= {"acting": float(np.average(scores, weights=episodes)) if acting else None}
    run |= {"online_steps": summary["online_steps"], "selection_steps": summary["selection_steps"]}
    if variant == "interval":  # early runs count a comparison that decided nothing and that the scripts left out later
        run["selection_steps"] = 0
    run |= {"minutes": summary["wall_seconds"] / 60}
    return run | {"curve": [point for point in curve if point[2] is not None]}


def load(results):
    """-> one dictionary a complete run: script, task, variant, seed, policy (the shipped file it started from), the
    COLUMNS (None where a run has no such number), and `curve`, a list of (stage, step, score). Ordered by the first
    four."""
    runs = readable(load_run, [path.parent for path in results.glob("*/*/*/*/summary.json")])
    return sorted(runs, key=lambda run: [run[key] for key in ("script", "task", "variant", "seed")])


def chosen(runs, group):
    """-> {task: {variant: its runs}} of the runs that belong to a table."""
    script, titles = GROUPS[group]
    tasks = {}
    for task in sorted({run["task"] for run in runs if run["script"] == script}):
        found = {v: [r for r in runs if (r["script"], r["task"], r["variant"]) == (script, task, v)] for v in titles}
        if any(found.values()):
            tasks[task] = {variant: group for variant, group in found.items() if group}
    return tasks


def studied(tasks):
    """Of what `chosen` found the tasks that have more than the method itself, if there are any."""
    method = {variant for _, variant in METHODS.values()}
    return {task: found for task, found in tasks.items() if set(found) - method} or tasks


def interval(strata):
    """Interquartile mean of all numbers in `strata`, a list of arrays (seeds,), one a task, and its 95 % bootstrap
    interval: seeds are drawn anew within each task. -> mean, low, high; the last two None if no task has two seeds."""
    strata = [np.asarray(stratum, dtype=float) for stratum in strata]
    mean = float(stats.trim_mean(np.concatenate(strata), 0.25))
    drawn, fixed = [s for s in strata if len(s) > 1], [s for s in strata if len(s) == 1]
    if not drawn:
        return mean, None, None

    def statistic(*samples, axis):
        rest = [np.broadcast_to(s, (*samples[0].shape[:-1], 1)) for s in fixed]  # nothing to draw from
        return stats.trim_mean(np.concatenate([*samples, *rest], axis=-1), 0.25, axis=-1)

    rng = np.random.default_rng(0)
    found = stats.bootstrap(drawn, statistic, n_resamples=2000, method="percentile", rng=rng).confidence_interval
    return mean, float(found.low), float(found.high)


def cell(strata):
    strata = [[value for value in stratum if value is not None] for stratum in strata]
    strata = [stratum for stratum in strata if stratum]
    if not strata:
        return "–"
    mean, low, high = interval(strata)
    return f"{mean:.1f}" if low is None else f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def table(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---" for _ in head], *rows))


def group_table(runs, group):
    rows, tasks = [], studied(chosen(runs, group))
    every = [run for variants in tasks.values() for found in variants.values() for run in found]
    shown = [i for i in range(len(HEADINGS)) if any(run[COLUMNS[i]] is not None for run in every)]
    for task, variants in tasks.items():
        for variant, found in variants.items():
            cells = [cell([[run[COLUMNS[i]] for run in found]]) for i in shown]
            rows.append([*([task] if len(tasks) > 1 else []), GROUPS[group][1][variant], len(found), *cells])
    return table([*(["task"] if len(tasks) > 1 else []), "variant", "seeds", *(HEADINGS[i] for i in shown)], rows)


def aggregate(runs, methods=METHODS):
    """-> {title of the method: {task: its runs}}, ordered by seed"""
    found = {}
    for title, (group, variant) in methods.items():
        tasks = {task: variants[variant] for task, variants in chosen(runs, group).items() if variant in variants}
        if tasks:
            found[title] = tasks
    return found


def balanced(tasks):
    """The first seeds of each task, as many as the task with the fewest has: else tasks with more would count more."""
    seeds = min(map(len, tasks.values()))
    return {task: found[:seeds] for task, found in tasks.items()}


def aggregate_table(runs):
    """A row for each method on each task, and one for all its tasks together."""
    rows = []
    for title, tasks in aggregate(runs).items():
        moving = {task: found for task, found in tasks.items() if task in TASKS}  # locomotion; mazes have other scores
        together = {f"all {len(moving)}": balanced(moving)} if len(moving) > 1 else {}
        for name, strata in {**{task: {task: found} for task, found in tasks.items()}, **together}.items():
            every = [run for found in strata.values() for run in found]
            steps = {run["online_steps"] for run in every}
            selection = f"{np.mean([run['selection_steps'] for run in every]):,.0f}"
            columns = ("offline", "final", "auc", "lowest", "initial_drop")
            cells = [cell([[run[column] for run in found] for found in strata.values()]) for column in columns]
            rows.append([title, name, len(every), " / ".join(f"{n:,}" for n in sorted(steps)), selection, *cells])
    head = ["method", "task", "runs", "online steps", "selection steps"]
    scores = ["offline", "last 5 evaluations", "mean online", "lowest online", "initial drop"]
    return table([*head, *scores], rows)


def compared(runs, task="hopper-medium-v2"):
    """-> {title: its runs on this task}; of O2SAC's two budgets the larger, without it in the title."""
    runs = [run for run in runs if stage_of(run, "online")]
    found = {title: tasks[task] for title, tasks in aggregate(runs, COMPARED).items() if task in tasks}
    longer = found.pop("O2SAC, best, 8,000 steps", None)
    return found | ({"O2SAC, best": longer} if longer else {})


def comparison_table(runs):
    """All methods on one task, best first, with what they cost: environment steps, those of the evaluations that choose
    a policy, and minutes."""
    rows = []
    for title, found in compared(runs).items():
        cells = [cell([[run[column] for run in found]]) for column in ("offline", "final", "auc", "lowest")]
        costs = [
            f"{np.mean([run[key] for run in found]):,.0f}" for key in ("online_steps", "selection_steps", "minutes")
        ]
        rows.append((interval([[run["final"] for run in found]])[0], [title, len(found), *cells, *costs]))
    head = ["method", "seeds", "offline", "last 5 evaluations", "mean online", "lowest online"]
    rows = [row for _, row in sorted(rows, key=lambda row: -row[0])]
    return table([*head, "environment steps", "selection steps", "minutes"], rows)


def transfer(runs):
    """-> {task: {(source, script): its runs}}, of the tasks on which a policy of another origin was fine-tuned. The
    policy of a script's own kind is its usual start."""
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        own = OWN.get(run["script"], (None, None))
        source = own[0] if run["variant"] == own[1] else run["variant"].removeprefix("from-")
        if run["script"] in OWN and source in SOURCES:
            found[run["task"]][source, run["script"]].append(run)
    origins = {task: {run["variant"] for cells in found[task].values() for run in cells} for task in found}
    return {task: dict(found[task]) for task in sorted(found) if any(v.startswith("from-") for v in origins[task])}


def teacher_score(found):
    """Of the policy of the offline algorithm, over many episodes; None if it is not one that ships."""
    policies = {run["policy"] for run in found}
    return (measured_policies()[1].get(policies.pop()) or {}).get("score") if len(policies) == 1 else None


def transfer_table(runs):
    """A row for each offline policy and online script: the policy, the copy of it that the run starts from, what became
    of that."""
    rows = []
    for task, cells in transfer(runs).items():
        for source, script in ((source, script) for source in SOURCES for script in OWN if (source, script) in cells):
            found = cells[source, script]
            teacher = "–" if (score := teacher_score(found)) is None else f"{score:.1f}"
            columns = ("offline", "aligned", "lowest", "final")
            values = [cell([[run[column] for run in found]]) for column in columns]
            rows.append([task, SOURCES[source], teacher, METHOD_OF[script], len(found), *values])
    head = ["task", "offline policy", "its score", "script", "seeds", "start of the run", "aligned", "lowest online"]
    return table([*head, "last 5 evaluations"], rows)


def draw_transfer(runs, path):
    """A map for each task: offline policies by online scripts, coloured by the score in the end."""
    tasks = transfer(runs)
    size = {"figsize": (4.6 * len(tasks), 3.6), "layout": "constrained", "squeeze": False}
    drawing, axes = plt.subplots(1, len(tasks), **size)
    for axis, (task, cells) in zip(axes[0], tasks.items(), strict=True):
        sources = [source for source in SOURCES if any(s == source for s, _ in cells)]
        final = np.full((len(sources), len(OWN)), np.nan)
        for (source, script), found in cells.items():
            i, j, mean = sources.index(source), [*OWN].index(script), interval([[run["final"] for run in found]])[0]
            score = teacher_score(found)
            start = interval([[run["offline"] for run in found]])[0] if score is None else score
            text = f"{rounded(start)} → {rounded(mean)}\n({len(found)})"
            final[i, j] = mean
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if mean < 60 else "black")
        image = axis.imshow(final, vmin=0, vmax=110, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(OWN)), [METHOD_OF[script] for script in OWN])
        axis.set_yticks(range(len(sources)), [SOURCES[source] for source in sources])
        axis.set_title(f"{task}: offline → online (seeds)", fontsize=9)
    drawing.colorbar(image, ax=axes[0][-1], label="last 5 evaluations")
    save(drawing, path)


def measured_policies():
    """-> number of episodes, {hopper-medium-v2/cql.pt: {score, error, ...}}: the file that tools/enjoy.py keeps."""
    try:
        measured = json.loads((RESULTS / "policies.json").read_text())
        return measured["episodes"], measured["policies"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{RESULTS / 'policies.json'} is missing or damaged ({error})") from error


def main_table(runs):
    """Every method on every task: offline score -> mean of the last five evaluations (number of seeds). Offline is the
    score over many episodes where all runs of a cell started from one shipped policy, else that of the runs."""
    lines, (_, measured) = [], measured_policies()
    for title, (group, variant) in METHODS.items():
        lines += [lists[title] for lists in (NAIVE, INTERVAL) if title in lists]
        lines.append((title.removesuffix(", 8,000 steps"), group, variant))
    found = {group: chosen(runs, group) for _, group, _ in lines}
    tasks, rows = (
        [task for task in (*TASKS, *MAZES, *KITCHENS) if any(task in by_task for by_task in found.values())],
        [],
    )
    for title, group, variant in lines:
        cells = [found[group].get(task, {}).get(variant, []) for task in tasks]
        if steps := dict.fromkeys(run["online_steps"] for cell in cells for run in cell):  # in the order of the tasks
            budget = " / ".join(f"{n:,}" for n in steps)
            rows.append([title, budget, *(main_cell(cell, measured) for cell in cells)])
    return table(["method", "online steps", *(task.rsplit("-v", 1)[0] for task in tasks)], rows)


def rounded(x):
    """To the nearest whole number, halves up: Python's own rounding takes 68.5 to 68 and 69.5 to 70."""
    return math.floor(x + 0.5)


def main_cell(runs, measured):
    if not runs:
        return "–"
    policies = {run["policy"] for run in runs}
    known = measured.get(policies.pop()) if len(policies) == 1 else None
    offline = known["score"] if known else interval([[run["offline"] for run in runs]])[0]
    mean, low, high = interval([[run["final"] for run in runs]])
    spread = "" if low is None else f" [{rounded(low)}, {rounded(high)}]"
    return f"{rounded(offline)} → {rounded(mean)}{spread} ({len(runs)})"


def load_policy(path):
    return path, torch.load(path, map_location="cpu", weights_only=True)


def megabytes(path):
    return f"{path.stat().st_size / 1e6:.1f} MB"


def checkpoint_table():
    """The offline policies that ship, their last evaluation in training and their score by tools/enjoy.py."""
    rows, (episodes, measured) = [], measured_policies()
    for path, saved in readable(load_policy, (ROOT / "offline/checkpoints").glob("*-v[0-9]/*.pt")):
        name, score = f"{path.parent.name}/{path.name}", saved.get("score")
        critics = f"{saved['num_critics']} critics" if "num_critics" in saved else "policy only"
        mean = "{score:.1f} ± {error:.1f}".format(**measured[name]) if name in measured else "–"
        last = "–" if score is None else f"{score:.1f}"
        rows.append([f"`{name}`", saved["algorithm"], f"{saved['step']:,}", last, mean, critics, megabytes(path)])
    scores = ["last evaluation", f"{episodes} episodes"]
    return table(["offline/checkpoints/", "algorithm", "updates", *scores, "holds", "size"], rows)


def behaviour_table():
    """The policies that make the data: of one SAC run each, scored by 10 episodes of its samples."""
    rows = []
    for path, saved in readable(load_policy, (ROOT / "offline/checkpoints/behaviour").glob("*.pt")):
        for quality in ("medium", "expert"):
            snapshot = saved[quality]
            if snapshot is None or saved["env"] == "ant":  # docs/data.md has the ant's success in the mazes
                continue
            numbers = [f"{snapshot['step']:,}", f"{snapshot['return']:,.0f}", f"{snapshot['score']:.1f}"]
            rows.append([saved["env"], quality, *numbers, len(saved["ladder"]), megabytes(path)])
    return table(["environment", "snapshot", "SAC steps", "mean return", "score", "rungs to medium", "file"], rows)


def alpha_table(runs):
    rows = []
    for alpha, curves in alphas(runs):
        scores = [[score for _, score in curve] for curve in curves]
        parts = [[np.mean(s[: len(s) // 2]) for s in scores], [np.mean(s[len(s) // 2 :]) for s in scores]]
        rows.append([alpha, len(curves), *(cell([part]) for part in (*parts, [min(s) for s in scores]))])
    return table(["α", "seeds", "first half of alignment", "second half", "lowest evaluation"], rows)


def alphas(runs):
    """-> [(alpha, [curve of the scores during alignment, one a seed])]; the method itself has the default, 0.2."""
    found = defaultdict(list)
    for run in runs:
        if run["script"] == "o2o_sac" and run["variant"].startswith("alpha-"):
            found[run["task"], float(run["variant"].removeprefix("alpha-"))].append(stage_of(run, "align"))
    for run in runs:
        if (run["script"], run["variant"]) == ("o2o_sac", "full") and run["task"] in {task for task, _ in found}:
            found[run["task"], 0.2].append(stage_of(run, "align"))
    return [(alpha, curves) for (_, alpha), curves in sorted(found.items())]


def load_critics(folder):
    """-> (task, offline score, {critic: curve}) of a run of benchmark/critics.py; None if it was cut off."""
    summary = json.loads((folder / "summary.json").read_text())
    if summary["status"] != "complete":
        return None
    rows = rows_of(folder)
    curves = {critic: [(r["step"], r[f"{critic}/score"]) for r in rows if r["stage"] == critic] for critic in CRITICS}
    return summary["env_id"], summary["offline_score"], curves


def critics(results):
    """-> {(task, critic): [curve of an actor's scores, one a seed]}, {task: offline scores}."""
    curves, offline = defaultdict(list), defaultdict(list)
    folders = [path.parent for path in results.glob("critics/*/study/*/summary.json")]
    for task, score, found in readable(load_critics, folders):
        offline[task].append(score)
        for critic, points in found.items():
            curves[task, critic].append(points)
    return curves, offline


def critic_table(curves, offline):
    rows = []
    for (task, critic), found in sorted(curves.items(), key=lambda item: (item[0][0], [*CRITICS].index(item[0][1]))):
        scores = [[score for _, score in curve] for curve in found]
        parts = [offline[task], [s[0] for s in scores], [min(s) for s in scores], [np.mean(s[-5:]) for s in scores]]
        rows.append([task, CRITICS[critic], len(found), *(cell([part]) for part in parts)])
    first = next(iter(curves.values()))[0][0][0]
    head = ["task", "critic", "seeds", "offline", f"after {first:,} updates", "lowest", "last 5 evaluations"]
    return table(head, rows)


def stage_of(run, stage):
    return [(step, score) for s, step, score in run["curve"] if s == stage]


def save(drawing, path):
    drawing.savefig(path, dpi=110, metadata={"Software": None})  # matplotlib's version would change the bytes
    plt.close(drawing)


def plot_band(axis, curves, label, color):
    """Mean over seeds with their range; between the points of a curve, lines."""
    steps = sorted({step for curve in curves for step, _ in curve})
    scores = np.array([np.interp(steps, *zip(*curve, strict=True)) for curve in curves])
    axis.plot(steps, scores.mean(0), label=label, color=color)
    if len(curves) > 1:
        axis.fill_between(steps, scores.min(0), scores.max(0), color=color, alpha=0.15)


def draw_curves(runs, group, path):
    """Scores during alignment and online, one row of panels a task."""
    tasks, titles = studied(chosen(runs, group)), GROUPS[group][1]
    every = [run for variants in tasks.values() for found in variants.values() for run in found]
    stages = [stage for stage in STAGES if any(stage_of(run, stage) for run in every)]
    size = (5 * len(stages), 3.8 * len(tasks))
    drawing, axes = plt.subplots(
        len(tasks), len(stages), figsize=size, layout="constrained", squeeze=False, sharey="row"
    )
    for row, (task, variants) in zip(axes, tasks.items(), strict=True):
        for axis, stage in zip(row, stages, strict=True):
            for variant, found in variants.items():
                curves = [stage_of(run, stage) for run in found]
                longer = variant == "full" and "full-8000" in variants  # the same runs, continued
                if all(curves) and not longer:
                    plot_band(axis, curves, titles[variant], f"C{[*titles].index(variant)}")
            offline = np.mean([run["offline"] for found in variants.values() for run in found])
            axis.axhline(offline, color="black", linestyle="--", label="offline policy")
            axis.set_title(f"{task}: {STAGES[stage]}")
            axis.set_xlabel("updates" if stage == "align" else "environment steps")
        row[0].set_ylabel("normalised score")
        row[-1].legend(fontsize=8)
    save(drawing, path)


def draw_tasks(runs, path):
    """Scores online of the methods that ran on several tasks, locomotion if there is any: one column a method, one row
    a task."""
    columns = defaultdict(lambda: defaultdict(dict))  # method -> task -> {how it replaces its reference: runs}
    for title, by_task in aggregate(runs, COMPARED).items():
        name, _, way = title.partition(", ")
        for task, found in by_task.items():
            columns[name][task][way.removesuffix(", 8,000 steps")] = found  # these go on with the shorter ones
    every = {task for by_task in columns.values() for task in by_task}
    tasks = [task for task in TASKS if task in every] or sorted(every)
    found = {name: by_task for name, by_task in columns.items() if sum(task in by_task for task in tasks) > 1}
    if not found:
        return
    size = {"figsize": (3.2 * len(found), 2.4 * len(tasks)), "layout": "constrained", "squeeze": False}
    drawing, axes = plt.subplots(len(tasks), len(found), **size, sharey="row", sharex="col")
    for row, task in zip(axes, tasks, strict=True):
        row[0].set_ylabel(f"{task}\nscore", fontsize=8)
        for axis, by_task in zip(row, found.values(), strict=True):
            ways = by_task.get(task, {})
            for way, group in ways.items():
                curves = [stage_of(run, "online") for run in group]
                plot_band(axis, curves, way or "policy", "C2" if way == "interval" else "C0")
                if acting := [curve for run in group if (curve := stage_of(run, "acting"))]:
                    plot_band(axis, acting, "as it acts", "C1")
            if ways:
                offline = np.mean([run["offline"] for group in ways.values() for run in group])
                axis.axhline(offline, color="black", linestyle="--")
                axis.legend(fontsize=7)
            else:
                axis.text(0.5, 0.5, "not run", transform=axis.transAxes, ha="center")
    for top, bottom, title in zip(axes[0], axes[-1], found, strict=True):
        top.set_title(title, fontsize=10)
        bottom.set_xlabel("environment steps")
        bottom.locator_params(axis="x", nbins=4)
    save(drawing, path)


def draw_bars(bars, axis):
    """bars: [(label, strata, colour)], interquartile means with their intervals."""
    for i, (_, strata, color) in enumerate(bars):
        mean, low, high = interval(strata)
        error = None if low is None else [[mean - low], [high - mean]]
        axis.barh(i, mean, xerr=error, color=color, height=0.7, capsize=3)
    axis.set_yticks(range(len(bars)), [label for label, _, _ in bars], fontsize=8)
    axis.invert_yaxis()


def draw_ablations(runs, path):
    """The mean of the last five evaluations of every variant, over the tasks that have several; the offline policy as a
    line."""
    groups = {group: studied(tasks) for group in TITLES if (tasks := chosen(runs, group))}
    drawing, axes = plt.subplots(1, len(groups), figsize=(3.4 * len(groups), 2.6), layout="constrained", squeeze=False)
    for axis, (group, tasks) in zip(axes[0], groups.items(), strict=True):
        bars = []
        for i, (variant, title) in enumerate(GROUPS[group][1].items()):
            strata = [[run["final"] for run in variants[variant]] for variants in tasks.values() if variant in variants]
            if strata and variant != "full-8000":
                bars.append((title, strata, f"C{i}"))
        draw_bars(bars, axis)
        offline = [run["offline"] for variants in tasks.values() for found in variants.values() for run in found]
        axis.axvline(np.mean(offline), color="black", linestyle="--")
        axis.set(title=TITLES[group], xlabel="last 5 evaluations")
    save(drawing, path)


def draw_aggregate(runs, path):
    """Offline and fine-tuned score of each method, over all its tasks."""
    bars = []
    for title, tasks in aggregate(runs).items():
        if not (tasks := {task: found for task, found in tasks.items() if task in TASKS}):
            continue
        tasks = balanced(tasks)
        for column, label, color in (("offline", "offline", "0.7"), ("final", "fine-tuned", "C0")):
            bars.append((f"{title}, {label}", [[run[column] for run in found] for found in tasks.values()], color))
    drawing, axis = plt.subplots(figsize=(6, 0.3 * len(bars) + 1), layout="constrained")
    draw_bars(bars, axis)
    axis.set_xlabel("normalised score, interquartile mean and 95 % interval")
    save(drawing, path)


def draw_comparison(runs, path):
    """All methods on one task: scores over all environment steps, those of the selection spread over the run, and over
    minutes; the means of the last five evaluations."""
    drawing, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for i, (title, found) in enumerate(compared(runs).items()):
        own = title.startswith(("O2", "O3"))  # the project's methods stand out from those they are compared with
        style = {"color": f"C{i % 10}", "label": title, "linewidth": 2.5 if own else 1.0}
        counted = [1 + run["selection_steps"] / run["online_steps"] for run in found]
        curves = [
            [(x * step, score) for step, score in stage_of(run, "online")]
            for x, run in zip(counted, found, strict=True)
        ]
        steps = sorted({step for step, _ in curves[0]})
        scores = np.mean([np.interp(steps, *zip(*curve, strict=True)) for curve in curves], axis=0)
        scores = [
            scores[max(0, k - 4) : k + 1].mean() for k in range(len(scores))
        ]  # of the last five, as the table has it
        left.plot(steps, scores, "-" if i < 10 else "--", **style)
        minutes, final = (np.mean([run[key] for run in found]) for key in ("minutes", "final"))
        right.plot(minutes, final, "o" if i < 10 else "s", **style)
        right.annotate(title, (minutes, final), fontsize=8, xytext=(4, 3), textcoords="offset points")
    left.set(xscale="log", xlabel="environment steps, selection counted", ylabel="normalised score")
    right.set(xscale="log", xlabel="minutes, all stages, one core", ylabel="last 5 evaluations")
    left.legend(fontsize=7, ncols=2)
    save(drawing, path)


def draw_methods(runs, path):
    """The scores online of all methods on one task, a panel a method, a line a seed."""
    found = compared(runs)
    rows = -(-len(found) // 5)
    size = {"figsize": (12, 2.2 * rows), "layout": "constrained", "squeeze": False, "sharey": True}
    drawing, axes = plt.subplots(rows, 5, **size)
    for axis, (title, group) in zip(axes.flat, found.items(), strict=False):
        for run in group:
            axis.plot(*zip(*stage_of(run, "online"), strict=True), linewidth=0.8)
        axis.axhline(np.mean([run["offline"] for run in group]), color="black", linestyle="--", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.locator_params(axis="x", nbins=3)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    save(drawing, path)


def draw_alphas(runs, path):
    drawing, axis = plt.subplots(figsize=(5, 3.8), layout="constrained")
    for i, (alpha, curves) in enumerate(alphas(runs)):
        plot_band(axis, curves, f"α = {alpha}", f"C{i}")
    axis.set(title="O2SAC: the policy during alignment", xlabel="updates", ylabel="normalised score")
    axis.legend(fontsize=8)
    save(drawing, path)


def draw_critics(curves, offline, path):
    tasks = sorted(offline)
    size = {"figsize": (5 * len(tasks), 3.8), "layout": "constrained", "squeeze": False}
    drawing, axes = plt.subplots(1, len(tasks), **size)
    for axis, task in zip(axes[0], tasks, strict=True):
        for i, (critic, title) in enumerate(CRITICS.items()):
            plot_band(axis, curves[task, critic], title, f"C{i}")
        axis.axhline(np.mean(offline[task]), color="black", linestyle="--", label="offline policy")
        axis.set(title=f"{task}: an actor updated offline", xlabel="updates", ylabel="normalised score")
        axis.legend(fontsize=8)
    save(drawing, path)


def long_alignments(results):
    """-> [(name, rows of the alignment)] of the runs with the paper's budgets, studies/long_alignment/<name>."""
    folders = sorted(path.parent for path in results.glob("studies/long_alignment/*/metrics.jsonl"))
    found = [(folder.name, [row for row in rows_of(folder) if row["stage"] == "align"]) for folder in folders]
    return [(name, rows) for name, rows in found if rows]


def draw_long_alignments(found, path):
    """What an alignment does: the policy's score, its distance from the offline policy, and how large the critics'
    error still is (root mean square of two critics at two actions a state) beside the preference that they learn."""
    size = {"figsize": (13, 3.6 * len(found)), "layout": "constrained", "squeeze": False}
    drawing, axes = plt.subplots(len(found), 3, **size)
    for row, (name, rows) in zip(axes, found, strict=True):
        steps = [r["step"] for r in rows]
        row[0].plot(steps, [r["align/score"] for r in rows], ".-", label="score")
        row[1].plot(steps, [r["align/divergence"] for r in rows], ".-", color="C1", label="f, from the offline policy")
        row[2].plot(steps, [(r["align/critic_loss"] / 4) ** 0.5 for r in rows], ".-", label="error of the critics")
        row[2].plot(
            steps, [r["align/lowered"] for r in rows], ".-", color="C3", label="preference: how much is lowered"
        )
        for axis in row:
            axis.set(title=name, xlabel="updates")
            axis.legend(fontsize=8)
    save(drawing, path)


def csv_files(runs):
    """runs.csv: a row a run; curves.csv: a row an evaluation. -> {name: text}"""
    keys = ["script", "task", "variant", "seed"]
    numbers = [*COLUMNS, "online_steps", "selection_steps", "minutes"]
    tables = {
        "runs.csv": [[*keys, *numbers], *([run[key] for key in (*keys, *numbers)] for run in runs)],
        "curves.csv": [[*keys, "stage", "step", "score"]]
        + [[run[key] for key in keys] + [*point] for run in runs for point in run["curve"]],
    }
    files = {}
    for name, rows in tables.items():
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([[f"{x:.2f}" if isinstance(x, float) else x for x in row] for row in rows])
        files[name] = file.getvalue()
    return files


def all_tables(runs, curves, offline):
    """-> {name: table} of everything that has runs."""
    tables = {"aggregate": aggregate_table(runs)} if aggregate(runs) else {}
    tables |= {"comparison": comparison_table(runs)} if compared(runs) else {}
    tables |= {group: group_table(runs, group) for group in STUDIED if chosen(runs, group)}
    tables |= {"transfer": transfer_table(runs)} if transfer(runs) else {}
    tables |= {"alpha": alpha_table(runs)} if alphas(runs) else {}
    return tables | ({"critics": critic_table(curves, offline)} if curves else {})


def filled(path, tables):
    """-> the text of a README with the tables between their markers, <!-- results: NAME --> and <!-- end -->."""
    text = path.read_text() if path.exists() else ""
    for name, lines in tables.items():
        marker = f"<!-- results: {name} -->" if name else "<!-- results -->"
        parts = rf"({marker}\n).*?(<!-- end -->)"
        text, count = re.subn(parts, lambda match, lines=lines: f"{match[1]}{lines}\n{match[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise UserError(f"{path} has {count} places for a table, {marker} to <!-- end -->, instead of one")
    return text


def files_of(results, runs, curves, offline):
    """-> {path: text} of everything but the figures."""
    files = {results / name: text for name, text in csv_files(runs).items()}
    tables = all_tables(runs, curves, offline)
    if results != RESULTS:
        return files | {results / "report.md": "\n\n".join(f"## {n}\n\n{lines}" for n, lines in tables.items()) + "\n"}
    tables |= {"checkpoints": checkpoint_table(), "behaviour": behaviour_table()}
    files[ROOT / "README.md"] = filled(ROOT / "README.md", {"": main_table(runs)})
    return files | {RESULTS / "README.md": filled(RESULTS / "README.md", tables)}


def draw(results, runs, curves, offline):
    for group in TITLES:
        if chosen(runs, group):
            draw_curves(runs, group, results / f"{group}.png")
    if aggregate(runs):
        draw_ablations(runs, results / "ablations.png")
        draw_aggregate(runs, results / "aggregate.png")
        draw_tasks(runs, results / "tasks.png")
    if compared(runs):
        draw_comparison(runs, results / "comparison.png")
        draw_methods(runs, results / "methods.png")
    if transfer(runs):
        draw_transfer(runs, results / "transfer.png")
    if alphas(runs):
        draw_alphas(runs, results / "alpha.png")
    if found := long_alignments(results):
        draw_long_alignments(found, results / "long_alignment.png")
    if curves:
        draw_critics(curves, offline, results / "critics.png")


def main(args: Args):
    results = args.results.resolve()
    runs, (curves, offline) = load(results), critics(results)
    if not runs and not curves:
        raise UserError(f"no complete run in {results}; they lie in <script>/<task>/<variant>/<seed>")
    files = files_of(results, runs, curves, offline)
    if args.check:
        stale = [path for path, text in files.items() if not path.exists() or path.read_bytes() != text.encode()]
        if stale:
            names = ", ".join(map(str, stale))
            sys.exit(f"error: not what the runs give: {names}; python benchmark/report.py writes them anew")
        return
    for path, text in files.items():
        path.write_text(text)
    draw(results, runs, curves, offline)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.splitlines()[0]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
