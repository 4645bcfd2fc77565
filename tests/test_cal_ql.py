"""baselines/cal_ql.py: the loss by hand, what an update moves, returns of online episodes, schedules, exact resume."""

import json
import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from baselines import cal_ql


def tiny(run_dir, **changes):
    settings = {"offline_steps": 6, "online_steps": 60, "eval_every": 20, "eval_every_updates": 3, "eval_episodes": 1}
    settings |= {"batch_size": 16, "cql_actions": 2, "actor_layers": 2, "critic_layers": 2, "compile": False}
    return cal_ql.Args(**settings | {"run_dir": str(run_dir)} | changes)


def made(args, obs=5, act=2, hidden=(8, 8)):
    torch.manual_seed(0)
    stats = torch.zeros(obs), torch.ones(obs)
    critics = cal_ql.CqlCritics(*stats, act, hidden)
    nets = {"actor": cal_ql.SquashedGaussianActor(*stats, act, hidden), "critics": critics}
    nets |= {"targets": deepcopy(critics), "log_alpha": nn.ParameterList([torch.tensor(0.0)])}
    nets["log_weight"] = nn.ParameterList([torch.tensor(1.0)])
    names = "actor", "critics", "log_alpha", "log_weight"
    optimizers = {key: cal_ql.Adam(nets[key].parameters(), 1e-2) for key in names}
    data = cal_ql.Data("", torch.zeros(1, 2 * obs + act + 2), None, obs, act, (0, 1), None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 2 * obs + act + 3, generator=generator)  # with G
    rows[:, -2], rows[:, obs : obs + act] = 0, rows[:, obs : obs + act].tanh()
    noise = torch.randn(3 * args.cql_actions + 1, 16, act, generator=generator)
    return nets, cal_ql.make_update(args, nets, optimizers, data.split), rows, noise


def test_target_is_the_best_action_of_the_least_critic():
    next_q = torch.tensor([[[10.0, 4.0], [7.0, 7.0]], [[3.0, 5.0], [9.0, 6.0]]])  # (n, B, K)
    target = cal_ql.td_target(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), next_q, gamma=0.9)
    assert target.tolist() == pytest.approx([1 + 0.9 * 4, 2])


def test_values_of_the_policys_actions_have_a_floor_and_no_gradient_under_it():
    q = torch.tensor([[[-9.0, 1.0, 5.0]], [[-8.0, 3.0, 1.0]]], requires_grad=True)
    floored = cal_ql.calibrated(q, torch.tensor([2.0]), uniform=1)
    assert floored.tolist() == [[[-9.0, 2.0, 5.0]], [[-8.0, 3.0, 2.0]]]
    (gradient,) = torch.autograd.grad(floored.sum(), q)
    assert gradient.tolist() == [[[1.0, 0.0, 1.0]], [[1.0, 1.0, 0.0]]]


@pytest.mark.parametrize(
    "schedule, values", [("constant", [5, 5, 5]), ("abrupt", [0.5] * 3), ("linear", [5, 4.1, 0.5])]
)
def test_schedules(schedule, values):
    found = [cal_ql.scheduled(schedule, 5.0, 0.5, share) for share in (0.0, 0.2, 1.0)]
    assert found == pytest.approx(values)


@pytest.mark.parametrize("best", [False, True], ids=["one backup", "the best of two"])
def test_losses_by_hand(monkeypatch, best):
    """The gap of every critic on 2 uniform, 2 own and 2 next actions, of which all but the uniform have the floor."""
    losses, real = [], cal_ql.Adam.minimize
    monkeypatch.setattr(cal_ql.Adam, "minimize", lambda self, x: losses.append(x.item()) or real(self, x))
    nets, update, rows, noise = made(tiny("x", max_backup=best))
    actor, critics, targets = (deepcopy(nets[key]) for key in ("actor", "critics", "targets"))
    values = update(rows, noise, torch.tensor(0.5))
    obs, action, reward, next_obs, floor = rows[:, :5], rows[:, 5:7], rows[:, 7], rows[:, 8:13], rows[:, -1]
    with torch.no_grad():
        scores, backups = [], []
        for i, state in enumerate([next_obs, next_obs, obs, obs]):
            a, log_prob, _ = actor.sample(state, noise[i])
            scores.append(critics(obs, a).maximum(floor) - log_prob)
            backups += [targets(next_obs, a).amin(0)] if i < 2 else []
        scores += [critics(obs, torch.erf(noise[i] / math.sqrt(2))) + 2 * math.log(2) for i in (4, 5)]
        q = critics(obs, action)
        gap = torch.stack(scores).logsumexp(0) - q
        target = reward + 0.99 * (torch.maximum(*backups) if best else backups[0])
    assert values["gap"].item() == pytest.approx(gap.mean().item(), rel=1e-4)
    assert values["td_loss"].item() == pytest.approx(((q - target) ** 2).mean(-1).sum().item(), rel=1e-4)
    assert values["cql_weight"].item() == 5  # half of 10
    assert losses[0] == pytest.approx((((q - target) ** 2).mean(-1) + 5 * gap.mean(-1)).sum().item(), rel=1e-4)


