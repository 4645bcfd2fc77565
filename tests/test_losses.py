"""Targets and losses at points worked out by hand, and the building blocks against torch's own."""

import importlib
import math

import collect
import cql
import iql
import lapo
import numpy as np
import pytest
import td3_bc
import torch
import torch.nn.functional as F
from torch import nn

import o2o_ppo
import o2o_sac
import o2o_td3


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_squashed_log_prob_is_a_density():
    mean, log_std = torch.tensor([[0.7]]).double(), torch.tensor([[-0.4]]).double()
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64).unsqueeze(1)
    density = o2o_sac.squashed_log_prob(mean, log_std, u).exp()
    action_step = (1 - torch.tanh(u.squeeze(1)) ** 2) * (u[1, 0] - u[0, 0])  # da = (1 - a^2) du
    assert (density * action_step).sum().item() == pytest.approx(1, abs=1e-3)


def test_squashed_log_prob_agrees_with_torch_distributions():
    mean, log_std, u = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3)
    normal = torch.distributions.Normal(mean, log_std.exp())
    expected = (normal.log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)).sum(-1)
    torch.testing.assert_close(o2o_sac.squashed_log_prob(mean, log_std, u), expected, rtol=1e-4, atol=1e-4)


def test_squashed_log_prob_is_finite_where_tanh_is_one():
    log_prob = o2o_sac.squashed_log_prob(torch.zeros(1, 2), torch.zeros(1, 2), torch.full((1, 2), 30.0))
    assert log_prob.isfinite().all()


def test_td_target_by_hand():
    target = o2o_sac.td_target(
        reward=tensor(1, 1, 1),
        terminated=tensor(0, 1, 0),
        next_q=torch.stack([tensor(10, 10, 10), tensor(8, 8, 8)]),
        next_log_prob=tensor(-2, -2, 2),
        alpha=0.5,
        gamma=0.9,
        penalty=tensor(0, 0, 3),
    )
    # 1 + 0.9 (8 + 1), 1, 1 + 0.9 (8 - 1 - 3)
    torch.testing.assert_close(target, tensor(9.1, 1, 4.6))


def test_alignment_target_by_hand():
    target = o2o_sac.alignment_target(
        q_mode=tensor(10, 10, 10, -10),
        log_prob_mode=tensor(2, 2, 2, 2),
        q=tensor(12, 3, 10, -9),
        log_prob=tensor(-3, -3, 2, -3),
        alpha=0.2,
    )
    # lowered to 10 - 0.2 * 5; already lower; the mode itself; a negative value is lowered too: -10 - 0.2 * 5
    torch.testing.assert_close(target, tensor(9, 3, 10, -11))


def test_multiplier_rises_when_violated_and_falls_when_slack():
    def gradient(slack):
        log_multiplier = torch.zeros((), requires_grad=True)
        loss = o2o_sac.multiplier_loss(log_multiplier.exp(), slack, kappa=0.7)
        return torch.autograd.grad(loss, log_multiplier)[0].item()

    assert gradient(tensor(-1, -1)) == pytest.approx(-0.7)  # descent raises lambda
    assert gradient(tensor(1, 1)) == pytest.approx(0.3)
    assert gradient(tensor(-1, 1)) == pytest.approx(-0.2)


def test_the_limit_grows_linearly_and_stops():
    args = o2o_sac.Args(limit_start=0.125, limit_end=2.0, limit_steps=100)
    assert [o2o_sac.limit_at(args, t) for t in (0, 50, 100, 900)] == pytest.approx([0.125, 1.0625, 2.0, 2.0])


def test_actor_loss_by_hand():
    loss = o2o_sac.actor_loss(tensor(1, 3), torch.stack([tensor(5, 5), tensor(4, 7)]), 0.5, tensor(0.25, 0.75))
    assert loss.item() == pytest.approx(((0.5 - 4 + 0.25) + (1.5 - 5 + 0.75)) / 2)


