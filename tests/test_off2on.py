"""baselines/off2on.py: losses, moments and priorities by hand, five agents equal to five single ones, the balanced
replay, exact resume."""

import json
import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from baselines import off2on


def tiny(run_dir, **changes):
    settings = {"offline_steps": 6, "online_steps": 8, "round_steps": 4, "first_round": 2, "eval_every": 4}
    settings |= {"eval_every_updates": 3, "eval_episodes": 1, "num_agents": 2, "cql_actions": 2}
    return off2on.Args(**settings | {"batch_size": 16, "compile": False, "run_dir": str(run_dir)} | changes)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_targets_and_losses_by_hand():
    next_q = tensor([[10, 7], [8, 9]], [[1, 2], [3, 0]])  # two agents, two critics, two states
    assert off2on.td_target(tensor(1, 2), tensor(0, 1), next_q, 0.9).tolist() == [
        pytest.approx([1 + 0.9 * 8, 2]),
        pytest.approx([1 + 0.9, 2]),
    ]
    target = off2on.td_target(tensor(1, 2), tensor(0, 0), next_q, 0.9, tensor(0.5, -1))
    assert target[0].tolist() == pytest.approx([1 + 0.9 * 8.5, 2 + 0.9 * 6])
    assert float(off2on.actor_loss(tensor(-1, 3), next_q, 0.5)) == pytest.approx(0.5 * 1 - (8 + 7 + 1 + 0) / 4)
    w_off, w_on = tensor(1.0, 3.0), tensor(1.0, 0.5)
    expected = -(math.log(1) + math.log(0.5)) / 2 - (math.log(1) + math.log(2 / 3)) / 2
    assert float(off2on.ratio_loss(w_off, w_on)) == pytest.approx(expected, abs=1e-6)
    assert math.isfinite(float(off2on.ratio_loss(w_off, tensor(0.0, 0.0))))


def test_moments_are_those_of_the_mixture():
    mean, log_std = torch.randn(3, 1, 2), 0.3 * torch.randn(3, 1, 2)
    mu, log_sigma = off2on.moments(mean, log_std)
    samples = (mean + log_std.exp() * torch.randn(3, 200_000, 2)).flatten(0, 1)
    torch.testing.assert_close(samples.mean(0), mu[0], atol=0.01, rtol=0)
    torch.testing.assert_close(samples.std(0), log_sigma[0].exp(), atol=0.01, rtol=0)


def test_priorities_by_hand():
    found = off2on.priority(tensor(32.0, 1.0, 0.0), tensor(1.0, 1.0), 5.0)
    assert found.tolist() == pytest.approx([2, 1, 1e-3])
    assert off2on.priority(tensor(1.0), tensor(0.0), 5.0).item() == 1e3
    assert off2on.first_priority(1000, 0.75, 10) == pytest.approx(300)  # 3000 of 4000


def test_batches_follow_the_priorities():
    generator, priorities = torch.Generator().manual_seed(0), tensor(1.0, 0.0, 3.0, 4.0)
    index = torch.stack([off2on.draw_by_priority(generator, priorities, 8) for _ in range(500)])
    torch.testing.assert_close(index.flatten().bincount() / 4000, priorities / 8, atol=0.02, rtol=0)
    assert (index.sort(1)[0][:, 0] == 0).all(), "one of each eighth"


def test_the_ratio_learns_which_transitions_are_new():
    torch.manual_seed(0)
    net = off2on.DensityRatio(torch.zeros(2), torch.ones(2), 1, (16, 16))
    optimizer = off2on.Adam(net.parameters(), 3e-3)
    sample = lambda mean: (mean + torch.randn(256, 2), torch.zeros(256, 1))  # noqa: E731
    for _ in range(1000):
        optimizer.minimize(off2on.ratio_loss(net(*sample(0.0)), net(*sample(1.0))))
    at = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]])
    ratio = net(at, torch.zeros(3, 1)).detach()
    expected = (2 * (at[:, 0] - 0.5)).exp()  # N(1, I) over N(0, I)
    torch.testing.assert_close(ratio, expected, rtol=0.35, atol=0)


