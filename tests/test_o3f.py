"""Optimistic action selection on LAPO and IQL, and LAPO itself."""

import json
from copy import deepcopy

import gymnasium as gym
import iql
import lapo
import numpy as np
import pytest
import torch
from conftest import TASK
from test_errors import refused
from test_runs import assert_same, metrics, weights
from test_updates import ACT, BATCH, OBS, batch, flat

import o3f


@pytest.fixture(scope="session")
def bases(minari_store, tmp_path_factory):
    """Barely trained checkpoints with five critics: {algorithm: path}."""
    paths = {}
    for module in (lapo, iql):
        folder = tmp_path_factory.mktemp(f"{module.__name__}_base")
        paths[module.__name__] = folder / "model.pt"
        args = module.Args(updates=4, eval_every=2, eval_episodes=1, batch_size=16, compile=False, num_critics=5)
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
    o3f.fill_defaults(args)
    nets = {"critics": o3f.Critics(*stats, ACT, hidden, n=5), "value": o3f.Value(*stats, hidden, torch.nn.ReLU)}
    if base == "iql":
        nets["policy"] = o3f.TanhGaussianActor(*stats, ACT, hidden, std=0.3)
    else:
        sizes = stats, (torch.zeros(ACT), torch.ones(ACT)), 2 * ACT, hidden
        nets |= {"encoder": o3f.Encoder(*sizes), "policy": o3f.LatentPolicy(*sizes, 2.0)}
        nets["policy_target"] = deepcopy(nets["policy"])
    nets["targets"] = deepcopy(nets["critics"])
    return args, nets, o3f.make_update(args, nets, (-50.0, 50.0), OBS, ACT)[1]


@pytest.mark.parametrize("base", ["lapo", "iql"])
def test_the_executed_action(base):
    args, nets, _ = base_parts(base)
    obs, own, noise = torch.randn(1, OBS), torch.randn(1, ACT), torch.randn(50, ACT)
    policys = nets["policy"].sample(obs, own)[0] if base == "iql" else nets["policy"].mode(obs)
    args.sigma = 0.0
    torch.testing.assert_close(o3f.make_act(args, nets)(obs, own, noise), policys)
    args.sigma = 0.3
    chosen = o3f.make_act(args, nets)(obs, own, noise)
    assert not chosen.requires_grad
    candidates = (policys + 0.3 * noise).clamp(-1, 1)
    score = nets["critics"](obs.expand(50, -1), candidates).mean(0)
    torch.testing.assert_close(chosen[0], candidates[score.argmax()].detach())
    args.optimism = False
    torch.testing.assert_close(o3f.make_act(args, nets)(obs, own, noise[:1]), candidates[:1].detach())


@pytest.mark.parametrize("base", ["lapo", "iql"])
def test_an_update_writes_every_network_and_compiled_equals_eager(base):
    moved = {}
    for compiled in (False, True):
        _, nets, update = base_parts(base, learning_rate=0.01, tau=0.5)
        before = {key: flat(net) for key, net in nets.items()}
        update = o3f.compile_update(update, compiled, "cpu")
        for step in range(3):
            noise = torch.randn(2, BATCH, 2 * ACT, generator=torch.Generator().manual_seed(step))
            update(batch(step)[0], noise, torch.tensor([step, step + 2]))
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


def test_lapo_clamps_the_codes_and_the_target_of_v():
    policy = base_parts("lapo")[1]["policy"]
    obs = torch.randn(64, OBS)
    assert policy.code(obs, 100.0).max() == 2 and policy.code(obs, -100.0).min() == -2
    assert policy.decoder.action(obs, 100 * torch.randn(64, 2 * ACT)).abs().max() <= 1
    args, nets, _ = base_parts("lapo", learning_rate=3e-3)
    for parameter in nets["targets"].parameters():
        torch.nn.init.constant_(parameter, 1.0)  # values far above the range
    args.tau = 0.0
    update = lapo.make_lapo_update(args, nets, (-1.0, 2.0), OBS, ACT)[1]
    for step in range(300):
        update(batch(step)[0], torch.randn(2, BATCH, 2 * ACT), torch.tensor([0, 1]))
    assert nets["value"](torch.randn(256, OBS)).mean().item() == pytest.approx(2, abs=0.2)


