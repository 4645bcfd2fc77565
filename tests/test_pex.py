"""baselines/pex.py: the choice between the policies by hand, what an update moves, exact resume."""

from copy import deepcopy

import iql
import pytest
import torch
from conftest import tiny_policy

from baselines import pex


@pytest.fixture(scope="module")
def policy(minari_store, tmp_path_factory):
    return tiny_policy(iql, tmp_path_factory.mktemp("iql"))


def tiny(policy, run_dir, **changes):
    settings = {"online_steps": 12, "warm_up": 2, "eval_every": 4, "eval_episodes": 1, "batch_size": 16}
    settings |= {"compile": False, "checkpoint": str(policy), "run_dir": str(run_dir)}
    return pex.Args(**settings | changes)


def test_the_choice_is_a_softmax_of_the_values():
    q_off, q_on = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.1, 0.9])
    share = torch.stack(
        [pex.composite_choice(q_off, q_on, 10.0, torch.full((3,), u)) for u in torch.arange(0, 1, 1e-3)]
    )
    expected = (10 * torch.stack([q_off, q_on])).softmax(0)[1]
    torch.testing.assert_close(share.float().mean(0), expected, atol=2e-3, rtol=0)


def made(args, obs=5, act=2):
    torch.manual_seed(0)
    stats = torch.zeros(obs), torch.ones(obs)
    critics = pex.Critics(*stats, act, (8, 8))
    nets = {
        "offline": pex.TanhGaussianActor(*stats, act, (8, 8)),
        "actor": pex.TanhGaussianActor(*stats, act, (8, 8)),
    }
    nets |= {"critics": critics, "targets": deepcopy(critics), "value": pex.Value(*stats, (8, 8), torch.nn.ReLU)}
    optimizers = {key: pex.Adam(nets[key].parameters(), 1e-2) for key in ("actor", "critics", "value")}
    data = pex.Data("", torch.zeros(1, 2 * obs + act + 2), None, obs, act, (0, 1), None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 2 * obs + act + 2, generator=generator)
    rows[:, -1], rows[:, obs : obs + act] = 0, rows[:, obs : obs + act].tanh()
    noise, uniform = torch.randn(16, act, generator=generator), torch.rand(16, generator=generator)
    composite = pex.make_composite(args, nets)
    return nets, composite, pex.make_update(args, nets, optimizers, data.split, composite), (rows, noise, uniform)


def test_the_better_policy_acts():
    nets, act, _, (rows, noise, uniform) = made(pex.Args(inverse_temperature=1e6))
    obs = rows[:, :5]
    mean, log_std = nets["actor"](obs)
    off, on = nets["offline"].mode(obs), (mean + log_std.exp() * noise).clamp(-1, 1)
    better = nets["critics"](obs, on).amin(0) > nets["critics"](obs, off).amin(0)
    assert better.any() and not better.all()
    torch.testing.assert_close(act(obs, noise, uniform), torch.where(better.unsqueeze(-1), on, off))
    better = nets["critics"](obs, nets["actor"].mode(obs)).amin(0) > nets["critics"](obs, off).amin(0)
    mode = pex.Composite(nets).mode(obs)
    torch.testing.assert_close(mode, torch.where(better.unsqueeze(-1), nets["actor"].mode(obs), off))


def test_losses_by_hand():
    reward, over, ahead = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), torch.tensor([10.0, 7.0])
    assert pex.value_target(reward, over, ahead, 0.9).tolist() == [10.0, 2.0]
    assert float(pex.expectile_loss(torch.tensor([2.0, -1.0]), 0.9)) == pytest.approx((0.9 * 4 + 0.1) / 2)
    log_prob, advantage = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 100.0])
    loss = pex.policy_loss(log_prob, advantage, temperature=2.0, max_weight=5.0)
    assert float(loss) == pytest.approx((torch.tensor(1.0).exp().item() + 5 * 2) / 2)


def test_an_update_moves_all_but_the_offline_policy():
    nets, _, update, batch = made(pex.Args())
    before = {key: deepcopy(net.state_dict()) for key, net in nets.items()}
    update(*batch)
    same = {
        key for key, net in nets.items() if all(torch.equal(x, before[key][k]) for k, x in net.state_dict().items())
    }
    assert same == {"offline"}


def test_compiled_equals_eager():
    results = []
    for compiled in (False, True):
        nets, _, update, batch = made(pex.Args())
        update = pex.compile_update(update, pex.Args(compile=compiled))
        for _ in range(3):
            update(*batch)
        results.append(torch.cat([x.flatten() for net in nets.values() for x in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_run_resumes_exactly_and_keeps_the_offline_policy(policy, tmp_path, monkeypatch):
    summary = pex.main(tiny(policy, tmp_path / "whole"))
    assert summary["status"] == "complete" and [step for step, _ in summary["scores"]] == [4, 8, 12]
    real, calls = pex.draw_curve, []

    def cut_off(run):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(pex, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            pex.main(tiny(policy, tmp_path / "cut"))
    assert pex.main(pex.parse_args(["--resume", str(tmp_path / "cut")]))["scores"] == summary["scores"]
    whole, cut = (torch.load(tmp_path / name / "resume.pt", weights_only=True)["nets"] for name in ("whole", "cut"))
    start = torch.load(policy, weights_only=True)
    for net in whole:
        assert all(torch.equal(value, cut[net][key]) for key, value in whole[net].items())
    assert all(torch.equal(value, start["actor"][key]) for key, value in whole["offline"].items())
    model = torch.load(tmp_path / "whole/model.pt", weights_only=True)
    assert model["policy"]["kind"] == "composite" and {"offline", "actor", "critics", "value"} <= set(model)
