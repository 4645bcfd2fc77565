"""baselines/aca.py: losses and the bounded prior by hand, R equal to Z at the border, the buffer's best episodes,
exact resume."""

import json
import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from baselines import aca


def tiny(run_dir, **changes):
    settings = {"offline_steps": 6, "online_steps": 8, "eval_every": 4, "eval_every_updates": 3, "eval_episodes": 1}
    return aca.Args(**settings | {"batch_size": 2, "compile": False, "run_dir": str(run_dir)} | changes)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_losses_by_hand():
    target = aca.td_target(tensor(1, 2), tensor(0, 1), tensor([10, 7], [8, 9]), tensor(-3, -4), 0.5, 0.9)
    assert target.tolist() == pytest.approx([1 + 0.9 * (8 + 1.5), 2])
    loss = aca.likelihood_loss(tensor(-1, 2), tensor([4, -2], [5, 3]), tensor(-3, -5), 0.5, 30.0)
    assert float(loss) == pytest.approx((10 * (-0.5 - 4) + 3 + 10 * (1 + 2) + 5) / 2)  # E|Q| is 3
    assert aca.bounded(tensor(100.0), tensor(2.0)).item() == pytest.approx(100)
    assert aca.bounded(tensor(2.0), tensor(2.0)).item() == pytest.approx(2 + math.log(2))
    assert aca.bounded(tensor(-1e6), tensor(2.0)).item() == 2
    assert [aca.prior_weight(update, 40_000, 0.5) for update in (0, 10_000, 20_000, 10**6)] == [1, 0.75, 0.5, 0.5]


def test_the_best_episodes():
    rewards, last = tensor(1, 1, 5, -2, 4, 4, 3), torch.tensor([0, 1, 1, 0, 1, 0, 1]).bool()  # returns 2, 5, 2, 7
    assert aca.best_rows(rewards, last, 0).tolist() == []
    assert aca.best_rows(rewards, last, 2).tolist() == [2, 5, 6]
    assert aca.best_rows(rewards, last, 50).tolist() == list(range(7))


def made(args, obs=5, act=2):
    torch.manual_seed(0)
    stats = torch.zeros(obs), torch.ones(obs)
    critics, names = partial(aca.Critics, *stats, act, (8, 8)), ("actor", "critics", "baseline", "log_alpha")
    nets = {"actor": aca.SquashedGaussianActor(*stats, act, (8, 8)), "baseline": critics(), "critics": critics()}
    nets |= {"targets": deepcopy(nets["critics"]), "prior": aca.SquashedGaussianActor(*stats, act, (8, 8))}
    nets["log_alpha"] = nn.ParameterList([torch.tensor(-1.0)])
    optimizers = {key: aca.Adam(nets[key].parameters(), 1e-2) for key in names}
    optimizers["online_actor"] = aca.Adam(nets["actor"].parameters(), 1e-2, max_norm=0.25)
    data = aca.Data("", torch.zeros(1, 2 * obs + act + 2), None, obs, act, (0, 1), None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 2 * obs + act + 2, generator=generator)
    rows[:, -1], rows[:, obs : obs + act] = 0, rows[:, obs : obs + act].tanh()
    return nets, optimizers, data.split, (rows, torch.randn(2, 16, act, generator=generator))


def density(net, obs, action):
    """log pi by torch's own distributions."""
    mean, log_std = net(obs)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    return squashed.log_prob(action).sum(-1)


def test_the_offline_updates_numbers_by_hand():
    nets, optimizers, split, (rows, noise) = made(aca.Args())
    for optimizer in optimizers.values():
        optimizer.lr = 0.0
    obs, action, reward, next_obs, _ = split(rows)
    actor, z, alpha, none = nets["actor"], nets["baseline"], math.exp(-1), torch.zeros(16, 2)
    with torch.no_grad():
        drawn = [torch.tanh(actor(s)[0] + actor(s)[1].exp() * n) for s, n in ((next_obs, noise[0]), (obs, noise[1]))]
        ahead = density(actor, next_obs, drawn[0])
        y = reward + 0.99 * (nets["targets"](next_obs, drawn[0]).amin(0) - alpha * ahead)
        y_z = reward + 0.99 * (z(next_obs, none).amin(0) + ahead - alpha * ahead) - density(actor, obs, action)
        q = nets["critics"](obs, drawn[1]).amin(0)
        loss = 30 / q.abs().mean() * (alpha * density(actor, obs, drawn[1]) - q) - density(actor, obs, action)
    values = aca.make_offline_update(aca.Args(), nets, optimizers, split)(rows, noise)
    expected = ((nets["critics"](obs, action) - y) ** 2).mean(-1).sum(), ((z(obs, none) - y_z) ** 2).mean(-1).sum()
    assert float(values["critic_loss"]) == pytest.approx(expected[0].item(), rel=1e-4)
    assert float(values["baseline_loss"]) == pytest.approx(expected[1].item(), rel=1e-4)
    assert float(values["policy_loss"]) == pytest.approx(float(loss.mean()), rel=1e-4)


