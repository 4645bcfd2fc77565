"""baselines/wsrl.py: targets and losses by hand, what an update moves, exact resume in both stages, a cached start."""

import json
import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from baselines import wsrl

wsrl.closing_score = partial(wsrl.closing_score, episodes=1)  # 50 are for people


def tiny(run_dir, **changes):
    settings = {"offline_steps": 6, "online_steps": 12, "warm_up": 4, "updates_per_step": 2, "eval_every": 4}
    settings |= {"eval_every_updates": 3, "eval_episodes": 1, "batch_size": 16, "num_critics": 3, "cql_actions": 2}
    return wsrl.Args(**settings | {"compile": False, "run_dir": str(run_dir)} | changes)


def test_target_is_the_best_action_of_the_least_chosen_critic():
    next_q = torch.tensor([[[10.0, 4.0], [7.0, 7.0]], [[3.0, 5.0], [9.0, 6.0]]])  # (|Z|, B, K)
    target = wsrl.td_target(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), next_q, gamma=0.9)
    assert target.tolist() == pytest.approx([1 + 0.9 * 4, 2])


def test_conservative_gap_by_hand():
    q, density = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.5, -0.5]])
    gap = wsrl.conservative_gap(q, density, torch.tensor([[0.25]]), 1.0)
    assert gap.item() == pytest.approx(math.log(math.exp(0.5) + math.exp(2.5)) - 0.25)


def test_only_values_of_the_policys_actions_have_a_floor_and_no_gradient_under_it():
    q = torch.tensor([[[-9.0, 1.0, 5.0]], [[-8.0, 3.0, 1.0]]], requires_grad=True)
    floored = wsrl.calibrated(q, torch.tensor([2.0]), uniform=1)
    assert floored.tolist() == [[[-9.0, 2.0, 5.0]], [[-8.0, 3.0, 2.0]]]
    (gradient,) = torch.autograd.grad(floored.sum(), q)
    assert gradient.tolist() == [[[1.0, 0.0, 1.0]], [[1.0, 1.0, 0.0]]]


def test_returns_to_go_by_hand():
    reward = torch.tensor([-1.0, -1.0, 3.0, -1.0, -1.0, -1.0, 0.0, -1.0])
    last = torch.tensor([0, 0, 1, 0, 1, 0, 1, 1]).bool()
    terminated = torch.tensor([0.0, 0, 1, 0, 0, 0, 0, 1])
    found = wsrl.returns_to_go(reward, terminated, last, 0.5)
    assert found.tolist() == [-1 + 0.5 * (-1 + 0.5 * 3), -1 + 0.5 * 3, 3, -2, -2, -1, 0, -1]  # the 2nd never succeeds


def test_the_actor_climbs_the_least_critic():
    q = torch.tensor([[10.0, 0.0], [20.0, -4.0]])
    assert wsrl.actor_loss(torch.tensor([1.0, -1.0]), q, 0.5).item() == pytest.approx((0.5 - 10 - 0.5 + 4) / 2)


def made(args, obs=5, act=2, hidden=(8, 8)):
    torch.manual_seed(0)
    stats = torch.zeros(obs), torch.ones(obs)
    critics = wsrl.Critics(*stats, act, hidden, args.num_critics, layer_norm=True)
    nets = {"actor": wsrl.SquashedGaussianActor(*stats, act, hidden), "critics": critics, "targets": deepcopy(critics)}
    nets["log_alpha"] = nn.ParameterList([torch.tensor(math.log(args.alpha))])
    nets["lagrange"] = nn.ParameterList([torch.tensor(1.0)])
    names = "actor", "critics", "log_alpha", "lagrange"
    optimizers = {key: wsrl.Adam(nets[key].parameters(), 1e-2) for key in names}
    data = wsrl.Data("", torch.zeros(1, 2 * obs + act + 2), None, obs, act, (0, 1), None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 2 * obs + act + 3, generator=generator)  # with G
    rows[:, -2], rows[:, obs : obs + act] = 0, rows[:, obs : obs + act].tanh()
    noise = torch.randn(3 * args.cql_actions + 1, 16, act, generator=generator)
    return nets, wsrl.make_updates(args, nets, optimizers, data.split), rows, noise


