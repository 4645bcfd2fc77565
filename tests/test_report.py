"""The statistics of the report, and that the committed tables come out of the committed runs."""

import hashlib
import json
import shutil

import enjoy
import lapo
import numpy as np
import pytest
import report
import torch
from conftest import ROOT, TASK, tiny_policy


def test_every_figure_is_shown_and_every_table_has_a_place():
    """That the tables are those of the runs is what `python benchmark/report.py --check` tells."""
    shown = (ROOT / "README.md").read_text() + (ROOT / "results/README.md").read_text().replace("](", "](results/")
    for path in report.RESULTS.glob("*.png"):
        assert f"](results/{path.name})" in shown, f"no README shows {path.name}"


def test_check_sees_a_table_that_is_stale(tmp_path, monkeypatch):
    run_folder(tmp_path, "o2o_td3", "full", 1, [40.0, 60.0, 70.0])
    report.main(report.Args(tmp_path))
    report.main(report.Args(tmp_path, check=True))
    (tmp_path / "runs.csv").write_text((tmp_path / "runs.csv").read_text().replace("70.00", "71.00"))
    with pytest.raises(SystemExit, match=r"runs\.csv"):
        report.main(report.Args(tmp_path, check=True))


def test_every_policy_that_ships_was_scored_as_it_is():
    measured = json.loads((report.RESULTS / "policies.json").read_text())["policies"]
    for path in (ROOT / "offline/checkpoints").glob("*-v[0-9]/*.pt"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert measured[f"{path.parent.name}/{path.name}"]["sha256"] == digest, (
            "run tools/enjoy.py with --json results/policies.json"
        )


def test_the_score_of_a_policy_is_the_mean_of_its_episodes(tmp_path, minari_store):
    paths = [str(ROOT / "offline/checkpoints" / TASK / f"{name}.pt") for name in ("iql", "lapo")]
    found = enjoy.main(enjoy.Args(checkpoint=paths[:1], episodes=20, json=str(tmp_path / "scores.json")))
    (score,) = found.values()
    assert score["score"] == pytest.approx(90, abs=4) and 0 < score["error"] < 3
    assert json.loads((tmp_path / "scores.json").read_text())["policies"] == found
    data = enjoy.load_data(enjoy.Args(env_id=TASK), torch.device("cpu"))
    assert enjoy.load_mode(paths[1], data)[0](torch.zeros(2, 11)).shape == (2, 3)


def test_a_policy_of_the_users_own_data_is_scored_on_them(tmp_path, pendulum):
    """Its rewards are never positive, for which LAPO's scale needs a bias; the checkpoint names the dataset."""
    with pytest.raises(lapo.UserError, match="--reward-bias, here and for o3f.py"):
        tiny_policy(lapo, tmp_path, env_id=pendulum)
    path = tiny_policy(lapo, tmp_path, env_id="pendulum-mine-v0", dataset=f"o2o/{pendulum}", reward_bias=17.0,
                       run_dir=str(tmp_path / "with a bias"))  # fmt: skip
    assert lapo.load_file(path)["reward_scale"] > 1 / 17
    (score,) = enjoy.main(enjoy.Args(checkpoint=(str(path),), episodes=2)).values()
    assert -500 < score["score"] < 100  # of the dataset's reference returns


def test_interquartile_mean_and_its_interval():
    mean, low, high = report.interval([[0, 10, 20, 90]])
    assert mean == 15 and 0 <= low < mean < high <= 90
    assert report.interval([[7.0]]) == (7.0, None, None)
    mean, low, high = report.interval([[0], [50], [100, 101, 102, 103, 104]])
    assert low <= mean <= high
    assert report.interval([[3.0, 3.0, 3.0]]) == (3.0, 3.0, 3.0)


def test_the_bootstrap_is_stratified_by_task():
    """Seeds of a task take each other's place, tasks do not: two tasks without spread give no interval at all, although
    their scores differ; unstratified they would."""
    mean, low, high = report.interval([[10.0, 10.0], [90.0, 90.0]])
    assert mean == low == high == 50
    rng = np.random.default_rng(1)
    strata = [list(rng.normal(center, 1, size=8)) for center in (0, 100)]
    _, low, high = report.interval(strata)
    _, wide_low, wide_high = report.interval([strata[0] + strata[1]])
    assert high - low < 0.2 * (wide_high - wide_low)


def run_folder(root, script, variant, seed, scores, status="complete", task=TASK):
    folder = root / script / task / variant / str(seed)
    folder.mkdir(parents=True)
    summary = {"status": status, "offline_score": 50.0, "aligned_score": None, "initial_drop": 1.0, "auc": 60.0}
    summary |= {
        "final_score": scores[-1],
        "best_score": max(scores),
        "online_steps": 30,
        "selection_steps": 0,
        "wall_seconds": 600.0,
    }
    summary |= {"scores": [[10 * (i + 1), score] for i, score in enumerate(scores)]}
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [{"stage": "online", "step": step, "online/score": score} for step, score in summary["scores"]]
    rows[1] |= {"online/score_acting": 30.0, "online/episodes": 1}  # not every interval has an episode that ends
    rows[2] |= {"online/score_acting": 40.0, "online/episodes": 3}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_selection_steps_are_counted_unless_they_decided_nothing(tmp_path):
    for variant in ("full", "interval"):
        run_folder(tmp_path, "o2o_td3", variant, 1, [40.0, 60.0, 70.0])
        path = tmp_path / "o2o_td3" / TASK / variant / "1/summary.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"selection_steps": 7}))
    assert {run["variant"]: run["selection_steps"] for run in report.load(tmp_path)} == {"full": 7, "interval": 0}


def test_tables_of_runs_made_by_hand(tmp_path):
    for seed, last in ((1, 70.0), (2, 80.0), (3, 90.0)):
        run_folder(tmp_path, "o2o_td3", "full", seed, [40.0, 60.0, last])
    run_folder(tmp_path, "o2o_td3", "no-align", 1, [30.0, 20.0, 25.0])
    run_folder(tmp_path, "o2o_td3", "no-align", 2, [99.0, 99.0, 99.0], status="interrupted")
    report.main(report.Args(tmp_path))
    rows = (tmp_path / "report.md").read_text().split("## o2o_td3\n\n")[1].strip().splitlines()[2:]
    full, ablated = ([word.strip() for word in row.strip("|").split("|")] for row in rows)
    assert full[:3] == ["full method", "3", "50.0 [50.0, 50.0]"]
    assert full[4] == "40.0 [40.0, 40.0]" and full[6].startswith("80.0 [7") and full[7].startswith("37.5")
    assert ablated == ["no alignment", "1", "50.0", "1.0", "20.0", "60.0", "25.0", "37.5"]
    run_folder(tmp_path, "proto", "td3", 1, [40.0, 60.0, 95.0])
    report.main(report.Args(tmp_path))
    table = (tmp_path / "report.md").read_text().split("## comparison\n\n")[1].split("\n\n")[0]
    rows = [[word.strip() for word in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    assert rows[0] == ["PROTO+TD3", "1", "50.0", "95.0", "60.0", "40.0", "30", "0", "10"]  # the best first
    assert rows[1][:2] == ["O2TD3, best", "3"] and len(rows) == 2 and (tmp_path / "comparison.png").exists()
    shutil.rmtree(tmp_path / "proto")
    report.main(report.Args(tmp_path))
    lines = (tmp_path / "runs.csv").read_text().splitlines()
    assert len(lines) == 5 and lines[1].startswith(
        f"o2o_td3,{TASK},full,1,50.00,,1.00,40.00,60.00,70.00,37.50,70.00,,30"
    )
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 4 * 5


def test_the_transfer_table_has_a_row_for_each_policy_and_script(tmp_path):
    """Those of the script's own class are its usual runs, and a task without a policy from elsewhere has no rows."""
    for script, variant, last in (
        ("o2o_td3", "from-cql", 90.0),
        ("o2o_td3", "full", 70.0),
        ("o2o_sac", "from-td3_bc", 80.0),
        ("o2o_sac", "full-8000", 60.0),
        ("o2o_sac", "full", 1.0),  # the shorter budget
        ("o2o_td3", "no-align", 2.0),
    ):
        run_folder(tmp_path, script, variant, 1, [40.0, 60.0, last])
    run_folder(tmp_path, "o2o_td3", "full", 1, [40.0, 60.0, 3.0], task="walker2d-medium-v2")
    folder = tmp_path / "o2o_td3" / TASK / "from-cql" / "1"
    given = {"algorithm": "o2o_td3", "env_id": TASK, "checkpoint": f"/x/offline/checkpoints/{TASK}/cql.pt"}
    (folder / "args.json").write_text(json.dumps(given))
    report.main(report.Args(tmp_path))
    lines = (tmp_path / "report.md").read_text().split("## transfer\n\n")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[word.strip() for word in line.strip("|").split("|")] for line in lines]
    score = f"{report.measured_policies()[1][f'{TASK}/cql.pt']['score']:.1f}"
    assert [(row[1], row[2], row[3], row[-1]) for row in rows] == [
        ("CQL", "–", "O2SAC", "60.0"),
        ("CQL", score, "O2TD3", "90.0"),
        ("TD3+BC", "–", "O2SAC", "80.0"),
        ("TD3+BC", "–", "O2TD3", "70.0"),
    ]
    assert {row[0] for row in rows} == {TASK} and (tmp_path / "transfer.png").exists()


def test_a_damaged_run_folder_is_named_and_left_out(tmp_path, capsys):
    for seed in (1, 2, 3, 4):
        run_folder(tmp_path, "o2o_td3", "full", seed, [40.0, 60.0, 70.0])
    folder = tmp_path / "o2o_td3" / TASK / "full"
    (folder / "2" / "summary.json").write_text('{"status": "compl')
    (folder / "3" / "metrics.jsonl").unlink()
    (folder / "4").rename(folder / "four")
    report.main(report.Args(tmp_path))
    warnings = capsys.readouterr().err.splitlines()
    for name, line in zip(("2", "3", "four"), warnings, strict=True):
        assert line.startswith(f"warning: left out {folder / name}, which cannot be read")
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 2


def test_tasks_with_the_method_alone_stay_out_of_the_ablations(tmp_path):
    """An ablation that ran on one task is compared with the method on that task, not with its mean over all."""
    for task, seed, last in ((TASK, 1, 80.0), (TASK, 2, 80.0), ("walker2d-medium-v2", 1, 20.0)):
        run_folder(tmp_path, "o2o_td3", "full", seed, [40.0, 60.0, last], task=task)
    run_folder(tmp_path, "o2o_td3", "no-align", 1, [40.0, 60.0, 70.0])
    report.main(report.Args(tmp_path))
    text = (tmp_path / "report.md").read_text()
    rows = [[word.strip() for word in row.strip("|").split("|")] for row in text.splitlines() if row.startswith("| ")]
    assert [(row[1], row[2], row[6]) for row in rows if row[0] == "O2TD3, best" and len(row) == 10] == [
        (TASK, "2", "80.0 [80.0, 80.0]"),
        ("walker2d-medium-v2", "1", "20.0"),
        ("all 2", "2", "50.0"),  # one seed of each
    ]
    ablations = text.split("## o2o_td3\n\n")[1]
    assert "| full method | 2 |" in ablations and "walker2d" not in ablations
    assert (tmp_path / "tasks.png").exists()


@pytest.mark.parametrize("variant", ["default", "alpha-0.1"])
def test_runs_outside_the_main_tables_are_enough(tmp_path, variant):
    run_folder(tmp_path, "o2o_sac", variant, 1, [40.0, 60.0, 70.0])
    rows = [{"stage": "align", "step": step, "align/score": 10.0 * step} for step in (1, 2, 3, 4)]
    folder = tmp_path / "o2o_sac" / TASK / variant / "1"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.main(report.Args(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert ("| 0.1 | 1 | 15.0 | 35.0 | 10.0 |" in text) == (variant == "alpha-0.1")
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 2
    run_folder(tmp_path, "o2o_sac", "full", 2, [40.0, 60.0, 70.0])  # the default alpha, and the table's if there is one
    shutil.copy(folder / "metrics.jsonl", tmp_path / "o2o_sac" / TASK / "full" / "2" / "metrics.jsonl")
    report.main(report.Args(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert ("| 0.2 | 1 | 15.0 | 35.0 | 10.0 |" in text) == (variant == "alpha-0.1")


def test_no_runs_is_said(tmp_path):
    with pytest.raises(report.UserError, match="no complete run in"):
        report.main(report.Args(tmp_path))
