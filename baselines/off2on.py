"""Off2On: balanced replay and a pessimistic ensemble (Lee et al. 2021, arXiv 2107.00591), on top of CQL.

Five CQL agents are pre-trained side by side. Online they act as one squashed Gaussian with the moments of their
mixture, and go on with SAC: five pairs of critics are more pessimistic about actions that no data supports than one. A
network learns which transitions of the data look as if the present policy had made them, and these are replayed more
often.

    python baselines/off2on.py --env-id hopper-medium-v2  # pre-trains five agents, then goes on online
    python baselines/off2on.py --checkpoint RUN_DIR/offline.pt --seed 2  # the same start, without pre-training again

Online in rounds of 1,000 environment steps and as many updates (the first round: five times as many). New transitions
enter with so large a priority that the first round's make up half of each batch.

The method ends with `train`. What follows is plumbing (networks, data, run folder), the same in every script but for
the policy's class.
"""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from minari.storage.datasets_root_dir import get_dataset_path
from torch import nn
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "hopper-medium-v2"  # task: names the dataset and the run folder
    seed: int = 1  # the only seed: networks, batches, training and evaluation environments derive from it
    exp_name: str = "off2on"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    dataset: str | None = None  # Minari id, local or remote; None: o2o/<env_id>, made by offline/collect.py if missing
    checkpoint: str | None = None  # offline.pt or model.pt of an earlier run; None: pre-train first
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    offline_steps: int = 50_000  # updates of each agent in the pre-training (paper: 1,000,000)
    online_steps: int = 50_000  # environment steps (paper: 250,000)
    round_steps: int = 1_000  # environment steps of a round, followed by as many updates
    first_round: int = 5  # times as many updates in the first round (authors' demo: 5, their default: 10)
    eval_every: int = 1_000  # environment steps between evaluations
    eval_every_updates: int = 5_000  # updates between them in the pre-training
    eval_episodes: int = 10  # episodes of one evaluation, all at once

    batch_size: int = 256  # transitions of one gradient step of an agent
    reward_scale: float = 1.0  # rewards are multiplied by it in all updates; scores are of raw rewards
    reward_bias: float = 0.0  # then this is added
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak rate of the targets
    learning_rate: float = 3e-4  # all networks online, and the critics in the pre-training
    policy_lr: float = 1e-4  # actors and temperatures in the pre-training
    num_agents: int = 5  # actors, each with two critics of its own
    cql_alpha: float = 5.0  # weight of CQL's conservative term
    cql_actions: int = 4  # actions that it draws from each of uniform, pi(.|s), pi(.|s') (authors: 10)
    online_share: float = 0.5  # of the first round's transitions in a batch
    ratio_temperature: float = 5.0  # T: priorities are the density ratio to the power 1/T
    ratio_buffer: int = 250_000  # last online transitions that the ratio is learned from

    compile: bool = True  # compile each update into one graph
    bf16: bool = False  # matrix products in bf16, if the CPU or GPU has units for it
    num_threads: int = 1  # CPU threads: such small networks get slower, not faster, once threads exceed the free cores


def settings(args):
    """What the authors change with the task; the command line still wins. Their paper has no mazes."""
    return {"online_share": 0.75} if args.env_id == "halfcheetah-medium-v2" else {}


def td_target(reward, terminated, next_q, gamma, bonus=0.0):
    """y_i = r + gamma (1 - d) [ min_j Q_ij(s', a') + bonus ] of each agent i and its critics j = 1, 2; offline without
    bonus, online with -alpha log pi(a'|s'). reward, terminated, bonus (..., B); next_q (n, 2, B) return. -> (n, B)."""
    return reward + gamma * (1 - terminated) * (next_q.amin(1) + bonus)


def actor_loss(log_prob, q, alpha):
    """E[ alpha log pi(a|s) ] - E[ min_j Q_ij(s,a) ], the mean over agents i and states; log_prob (B,) of the ensemble
    or (n, B) of each, q (n, 2, B)."""
    return (alpha * log_prob).mean() - q.amin(1).mean()


def moments(mean, log_std):
    """The Gaussian with mean and variance of an equal mixture: mu = mean_i mu_i, sigma^2 = mean_i (mu_i^2 + sigma_i^2)
    - mu^2. mean, log_std (n, B, A) -> mu and log sigma (B, A)."""
    mu = mean.mean(0)
    variance = ((mean - mu) ** 2 + (2 * log_std).exp()).mean(0)
    return mu, (0.5 * variance.log()).clamp(-20, 2)


def conservative_gap(q_candidates, log_density, q_data, temperature, clip=None):
    """How far the critics rank the policy's actions above the data's, CQL(H) with importance weights (Eq. 4, App. F):

        T logsumexp_k( (Q(s, a_k) - log p(a_k)) / T ) - Q(s, a)

    q_candidates (n, B, K): return. log_density (B, K): nats, of the distribution that a_k was drawn from.
    q_data (n, B): Q of the action in the data. -> (n, B), clipped below at `clip`."""
    gap = temperature * torch.logsumexp((q_candidates - log_density) / temperature, dim=-1) - q_data
    return gap if clip is None else gap.clamp(min=clip)


def ratio_loss(offline, online):
    """-E_off[ log 2/(w+1) ] - E_on[ log 2w/(w+1) ]: least where w(s,a) is the density of the online transitions over
    that of the data (the dual of the Jensen-Shannon divergence). offline, online (B,): w >= 0 of a batch of each."""
    return -((2 / (offline + 1) + 1e-10).log().mean() + (2 * online / (online + 1) + 1e-10).log().mean())


def priority(ratio, offline, temperature):
    """w^(1/T) / E_off[ w^(1/T) ], within [1e-3, 1e3]; ratio (B,) of the transitions, offline (B,) of the data."""
    scale = (offline ** (1 / temperature)).mean().clamp(min=1e-10)
    return (ratio ** (1 / temperature) / scale).clamp(1e-3, 1e3)


def first_priority(data, share, count):
    """What `count` new transitions need so that they make up `share` of the batches beside `data` of priority 1."""
    return data * share / ((1 - share) * count)