def test_the_online_updates_numbers_by_hand():
    nets, optimizers, split, (rows, noise) = made(aca.Args())
    for optimizer in optimizers.values():
        optimizer.lr = 0.0
    obs, action, reward, next_obs, _ = split(rows)
    actor, prior, alpha, w = nets["actor"], nets["prior"], math.exp(-1), 0.7

    def log_prior(s, a):
        mean, log_std = prior(s)
        at = [density(prior, s, torch.tanh(mean + sign * 3 * log_std.exp())) for sign in (-1, 1)]
        bound = torch.minimum(*at)
        return bound + F.softplus(density(prior, s, a) - bound)

    with torch.no_grad():
        drawn = [torch.tanh(actor(s)[0] + actor(s)[1].exp() * n) for s, n in ((next_obs, noise[0]), (obs, noise[1]))]
        ahead = nets["targets"](next_obs, drawn[0]).amin(0) + w * log_prior(next_obs, drawn[0])
        y = reward + 0.99 * (ahead - alpha * density(actor, next_obs, drawn[0]))
        critic_loss = ((nets["critics"](obs, action) + w * log_prior(obs, action) - y) ** 2).mean(-1).sum()
        value = nets["critics"](obs, drawn[1]).amin(0) + w * log_prior(obs, drawn[1])
        loss = (alpha * density(actor, obs, drawn[1]) - value).mean()
    values = aca.make_update(aca.Args(prior_std=3.0), nets, optimizers, split)(rows, noise, torch.tensor(w))
    assert float(values["critic_loss"]) == pytest.approx(critic_loss.item(), rel=1e-4)
    assert float(values["policy_loss"]) == pytest.approx(loss.item(), rel=1e-4)


def test_the_aligned_critic_is_z_plus_the_priors_log_density():
    nets, optimizers, _, (rows, _) = made(aca.Args())
    obs, action = rows[:, :5], rows[:, 5:7]
    optimizers["critics"].means[0] += 1
    aca.align(aca.Args(), nets, optimizers, 5)
    z = nets["baseline"](obs, torch.zeros_like(action))
    for net in (nets["critics"], nets["targets"]):
        torch.testing.assert_close(net(obs, action), z)
        torch.testing.assert_close(net(obs, -action), z)
    assert torch.equal(nets["prior"].mode(obs), nets["actor"].mode(obs)) and nets["log_alpha"][0] == 0
    assert optimizers["critics"].means[0].abs().max() == 0
    q = z.amin(0) + aca.log_prob_of(nets["prior"], obs, nets["actor"].mode(obs))
    assert (q > z.amin(0) + aca.log_prob_of(nets["prior"], obs, action)).float().mean() > 0.8