def test_lapo_prefers_the_better_of_two_actions_in_the_data():
    """Half of the data's actions earn 1, half 0, and episodes end at once."""
    _, nets, update = base_parts("lapo", learning_rate=2e-3, tau=0.05)
    for step in range(700):
        rows, _ = batch(step)
        good = (torch.arange(BATCH) % 2).float()
        rows[:, OBS : OBS + ACT], rows[:, OBS + ACT], rows[:, -1] = (good - 0.5).unsqueeze(1), good, 1.0
        update(rows, torch.randn(2, BATCH, 2 * ACT), torch.randperm(5)[:2])
    assert nets["policy"].mode(torch.randn(256, OBS)).mean().item() > 0.25


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
    assert [row["step"] for row in metrics(tmp_path / "run")] == [4, 8]


def test_batches_come_from_the_offline_data_and_the_executed_actions(tiny_o3f, tmp_path, monkeypatch):
    seen, executed, real_update, real_load = [], [], o3f.make_update, o3f.load_dataset

    class Recorder(gym.Wrapper):
        def step(self, action):
            executed.append(np.array(action))
            return self.env.step(action)

    def load(*args):
        data, made = real_load(*args), []

        def make_env(**kwargs):
            made.append(1)  # the first trains, the others evaluate
            return Recorder(data.make_env(**kwargs)) if len(made) == 1 else data.make_env(**kwargs)

        return data._replace(make_env=make_env)

    def make_update(*args):
        optimizers, update = real_update(*args)

        def spied(rows, noise, pair):
            seen.append(rows.clone())
            return update(rows, noise, pair)

        return optimizers, spied

    monkeypatch.setattr(o3f, "make_update", make_update)
    monkeypatch.setattr(o3f, "load_dataset", load)
    args = tiny_o3f(batch_size=512, online_steps=20, eval_every=20)
    o3f.main(args)
    online = torch.load(tmp_path / "run/resume.pt", weights_only=True)["online"]
    np.testing.assert_allclose(online[:, 11:14], np.stack(executed), rtol=1e-6)
    scale = torch.load(args.checkpoint, weights_only=True)["reward_scale"]
    rows = real_load(TASK).rows.clone()
    rows[:, 14] *= scale
    known = {tuple(row.tolist()) for row in torch.cat([rows, online])}
    assert all(tuple(row.tolist()) in known for row in seen[-1]) and len(seen) == 40
    assert all(tuple(row.tolist()) in {tuple(r.tolist()) for r in torch.cat([rows, online[:1]])} for row in seen[0])
    new = {tuple(row.tolist()) for row in online}
    assert sum(tuple(row.tolist()) in new for row in torch.cat(seen)) > 0


def test_without_optimism_it_is_the_same_algorithm_with_noise(tiny_o3f, tmp_path):
    for name, changes in (("with", {}), ("without", {"optimism": False})):
        o3f.main(tiny_o3f(run_dir=str(tmp_path / name), **changes))
    assert not torch.equal(
        *(torch.load(tmp_path / n / "resume.pt", weights_only=True)["online"] for n in ("with", "without"))
    )


def test_checkpoints_that_o3f_refuses(capsys, monkeypatch, bases, checkpoint, tmp_path):
    run_dir = tmp_path / "run"
    error = refused(capsys, monkeypatch, o3f, "o3f", "--checkpoint", checkpoint, "--run-dir", run_dir)
    assert "pushes the critics down" in error
    error = refused(capsys, monkeypatch, o3f, "o3f", "--checkpoint", bases["iql"], "--run-dir", run_dir)
    assert "comes from iql" in error
    error = refused(capsys, monkeypatch, o3f, "o3f", "--checkpoint", tmp_path / "none.pt")
    assert "offline/lapo.py" in error
    error = refused(capsys, monkeypatch, o3f, "o3f", "--base", "iql", "--checkpoint", tmp_path / "none.pt")
    assert "--num-critics 5" in error
    assert not run_dir.exists()