def test_the_divergence_is_clamped_far_from_the_reference():
    reference = lambda obs: (torch.zeros(2, 1), torch.full((2, 1), -3.0))  # noqa: E731
    u = torch.tensor([[0.0], [3.0]])
    f = o2o_sac.divergence(tensor(0, 0), reference, None, u)
    assert f[0].item() == pytest.approx(-(3 - 0.5 * math.log(2 * math.pi)), abs=1e-4)
    assert f[1].item() == 50


@pytest.mark.parametrize(
    ("script", "argv", "expected"),
    [
        ("o2o_sac", "--env-id hopper-medium-v2", {"alpha": 0.2, "limit_start": 0.125, "limit_end": 2.0}),
        ("o2o_sac", "--env-id walker2d-expert-v2", {"alpha": 0.5, "limit_start": 0.005, "limit_end": 0.125}),
        ("o2o_sac", "--env-id walker2d-expert-v2 --alpha 0.3", {"alpha": 0.3, "limit_end": 0.125}),
        ("o2o_sac", "--reference interval", {"limit_end": 0.5}),
        ("o2o_sac", "--reference interval --limit-end 0.7", {"limit_end": 0.7}),
        ("o2o_td3", "--env-id hopper-medium-v2", {"exploration_noise": 0.1, "limit_start": 0.0025, "limit_end": 0.04}),
        ("o2o_td3", "--env-id walker2d-medium-expert-v2", {"exploration_noise": 0.05, "limit_start": 2.5e-5}),
        ("o2o_td3", "--env-id hopper-expert-v2 --reference interval", {"limit_end": 6.25e-4 / 4}),
        ("o2o_td3", "--env-id walker2d-expert-v2", {"reference_every": 10_000}),
        ("o2o_td3", "--env-id walker2d-medium-expert-v2", {"reference_every": 1_000}),
        ("o2o_sac", "--env-id hopper-medium-expert-v2", {"reference_every": 10_000}),
        ("o2o_sac", "--env-id hopper-medium-v2", {"reference_every": 1_000}),
        ("o2o_td3", "--reference interval --exploration-noise 0.3", {"limit_end": 0.01, "exploration_noise": 0.3}),
        ("o2o_ppo", "--env-id hopper-medium-v2", {"alignment_steps": 250_000, "epochs": 10, "scale_rewards": False}),
        ("o2o_ppo", "--env-id hopper-medium-expert-v2", {"alignment_steps": 500_000, "epochs": 5, "max_std": 0.05}),
        (
            "o2o_ppo",
            "--env-id halfcheetah-expert-v2",
            {"alignment_steps": 500_000, "epochs": 10, "scale_rewards": True},
        ),
        ("o2o_ppo", "--env-id halfcheetah-medium-v2 --no-scale-rewards", {"scale_rewards": False}),
    ],
)
def test_settings_depend_on_the_task_and_the_command_line_wins(script, argv, expected):
    args = importlib.import_module(script).parse_args(argv.split())
    assert {flag: getattr(args, flag) for flag in expected} == pytest.approx(expected)


def test_conservative_gap_by_hand():
    q_candidates = torch.tensor([[[1.0, 2.0]]])  # one critic, one state, two candidates
    log_density = torch.tensor([[0.0, -1.0]])
    gap = cql.conservative_gap(q_candidates, log_density, q_data=torch.tensor([[4.0]]), temperature=1.0)
    assert gap.item() == pytest.approx(math.log(math.exp(1) + math.exp(3)) - 4)
    warm = cql.conservative_gap(q_candidates, log_density, torch.tensor([[4.0]]), temperature=2.0)
    assert warm.item() == pytest.approx(2 * math.log(math.exp(0.5) + math.exp(1.5)) - 4)
    assert cql.conservative_gap(q_candidates, log_density, torch.tensor([[900.0]]), 1.0, clip=-200).item() == -200


