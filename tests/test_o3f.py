"""Optimistic action selection on LAPO and IQL, and LAPO itself."""

import json
import time
from copy import deepcopy
from functools import partial

import gymnasium as gym
import iql
import lapo
import numpy as np
import pytest
import torch
from conftest import TASK
from test_errors import refused
from test_runs import assert_same, metrics, weights
from test_updates import ACT, BATCH, OBS, batch, flat, splitter

import o3f


@pytest.fixture(scope="session")
def bases(minari_store, tmp_path_factory):
    """Barely trained checkpoints with five critics: {algorithm: path}."""
    paths = {}
    for module in (lapo, iql):
        folder = tmp_path_factory.mktemp(f"{module.__name__}_base")
        paths[module.__name__] = folder / "model.pt"
        args = module.Args(
            updates=4, eval_every_updates=2, eval_episodes=1, batch_size=16, compile=False, num_critics=5
        )
        args.output, args.run_dir = str(paths[module.__name__]), str(folder / "run")
        module.main(args)
    return paths


@pytest.fixture(params=["lapo", "iql"])
def tiny_o3f(request, bases, tmp_path):
    """Arguments of a run that takes seconds, on each base."""

    def make(**changes):
        settings = {"base": request.param, "checkpoint": str(bases[request.param]), "run_dir": str(tmp_path / "run")}
        settings |= {"online_steps": 8, "updates_per_step": 2, "eval_every": 4, "eval_episodes": 1, "batch_size": 16}
        return o3f.Args(**(settings | {"num_candidates": 5, "compile": False} | changes))

    return make


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_the_best_candidate_is_the_argmax_of_mean_and_spread():
    candidates = torch.tensor([[0.0, 0.1], [0.2, 0.3], [0.4, 0.5]])
    q = torch.tensor([[1.0, 0.0, 1.2], [1.0, 1.9, 1.2]])  # means 1, 0.95, 1.2; std (1/m) 0, 0.95, 0
    assert o3f.best_candidate(q, candidates, 0.0).tolist() == candidates[2:].tolist()
    assert o3f.best_candidate(q, candidates, 0.25).tolist() == candidates[2:].tolist()  # 0.95 + 0.24 < 1.2
    assert o3f.best_candidate(q, candidates, 0.28).tolist() == candidates[1:2].tolist()  # with 1/(m-1) from 0.19 on


def test_candidates_stay_in_the_box_and_spread_by_sigma():
    noise = torch.randn(20000, 2)
    near = o3f.candidates_near(torch.tensor([[0.9, 0.0]]), noise, 0.2)
    assert near.abs().max() <= 1 and (near[:, 0] == 1).float().mean() > 0.2
    assert near[:, 1].std().item() == pytest.approx(0.2, rel=0.05) and near[:, 1].mean().abs() < 0.01


def base_parts(base, seed=0, **changes):
    """-> nets of o3f and its update on small sizes."""
    torch.manual_seed(seed)
    stats, hidden = (torch.zeros(OBS), torch.ones(OBS)), (16, 16)
    args = o3f.Args(base=base, **changes)
    for name in o3f.INHERITED:
        if getattr(args, name) is None:
            setattr(args, name, getattr({"lapo": lapo, "iql": iql}[base].Args(), name, None))
    act_stats = torch.tensor([0.1, -0.2]), torch.tensor([0.5, 2.0])
    nets = {"critics": o3f.Critics(*stats, ACT, hidden, n=5), "value": o3f.Value(*stats, hidden, torch.nn.ReLU)}
    if base == "iql":
        nets["actor"] = o3f.TanhGaussianActor(*stats, ACT, hidden, std=0.3)
    else:
        sizes = stats, (torch.zeros(ACT), torch.ones(ACT)), 2 * ACT, hidden
        nets |= {
            "encoder": o3f.Encoder(*sizes),
            "decoder": o3f.Decoder(*sizes),
            "actor": o3f.LatentPolicy(*sizes, 2.0),
        }
        nets["latent_target"] = deepcopy(nets["actor"].latent)
        nets["critics"] = o3f.LapoCritics(stats, act_stats, hidden, 5)
    nets["targets"] = deepcopy(nets["critics"])
    return args, nets, o3f.make_updates(args, nets, torch.tensor([-50.0, 50.0]), splitter())[1]


