"""Whole runs on a tiny dataset: the run folder, what counts, what does not change the numbers, kill and resume."""

import json
import os
import signal
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import asdict

import cql
import gymnasium as gym
import iql
import lapo
import numpy as np
import pytest
import td3_bc
import torch
from conftest import ROOT, for_scripts

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
    summary = script.main(tiny())
    run = tmp_path / "run"
    assert {"args.json", "metrics.jsonl", "summary.json", "curve.png", "model.pt", "resume.pt"} <= set(os.listdir(run))
    assert summary == json.loads((run / "summary.json").read_text())
    assert summary["status"] == "complete" and summary["online_steps"] == 12
    assert [step for step, _ in summary["scores"]] == [4, 8, 12]
    scores = [score for _, score in summary["scores"]]
    assert summary["final_score"] == pytest.approx(np.mean(scores)) and summary["best_score"] == max(scores)
    assert summary["initial_drop"] == pytest.approx(summary["offline_score"] - scores[0])
    stages = ["reevaluate", "online"] if script is o2o_ppo else ["reevaluate", "align", "online"]
    assert summary["fitted_score"] is None and (summary["aligned_score"] is None) == ("align" not in stages)
    assert set(summary["updates_per_second"]) == set(stages)
    assert summary["selection_steps"] > 0
    rows = metrics(run)
    assert [(row["stage"], row["step"]) for row in rows] == [
        *((stage, 4) for stage in stages[:-1]),
        *(("online", step) for step in (4, 8, 12)),
    ]
    own = {o2o_sac: {"multiplier", "kl"}, o2o_td3: {"multiplier", "distance"}, o2o_ppo: {"reference_weight", "kl"}}
    assert {f"online/{key}" for key in own[script]} <= set(rows[-1])
    model = torch.load(run / "model.pt", weights_only=True)
    assert model["algorithm"] == script.__name__ and model["format"] == 1 and model["step"] == 12
    policy, _ = script.load_policy(run / "model.pt", "hopper-medium-v2", 11, 3, 0.1)  # a source for the next run
    assert policy.mode(torch.zeros(2, 11)).shape == (2, 3)