def test_importance_weights_make_the_gap_independent_of_where_candidates_come_from():
    """logsumexp_k(Q - log p) - log K estimates log of the integral of exp(Q) for any p that covers the box."""
    generator = torch.Generator().manual_seed(0)
    uniform = 2 * torch.rand(1, 1, 200_000, generator=generator) - 1
    skewed = torch.sqrt(torch.rand(1, 1, 200_000, generator=generator)) * 2 - 1  # density (a + 1) / 2
    q = lambda a: -3 * (a - 0.3) ** 2  # noqa: E731
    zero = torch.zeros(1, 1)
    flat = cql.conservative_gap(q(uniform), torch.full_like(uniform[0], -math.log(2)), zero, 1.0)
    tilted = cql.conservative_gap(q(skewed), torch.log((skewed[0] + 1) / 2), zero, 1.0)
    assert flat.item() == pytest.approx(tilted.item(), abs=0.02)


def test_cql_td_target_takes_the_smaller_critic_then_the_best_action():
    next_q = torch.tensor([[[1.0, 5.0]], [[2.0, 3.0]]])  # two critics, one state, two next actions
    target = cql.td_target(tensor(1), tensor(0), next_q, 0.5)
    assert target.item() == 1 + 0.5 * 3
    assert cql.td_target(tensor(1), tensor(1), next_q, 0.5).item() == 1