@pytest.mark.parametrize("base", ["lapo", "iql"])
def test_the_executed_action(base):
    args, nets, _ = base_parts(base)
    obs, own, noise = torch.randn(1, OBS), torch.randn(1, ACT), torch.randn(50, ACT)
    policys = nets["actor"].sample(obs, own)[0] if base == "iql" else nets["actor"].mode(obs)
    args.sigma = 0.0
    torch.testing.assert_close(o3f.make_act(args, nets)(obs, own, noise), policys)
    args.sigma = 0.3
    chosen = o3f.make_act(args, nets)(obs, own, noise)
    assert not chosen.requires_grad
    candidates = (policys + 0.3 * noise).clamp(-1, 1)
    score = nets["critics"](obs.expand(50, -1), candidates).mean(0)
    torch.testing.assert_close(chosen[0], candidates[score.argmax()].detach())
    spread = nets["critics"](obs.expand(50, -1), candidates).std(0, correction=0)
    extremes = {omega: candidates[(score + omega * spread).argmax()].detach() for omega in (1000.0, -1000.0)}
    args.omega, best = next(item for item in extremes.items() if not torch.equal(item[1], chosen[0]))
    for compiled in (False, True):
        act = o3f.compile_update(o3f.make_act(args, nets), o3f.Args(compile=compiled))
        torch.testing.assert_close(act(obs, own, noise)[0], best)
    args.optimism = False
    torch.testing.assert_close(o3f.make_act(args, nets)(obs, own, noise[:1]), candidates[:1].detach())


@pytest.mark.parametrize("base", ["lapo", "iql"])
def test_an_update_writes_every_network_and_compiled_equals_eager(base, monkeypatch):
    """As graphs: the same updates are compiled to the end as LAPO's and IQL's own."""
    monkeypatch.setattr(o3f.torch, "compile", partial(torch.compile, backend="aot_eager"))
    moved = {}
    for compiled in (False, True):
        _, nets, update = base_parts(base, learning_rate=0.01, tau=0.5)
        before = {key: flat(net) for key, net in nets.items()}
        update = o3f.compile_update(update, o3f.Args(compile=compiled))
        for step in range(3):
            noise = torch.randn(2, BATCH, 2 * ACT, generator=torch.Generator().manual_seed(step))
            update(batch(step)[0], noise, torch.tensor([step, step + 2]), step > 0)
        moved[compiled] = {key: flat(net) - before[key] for key, net in nets.items()}
    for key, eager in moved[False].items():
        assert eager.norm() > 1e-3, key
        assert (moved[True][key] - eager).norm() <= 0.02 * eager.norm(), key


def test_lapo_losses_by_hand():
    reconstruction, action = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    mean, log_std = torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1)
    loss = lapo.autoencoder_loss(reconstruction, action, mean, log_std, tensor(0.9, 0.1), kl_weight=2.0)
    assert loss.item() == pytest.approx((0.9 * (1 + 4 + 2 * 0.5) + 0.1 * 1) / 2)
    spread, torchs = torch.tensor([[0.3, -0.2]]), torch.distributions.Normal
    centre = torch.tensor([[0.7, 0.1]])
    kl = torch.distributions.kl_divergence(torchs(centre, spread.exp()), torchs(0.0, 1.0)).sum()
    assert lapo.autoencoder_loss(centre, centre, centre, spread, tensor(1), 1.0).item() == pytest.approx(kl.item())
    assert lapo.advantage_weight(tensor(2, 0, -1), 0.9).tolist() == pytest.approx([0.9, 0.1, 0.1])
    assert lapo.return_range(tensor(-1, 3), 0.9) == pytest.approx((-10, 30))
    assert lapo.return_range(tensor(1, 3), 0.9) == pytest.approx((0, 30))  # an end is worth 0
    assert lapo.reward_scale(tensor(-1, 4)) == 0.25
    with pytest.raises(lapo.UserError, match="positive"):
        lapo.reward_scale(tensor(-1, 0))


