"""Updates per second of every update of every script, against the plain version of the same update.

    python results/speed.py 1 2  # with 1 and with 2 threads; writes results/speed.md

Plain is how most code bases write it: separate critics, torch.optim, loss.backward(), eager, float32. All numbers come
from one run on random data of Hopper's sizes (11 observations, 3 actions; batch 256, for O2PPO 512 in stage 1 and 128
in stage 2), so only their ratios say something about another machine. Each row starts a process of its own: threads and
precision are global settings.
"""

import importlib
import itertools
import json
import math
import platform
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "offline")]
OBS, ACT, BATCH = 11, 3, 256
UPDATES = ("sac", "cql", "o2o_sac reevaluate", "o2o_sac align", "o2o_sac finetune")
UPDATES += ("td3_bc", "o2o_td3 reevaluate", "o2o_td3 align", "o2o_td3 finetune")
UPDATES += ("iql", "o2o_ppo reevaluate", "o2o_ppo iteration")  # an iteration: 10 epochs over 2,048 samples
UPDATES += ("lapo", "o3f lapo action", "o3f iql action")  # an action: the best of 100 candidates by 5 critics
SECONDS = 4.0


def mlp(inputs, outputs, layers, layer_norm=False, activation=nn.ReLU):
    sizes = [inputs] + [256] * layers
    norm = [nn.LayerNorm(256)] if layer_norm else []
    blocks = [m for i, o in itertools.pairwise(sizes) for m in (nn.Linear(i, o), *deepcopy(norm), activation())]
    return nn.Sequential(*blocks, nn.Linear(256, outputs))


def rows_and_noise(k):
    rows = torch.randn(BATCH, 2 * OBS + ACT + 2)
    rows[:, OBS : OBS + ACT].tanh_()
    rows[:, -1] = (rows[:, -1] > 2).float()
    return rows, torch.randn(k, BATCH, ACT)


class Plain:
    """SAC with separate critics: what the updates below share."""

    def __init__(self, layers, layer_norm=False):
        self.actor = mlp(OBS, 2 * ACT, layers)
        self.behaviour, self.reference = deepcopy(self.actor), deepcopy(self.actor)
        self.critics = [mlp(OBS + ACT, 1, layers, layer_norm) for _ in range(2)]
        self.targets = deepcopy(self.critics)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), 1e-4)
        self.critic_optimizers = [torch.optim.Adam(critic.parameters(), 3e-4) for critic in self.critics]
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], 3e-4)

    def policy(self, net, obs, noise=None, u=None):
        """-> action, log_prob, u; of the given u if there is one, else of a sample."""
        mean, log_std = net(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, (log_std - 1).clamp(-20, 2).exp())
        u = normal.mean + normal.stddev * noise if u is None else u
        return torch.tanh(u), (normal.log_prob(u) - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1), u

    def q(self, critics, obs, action):
        x = torch.cat([obs, action], -1)
        return [critic(x).squeeze(-1) for critic in critics]

    def step_critics(self, losses):
        for loss, optimizer in zip(losses, self.critic_optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward(retain_graph=False)
            optimizer.step()

    def step_actor(self, loss):
        self.actor_optimizer.zero_grad()
        loss.backward()
        self.actor_optimizer.step()

    def step_alpha(self, log_prob):
        loss = -(self.log_alpha * (log_prob.detach() - ACT)).mean()
        self.alpha_optimizer.zero_grad()
        loss.backward()
        self.alpha_optimizer.step()

    def polyak(self):
        for critic, target in zip(self.critics, self.targets, strict=True):
            for parameter, slow in zip(critic.parameters(), target.parameters(), strict=True):
                slow.data.copy_(0.005 * parameter.data + 0.995 * slow.data)


def parts(rows):
    obs, action, reward, next_obs, terminated = rows.split([OBS, ACT, 1, OBS, 1], -1)
    return obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1)