def moved(before, nets):
    pairs = {key: zip(before[key].parameters(), net.parameters(), strict=True) for key, net in nets.items()}
    return {key for key, pair in pairs.items() if any((a != b).any() for a, b in pair)}


@pytest.mark.parametrize("gap", [None, 0.8])
def test_each_update_moves_its_own_networks(gap):
    nets, (pretrain, critics, policy), rows, noise = made(tiny("x", target_gap=gap))
    everything = {"actor", "critics", "targets", "log_alpha"}
    for update, inputs, written in (
        (pretrain, (rows, noise, torch.tensor([2, 0])), everything | ({"lagrange"} if gap else set())),
        (critics, (rows[:, :-1], noise[:1], torch.tensor([2, 0])), {"critics", "targets"}),
        (policy, (rows[:, :-1], noise[0]), {"actor", "log_alpha"}),
    ):
        before = deepcopy(nets)
        update(*inputs)
        assert moved(before, nets) == written


def test_losses_of_the_pretraining_by_hand():
    """The gap of every critic on 2 uniform, 2 own and 2 next actions, and the target of the chosen critics."""
    nets, (pretrain, _, _), rows, noise = made(tiny("x"))
    actor, critics, targets = (deepcopy(nets[key]) for key in ("actor", "critics", "targets"))
    values = pretrain(rows, noise, torch.tensor([2, 0]))
    obs, action, reward, next_obs = rows[:, :5], rows[:, 5:7], rows[:, 7], rows[:, 8:13]
    with torch.no_grad():
        scores = []
        for i, (state, of) in enumerate([(next_obs, 0), (next_obs, 1), (obs, 2), (obs, 3)]):
            a, log_prob, _ = actor.sample(state, noise[of])
            scores.append(critics(obs, a) - log_prob)
            if i == 0:
                target = reward + 0.99 * targets(next_obs, a)[[2, 0]].amin(0)
        for i in (4, 5):
            scores.append(critics(obs, torch.erf(noise[i] / math.sqrt(2))) + 2 * math.log(2))
        q = critics(obs, action)
        gap = torch.stack(scores).logsumexp(0) - q
    assert values["gap"].item() == pytest.approx(gap.mean().item(), rel=1e-4)
    assert values["td_loss"].item() == pytest.approx(((q - target) ** 2).mean(-1).sum().item(), rel=1e-4)
    assert values["cql_weight"].item() == 5


def test_the_floor_changes_the_gap_only_with_calibrate():
    gaps = {}
    for calibrate in (True, False):
        for floor in (-1e6, 1e3):
            _, (pretrain, _, _), rows, noise = made(tiny("x", calibrate=calibrate))
            rows[:, -1] = floor
            gaps[calibrate, floor] = pretrain(rows, noise, torch.tensor([0, 1]))["gap"].item()
    assert gaps[False, -1e6] == gaps[False, 1e3] == pytest.approx(gaps[True, -1e6], rel=1e-5)
    assert gaps[True, 1e3] > 900


def test_the_tuned_weight_stands_in_for_the_fixed_one():
    """softplus(lagrange), alone, multiplies the gap above the target: with another the critics move otherwise."""
    critics = {}
    for name, lagrange, changes in (("tuned", 1.0, {"target_gap": 0.8}), ("more", 2.0, {"target_gap": 0.8}),
                                    ("fixed", 1.0, {"cql_alpha": math.log(1 + math.e)})):  # fmt: skip
        nets, (pretrain, _, _), rows, noise = made(tiny("x", **changes))
        with torch.no_grad():
            nets["lagrange"][0].fill_(lagrange)
        values = pretrain(rows, noise, torch.tensor([0, 1]))
        assert values["cql_weight"].item() == pytest.approx(math.log(1 + math.exp(lagrange)), rel=1e-5)
        critics[name] = torch.cat([x.flatten() for x in nets["critics"].parameters()])
    torch.testing.assert_close(critics["tuned"], critics["fixed"])  # the target is a constant
    assert not torch.allclose(critics["tuned"], critics["more"])