def test_lapo_leaves_noisy_codes_and_clamps_the_target_of_v():
    args, nets, _ = base_parts("lapo", learning_rate=3e-3)
    policy, obs = nets["actor"], torch.randn(64, OBS)
    for noise in (100.0, -100.0):  # most codes lie near the bound, where a clamp would cut half of the noise off
        expected = policy.decoder.action(obs, 2 * torch.tanh(policy.latent(obs)) + noise)
        torch.testing.assert_close(policy.act(obs, policy.latent, noise), expected)
    torch.nn.init.normal_(policy.decoder.net[-1].weight, std=5.0)
    assert policy.mode(obs).abs().max() == 1 and policy.act(obs, policy.latent).abs().max() > 1
    args.tau = 0.0
    for size, expected in ((1.0, 2.0), (-1.0, -1.0)):  # values far beyond either end of the range
        for parameter in nets["targets"].parameters():
            torch.nn.init.constant_(parameter, 1.0)
        torch.nn.init.constant_(nets["targets"].net[-1].weight, size)
        update = o3f.make_updates(args, nets, torch.tensor([-1.0, 2.0]), splitter())[1]
        for step in range(400):
            update(batch(step)[0], torch.randn(2, BATCH, 2 * ACT), torch.tensor([0, 1]), True)
        assert nets["value"](torch.randn(256, OBS)).mean().item() == pytest.approx(expected, abs=0.2)


class KnownCritics(torch.nn.Module):
    """Critic j says 10 j + the first action, in every state; the weight is there to have a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, obs, action, k=None):
        return 10 * torch.arange(float(k or 5)).unsqueeze(1) + action[:, 0] + self.weight


def test_lapo_targets_by_hand():
    """V = 3, critics j = 10 j + a_1, a policy whose action is its noise-free code's: 0 except where noise moves it."""
    args, nets, _ = base_parts("lapo")
    nets |= {"critics": KnownCritics(), "targets": KnownCritics()}
    for key in ("value", "actor", "latent_target"):
        for parameter in nets[key].parameters():
            torch.nn.init.zeros_(parameter)
    torch.nn.init.constant_(nets["value"].net[-1].bias, 3.0)
    args.gamma = 0.5
    update = o3f.make_updates(args, nets, torch.tensor([-100.0, 100.0]), splitter())[1]
    rows, _ = batch(0)
    rows[:, OBS + ACT], rows[:, -1] = 1.0, 0.0
    rows[:2, -1] = 1.0
    noise = torch.zeros(2, BATCH, 2 * ACT)
    values = update(rows, noise, torch.tensor([3, 1]), True)
    assert values["value_loss"].item() == pytest.approx((3 - 10) ** 2)  # the lesser of critics 3 and 1
    # advantages: 1 + 0.5 * 10 - 3 = 3, and where the episode ends 1 - 3 = -2
    assert values["positive"].item() == pytest.approx((BATCH - 2) / BATCH)
    target = torch.full((BATCH,), 1 + 0.5 * 3.0)
    target[:2] = 1.0
    q = KnownCritics()(None, rows[:, OBS : OBS + ACT])
    assert values["critic_loss"].item() == pytest.approx(((q - target) ** 2).mean(-1).sum().item(), rel=1e-5)
    assert values["q_policy"].item() == pytest.approx(0, abs=0.01)  # the first alone


def test_lapos_critics_see_standardised_actions_and_can_learn_alone():
    _, nets, update = base_parts("lapo", learning_rate=0.01, tau=0.5)
    critics, plain = nets["critics"], o3f.Critics(torch.zeros(OBS), torch.ones(OBS), ACT, (16, 16), n=5)
    state = {key: value for key, value in critics.state_dict().items() if not key.startswith("act_")}
    plain.load_state_dict(state)
    obs, action = torch.randn(7, OBS), torch.rand(7, ACT)
    standardised = (action - torch.tensor([0.1, -0.2])) / torch.tensor([0.5, 2.0])
    torch.testing.assert_close(critics(obs, action), plain(obs, standardised))
    before = {key: flat(net) for key, net in nets.items()}
    update(batch(1)[0], torch.randn(2, BATCH, 2 * ACT), torch.tensor([0, 1]), False)
    assert {key for key, net in nets.items() if not torch.equal(before[key], flat(net))} == {"critics", "targets"}