def plain_sac(layers=2, layer_norm=False, constrained=False):
    p = Plain(layers, layer_norm)

    def update(rows, noise):
        obs, action, reward, next_obs, terminated = parts(rows)
        alpha = p.log_alpha.exp().detach()
        with torch.no_grad():
            next_action, next_log_prob, u = p.policy(p.actor, next_obs, noise[0])
            value = torch.min(*p.q(p.targets, next_obs, next_action)) - alpha * next_log_prob
            if constrained:
                value -= next_log_prob - p.policy(p.reference, next_obs, u=u)[1].clamp(min=-50)
            target = reward + 0.99 * (1 - terminated) * value
        p.step_critics([F.mse_loss(q, target) for q in p.q(p.critics, obs, action)])
        new_action, log_prob, u = p.policy(p.actor, obs, noise[1])
        loss = alpha * log_prob - torch.min(*p.q(p.critics, obs, new_action))
        if constrained:
            loss = loss + log_prob - p.policy(p.reference, obs, u=u)[1].clamp(min=-50)
        p.step_actor(loss.mean())
        p.step_alpha(log_prob)
        p.polyak()

    return update


def plain_reevaluate():
    p = Plain(3, layer_norm=True)

    def update(rows, noise):
        obs, action, reward, next_obs, terminated = parts(rows)
        with torch.no_grad():
            next_action, next_log_prob, _ = p.policy(p.behaviour, next_obs, noise[0])
            value = torch.min(*p.q(p.targets, next_obs, next_action)) - 0.2 * next_log_prob
            target = reward + 0.99 * (1 - terminated) * value
        p.step_critics([F.mse_loss(q, target) for q in p.q(p.critics, obs, action)])
        p.polyak()

    return update


def plain_align():
    p = Plain(3, layer_norm=True)

    def update(rows, noise):
        obs = parts(rows)[0]
        with torch.no_grad():
            action, _, u = p.policy(p.actor, obs, noise[0])
            mode, log_prob_mode, _ = p.policy(p.behaviour, obs, torch.zeros_like(noise[0]))
            log_prob = p.policy(p.behaviour, obs, u=u)[1]
            q_mode = torch.min(*p.q(p.targets, obs, mode))
            q = torch.min(*p.q(p.targets, obs, action))
            target = torch.min(q_mode - 0.2 * (log_prob_mode - log_prob), q)
        pairs = zip(p.q(p.critics, obs, action), p.q(p.critics, obs, mode), strict=True)
        p.step_critics([F.mse_loss(a, target) + F.mse_loss(m, q_mode) for a, m in pairs])
        new_action, new_log_prob, _ = p.policy(p.actor, obs, noise[1])
        p.step_actor((0.2 * new_log_prob - torch.min(*p.q(p.critics, obs, new_action))).mean())

    return update


def plain_cql():
    p, k = Plain(3), 10

    def many(obs):
        return obs.unsqueeze(1).expand(-1, k, -1).reshape(BATCH * k, OBS)

    def update(rows, noise):
        obs, action, reward, next_obs, terminated = parts(rows)
        with torch.no_grad():
            next_action = p.policy(p.actor, next_obs, noise[0])[0]
            target = reward + 0.99 * (1 - terminated) * torch.min(*p.q(p.targets, next_obs, next_action))
            flat = noise[: 3 * k].transpose(0, 1).reshape(BATCH, 3, k, ACT)
            now, now_log_prob, _ = p.policy(p.actor, many(obs), flat[:, 0].reshape(-1, ACT))
            then, then_log_prob, _ = p.policy(p.actor, many(next_obs), flat[:, 1].reshape(-1, ACT))
            uniform = torch.empty(BATCH * k, ACT).uniform_(-1, 1)
        sources = ((uniform, -ACT * math.log(2)), (now, now_log_prob), (then, then_log_prob))
        scores = [[q - density for q in p.q(p.critics, many(obs), a)] for a, density in sources]
        losses = []
        for j, q in enumerate(p.q(p.critics, obs, action)):
            candidates = torch.cat([score[j].view(BATCH, k) for score in scores], 1)
            losses.append(F.mse_loss(q, target) + 10 * (torch.logsumexp(candidates, 1) - q).mean())
        p.step_critics(losses)
        alpha = p.log_alpha.exp().detach()
        new_action, log_prob, _ = p.policy(p.actor, obs, noise[0])
        p.step_actor((alpha * log_prob - torch.min(*p.q(p.critics, obs, new_action))).mean())
        p.step_alpha(log_prob)
        p.polyak()

    return update