def test_without_calibrate_the_floor_is_nothing():
    gaps = []
    for floor in (-1e6, 1e3):
        _, update, rows, noise = made(tiny("x", calibrate=False))
        rows[:, -1] = floor
        gaps.append(update(rows, noise, torch.tensor(1.0))["gap"].item())
    assert gaps[0] == gaps[1]


@pytest.mark.parametrize("gap", [None, 0.8])
def test_an_update_moves_every_network_and_the_multiplier_only_if_it_is_tuned(gap):
    nets, update, rows, noise = made(tiny("x", target_gap=gap))
    before = deepcopy(nets)
    update(rows, noise, torch.tensor(1.0))
    pairs = {key: zip(before[key].parameters(), net.parameters(), strict=True) for key, net in nets.items()}
    moved = {key for key, pair in pairs.items() if any((a != b).any() for a, b in pair)}
    assert moved == {"actor", "critics", "targets", "log_alpha"} | ({"log_weight"} if gap else set())


def test_the_multiplier_follows_the_scheduled_gap():
    gap = made(tiny("x", target_gap=0.0))[1](*made(tiny("x"))[2:], torch.tensor(1.0))["gap"].item()
    for strength, sign in ((0.5, 1), (2.0, -1)):  # the target gap is below, then above what it is
        nets, update, rows, noise = made(tiny("x", target_gap=gap))
        update(rows, noise, torch.tensor(strength))
        assert sign * (nets["log_weight"][0].item() - 1) > 0


@pytest.mark.parametrize("entropy", [-2.7, -1.3])
def test_the_temperature_moves_towards_the_target_entropy(entropy):
    nets, update, rows, noise = made(tiny("x"))
    with torch.no_grad():  # a narrow normal around 0, which tanh leaves alone; two dimensions share the entropy
        nets["actor"].net[-1].weight.zero_()
        nets["actor"].net[-1].bias[2:] = entropy / 2 - 0.5 * math.log(2 * math.pi * math.e) + 1
    assert update(rows, noise, torch.tensor(1.0))["entropy"].item() == pytest.approx(entropy, abs=0.5)
    assert (nets["log_alpha"][0].item() < 0) == (entropy > -2)  # target: -A = -2 nats