def lapo_on_two_actions(**changes):
    """Half of the data's actions, 0.5, earn 1, the other half, -0.5, nothing; -> the policy's mean action."""
    _, nets, update = base_parts("lapo", tau=0.05, **changes)
    for step in range(700):
        rows, _ = batch(step)
        good = (torch.arange(BATCH) % 2).float()
        rows[:, OBS : OBS + ACT], rows[:, OBS + ACT], rows[:, -1] = (good - 0.5).unsqueeze(1), good, 1.0
        update(rows, torch.randn(2, BATCH, 2 * ACT), torch.randperm(5)[:2], True)
    return nets["actor"].mode(torch.randn(256, OBS)).mean().item()


def test_lapo_chooses_the_better_of_two_actions_in_the_data():
    """By its latent policy, with an autoencoder that prefers neither; and by the autoencoder's weights alone."""
    assert lapo_on_two_actions(learning_rate=2e-3, kl_weight=0.1, positive_weight=0.5) > 0.3
    assert lapo_on_two_actions(learning_rate=2e-3) > 0.25


def test_a_run_leaves_everything_it_promises(tiny_o3f, tmp_path):
    args = tiny_o3f()
    summary = o3f.main(args)
    assert summary["status"] == "complete" and [step for step, _ in summary["scores"]] == [4, 8]
    assert summary == json.loads((tmp_path / "run/summary.json").read_text())
    assert [(row["stage"], row["step"]) for row in metrics(tmp_path / "run")] == [("online", 4), ("online", 8)]
    assert (tmp_path / "run/curve.png").exists()
    args.checkpoint, args.run_dir = str(tmp_path / "run/model.pt"), str(tmp_path / "next")  # a run can start from it
    assert o3f.main(args)["offline_score"] is not None
    assert torch.load(tmp_path / "next/model.pt", weights_only=True)["step"] == 4 + 2 * 8 * 2


def test_resume_equals_uninterrupted(tiny_o3f, tmp_path, monkeypatch):
    o3f.main(tiny_o3f(run_dir=str(tmp_path / "whole")))
    real, calls = o3f.evaluate, []

    def cut_off(*rest):
        calls.append(1)
        if len(calls) == 3:  # offline, after 4 steps, after 8
            raise KeyboardInterrupt
        return real(*rest)

    with monkeypatch.context() as patch:
        patch.setattr(o3f, "evaluate", cut_off)
        with pytest.raises(KeyboardInterrupt):
            o3f.main(tiny_o3f())
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "interrupted"
    o3f.main(tiny_o3f(resume=str(tmp_path / "run")))
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    online = [torch.load(tmp_path / name / "resume.pt", weights_only=True)["online"] for name in ("whole", "run")]
    assert torch.equal(*online)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [4, 8]
    with pytest.raises(o3f.UserError, match="did 8 --online-steps already"):
        o3f.main(tiny_o3f(resume=str(tmp_path / "run"), online_steps=4))


def test_batches_come_from_the_offline_data_and_the_executed_actions(tiny_o3f, tmp_path, monkeypatch):
    seen, executed, made, real_updates, real_env = [], [], [], o3f.make_updates, o3f.Data.make_env

    class Recorder(gym.Wrapper):
        def step(self, action):
            executed.append(np.array(action))
            return self.env.step(action)

    def make_env(data):
        made.append(1)  # the first evaluates, the second trains
        return Recorder(real_env(data)) if len(made) == 2 else real_env(data)

    def make_updates(*args):
        optimizers, update = real_updates(*args)

        def spied(rows, noise, pair, whole):
            seen.append(rows.clone())
            return update(rows, noise, pair, whole)

        return optimizers, spied

    monkeypatch.setattr(o3f, "make_updates", make_updates)
    monkeypatch.setattr(o3f.Data, "make_env", make_env)
    args = tiny_o3f(batch_size=512, online_steps=20, eval_every=20)
    o3f.main(args)
    online = torch.load(tmp_path / "run/resume.pt", weights_only=True)["online"]
    np.testing.assert_allclose(online[:, 11:14], np.stack(executed), rtol=1e-6)
    scale = torch.load(args.checkpoint, weights_only=True)["reward_scale"]
    rows = o3f.load_data(o3f.Args(env_id=TASK), torch.device("cpu")).rows.clone()
    rows[:, 14] *= scale
    offline, new = ({tuple(row.tolist()) for row in part} for part in (rows, online))
    assert all(tuple(row.tolist()) in offline | new for row in seen[-1]) and len(seen) == 40
    first = tuple(online[0].tolist())
    assert all(tuple(row.tolist()) in offline or tuple(row.tolist()) == first for row in seen[0])
    assert sum(tuple(row.tolist()) in new for row in torch.cat(seen)) > 0