def plain_td3(name):
    """TD3+BC and the three stages of O2TD3; the actor moves at every second update, in alignment at every one."""
    p, count = Plain(2, layer_norm=name != "td3_bc"), itertools.count(1)
    p.actor = nn.Sequential(mlp(OBS, ACT, 2), nn.Tanh())
    p.actor_optimizer = torch.optim.Adam(p.actor.parameters(), 3e-4)
    actor_target, p.behaviour, p.reference = deepcopy(p.actor), deepcopy(p.actor), deepcopy(p.actor)
    log_multiplier = nn.Parameter(torch.zeros(()))
    multiplier_optimizer = torch.optim.Adam([log_multiplier], 5e-5)

    def smooth(action, noise):
        return (action + (0.2 * noise).clamp(-0.5, 0.5)).clamp(-1, 1)

    def align(obs, noise):
        with torch.no_grad():
            action, mode = smooth(p.actor(obs), noise), p.behaviour(obs)
            q_mode = torch.min(*p.q(p.targets, obs, mode))
            width = 1 + ((action - mode) ** 2).mean(-1).clamp(max=0.04)
            bump = torch.where(q_mode >= 0, q_mode / width, q_mode * width)
            lowered = [torch.min(bump, q) for q in p.q(p.targets, obs, action)]
        pairs = zip(p.q(p.critics, obs, action), p.q(p.critics, obs, mode), lowered, strict=True)
        p.step_critics([F.mse_loss(a, y) + F.mse_loss(m, q_mode) for a, m, y in pairs])
        p.step_actor(-p.q(p.critics[:1], obs, p.actor(obs))[0].mean())

    def update(rows, noise):
        obs, action, reward, next_obs, terminated = parts(rows)
        if name == "o2o_td3 align":
            return align(obs, noise[0])
        with torch.no_grad():
            next_action = (p.behaviour if name == "o2o_td3 reevaluate" else actor_target)(next_obs)
            value = torch.min(*p.q(p.targets, next_obs, smooth(next_action, noise[0])))
            if name == "o2o_td3 finetune":
                value -= log_multiplier.exp() * ((next_action - p.reference(next_obs)) ** 2).mean(-1)
            target = reward + 0.99 * (1 - terminated) * value
        p.step_critics([F.mse_loss(q, target) for q in p.q(p.critics, obs, action)])
        if name == "o2o_td3 reevaluate":
            p.polyak()
        elif next(count) % 2 == 0:
            new_action = p.actor(obs)
            q = p.q(p.critics[:1], obs, new_action)[0]
            if name == "td3_bc":
                distance, weight = F.mse_loss(new_action, action), 2.5
            else:
                squares = (new_action - p.reference(obs)) ** 2
                distance, weight = log_multiplier.exp().detach() * squares.mean(), 1.0
                slack = 0.01 - squares.detach()
                loss = log_multiplier.exp() * ((0.7 - (slack > 0).float()).abs() * slack).mean()
                multiplier_optimizer.zero_grad()
                loss.backward()
                multiplier_optimizer.step()
            p.step_actor(-weight * q.mean() / q.detach().abs().mean() + distance)
            p.polyak()
            for parameter, slow in zip(p.actor.parameters(), actor_target.parameters(), strict=True):
                slow.data.copy_(0.005 * parameter.data + 0.995 * slow.data)

    return update


class PlainGaussian:
    """A Gaussian policy with a value function: what IQL and PPO share."""

    def __init__(self, layers, activation, rates, eps=1e-8):
        self.mean, self.log_std = nn.Sequential(mlp(OBS, ACT, 2), nn.Tanh()), nn.Parameter(torch.zeros(ACT))
        self.value = mlp(OBS, 1, layers, activation=activation)
        self.actor_optimizer = torch.optim.Adam([*self.mean.parameters(), self.log_std], rates[0], eps=eps)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), rates[1], eps=eps)

    def normal(self, obs):
        return torch.distributions.Normal(self.mean(obs), self.log_std.clamp(-20, 2).exp())

    def step(self, optimizer, loss, max_norm=None):
        optimizer.zero_grad()
        loss.backward()
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_norm)
        optimizer.step()