def test_compiled_equals_eager():
    results, changes = [], {"max_backup": True, "target_gap": 0.8}
    for compiled in (False, True):
        nets, update, rows, noise = made(tiny("x", **changes), hidden=(8,))
        update = cal_ql.compile_update(update, tiny("x", compile=compiled))
        for strength in (1.0, 0.3):
            update(rows, noise, torch.tensor(strength))
        results.append(torch.cat([x.flatten() for net in nets.values() for x in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_ends_of_online_episodes():
    obs = torch.tensor([[0.0], [1.0], [5.0], [6.0], [7.0]])
    next_obs = torch.tensor([[1.0], [2.0], [6.0], [7.0], [8.0]])  # a time limit after the 2nd, an end after the 4th
    assert cal_ql.episode_ends(obs, next_obs, torch.tensor([0.0, 0, 0, 1, 0])) == [2, 4, 5]
    assert cal_ql.episode_ends(obs[:0], next_obs[:0], torch.zeros(0)) == []


@pytest.fixture(scope="module")
def whole(minari_store, tmp_path_factory):
    """A run that nothing interrupted. -> its folder and its summary."""
    folder = tmp_path_factory.mktemp("cal_ql") / "whole"
    return folder, cal_ql.main(tiny(folder, target_gap=0.8))


def same_networks(one, other):
    """Whether two files hold the same networks, bit for bit."""
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    one, other = one.get("nets", one), other.get("nets", other)
    pairs = [(one[net][key], other[net][key]) for net in ("actor", "critics", "targets", "log_alpha", "log_weight")
             for key in one[net]]  # fmt: skip
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_run_leaves_what_it_promises(whole):
    folder, summary = whole
    assert summary["status"] == "complete" and summary["offline_score"] is not None
    assert [step for step, _ in summary["scores"]] == [20, 40, 60]
    assert {"args.json", "metrics.jsonl", "curve.png", "offline.pt", "model.pt"} <= {p.name for p in folder.iterdir()}
    assert not same_networks(folder / "offline.pt", folder / "model.pt")


def by_hand(rows, ends):
    """-> the discounted return that followed each observation."""
    table, total = {}, 0.0
    for row, end in reversed(list(zip(rows, ends, strict=True))):
        table[row[:11].tobytes()] = total = row[14] + 0.99 * (0.0 if end else total)
    return table


def test_updates_come_when_an_episode_ends_one_for_each_step_with_its_returns(tmp_path, monkeypatch):
    seen, real = [], cal_ql.make_update

    def spied(*inputs):
        update = real(*inputs)
        return lambda rows, noise, strength: seen.append((rows, float(strength))) or update(rows, noise, strength)

    monkeypatch.setattr(cal_ql, "make_update", spied)
    changes = {"reward_scale": 2.0, "reward_bias": -100.0, "schedule": "linear", "warm_up": 5}
    args = tiny(tmp_path / "run", offline_steps=0, offline_fraction=0.25, **changes)
    cal_ql.main(args)
    saved, data = torch.load(tmp_path / "run/resume.pt", weights_only=True), cal_ql.load_data(args, "cpu")
    rows, start = saved["online"].numpy(), saved["progress"]["episode_start"]
    assert 5 < start <= 60 and len(seen) == start - 5  # updates for whole episodes, without the warm-up
    assert (rows[:, 14] < -80).all()  # scaled
    ends = [i + 1 == len(rows) or (rows[i, 15:26] != rows[i + 1, :11]).any() for i in range(start)]
    tables = [by_hand(data.rows.numpy(), data.last.tolist()), by_hand(rows[:start], ends)]
    for batch, _ in seen:  # 4 of 16 rows are data
        expected = [tables[i >= 4][row[:11].tobytes()] for i, row in enumerate(batch.numpy())]
        assert batch[:, -1].tolist() == pytest.approx(expected, rel=1e-4)
    strengths = [strength for _, strength in seen]
    assert strengths == sorted(strengths, reverse=True) and strengths[-1] == pytest.approx(1 - 0.9 * start / 60)


@pytest.mark.parametrize("cut", [2, 4], ids=["offline", "online"])
def test_a_run_resumes_exactly(whole, tmp_path, monkeypatch, cut):
    real, calls = cal_ql.draw_curve, []

    def cut_off(run):
        calls.append(1)
        if len(calls) == cut:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(cal_ql, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            cal_ql.main(tiny(tmp_path / "cut", target_gap=0.8))
    assert cal_ql.main(cal_ql.parse_args(["--resume", str(tmp_path / "cut")]))["scores"] == whole[1]["scores"]
    assert same_networks(tmp_path / "cut/resume.pt", whole[0] / "resume.pt")


def test_the_pretraining_can_be_used_again(whole, tmp_path):
    start = torch.load(whole[0] / "offline.pt", weights_only=True)
    assert start["log_weight"]["0"] != 1  # what the pre-training made of the multiplier
    args = tiny(tmp_path / "again", checkpoint=str(whole[0] / "offline.pt"), target_gap=0.8)
    summary = cal_ql.main(args)
    stages = {json.loads(line)["stage"] for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()}
    assert stages == {"online"} and summary["scores"] == whole[1]["scores"]
    assert same_networks(tmp_path / "again/model.pt", whole[0] / "model.pt")


def test_refusals(whole, tmp_path):
    cached, other = torch.load(whole[0] / "offline.pt", weights_only=True), tmp_path / "other.pt"
    with pytest.raises(cal_ql.UserError, match="--gamma"):
        cal_ql.main(tiny(tmp_path / "run", gamma=1.0))
    with pytest.raises(cal_ql.UserError, match="fits the data and the flags"):
        cal_ql.main(tiny(tmp_path / "run", checkpoint=str(whole[0] / "offline.pt"), critic_layers=4))
    cached["targets"]["net.0.bias"][0] = math.nan
    for changes, sentence in (({}, "not finite"), ({"algorithm": "cql"}, "not of this script")):
        torch.save(cached | changes, other)
        with pytest.raises(cal_ql.UserError, match=sentence):
            cal_ql.main(tiny(tmp_path / "run", checkpoint=str(other)))
    assert not (tmp_path / "run").exists()


def test_settings_of_antmaze():
    args = cal_ql.parse_args(["--env-id", "antmaze-umaze-v2"])
    assert args.calibrate and args.max_backup and not args.normalize
    assert (args.target_gap, args.cql_alpha, args.critic_layers, args.actor_layers) == (0.8, 5, 4, 2)
    assert (args.reward_scale, args.reward_bias) == (10, -5)