def test_acting_score_is_that_of_the_episodes_that_ended(tiny_o3f, tmp_path, monkeypatch):
    """Episodes of three steps: one ends before step 4, one (begun before step 4) ends before step 8. The same numbers
    if the run is continued from step 4, in the middle of an episode."""
    rewards, made, real_env = [], [], o3f.Data.make_env

    class Recorder(gym.Wrapper):
        def step(self, action):
            done = self.env.step(action)
            rewards.append(done[1])
            return done

    def make_env(data):
        made.append(1)  # of each run the first evaluates, the second trains
        return gym.wrappers.TimeLimit(Recorder(real_env(data)), 3) if len(made) % 2 == 0 else real_env(data)

    monkeypatch.setattr(o3f.Data, "make_env", make_env)
    o3f.main(tiny_o3f(run_dir=str(tmp_path / "whole")))
    rows = metrics(tmp_path / "whole")
    assert [row["online/episodes"] for row in rows] == [1, 1]
    data = o3f.load_data(o3f.Args(env_id=TASK), torch.device("cpu"))
    expected = [data.score(sum(rewards[i : i + 3])) for i in (0, 3)]
    np.testing.assert_allclose([row["online/score_acting"] for row in rows], expected, rtol=1e-6)
    o3f.main(tiny_o3f(online_steps=4))
    o3f.main(tiny_o3f(resume=str(tmp_path / "run")))
    again = [row["online/score_acting"] for row in metrics(tmp_path / "run")]
    assert again == [row["online/score_acting"] for row in rows]


def test_without_optimism_it_is_the_same_algorithm_with_noise(tiny_o3f, tmp_path):
    """A single candidate is chosen whatever its value: the runs are the same. Five candidates make another run."""
    runs = {"one": {"num_candidates": 1}, "none": {"optimism": False}, "five": {"num_candidates": 5}}
    online = {}
    for name, changes in runs.items():
        o3f.main(tiny_o3f(run_dir=str(tmp_path / name), **changes))
        online[name] = torch.load(tmp_path / name / "resume.pt", weights_only=True)["online"]
    assert torch.equal(online["one"], online["none"]) and not torch.equal(online["one"], online["five"])
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "none"))


def test_evaluating_more_often_changes_no_training_number(tiny_o3f, tmp_path):
    for every in (2, 8):
        o3f.main(tiny_o3f(run_dir=str(tmp_path / str(every)), eval_every=every))
    assert_same(weights(tmp_path / "2"), weights(tmp_path / "8"))


def test_the_rate_of_updates_counts_no_evaluation(tiny_o3f, tmp_path, monkeypatch):
    real, now, late = o3f.evaluate, time.time, []

    def takes_an_hour(*rest):
        late.append(3600.0)
        return real(*rest)

    monkeypatch.setattr(o3f, "evaluate", takes_an_hour)
    monkeypatch.setattr(time, "time", lambda: now() + sum(late))
    o3f.main(tiny_o3f())
    rates = [row["online/updates_per_second"] for row in metrics(tmp_path / "run") if row["step"]]
    assert len(late) > 3 and len(rates) == 2
    assert min(rates) > 1, rates  # counting one of those hours gives 8 / 3600


def test_settings_are_those_of_the_offline_training_unless_given(tiny_o3f, bases):
    args = tiny_o3f(batch_size=None, tau=0.1)
    stored = torch.load(args.checkpoint, weights_only=True)["args"]
    o3f.load_base(args.checkpoint, args, o3f.Data("", None, None, 11, 3, (0, 1), None))
    assert (args.batch_size, args.gamma, args.tau) == (16, stored["gamma"], 0.1)
    assert args.learning_rate == {"lapo": 2e-4, "iql": 3e-4}[args.base]