def test_same_seed_same_numbers_another_seed_others(script, tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.main(tiny(run_dir=str(tmp_path / name), seed=seed))
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    different = weights(tmp_path / "c")
    assert any(not torch.equal(value, different[key]) for key, value in weights(tmp_path / "a").items())


def test_evaluating_more_often_changes_no_training_number(script, tiny, tmp_path):
    for name, every in (("often", 1), ("once", 3)):
        args = tiny(run_dir=str(tmp_path / name), eval_every=4 * every, eval_every_updates=100 * every)
        args.reference, args.reference_every = "interval", 5
        args.reevaluation_steps = args.alignment_steps = 300
        script.main(args)
    stages = 2 if script is o2o_ppo else 3
    assert len(metrics(tmp_path / "often")) == 3 * stages and len(metrics(tmp_path / "once")) == stages
    assert_same(weights(tmp_path / "often"), weights(tmp_path / "once"))
    assert json.loads((tmp_path / "once/summary.json").read_text())["selection_steps"] == 0


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
    log, made, real = [], [], script.load_dataset

    def load(*args):
        data = real(*args)

        def make_env(**kwargs):
            made.append(1)  # the first is for evaluation, the second trains
            if len(made) != 2:
                return data.make_env(**kwargs)
            return Recorder(data.make_env(max_episode_steps=7, **kwargs), log)

        return data._replace(make_env=make_env)

    monkeypatch.setattr(script, "load_dataset", load)
    script.main(tiny(online_steps=60, eval_every=60, warm_up=50))
    online = torch.load(tmp_path / "run/resume.pt", weights_only=True)["online"]
    assert online.untyped_storage().nbytes() == online.nbytes, "the offline data were saved with it"
    obs, action, reward, next_obs, terminated = script.split(online, 11, 3)
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
@pytest.mark.parametrize("use", ["all", "none", "part"])
def test_uses_of_the_offline_data(script, tiny, tmp_path, use):
    assert script.main(tiny(offline_data=use))["status"] == "complete"


@OFF_POLICY
def test_the_reference_is_renewed_only_by_a_better_policy_or_at_intervals(script, tiny, tmp_path, monkeypatch):
    def reference_equals_actor(scores, **changes):
        """Runs with these scores of the modes: offline, aligned twice (in the stage, at its end), then online."""
        left = list(scores)

        def scripted(policy, envs, seed, device, gamma=1.0, alpha=0.0):
            if alpha:
                return 0.0, 0.0, 1
            return 3234.3 * left.pop(0), 0.0, 1

        monkeypatch.setattr(script, "evaluate", scripted)
        run_dir = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        summary = script.main(tiny(run_dir=str(run_dir), online_steps=4, warm_up=0, **changes))
        saved = torch.load(run_dir / "resume.pt", weights_only=True)["nets"]
        same = all(torch.equal(saved["reference"][key], value) for key, value in saved["actor"].items())
        return same, summary["selection_steps"]

    assert reference_equals_actor([0.5, 0.1, 0.1, 0.9]) == (True, 3)  # offline, aligned, one online
    assert reference_equals_actor([0.5, 0.1, 0.1, 0.4]) == (False, 3)
    assert reference_equals_actor([0.5, 0.9, 0.9, 0.8]) == (False, 3)
    assert reference_equals_actor([0.5, 0.1, 0.1, 0.4], reference="interval", reference_every=2) == (True, 0)
    assert reference_equals_actor([0.5, 0.1, 0.1, 0.9], reference="interval", reference_every=3) == (False, 0)


@OFF_POLICY
def test_an_aligned_policy_that_scores_higher_becomes_the_reference(script, tiny, tmp_path, monkeypatch):
    for aligned, expected in ((0.9, True), (0.1, False)):
        left = [0.5, aligned, aligned, 0.0]
        scripted = lambda *args, left=left: (0.0 if len(args) > 5 else 3234.3 * left.pop(0), 0.0, 1)  # noqa: E731
        monkeypatch.setattr(script, "evaluate", scripted)
        run_dir = tmp_path / str(aligned)
        script.main(tiny(run_dir=str(run_dir), online_steps=4, warm_up=4))  # no updates: the actor stays the aligned
        nets = torch.load(run_dir / "resume.pt", weights_only=True)["nets"]
        assert all(torch.equal(nets["reference"][k], v) for k, v in nets["actor"].items()) == expected
        assert all(torch.equal(nets["targets"][k], v) for k, v in nets["critics"].items())


@OFF_POLICY
def test_without_alignment_the_targets_start_as_the_reevaluated_critics(script, tiny, tmp_path):
    script.main(tiny(align=False, online_steps=4, warm_up=4))
    nets = torch.load(tmp_path / "run/resume.pt", weights_only=True)["nets"]
    assert all(torch.equal(nets["targets"][k], v) for k, v in nets["critics"].items())


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

    mean_return, soft, steps = o2o_sac.evaluate(policy, [Countdown(), Countdown()], 0, "cpu", gamma=0.5, alpha=0.1)
    assert (mean_return, steps) == (7, 6)
    assert soft == pytest.approx((1 + 0.3) + 0.5 * (2 + 0.3) + 0.25 * (4 + 0.3))  # entropy is a bonus


@pytest.mark.parametrize("kind", ["squashed_gaussian", "deterministic", "tanh_gaussian"])
def test_another_policy_class_is_fitted(script, tiny, tmp_path, checkpoint, kind):
    """CQL-like, TD3+BC-like and IQL-like checkpoints. A policy of the script's own class is copied; of another, with
    enough updates the fitted mode is the teacher's."""
    saved = torch.load(checkpoint, weights_only=True)
    torch.manual_seed(0)
    stats = saved["actor"]["obs_mean"], saved["actor"]["obs_std"]
    if kind == "squashed_gaussian":
        teacher = script.SquashedGaussianActor(*stats, 3, (16, 16))
    else:
        teacher = script.TanhGaussianActor(*stats, 3, (16, 16), std=0.1)
    torch.nn.init.normal_(teacher.net[-1].weight, std=0.3)
    state = {key: v for key, v in teacher.state_dict().items() if kind == "tanh_gaussian" or key != "log_std"}
    path, policy = tmp_path / f"{kind}.pt", {"kind": kind, "hidden": [16, 16]}
    torch.save({**saved, "algorithm": kind, "policy": policy, "actor": state}, path)
    args = tiny(checkpoint=str(path), run_dir=str(tmp_path / kind), fit_steps=800, batch_size=64, online_steps=4)
    summary = script.main(args)
    own = (
        kind
        in {
            o2o_sac: ("squashed_gaussian",),
            o2o_td3: ("deterministic",),
            o2o_ppo: ("tanh_gaussian", "deterministic"),  # the mean is the same network, a std is set
        }[script]
    )
    assert (summary["fitted_score"] is None) == own
    obs = script.load_dataset("hopper-medium-v2").rows[:500, :11]
    if script is o2o_sac:
        student = script.SquashedGaussianActor(*stats, 3, (16, 16) if own else (256, 256, 256))
    elif script is o2o_td3:
        student = script.DeterministicActor(*stats, 3, (16, 16) if own else (256, 256))
    else:
        student = script.TanhGaussianActor(*stats, 3, (16, 16) if own else (256, 256), std=0.1)
    nets = torch.load(tmp_path / kind / "resume.pt", weights_only=True)["nets"]
    student.load_state_dict(nets["actor" if script is o2o_ppo else "behaviour"])  # PPO's moves a little in one step
    limit = {True: 1e-6, False: 0.06} if script is not o2o_ppo else {True: 1e-3, False: 0.1}
    assert (student.mode(obs) - teacher.mode(obs)).abs().mean() < limit[own]


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


@pytest.mark.parametrize("stage", ["offline", "online"])
def test_kill_and_resume_equals_uninterrupted(script, tiny, tmp_path, stage):
    """A real SIGKILL at an arbitrary moment of a stage, then --resume."""
    if stage == "offline":
        stage = "reevaluate" if script is o2o_ppo else "align"
    settings = {"reevaluation_steps": 200, "alignment_steps": 300, "online_steps": 150, "eval_every": 25}
    settings |= {"eval_every_updates": 100}
    if script is o2o_ppo:
        settings |= {"num_envs": 2, "scale_rewards": True, "reevaluation_steps": 300}
    script.main(tiny(run_dir=str(tmp_path / "whole"), **settings))
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command_line(script.__name__, tiny(run_dir=str(killed), **settings)), stdout=subprocess.DEVNULL
    )
    deadline = time.time() + 120

    def rows_of_stage():
        lines = (killed / "metrics.jsonl").read_text().splitlines() if (killed / "metrics.jsonl").exists() else []
        return sum(f'"stage": "{stage}"' in line for line in lines)

    while rows_of_stage() < 2:  # the second is written after the state of the first was saved
        assert process.poll() is None and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "summary.json").exists()
    saved = torch.load(killed / "resume.pt", weights_only=True)
    assert saved["progress"]["stage"] == stage and saved["progress"]["step"] > 0
    assert ("online" in saved) == (stage == "online")
    resumed = subprocess.run(
        [sys.executable, ROOT / f"{script.__name__}.py", "--resume", killed],
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
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


@pytest.mark.parametrize("module", [cql, td3_bc, iql, lapo], ids=lambda module: module.__name__)
def test_offline_training_resumes_exactly(module, tmp_path, monkeypatch):
    def args(name, **changes):
        settings = {"updates": 6, "eval_every": 3, "eval_episodes": 1, "batch_size": 8, "compile": False}
        settings |= {"output": str(tmp_path / f"{name}.pt"), "run_dir": str(tmp_path / name)}
        return module.Args(**settings | changes)

    module.main(args("whole"))
    real, calls = module.evaluate, []

    def cut_off(*rest):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", cut_off)
        with pytest.raises(KeyboardInterrupt):
            module.main(args("cut"))
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [3]
    module.main(args("cut", resume=str(tmp_path / "cut"), output=str(tmp_path / "rest.pt")))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert [row["step"] for row in metrics(tmp_path / "cut")] == [3, 6]
    saved = torch.load(tmp_path / "rest.pt", weights_only=True)
    kind = {cql: "squashed_gaussian", td3_bc: "deterministic", iql: "tanh_gaussian", lapo: "latent"}[module]
    assert saved["algorithm"] == module.__name__ and saved["step"] == 6 and saved["policy"]["kind"] == kind


@pytest.mark.parametrize("name", ["o2o_sac", "o2o_td3", "o2o_ppo", "cql", "td3_bc", "iql", "lapo"])
def test_the_rate_of_updates_counts_no_evaluation(name, checkpoints, tmp_path, monkeypatch):
    module = sys.modules[name]
    real, now, late = module.evaluate, time.time, []

    def takes_an_hour(*rest):
        late.append(3600.0)
        return real(*rest)

    monkeypatch.setattr(module, "evaluate", takes_an_hour)
    monkeypatch.setattr(time, "time", lambda: now() + sum(late))
    common = {"eval_episodes": 1, "compile": False, "run_dir": str(tmp_path / "run"), "batch_size": 8}
    if name.startswith("o2o"):
        budgets = {"reevaluation_steps": 200, "eval_every_updates": 100, "eval_every": 4, "online_steps": 8}
        budgets |= {"rollout": 4, "minibatch_size": 2} if module is o2o_ppo else {"warm_up": 2, "alignment_steps": 200}
        rates = module.main(module.Args(checkpoint=str(checkpoints[module]), **common | budgets))["updates_per_second"]
    else:
        module.main(module.Args(updates=6, eval_every=3, output=str(tmp_path / "policy.pt"), **common))
        rates = {row["step"]: row["offline/updates_per_second"] for row in metrics(tmp_path / "run")}
    assert len(late) > 1 and len(rates) > 1
    assert all(rate > 1 for rate in rates.values()), rates  # counting one of those hours gives at most 100 / 3600


@ON_POLICY
@pytest.mark.parametrize("switch", ["reevaluate", "align"])
def test_ablations_of_ppo(script, tiny, tmp_path, switch):
    summary = script.main(tiny(**{switch: False}))
    rows = metrics(tmp_path / "run")
    assert ("reevaluate" in {row["stage"] for row in rows}) == (switch != "reevaluate")
    weights_of_reference = [row["online/reference_weight"] for row in rows if row["stage"] == "online"]
    assert weights_of_reference[0] == (0 if switch == "align" else 1)
    assert (summary["selection_steps"] == 0) == (switch == "align")


@ON_POLICY
def test_the_reference_of_ppo_is_renewed_only_by_a_better_policy_or_at_intervals(script, tiny, tmp_path, monkeypatch):
    def reference_equals_actor(scores, **changes):
        left = list(scores)  # offline, then after each iteration
        monkeypatch.setattr(script, "evaluate", lambda *args: (3234.3 * left.pop(0), 0.0, 1))
        run_dir = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        summary = script.main(tiny(run_dir=str(run_dir), online_steps=8, **changes))
        saved = torch.load(run_dir / "resume.pt", weights_only=True)["nets"]
        same = all(torch.equal(saved["reference"][key], value) for key, value in saved["actor"].items())
        return same, summary["selection_steps"]

    assert reference_equals_actor([0.5, 0.1, 0.9]) == (True, 3)
    assert reference_equals_actor([0.5, 0.9, 0.8]) == (False, 3)
    assert reference_equals_actor([0.5, 0.1, 0.1], reference="interval", reference_every=8) == (True, 0)
    assert reference_equals_actor([0.5, 0.1, 0.9], reference="interval", reference_every=5) == (True, 0)
    assert reference_equals_actor([0.5, 0.1, 0.9], reference="interval", reference_every=9) == (False, 0)


@ON_POLICY
def test_what_ppo_learns_from_is_the_rollout_with_the_references_advantage(script, tiny, tmp_path, monkeypatch):
    """The rows of the first update, worked out again from the rollout; and that the reference changes the policy."""
    seen, real_rollout, real_updates = {}, script.collect_rollout, script.make_updates

    def collect_rollout(args, actor, *rest):
        seen["policy"] = deepcopy(actor)
        result = real_rollout(args, actor, *rest)
        seen.setdefault("batch", result[0])
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

    monkeypatch.setattr(script, "collect_rollout", collect_rollout)
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
def test_the_cap_on_the_std_holds_for_a_fitted_policy_too(script, tiny, tmp_path, checkpoint):
    script.main(tiny(checkpoint=str(checkpoint), fit_steps=200, max_std=0.05, fit_std=0.05, online_steps=4))
    nets = torch.load(tmp_path / "run/resume.pt", weights_only=True)["nets"]
    for name in ("actor", "reference"):
        assert nets[name]["log_std"].exp().max() <= 0.05 + 1e-6


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


def test_a_rollout_of_several_environments_holds_only_real_transitions():
    """Nothing crosses the end of an episode: neither the reset's observation as a next one nor a step that resets."""
    envs = gym.vector.SyncVectorEnv(
        [lambda: Counter(0, 3, True), lambda: Counter(1, 4, False)], autoreset_mode=o2o_ppo.AutoresetMode.SAME_STEP
    )
    actor = o2o_ppo.TanhGaussianActor(torch.zeros(1), torch.ones(1), 2, (8,), std=2.0)
    args, generator = o2o_ppo.Args(rollout=20, num_envs=2), torch.Generator().manual_seed(0)
    batch, last = o2o_ppo.collect_rollout(args, actor, envs, envs.reset()[0], generator, None, "cpu")
    obs, action, log_prob, reward, next_obs, terminated, done = batch
    assert obs.shape == next_obs.shape == (10, 2, 1) and action.shape == (10, 2, 2) and log_prob.shape == (10, 2)
    assert obs[:, 0, 0].tolist() == [0, 1, 2] * 3 + [0] and obs[:, 1, 0].tolist() == [100, 101, 102, 103] * 2 + [
        100,
        101,
    ]
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


def test_the_state_of_the_environment_survives_a_save():
    env, twin = gym.make("Hopper-v5"), gym.make("Hopper-v5")
    env.reset(seed=3)
    twin.reset(seed=4)
    rng = np.random.default_rng(0)
    for _ in range(7):
        env.step(rng.uniform(-1, 1, 3))
    o2o_sac.set_env_state(twin, o2o_sac.env_state(env))
    for _ in range(60):
        action = rng.uniform(-1, 1, 3)
        mine, theirs = env.step(action), twin.step(action)
        assert np.array_equal(mine[0], theirs[0]) and mine[1:4] == theirs[1:4]
        if mine[2]:
            assert np.array_equal(env.reset()[0], twin.reset()[0])


def test_the_learning_rate_of_iqls_policy_falls_along_a_cosine_and_rewards_are_scaled(tmp_path, monkeypatch):
    scales, rewards = [], []

    def spying(update, *_):
        def spied(rows, scale):
            scales.append(scale.item())
            rewards.append(rows[:, 14].clone())
            return update(rows, scale)

        return spied

    monkeypatch.setattr(iql, "compile_update", spying)
    settings = {"updates": 4, "eval_every": 4, "eval_episodes": 1, "batch_size": 64, "compile": False}
    iql.main(iql.Args(output=str(tmp_path / "iql.pt"), run_dir=str(tmp_path / "run"), **settings))
    assert scales == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])
    data = iql.load_dataset("hopper-medium-v2")
    spread = data.returns.max() - data.returns.min()
    raw = torch.cat(rewards) * spread / 1000
    assert (raw.unsqueeze(1) - data.rows[:, 14]).abs().amin(1).max() < 1e-4, "not rewards of the data"