def test_critics_equal_separate_networks():
    critics = o2o_sac.Critics(torch.randn(4), torch.rand(4) + 0.5, 2, (8, 8), n=3, layer_norm=True)
    obs, action = torch.randn(5, 4), torch.randn(5, 2)
    for parameter in critics.parameters():
        torch.nn.init.normal_(parameter)
    q = critics(obs, action)
    assert q.shape == (3, 5)
    torch.testing.assert_close(critics(obs, action, k=1), q[:1])
    for j in range(3):
        x = torch.cat([(obs - critics.obs_mean) / critics.obs_std, action], -1)
        for layer in critics.net:
            if isinstance(layer, o2o_sac.StackedLinear):
                x = F.linear(x, layer.weight[j].T, layer.bias[j, 0])
                if layer.layer_norm:
                    x = F.layer_norm(x, (8,), layer.scale[j, 0], layer.shift[j, 0])
            else:
                x = F.relu(x)
        torch.testing.assert_close(q[j], x.squeeze(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_cql_critics_score_many_actions_like_single_ones(bf16):
    torch.manual_seed(0)
    critics = cql.CqlCritics(torch.randn(4), torch.rand(4) + 0.5, 2, (16, 16), bf16=bf16)
    for layer in critics.net[::2]:
        nn.init.normal_(layer.bias)  # they start at 0, where a forgotten one would not show
    obs, actions = torch.randn(5, 4), torch.rand(5, 7, 2) * 2 - 1
    many = critics.many(obs, actions)
    assert many.shape == (2, 5, 7) and many.dtype == torch.float32
    one_by_one = torch.stack([critics(obs, actions[:, k]) for k in range(7)], dim=-1)
    torch.testing.assert_close(many, one_by_one, rtol=2e-2 if bf16 else 1e-4, atol=2e-2 if bf16 else 1e-5)


def test_adam_is_torch_adam():
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(net.state_dict())
    ours, theirs = o2o_sac.Adam(net.parameters(), 1e-2), torch.optim.Adam(twin.parameters(), 1e-2)
    for _ in range(20):
        x = torch.randn(4, 3)
        ours.minimize((net(x) ** 2).mean())
        theirs.zero_grad()
        (twin(x) ** 2).mean().backward()
        theirs.step()
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_polyak():
    target, source = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.constant_(target.weight, 1.0)
    nn.init.constant_(source.weight, 3.0)
    o2o_sac.polyak(target, source, 0.25)
    assert target.weight.item() == pytest.approx(1.5)


def test_score():
    data = o2o_sac.Data("", None, None, 1, 1, (-20.272305, 3234.3), None)
    assert data.score(3234.3) == pytest.approx(100) and data.score(-20.272305) == pytest.approx(0)
    assert data.score((3234.3 - 20.272305) / 2) == pytest.approx(50)


def test_medium_replay_is_the_ladder_in_equal_shares():
    policies = {"ladder": [{"actor": name} for name in "abcd"], "medium": {"actor": "m"}, "expert": {"actor": "e"}}
    assert collect.behaviour_schedule("medium-replay", policies, 10) == [(None, 2), ("b", 3), ("c", 3), ("d", 2)]
    assert collect.behaviour_schedule("medium-expert", policies, 10) == [("m", 5), ("e", 5)]
    assert collect.behaviour_schedule("random", {}, 10) == [(None, 10)]


def test_td3_td_target_by_hand():
    next_q = torch.stack([tensor(10, 10, 10), tensor(8, 8, 12)])
    target = o2o_td3.td_target(tensor(1, 1, 1), tensor(0, 1, 0), next_q, gamma=0.9, penalty=tensor(0, 0, 3))
    torch.testing.assert_close(target, tensor(1 + 0.9 * 8, 1, 1 + 0.9 * (10 - 3)))
    torch.testing.assert_close(td3_bc.td_target(tensor(1, 1, 1), tensor(0, 1, 0), next_q, 0.9), tensor(8.2, 1, 10))


def test_smoothed_by_hand():
    action = torch.tensor([[0.0, 0.9, -0.9]])
    noise = torch.tensor([[1.0, 9.0, 0.5]])  # 0.2; 1.8 clipped to 0.5, then the sum to 1; 0.1
    torch.testing.assert_close(o2o_td3.smoothed(action, noise, 0.2, 0.5), torch.tensor([[0.2, 1.0, -0.8]]))


def test_td3_alignment_target_by_hand():
    def target(q_mode, q, *action, bump=1.0):
        action = torch.tensor([action])
        q = torch.tensor(q).unsqueeze(1)
        result = o2o_td3.alignment_target(tensor(q_mode), q, action, torch.zeros_like(action), bump, cap=0.2)
        return result.squeeze(1).tolist()

    # d^2 = (0.1^2 + 0.1^2) / 2 = 0.01: a positive value is divided by 1.01, a negative one multiplied
    assert target(10.0, [12.0, 11.0], 0.1, -0.1) == pytest.approx([10 / 1.01] * 2)
    assert target(-10.0, [-8.0, -9.0], 0.1, -0.1) == pytest.approx([-10.1] * 2)
    assert target(10.0, [3.0, 12.0], 0.1, 0.1) == pytest.approx([3, 10 / 1.01])  # never raised, critic by critic
    assert target(10.0, [10.0, 11.0], 0.0, 0.0) == pytest.approx([10, 10])  # the policy's own action keeps its value
    assert target(-10.0, [-10.0, -9.0], 0.0, 0.0) == pytest.approx([-10, -10])
    assert target(0.0, [1.0, -1.0], 0.3, 0.3) == pytest.approx([0, -1])
    # beyond the cap 0.2 nothing more happens: 4 percent, as at d = 0.2 itself
    assert target(10.0, [12.0, 12.0], 0.2, 0.2) == pytest.approx([10 / 1.04] * 2)
    assert target(10.0, [12.0, 12.0], 0.9, -0.7) == pytest.approx([10 / 1.04] * 2)
    assert target(-10.0, [-1.0, -1.0], 0.9, -0.7) == pytest.approx([-10.4] * 2)
    assert target(10.0, [12.0, 12.0], 0.1, -0.1, bump=5.0) == pytest.approx([10 / 1.05] * 2)


def test_td3_actor_loss_by_hand():
    q, penalty = tensor(-6, 2).requires_grad_(), tensor(0.5, 1.5)
    loss = o2o_td3.actor_loss(q, penalty)
    assert loss.item() == pytest.approx((6 - 2) / 2 / 4 + 1)  # mean|Q| = 4
    gradient = torch.autograd.grad(loss, q)[0]
    torch.testing.assert_close(gradient, tensor(-1 / 8, -1 / 8))  # the scale is a constant


def test_td3_bc_actor_loss_by_hand():
    action, data = torch.tensor([[0.5, 0.0]]), torch.tensor([[0.1, 0.2]])
    loss = td3_bc.actor_loss(tensor(-6, 2), action, data, bc_alpha=2.5)
    assert loss.item() == pytest.approx(2.5 * 2 / 4 + (0.16 + 0.04) / 2)


def test_td3_multiplier_and_limit():
    def gradient(slack):
        log_multiplier = torch.zeros((), requires_grad=True)
        loss = o2o_td3.multiplier_loss(log_multiplier.exp(), slack, kappa=0.7)
        return torch.autograd.grad(loss, log_multiplier)[0].item()

    assert gradient(torch.full((2, 2), -1.0)) == pytest.approx(-0.7)  # violated: descent raises lambda
    assert gradient(torch.full((2, 2), 1.0)) == pytest.approx(0.3)
    assert gradient(torch.tensor([[-1.0, 1.0], [1.0, 1.0]])) == pytest.approx((-0.7 + 3 * 0.3) / 4)  # by element
    args = o2o_td3.Args(limit_start=0.0025, limit_end=0.04, limit_steps=100)
    limits = [o2o_td3.limit_at(args, t) for t in (0, 50, 100, 900)]
    assert limits == pytest.approx([0.0025, 0.02125, 0.04, 0.04])


def test_iql_losses_by_hand():
    advantage = tensor(2, -1)
    assert iql.expectile_loss(advantage, 0.7).item() == pytest.approx((0.7 * 4 + 0.3 * 1) / 2)
    target = iql.value_target(tensor(1, 1), tensor(0, 1), tensor(10, 10), 0.9)
    torch.testing.assert_close(target, tensor(10, 1))
    log_prob = tensor(-1, -2, -3)
    loss = iql.policy_loss(log_prob, tensor(0, 0.5, 9), temperature=2.0, max_weight=100.0)
    assert loss.item() == pytest.approx((1 * 1 + math.e * 2 + 100 * 3) / 3)
    rewards, last = tensor(-50, 100, 50, 0), torch.tensor([True, False, True, True])  # returns -50, 150, 0
    assert iql.reward_scale(rewards, last) == pytest.approx(5)
    with pytest.raises(iql.UserError, match="same return"):
        iql.reward_scale(tensor(3, 1, 2), torch.tensor([True, False, True]))


def test_dropout_leaves_units_out_and_the_others_make_up_for_them():
    actor = iql.TanhGaussianActor(torch.zeros(1), torch.ones(1), 1, [2])
    for layer, weight in ((actor.net[0], [[1.0], [2.0]]), (actor.net[2], [[0.1, 0.1]])):
        layer.weight.data, layer.bias.data = torch.tensor(weight), torch.zeros(len(weight))
    one = torch.ones(1, 1)
    for dropout, noise, mean in (
        (0.5, [5.0, 5.0], 0.2 + 0.4),
        (0.5, [-5.0, 5.0], 0.4),  # the first unit is out, the second counts twice
        (0.5, [-5.0, -5.0], 0.0),
        (0.2, [5.0, -5.0], 0.1 / 0.8),
    ):
        found, log_std = iql.dropout_forward(actor, one, torch.tensor([[noise]]), dropout)
        assert found.item() == pytest.approx(math.tanh(mean)) and torch.equal(log_std, actor(one)[1])
    noise = torch.randn(1, 100_000, 2, generator=torch.Generator().manual_seed(0))
    found = torch.atanh(iql.dropout_forward(actor, one.expand(100_000, 1), noise, 0.1)[0])
    assert found.mean().item() == pytest.approx(0.3, abs=0.002), "right in the mean"
    assert (found == 0).float().mean().item() == pytest.approx(0.01, abs=0.002), "both are out in one of 100"


def test_the_expectile_of_a_known_distribution():
    """Between the mean and the largest value: the root of tau E[(x - v)+] = (1 - tau) E[(v - x)+]."""
    x = torch.linspace(0, 1, 1001)
    v = torch.tensor(0.5, requires_grad=True)
    for _ in range(300):
        v.data -= 0.5 * torch.autograd.grad(iql.expectile_loss(x - v, 0.9), v)[0]
    assert v.item() == pytest.approx(0.75, abs=0.01)  # uniform: tau (1 - v)^2 = (1 - tau) v^2


def test_gaussian_log_prob_and_entropy_are_those_of_torch():
    mean, log_std, action = torch.randn(5, 3), torch.randn(3), torch.randn(5, 3)
    normal = torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(o2o_ppo.gaussian_log_prob(mean, log_std, action), normal.log_prob(action).sum(-1))
    torch.testing.assert_close(o2o_ppo.gaussian_entropy(log_std).expand(5), normal.entropy().sum(-1))


def slow_gae(reward, value, next_value, terminated, done, gamma, lam):
    """From the definition: sum_k (gamma lam)^k delta_(t+k), up to the end of the episode or of the rollout."""
    steps, n = reward.shape
    result = torch.zeros(steps, n)
    for t in range(steps):
        for i in range(n):
            for k in range(steps - t):
                bootstrap = 0.0 if terminated[t + k, i] else next_value[t + k, i].item()
                delta = reward[t + k, i].item() + gamma * bootstrap - value[t + k, i].item()
                result[t, i] += (gamma * lam) ** k * delta
                if done[t + k, i]:
                    break
    return result


def test_gae_against_its_definition():
    torch.manual_seed(0)
    reward, value, next_value = torch.randn(3, 12, 4)
    terminated = (torch.rand(12, 4) < 0.15).float()
    done = torch.maximum(terminated, (torch.rand(12, 4) < 0.2).float())
    assert 0 < terminated.sum() < done.sum() < 30
    arguments = (reward, value, next_value, terminated, done, 0.9, 0.8)
    torch.testing.assert_close(o2o_ppo.gae(*arguments), slow_gae(*arguments))
    one_step = o2o_ppo.gae(reward, value, next_value, terminated, done, 0.9, 0.0)
    torch.testing.assert_close(one_step, reward + 0.9 * (1 - terminated) * next_value - value)


def episodes_data(*episodes):
    """[(rewards, does it end by a termination?), ...] -> Data whose states are numbered."""
    rows, last, state = [], [], 0.0
    for rewards, ends in episodes:
        for k, reward in enumerate(rewards):
            last.append(k == len(rewards) - 1)
            rows.append([state, 0.0, reward, state + 1, float(ends and last[-1])])
            state += 1
        state += 10
    return o2o_ppo.Data("x", torch.tensor(rows), torch.tensor(last), 1, 1, (0, 1), None)


def test_value_targets_do_not_leak_over_a_time_limit():
    data = episodes_data(([1.0, 2.0, 4.0], False), ([8.0, 16.0], True), ([32.0], False))
    rewards = data.split(data.rows)[2]
    obs, sums, factor, last_obs = o2o_ppo.value_targets(data, rewards, 0.5).unbind(1)
    assert obs.tolist() == data.rows[:, 0].tolist()
    assert sums.tolist() == [1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4, 8 + 0.5 * 16, 16, 32]
    assert factor.tolist() == [0.125, 0.25, 0.5, 0, 0, 0.5]  # bootstrapped at the time limits, not at the termination
    assert last_obs.tolist() == [3, 3, 3, 15, 15, 26]
    other = episodes_data(([1.0, 2.0, 4.0], False), ([800.0, 16.0], True), ([32.0], False))
    targets = o2o_ppo.value_targets(other, other.split(other.rows)[2], 0.5)
    assert targets[:3, 1].tolist() == sums[:3].tolist()


def test_discounted_sums_by_hand():
    sums = o2o_ppo.discounted_sums(tensor(1, 2, 4, 8), torch.tensor([True, False, True, False]), 0.5)
    assert sums.tolist() == [1, 2.5, 4, 10]


def test_reference_advantage_against_torch_distributions():
    torch.manual_seed(0)
    mean, log_std = torch.randn(4000, 3), torch.tensor([-1.0, -0.5, 0.0])
    reference = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    action = reference.sample()
    x = reference.log_prob(action) + reference.entropy()
    log_prob = o2o_ppo.gaussian_log_prob(mean, log_std, action)
    result = o2o_ppo.reference_advantage(log_prob, o2o_ppo.gaussian_entropy(log_std), 3, alpha=2.0)
    torch.testing.assert_close(result, 2 / 3 * (torch.log1p((x + 12).exp()) - 12))
    assert abs(result.mean()) < 0.05
    far = o2o_ppo.reference_advantage(tensor(-1e6), tensor(0.0), 3, alpha=2.0)
    assert far.item() == pytest.approx(-8)  # - 4 alpha


def test_the_auxiliary_objective_is_the_cross_entropy_to_the_reference():
    """At ratio 1, d/dtheta E_(a~pi_old)[ratio A_ref] = - alpha / A d/dtheta H(pi, pi_ref), where h is the identity
    (far above its bound, that of 6 dimensions here): by integration over a grid of actions."""
    grid = torch.linspace(-6, 6, 20001)
    mean, log_std = torch.tensor(0.3, requires_grad=True), torch.tensor(-0.4, requires_grad=True)
    reference = torch.distributions.Normal(0.1, 0.9)

    def integral(values):
        return torch.trapezoid(values, grid)

    log_prob = o2o_ppo.gaussian_log_prob(mean, log_std, grid.unsqueeze(1))
    advantage = o2o_ppo.reference_advantage(reference.log_prob(grid), reference.entropy(), 6, alpha=12.0)
    old = log_prob.detach()
    surrogate = integral(old.exp() * (log_prob - old).exp() * advantage)
    cross_entropy = -integral(log_prob.exp() * reference.log_prob(grid))
    mine = torch.autograd.grad(surrogate, (mean, log_std), retain_graph=True)
    theirs = torch.autograd.grad(-2.0 * cross_entropy, (mean, log_std))
    torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), rtol=0.02, atol=2e-3)