def made(args, obs=5, act=2):
    torch.manual_seed(0)
    stats, n = (torch.zeros(obs), torch.ones(obs)), args.num_agents
    nets = {"actor": off2on.EnsembleActor(*stats, act, (8, 8), n)}
    nets["critics"] = off2on.PairedCritics(*stats, act, (8, 8), 2 * n)
    nets |= {"targets": deepcopy(nets["critics"]), "ratio": off2on.DensityRatio(*stats, act, (8, 8))}
    nets["log_alpha"] = nn.ParameterList([torch.full((n, 1), -0.5), torch.tensor(-1.0)])
    optimizers = {key: off2on.Adam(nets[key].parameters(), 1e-2) for key in ("actor", "critics", "ratio")}
    optimizers["offline_actor"] = off2on.Adam(nets["actor"].parameters(), 1e-2)
    optimizers["offline_alpha"] = off2on.Adam(nets["log_alpha"][:1], 1e-2)
    optimizers["log_alpha"] = off2on.Adam(nets["log_alpha"][1:], 1e-2)
    data = off2on.Data("", torch.zeros(1, 2 * obs + act + 2), None, obs, act, (0, 1), None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(n * 16, 2 * obs + act + 2, generator=generator)
    rows[:, -1], rows[:, obs : obs + act] = 0, rows[:, obs : obs + act].tanh()
    noise = torch.randn(3 * args.cql_actions + 1, n, 16, act, generator=generator)
    return nets, optimizers, data.split, rows, noise


def test_agents_do_not_see_each_other_offline():
    """Two side by side end where each ends alone, on its own batch and noise."""
    pair = off2on.Args(num_agents=2, cql_actions=2)
    nets, optimizers, split, rows, noise = made(pair)
    singles = []
    for i in range(2):
        one = off2on.Args(num_agents=1, cql_actions=2)
        alone, own, *_ = made(one)
        with torch.no_grad():
            for name, members in (("actor", slice(i, i + 1)), ("critics", slice(2 * i, 2 * i + 2)),
                                  ("targets", slice(2 * i, 2 * i + 2))):  # fmt: skip
                for mine, theirs in zip(alone[name].parameters(), nets[name].parameters(), strict=True):
                    mine.copy_(theirs[members])
        singles.append((alone, off2on.make_offline_update(one, alone, own, split)))
    update = off2on.make_offline_update(pair, nets, optimizers, split)
    for _ in range(3):
        update(rows, noise)
        for i, (_, alone) in enumerate(singles):
            alone(rows[16 * i : 16 * i + 16], noise[:, i : i + 1])
    for i, (alone, _) in enumerate(singles):
        for name, members in (("actor", slice(i, i + 1)), ("critics", slice(2 * i, 2 * i + 2))):
            for mine, theirs in zip(alone[name].parameters(), nets[name].parameters(), strict=True):
                torch.testing.assert_close(mine, theirs[members], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone["log_alpha"][0], nets["log_alpha"][0][i : i + 1])


def test_the_offline_update_is_cqls(monkeypatch):
    """One agent against offline/cql.py's update from the same weights, batch and noise."""
    import cql

    args = off2on.Args(num_agents=1, cql_actions=2, cql_alpha=5.0)
    nets, optimizers, split, rows, noise = made(args)
    stats = torch.zeros(5), torch.ones(5)
    theirs = {"actor": cql.SquashedGaussianActor(*stats, 2, (8, 8)), "critics": cql.CqlCritics(*stats, 2, (8, 8))}
    theirs |= {"targets": deepcopy(theirs["critics"]), "log_weight": nn.ParameterList([torch.tensor(1.0)])}
    theirs["log_alpha"] = nn.ParameterList([torch.tensor(-0.5)])
    with torch.no_grad():
        for name in ("critics", "targets"):
            theirs[name].load_state_dict(nets["critics"].state_dict(), strict=False)
            nets[name].load_state_dict(theirs[name].state_dict(), strict=False)
        linear = [layer for layer in theirs["actor"].net if isinstance(layer, nn.Linear)]
        stacked = [layer for layer in nets["actor"].net if not isinstance(layer, nn.ReLU)]
        for mine, other in zip(linear, stacked, strict=True):
            mine.weight.copy_(other.weight[0].T)
            mine.bias.copy_(other.bias[0, 0])
    own = {key: cql.Adam(theirs[key].parameters(), 1e-2) for key in ("actor", "critics", "log_alpha", "log_weight")}
    update = cql.make_update(cql.Args(cql_actions=2, cql_alpha=5.0), theirs, own, split)
    mine = off2on.make_offline_update(args, nets, optimizers, split)
    for _ in range(3):
        a, b = mine(rows, noise), update(rows, noise[:, 0])
        for key in ("gap", "q_mean", "alpha", "entropy"):
            assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-4, abs=1e-5)


