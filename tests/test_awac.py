"""baselines/awac.py: target and weights by hand, what an update moves, exact resume in both stages, a cached start."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from baselines import awac


def tiny(run_dir, **changes):
    settings = {"offline_steps": 6, "online_steps": 8, "eval_every": 4, "eval_every_updates": 3, "eval_episodes": 1}
    return awac.Args(**settings | {"batch_size": 16, "compile": False, "run_dir": str(run_dir)} | changes)


def test_target_and_weight():
    next_q = torch.tensor([[10.0, 7.0], [8.0, 9.0]])
    target = awac.td_target(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), next_q, 0.9)
    assert target.tolist() == pytest.approx([1 + 0.9 * 8, 2])
    q, q_policy = torch.tensor([[3.0, 9.0], [2.0, 9.0]]), torch.tensor([[1.0, 0.0], [4.0, 0.0]])
    weight = awac.imitation_weight(q, q_policy, 0.5, 100.0)
    assert weight.tolist() == pytest.approx([torch.tensor((2 - 1) / 0.5).exp().item(), 100.0])


def made(args, obs=5, act=2):
    torch.manual_seed(0)
    stats = torch.zeros(obs), torch.ones(obs)
    nets = {"actor": awac.GaussianActor(*stats, act, (8, 8)), "critics": awac.Critics(*stats, act, (8, 8))}
    nets["targets"] = deepcopy(nets["critics"])
    optimizers = {key: awac.Adam(nets[key].parameters(), 1e-2) for key in ("actor", "critics")}
    data = awac.Data("", torch.zeros(1, 2 * obs + act + 2), None, obs, act, (0, 1), None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 2 * obs + act + 2, generator=generator)
    rows[:, -1], rows[:, obs : obs + act] = 0, rows[:, obs : obs + act].tanh()
    return (
        nets,
        awac.make_update(args, nets, optimizers, data.split),
        (rows, torch.randn(2, 16, act, generator=generator)),
    )


def test_the_policys_loss_by_hand():
    nets, update, (rows, noise) = made(awac.Args(learning_rate=0.0))
    obs, action = rows[:, :5], rows[:, 5:7]
    actor = deepcopy(nets["actor"])
    loss = update(rows, noise)["policy_loss"]
    with torch.no_grad():  # of the critics after their step
        advantage = nets["critics"](obs, action).amin(0) - nets["critics"](obs, actor.sample(obs, noise[1])).amin(0)
        mean, log_std = actor(obs)
        log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(-1)
    assert loss.item() == pytest.approx(-(advantage.exp().clamp(max=100) * log_prob).mean().item(), rel=1e-5)


def test_an_update_moves_everything():
    nets, update, batch = made(awac.Args())
    before = {key: deepcopy(net.state_dict()) for key, net in nets.items()}
    update(*batch)
    for key, net in nets.items():
        assert any(not torch.equal(x, before[key][name]) for name, x in net.state_dict().items()), key


def test_compiled_equals_eager():
    results = []
    for compiled in (False, True):
        awac_lambda = torch.tensor(1.0)
        nets, update, batch = made(replace(awac.Args(), awac_lambda=awac_lambda))
        update = awac.compile_update(update, awac.Args(compile=compiled))
        for level in (1.0, 1.0, 0.1):  # --schedule: not compiled into the update as a constant
            awac_lambda.fill_(level)
            update(*batch)
        results.append(torch.cat([x.flatten() for net in nets.values() for x in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cut", [2, 4], ids=["offline", "online"])
def test_a_run_resumes_exactly(tmp_path, monkeypatch, cut):
    summary = awac.main(tiny(tmp_path / "whole"))
    assert summary["status"] == "complete" and summary["offline_score"] is not None
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [
        ("offline", 3),
        ("offline", 6),
        ("online", 4),
        ("online", 8),
    ]
    real, calls = awac.draw_curve, []

    def cut_off(run):
        calls.append(1)
        if len(calls) == cut:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(awac, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            awac.main(tiny(tmp_path / "cut"))
    assert awac.main(awac.parse_args(["--resume", str(tmp_path / "cut")]))["scores"] == summary["scores"]
    whole, cut = (torch.load(tmp_path / name / "resume.pt", weights_only=True)["nets"] for name in ("whole", "cut"))
    for net in whole:
        assert all(torch.equal(value, cut[net][key]) for key, value in whole[net].items())


def test_the_pretraining_can_be_used_again(tmp_path):
    awac.main(tiny(tmp_path / "first"))
    start = tmp_path / "first/offline.pt"
    summary = awac.main(tiny(tmp_path / "second", checkpoint=str(start), online_steps=0))
    stages = {json.loads(line)["stage"] for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()}
    assert "offline" not in stages and summary["status"] == "complete"
    model, cached = (torch.load(path, weights_only=True) for path in (tmp_path / "second/model.pt", start))
    assert all(torch.equal(value, model["actor"][key]) for key, value in cached["actor"].items())
    torch.save({**cached, "algorithm": "iql"}, tmp_path / "other.pt")
    with pytest.raises(awac.UserError, match="not of this script"):
        awac.main(tiny(tmp_path / "third", checkpoint=str(tmp_path / "other.pt")))
    del cached["critics"]
    torch.save(cached, tmp_path / "other.pt")
    with pytest.raises(awac.UserError, match="holds no networks"):
        awac.main(tiny(tmp_path / "third", checkpoint=str(tmp_path / "other.pt")))
    assert not (tmp_path / "third").exists()


def test_schedule_lowers_lambda_online_only(tmp_path, monkeypatch):
    seen, real = [], awac.make_update

    def spied(args, *inputs):
        update = real(args, *inputs)
        return lambda rows, noise: seen.append(float(args.awac_lambda)) or update(rows, noise)

    monkeypatch.setattr(awac, "make_update", spied)
    awac.main(tiny(tmp_path / "run", schedule="linear", warm_up=0))
    assert seen == pytest.approx([1.0] * 6 + [1 - 0.9 * step / 8 for step in range(1, 9)])