def test_the_multiplier_rises_while_the_gap_is_too_wide():
    for target, sign in ((-1e3, 1), (1e3, -1)):  # -1000 is out of the flag's range: the gap is then always wider
        nets, (pretrain, _, _), rows, noise = made(tiny("x", target_gap=target))
        pretrain(rows, noise, torch.tensor([0, 1]))
        assert sign * (nets["lagrange"][0].item() - 1) > 0


def test_only_the_chosen_critics_make_the_target():
    losses = []
    for spoiled in (0, 1, 2):
        nets, (_, critics, _), rows, noise = made(tiny("x"))
        with torch.no_grad():
            nets["targets"].net[-1].bias[spoiled] -= 1000
        losses.append(critics(rows[:, :-1], noise[:1], torch.tensor([2, 0]))["critic_loss"].item())
    assert losses[0] > 1e5 and losses[2] > 1e5 and losses[1] < 1e3


@pytest.mark.parametrize("entropy", [-2.7, -1.3])
def test_the_temperature_moves_towards_the_target_entropy(entropy):
    nets, (_, _, policy), rows, noise = made(tiny("x"))
    with torch.no_grad():  # a narrow normal around 0, which tanh leaves alone; two dimensions share the entropy
        nets["actor"].net[-1].weight.zero_()
        nets["actor"].net[-1].bias[2:] = entropy / 2 - 0.5 * math.log(2 * math.pi * math.e) + 1
    assert policy(rows[:, :-1], noise[0])["entropy"].item() == pytest.approx(entropy, abs=0.5)
    assert (nets["log_alpha"][0].item() < 0) == (entropy > -2)  # target: -A = -2 nats