def make_offline_update(args, nets, optimizers, split):
    """-> update(rows (n B, 2 O + A + 2), a batch for each agent; noise (3 K + 1, n, B, A) standard normal), CQL of all
    agents at once, which changes `nets` in place and returns detached numbers."""
    actor, critics, targets, k = nets["actor"], nets["critics"], nets["targets"], args.cql_actions
    log_alpha = nets["log_alpha"][0]  # (n, 1)

    def update(rows, noise):
        parts = [x.unflatten(0, (args.num_agents, -1)) for x in split(rows)]
        obs, action, reward, next_obs, terminated = parts
        with torch.no_grad():
            next_actions, next_log_prob = draw_each(actor, next_obs, noise[:k])
            actions, log_prob = draw_each(actor, obs, noise[k : 2 * k])
            uniform = torch.erf(noise[2 * k : 3 * k] / math.sqrt(2)).permute(1, 2, 0, 3)  # of normal noise: U[-1, 1]
            uniform_density = torch.full_like(log_prob, -action.shape[-1] * math.log(2))
            log_density = torch.cat([uniform_density, log_prob, next_log_prob], dim=-1)
            target = td_target(reward, terminated, targets.pairs(next_obs, next_actions[:, :, 0]), args.gamma)
        q = critics.pairs(obs, action)
        td_loss = ((q - target[:, None]) ** 2).mean(-1).sum()
        candidates = torch.cat([uniform, actions, next_actions], dim=2)  # (n, B, 3 K, A)
        flat = obs.repeat_interleave(3 * k, 1), candidates.flatten(1, 2)
        q_candidates = critics.pairs(*flat).unflatten(-1, (-1, 3 * k))
        gap = conservative_gap(q_candidates, log_density[:, None], q, 1.0).mean(-1)
        optimizers["critics"].minimize(td_loss + args.cql_alpha * gap.sum())
        alpha = log_alpha.detach().exp()
        mean, log_std = actor(obs)
        u = mean + log_std.exp() * noise[3 * k]
        new_log_prob = squashed_log_prob(mean, log_std, u)
        loss = actor_loss(new_log_prob, critics.pairs(obs, torch.tanh(u)), alpha) * args.num_agents  # a sum of theirs
        optimizers["offline_actor"].minimize(loss)
        entropy = -new_log_prob.detach().mean(-1, keepdim=True)
        optimizers["offline_alpha"].minimize((log_alpha * (entropy + action.shape[-1])).sum())  # target: -A nats
        polyak(targets, critics, args.tau)
        return numbers(td_loss=td_loss, gap=gap.mean(), q_mean=q.mean(), alpha=alpha.mean(), entropy=entropy.mean())

    return update


