"""Whole runs on a tiny dataset: the run folder, what counts, what does not change the numbers, kill and resume."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import asdict, replace

import bc
import cql
import gymnasium as gym
import iql
import lapo
import numpy as np
import pytest
import td3_bc
import torch
from conftest import ROOT, for_scripts, tiny_args, tiny_policy
from torch import nn

import o2o_ppo
import o2o_sac
import o2o_td3

OFF_POLICY = for_scripts(o2o_sac, o2o_td3)
ON_POLICY = for_scripts(o2o_ppo)


def weights(run_dir, part="nets"):
    saved = torch.load(run_dir / "resume.pt", weights_only=True)
    return {f"{key}.{name}": v for key, state in saved[part].items() for name, v in state.items() if torch.is_tensor(v)}


def assert_same(one, other):
    assert one.keys() == other.keys() and one
    for key in one:
        assert torch.equal(one[key], other[key]), key


def metrics(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_it_promises(script, tiny, tmp_path):
    summary = script.main(tiny(reference="best"))
    run = tmp_path / "run"
    assert {"args.json", "metrics.jsonl", "summary.json", "curve.png", "model.pt", "resume.pt"} <= set(os.listdir(run))
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["online_steps"] == 12
    assert [step for step, _ in summary["scores"]] == [4, 8, 12]
    scores = [score for _, score in summary["scores"]]
    assert summary["final_score"] == pytest.approx(np.mean(scores)) and summary["best_score"] == max(scores)
    start = summary["start_score"]  # of the policy that enters the stage, from the start states of all evaluations
    assert summary["initial_drop"] == pytest.approx(start - scores[1 if script is not o2o_ppo else 0])
    assert summary["lowest_score"] == min(scores) and summary["offline_error"] == 0 == summary["closing_error"]
    stages = ["reevaluate", "online"] if script is o2o_ppo else ["reevaluate", "align", "online"]
    assert (summary["aligned_score"] is None) == ("align" not in stages)
    assert set(summary["updates_per_second"]) == set(stages)
    assert summary["selection_steps"] > 0 and not set(summary) & set(script.PRIVATE.split())
    rows = metrics(run)
    assert [(row["stage"], row["step"]) for row in rows] == [
        *((stage, step) for stage in stages[:-1] for step in (2, 4)),
        *(("online", step) for step in (4, 8, 12)),
    ]
    own = {"multiplier", "divergence", "limit"} if script is not o2o_ppo else {"reference_weight", "kl"}
    assert {f"online/{key}" for key in own} <= set(rows[-1])
    model = torch.load(run / "model.pt", weights_only=True)
    assert model["algorithm"] == script.__name__ and model["format"] == 1 and model["step"] == 12
    assert model["score"] == summary["closing_score"] is not None
    again = tiny(checkpoint=str(run / "model.pt"), run_dir=str(tmp_path / "next"), online_steps=4)
    assert script.main(again)["status"] == "complete"  # a source for the next run


def test_same_seed_same_numbers_another_seed_others(script, tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.main(tiny(run_dir=str(tmp_path / name), seed=seed))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    different = weights(tmp_path / "c")
    assert any(not torch.equal(value, different[key]) for key, value in weights(tmp_path / "a").items())


def test_evaluating_more_often_changes_no_training_number(script, tiny, tmp_path):
    for name, every in (("often", 1), ("once", 3)):
        args = tiny(run_dir=str(tmp_path / name), eval_every=4 * every, eval_every_updates=5 * every)
        args.reference, args.reference_every = "interval", 5
        args.reevaluation_steps = args.alignment_steps = 15
        script.main(args)
    stages = 2 if script is o2o_ppo else 3
    assert len(metrics(tmp_path / "often")) == 3 * stages and len(metrics(tmp_path / "once")) == stages
    assert_same(weights(tmp_path / "often"), weights(tmp_path / "once"))
    chosen = [
        json.loads((tmp_path / f"{name}/summary.json").read_text())["selection_steps"] for name in ("once", "often")
    ]
    assert chosen[0] == chosen[1] and (chosen[0] > 0) == (
        script is not o2o_ppo
    )  # only the offline and the aligned policy


def test_a_dataset_brings_its_environment(script, pendulum, tmp_path):
    """Nothing in a script knows Pendulum, or that its torques reach from -2 to 2."""
    source = {o2o_sac: cql, o2o_td3: td3_bc, o2o_ppo: iql}[script]
    policy = tiny_policy(source, tmp_path, env_id=pendulum)
    args = tiny_args(script, policy, tmp_path / "online", env_id=pendulum, online_steps=80, eval_every=40)
    summary = script.main(replace(args, warm_up=70) if script is not o2o_ppo else replace(args, rollout=40))
    assert summary["status"] == "complete" and len(summary["scores"]) == 2
    assert all(-500 < score < 150 for _, score in summary["scores"])  # of reference returns, not raw ones


class Recorder(gym.Wrapper):
    def __init__(self, env, log):
        super().__init__(env)
        self.log = log

    def step(self, action):
        before = self.env.unwrapped._get_obs()
        result = self.env.step(action)
        self.log.append((before, np.array(action), *result[:4]))
        return result


@OFF_POLICY
def test_the_buffer_holds_what_the_environment_saw(script, tiny, tmp_path, monkeypatch):
    log, made, real = [], [], script.Data.make_env

    def make_env(data):
        made.append(1)  # the first is for evaluation, the second trains
        if len(made) != 2:
            return real(data)
        return Recorder(gym.wrappers.TimeLimit(real(data), 7), log)

    monkeypatch.setattr(script.Data, "make_env", make_env)
    script.main(tiny(online_steps=60, eval_every=60, warm_up=50))
    online = torch.load(tmp_path / "run/resume.pt", weights_only=True)["online"]
    assert online.untyped_storage().nbytes() == online.nbytes, "the offline data were saved with it"
    obs, action, reward, next_obs, terminated = script.Data("", online, None, 11, 3, (0, 1), None).split(online)
    assert len(log) == len(online) == 60
    np.testing.assert_allclose(action, np.stack([row[1] for row in log]), rtol=1e-6)
    np.testing.assert_allclose(obs, np.stack([row[0] for row in log]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(next_obs, np.stack([row[2] for row in log]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(reward, [row[3] for row in log], rtol=1e-5)
    assert terminated.tolist() == [float(row[4]) for row in log]
    assert any(row[5] and not row[4] for row in log), "no time limit was met"


@OFF_POLICY
def test_a_complete_run_can_be_made_longer(script, tiny, tmp_path):
    script.main(tiny(run_dir=str(tmp_path / "long")))
    script.main(tiny(online_steps=8))
    script.main(tiny(resume=str(tmp_path / "run")))
    assert_same(weights(tmp_path / "long"), weights(tmp_path / "run"))


@OFF_POLICY
@pytest.mark.parametrize(
    ("switch", "skipped"), [("reevaluate", "reevaluate"), ("align", "align"), ("constrain", None)]
)  # fmt: skip
def test_ablations(script, tiny, tmp_path, switch, skipped):
    script.main(tiny(**{switch: False}))
    rows = metrics(tmp_path / "run")
    assert skipped not in {row["stage"] for row in rows}
    assert (rows[-1]["online/multiplier"] == 0) == (switch == "constrain")


@OFF_POLICY
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_shares_of_the_offline_data(script, tiny, tmp_path, fraction, monkeypatch):
    seen, real = [], script.draw

    def draw(generator, first, *rest):
        seen.append(float((real(generator, first, *rest) < first).float().mean()))
        return real(generator, first, *rest)

    monkeypatch.setattr(script, "draw", draw)
    assert script.main(tiny(offline_fraction=fraction))["status"] == "complete"
    assert set(seen) == {fraction}


def scripted(scores):
    """An evaluate that reports these scores of the modes in turn, and as many as asked for at the end."""
    left = list(scores)

    def evaluate(policy, envs, seed, device, gamma=1.0, **units):
        score = 0.0 if gamma < 1 or seed >= 200_000_000 else left.pop(0)
        return np.full(len(envs), 3234.3 * score), np.zeros(len(envs)), 1

    return evaluate


@OFF_POLICY
def test_the_reference_is_renewed_only_by_a_better_policy_or_at_intervals(script, tiny, tmp_path, monkeypatch):
    def reference_equals_actor(scores, reference="best", **changes):
        """Runs with these scores of the modes: offline, aligned twice in the stage and at its end, then online."""
        monkeypatch.setattr(script, "evaluate", scripted(scores))
        run_dir = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        summary = script.main(
            tiny(**{"run_dir": str(run_dir), "online_steps": 4, "warm_up": 0, "reference": reference} | changes)
        )
        saved = torch.load(run_dir / "resume.pt", weights_only=True)["nets"]
        same = all(torch.equal(saved["reference"][key], value) for key, value in saved["actor"].items())
        return same, summary["selection_steps"]

    assert reference_equals_actor([0.5, 0.1, 0.1, 0.1, 0.9]) == (True, 3)  # offline, aligned, one online
    assert reference_equals_actor([0.5, 0.1, 0.1, 0.1, 0.4]) == (False, 3)
    assert reference_equals_actor([0.5, 0.1, 0.1, 0.9, 0.8]) == (False, 3)
    assert reference_equals_actor([0.5, 0.1, 0.1, 0.1, 0.4], reference="interval", reference_every=2) == (True, 2)
    assert reference_equals_actor([0.5, 0.1, 0.1, 0.1, 0.9], reference="interval", reference_every=3) == (False, 2)
    renewed = {"reference": "interval", "reference_every": 2, "warm_up": 2}  # at the last step of the warm-up
    assert reference_equals_actor([0.5, 0.1, 0.1, 0.1, 0.4], **renewed) == (True, 0)


@OFF_POLICY
def test_an_aligned_policy_that_scores_higher_becomes_the_reference(script, tiny, tmp_path, monkeypatch):
    for aligned, reference, expected in ((0.9, "best", True), (0.1, "best", False), (0.9, "interval", True)):
        monkeypatch.setattr(script, "evaluate", scripted([0.5, aligned, aligned, aligned, 0.0]))
        run_dir = tmp_path / f"{aligned} {reference}"
        args = tiny(run_dir=str(run_dir), online_steps=4, warm_up=4, reference=reference, reference_every=5)
        script.main(args)  # no updates: the actor stays the aligned
        nets = torch.load(run_dir / "resume.pt", weights_only=True)["nets"]
        assert all(torch.equal(nets["reference"][k], v) for k, v in nets["actor"].items()) == expected
        assert all(torch.equal(nets["targets"][k], v) for k, v in nets["critics"].items())


@OFF_POLICY
def test_the_anchor_of_the_alignment_is_the_target_that_reevaluation_leaves(script, tiny, tmp_path):
    """The Polyak average of the critics, not their last state."""
    script.main(tiny(align=False, online_steps=4, warm_up=4))
    nets = torch.load(tmp_path / "run/resume.pt", weights_only=True)["nets"]
    assert not all(torch.equal(nets["targets"][k], v) for k, v in nets["critics"].items())


@OFF_POLICY
def test_without_the_constraint_lambda_has_no_effect(script, tiny, tmp_path):
    for name, changes in (("a", {"multiplier": 1.0}), ("b", {"multiplier": 9.0})):
        script.main(tiny(run_dir=str(tmp_path / name), constrain=False, **changes))
    actors = [{k: v for k, v in weights(tmp_path / name).items() if "multiplier" not in k} for name in "ab"]
    assert_same(*actors)


@OFF_POLICY
def test_updates_and_multiplier_steps_are_counted_as_documented(script, tiny, monkeypatch):
    calls = {"updates": 0, "multiplier": 0}
    real_updates, real_loss = script.make_updates, script.multiplier_loss

    def make_updates(*args):
        *stages, finetune = real_updates(*args)

        def counted(*batch):
            calls["updates"] += 1
            return finetune(*batch)

        return *stages, counted

    def loss(*args):
        calls["multiplier"] += 1
        return real_loss(*args)

    monkeypatch.setattr(script, "make_updates", make_updates)
    monkeypatch.setattr(script, "multiplier_loss", loss)
    script.main(tiny(online_steps=12, warm_up=5, updates_per_step=3))
    steps = {"o2o_sac": 7, "o2o_td3": 11}  # one per environment step; every second update
    assert calls == {"updates": 21, "multiplier": steps[script.__name__]}


class Countdown(gym.Env):
    """Reward 1, 2, 4, then the end."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        self.reward = 0.5
        return np.zeros(2), {}

    def step(self, action):
        self.reward *= 2
        return np.zeros(2), self.reward, self.reward == 4, False, {}