def test_combined_advantage_is_per_sample_and_normalised():
    advantage, reference = tensor(1, 2, 3, 6), tensor(4, -1, 0, 1)
    result = o2o_ppo.combined_advantage(advantage, reference, weight=0.5)
    mixed = (np.array([1, 2, 3, 6]) + 0.5 * np.std([1, 2, 3, 6], ddof=1) * np.array([4, -1, 0, 1])) / 1.5
    expected = (mixed - mixed.mean()) / mixed.std(ddof=1)
    assert result.shape == (4,) and result.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    plain = o2o_ppo.combined_advantage(advantage, reference, weight=0.0)
    assert plain.tolist() == pytest.approx(((advantage - 3) / advantage.std()).tolist())


def test_clipped_surrogate_by_hand():
    ratio, advantage = tensor(1.5, 1.5, 0.5, 0.5, 1.1), tensor(1, -1, 1, -1, 2)
    expected = (1.2 - 1.5 + 0.5 - 0.8 + 2.2) / 5
    assert o2o_ppo.clipped_surrogate(ratio, advantage, 0.2).item() == pytest.approx(expected)


def test_the_weight_of_the_reference():
    args = o2o_ppo.Args(alignment_steps=100)
    assert [o2o_ppo.reference_weight(args, t) for t in (0, 25, 100, 999)] == [1, 0.75, 0, 0]
    args.align = False
    assert o2o_ppo.reference_weight(args, 0) == 0