def test_the_online_updates_numbers_by_hand():
    args = off2on.Args(num_agents=2)
    nets, optimizers, split, rows, noise = made(args)
    for optimizer in optimizers.values():
        optimizer.lr = 0.0
    rows, offline, online, noise = rows[:16], rows[16:], rows[8:24], noise[:2, 0]
    obs, action, reward, next_obs, _ = split(rows)
    actor, alpha = nets["actor"], math.exp(-1)
    q_of = lambda net, s, a: net(s, a).unflatten(0, (2, 2)).amin(1)  # noqa: E731
    with torch.no_grad():
        (next_action, ahead, _), (drawn, log_prob, _) = actor.sample(next_obs, noise[0]), actor.sample(obs, noise[1])
        y = reward + 0.99 * (q_of(nets["targets"], next_obs, next_action) - alpha * ahead)
        critic_loss = sum(((nets["critics"](obs, action)[j] - y[j // 2]) ** 2).mean() for j in range(4))
        loss = (alpha * log_prob - q_of(nets["critics"], obs, drawn).mean(0)).mean()
        w = [nets["ratio"](*split(x)[:2]) for x in (rows, offline)]
        weights = w[0] ** 0.2 / (w[1] ** 0.2).mean()
    values = off2on.make_update(args, nets, optimizers, split)(rows, offline, online, noise)
    assert float(values["critic_loss"]) == pytest.approx(float(critic_loss), rel=1e-4)
    assert float(values["policy_loss"]) == pytest.approx(float(loss), rel=1e-4)
    torch.testing.assert_close(values["priority"], weights.clamp(1e-3, 1e3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["offline", "online"])
def test_what_an_update_moves_and_compiled_equals_eager(kind, monkeypatch):
    """As graphs, whose C++ takes minutes."""
    monkeypatch.setattr(off2on.torch, "compile", partial(torch.compile, backend="aot_eager"))
    make, results = {"offline": off2on.make_offline_update, "online": off2on.make_update}[kind], []
    moved = {"actor", "critics", "targets", "log_alpha"} | ({"ratio"} if kind == "online" else set())
    for compiled in (False, True):
        args = off2on.Args(compile=compiled, num_agents=2, cql_actions=2)
        nets, optimizers, split, rows, noise = made(args)
        before = {key: deepcopy(net.state_dict()) for key, net in nets.items()}
        update = off2on.compile_update(make(args, nets, optimizers, split), args)
        for _ in range(3):
            update(rows, noise) if kind == "offline" else update(rows[:16], rows[16:], rows[8:24], noise[:2, 0])
        changed = {
            key
            for key, net in nets.items()
            if any(not torch.equal(x, before[key][k]) for k, x in net.state_dict().items())
        }
        assert changed == moved
        results.append(torch.cat([x.flatten() for net in nets.values() for x in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_rounds_and_priorities_of_a_run(tmp_path, monkeypatch, minari_store):
    counts, real = [], off2on.draw_by_priority

    def draw(generator, priorities, batch_size):
        counts.append(len(priorities))
        return real(generator, priorities, batch_size)

    monkeypatch.setattr(off2on, "draw_by_priority", draw)
    off2on.main(tiny(tmp_path / "run", online_steps=10))
    first = len(off2on.load_data(off2on.Args(), torch.device("cpu")).rows)
    assert counts == [first + 4] * 8 + [first + 8] * 4  # twice as many in the first round, none in the unfinished one
    saved = torch.load(tmp_path / "run/resume.pt", weights_only=True)
    assert saved["priorities"].shape == (first + 10,) and (saved["priorities"] > 0).all()
    start = off2on.first_priority(first, 0.5, 4)
    assert float(saved["largest"]) >= start == pytest.approx(first / 4)
    assert (saved["priorities"][-2:] == saved["largest"]).all(), "what is new has the largest"
    assert (saved["priorities"][first : first + 4] < start).all(), "drawn in the first round, hence by their ratio now"
    assert (saved["priorities"][:first] == 1).float().mean() > 0.5, "what was not drawn stays at 1"


@pytest.mark.parametrize("number", [1, 4], ids=["offline", "online"])
def test_a_run_resumes_exactly(number, tmp_path, monkeypatch, minari_store):
    whole, real, calls = off2on.main(tiny(tmp_path / "whole")), off2on.draw_curve, []
    assert whole["status"] == "complete" and [step for step, _ in whole["scores"]] == [4, 8]

    def cut_off(run):
        calls.append(1)
        if len(calls) == number + (number == 1):  # one evaluation of the stage was saved, the next is lost
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(off2on, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            off2on.main(tiny(tmp_path / "cut"))
    assert off2on.main(off2on.parse_args(["--resume", str(tmp_path / "cut")]))["scores"] == whole["scores"]
    saved = [torch.load(tmp_path / name / "resume.pt", weights_only=True) for name in ("whole", "cut")]
    for net, state in saved[0]["nets"].items():
        assert all(torch.equal(value, saved[1]["nets"][net][key]) for key, value in state.items()), net
    assert torch.equal(saved[0]["priorities"], saved[1]["priorities"])
    assert torch.equal(saved[0]["largest"], saved[1]["largest"])


@pytest.mark.parametrize("bad", [torch.ones(3), None, "text", -1.0, float("nan")])
def test_damaged_priorities_are_refused(bad, tmp_path, minari_store):
    off2on.main(tiny(tmp_path / "run"))
    path = tmp_path / "run/resume.pt"
    saved = torch.load(path, weights_only=True)
    saved["priorities"] = saved["priorities"] * bad if isinstance(bad, float) else bad
    torch.save(saved, path)
    with pytest.raises(off2on.UserError, match="priorities"):
        off2on.main(off2on.parse_args(["--resume", str(tmp_path / "run"), "--online-steps", "12"]))


def test_a_cached_start_and_what_does_not_fit(tmp_path, minari_store):
    off2on.main(tiny(tmp_path / "first"))
    start = tmp_path / "first/offline.pt"
    summary = off2on.main(tiny(tmp_path / "second", checkpoint=str(start)))
    rows = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"online"} and summary["status"] == "complete"
    assert summary["scores"] == json.loads((tmp_path / "first/summary.json").read_text())["scores"], "the same start"
    found = [off2on.settings(off2on.Args(env_id=f"{x}-v2")) for x in ("hopper-medium", "halfcheetah-medium")]
    assert found == [{}, {"online_share": 0.75}]
    with pytest.raises(off2on.UserError, match="holds no networks"):
        off2on.main(tiny(tmp_path / "third", checkpoint=str(start), num_agents=3))
    assert not (tmp_path / "third").exists()