def test_evaluate_by_hand():
    def policy(obs, noise):
        return torch.zeros(len(obs), 1), torch.full((len(obs),), -3.0)

    returns, soft, steps = o2o_sac.evaluate(policy, [Countdown(), Countdown()], 0, "cpu", gamma=0.5, alpha=0.1)
    assert returns.tolist() == [7, 7] and steps == 6
    assert soft.mean() == pytest.approx((1 + 0.3) + 0.5 * (2 + 0.3) + 0.25 * (4 + 0.3))  # entropy is a bonus


def test_a_policy_of_another_class_is_imitated(script, tiny, tmp_path, checkpoints, imitations):
    """By offline/bc.py, once: a resumed run takes the copy that is there."""
    args = tiny(checkpoint=str(checkpoints[o2o_td3 if script is o2o_sac else o2o_sac]), online_steps=4)
    assert script.main(args)["status"] == "complete"
    copy = torch.load(tmp_path / "run/imitated.pt", weights_only=True)
    assert copy["policy"]["kind"] == script.KIND and copy["algorithm"] == "bc" and "teacher_score" in copy
    script.main(replace(args, resume=str(tmp_path / "run"), online_steps=8))
    assert len(imitations) == 1


def test_a_policy_written_as_readme_says_is_fine_tuned_by_all_scripts(
    script, tiny, tmp_path, imitations, monkeypatch, capsys
):
    """And acts as the user's network does, which is what README's last lines are for."""
    code = re.search(r"## Your own policy.*?```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    net = nn.Sequential(nn.Linear(11, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
    mine = {"net": net, "mean": torch.full((11,), 0.5), "std": torch.full((11,), 2.0)}
    monkeypatch.chdir(tmp_path)
    exec(code, mine)
    assert torch.allclose(mine["action"], torch.tanh(net(torch.full((1, 11), -0.25))))
    assert script.main(tiny(checkpoint="mine.pt", online_steps=4))["status"] == "complete"
    assert "mine.pt: mine, 0 updates on mine" in capsys.readouterr().out or script is not o2o_td3
    assert len(imitations) == (script is not o2o_td3)


def test_an_imitation_that_was_cut_off_goes_on_and_that_of_another_teacher_is_refused(
    script, tiny, tmp_path, checkpoints, monkeypatch
):
    others, calls = [checkpoints[module] for module in (o2o_sac, o2o_td3, o2o_ppo) if module is not script], []

    def in_process(command):
        """Cut off in the first call, after 10 of 20 updates; a resumed bc.py has its flags from its folder."""
        calls.append(list(map(str, command[2:])))
        flags = ["--updates", "20", "--eval-every-updates", "10", "--eval-episodes", "1", "--no-compile"]
        args = bc.parse_args(calls[-1] + flags * (len(calls) == 1))
        with monkeypatch.context() as patch:
            if len(calls) == 1:
                patch.setattr(bc, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            bc.main(args)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", in_process)
    args = tiny(checkpoint=str(others[0]), online_steps=4)
    with pytest.raises(KeyboardInterrupt):
        script.main(args)
    monkeypatch.setattr(script, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # before `restore`: the copy is there, the run is not
        script.main(replace(args, resume=str(tmp_path / "run")))
    assert [call[0] for call in calls] == ["--env-id=hopper-medium-v2", f"--resume={tmp_path / 'run/imitation'}"]
    assert (tmp_path / "run/imitated.pt").exists()
    with pytest.raises(script.UserError, match="holds a run already"):
        script.main(args)
    (tmp_path / "run/args.json").unlink()
    with pytest.raises(script.UserError, match="imitates another policy"):
        script.main(replace(args, checkpoint=str(others[1])))
    copy = torch.load(tmp_path / "run/imitated.pt", weights_only=True)
    copy["policy"]["kind"] = "latent"
    torch.save(copy, tmp_path / "run/imitated.pt")
    with pytest.raises(script.UserError, match="not a"):
        script.main(args)


def test_a_run_whose_policy_cannot_be_imitated_leaves_its_folder_free(script, tiny, tmp_path, checkpoints, monkeypatch):
    monkeypatch.setattr(script.subprocess, "run", lambda command: subprocess.CompletedProcess(command, 2))
    other = checkpoints[o2o_td3 if script is o2o_sac else o2o_sac]
    for _ in range(2):
        with pytest.raises(script.UserError, match="could not imitate it"):
            script.main(tiny(checkpoint=str(other)))
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("seed", [1, 20_260_101])
def test_a_closing_score_is_of_as_many_episodes_as_it_says_with_any_seed(monkeypatch, seed):
    seen, data = [], type("Data", (), {"rows": torch.zeros(1), "score": staticmethod(float)})

    def evaluate(policy, envs, first, device):
        seen.extend(range(first, first + len(envs)))
        return [np.arange(len(envs))]

    monkeypatch.setattr(o2o_sac, "evaluate", evaluate)
    score, _ = o2o_sac.closing_score.func(o2o_sac.Args(seed=seed), None, data, [None] * 20)  # tests have 1 episode
    assert len(set(seen)) == 60 and seen[0] == 200_000_000 + 1_000_000 * seed and score == 9.5


def command_line(module, args):
    """argv that gives `args` to a script."""
    argv = [sys.executable, str(ROOT / f"{module}.py")]
    for key, value in asdict(args).items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool) and isinstance(getattr(type(args), key), bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            argv += [flag, str(value)]
    return argv


def test_kill_and_resume_equals_uninterrupted(script, tiny, tmp_path):
    """A real SIGKILL at an arbitrary moment of an offline stage, then --resume, and another one online."""
    settings = {"reevaluation_steps": 60, "alignment_steps": 90, "online_steps": 150, "eval_every": 25}
    settings |= {"eval_every_updates": 10}  # often: much of the stage is left after its second row
    if script is o2o_ppo:
        settings |= {"num_envs": 2, "scale_rewards": True, "reevaluation_steps": 90, "alignment_steps": 250_000}
    script.main(tiny(run_dir=str(tmp_path / "whole"), **settings))
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command_line(script.__name__, tiny(run_dir=str(killed), **settings)), stdout=subprocess.DEVNULL
    )

    def rows_of(stage):
        lines = (killed / "metrics.jsonl").read_text().splitlines() if (killed / "metrics.jsonl").exists() else []
        return sum(f'"stage": "{stage}"' in line for line in lines)

    resume = [sys.executable, ROOT / f"{script.__name__}.py", "--resume", killed]
    for stage in ("reevaluate" if script is o2o_ppo else "align", "online"):
        deadline = time.time() + 120
        while rows_of(stage) < 2:  # the second is written after the state of the first was saved
            assert process.poll() is None and time.time() < deadline, "the run ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads((killed / "summary.json").read_text())["status"] == "running"
        saved = torch.load(killed / "resume.pt", weights_only=True)
        assert saved["progress"]["stage"] == stage and saved["progress"]["step"] > 0
        assert ("online" in saved) == (stage == "online")
        process = subprocess.Popen(resume, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.wait() == 0, process.stderr.read()
    assert_same(weights(tmp_path / "whole"), weights(killed))
    drop_times = lambda row: {key: v for key, v in row.items() if "per_second" not in key}  # noqa: E731
    assert [drop_times(row) for row in metrics(killed)] == [drop_times(row) for row in metrics(tmp_path / "whole")]
    summary = json.loads((killed / "summary.json").read_text())
    assert summary["scores"] == json.loads((tmp_path / "whole/summary.json").read_text())["scores"]


def test_interrupting_writes_a_summary(script, tiny, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train_online", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(tiny())
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"


@for_scripts(o2o_sac, o2o_td3, o2o_ppo)
def test_ctrl_c_inside_an_import_ends_a_run_too(script, tiny, tmp_path, monkeypatch):
    """Python 3.11 turns what a __set_name__ raises into a RuntimeError; matplotlib has such attributes."""

    class Attribute:
        def __set_name__(self, owner, name):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    monkeypatch.setattr(script, "draw_curve", lambda run: type("Owner", (), {"attribute": Attribute()}))
    monkeypatch.setattr(script, "parse_args", tiny)
    with pytest.raises(SystemExit) as stop:
        script.run_cli(script.main)
    assert stop.value.code == 130
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"


def test_sigterm_ends_like_ctrl_c(tiny_process):
    process, folder = tiny_process
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


def test_one_folder_has_one_writer(tiny_process):
    process, folder = tiny_process
    before = (folder / "args.json").read_bytes()
    second = [sys.executable, ROOT / "o2o_sac.py", "--resume", folder, "--online-steps", "200000"]
    done = subprocess.run(second, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "another process" in done.stderr
    assert (folder / "args.json").read_bytes() == before and process.poll() is None


@pytest.fixture
def tiny_process(checkpoint, tmp_path):
    """A run of o2o_sac.py that is under way, and its folder."""
    args = tiny_args(o2o_sac, checkpoint, tmp_path / "run", online_steps=100_000)
    process = subprocess.Popen(command_line("o2o_sac", args), stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "run/resume.pt").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    yield process, tmp_path / "run"
    process.kill()
    process.wait()


@pytest.mark.parametrize("module", [cql, td3_bc, iql, lapo, bc], ids=lambda module: module.__name__)
def test_offline_training_resumes_exactly(module, tmp_path, monkeypatch):
    def args(name, **changes):
        settings = {"updates": 6, "eval_every_updates": 3, "eval_episodes": 1, "batch_size": 8, "compile": False}
        settings |= {"output": str(tmp_path / f"{name}.pt"), "run_dir": str(tmp_path / name)}
        return module.Args(**settings | changes)

    module.main(args("whole"))
    real, calls = module.draw_curve, []

    def cut_off(run):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(module, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            module.main(args("cut"))
    assert not (tmp_path / "cut.pt").exists()
    assert json.loads((tmp_path / "cut/summary.json").read_text())["status"] == "interrupted"
    module.main(args("cut", resume=str(tmp_path / "cut")))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [3, 6]
    saved = torch.load(tmp_path / "cut.pt", weights_only=True)
    kind = {td3_bc: "deterministic", iql: "tanh_gaussian", lapo: "latent"}.get(module, "squashed_gaussian")
    assert saved["algorithm"] == module.__name__ and saved["step"] == 6 and saved["policy"]["kind"] == kind


@pytest.mark.parametrize("name", ["o2o_sac", "o2o_td3", "o2o_ppo", "cql", "td3_bc", "iql", "lapo"])
def test_the_rate_of_updates_counts_no_evaluation(name, checkpoints, tmp_path, monkeypatch):
    module = sys.modules[name]
    real, now, late = module.evaluate, time.monotonic, []

    def takes_an_hour(*rest, **units):
        late.append(3600.0)
        return real(*rest, **units)

    monkeypatch.setattr(module, "evaluate", takes_an_hour)
    monkeypatch.setattr(time, "monotonic", lambda: now() + sum(late))
    if name.startswith("o2o"):
        args = tiny_args(module, checkpoints[module], tmp_path / "run")
    else:
        common = {"eval_episodes": 1, "compile": False, "run_dir": str(tmp_path / "run"), "batch_size": 8}
        args = module.Args(updates=6, eval_every_updates=3, output=str(tmp_path / "policy.pt"), **common)
    rates = module.main(args)["updates_per_second"]
    assert len(late) > 1 and rates
    assert all(rate > 1 for rate in rates.values()), rates  # counting one of those hours gives less


@ON_POLICY
@pytest.mark.parametrize("switch", ["reevaluate", "align"])
def test_ablations_of_ppo(script, tiny, tmp_path, switch):
    summary = script.main(tiny(reference="best", **{switch: False}))
    rows = metrics(tmp_path / "run")
    assert ("reevaluate" in {row["stage"] for row in rows}) == (switch != "reevaluate")
    weights_of_reference = [row["online/reference_weight"] for row in rows if row["stage"] == "online"]
    assert weights_of_reference[0] == (0 if switch == "align" else 1)
    assert (summary["selection_steps"] == 0) == (switch == "align")


@ON_POLICY
def test_the_reference_of_ppo_is_renewed_only_by_a_better_policy_or_at_intervals(script, tiny, tmp_path, monkeypatch):
    def reference_equals_actor(scores, reference="best", **changes):
        monkeypatch.setattr(script, "evaluate", scripted(scores))  # offline, then after each iteration
        run_dir = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        summary = script.main(tiny(run_dir=str(run_dir), online_steps=8, reference=reference, **changes))
        saved = torch.load(run_dir / "resume.pt", weights_only=True)["nets"]
        same = all(torch.equal(saved["reference"][key], value) for key, value in saved["actor"].items())
        return same, summary["selection_steps"]

    assert reference_equals_actor([0.5, 0.1, 0.9]) == (True, 3)
    assert reference_equals_actor([0.5, 0.9, 0.8]) == (False, 3)
    assert reference_equals_actor([0.5, 0.1, 0.1], reference="interval", reference_every=8) == (True, 0)
    assert reference_equals_actor([0.5, 0.1, 0.9], reference="interval", reference_every=5) == (True, 0)
    assert reference_equals_actor([0.5, 0.1, 0.9], reference="interval", reference_every=9) == (False, 0)


@ON_POLICY
def test_a_run_of_ppo_whose_steps_were_rounded_up_can_be_resumed(script, tiny, tmp_path):
    """It did 16 steps of 13, in iterations of 8; then it was killed before its last evaluation."""
    args = tiny(online_steps=13, rollout=8, minibatch_size=4)
    script.main(args)
    whole = weights(tmp_path / "run")
    (tmp_path / "run/model.pt").unlink()
    resumed = replace(args, resume=str(tmp_path / "run"))
    assert script.main(resumed)["online_steps"] == 16 and (tmp_path / "run/model.pt").exists()
    assert_same(whole, weights(tmp_path / "run"))
    with pytest.raises(script.UserError, match="did 16"):
        script.main(replace(resumed, online_steps=8))


@ON_POLICY
def test_what_ppo_learns_from_is_the_rollout_with_the_references_advantage(script, tiny, tmp_path, monkeypatch):
    """The rows of the first update, worked out again from the rollout; and that the reference changes the policy."""
    seen, real_rollout, real_updates = {}, script.Rollout.collect, script.make_updates

    def collect_rollout(rollout, actor, *rest):
        seen["policy"] = deepcopy(actor)
        result = real_rollout(rollout, actor, *rest)
        seen.setdefault("batch", result)
        return result

    def make_updates(args, nets, *rest):
        reevaluate, finetune = real_updates(args, nets, *rest)

        def spied(rows, scale):
            if "rows" not in seen:
                seen["rows"], seen["value"] = rows, deepcopy(nets["value"])
                seen["numbers"] = finetune(rows, scale)
                return seen["numbers"]
            return finetune(rows, scale)

        return reevaluate, spied

    monkeypatch.setattr(script.Rollout, "collect", collect_rollout)
    monkeypatch.setattr(script, "make_updates", make_updates)
    settings = {"rollout": 16, "minibatch_size": 16, "epochs": 1, "num_envs": 2, "online_steps": 16, "eval_every": 16}
    script.main(tiny(alignment_steps=1000, **settings))
    obs, action, log_prob, reward, next_obs, terminated, done = seen["batch"]
    value, policy = seen["value"], seen["policy"]
    with torch.no_grad():
        advantage = script.gae(reward, value(obs), value(next_obs), terminated, done, 0.99, 0.95)
        normal = torch.distributions.Normal(*(policy(obs)[0], policy.log_std.exp()))
        reference = script.reference_advantage(normal.log_prob(action).sum(-1), normal.entropy().sum(-1), 3, 2.0)
        mixed = script.combined_advantage(advantage, reference, 1.0)
    order = seen["rows"][:, 0].argsort()
    again = obs.flatten(0, 1)[:, 0].argsort()
    rows = seen["rows"][order]
    for column, expected in ((-3, log_prob), (-2, mixed), (-1, advantage + value(obs).detach())):
        torch.testing.assert_close(rows[:, column], expected.flatten()[again], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows[:, 11:14], action.flatten(0, 1)[again])
    assert abs(seen["numbers"]["kl"]) < 1e-5 and seen["numbers"]["clipped"] == 0
    actors = []
    for name, changes in (("with", {}), ("without", {"align": False}), ("weak", {"alpha": 0.1})):
        script.main(tiny(run_dir=str(tmp_path / name), **settings, **changes))
        actors.append(weights(tmp_path / name)["actor.net.0.weight"])
    assert not torch.equal(actors[0], actors[1]) and not torch.equal(actors[0], actors[2])


@ON_POLICY
def test_updates_of_ppo_are_counted_as_documented(script, tiny, monkeypatch):
    scales, real = [], script.make_updates

    def make_updates(*args):
        reevaluate, finetune = real(*args)

        def counted(rows, scale):
            assert rows.shape == (2, 11 + 3 + 3)
            scales.append(scale.item())
            return finetune(rows, scale)

        return reevaluate, counted

    monkeypatch.setattr(script, "make_updates", make_updates)
    summary = script.main(tiny(online_steps=10, epochs=3))  # rounded up: 3 iterations of 4 steps
    assert scales == pytest.approx([1] * 6 + [2 / 3] * 6 + [1 / 3] * 6)
    assert summary["online_steps"] == 12


class Counter(gym.Env):
    """The observation counts the steps since the reset, 100 times the environment's number on top of it; the episode
    terminates after `limit` steps if `ends`, else it is truncated."""

    observation_space = gym.spaces.Box(-1e6, 1e6, (1,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float64)

    def __init__(self, number, limit, ends):
        self.number, self.limit, self.ends = number, limit, ends

    def reset(self, seed=None, options=None):
        self.count = 0
        return np.array([100.0 * self.number]), {}

    def step(self, action):
        assert (np.abs(action) <= 1).all(), "the environment has to receive the clipped action"
        self.count += 1
        over = self.count == self.limit
        obs = np.array([100.0 * self.number + self.count])
        return obs, 1.0, over and self.ends, over and not self.ends, {}


def test_a_rollout_of_several_environments_holds_only_real_transitions(monkeypatch):
    """Nothing crosses the end of an episode: neither the reset's observation as a next one nor a step that resets."""
    made = [Counter(0, 3, True), Counter(1, 4, False)]
    data = o2o_ppo.Data("", torch.zeros(1, 5), None, 1, 2, (0, 1), None)
    actor = o2o_ppo.TanhGaussianActor(torch.zeros(1), torch.ones(1), 2, (8,), std=2.0)
    monkeypatch.setattr(o2o_ppo.Data, "make_env", lambda data: made.pop(0))
    rollout = o2o_ppo.Rollout(o2o_ppo.Args(rollout=20, num_envs=2), data, None)
    rollout.begin()
    batch = rollout.collect(actor, torch.Generator().manual_seed(0), 1)
    last = np.stack(rollout.obs)
    obs, action, log_prob, reward, next_obs, terminated, done = batch
    assert obs.shape == next_obs.shape == (10, 2, 1) and action.shape == (10, 2, 2) and log_prob.shape == (10, 2)
    assert obs[:, 0, 0].tolist() == [0, 1, 2] * 3 + [0]
    assert obs[:, 1, 0].tolist() == [100, 101, 102, 103] * 2 + [100, 101]
    assert [len(actions) for actions in rollout.actions] == [1, 2], "what a resumed run repeats"
    torch.testing.assert_close(next_obs, obs + 1)
    assert last[:, 0].tolist() == [1, 102]
    assert terminated[:, 0].tolist() == [0, 0, 1] * 3 + [0] and terminated[:, 1].sum() == 0
    assert done[:, 0].tolist() == [0, 0, 1] * 3 + [0] and done[:, 1].tolist() == [0, 0, 0, 1] * 2 + [0, 0]
    assert action.abs().max() > 1, "the stored action is that before clipping, whose density is known"
    mean, log_std = actor(obs)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)
    torch.testing.assert_close(log_prob, expected)


def test_rewards_are_scaled_by_the_std_of_the_discounted_return():
    scaler = o2o_ppo.RewardScaler(gamma=0.5, num_envs=2)
    totals = [[2.0, 4.0], [1 + 0.5 * 2, 3 + 0.5 * 4], [5.0, 6 + 0.5 * 5]]  # the first environment ends after two steps
    rewards = [([2.0, 4.0], [False, False]), ([1.0, 3.0], [True, False]), ([5.0, 6.0], [False, False])]
    for reward, done in rewards:
        scaled = scaler(np.array(reward), np.array(done))
    std = np.std(np.concatenate(totals))
    np.testing.assert_allclose(scaled, np.array([5.0, 6.0]) / std, rtol=1e-3)  # gymnasium starts at a count of 1e-4
    twin = o2o_ppo.RewardScaler(gamma=0.5, num_envs=2)
    twin.load_state_dict(scaler.state_dict())
    np.testing.assert_array_equal(twin(np.ones(2), np.zeros(2, bool)), scaler(np.ones(2), np.zeros(2, bool)))


def test_the_learning_rate_of_iqls_policy_falls_along_a_cosine_and_rewards_are_scaled(tmp_path, monkeypatch):
    scales, rewards = [], []

    def spying(update, *_):
        def spied(rows, noise, scale):
            scales.append(scale.item())
            rewards.append(rows[:, 14].clone())
            return update(rows, noise, scale)

        return spied

    monkeypatch.setattr(iql, "compile_update", spying)
    settings = {"updates": 4, "eval_every_updates": 4, "eval_episodes": 1, "batch_size": 64, "compile": False}
    iql.main(iql.Args(output=str(tmp_path / "iql.pt"), run_dir=str(tmp_path / "run"), **settings))
    assert scales == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    data = iql.load_data(iql.Args(), torch.device("cpu"))
    raw = torch.cat(rewards) / torch.load(tmp_path / "iql.pt", weights_only=True)["reward_scale"]
    assert (raw.unsqueeze(1) - data.rows[:, 14]).abs().amin(1).max() < 1e-4, "not rewards of the data"
