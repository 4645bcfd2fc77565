"""Each update on small networks: what it writes and leaves alone, where it converges, compiled against eager."""

import math
from copy import deepcopy

import bc
import behaviour
import cql
import iql
import lapo
import pytest
import td3_bc
import torch
from conftest import for_scripts

import o2o_ppo
import o2o_sac
import o2o_td3

OBS, ACT, BATCH = 4, 2, 32


def small_nets(act_dim=ACT, hidden=(16, 16), seed=0):
    torch.manual_seed(seed)
    stats = torch.zeros(OBS), torch.ones(OBS)
    actor = o2o_sac.SquashedGaussianActor(*stats, act_dim, hidden)
    torch.nn.init.normal_(actor.net[-1].weight, std=0.5)
    critics = o2o_sac.Critics(*stats, act_dim, hidden, layer_norm=True)
    nets = {"actor": actor, "offline": deepcopy(actor), "reference": deepcopy(actor)}
    nets |= {"critics": critics, "targets": deepcopy(critics)}
    return nets | {"log_alpha": scalar(math.log(0.2)), "log_multiplier": scalar(0.0)}


def scalar(value):
    return torch.nn.ParameterList([torch.tensor(float(value))])


def splitter(act_dim=ACT):
    """Data.split for rows of these sizes."""
    return o2o_sac.Data("", None, None, OBS, act_dim, (0, 1), None).split


def sac_updates(nets, act_dim=ACT, lr=1e-3, **changes):
    args = o2o_sac.Args(**changes)
    optimizers = {key: o2o_sac.Adam(nets[key].parameters(), lr) for key in ("actor", "critics", "log_alpha")}
    reevaluate, align, finetune = o2o_sac.make_updates(args, nets, optimizers, splitter(act_dim))
    return lambda rows, noise: reevaluate(rows, noise[0]), lambda rows, noise: align(rows, noise[0]), finetune


def batch(seed, act_dim=ACT, size=BATCH):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, 2 * OBS + act_dim + 2, generator=generator)
    rows[:, OBS : OBS + act_dim].tanh_()
    rows[:, -1] = (rows[:, -1] > 1).float()
    return rows, torch.randn(2, size, act_dim, generator=generator)


def flat(net):
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def cql_parts(**changes):
    args = cql.Args(cql_actions=3, **changes)
    torch.manual_seed(0)
    stats = torch.zeros(OBS), torch.ones(OBS)
    nets = {"actor": cql.SquashedGaussianActor(*stats, ACT, (16, 16)), "critics": cql.CqlCritics(*stats, ACT, (16, 16))}
    nets |= {"targets": deepcopy(nets["critics"]), "log_alpha": scalar(0.0), "log_weight": scalar(0.0)}
    rates = {"actor": args.policy_lr, "log_alpha": args.policy_lr}
    rates |= {"critics": args.critic_lr, "log_weight": args.critic_lr}
    optimizers = {name: cql.Adam(nets[name].parameters(), rate) for name, rate in rates.items()}
    return nets, cql.make_update(args, nets, optimizers, splitter())


