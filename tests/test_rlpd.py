"""baselines/rlpd.py: its target and losses by hand, what each update moves, exact resume, refusals."""

import json
import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from baselines import rlpd


def tiny(run_dir, **changes):
    settings = {"online_steps": 12, "warm_up": 4, "updates_per_step": 2, "eval_every": 4, "eval_episodes": 1}
    settings |= {"batch_size": 16, "num_critics": 3, "compile": False, "run_dir": str(run_dir)}
    return rlpd.Args(**settings | changes)


def test_target_is_the_least_of_the_chosen_critics_with_the_entropy_bonus():
    next_q = torch.tensor([[10.0, 7.0], [8.0, 9.0]])
    args = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), next_q, torch.tensor([-3.0, -4.0])
    assert rlpd.td_target(*args, alpha=0.5, gamma=0.9).tolist() == pytest.approx([1 + 0.9 * (8 + 1.5), 2])
    assert rlpd.td_target(*args, alpha=0.0, gamma=0.9).tolist() == pytest.approx([1 + 0.9 * 8, 2])


def test_the_actor_climbs_the_mean_of_all_critics():
    q = torch.tensor([[10.0, 0.0], [20.0, 4.0]])
    assert rlpd.actor_loss(torch.tensor([1.0, -1.0]), q, 0.5).item() == pytest.approx((0.5 - 15 - 0.5 - 2) / 2)


def made(args, seed=0, obs=5, act=2):
    torch.manual_seed(seed)
    stats = torch.zeros(obs), torch.ones(obs)
    critics = rlpd.Critics(*stats, act, (8, 8), args.num_critics, layer_norm=True)
    nets = {"actor": rlpd.SquashedGaussianActor(*stats, act, (8, 8)), "critics": critics, "targets": deepcopy(critics)}
    nets["log_alpha"] = nn.ParameterList([torch.tensor(math.log(args.alpha))])
    optimizers = {key: rlpd.Adam(nets[key].parameters(), 1e-2) for key in ("actor", "critics", "log_alpha")}
    data = rlpd.Data("", torch.zeros(1, 2 * obs + act + 2), None, obs, act, (0, 1), None)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(16, 2 * obs + act + 2, generator=generator)
    rows[:, -1] = 0
    rows[:, obs : obs + act] = rows[:, obs : obs + act].tanh()
    noise = torch.randn(2, 16, act, generator=generator)
    return nets, rlpd.make_updates(args, nets, optimizers, data.split), rows, noise


def state(nets):
    return {key: [x.detach().clone() for x in net.parameters()] for key, net in nets.items()}


def moved(before, nets):
    return {key for key, net in nets.items() if any((a != b).any() for a, b in zip(before[key], net.parameters()))}  # noqa: B905


def test_each_update_moves_its_own_networks():
    nets, (critics, policy), rows, noise = made(tiny("x"))
    before = state(nets)
    critics(rows, noise[0], torch.tensor([2, 0]))
    assert moved(before, nets) == {"critics", "targets"}
    before = state(nets)
    policy(rows, noise[1])
    assert moved(before, nets) == {"actor", "log_alpha"}


def test_only_the_chosen_critics_make_the_target():
    losses = []
    for spoiled in (0, 1, 2):
        nets, (critics, _), rows, noise = made(tiny("x"))
        with torch.no_grad():
            nets["targets"].net[-1].bias[spoiled] -= 1000
        losses.append(critics(rows, noise[0], torch.tensor([2, 0]))["critic_loss"].item())
    assert losses[0] > 1e5 and losses[2] > 1e5 and losses[1] < 1e3


@pytest.mark.parametrize("entropy", [-1.7, -0.3])
def test_the_temperature_moves_towards_the_target_entropy(entropy):
    nets, (_, policy), rows, noise = made(tiny("x"))
    with torch.no_grad():  # a narrow normal around 0, which tanh leaves alone; two dimensions share the entropy
        nets["actor"].net[-1].weight.zero_()
        nets["actor"].net[-1].bias[2:] = entropy / 2 - 0.5 * math.log(2 * math.pi * math.e) + 1
    assert policy(rows, noise[1])["entropy"].item() == pytest.approx(entropy, abs=0.5)
    assert (nets["log_alpha"][0].item() < 0) == (entropy > -1)  # target: -A / 2 = -1 nat


def test_without_bonus_the_target_is_that_of_the_value_alone():
    loss = {}
    for bonus in (True, False):
        nets, (critics, _), rows, noise = made(tiny("x", entropy_bonus=bonus))
        loss[bonus] = critics(rows, noise[0], torch.tensor([0, 1]))["critic_loss"].item()
        if not bonus:
            nets, _, rows, noise = made(tiny("x"))
            with torch.no_grad():
                action = nets["actor"].sample(rows[:, 8:13], noise[0])[0]
                target = rows[:, 7] + 0.99 * nets["targets"](rows[:, 8:13], action)[:2].amin(0)
                by_hand = ((nets["critics"](rows[:, :5], rows[:, 5:7]) - target) ** 2).mean(-1).sum().item()
            assert loss[bonus] == pytest.approx(by_hand, rel=1e-5)
    assert loss[True] != loss[False]


def test_compiled_equals_eager():
    results = []
    for compiled in (False, True):
        nets, updates, rows, noise = made(tiny("x"))
        args = rlpd.Args(compile=compiled)
        critics, policy = (rlpd.compile_update(update, args) for update in updates)
        for chosen in ([0, 1], [2, 1], [1, 0]):
            critics(rows, noise[0], torch.tensor(chosen))
            policy(rows, noise[1])
        results.append(torch.cat([x.flatten() for net in nets.values() for x in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_a_run_leaves_what_it_promises_and_resumes_exactly(tmp_path, monkeypatch):
    summary = rlpd.main(tiny(tmp_path / "whole"))
    assert summary["status"] == "complete" and [step for step, _ in summary["scores"]] == [4, 8, 12]
    assert {"args.json", "metrics.jsonl", "curve.png", "model.pt"} <= {p.name for p in (tmp_path / "whole").iterdir()}
    real, calls = rlpd.draw_curve, []

    def cut_off(run):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(rlpd, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            rlpd.main(tiny(tmp_path / "cut"))
    again = rlpd.parse_args(["--resume", str(tmp_path / "cut")])
    assert rlpd.main(again)["scores"] == summary["scores"]
    whole, cut = (torch.load(tmp_path / name / "resume.pt", weights_only=True)["nets"] for name in ("whole", "cut"))
    for net in whole:
        assert all(torch.equal(value, cut[net][key]) for key, value in whole[net].items())
    rows = [json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert rows == [4, 8, 12]


def test_more_chosen_critics_than_there_are():
    with pytest.raises(rlpd.UserError, match="--min-critics"):
        rlpd.main(rlpd.Args(min_critics=11))


def test_settings_of_antmaze():
    args = rlpd.parse_args(["--env-id", "antmaze-umaze-v2"])
    assert args.min_critics == 1 and not args.entropy_bonus and args.reward_bias == -1 and args.hidden_layers == 3
