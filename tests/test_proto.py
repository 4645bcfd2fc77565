"""baselines/proto.py: its losses by hand, what each update moves, the buffer that begins with data, exact resume."""

import json
import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from baselines import proto


def tiny(run_dir, **changes):
    settings = {"offline_steps": 6, "online_steps": 8, "eval_every": 4, "eval_every_updates": 3, "eval_episodes": 1}
    return proto.Args(**settings | {"batch_size": 16, "compile": False, "run_dir": str(run_dir)} | changes)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_gumbel_loss_by_hand_and_at_its_minimum():
    e = math.e
    assert float(proto.gumbel_loss(tensor(2.0, 0.0), 2.0)) == pytest.approx((e - 2 + 1 - 0 - 1) / 2 / e)
    assert float(proto.gumbel_loss(tensor(-8.0), 2.0)) == pytest.approx((math.exp(-4) + 4 - 1) * e)  # shift: -1
    capped = tensor(100.0, 0.0).requires_grad_()
    proto.gumbel_loss(capped, 2.0).backward()
    assert capped.grad[0] == 0 and math.isfinite(capped.grad[1])
    q, v = tensor(1.0, 2.0, 4.0), tensor(0.0).requires_grad_()
    for _ in range(2000):
        (gradient,) = torch.autograd.grad(proto.gumbel_loss(q - v, 1.5), v)
        v = (v - 0.5 * gradient).detach().requires_grad_()
    assert v.item() == pytest.approx(1.5 * math.log((q / 1.5).exp().mean().item()), abs=1e-4)


def test_the_rest_by_hand():
    assert proto.value_target(tensor(1, 2), tensor(0, 1), tensor(10, 7), 0.9).tolist() == [10, 2]
    assert proto.regulariser(tensor(-1, 2), tensor(-3, 1), 0.5, 2.0).tolist() == [-0.5 + 4, 1 + 2]
    assert [proto.annealed(2.0, step, 10) for step in (0, 5, 10, 11)] == [2, 1, 0, 0]
    loss = proto.td3_actor_loss(tensor(4.0, -2.0), tensor([0.1, 0.3], [0.0, 0.0]), 2.0)
    assert float(loss) == pytest.approx(-2.5 / 3 * 1 + 2 * 0.1)


def made(args, obs=5, act=2):
    torch.manual_seed(0)
    stats, activation = (torch.zeros(obs), torch.ones(obs)), lambda: nn.Sequential(nn.LayerNorm(8), nn.ReLU())
    nets = {"actor": proto.TanhGaussianActor(*stats, act, (8, 8)), "value": proto.Value(*stats, (8, 8), activation)}
    nets["critics"] = proto.Critics(*stats, act, (8, 8), layer_norm=True)
    nets |= {"targets": deepcopy(nets["critics"]), "reference": deepcopy(nets["actor"])}
    nets["log_alpha"] = nn.ParameterList([torch.tensor(-1.0)])
    with torch.no_grad():
        nets["reference"].log_std += 0.3  # so that the two policies differ
    optimizers = {key: proto.Adam(nets[key].parameters(), 1e-2) for key in ("actor", "critics", "value", "log_alpha")}
    optimizers["online_actor"] = proto.Adam(nets["actor"].parameters(), 1e-2)
    optimizers["mean"] = proto.Adam(nets["actor"].net.parameters(), 1e-2)
    data = proto.Data("", torch.zeros(1, 2 * obs + act + 2), None, obs, act, (0, 1), None)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 2 * obs + act + 2, generator=generator)
    rows[:, -1], rows[:, obs : obs + act] = 0, rows[:, obs : obs + act].tanh()
    return nets, optimizers, data.split, (rows, torch.randn(2, 16, act, generator=generator))


UPDATES = {"offline": proto.make_offline_update, "sac": proto.make_update, "td3": proto.make_td3_update}


def ready(kind, args):
    """-> the networks and the update of this kind without arguments."""
    nets, optimizers, split, batch = made(args)
    update = proto.compile_update(UPDATES[kind](args, nets, optimizers, split), args)
    online = (torch.tensor(1.5), torch.tensor(1))
    return nets, lambda both=True: update(*batch, *(() if kind == "offline" else (*online, both)))


