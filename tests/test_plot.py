"""Curves of run folders: what is averaged, what is refused, and that run folders of results/ are read."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("plot", ROOT / "tools/plot.py")
plot = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plot)


def run_folder(path, scores, task="hopper-medium-v2", algorithm="o2o_sac", **known):
    """A run folder with these (step, score) online."""
    path.mkdir(parents=True)
    rows = [{"stage": "align", "step": 1, "align/score": 9.0}, {"stage": "online", "step": 1, "online/q_mean": 1.0}]
    rows += [{"stage": "online", "step": step, "online/score": score} for step, score in scores]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "args.json").write_text(json.dumps({"algorithm": algorithm, "env_id": task, **known}))
    return path


def test_mean_and_band_over_seeds_with_different_steps():
    steps, mean, low, high = plot.over_seeds(
        [[(10, 0.0), (20, 10.0), (30, 50.0)], [(10, 20.0), (15, 20.0), (20, 40.0)]]
    )
    assert steps.tolist() == [10, 15, 20]  # as far as the shorter one
    np.testing.assert_allclose(mean, [10, 12.5, 25])
    np.testing.assert_allclose(low, [0, 5, 10])
    np.testing.assert_allclose(high, [20, 20, 40])


def test_runs_are_grouped_by_task_and_label(tmp_path):
    for seed in (1, 2):
        run_folder(tmp_path / "a" / str(seed), [(10, 1.0), (20, 2.0)])
    run_folder(tmp_path / "b", [(10, 5.0), (20, 6.0)], exp_name="mine")
    run_folder(tmp_path / "c", [(10, 5.0), (20, 6.0)], task="walker2d-medium-v2")
    drawn = {}
    original, plot.draw_panels = plot.draw_panels, lambda panels, args: drawn.update(panels)
    try:
        plot.main(plot.Args((tmp_path / "a", tmp_path / "b", tmp_path / "c")))
        assert {task: {label: len(runs) for label, runs in panel.items()} for task, panel in drawn.items()} == {
            "hopper-medium-v2": {"o2o_sac": 2, "mine": 1},
            "walker2d-medium-v2": {"o2o_sac": 1},
        }
        drawn.clear()
        plot.main(plot.Args((tmp_path / "a", tmp_path / "b"), labels=("x", "x")))
        assert {label: len(runs) for label, runs in drawn["hopper-medium-v2"].items()} == {"x": 3}
    finally:
        plot.draw_panels = original


def test_a_run_that_goes_on_is_drawn_without_the_line_that_is_being_written(tmp_path):
    folder = run_folder(tmp_path / "run", [(10, 1.0), (20, 2.0)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"stage": "online", "st')
    assert plot.load_run(folder, "online", "score")[2] == [(10, 1.0), (20, 2.0)]
    assert plot.load_run(folder, "align", "score")[2] == [(1, 9.0)]


def test_the_published_runs_are_drawn(tmp_path):
    folders = [str(ROOT / "results" / script / "hopper-medium-v2" / "default") for script in ("o2o_sac", "o2o_td3")]
    command = [sys.executable, str(ROOT / "tools/plot.py"), *folders, "--output", str(tmp_path / "new" / "figure.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "figure.png").stat().st_size > 10_000 and "2 runs" in done.stdout


def test_runs_without_scores_are_left_out(tmp_path, capsys):
    run_folder(tmp_path / "runs/good", [(10, 1.0), (20, 2.0)])
    run_folder(tmp_path / "runs/offline", [])
    plot.main(plot.Args((tmp_path / "runs",), output=tmp_path / "figure.png"))
    printed = capsys.readouterr().out
    assert f"left out {tmp_path / 'runs/offline'}" in printed and "1 runs" in printed


@pytest.mark.parametrize("case", ["missing", "empty", "no scores", "damaged", "labels", "name", "no steps in common"])
def test_bad_input_is_one_sentence(case, tmp_path):
    good, other = run_folder(tmp_path / "good", [(10, 1.0), (20, 2.0)]), tmp_path / "other"
    words = [str(good), str(other), "--output", str(tmp_path / "figure.png")]
    if case == "empty":
        other.mkdir()
    elif case == "no scores":
        run_folder(other, [])
        del words[0]
    elif case == "no steps in common":
        run_folder(other, [(100, 1.0)])
    elif case != "missing":
        run_folder(other, [(10, 1.0)])
    if case == "damaged":
        (other / "metrics.jsonl").write_text("nonsense\n")
    words += ["--labels", "one"] if case == "labels" else []
    words[-1] = str(tmp_path / "figure.doc") if case == "name" else words[-1]
    command = [sys.executable, str(ROOT / "tools/plot.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "figure.png").exists()