def plain_iql():
    p, critics = PlainGaussian(2, nn.ReLU, (3e-4, 3e-4)), Plain(2)

    def update(rows, _):
        obs, action, reward, next_obs, terminated = parts(rows)
        with torch.no_grad():
            q_old, next_value = torch.min(*critics.q(critics.targets, obs, action)), p.value(next_obs).squeeze(-1)
            target = reward + 0.99 * (1 - terminated) * next_value
        advantage = q_old - p.value(obs).squeeze(-1)
        p.step(p.value_optimizer, ((0.7 - (advantage < 0).float()).abs() * advantage**2).mean())
        critics.step_critics([F.mse_loss(q, target) for q in critics.q(critics.critics, obs, action)])
        critics.polyak()
        weight = (3 * advantage.detach()).exp().clamp(max=100)
        p.step(p.actor_optimizer, -(weight * p.normal(obs).log_prob(action).sum(-1)).mean())

    return update


def ppo_rows():
    """2,048 samples of an iteration, and 512 rows of the fit of V."""
    return torch.randn(2048, OBS + ACT + 3), torch.randn(512, 2 * OBS + 2)


def plain_ppo(name):
    p, (rows, fit_rows) = PlainGaussian(3, nn.Tanh, (3e-5, 2e-4), eps=1e-5), ppo_rows()

    def reevaluate(*_):
        obs, sums, factor, last_obs = fit_rows.split([OBS, 1, 1, OBS], -1)
        with torch.no_grad():
            target = sums + factor * p.value(last_obs)
        p.step(p.value_optimizer, F.mse_loss(p.value(obs), target))

    def iteration(*_):
        for _ in range(10):
            for index in torch.randperm(2048).split(128):
                obs, action, rest = rows[index].split([OBS, ACT, 3], -1)
                old_log_prob, advantage, returns = rest.unbind(-1)
                normal = p.normal(obs)
                ratio = (normal.log_prob(action).sum(-1) - old_log_prob).exp()
                surrogate = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                p.step(p.actor_optimizer, -(surrogate + 0.01 * normal.entropy().sum(-1)).mean(), max_norm=0.5)
                p.step(p.value_optimizer, F.mse_loss(p.value(obs).squeeze(-1), returns), max_norm=0.5)

    return reevaluate if name == "o2o_ppo reevaluate" else iteration


def lapo_rows():
    """512 rows of an update, the noise of its codes, and the two critics of its target."""
    rows = torch.cat([rows_and_noise(1)[0] for _ in range(2)])
    return rows, torch.randn(2, len(rows), 2 * ACT), torch.tensor([1, 3])