@pytest.mark.parametrize(
    "kind, moved",
    [
        ("offline", {"actor", "critics", "targets", "value"}),
        ("sac", {"actor", "critics", "targets", "reference", "log_alpha"}),
        ("td3", {"actor", "critics", "targets", "reference"}),
    ],
)
def test_what_an_update_moves(kind, moved):
    nets, update = ready(kind, proto.Args(compile=False))
    before = {key: deepcopy(net.state_dict()) for key, net in nets.items()}
    changed = lambda: {  # noqa: E731
        key for key, net in nets.items() if any(not torch.equal(x, before[key][k]) for k, x in net.state_dict().items())
    }
    if kind == "td3":
        update(both=False)
        assert changed() == {"critics"}
    update()
    assert changed() == moved


def test_the_offline_updates_numbers_by_hand():
    args = proto.Args(temperature=4.0, max_weight=1.01)
    nets, optimizers, split, (rows, noise) = made(args)
    for name in ("actor", "critics"):
        optimizers[name].lr = 0.0
    rows[8:, -1] = 1
    obs, action, reward, next_obs, terminated = split(rows)
    before = deepcopy(nets["value"])
    with torch.no_grad():
        nets["targets"].net[-1].bias += torch.tensor([[[3.0]], [[4.0]]])  # so that they are not the critics
        q = nets["targets"](obs, action).amin(0)
        z = (q - before(obs)) / 4
        value_loss = ((z - z.max()).exp() - (z + 1) * (-z.max()).exp()).mean()
        log_prob = torch.distributions.Normal(nets["actor"](obs)[0], 1.0).log_prob(action).sum(-1)
        q_now = nets["critics"](obs, action)
    values = proto.make_offline_update(args, nets, optimizers, split)(rows, noise)
    assert float(values["value_loss"]) == pytest.approx(float(value_loss), rel=1e-4)
    with torch.no_grad():
        y = reward + 0.99 * (1 - terminated) * nets["value"](next_obs)  # V after its step
        weight = ((q - nets["value"](obs)) / 4).exp()
        assert (weight < 1.01).any() or (weight > 1.01).any()
        loss = -(weight.clamp(max=1.01) * log_prob).mean()
    assert float(values["critic_loss"]) == pytest.approx(float(((q_now - y) ** 2).mean(-1).sum()), rel=1e-4)
    assert float(values["policy_loss"]) == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("penalize, minimum", [(True, True), (False, True), (True, False), (False, False)])
def test_sacs_target_and_loss_by_hand(penalize, minimum):
    args = proto.Args(penalize_target=penalize, minimum=minimum, tau_reference=0.0)
    nets, optimizers, split, (rows, noise) = made(args)
    for optimizer in optimizers.values():
        optimizer.lr = 0.0
    obs, action, reward, next_obs, _ = split(rows)
    log_prob = lambda net, s, x: torch.distributions.Normal(net(s)[0], net(s)[1].exp()).log_prob(x).sum(-1)  # noqa: E731
    actor, reference, alpha = nets["actor"], nets["reference"], math.exp(-1)
    with torch.no_grad():
        raw = [actor(s)[0] + actor(s)[1].exp() * n for s, n in ((next_obs, noise[0]), (obs, noise[1]))]
        penalty = [(alpha + 1.5) * log_prob(actor, s, x) - 1.5 * log_prob(reference, s, x)
                   for s, x in ((next_obs, raw[0]), (obs, raw[1]))]  # fmt: skip
        q = nets["targets"](next_obs, raw[0].clamp(-1, 1))
        y = reward + 0.99 * ((q.amin(0) if minimum else q[1]) - penalize * penalty[0])
        critic_loss = ((nets["critics"](obs, action) - y) ** 2).mean(-1).sum()
        loss = (penalty[1] - nets["critics"](obs, raw[1].clamp(-1, 1)).mean(0)).mean()
    values = proto.make_update(args, nets, optimizers, split)(rows, noise, torch.tensor(1.5), torch.tensor(1), True)
    assert float(values["critic_loss"]) == pytest.approx(float(critic_loss), rel=1e-4)
    assert float(values["policy_loss"]) == pytest.approx(float(loss), rel=1e-4)
    assert float(values["alpha"]) == pytest.approx(alpha)
    # what the actor climbs: the gradient goes through the drawn action, to Q and both densities
    loss = actor_loss_by_hand(nets, obs, noise[1], alpha, 1.5)
    by_hand = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(nets["actor"].parameters()))])
    mine = torch.cat([m.flatten() for m in optimizers["online_actor"].means]) / 0.1  # Adam's first moment, from 0
    torch.testing.assert_close(mine, by_hand, rtol=1e-3, atol=1e-5)