def test_adam_shortens_long_gradients_and_scales_its_step_like_torch():
    torch.manual_seed(0)
    mine, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(mine.state_dict())
    ours = o2o_ppo.Adam(mine.parameters(), 0.1, eps=1e-5, max_norm=0.5)
    reference = torch.optim.Adam(theirs.parameters(), eps=1e-5)
    for step, size in enumerate((100.0, 1e-3, 5.0)):
        x, scale = size * torch.randn(4, 3), 1 - step / 3
        ours.minimize((mine(x) ** 2).mean(), torch.tensor(scale))
        reference.param_groups[0]["lr"] = 0.1 * scale
        reference.zero_grad()
        (theirs(x) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        reference.step()
        torch.testing.assert_close(mine.weight, theirs.weight)


OBS_STATS, ACT_STATS = (torch.zeros(5), torch.ones(5)), (torch.zeros(2), torch.ones(2))
NETWORKS = {  # name -> the network, and its output for obs (B, 5) and actions (B, 2)
    "squashed": (lambda b: o2o_sac.SquashedGaussianActor(*OBS_STATS, 2, (64, 64), b), lambda net, x, a: net(x)),
    "tanh": (lambda b: o2o_ppo.TanhGaussianActor(*OBS_STATS, 2, (64, 64), bf16=b), lambda net, x, a: net(x)[:1]),
    "deterministic": (lambda b: o2o_td3.DeterministicActor(*OBS_STATS, 2, (64, 64), b), lambda net, x, a: [net(x)]),
    "value": (lambda b: o2o_ppo.Value(*OBS_STATS, (64, 64), nn.Tanh, b), lambda net, x, a: [net(x)]),
    "critics": (lambda b: o2o_sac.Critics(*OBS_STATS, 2, (64, 64), bf16=b), lambda net, x, a: [net(x, a)]),
    "normalised critics": (
        lambda b: o2o_sac.Critics(*OBS_STATS, 2, (64, 64), layer_norm=True, bf16=b),
        lambda net, x, a: [net(x, a)],
    ),
    "many": (
        lambda b: cql.CqlCritics(*OBS_STATS, 2, (64, 64), bf16=b),
        lambda net, x, a: [net.many(x, a.unsqueeze(1))],
    ),
    "encoder": (lambda b: lapo.Encoder(OBS_STATS, ACT_STATS, 4, (64, 64), b), lambda net, x, a: net(x, a)),
    "latent": (
        lambda b: lapo.LatentPolicy(OBS_STATS, ACT_STATS, 4, (64, 64), 2.0, b),
        lambda net, x, a: [net.act(x, net.latent)],
    ),
    "lapo critics": (lambda b: lapo.LapoCritics(OBS_STATS, ACT_STATS, (64, 64), 5, b), lambda net, x, a: [net(x, a)]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_bf16_networks_compute_the_same_up_to_rounding_and_have_the_same_weights(name):
    """Measured by what the output varies with the state, beside which a constant offset would hide any error."""
    torch.manual_seed(0)
    make, outputs = NETWORKS[name]
    exact, rounded = make(False), make(True)
    rounded.load_state_dict(exact.state_dict())
    assert all(parameter.dtype == torch.float32 for parameter in rounded.parameters())
    x, action = torch.randn(200, 5), torch.randn(200, 2)
    with torch.no_grad():
        for one, other in zip(outputs(exact, x, action), outputs(rounded, x, action), strict=True):
            assert one.dtype == other.dtype == torch.float32 and not torch.equal(one, other)
            batch = one.shape.index(200)
            spread = (one - one.mean(batch, keepdim=True)).norm()
            assert 1e-5 * spread < (one - other).norm() < 0.05 * spread