@pytest.mark.parametrize(
    "kind, moved",
    [
        ("offline", {"actor", "critics", "targets", "baseline", "log_alpha"}),
        ("online", {"actor", "critics", "targets", "log_alpha"}),
    ],
)
def test_what_an_update_moves_and_compiled_equals_eager(kind, moved, monkeypatch):
    """The first as C++, the second as a graph, whose C++ takes a minute more."""
    if kind == "offline":
        monkeypatch.setattr(aca.torch, "compile", partial(torch.compile, backend="aot_eager"))
    make, results = {"offline": aca.make_offline_update, "online": aca.make_update}[kind], []
    for compiled in (False, True):
        args = aca.Args(compile=compiled)
        nets, optimizers, split, batch = made(args)
        before = {key: deepcopy(net.state_dict()) for key, net in nets.items()}
        update = aca.compile_update(make(args, nets, optimizers, split), args)
        for _ in range(3):
            update(*batch, *([torch.tensor(0.7)] if kind == "online" else []))
        changed = {
            key
            for key, net in nets.items()
            if any(not torch.equal(x, before[key][k]) for k, x in net.state_dict().items())
        }
        assert changed == moved
        results.append(torch.cat([x.flatten() for net in nets.values() for x in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_alpha_moves_towards_the_target_entropy():
    for share, sign in ((-50.0, -1), (50.0, 1)):  # a target entropy far above, far below
        for make, extra in ((aca.make_offline_update, ()), (aca.make_update, (torch.tensor(0.7),))):
            args = aca.Args(entropy_share=share)
            nets, optimizers, split, batch = made(args)
            make(args, nets, optimizers, split)(*batch, *extra)
            assert (nets["log_alpha"][0] + 1) * sign < 0, "too little entropy raises alpha"


def test_the_online_actors_gradient_is_cut(tmp_path, monkeypatch, minari_store):
    seen, real = [], aca.Run.restore

    def restore(run, nets, optimizers, generator):
        seen.append({name: optimizer.max_norm for name, optimizer in optimizers.items()})
        return real(run, nets, optimizers, generator)

    monkeypatch.setattr(aca.Run, "restore", restore)
    aca.main(tiny(tmp_path / "run", online_steps=4))
    assert seen[0].pop("online_actor") == 0.25 and set(seen[0].values()) == {None}


def test_a_run_goes_online_with_the_aligned_critic(tmp_path, monkeypatch, minari_store):
    seen, real = [], aca.make_update
    monkeypatch.setattr(
        aca, "make_update", lambda args, nets, *rest: seen.append(deepcopy(nets)) or real(args, nets, *rest)
    )
    aca.main(tiny(tmp_path / "run", online_steps=4))
    (nets,), obs, action = seen, torch.randn(8, 11), torch.rand(8, 3)
    for net in ("critics", "targets"):
        torch.testing.assert_close(nets[net](obs, action), nets["baseline"](obs, 0 * action))
    assert torch.equal(nets["prior"].mode(obs), nets["actor"].mode(obs)) and nets["log_alpha"][0] == 0


@pytest.mark.parametrize("episodes", [0, 2])
def test_what_a_run_draws(episodes, tmp_path, monkeypatch, minari_store):
    seen, real = [], aca.make_update

    def make_update(*args):
        update = real(*args)
        return lambda rows, noise, w: seen.append((rows.clone(), float(w))) or update(rows, noise, w)

    monkeypatch.setattr(aca, "make_update", make_update)
    aca.main(
        tiny(tmp_path / "run", best_episodes=episodes, online_steps=12, eval_every=12, batch_size=6, prior_steps=4)
    )
    data = aca.load_data(aca.Args(), torch.device("cpu"))
    best = data.rows[aca.best_rows(data.rows[:, 14], data.last, episodes)]
    online = torch.load(tmp_path / "run/resume.pt", weights_only=True)["online"]
    assert len(best) > 6 or not episodes
    first, drawn = 1 if episodes else 7, set()  # once the buffer holds more than a batch
    assert [w for _, w in seen] == [1, 0.75, *[0.5] * (11 - first)]
    for step, (rows, _) in enumerate(seen, first):
        drawn |= {tuple(row) for row in rows.tolist()}
        assert drawn <= {tuple(row) for row in torch.cat([best, online[:step]]).tolist()}
    assert len(drawn & {tuple(row) for row in online.tolist()}) > (0 if episodes else 8)


@pytest.mark.parametrize("number", [1, 4], ids=["offline", "online"])
def test_a_run_resumes_exactly(number, tmp_path, monkeypatch, minari_store):
    whole, real, calls = aca.main(tiny(tmp_path / "whole")), aca.draw_curve, []
    assert whole["status"] == "complete" and [step for step, _ in whole["scores"]] == [4, 8]

    def cut_off(run):
        calls.append(1)
        if len(calls) == number + (number == 1):  # one evaluation of the stage was saved, the next is lost
            raise KeyboardInterrupt
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(aca, "draw_curve", cut_off)
        with pytest.raises(KeyboardInterrupt):
            aca.main(tiny(tmp_path / "cut"))
    assert aca.main(aca.parse_args(["--resume", str(tmp_path / "cut")]))["scores"] == whole["scores"]
    nets = [torch.load(tmp_path / name / "resume.pt", weights_only=True)["nets"] for name in ("whole", "cut")]
    for net in nets[0]:
        assert all(torch.equal(value, nets[1][net][key]) for key, value in nets[0][net].items()), net


def test_a_cached_start_and_what_does_not_fit(tmp_path, minari_store):
    aca.main(tiny(tmp_path / "first"))
    start = tmp_path / "first/offline.pt"
    summary = aca.main(tiny(tmp_path / "second", checkpoint=str(start)))
    rows = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"online"} and summary["status"] == "complete"
    before = [json.loads(line) for line in (tmp_path / "first/metrics.jsonl").read_text().splitlines()][-len(rows) :]
    assert all(
        row[key] == other[key] for row, other in zip(rows, before, strict=True) for key in row if "per_sec" not in key
    )
    with pytest.raises(aca.UserError, match="holds no networks"):  # Z belongs to the offline policy
        aca.main(tiny(tmp_path / "third", checkpoint=str(tmp_path / "first/model.pt")))
    saved = torch.load(start, weights_only=True)
    saved["baseline"]["net.0.weight"] = torch.zeros(2, 3, 256)
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(aca.UserError, match="holds no networks"):
        aca.main(tiny(tmp_path / "third", checkpoint=str(tmp_path / "other.pt")))
    assert not (tmp_path / "third").exists()


def test_settings_of_the_tasks():
    names = "random medium medium-replay medium-expert expert".split()
    found = [aca.Args(**aca.settings(aca.Args(env_id=f"hopper-{name}-v2"))) for name in names]
    assert [args.best_episodes for args in found] == [0, 0, 50, 50, 50]
    assert [args.prior_floor for args in found] == [0, 0.5, 0.5, 1, 1]
    assert [args.prior_std for args in found] == [7, 7, 7, 15, 15]
    maze = aca.settings(aca.Args(env_id="antmaze-umaze-v2"))
    assert maze["reward_bias"] == -1.0 and "best_episodes" not in maze
    assert (maze["prior_std"], maze["prior_steps"], maze["entropy_share"]) == (3.0, 200_000, 0.5)