def plain_lapo():
    value, latent, decoder, encoder = (
        mlp(i, o, 3) for i, o in ((OBS, 1), (OBS, 2 * ACT), (OBS + 2 * ACT, ACT), (OBS + ACT, 4 * ACT))
    )
    critics = [mlp(OBS + ACT, 1, 3) for _ in range(5)]
    pairs = [(net, deepcopy(net)) for net in (latent, decoder, *critics)]
    latent_target, decoder_target, *targets = (slow for _, slow in pairs)
    parts_of = [value.parameters(), latent.parameters(), [*encoder.parameters(), *decoder.parameters()]]
    value_optimizer, latent_optimizer, autoencoder_optimizer = (torch.optim.Adam(part, 2e-4) for part in parts_of)
    critic_optimizers = [torch.optim.Adam(critic.parameters(), 2e-4) for critic in critics]
    rows, noise, pair = lapo_rows()

    def step(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def act(obs, net, noise):
        return decoder_target(torch.cat([obs, (2 * torch.tanh(net(obs)) + noise).clamp(-2, 2)], -1))

    def update(*_):
        obs, action, reward, next_obs, terminated = parts(rows)
        obs_action = torch.cat([obs, action], -1)
        with torch.no_grad():
            target = reward + 0.99 * (1 - terminated) * value(next_obs).squeeze(-1)

            def q_of(obs, noise):
                x = torch.cat([obs, act(obs, latent_target, noise)], -1)
                return torch.min(*(targets[j](x).squeeze(-1) for j in pair))

            q_now = q_of(obs, (0.1 * noise[0]).clamp(-0.2, 0.2))
            q_next = q_of(next_obs, torch.zeros_like(noise[0]))
            advantage = reward + 0.99 * (1 - terminated) * q_next - value(obs).squeeze(-1)
            weight = torch.where(advantage > 0, 0.9, 0.1)
        step(value_optimizer, F.mse_loss(value(obs).squeeze(-1), q_now.clamp(0, 100)))
        for critic, optimizer in zip(critics, critic_optimizers, strict=True):
            step(optimizer, F.mse_loss(critic(obs_action).squeeze(-1), target))
        x = torch.cat([obs, act(obs, latent, 0.0)], -1)
        step(latent_optimizer, -torch.stack([critic(x) for critic in critics]).mean())
        mean, log_std = encoder(obs_action).chunk(2, -1)
        log_std = log_std.clamp(-4, 15)
        reconstruction = decoder(torch.cat([obs, mean + log_std.exp() * noise[1]], -1))
        kl = -0.5 * (1 + 2 * log_std - mean**2 - (2 * log_std).exp()).sum(-1)
        step(autoencoder_optimizer, (weight * (((reconstruction - action) ** 2).sum(-1) + kl)).mean())
        for net, slow in pairs:
            for parameter, slow_parameter in zip(net.parameters(), slow.parameters(), strict=True):
                slow_parameter.data.copy_(0.005 * parameter.data + 0.995 * slow_parameter.data)

    return update


def plain_action(name):
    layers = 3 if name == "o3f lapo action" else 2
    critics, obs, noise = [mlp(OBS + ACT, 1, layers) for _ in range(5)], torch.randn(1, OBS), torch.randn(100, ACT)
    latent, decoder, mean = mlp(OBS, 2 * ACT, 3), mlp(OBS + 2 * ACT, ACT, 3), mlp(OBS, ACT, 2)

    @torch.no_grad()
    def choose(*_):
        if layers == 3:
            action = decoder(torch.cat([obs, 2 * torch.tanh(latent(obs))], -1)).clamp(-1, 1)
        else:
            action = torch.distributions.Normal(torch.tanh(mean(obs)), 0.2).sample().clamp(-1, 1)
        candidates = (action + 0.2 * noise).clamp(-1, 1)
        q = torch.stack([critic(torch.cat([obs.expand(100, -1), candidates], -1)) for critic in critics])
        return candidates[(q.mean(0) + q.std(0, correction=0)).argmax()]

    return choose


def plain_update(name):
    if "td3" in name:
        return plain_td3(name)
    if "ppo" in name:
        return plain_ppo(name)
    if name == "iql":
        return plain_iql()
    if name == "lapo":
        return plain_lapo()
    if "action" in name:
        return plain_action(name)
    makers = {"sac": plain_sac, "cql": plain_cql, "o2o_sac reevaluate": plain_reevaluate, "o2o_sac align": plain_align}
    return makers.get(name, lambda: plain_sac(3, layer_norm=True, constrained=True))()


def our_td3(script, name, compiled, bf16):
    stats, count = (torch.zeros(OBS), torch.ones(OBS)), itertools.count(1)
    actor = script.DeterministicActor(*stats, ACT, [256] * 2)
    critics = script.Td3Critics(*stats, ACT, [256] * 2, layer_norm=name != "td3_bc", bf16=bf16)
    nets = {key: deepcopy(actor) for key in ("actor", "actor_target", "behaviour", "reference")}
    nets |= {"critics": critics, "targets": deepcopy(critics)}
    args = script.Args()
    if name == "td3_bc":
        update = script.compile_update(script.make_update(args, nets, OBS, ACT)[1], compiled, "cpu")
        return lambda rows, noise: update(rows, noise[0], next(count) % 2 == 0)
    script.fill_defaults(args)
    nets["log_multiplier"] = script.Scalar(0.0)
    optimizers = {key: script.Adam(nets[key].parameters(), 3e-4) for key in ("actor", "critics", "log_multiplier")}
    stages = ("reevaluate", "align", "finetune")
    update = script.make_updates(args, nets, optimizers, OBS, ACT)[stages.index(name.split()[1])]
    update, limit = script.compile_update(update, compiled, "cpu"), torch.tensor(0.01)
    return (lambda *batch: update(*batch, limit, next(count) % 2 == 0)) if name == "o2o_td3 finetune" else update


def our_iql(script, compiled, bf16):
    stats = torch.zeros(OBS), torch.ones(OBS)
    critics = script.Critics(*stats, ACT, [256] * 2, bf16=bf16)
    nets = {"actor": script.TanhGaussianActor(*stats, ACT, [256] * 2, 1.0, bf16), "critics": critics}
    nets |= {"targets": deepcopy(critics), "value": script.Value(*stats, [256] * 2, nn.ReLU, bf16)}
    update, scale = script.make_iql_update(script.Args(), nets, OBS, ACT)[1], torch.tensor(0.5)
    update = script.compile_update(update, compiled, "cpu")
    return lambda rows, _: update(rows, scale)


def our_ppo(script, name, compiled, bf16):
    stats, (rows, fit_rows), scale = (torch.zeros(OBS), torch.ones(OBS)), ppo_rows(), torch.tensor(0.5)
    nets = {"actor": script.TanhGaussianActor(*stats, ACT, [256] * 2, 1.0, bf16)}
    nets["value"] = script.Value(*stats, [256] * 3, nn.Tanh, bf16)
    args = script.Args()
    script.fill_defaults(args)
    optimizers = {key: script.Adam(nets[key].parameters(), 1e-4, eps=1e-5, max_norm=0.5) for key in nets}
    optimizers["reevaluation"] = script.Adam(nets["value"].parameters(), 1e-4)
    updates = script.make_updates(args, nets, optimizers, OBS, ACT)
    reevaluate, finetune = (script.compile_update(update, compiled, "cpu") for update in updates)

    def iteration(*_):
        for _ in range(10):
            for index in torch.randperm(2048).view(-1, 128):
                finetune(rows[index], scale)

    return (lambda *_: reevaluate(fit_rows, None)) if name == "o2o_ppo reevaluate" else iteration


def lapo_nets(script, bf16):
    stats, sizes = (torch.zeros(OBS), torch.ones(OBS)), (2 * ACT, [256] * 3)
    sizes = stats, (torch.zeros(ACT), torch.ones(ACT)), *sizes
    nets = {"encoder": script.Encoder(*sizes, bf16), "decoder": script.Decoder(*sizes, bf16)}
    nets["policy"] = script.LatentPolicy(*sizes, 2.0, bf16)
    nets["critics"] = script.Critics(*stats, ACT, [256] * 3, n=5, bf16=bf16)
    nets |= {"latent_target": deepcopy(nets["policy"].latent), "targets": deepcopy(nets["critics"])}
    return nets | {"value": script.Value(*stats, [256] * 3, nn.ReLU, bf16)}


def our_lapo(script, compiled, bf16):
    nets, batch = lapo_nets(script, bf16), lapo_rows()
    update = script.make_lapo_update(script.Args(), nets, torch.tensor([0.0, 100.0]), OBS, ACT)[1]
    update = script.compile_update(update, compiled, "cpu")
    return lambda *_: update(*batch)


def our_action(script, name, compiled, bf16):
    stats, nets = (torch.zeros(OBS), torch.ones(OBS)), lapo_nets(script, bf16)
    if name == "o3f iql action":
        nets["policy"] = script.TanhGaussianActor(*stats, ACT, [256] * 2, 1.0, bf16)
        nets["critics"] = script.Critics(*stats, ACT, [256] * 2, n=5, bf16=bf16)
    args, obs = script.Args(base=name.split()[1]), torch.randn(1, OBS)
    act = script.compile_update(script.make_act(args, nets), compiled, "cpu")
    own, noise = torch.randn(1, ACT), torch.randn(args.num_candidates, ACT)
    return lambda *_: act(obs, own, noise)


def our_update(name, compiled, precision):
    script = importlib.import_module({"sac": "collect"}.get(name, name.split()[0]))
    stats, bf16 = (torch.zeros(OBS), torch.ones(OBS)), precision == "medium"
    if "td3" in name:
        return our_td3(script, name, compiled, bf16)
    if name == "iql":
        return our_iql(script, compiled, bf16)
    if "ppo" in name:
        return our_ppo(script, name, compiled, bf16)
    if name == "lapo":
        return our_lapo(script, compiled, bf16)
    if "action" in name:
        return our_action(script, name, compiled, bf16)
    if name == "sac":
        _, _, update = script.make_sac(OBS, ACT, "cpu", bf16)
        return script.compile_update(update, compiled, "cpu")
    nets = {"actor": script.SquashedGaussianActor(*stats, ACT, [256] * 3), "log_alpha": script.Scalar(0.0)}
    if name == "cql":
        nets |= {"critics": script.CqlCritics(*stats, ACT, [256] * 3, bf16=bf16), "log_weight": script.Scalar(0.0)}
        nets["targets"] = deepcopy(nets["critics"])
        return script.compile_update(script.make_update(script.Args(), nets, OBS, ACT)[1], compiled, "cpu")
    args, actor = script.Args(), nets["actor"]
    script.fill_defaults(args)
    nets["critics"] = script.Critics(*stats, ACT, [256] * 3, layer_norm=True, bf16=bf16)
    nets |= {"behaviour": deepcopy(actor), "reference": deepcopy(actor), "targets": deepcopy(nets["critics"])}
    optimizers = {key: script.Adam(nets[key].parameters(), 3e-4) for key in ("actor", "critics", "log_alpha")}
    stages = ("reevaluate", "align", "finetune")
    update = script.make_updates(args, nets, optimizers, OBS, ACT)[stages.index(name.split()[1])]
    update, multiplier = script.compile_update(update, compiled, "cpu"), torch.tensor(1.0)
    return (lambda *batch: update(*batch, multiplier)) if name == "o2o_sac finetune" else update


def measure(setting):
    """Updates per second of one setting, the median of five stretches."""
    torch.set_num_threads(setting.threads)
    torch.set_float32_matmul_precision(setting.precision)
    torch.manual_seed(0)
    compiled = setting.version == "compiled"
    plain = setting.version == "plain"
    update = plain_update(setting.name) if plain else our_update(setting.name, compiled, setting.precision)
    batch = rows_and_noise(31)
    for _ in range(3):
        update(*batch)
    rates = []
    for _ in range(5):
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < SECONDS / 5:
            update(*batch)
            count += 1
        rates.append(count / (time.perf_counter() - start))
    return sorted(rates)[2]


def main(threads):
    versions = [("plain", "highest"), ("eager", "highest"), ("compiled", "highest"), ("compiled", "medium")]
    table = {}
    for name, n, (version, precision) in itertools.product(UPDATES, threads, versions):
        setting = json.dumps({"name": name, "threads": n, "version": version, "precision": precision})
        done = subprocess.run([sys.executable, __file__, setting], capture_output=True, text=True, check=True)
        table[name, n, version, precision] = float(done.stdout.split()[-1])
        print(setting, f"{table[name, n, version, precision]:.1f}/s", flush=True)
    lines = [
        "# Updates per second",
        "",
        f"Made by `python results/speed.py {' '.join(map(str, threads))}` in one run; Hopper's sizes, random data,",
        "batch 256 (LAPO: 512; O2PPO: 512 in stage 1, 128 in stage 2; an iteration is 10 epochs over 2,048; an action",
        "of O3F is the best of 100 candidates by 5 critics). *Plain*: separate",
        "critics, torch.optim, `loss.backward()`, eager, float32. *Factor*: compiled with bf16 matmul against plain.",
        "",
        f"{platform.processor() or platform.machine()}, {platform.system()}, torch {torch.__version__}.",
        "",
        "| update | threads | plain | ours, eager | compiled, fp32 | compiled, bf16 matmul | factor |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, n in itertools.product(UPDATES, threads):
        rates = [table[name, n, *version] for version in versions]
        cells = " | ".join(
            f"{rate:.0f}" if rate > 30 else f"{rate:.1f}" if rate > 3 else f"{rate:.2f}" for rate in rates
        )
        lines.append(f"| {name} | {n} | {cells} | {rates[3] / rates[0]:.1f} |")
    (ROOT / "results/speed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(measure(SimpleNamespace(**json.loads(sys.argv[1]))))
    else:
        main([int(word) for word in sys.argv[1:]] or [1, 2])