def test_a_greater_reward_widens_the_range_of_values(tiny_o3f, monkeypatch):
    seen, real, real_env = [], o3f.make_updates, o3f.Data.make_env

    def make_updates(args, nets, value_range, *rest):
        seen.append((value_range.clone(), value_range))
        return real(args, nets, value_range, *rest)

    class Generous(gym.Wrapper):
        def step(self, action):
            obs, _, *rest = self.env.step(action)
            return obs, 1000.0, *rest

    monkeypatch.setattr(o3f, "make_updates", make_updates)
    monkeypatch.setattr(o3f.Data, "make_env", lambda data: Generous(real_env(data)))
    args = tiny_o3f()
    o3f.main(args)
    before, after = seen[0]
    scale = torch.load(args.checkpoint, weights_only=True)["reward_scale"]
    assert after[1].item() == pytest.approx(1000 * scale / (1 - 0.99), rel=1e-4) and after[1] > before[1]
    assert after[0] == before[0]


def test_checkpoints_that_o3f_refuses(capsys, monkeypatch, bases, checkpoint, tmp_path):
    run_dir = tmp_path / "run"
    error = refused(capsys, monkeypatch, o3f, "--checkpoint", checkpoint, "--run-dir", run_dir)
    assert "pushes the critics down" in error
    error = refused(capsys, monkeypatch, o3f, "--checkpoint", bases["iql"], "--run-dir", run_dir)
    assert "comes from iql" in error
    error = refused(capsys, monkeypatch, o3f, "--checkpoint", tmp_path / "none.pt")
    assert "offline/lapo.py" in error
    error = refused(capsys, monkeypatch, o3f, "--base", "iql", "--checkpoint", tmp_path / "none.pt")
    assert "--num-critics 5" in error
    assert not run_dir.exists()


def test_the_ensemble_is_written_where_o3f_looks_for_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # nothing depends on the folder that a command is run in
    monkeypatch.setattr(iql, "__file__", str(tmp_path / "repository/offline/iql.py"))
    folder = tmp_path / "repository/offline/checkpoints" / TASK
    folder.mkdir(parents=True)
    for count, name in ((2, "iql.pt"), (5, "iql_5.pt")):
        (folder / name).touch()
        error = refused(capsys, monkeypatch, iql, "--num-critics", count, "--run-dir", tmp_path / "run")
        assert f"{folder / name} exists" in error


def test_without_a_discount_lapos_values_have_no_bound(capsys, monkeypatch, tmp_path):
    for module in (lapo, o3f):
        error = refused(capsys, monkeypatch, module, "--gamma", 1, "--run-dir", tmp_path / "run")
        assert "--gamma is 1.0" in error


def test_the_noise_of_an_update_has_the_size_of_the_checkpoints_latent_code():
    stats, act_stats = (torch.zeros(4), torch.ones(4)), (torch.zeros(3), torch.ones(3))
    nets = {"actor": o3f.LatentPolicy(stats, act_stats, 5, [8], 2.0)}  # offline/lapo.py makes codes of 2 A numbers
    assert o3f.noise_shape(o3f.Args(base="lapo", batch_size=7), nets) == (2, 7, 5)


def test_iql_with_two_critics_serves_where_there_are_no_five(monkeypatch, tmp_path):
    seen = []

    def loaded(path, args, data):
        seen.append(path.name)
        raise o3f.UserError("far enough")

    folder = tmp_path / "offline/checkpoints" / TASK
    folder.mkdir(parents=True)
    monkeypatch.setattr(o3f, "__file__", str(tmp_path / "o3f.py"))
    monkeypatch.setattr(o3f, "load_base", loaded)
    monkeypatch.setattr(o3f, "load_data", lambda *_: None)
    args = o3f.Args(base="iql", run_dir=str(tmp_path / "run"))
    with pytest.raises(o3f.UserError, match="no offline policy at .*iql_5.pt; train one"):
        o3f.main(args)
    for name in ("iql.pt", "iql_5.pt"):
        (folder / name).touch()
        with pytest.raises(o3f.UserError, match="far enough"):
            o3f.main(args)
    with pytest.raises(o3f.UserError, match="no offline policy at .*lapo.pt; --base iql has one; train one"):
        o3f.main(o3f.Args(run_dir=str(tmp_path / "run")))
    assert seen == ["iql.pt", "iql_5.pt"]