STAGES = {
    "reevaluate": (0, {"critics", "targets"}),
    "align": (1, {"critics", "actor"}),
    "finetune": (2, {"critics", "targets", "actor", "log_alpha"}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_writes_its_networks_and_no_others(stage):
    index, written = STAGES[stage]
    nets = small_nets()
    update = sac_updates(nets)[index]
    before = {key: flat(net) for key, net in nets.items()}
    rows, noise = batch(1)
    update(*((rows, noise, torch.tensor(1.0)) if stage == "finetune" else (rows, noise)))
    changed = {key for key, net in nets.items() if not torch.equal(before[key], flat(net))}
    assert changed == written


def test_cql_writes_all_its_networks_and_the_lagrange_weight_only_with_lagrange():
    for lagrange in (False, True):
        nets, update = cql_parts(lagrange=lagrange, max_backup=lagrange)
        before = {key: flat(net) for key, net in nets.items()}
        update(batch(1)[0], torch.randn(10, BATCH, ACT))
        changed = {key for key, net in nets.items() if not torch.equal(before[key], flat(net))}
        assert changed == {"actor", "critics", "targets", "log_alpha"} | ({"log_weight"} if lagrange else set())


def test_cql_pushes_the_policys_actions_below_the_datas():
    nets, update = cql_parts(cql_alpha=10.0, gamma=0.0)
    for step in range(200):
        rows, _ = batch(step)
        rows[:, OBS : OBS + ACT] = 0.5
        rows[:, OBS + ACT] = 0.0
        update(rows, torch.randn(10, BATCH, ACT))
    obs = torch.randn(64, OBS)
    data, other = nets["critics"](obs, torch.full((64, ACT), 0.5)), nets["critics"](obs, torch.full((64, ACT), -0.5))
    assert (data - other).mean() > 0.5


def test_reevaluation_finds_the_value_of_a_known_process():
    """Reward 1 and no end: Q = 1 + gamma V, V = (1 + alpha H) / (1 - gamma) with the policy's entropy H."""
    nets, gamma, alpha = small_nets(), 0.8, 0.2
    for parameter in nets["offline"].parameters():
        torch.nn.init.zeros_(parameter)  # the same action distribution in every state
    reevaluate = sac_updates(nets, gamma=gamma, tau=0.05, alpha=alpha)[0]
    for step in range(600):
        rows, noise = batch(step)
        rows[:, OBS + ACT], rows[:, -1] = 1.0, 0.0
        reevaluate(rows, noise)
    obs = torch.randn(4096, OBS)
    action, log_prob, _ = nets["offline"].sample(obs, torch.randn(4096, ACT))
    value = (1 - alpha * log_prob.mean()) / (1 - gamma)
    assert nets["critics"](obs, action).mean().item() == pytest.approx((1 + gamma * value).item() - 0, rel=0.05)


class KnownQ(torch.nn.Module):
    """A stand-in for two re-evaluated critics with a known value of each action."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, obs, action):
        return torch.stack([self.value(action[:, 0]), self.value(action[:, 0]) + 1])


def align_one_state(value, alpha=0.2):
    """Aligns a small critic with a policy whose mode is 0, in one state. -> for a grid of actions: the old and the new
    value, log pi_off, and the weights of the integral over actions."""
    nets = small_nets(act_dim=1, hidden=(64, 64))
    for key in ("offline", "actor", "reference"):
        for parameter in nets[key].parameters():
            torch.nn.init.zeros_(parameter)
    nets["targets"] = KnownQ(value)
    align = sac_updates(nets, act_dim=1, alpha=alpha)[1]
    for step in range(1000):
        align(torch.zeros(256, 2 * OBS + 3), batch(step, act_dim=1, size=256)[1])
    u = torch.linspace(-2.0, 2.0, 4001).unsqueeze(1)
    obs, action = torch.zeros(len(u), OBS), torch.tanh(u)
    with torch.no_grad():
        log_prob = o2o_sac.squashed_log_prob(*nets["offline"](obs), u)
        q_old, q_new = nets["targets"](obs, action).amin(0), nets["critics"](obs, action).amin(0)
    return action[:, 0], q_old, q_new, log_prob, (1 - action[:, 0] ** 2) * (u[1, 0] - u[0, 0])


def test_aligned_soft_value_lies_between_that_of_the_policy_and_that_of_its_mode():
    """V_fqe <= V_align <= V_mode, by numerical integration, for a critic that agrees with the policy's preference."""
    alpha = 0.2
    _, q_old, q_new, log_prob, weight = align_one_state(lambda a: 5 - 3 * a**2, alpha)
    v_fqe = (log_prob.exp() * (q_old - alpha * log_prob) * weight).sum()
    v_align = alpha * torch.logsumexp(q_new / alpha + weight.log(), 0)
    v_mode = q_old[2000] - alpha * log_prob[2000]
    assert v_fqe - 0.05 <= v_align <= v_mode + 0.05


def test_alignment_makes_the_policys_mode_the_best_action_without_changing_its_value():
    """A critic that prefers 0.5 to the mode 0. (V_fqe <= V_align does not hold for such a critic: it is lowered to at
    most V_mode, which may be less than V_fqe. The upper bound holds for every critic.)"""
    alpha = 0.2
    action, q_old, q_new, log_prob, weight = align_one_state(lambda a: 5 - 2 * (a - 0.5).abs(), alpha)
    assert abs(action[q_old.argmax()] - 0.5) < 0.01
    assert abs(action[q_new.argmax()]) < 0.2
    assert q_new[2000].item() == pytest.approx(q_old[2000].item(), abs=0.1)
    v_align = alpha * torch.logsumexp(q_new / alpha + weight.log(), 0)
    assert v_align <= q_old[2000] - alpha * log_prob[2000] + 0.1


def test_a_violated_constraint_raises_the_penalty_and_pulls_the_actor_back():
    def divergence(multiplier):
        nets = small_nets()
        for parameter in nets["reference"].parameters():
            torch.nn.init.zeros_(parameter)
        finetune = sac_updates(nets)[2]
        for step in range(150):
            _, f = finetune(*batch(step), torch.tensor(multiplier))
        return f.mean().item()

    assert divergence(50.0) < 0.5 * divergence(0.0)


def td3_nets(seed=0):
    torch.manual_seed(seed)
    stats = torch.zeros(OBS), torch.ones(OBS)
    actor = o2o_td3.DeterministicActor(*stats, ACT, (16, 16))
    critics = o2o_td3.Critics(*stats, ACT, (16, 16), layer_norm=True)
    nets = {key: deepcopy(actor) for key in ("actor", "actor_target", "offline", "reference")}
    nets |= {"critics": critics, "targets": deepcopy(critics)}
    return nets


def td3_updates(nets, lr=1e-3, **changes):
    args = o2o_td3.Args(**changes)
    optimizers = {key: o2o_td3.Adam(nets[key].parameters(), lr) for key in ("actor", "critics")}
    reevaluate, align, finetune = o2o_td3.make_updates(args, nets, optimizers, splitter())
    first = lambda update: lambda rows, noise, *extra: update(rows, noise[0], *extra)  # noqa: E731
    return first(reevaluate), first(align), first(finetune)


def td3_bc_parts(**changes):
    torch.manual_seed(0)
    stats, args = (torch.zeros(OBS), torch.ones(OBS)), td3_bc.Args(**changes)
    nets = {key: td3_bc.DeterministicActor(*stats, ACT, (16, 16)) for key in ("actor", "actor_target")}
    nets |= {key: td3_bc.Critics(*stats, ACT, (16, 16)) for key in ("critics", "targets")}
    optimizers = {name: td3_bc.Adam(nets[name].parameters(), args.learning_rate) for name in ("actor", "critics")}
    update = td3_bc.make_update(args, nets, optimizers, splitter())
    return nets, lambda rows, noise, delayed: update(rows, noise[0], delayed)


LAMBDA = torch.tensor(0.7)
TD3_STAGES = {  # index, further arguments, networks that it writes
    "td3 reevaluate": (0, (), {"critics", "targets"}),
    "td3 align": (1, (), {"critics", "actor"}),
    "td3 finetune, critics only": (2, (LAMBDA, False), {"critics"}),
    "td3 finetune, delayed": (2, (LAMBDA, True), {"critics", "targets", "actor", "actor_target"}),
}


@pytest.mark.parametrize("stage", TD3_STAGES)
def test_a_stage_of_td3_writes_its_networks_and_no_others(stage):
    index, extra, written = TD3_STAGES[stage]
    nets = td3_nets()
    update = td3_updates(nets)[index]
    before = {key: flat(net) for key, net in nets.items()}
    update(*batch(1), *extra)
    assert {key for key, net in nets.items() if not torch.equal(before[key], flat(net))} == written


@pytest.mark.parametrize("delayed", [False, True])
def test_td3_bc_writes_its_networks(delayed):
    nets, update = td3_bc_parts()
    before = {key: flat(net) for key, net in nets.items()}
    update(*batch(1), delayed)
    changed = {key for key, net in nets.items() if not torch.equal(before[key], flat(net))}
    assert changed == (set(nets) if delayed else {"critics"})


def test_td3_bc_imitates_where_values_say_nothing():
    """Reward 0: all that is left of the actor's loss is the distance to the data's action."""
    nets, update = td3_bc_parts(bc_alpha=0.0, learning_rate=3e-3)
    for step in range(300):
        rows, noise = batch(step)
        rows[:, OBS : OBS + ACT], rows[:, OBS + ACT] = 0.5, 0.0
        update(rows, noise, True)
    assert (nets["actor"](torch.randn(64, OBS)) - 0.5).abs().mean() < 0.05


def test_td3_reevaluation_finds_the_value_of_a_known_process():
    """Reward 1 and no end: Q = 1 / (1 - gamma)."""
    nets = td3_nets()
    reevaluate = td3_updates(nets, gamma=0.8, tau=0.05)[0]
    for step in range(600):
        rows, noise = batch(step)
        rows[:, OBS + ACT], rows[:, -1] = 1.0, 0.0
        reevaluate(rows, noise)
    obs = torch.randn(1024, OBS)
    assert nets["critics"](obs, nets["offline"](obs)).mean().item() == pytest.approx(5, rel=0.05)


class KnownTd3Q(torch.nn.Module):
    """Two re-evaluated critics that prefer the first action to be 0.15, in every state."""

    def forward(self, obs, action):
        q = 10 - 20 * (action[:, 0] - 0.15) ** 2
        return torch.stack([q, q + 0.1])


def test_td3_alignment_makes_the_policys_action_the_best_one_without_changing_its_value():
    nets = td3_nets()
    for key in ("offline", "actor"):
        for parameter in nets[key].parameters():
            torch.nn.init.zeros_(parameter)  # the policy's action is 0
    nets["targets"] = KnownTd3Q()
    align = td3_updates(nets, bump=10.0)[1]
    for step in range(1500):
        rows = torch.zeros(256, 2 * OBS + ACT + 2)
        align(rows, batch(step, size=256)[1])
    grid = torch.zeros(61, ACT)
    grid[:, 0] = torch.linspace(-0.3, 0.3, 61)
    with torch.no_grad():
        q_old, q_new = (net(torch.zeros(61, OBS), grid).amin(0) for net in (nets["targets"], nets["critics"]))
    assert abs(grid[q_old.argmax(), 0] - 0.15) < 0.01
    assert abs(grid[q_new.argmax(), 0]) < 0.1
    assert q_new[30].item() == pytest.approx(q_old[30].item(), abs=0.2)


def test_td3_penalty_pulls_the_actor_back_and_enters_the_bellman_target():
    def after(multiplier):
        nets = td3_nets()
        for parameter in nets["reference"].parameters():
            torch.nn.init.zeros_(parameter)
        finetune = td3_updates(nets)[2]
        before = flat(nets["critics"])
        finetune(*batch(0), torch.tensor(multiplier), False)
        moved = flat(nets["critics"]) - before
        for step in range(150):
            values, f = finetune(*batch(step), torch.tensor(multiplier), True)
        assert f.shape == (BATCH, ACT) and f.mean().item() == pytest.approx(values["divergence"].item())
        return moved, values["divergence"].item()

    (without, far), (within, near) = after(0.0), after(50.0)
    assert not torch.equal(without, within)
    assert near < 0.5 * far


def test_the_penalty_in_td3s_target_is_that_of_the_actor_not_of_its_slow_copy():
    moved = {}
    for changed in (None, "actor", "actor_target"):
        nets = td3_nets()
        nets["targets"] = KnownTd3Q()  # of the first action alone
        if changed:
            with torch.no_grad():  # moves the second action
                nets[changed].net[-1].bias[1] += 2.0
        values, _ = td3_updates(nets, policy_noise=0.0, gamma=0.9)[2](*batch(0), torch.tensor(5.0), False)
        moved[changed] = values["critic_loss"].item()
    assert moved[None] == moved["actor_target"]
    assert moved[None] != moved["actor"]


def ppo_parts(lr=1e-3, **changes):
    """-> nets, and PPO's two updates."""
    torch.manual_seed(0)
    stats = torch.zeros(OBS), torch.ones(OBS)
    actor = o2o_ppo.TanhGaussianActor(*stats, ACT, (16, 16), std=0.5)
    nets = {"actor": actor, "reference": deepcopy(actor), "value": o2o_ppo.Value(*stats, (16, 16), torch.nn.Tanh)}
    args = o2o_ppo.Args(**changes)
    optimizers = {key: o2o_ppo.Adam(nets[key].parameters(), lr, max_norm=0.5) for key in ("actor", "value")}
    optimizers["reevaluation"] = o2o_ppo.Adam(nets["value"].parameters(), lr)
    return nets, o2o_ppo.make_updates(args, nets, optimizers, OBS, ACT)


def ppo_batch(step, actor=None):
    """Rows of stage 2 with the log_prob of `actor`."""
    rows = torch.randn(BATCH, OBS + ACT + 3, generator=torch.Generator().manual_seed(step))
    if actor is not None:
        mean, log_std = actor(rows[:, :OBS])
        rows[:, OBS + ACT] = o2o_ppo.gaussian_log_prob(mean, log_std, rows[:, OBS : OBS + ACT]).detach()
    return rows


def iql_parts(**changes):
    torch.manual_seed(0)
    stats = torch.zeros(OBS), torch.ones(OBS)
    nets = {"actor": iql.TanhGaussianActor(*stats, ACT, (16, 16), std=1.0)}
    nets |= {"critics": iql.Critics(*stats, ACT, (16, 16), n=3), "value": iql.Value(*stats, (16, 16), torch.nn.ReLU)}
    nets["targets"], args = deepcopy(nets["critics"]), iql.Args(**changes)
    optimizers = {name: iql.Adam(nets[name].parameters(), args.learning_rate) for name in ("actor", "value", "critics")}
    update = iql.make_iql_update(args, nets, optimizers, splitter())
    return nets, lambda rows, scale: update(rows, None, scale)


def test_ppo_and_iql_write_their_networks_and_no_others():
    for stage, written in ((0, {"value"}), (1, {"actor", "value"})):
        nets, updates = ppo_parts()
        before = {key: flat(net) for key, net in nets.items()}
        rows = torch.randn(BATCH, 2 * OBS + 2) if stage == 0 else ppo_batch(0)
        updates[stage](rows, torch.tensor(1.0))
        assert {key for key, net in nets.items() if not torch.equal(before[key], flat(net))} == written
    nets, update = iql_parts()
    before = {key: flat(net) for key, net in nets.items()}
    update(batch(1)[0], torch.tensor(1.0))
    assert {key for key, net in nets.items() if not torch.equal(before[key], flat(net))} == set(nets)
    actor = flat(nets["actor"])
    update(batch(1)[0], torch.tensor(0.0))  # the end of the cosine
    assert torch.equal(actor, flat(nets["actor"]))


def test_ppo_value_fit_finds_the_value_of_a_known_process():
    """Reward 1, cut off by time limits 1 to 3 steps later: V = 1 / (1 - gamma) only if they are bootstrapped."""
    nets, (reevaluate, _) = ppo_parts(lr=3e-3)
    gamma = 0.8
    for _ in range(1500):
        rows, left = torch.randn(BATCH, 2 * OBS + 2), torch.randint(1, 4, (BATCH,))
        rows[:, OBS], rows[:, OBS + 1] = (1 - gamma**left) / (1 - gamma), gamma**left
        reevaluate(rows, None)
    assert nets["value"](torch.randn(1024, OBS)).mean().item() == pytest.approx(5, rel=0.05)


def test_ppo_makes_good_actions_likelier_and_its_std_is_free_after_loading():
    nets, (_, finetune) = ppo_parts(max_std=0.05, entropy_weight=1.0, lr=0.01)
    old = deepcopy(nets["actor"])
    rows = ppo_batch(0, old)
    rows[:, -2] = torch.where(torch.arange(BATCH) < BATCH // 2, 1.0, -1.0)
    for _ in range(20):
        finetune(rows, torch.tensor(1.0))
    mean, log_std = nets["actor"](rows[:, :OBS])
    gain = o2o_ppo.gaussian_log_prob(mean, log_std, rows[:, OBS : OBS + ACT]) - rows[:, OBS + ACT]
    assert gain[: BATCH // 2].mean() > gain[BATCH // 2 :].mean() + 0.05
    assert nets["actor"].log_std.exp().max() > 0.5  # the cap holds once, when the policy is loaded


def test_iql_learns_the_better_of_two_actions_in_the_data():
    """Half of the data's actions earn 1, half 0: V lies nearer to 1, and the policy imitates the former."""
    nets, update = iql_parts(expectile=0.9, temperature=5.0, learning_rate=3e-3, tau=0.05)
    for step in range(800):
        rows, _ = batch(step)
        good = (torch.arange(BATCH) % 2).float()
        rows[:, OBS : OBS + ACT], rows[:, OBS + ACT], rows[:, -1] = (good - 0.5).unsqueeze(1), good, 1.0
        update(rows, torch.tensor(1.0))
    obs = torch.randn(256, OBS)
    assert nets["value"](obs).mean().item() == pytest.approx(0.9, abs=0.07)  # the expectile of a fair coin
    assert nets["actor"].mode(obs).mean().item() > 0.3


def stopped_at(module, maker, args, monkeypatch):
    """What `module.main(args)` hands to `maker`, the function that makes its updates; the run ends there."""
    seen = []

    def stop(*arguments):
        seen.extend(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, maker, stop)
        with pytest.raises(KeyboardInterrupt):
            module.main(args)
    return seen


def same_tensors(ones, others):
    return [id(one) for one in ones] == [id(other) for other in others]


def test_cql_trains_the_temperature_at_the_policys_rate(minari_store, tmp_path, monkeypatch):
    settings = {"output": str(tmp_path / "cql.pt"), "run_dir": str(tmp_path / "run"), "eval_episodes": 1}
    args = cql.Args(policy_lr=2e-5, critic_lr=4e-4, critic_layers=2, **settings)
    _, nets, optimizers, _ = stopped_at(cql, "make_update", args, monkeypatch)
    rates = {"actor": 2e-5, "log_alpha": 2e-5, "critics": 4e-4, "log_weight": 4e-4}
    assert {key: optimizer.lr for key, optimizer in optimizers.items()} == rates
    assert all(same_tensors(optimizers[key].params, nets[key].parameters()) for key in rates)
    assert nets["log_weight"][0].exp().item() == pytest.approx(math.e)  # the multiplier of --lagrange
    assert sum(isinstance(layer, cql.StackedLinear) for layer in nets["critics"].net) == 3  # two hidden, the output


@for_scripts(o2o_ppo)
def test_ppo_caps_the_std_when_it_loads_the_policy_and_not_again_on_resume(script, tiny, monkeypatch, tmp_path):
    settings = {"max_std": 0.05, "policy_lr": 0.2, "entropy_weight": 1.0}  # entropy lets the std grow fast
    _, nets, *_ = stopped_at(script, "make_updates", tiny(run_dir=str(tmp_path / "stopped"), **settings), monkeypatch)
    saved = torch.load(tiny().checkpoint, weights_only=True)["actor"]["log_std"]
    assert saved.exp().min() > 0.1
    for key in ("actor", "reference"):
        torch.testing.assert_close(nets[key].log_std.exp(), torch.full_like(saved, 0.05))
    script.main(tiny(**settings))
    grown = torch.load(tmp_path / "run/resume.pt", weights_only=True)["nets"]["actor"]["log_std"]
    assert grown.exp().max() > 0.06
    longer = tiny(resume=str(tmp_path / "run"), online_steps=24, **settings)
    _, nets, *_ = stopped_at(script, "make_updates", longer, monkeypatch)
    assert torch.equal(nets["actor"].log_std.detach(), grown)


LAPO_STATS = (torch.zeros(OBS), torch.ones(OBS)), (torch.tensor([0.1, -0.2]), torch.tensor([0.5, 2.0]))


def lapo_parts(critics=None, **changes):
    torch.manual_seed(0)
    args, sizes = lapo.Args(**changes), (*LAPO_STATS, 2 * ACT, (16, 16))
    nets = {"encoder": lapo.Encoder(*sizes), "decoder": lapo.Decoder(*sizes), "actor": lapo.LatentPolicy(*sizes, 2.0)}
    nets["value"] = lapo.Value(*LAPO_STATS[0], (16, 16), torch.nn.ReLU)
    nets["critics"] = critics or lapo.LapoCritics(*LAPO_STATS, (16, 16), 5)
    nets |= {"latent_target": deepcopy(nets["actor"].latent), "targets": deepcopy(nets["critics"])}
    bounds = torch.tensor([-50.0, 50.0])
    return nets, lapo.make_lapo_update(args, nets, lapo.lapo_optimizers(args, nets), bounds, splitter())


def test_lapos_autoencoder_sees_and_rebuilds_standardised_actions():
    nets, update = lapo_parts(positive_weight=0.5)
    (mean, std), (rows, _) = LAPO_STATS[1], batch(0)
    obs, action = splitter()(rows)[:2]
    plain = lapo.Encoder(LAPO_STATS[0], (torch.zeros(ACT), torch.ones(ACT)), 2 * ACT, (16, 16))
    plain.net.load_state_dict(nets["encoder"].net.state_dict())
    torch.testing.assert_close(nets["encoder"](obs, action), plain(obs, (action - mean) / std))
    for key in ("encoder", "decoder"):
        for parameter in nets[key].parameters():
            torch.nn.init.zeros_(parameter)  # the code is N(0, 1) and what is rebuilt is 0, the mean action
    torch.testing.assert_close(nets["decoder"].action(obs, torch.randn(BATCH, 2 * ACT)), mean.expand(BATCH, ACT))
    loss = update(rows, torch.randn(2, BATCH, 2 * ACT), torch.tensor([0, 1]), True)["autoencoder_loss"]
    assert loss.item() == pytest.approx(0.5 * (((action - mean) / std) ** 2).sum(-1).mean().item(), rel=1e-5)


class Disagreeing(torch.nn.Module):
    """The first of five critics prefers the first action high, the others, more strongly, low."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([[1.0], [-10.0], [-10.0], [-10.0], [-10.0]]))

    def forward(self, obs, action, k=None):
        return self.slope[: k or 5] * action[:, 0]


def test_lapos_policy_climbs_the_first_critic_alone():
    nets, update = lapo_parts(Disagreeing(), tau=0.0, learning_rate=3e-3)
    policy, obs = nets["actor"], torch.randn(256, OBS)
    before = policy.act(obs, policy.latent)[:, 0].mean().item()
    for step in range(30):
        nets["critics"].load_state_dict(nets["targets"].state_dict())  # as they were
        update(batch(step)[0], torch.randn(2, BATCH, 2 * ACT), torch.tensor([0, 1]), True)
    assert policy.act(obs, policy.latent)[:, 0].mean().item() > before + 0.01


def test_lapo_standardises_with_the_datas_actions_even_where_they_stand_still(minari_store, tmp_path, monkeypatch):
    real, loaded = lapo.load_data, []

    def load(*arguments):
        data = real(*arguments)
        data.rows[:, data.obs_dim] = 0.5  # the first action never changes
        loaded.append(data)
        return data

    monkeypatch.setattr(lapo, "load_data", load)
    args = lapo.Args(output=str(tmp_path / "lapo.pt"), run_dir=str(tmp_path / "run"), eval_episodes=1)
    _, nets, optimizers, *_ = stopped_at(lapo, "make_lapo_update", args, monkeypatch)
    action = loaded[0].split(loaded[0].rows)[1]
    for net in (nets["decoder"], nets["actor"].decoder, nets["critics"]):
        torch.testing.assert_close(net.act_mean, action.mean(0))
        torch.testing.assert_close(net.act_std[1:], action.std(0)[1:])
        assert net.act_std[0].item() == pytest.approx(1e-6)
    torch.testing.assert_close(nets["encoder"].mean[loaded[0].obs_dim :], action.mean(0))
    assert same_tensors(optimizers["latent"].params, nets["actor"].latent.parameters())


OTHERS = {"bc": {"actor"}, "bc tanh_gaussian": {"actor"}, "bc deterministic": {"actor"}}
OTHERS |= {"cql": {"actor", "critics", "targets", "log_alpha"}, "cql, all options": None}
OTHERS |= {"behaviour": None, "td3_bc": None, "iql": None, "lapo": None}
OTHERS |= {"ppo reevaluate": {"value"}, "ppo finetune": {"actor", "value"}}


def run_updates(name, compiled):
    """-> how far three updates moved each network. Large learning and Polyak rates, so that no step can hide. TD3's
    delayed updates take turns with the others."""
    extra = lambda step: ()  # noqa: E731
    if name.startswith("cql"):
        options = {"lagrange": True, "max_backup": True, "clip_gap": -200.0} if "options" in name else {}
        nets, update = cql_parts(tau=0.5, policy_lr=0.01, critic_lr=0.01, **options)
    elif name == "lapo":
        nets, update = lapo_parts(tau=0.5, learning_rate=0.01)
        extra = lambda step: (torch.tensor([step, step + 2]), step > 0)  # noqa: E731
    elif name == "td3_bc":
        nets, update = td3_bc_parts(tau=0.5, learning_rate=0.01)
        extra = lambda step: (step % 2 == 1,)  # noqa: E731
    elif name == "iql":
        nets, own = iql_parts(tau=0.5, learning_rate=0.01)
        update = lambda rows, noise, scale: own(rows, scale)  # noqa: E731
        extra = lambda step: (torch.tensor(1 - 0.1 * step),)  # noqa: E731
    elif name.startswith("ppo"):
        nets, updates = ppo_parts(lr=0.01)
        old = deepcopy(nets["actor"])
        if name == "ppo reevaluate":
            update = lambda rows, noise: updates[0](rows[:, : 2 * OBS + 2], noise)  # noqa: E731
        else:
            update = lambda rows, noise, scale: updates[1](rows, scale)  # noqa: E731
            extra = lambda step: (torch.tensor(1 - 0.1 * step),)  # noqa: E731
    elif name == "behaviour":
        nets = {key: net for key, net in small_nets().items() if key in ("actor", "critics", "targets", "log_alpha")}
        optimizers = {key: behaviour.Adam(nets[key].parameters(), 0.01) for key in ("actor", "critics", "log_alpha")}
        update = behaviour.make_update(behaviour.Args(tau=0.5), nets, optimizers, OBS, ACT)
    elif name.startswith("bc"):
        kind, teacher = name.removeprefix("bc").strip() or "squashed_gaussian", small_nets(seed=1)["actor"]
        own = lambda obs, noise: (teacher.mode(obs), teacher.sample(obs, noise)[0])  # noqa: E731
        torch.manual_seed(0)
        nets = {"actor": bc.COPIES[kind](torch.zeros(OBS), torch.ones(OBS), ACT, (16, 16))}
        optimizers = {"actor": bc.Adam(nets["actor"].parameters(), 0.01)}
        imitate = bc.make_update(bc.Args(policy=kind), nets, optimizers, own, splitter())[0]
        update = lambda rows, noise: imitate(rows, noise[0])  # noqa: E731
    elif name.startswith("td3"):
        nets = td3_nets()
        update = td3_updates(nets, tau=0.5, lr=0.01)[TD3_STAGES[name][0]]
        if "finetune" in name:
            extra = lambda step: (LAMBDA, step % 2 == 1)  # noqa: E731
    else:
        nets = small_nets()
        update = sac_updates(nets, tau=0.5, lr=0.01)[STAGES[name][0]]
        if name == "finetune":
            extra = lambda step: (LAMBDA,)  # noqa: E731
    before = {key: flat(net) for key, net in nets.items()}
    update = o2o_sac.compile_update(update, o2o_sac.Args(compile=compiled))
    for step in range(3):
        rows, noise = batch(step)
        if name.startswith("cql"):
            noise = torch.randn(10, BATCH, ACT, generator=torch.Generator().manual_seed(step))
        if name == "lapo":
            noise = torch.randn(2, BATCH, 2 * ACT, generator=torch.Generator().manual_seed(step))
        if name == "ppo finetune":
            rows = ppo_batch(step, old)
        update(rows, noise, *extra(step))
    return {key: flat(net) - before[key] for key, net in nets.items()}


@pytest.mark.parametrize("name", [*STAGES, *OTHERS, "td3 reevaluate", "td3 align", "td3 finetune, delayed"])
def test_compiled_equals_eager(name):
    """Up to float32's rounding, 1e-5 here; a step that is left out makes a tenth or more."""
    eager, compiled = run_updates(name, False), run_updates(name, True)
    written = OTHERS.get(name) or {**STAGES, **TD3_STAGES}.get(name, (set(eager),))[-1]
    for key, moved in eager.items():
        assert (compiled[key].norm() > 1e-3) == (key in written), key
        assert (compiled[key] - moved).norm() <= 1e-3 * moved.norm(), key


def test_the_alignment_fits_both_the_sampled_action_and_the_mode():
    """O2SAC: the sum over critics of both squared errors, each the mean over states. Neither may be left out."""
    nets, (rows, noise) = small_nets(), batch(0)
    for parameter in nets["targets"].parameters():
        parameter.data += 0.1
    obs = splitter()(rows)[0]
    with torch.no_grad():
        mean, log_std = nets["offline"](obs)
        u = mean + log_std.exp() * noise[0]
        action, mode = torch.tanh(u), torch.tanh(mean)
        gap = o2o_sac.squashed_log_prob(mean, log_std, mean) - o2o_sac.squashed_log_prob(mean, log_std, u)
        anchor = nets["targets"](obs, mode).min(0).values
        target = torch.minimum(anchor - 0.2 * gap, nets["targets"](obs, action).min(0).values)
        errors = [(nets["critics"](obs, a) - y) ** 2 for a, y in ((action, target), (mode, anchor))]
    assert all(error.mean() > 1e-4 for error in errors)
    expected = sum(critic.mean() for error in errors for critic in error)
    assert sac_updates(nets)[1](rows, noise)["critic_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_penalty_enters_the_bellman_target():
    """One update from the same state, with and without lambda, and a policy far from its reference."""
    moved = {}
    for multiplier in (0.0, 5.0):
        nets = small_nets()
        for parameter in nets["reference"].parameters():
            torch.nn.init.zeros_(parameter)
        before = flat(nets["critics"])
        sac_updates(nets)[2](*batch(0), torch.tensor(multiplier))
        moved[multiplier] = flat(nets["critics"]) - before
    assert not torch.equal(moved[0.0], moved[5.0])


def test_cql_weighs_each_candidate_with_the_density_that_it_was_drawn_from(monkeypatch):
    nets, update = cql_parts()
    actor, seen, real_many, real_gap = deepcopy(nets["actor"]), {}, nets["critics"].many, cql.conservative_gap

    def many(obs, actions):
        seen["actions"] = actions
        return real_many(obs, actions)

    def gap(q_candidates, log_density, *rest):
        seen["log_density"] = log_density
        return real_gap(q_candidates, log_density, *rest)

    monkeypatch.setattr(nets["critics"], "many", many)
    monkeypatch.setattr(cql, "conservative_gap", gap)
    rows, _ = batch(0)
    update(rows, torch.randn(10, BATCH, ACT, generator=torch.Generator().manual_seed(0)))
    obs, _, _, next_obs, _ = splitter()(rows)
    uniform, of_obs, of_next = seen["log_density"].split(3, dim=1)
    torch.testing.assert_close(uniform, torch.full_like(uniform, -ACT * math.log(2)))
    assert seen["actions"][:, :3].abs().max() <= 1
    for states, first, density in ((obs, 3, of_obs), (next_obs, 6, of_next)):
        for k in range(3):
            mean, log_std = actor(states)
            expected = cql.squashed_log_prob(mean, log_std, torch.atanh(seen["actions"][:, first + k].double()))
            torch.testing.assert_close(density[:, k].double(), expected, rtol=1e-2, atol=1e-2)