def actor_loss_by_hand(nets, obs, noise, alpha, weight):
    density = lambda net, x: torch.distributions.Normal(net(obs)[0], net(obs)[1].exp()).log_prob(x).sum(-1)  # noqa: E731
    raw = nets["actor"](obs)[0] + nets["actor"](obs)[1].exp() * noise
    penalty = (alpha + weight) * density(nets["actor"], raw) - weight * density(nets["reference"], raw)
    return (penalty - nets["critics"](obs, raw.clamp(-1, 1)).mean(0)).mean()


@pytest.mark.parametrize("penalize, minimum", [(True, True), (False, False)])
def test_td3s_target_and_loss_by_hand(penalize, minimum):
    args = proto.Args(td3=True, penalize_target=penalize, minimum=minimum)
    nets, optimizers, split, (rows, noise) = made(args)
    for optimizer in optimizers.values():
        optimizer.lr = 0.0
    with torch.no_grad():
        nets["reference"].net[-1].bias += 0.2
        obs, action, reward, next_obs, _ = split(rows)
        near = nets["reference"](next_obs)[0]
        noisy = (nets["actor"](next_obs)[0] + (0.2 * noise[0]).clamp(-0.5, 0.5)).clamp(-1, 1)
        q = nets["targets"](next_obs, near).amin(0) if minimum else nets["targets"](next_obs, noisy)[1]
        y = reward + 0.99 * (q - penalize * 1.5 * ((noisy - near) ** 2).mean())
        critic_loss = ((nets["critics"](obs, action) - y) ** 2).mean(-1).sum()
        chosen = nets["actor"](obs)[0]
        q, distance = nets["critics"](obs, chosen)[1], ((chosen - nets["reference"](obs)[0]) ** 2).mean()
        loss = -2.5 * q.mean() / q.abs().mean() + 1.5 * distance
    values = proto.make_td3_update(args, nets, optimizers, split)(rows, noise, torch.tensor(1.5), torch.tensor(1), True)
    assert float(values["critic_loss"]) == pytest.approx(float(critic_loss), rel=1e-4)
    assert float(values["policy_loss"]) == pytest.approx(float(loss), rel=1e-4)


def test_a_larger_weight_holds_the_policy_nearer_to_its_reference():
    moved = []
    for weight in (0.0, 50.0):
        nets, optimizers, split, (rows, _) = made(proto.Args())
        nets["reference"].load_state_dict(nets["actor"].state_dict())
        update = proto.make_update(proto.Args(tau_reference=0.0), nets, optimizers, split)
        for optimizer in optimizers.values():
            optimizer.lr = 1e-3
        for _ in range(150):
            noise = torch.randn(2, 16, 2)
            update(rows, noise, torch.tensor(weight), torch.tensor(1), True)
        moved.append((nets["actor"](rows[:, :5])[0] - nets["reference"](rows[:, :5])[0]).abs().mean().item())
    assert moved[1] < 0.5 * moved[0], moved