def test_compiled_equals_eager(monkeypatch):
    """As graphs, without their C++, which takes a while: RLPD compiles much the same to the end."""
    monkeypatch.setattr(wsrl.torch, "compile", partial(torch.compile, backend="aot_eager"))
    results, changes = [], {"max_backup": True, "calibrate": True, "target_gap": 0.8}
    for compiled in (False, True):
        nets, updates, rows, noise = made(tiny("x", **changes), hidden=(8,))  # compiles faster
        pretrain, critics = (wsrl.compile_update(update, tiny("x", compile=compiled)) for update in updates[:2])
        for chosen in ([0, 1], [2, 1]):
            pretrain(rows, noise, torch.tensor(chosen))
            critics(rows[:, :-1], noise[:2], torch.tensor(chosen))  # the policy's update is a part of pretrain
        results.append(torch.cat([x.flatten() for net in nets.values() for x in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def whole(minari_store, tmp_path_factory):
    """A run that nothing interrupted. -> its folder and its summary."""
    folder = tmp_path_factory.mktemp("wsrl") / "whole"
    return folder, wsrl.main(tiny(folder))


def same_networks(one, other):
    """Whether two files hold the same networks, bit for bit."""
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    one, other = one.get("nets", one), other.get("nets", other)
    pairs = [(one[net][key], other[net][key]) for net in ("actor", "critics", "targets", "log_alpha")
             for key in one[net]]  # fmt: skip
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_run_leaves_what_it_promises(whole):
    folder, summary = whole
    assert summary["status"] == "complete" and summary["offline_score"] is not None
    assert [step for step, _ in summary["scores"]] == [4, 8, 12]
    assert {"args.json", "metrics.jsonl", "curve.png", "offline.pt", "model.pt"} <= {p.name for p in folder.iterdir()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [("offline", 3), ("offline", 6), ("online", 4), ("online", 8), ("online", 12)]
    assert [(row["stage"], row["step"]) for row in rows] == points
    assert "online/critic_loss" not in rows[2] and "online/critic_loss" in rows[3]  # no update in the warm-up


def test_the_policy_does_not_move_in_the_warm_up(tmp_path):
    wsrl.main(tiny(tmp_path / "run", online_steps=4))
    assert same_networks(tmp_path / "run/offline.pt", tmp_path / "run/model.pt")


def test_online_batches_hold_no_data_and_the_policys_all_of_them(tmp_path, monkeypatch):
    drawn, real = [], wsrl.draw

    def spy(generator, first, last, offline, batch_size):
        drawn.append(real(generator, first, last, offline, batch_size) - first)
        return drawn[-1] + first

    seen, real_updates = [], wsrl.make_updates

    def counted(*inputs):
        pretrain, critics, policy = real_updates(*inputs)
        return pretrain, critics, lambda rows, noise: seen.append(len(rows)) or policy(rows, noise)

    monkeypatch.setattr(wsrl, "draw", spy)
    monkeypatch.setattr(wsrl, "make_updates", counted)
    wsrl.main(tiny(tmp_path / "run", online_steps=6))
    assert len(drawn) == 4 and seen == [32, 32]  # 2 steps after the warm-up, 2 updates each, batches of 16
    assert all(((index >= 0) & (index < 6)).all() for index in drawn)


@pytest.mark.parametrize("cut", [2, 5], ids=["offline", "online"])
def test_a_run_resumes_exactly(whole, tmp_path, monkeypatch, cut):
    real, calls = wsrl.draw_curve, []

    def cut_off(run):
        calls.append(1)
        if len(calls) == cut:
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(wsrl, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            wsrl.main(tiny(tmp_path / "cut"))
    assert wsrl.main(wsrl.parse_args(["--resume", str(tmp_path / "cut")]))["scores"] == whole[1]["scores"]
    assert same_networks(tmp_path / "cut/resume.pt", whole[0] / "resume.pt")


def test_the_pretraining_can_be_used_again(whole, tmp_path):
    summary = wsrl.main(tiny(tmp_path / "again", checkpoint=str(whole[0] / "offline.pt")))
    stages = {json.loads(line)["stage"] for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()}
    assert stages == {"online"} and summary["scores"] == whole[1]["scores"]
    assert same_networks(tmp_path / "again/model.pt", whole[0] / "model.pt")


def test_antmazes_variant_runs(tmp_path, monkeypatch):
    floors, real = [], wsrl.returns_to_go
    monkeypatch.setattr(wsrl, "returns_to_go", lambda *inputs: floors.append(real(*inputs)) or floors[-1])
    summary = wsrl.main(tiny(tmp_path / "run", calibrate=True, max_backup=True, target_gap=0.8, critic_layers=4))
    assert summary["status"] == "complete" and 0 < floors[0].max() < 1000  # of Hopper's rewards
    weights = [json.loads(line).get("offline/cql_weight") for line in (tmp_path / "run/metrics.jsonl").open()]
    assert weights[0] == pytest.approx(1, abs=0.01) and weights[:2] != weights[1::-1]  # tuned, from 1 on


def test_refusals(whole, tmp_path):
    cached, other = torch.load(whole[0] / "offline.pt", weights_only=True), tmp_path / "other.pt"
    with pytest.raises(wsrl.UserError, match="--min-critics"):
        wsrl.main(tiny(tmp_path / "run", min_critics=4))
    with pytest.raises(wsrl.UserError, match="--gamma"):
        wsrl.main(tiny(tmp_path / "run", calibrate=True, gamma=1.0))
    with pytest.raises(wsrl.UserError, match="fits the data and the flags"):
        wsrl.main(tiny(tmp_path / "run", checkpoint=str(whole[0] / "offline.pt"), num_critics=4))
    cached["targets"]["net.0.bias"][0] = math.nan
    for changes, sentence in (({}, "not finite"), ({"algorithm": "cql"}, "not of this script")):
        torch.save(cached | changes, other)
        with pytest.raises(wsrl.UserError, match=sentence):
            wsrl.main(tiny(tmp_path / "run", checkpoint=str(other)))
    assert not (tmp_path / "run").exists()


def test_settings_of_antmaze():
    args = wsrl.parse_args(["--env-id", "antmaze-umaze-v2"])
    assert args.calibrate and args.max_backup and (args.target_gap, args.critic_layers) == (0.8, 4)
    assert (args.reward_scale, args.reward_bias) == (10, -5)