def make_update(args, nets, optimizers, split):
    """-> update(rows (B, 2 O + A + 2), offline and online rows (B, ...) to learn the ratio from, noise (2, B, A)):
    SAC of the ensemble policy with a pair of critics for each agent. -> detached numbers, `priority` (B,) of the rows
    and `ratio`, w of the offline and of the online rows, among them."""
    actor, critics, targets, ratio = nets["actor"], nets["critics"], nets["targets"], nets["ratio"]
    log_alpha = nets["log_alpha"][1]

    def update(rows, offline, online, noise):
        w_offline, w_online = ratio(*split(offline)[:2]), ratio(*split(online)[:2])
        density_loss = ratio_loss(w_offline, w_online)
        optimizers["ratio"].minimize(density_loss)
        obs, action, reward, next_obs, terminated = split(rows)
        with torch.no_grad():
            weights = priority(ratio(obs, action), ratio(*split(offline)[:2]), args.ratio_temperature)
            alpha = log_alpha.exp()
            next_action, next_log_prob, _ = actor.sample(next_obs, noise[0])
            next_q = targets.pairs(each(next_obs, args), each(next_action, args))
            target = td_target(reward, terminated, next_q, args.gamma, -alpha * next_log_prob)
        q = critics.pairs(each(obs, args), each(action, args))
        critic_loss = ((q - target[:, None]) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(critic_loss)
        new_action, log_prob, _ = actor.sample(obs, noise[1])
        loss = actor_loss(log_prob, critics.pairs(each(obs, args), each(new_action, args)), alpha)
        optimizers["actor"].minimize(loss)
        entropy = -log_prob.detach().mean()
        optimizers["log_alpha"].minimize(log_alpha * (entropy + action.shape[1]))  # target: -A nats
        polyak(targets, critics, args.tau)
        values = numbers(critic_loss=critic_loss, policy_loss=loss, q_mean=q.mean(), alpha=alpha, entropy=entropy)
        values |= numbers(ratio_loss=density_loss, ratio_offline=w_offline.mean(), ratio_online=w_online.mean())
        return values | numbers(priority=weights)

    return update


def train_offline(args, run, stage, steps, update, rows, shape, check, extra=lambda step: ()):
    """`steps` updates on batches of `rows`, with standard normal noise of `shape` and whatever `extra(step)` gives.
    Every eval_every_updates logs their numbers and those of `check()`, and saves."""
    progress, generator, clock, count = run.progress, run.generator, time.monotonic(), 0
    for step in tqdm(range(progress["step"] + 1, steps + 1), desc=stage, unit="update", disable=None):
        index = torch.randint(len(rows), (args.batch_size,), generator=generator, device=generator.device)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        values, count = update(rows[index], noise, *extra(step)), count + 1
        if step % args.eval_every_updates == 0 or step == steps:
            values = {key: float(value) for key, value in values.items()}  # waits for a GPU, so the clock is right
            progress["step"], progress["updates_per_second"][stage] = step, count / max(time.monotonic() - clock, 1e-9)
            run.log(stage, step, values | {"updates_per_second": progress["updates_per_second"][stage]} | check())
            run.save()
            clock, count = time.monotonic(), 0


def draw_by_priority(generator, priorities, batch_size):
    """-> indices (batch_size,) with probabilities proportional to priorities (N,), one from each of batch_size equal
    shares of their sum."""
    sums = priorities.cumsum(0, dtype=torch.float64)
    places = torch.rand(batch_size, generator=generator, device=generator.device, dtype=torch.float64)
    places = (torch.arange(batch_size, device=places.device) + places) / batch_size * sums[-1]
    return torch.searchsorted(sums, places, right=True).clamp(max=len(priorities) - 1)


def train_online(args, run, update, data, score):
    """Rounds of environment steps with actions drawn from the ensemble policy, each followed by its updates. The
    environment receives exactly the action that the buffer stores."""
    progress, actor, generator = run.progress, run.nets["actor"], run.generator
    env, obs, buffer, num_data = online_start(args, run, data)
    priorities, largest = saved_priorities(args, run, num_data, len(buffer))
    seconds, count, values = 0.0, 0, {}
    for step in tqdm(range(progress["step"] + 1, args.online_steps + 1), desc="online", unit="step", disable=None):
        with torch.no_grad():
            noise = torch.randn(1, data.act_dim, generator=generator, device=generator.device)
            action = actor.sample(data.to_tensor(obs[None]), noise)[0][0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        scaled = args.reward_scale * reward + args.reward_bias
        row = np.concatenate([obs, action, [scaled], next_obs, [terminated]])  # a time limit keeps its bootstrap
        buffer[num_data + step - 1], priorities[num_data + step - 1], obs = data.to_tensor(row), largest, next_obs
        if terminated or truncated:
            obs, progress["episode_start"] = env.reset(seed=1_000_000 * args.seed + step)[0], step

        updates = args.round_steps * (args.first_round if step == args.round_steps else 1)
        clock = time.monotonic()
        for _ in range(updates if step % args.round_steps == 0 else 0):
            index, last, batch = (
                draw_by_priority(generator, priorities[: num_data + step], args.batch_size),
                num_data + step,
                args.batch_size,
            )
            offline = torch.randint(num_data, (batch,), generator=generator, device=generator.device)
            online = torch.randint(
                max(num_data, last - args.ratio_buffer), last, (batch,), generator=generator, device=generator.device
            )
            noise = torch.randn(2, batch, data.act_dim, generator=generator, device=generator.device)
            values = update(buffer[index], buffer[offline], buffer[online], noise)
            weights = values.pop("priority")
            priorities[index], largest, count = weights, torch.maximum(largest, weights.max()), count + 1
        if args.cuda:
            torch.cuda.synchronize()  # for the clock; the next action would wait for the updates anyway
        seconds += time.monotonic() - clock
        progress["step"] = progress["online_steps"] = step
        if step % args.eval_every == 0 or step == args.online_steps:
            progress["updates_per_second"]["online"] = count / max(seconds, 1e-9)
            share = priorities[num_data : num_data + step].sum() / priorities[: num_data + step].sum()
            row = {"online_share": share, "updates_per_second": progress["updates_per_second"]["online"]} | score()
            progress["scores"].append([step, row["score"]])
            run.log("online", step, values | row)
            state = {"priorities": priorities[: num_data + step].cpu().clone(), "largest": largest.cpu()}
            run.save(online=buffer[num_data : num_data + step].cpu().clone(), **state)
            seconds, count = 0.0, 0


def train(args, run, data, saved):
    """The method: on the data, from random networks; then online, as one ensemble."""
    progress, device = run.progress, data.rows.device
    torch.manual_seed(args.seed)
    stats, hidden, n = (torch.zeros(data.obs_dim), torch.ones(data.obs_dim)), (256, 256), args.num_agents
    nets = {"actor": EnsembleActor(*stats, data.act_dim, hidden, n, args.bf16)}
    nets["critics"] = PairedCritics(*stats, data.act_dim, hidden, 2 * n, bf16=args.bf16)
    nets = start_from(args.checkpoint, saved, nets)
    nets |= {"targets": deepcopy(nets["critics"]), "ratio": DensityRatio(*stats, data.act_dim, hidden, args.bf16)}
    nets["log_alpha"] = nn.ParameterList([torch.zeros(n, 1), torch.zeros(())])  # of each agent, of the ensemble
    nets = {name: net.to(device) for name, net in nets.items()}
    optimizers = {name: Adam(nets[name].parameters(), args.learning_rate) for name in ("actor", "critics", "ratio")}
    optimizers["offline_actor"] = Adam(nets["actor"].parameters(), args.policy_lr)
    optimizers["offline_alpha"] = Adam(nets["log_alpha"][:1], args.policy_lr)
    optimizers["log_alpha"] = Adam(nets["log_alpha"][1:], args.learning_rate)
    run.restore(nets, optimizers, torch.Generator(device).manual_seed(args.seed))
    envs = [data.make_env() for _ in range(args.eval_episodes)]
    score, shape = partial(score_policy, args, run, data, envs), (3 * args.cql_actions + 1, n, args.batch_size)
    if progress["stage"] == "start":
        run.enter("offline")
    if progress["stage"] == "offline":
        if saved is None:
            update = compile_update(make_offline_update(args, nets, optimizers, data.split), args)
            batches = replace(args, batch_size=n * args.batch_size)  # one for each agent
            shape = *shape, data.act_dim
            train_offline(batches, run, "offline", args.offline_steps, update, data.rows, shape, score)
        progress["offline_score"], progress["offline_error"] = closing_score(args, nets["actor"], data, envs)
        progress["start_score"] = score()["score"]
        print(f"offline policy: score {progress['offline_score']:.1f} +- {progress['offline_error']:.1f}", flush=True)
        save_file(checkpoint(args, data, nets, args.offline_steps, progress["offline_score"]), run.dir / "offline.pt")
        run.generator.manual_seed(args.seed)  # the second stage is then the same with --checkpoint
        nets["targets"].load_state_dict(nets["critics"].state_dict())
        torch._foreach_zero_(optimizers["critics"].state_dict()["state"])
        run.enter("online")
    train_online(args, run, compile_update(make_update(args, nets, optimizers, data.split), args), data, score)
    progress["closing_score"], progress["closing_error"] = closing_score(args, nets["actor"], data, envs)
    save_file(checkpoint(args, data, nets, args.online_steps, progress["closing_score"]), run.dir / "model.pt")


ALGORITHM, KIND = "off2on", "ensemble"  # this script, its policy class
RESUMABLE = "offline_steps online_steps compile num_threads track wandb_project_name wandb_entity"
PRIVATE = "stage step episode_start"  # of a run's progress, not in summary.json
RANGES = {
    (-(10**9), 10**9): "reward_bias",
    (0, 1): "gamma tau learning_rate policy_lr",
    (0.001, 0.999): "online_share",
    (0, 10**9): "seed offline_steps online_steps cql_alpha",
    (
        1,
        10**9,
    ): "round_steps first_round eval_every eval_every_updates eval_episodes batch_size cql_actions ratio_buffer",
    (1e-9, 10**9): "reward_scale",
    (0.01, 10**9): "ratio_temperature",
    (1, 1024): "num_threads num_agents",
}


def mlp(net, x, bf16):
    """A network's output, with `bf16` all products in bf16 but the last: bf16 can't tell a Q of 300 from one of 301."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        x = net[:-1](x)
    return net[-1](x.float())


def draw_each(actor, obs, noise):
    """K actions of each agent's policy in its own states: obs (n, B, O), noise (K, n, B, A) -> actions (n, B, K, A),
    log_prob (n, B, K)."""
    mean, log_std = actor(obs)
    u = mean + log_std.exp() * noise
    return torch.tanh(u).permute(1, 2, 0, 3), squashed_log_prob(mean, log_std, u).permute(1, 2, 0)


def each(x, args):
    """The same rows (B, D) for every agent: (n, B, D)."""
    return x.expand(args.num_agents, *x.shape)


class EnsembleActor(nn.Module):
    """n squashed Gaussians side by side, and as one policy: the Gaussian of their mixture's moments, squashed."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden, n, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        sizes, self.n, self.bf16 = [len(obs_mean), *hidden], n, bf16
        layers = [m for i, o in pairwise(sizes) for m in (StackedLinear(n, i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, StackedLinear(n, sizes[-1], 2 * act_dim))
        with torch.no_grad():
            self.net[-1].weight *= 0.01

    def forward(self, obs):
        """(n, B, O) raw observations, of each agent its own -> mean and log_std of u, (n, B, A) each."""
        mean, log_std = mlp(self.net, (obs - self.obs_mean) / self.obs_std, self.bf16).chunk(2, dim=-1)
        return mean, (log_std - 1).clamp(-20, 2)  # a new network's std is 1 / e

    def sample(self, obs, noise):
        """Of the ensemble, obs (B, O) -> action (B, A) in [-1, 1], its log_prob (B,) in nats, and u (B, A)."""
        mean, log_std = moments(*self(obs.expand(self.n, *obs.shape)))
        u = mean + log_std.exp() * noise
        return torch.tanh(u), squashed_log_prob(mean, log_std, u), u

    def mode(self, obs):
        """-> tanh of the ensemble's mean (B, A), the action that evaluation executes."""
        return torch.tanh(self(obs.expand(self.n, *obs.shape))[0].mean(0))


def squashed_log_prob(mean, log_std, u):
    """log density of a = tanh(u) in nats, (..., A) three times -> (...):

        log N(u; mean, std^2) - sum log(1 - tanh(u)^2),   log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u))

    Takes u and not a: atanh(a) is not finite where tanh rounds to 1."""
    normal = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class StackedLinear(nn.Module):
    """n linear layers in one batched matmul, (n, B, inputs) -> (n, B, outputs), and layer normalisation after them.
    Of k < n inputs, the first k layers' outputs."""

    def __init__(self, n, inputs, outputs, layer_norm=False):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([nn.init.orthogonal_(torch.empty(inputs, outputs)) for _ in range(n)]))
        self.bias = nn.Parameter(torch.zeros(n, 1, outputs))
        if layer_norm:
            self.scale, self.shift = nn.Parameter(torch.ones(n, 1, outputs)), nn.Parameter(torch.zeros(n, 1, outputs))
        self.layer_norm = layer_norm

    def forward(self, x):
        k = len(x)
        x = torch.bmm(x, self.weight[:k])
        if not self.layer_norm:
            return x + self.bias[:k].to(x.dtype)  # in bf16 too, or the sum would move twice the memory
        return F.layer_norm(x.float() + self.bias[:k], x.shape[-1:]) * self.scale[:k] + self.shift[:k]


class Critics(nn.Module):
    """n Q-functions side by side: raw observations (B, O) and actions (B, A) -> Q (n, B), or the first k."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden, n=2, layer_norm=False, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        sizes, self.n, self.bf16 = [len(obs_mean) + act_dim, *hidden], n, bf16
        layers = [m for i, o in pairwise(sizes) for m in (StackedLinear(n, i, o, layer_norm), nn.ReLU())]
        self.net = nn.Sequential(*layers, StackedLinear(n, sizes[-1], 1))

    def forward(self, obs, action, k=None):
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, action], dim=-1)
        return mlp(self.net, x.expand(k or self.n, *x.shape), self.bf16).squeeze(-1)


class PairedCritics(Critics):
    """2 n Q-functions, two for each of n agents."""

    def pairs(self, obs, action):
        """Rows of each agent, obs (n, B, O) and action (n, B, A) -> Q of its two critics (n, 2, B)."""
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, action], dim=-1).repeat_interleave(2, 0)
        return mlp(self.net, x, self.bf16).squeeze(-1).unflatten(0, (-1, 2))


class DensityRatio(nn.Module):
    """w(s,a) >= 0, about 1 at the start."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        sizes = [len(obs_mean) + act_dim, *hidden]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net, self.bf16 = nn.Sequential(*layers, nn.Linear(sizes[-1], 1)), bf16
        nn.init.ones_(self.net[-1].bias)

    def forward(self, obs, action):
        """(B, O) raw observations, (B, A) -> (B,)."""
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, action], dim=-1)
        return F.relu(mlp(self.net, x, self.bf16).squeeze(-1))


class Adam:
    """torch's Adam as a function of gradients, which stays inside the compiled update: torch.optim's own step breaks
    it into pieces and costs a third of its speed. max_norm: longer gradients are shortened to it."""

    def __init__(self, params, lr, eps=1e-8, max_norm=None):
        self.params, self.lr, self.eps, self.max_norm = list(params), lr, eps, max_norm
        self.means, self.squares = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.steps = [torch.zeros((), device=p.device) for p in self.params]
        for tensor in (*self.means, *self.squares, *self.steps):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs refuse to change other tensors in place

    def minimize(self, loss, scale=1.0):
        """One step on a scalar loss, at `scale` times the learning rate. Only this optimiser's parameters get
        gradients, so the critics' weights stay out of the actor's graph. autograd.grad and not loss.backward(): the
        latter does nothing inside torch.compile."""
        grads, compiling = list(torch.autograd.grad(loss, self.params)), torch.compiler.is_compiling()
        options = {"foreach": True, "capturable": compiling, "maximize": False, "amsgrad": False, "weight_decay": 0.0}
        options |= {"lr": self.lr * scale if compiling else float(self.lr * scale), "eps": self.eps}
        options |= {"beta1": 0.9, "beta2": 0.999}
        with torch.no_grad():
            if self.max_norm is not None:
                norm = torch.stack([grad.norm() for grad in grads]).norm()
                grads = torch._foreach_mul(grads, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
            adam(self.params, grads, self.means, self.squares, [], self.steps, **options)

    def state_dict(self):
        return {"state": [*self.steps, *self.means, *self.squares]}

    def load_state_dict(self, saved):
        for mine, value in zip(self.state_dict()["state"], saved["state"], strict=True):
            mine.copy_(value.view(mine.shape))  # a view, or a smaller one would be broadcast


@torch.no_grad()
def polyak(target, source, tau):
    """target <- (1 - tau) * target + tau * source, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def numbers(**values):
    """-> the values without their graphs: what an update reports."""
    return {key: value.detach() for key, value in values.items()}


def compile_update(update, args):
    """The whole update as one graph (CUDA graphs on a GPU); with --no-compile, or no compiler that works, eagerly."""
    if not args.compile:
        return update
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        print(f"torch {torch.__version__} does not compile gradients: it takes twice the time of 2.13", file=sys.stderr)
        args.compile = False  # once is enough
        return update
    torch._dynamo.config.trace_autograd_ops = True  # lets torch.autograd.grad stay inside the graph
    options = {"triton.cudagraphs": True} if args.cuda else {"cpp_wrapper": True}  # a Python wrapper costs a tenth
    chosen = torch.compile(update, fullgraph=True, options=options)

    def call(*inputs):
        nonlocal chosen
        try:
            return chosen(*inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # before anything was computed
            reason = f"{type(error.inner_exception).__name__}; the updates run uncompiled, at half the speed"
            print(f"no C++ compiler that works: {reason}", file=sys.stderr)
            chosen = update
            return update(*inputs)

    return call


class UserError(Exception):
    """Something the user can put right: `run_cli` prints it as one sentence and exits with code 2."""


class Data(NamedTuple):
    """A flat Minari dataset in memory: N transitions of whole episodes. Time limits are not terminations."""

    name: str
    rows: torch.Tensor  # (N, 2 O + A + 2) float32: observation, action, reward, next observation, terminated
    last: torch.Tensor  # (N,) does an episode end here? An AntMaze recording goes on after its ends
    obs_dim: int
    act_dim: int
    references: tuple[float, float]  # returns that make 0 and 100 points
    source: minari.MinariDataset

    def make_env(self):
        return self.source.recover_environment()

    def split(self, rows):
        """-> obs (B, O), action (B, A), reward (B,), next_obs (B, O), terminated (B,)."""
        obs, action, reward, next_obs, end = rows.split([self.obs_dim, self.act_dim, 1, self.obs_dim, 1], dim=-1)
        return obs, action, reward.squeeze(-1), next_obs, end.squeeze(-1)

    def to_tensor(self, array):
        return torch.as_tensor(array, dtype=torch.float32, device=self.rows.device)

    def score(self, mean_return):
        """100 * (return - low) / (high - low), D4RL's points."""
        low, high = self.references
        return 100 * (float(mean_return) - low) / (high - low)


def check_spec(spec, name):
    """Making an environment runs code, and a dataset says which: nothing is made but what gymnasium's registry holds,
    under wrappers of gymnasium that touch no file. `spec`: the dataset's own JSON. Raises UserError."""
    harmless = "FilterObservation FlattenObservation RescaleAction RescaleObservation ClipAction TimeLimit".split()
    if not spec:
        raise UserError(f"{name} names no environment; offline/convert.py --env adds one")
    try:
        spec, places = json.loads(spec), {f"{getattr(gym.wrappers, w).__module__}:{w}" for w in harmless}
        if spec["entry_point"].startswith("gymnasium_robotics."):  # AntMaze, Kitchen, Adroit
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
        good = {wrapper["entry_point"] for wrapper in spec["additional_wrappers"]} <= places
        good &= gym.registry[spec["id"]].entry_point == spec["entry_point"]
        good &= not any(isinstance(value, str) and "/" in value for value in spec["kwargs"].values())  # files
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        hint = f"none was made; import what registers your own at the top of {Path(__file__).name}"
        raise UserError(f"{name} names no environment that gymnasium knows ({error!r}); {hint}") from error
    if not good:
        hint = f"with code that is not gymnasium's, or wrappers other than {', '.join(harmless)}"
        raise UserError(f"{name} names {spec['id']} {hint}; none was made")


def load_data(args, device):
    """args.dataset, or the local o2o/<env_id>, which offline/collect.py makes if it is missing. Raises UserError if
    there is no such dataset, or if it is not flat, not finite, or of no environment here."""
    name, here = args.dataset or f"o2o/{args.env_id}", Path(__file__).resolve().parent
    scripts = [folder / "offline/collect.py" for folder in (here, here.parent)]
    scripts = [path for path in scripts if path.exists()]
    try:
        folder = Path(get_dataset_path(name))
        if not folder.exists() and args.dataset:
            print(f"there is no local dataset {name}: looking for it at Minari's remote", flush=True)
            minari.download_dataset(name)
        elif not folder.exists():
            print(f"there is no dataset {name} yet; it is made by offline/collect.py", flush=True)
            if not scripts or subprocess.run([sys.executable, scripts[0], "--env-id", args.env_id]).returncode:
                raise UserError(f"no dataset {name}; make it with offline/collect.py, or name one with --dataset")
        check_spec(json.loads((folder / "data/metadata.json").read_text()).get("env_spec"), name)
        source = minari.load_dataset(name)
        env, episodes = source.recover_environment(), list(source.iterate_episodes())
        (obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
        columns = [(e.observations[:-1], e.actions, e.rewards, e.observations[1:], e.terminations) for e in episodes]
        rows = np.concatenate([np.column_stack(episode) for episode in columns]).astype(np.float32)
        last = np.concatenate([np.arange(len(e.rewards)) == len(e.rewards) - 1 for e in episodes]) | (rows[:, -1] == 1)
        points = [source.storage.metadata.get(key) for key in ("ref_min_score", "ref_max_score")]
        low, high = (0.0, 100.0) if None in points else map(float, points)
        boxed = (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
        flat = boxed and rows.shape[1] == 2 * obs_dim + act_dim + 2 and np.isfinite(rows).all() and low < high
        flat = flat and abs(rows[:, obs_dim:][:, :act_dim]).max() <= 1.001 and np.isin(rows[:, -1], (0, 1)).all()
        if not flat:
            raise UserError(f"{name} is not flat and finite, with actions in [-1, 1]; offline/convert.py makes it so")
        if env.spec.max_episode_steps is None:
            raise UserError(f"{name}: {env.spec.id} has no time limit, so an evaluation might never end")
    except UserError:
        raise
    except Exception as error:  # whatever the store, the network or the simulator raises
        reason = f"({' '.join(str(error).split()) or type(error).__name__})"
        raise UserError(f"cannot use the dataset {name} {reason}; `minari list local` shows what there is") from error
    column, factor, bias = obs_dim + act_dim, getattr(args, "reward_scale", 1.0), getattr(args, "reward_bias", 0.0)
    rows[:, column] = factor * rows[:, column] + bias
    data = Data(name, *(torch.from_numpy(x).to(device) for x in (rows, last)), obs_dim, act_dim, (low, high), source)
    ends = [e.terminations.argmax() + 1 if e.terminations.any() else None for e in episodes]  # recordings go on
    mean = np.mean([e.rewards[:end].sum() for e, end in zip(episodes, ends, strict=True)])
    score = f"score {data.score(mean):.1f}"
    scale = "the return, for lack of references" if None in points else f"0 at a return of {low:.0f}, 100 at {high:.0f}"
    print(f"dataset {name}: {len(rows)} transitions, {score} ({scale}), environment {env.spec.id}", flush=True)
    return data


def collected(run, data):
    """-> rows (n, 2 O + A + 2) of the n environment steps that a resumed run has made. Raises UserError."""
    done, width = run.saved.get("online", data.rows[:0]), data.rows.shape[1:]
    if not torch.is_tensor(done) or done.shape[1:] != width or len(done) != run.progress["online_steps"]:
        raise UserError(f"{run.dir}/resume.pt is damaged: it does not hold the steps that the run has made")
    return done.to(data.rows.device)


def online_start(args, run, data):
    """-> the training environment and the observation it stands at, the buffer (N + online_steps, 2 O + A + 2) with
    the data in its first N rows, and N. A resumed run repeats the actions of the episode that was cut off, so that no
    state of a simulator has to be stored."""
    start, num_data, env = run.progress["episode_start"], len(data.rows), data.make_env()
    buffer = torch.cat([data.rows, data.rows.new_zeros(args.online_steps, data.rows.shape[1])])
    done = collected(run, data)
    buffer[num_data : num_data + len(done)] = done
    obs, _ = env.reset(seed=1_000_000 * args.seed + start)
    for action in data.split(done[start:])[1].cpu().numpy():
        obs = env.step(action)[0]
    return env, obs, buffer, num_data


def saved_priorities(args, run, num_data, size):
    """-> priorities (size,) of the buffer, first the data's, and the largest so far: 1 for the data and first_priority,
    or of a resumed run what they were. Raises UserError."""
    device, steps = run.generator.device, run.progress["online_steps"]
    start = torch.tensor(first_priority(num_data, args.online_share, args.round_steps))
    known, largest = run.saved.get("priorities", torch.ones(num_data)), run.saved.get("largest", start)
    good = all(torch.is_tensor(x) and x.is_floating_point() and x.isfinite().all() for x in (known, largest))
    if not good or known.shape != (num_data + steps,) or largest.shape != () or (known <= 0).any():
        raise UserError(
            f"{run.dir}/resume.pt is damaged: it does not hold the priorities of what the run has collected"
        )
    priorities = torch.zeros(size, device=device)
    priorities[: num_data + steps] = known.to(device)
    return priorities, largest.to(device, torch.float32)


@torch.no_grad()
def evaluate(policy, envs, seed, device, gamma=1.0, alpha=0.0, scale=1.0, bias=0.0):
    """One episode in each of the n `envs`, all at once; `policy` maps obs (n, O) and noise (n, A) to actions (n, A) and
    their log_prob (n,). Start states and noise come from `seed` alone: no random number of training is drawn. -> raw
    returns (n,), sums of gamma^t (scale r + bias - alpha log_prob) (n,), and the environment steps of all episodes."""
    generator, alive, steps, discount = torch.Generator().manual_seed(seed), np.arange(len(envs)), 0, 1.0
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, discounted = np.zeros(len(envs)), np.zeros(len(envs))
    while len(alive):
        # drawn for all, so that the end of one episode does not change the noise of another
        noise = torch.randn(len(envs), *envs[0].action_space.shape, generator=generator)[alive].to(device)
        actions, log_prob = policy(torch.as_tensor(obs[alive], dtype=torch.float32, device=device), noise)
        actions, bonus, over = actions.cpu().numpy(), -alpha * log_prob.cpu().numpy(), []
        for i, action, extra in zip(alive, actions, bonus, strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i], discounted[i] = returns[i] + reward, discounted[i] + discount * (scale * reward + bias + extra)
            if terminated or truncated:
                over.append(i)
        steps, alive, discount = steps + len(alive), np.setdiff1d(alive, over), discount * gamma
    return returns, discounted, steps


def mode_of(policy):
    """The policy that executes the most likely action, for evaluate."""
    return lambda obs, noise: (policy.mode(obs), torch.zeros(len(obs)))


def score_policy(args, run, data, envs):
    """-> {"score"} of the policy's mode, from the same start states in every evaluation of a run."""
    seed = 100_000_000 + 1_000_000 * args.seed
    return {"score": data.score(evaluate(mode_of(run.nets["actor"]), envs, seed, data.rows.device)[0].mean())}


def closing_score(args, policy, data, envs, episodes=50):
    """-> the score over `episodes` or a few more, from start states that only this function uses, the same before and
    after training, and the standard error of that mean."""
    first = 200_000_000 + 1_000_000 * args.seed
    seeds = range(first, first + episodes, len(envs))
    returns = np.concatenate([evaluate(mode_of(policy), envs, seed, data.rows.device)[0] for seed in seeds])
    scores = np.array([data.score(x) for x in returns])
    return float(scores.mean()), float(scores.std() / math.sqrt(len(scores)))


def start_from(path, saved, nets):
    """Loads actor and critics of an earlier run of this script, if there is one. -> nets. Raises UserError."""
    try:
        for key, net in nets.items() if saved is not None else ():
            net.load_state_dict(saved[key])
            if not all(x.isfinite().all() for x in net.state_dict().values()) or (net.obs_std <= 0).any():
                raise UserError(f"{path} holds weights that are not finite, or a std that is not positive")
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(f"{path} holds no networks that fit the data ({type(error).__name__})") from error
    return nets


def checkpoint(args, data, nets, step, score):
    """Policies and critics: plain tensors, numbers and strings."""
    origin = {"format": 1, "algorithm": ALGORITHM, "env_id": args.env_id, "dataset": data.name}
    policy = {"policy": {"kind": KIND, "hidden": [256, 256], "agents": args.num_agents}, "step": step, "score": score}
    weights = {net: {key: x.cpu() for key, x in nets[net].state_dict().items()} for net in ("actor", "critics")}
    return {**origin, **policy, **weights, "args": asdict(args), "versions": versions()}


def save_file(payload, path):
    """Writes text, or with torch.save anything else, and never leaves half a file. Raises UserError if it fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(payload) if isinstance(payload, str) else torch.save(payload, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); the previous file, if any, is unchanged") from error


def load_file(path):
    """torch.load of tensors, numbers and strings, so no code. Raises UserError if the file is missing or damaged."""
    try:
        if not Path(path).is_file():
            raise FileNotFoundError("there is no such file")
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():  # torch does not look at its own checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged zip or pickle raises nearly anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.80}"
        raise UserError(f"{path} is missing, incomplete or no checkpoint of ours ({reason})") from error


def versions():
    """Of the packages that decide what a run computes."""
    return {name: version(name) for name in ("torch", "numpy", "gymnasium", "mujoco", "minari")}


class Run:
    """The run folder: args.json, metrics.jsonl and TensorBoard events, summary.json, and resume.pt, which holds
    everything that the next update depends on. `progress` are plain numbers, strings and lists. Nothing but the copy of
    a policy of another class is written before `restore`, when all that can be refused has been."""

    def __init__(self, args, progress):
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}"  # two runs may start in one second
        default = f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{now}"
        self.args, self.dir, self.writing = args, Path(args.resume or args.run_dir or default), False
        if not args.resume and (self.dir / "args.json").exists():
            raise UserError(f"{self.dir} holds a run already; continue it with --resume or name another --run-dir")
        nearest = next(path for path in (self.dir, *self.dir.absolute().parents) if path.exists())
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            raise UserError(f"{self.dir} cannot be written to; name another --run-dir")
        self.begun = args.resume and (self.dir / "resume.pt").exists()
        self.saved = {"progress": progress, "metrics": [], "seconds": 0.0}
        self.saved |= load_file(self.dir / "resume.pt") if self.begun else {}
        self.progress, self.metrics = self.saved["progress"], self.saved["metrics"]
        try:
            for key, x in progress.items():
                if not isinstance(self.progress[key], (float | None) if x is None else type(x)):
                    raise TypeError(key)
            json.dumps([self.progress, list(map(json.loads, self.metrics))])
            self.started = time.monotonic() - float(self.saved["seconds"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{self.dir}/resume.pt is damaged, or of another script ({error!r})") from error

    def restore(self, nets, optimizers, generator):
        """Takes what resume.pt is made of, loads it when this run continues one, and begins to write."""
        self.nets, self.optimizers, self.generator = nets, optimizers, generator
        if self.args.track:
            import wandb

            names = {"project": self.args.wandb_project_name, "entity": self.args.wandb_entity, "name": self.dir.name}
            names["id"] = self.progress.setdefault("wandb_id", os.urandom(4).hex())  # a resumed run goes on there
            try:
                wandb.init(**names, resume="allow", config=asdict(self.args), sync_tensorboard=True)
            except wandb.errors.Error as error:
                raise UserError(f"--track: {' '.join(str(error).split())}; `wandb login` first") from error
        self.dir.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.dir / "lock", "a")  # the operating system lets go of it when the process ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.begun:
                for kind, parts in {"nets": nets, "optimizers": optimizers}.items():
                    for key, part in parts.items():
                        part.load_state_dict(self.saved[kind][key])
                generator.set_state(self.saved["generator"])
            if not all(x.isfinite().all() for net in nets.values() for x in net.state_dict().values()):
                raise ValueError("numbers that are not finite")
        except BlockingIOError as error:
            raise UserError(f"another process writes to {self.dir}; wait for it, or name another --run-dir") from error
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(f"{self.dir}/resume.pt does not fit this run ({type(error).__name__})") from error
        save_file(json.dumps({"algorithm": ALGORITHM, **asdict(self.args)}, indent=1), self.dir / "args.json")
        save_file("".join(self.metrics), self.dir / "metrics.jsonl")  # rows after resume.pt will be written again
        self.board, self.writing = SummaryWriter(self.dir / "tensorboard"), True
        self.summarize("running")

    def save(self, **extra):
        """Writes resume.pt. `extra`: what the current stage needs beyond networks, optimisers and progress."""
        parts = {"nets": self.nets, "optimizers": self.optimizers}
        state = {kind: {key: part.state_dict() for key, part in parts[kind].items()} for kind in parts}
        state |= {"generator": self.generator.get_state(), "progress": self.progress, "metrics": self.metrics}
        save_file({**state, "seconds": time.monotonic() - self.started, **extra}, self.dir / "resume.pt")

    def enter(self, stage):
        """The border between two stages is a point to resume from."""
        self.progress |= {"stage": stage, "step": 0}
        self.save()

    def log(self, stage, step, values):
        """One row of metrics.jsonl, TensorBoard and the console; draws curve.png anew. Raises UserError if a number is
        not finite: resume.pt then keeps the last good state."""
        row = {f"{stage}/{key}": float(value) for key, value in values.items()}
        if bad := [key for key, value in row.items() if not math.isfinite(value)]:
            hint = f"{self.dir}/resume.pt keeps the last good state, " if (self.dir / "resume.pt").exists() else ""
            raise UserError(f"{bad[0]} is not finite at step {step}; {hint}lower the learning rates or check the data")
        print(f"{stage} {step}: " + ", ".join(f"{key} {float(x):.4g}" for key, x in values.items()), flush=True)
        for key, value in row.items():
            self.board.add_scalar(key, value, step)
        self.metrics.append(json.dumps({"stage": stage, "step": step, **row}) + "\n")
        save_file("".join(self.metrics), self.dir / "metrics.jsonl")
        draw_curve(self)

    def summarize(self, status):
        """Writes and returns summary.json: scores in D4RL's points, `scores` [environment step, score]."""
        args, progress = self.args, self.progress
        origin = {"env_id": args.env_id, "dataset": getattr(args, "dataset", None) or f"o2o/{args.env_id}"}
        public = {key: value for key, value in progress.items() if key not in PRIVATE.split()}
        summary = origin | {"algorithm": ALGORITHM, "seed": args.seed} | public
        if scores := [score for _, score in progress.get("scores", [])]:
            warm_up = getattr(args, "warm_up", 0)  # until it ends nothing can drop
            after = [(step, score) for step, score in progress["scores"] if step > warm_up] or progress["scores"]
            early = [score for step, score in after if step <= warm_up + args.online_steps / 10] or [after[0][1]]
            summary |= {"final_score": float(np.mean(scores[-5:])), "best_score": max(scores)}
            summary |= {"lowest_score": min(scores), "auc": float(np.mean(scores))}
            summary |= {"initial_drop": progress["start_score"] - min(early)}  # from the policy that enters the stage
        summary |= {"wall_seconds": time.monotonic() - self.started, "versions": versions(), "status": status}
        if self.writing:  # else the run was refused
            save_file(json.dumps(summary, indent=1), self.dir / "summary.json")
        return summary


def draw_curve(run):
    """curve.png: the score over the steps of each stage, the offline policy's dashed."""
    os.environ["MPLBACKEND"] = "Agg"  # a notebook names one of its own, which is not there
    from matplotlib.figure import Figure

    rows = [row for row in map(json.loads, run.metrics) if f"{row['stage']}/score" in row]
    stages, figure = list(dict.fromkeys(row["stage"] for row in rows)) or ["online"], Figure(layout="constrained")
    for axis, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        points = [(row["step"], row[f"{stage}/score"]) for row in rows if row["stage"] == stage]
        if stage == "online" and run.progress.get("start_score") is not None:
            points = [(0, run.progress["start_score"]), *points]
        axis.plot(*zip(*points, strict=True), ".-", label=run.args.exp_name)
        if run.progress.get("offline_score") is not None:
            axis.axhline(run.progress["offline_score"], color="black", linestyle="--", label="offline policy")
        axis.set(title=stage, xlabel="environment steps" if stage == "online" else "updates", ylabel="score")
        axis.legend(fontsize=8)
    figure.set_size_inches(4.5 * len(stages), 3.5)
    figure.savefig(run.dir / "curve.png", dpi=100)


def check_ranges(args):
    """Every number lies in its range, and every other flag has its type (args.json of a run may hold anything), so that
    nothing fails, or does nonsense, after hours. Raises UserError."""
    ranges = {flag: borders for borders, flags in RANGES.items() for flag in flags.split()}
    for flag, value in asdict(args).items():
        low, high = ranges.get(flag, (False, True))
        text = flag not in ranges and not isinstance(getattr(Args, flag), bool)
        good = isinstance(value, str | None) if text else isinstance(value, int | float) and low <= value <= high
        if not good and (value is not None or getattr(Args, flag) is not None):
            hint = "be text" if text else f"lie between {low:g} and {high:g}"
            raise UserError(f"--{flag.replace('_', '-')} is {' '.join(str(value).split())}; it has to {hint}")


def parse_args(argv=None):
    """The settings of the task, or with --resume those of the run, are the defaults; the command line wins. A run that
    is resumed may get other budgets, but not become another method. Raises UserError."""
    argv = sys.argv[1:] if argv is None else argv
    args = tyro.cli(Args, args=[word for word in argv if word not in ("-h", "--help")])  # for --env-id and --resume
    if not args.resume:
        return tyro.cli(Args, args=argv, default=replace(Args(), **settings(args)))
    try:
        stored = json.loads((Path(args.resume) / "args.json").read_text())
        if (algorithm := stored.pop("algorithm")) != ALGORITHM:
            raise ValueError(f"it is a run of {algorithm}")
        default = Args(**{**stored, "resume": args.resume})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{args.resume} holds no run of this script that could be resumed ({error})") from error
    check_ranges(default)
    args = tyro.cli(Args, args=argv, default=default)
    changed = {flag for flag, value in asdict(args).items() if value != getattr(default, flag)}
    if refused := ", ".join(sorted(changed - set(RESUMABLE.split()))):
        raise UserError(f"when {args.resume} is resumed, only these may change: {RESUMABLE}; not {refused}")
    return args


def interrupted(error):
    """Whether Ctrl-C or SIGTERM is at the root of an exception: one that arrives inside an import gets wrapped."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def run_cli(main):
    """A UserError becomes one sentence on stderr and exit code 2; SIGTERM ends a run like Ctrl-C, with a summary."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs would ignore the former
        signal.signal(number, signal.default_int_handler)
    try:
        main(parse_args())
    except BaseException as error:
        if isinstance(error, UserError | OSError):  # OSError: no space left, no permission
            print(f"error: {error}", file=sys.stderr)
        elif not interrupted(error):
            raise
        sys.exit(130 if interrupted(error) else 2)


def main(args: Args):
    """-> what summary.json says. Raises UserError before anything is written, if it can."""
    check_ranges(args)
    torch.set_num_threads(args.num_threads)
    if args.cuda and not torch.cuda.is_available():
        raise UserError("--cuda was asked for but torch sees no CUDA device; leave it out to run on the CPU")
    if args.bf16 and not args.cuda and torch.backends.cpu.get_cpu_capability() == "AVX2":
        print("--bf16 is left out: this CPU would be 50 times slower with it", file=sys.stderr)
        args.bf16 = False
    if args.checkpoint is not None:
        args.checkpoint = str(Path(args.checkpoint).resolve())  # so that a resumed run finds it from anywhere
    saved = load_file(args.checkpoint) if args.checkpoint else None
    if saved is not None and (saved.get("algorithm"), saved.get("format")) != (ALGORITHM, 1):
        raise UserError(f"{args.checkpoint} is not of this script; name an offline.pt or a model.pt of an earlier run")
    progress = {"stage": "start", "step": 0, "episode_start": 0, "online_steps": 0, "selection_steps": 0, "scores": []}
    scores = "offline_score offline_error start_score aligned_score closing_score closing_error"
    run = Run(args, progress | dict.fromkeys(scores.split()) | {"updates_per_second": {}})
    if run.progress["online_steps"] > args.online_steps:
        raise UserError(f"{run.dir} did {run.progress['online_steps']} --online-steps already; resume it with more")
    data, status = load_data(args, torch.device("cuda" if args.cuda else "cpu")), "failed"
    try:
        train(args, run, data, saved)
        status = "complete"
    except BaseException as error:
        status = "interrupted" if interrupted(error) else status
        raise
    finally:
        summary = run.summarize(status)
        if run.writing:
            print("\n".join(f"{key:15} {value:7.1f}" for key, value in summary.items() if isinstance(value, float)))
            print(f"{status} after {summary['wall_seconds']:.0f} s; everything is in {run.dir}")
    return summary


if __name__ == "__main__":
    run_cli(main)