@pytest.mark.parametrize("kind", UPDATES)
def test_compiled_equals_eager(kind, monkeypatch):
    """As graphs, whose C++ takes a minute more; one of them also as C++."""
    if kind != "sac":
        monkeypatch.setattr(proto.torch, "compile", partial(torch.compile, backend="aot_eager"))
    results = []
    for compiled in (False, True):
        nets, update = ready(kind, proto.Args(compile=compiled))
        for step in range(4):
            update(both=kind == "sac" or step % 2 == 1)
        results.append(torch.cat([x.flatten() for net in nets.values() for x in net.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offline", [0, 8, 16])
def test_the_online_buffer_begins_with_some_of_the_data(offline):
    own, generator = torch.tensor([5, 7, 11, 100, 101]), torch.Generator().manual_seed(0)
    index = torch.stack([proto.draw_seeded(generator, 100, own, offline, 16) for _ in range(2000)])
    assert index.shape == (2000, 16) and index[:, :offline].numel() == 2000 * offline
    if offline:
        assert index[:, :offline].min() == 0 and index[:, :offline].max() == 99
    found, counts = index[:, offline:].unique(return_counts=True)
    assert found.tolist() == ([5, 7, 11, 100, 101] if offline < 16 else [])
    if offline < 16:
        torch.testing.assert_close(counts / counts.sum(), torch.full((5,), 0.2), atol=0.02, rtol=0)


@pytest.mark.parametrize("td3, seeded, offline", [(False, 100, 8), (True, 250, 0)])
def test_what_a_run_draws(td3, seeded, offline, tmp_path, monkeypatch, minari_store):
    assert (proto.SEEDED, proto.SEEDED_TD3) == (10_000, 25_000)
    monkeypatch.setattr(proto, "SEEDED", 100)
    monkeypatch.setattr(proto, "SEEDED_TD3", 250)
    seen, real = [], proto.draw_seeded
    monkeypatch.setattr(proto, "draw_seeded", lambda *args: seen.append(args) or real(*args))
    proto.main(tiny(tmp_path / "run", td3=td3, online_steps=3, offline_steps=1))
    for step, (_, first, own, share, batch) in enumerate(seen, 1):
        data, online = own[own < first], own[own >= first]
        assert len(data.unique()) == len(data) == seeded and (share, batch) == (offline, 16)
        assert online.tolist() == [first + i for i in range(step)]
    assert len(seen) == 3


@pytest.mark.parametrize("td3", [False, True])
def test_a_run_resumes_exactly_in_both_stages(td3, tmp_path, monkeypatch, minari_store):
    whole = proto.main(tiny(tmp_path / "whole", td3=td3))
    assert whole["status"] == "complete" and [step for step, _ in whole["scores"]] == [4, 8]
    real = proto.draw_curve
    for number in (1, 3):  # in the middle of each stage
        calls = []

        def cut_off(run, calls=calls, number=number):
            calls.append(1)
            if len(calls) == number:
                run.save()
                raise KeyboardInterrupt
            return real(run)

        def cut_off_online(run, calls=calls, number=number):
            calls.append(1)
            if len(calls) == number + 1:  # the first evaluation was saved, the second is lost
                raise KeyboardInterrupt
            return real(run)

        folder = tmp_path / f"cut{number}"
        with monkeypatch.context() as patch:
            patch.setattr(proto, "draw_curve", cut_off if number == 1 else cut_off_online)
            with pytest.raises(KeyboardInterrupt):
                proto.main(tiny(folder, td3=td3))
        assert proto.main(proto.parse_args(["--resume", str(folder)]))["scores"] == whole["scores"]
        nets = [torch.load(path / "resume.pt", weights_only=True)["nets"] for path in (tmp_path / "whole", folder)]
        for net in nets[0]:
            assert all(torch.equal(value, nets[1][net][key]) for key, value in nets[0][net].items()), net


def test_a_cached_start_and_what_does_not_fit(tmp_path, minari_store):
    proto.main(tiny(tmp_path / "first"))
    start = tmp_path / "first/offline.pt"
    summary = proto.main(tiny(tmp_path / "second", checkpoint=str(start), td3=True))
    rows = [json.loads(line) for line in (tmp_path / "second/metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in rows} == {"online"} and summary["status"] == "complete"
    saved = torch.load(start, weights_only=True)
    saved["actor"]["obs_mean"] = torch.zeros(5)
    torch.save(saved, tmp_path / "other.pt")
    with pytest.raises(proto.UserError, match="holds no networks"):
        proto.main(tiny(tmp_path / "third", checkpoint=str(tmp_path / "other.pt")))
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize("td3", [False, True])
def test_a_run_goes_online_with_the_trained_policy_as_its_reference(td3, tmp_path, monkeypatch, minari_store):
    name, seen = "make_td3_update" if td3 else "make_update", []
    real = getattr(proto, name)
    monkeypatch.setattr(proto, name, lambda args, nets, *rest: seen.append(deepcopy(nets)) or real(args, nets, *rest))
    proto.main(tiny(tmp_path / "run", td3=td3, online_steps=4))
    (nets,), obs = seen, torch.randn(8, 11)
    assert torch.equal(nets["reference"].mode(obs), nets["actor"].mode(obs))
    assert torch.equal(nets["reference"].log_std, nets["actor"].log_std) and nets["actor"].log_std.abs().max() > 0


def test_the_weight_of_the_divergence_falls_with_the_steps(tmp_path, monkeypatch, minari_store):
    seen, real = [], proto.make_update

    def make_update(*parts):
        update = real(*parts)
        return lambda rows, noise, weight, *rest: seen.append(float(weight)) or update(rows, noise, weight, *rest)

    monkeypatch.setattr(proto, "make_update", make_update)
    proto.main(tiny(tmp_path / "run", online_steps=4, offline_steps=1, anneal_steps=4))
    assert seen == [1.5, 1.0, 0.5, 0.0]


def test_settings_of_the_tasks():
    assert proto.settings(proto.Args()) == {}
    assert proto.settings(proto.Args(env_id="halfcheetah-medium-v2")) == {"layer_norm": False}
    maze = proto.settings(proto.Args(env_id="antmaze-umaze-v2"))
    assert (maze["temperature"], maze["reward_bias"], maze["tau_reference"]) == (0.5, -1.0, 5e-5)
    assert maze["offline_steps"] == 200_000 and not (maze["normalize_rewards"] or maze["penalize_target"])
    assert not maze["minimum"]
