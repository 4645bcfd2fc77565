"""O3F: fine-tuning offline policies with optimistic action selection (ICLR 2023 submission).

The offline algorithm goes on unchanged, LAPO or IQL, on a buffer that starts as the offline data and grows. Only the
action that is executed changes: of many candidates near the policy's own, the one with the largest mean plus omega
standard deviations over an ensemble of critics.

    a ~ pi(a|s);  c_i ~ N(a, sigma^2), i = 1..N;  execute argmax_i Q_mean(s,c_i) + omega Q_std(s,c_i)     best_candidate

    python o3f.py --env-id hopper-medium-v2  # on LAPO, with one update a step
    python o3f.py --env-id hopper-medium-v2 --updates-per-step 20  # as in the paper: slow on a CPU
    python o3f.py --env-id hopper-medium-v2 --base iql  # on IQL with five critics; with two where no five ship
    python o3f.py --base iql --no-optimism  # the baseline: the same algorithm with Gaussian noise of the same sigma

Only for offline algorithms that do not push their critics down outside the data, since there the candidates nearest to
the policy's action would win: a CQL checkpoint is refused. The optimisers start anew. With LAPO each environment step
makes updates_per_step updates of the critics, and the last of them also moves the other networks; IQL's move all.

The method ends with `train`. What follows are the two offline algorithms as in offline/, and plumbing.
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
from typing import Literal, NamedTuple

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
    env_id: str = "hopper-medium-v2"  # task: names the dataset, the offline policy and the run folder
    base: Literal["lapo", "iql"] = "lapo"  # the offline algorithm that goes on
    seed: int = 1  # the only seed: batches, candidates, training and evaluation environments derive from it
    exp_name: str = "o3f"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    dataset: str | None = None  # Minari id, local or remote; None: o2o/<env_id>, made by offline/collect.py if missing
    checkpoint: str | None = None  # policy and critics; None: lapo.pt, iql_5.pt or iql.pt of the task, as shipped
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    online_steps: int = 20_000  # environment steps (paper: 100,000)
    optimism: bool = True  # choose among candidates; off: one candidate, so Gaussian noise of std sigma
    sigma: float = 0.2  # std of the candidates around the policy's action (paper: 0.05 outside locomotion)
    num_candidates: int = 100  # N
    omega: float = 0.0  # weight of the ensemble's standard deviation
    updates_per_step: int = 1  # updates of the critics per environment step (paper, on LAPO: 20)
    eval_every: int = 1_000  # environment steps between evaluations
    eval_episodes: int = 10  # episodes of one evaluation, all at once

    batch_size: int | None = None  # transitions of one gradient step; None, here and below: as in the offline training
    reward_scale: float = 1.0  # rewards are multiplied by it in all updates; scores are of raw rewards
    reward_bias: float = 0.0  # then this is added
    gamma: float | None = None  # discount
    tau: float | None = None  # Polyak rate of the targets
    learning_rate: float | None = None  # of all networks, IQL's policy included: its offline decay is not continued
    expectile: float | None = None  # IQL: of Q over the data's actions, which V is
    temperature: float | None = None  # IQL: weight of the advantage in the imitation
    max_weight: float | None = None  # IQL: largest weight of an imitated action
    dropout: float | None = None  # IQL: share of the policy's hidden units that each update leaves out
    kl_weight: float | None = None  # LAPO: of the divergence of the latent code from N(0, 1)
    positive_weight: float | None = None  # LAPO: weight of data whose advantage is positive; the rest has 1 minus it
    latent_noise: float | None = None  # LAPO: std of the noise on the target policy's code
    latent_clip: float | None = None  # LAPO: its largest absolute value

    compile: bool = True  # compile the update and the choice of actions into one graph each
    bf16: bool = False  # matrix products in bf16, if the CPU or GPU has units for it
    num_threads: int = 1  # CPU threads: such small networks get slower, not faster, once threads exceed the free cores


def settings(args):
    """What changes with the offline algorithm and the task; the command line still wins."""
    values = {"online_steps": 50_000} if args.base == "iql" else {}
    values |= {"sigma": 0.05} if args.env_id.startswith("kitchen") else {}
    if args.env_id.startswith("antmaze"):
        values |= {"sigma": 0.05, "eval_every": 5_000, "eval_episodes": 50}
        values |= {"reward_bias": -1.0} if args.base == "iql" else {}
    return values


def candidates_near(action, noise, sigma):
    """c_i = clip(a + sigma * noise_i): action (1, A), noise (N, A) standard normal -> (N, A) in the box [-1, 1]."""
    return (action + sigma * noise).clamp(-1, 1)


def best_candidate(q, candidates, omega):
    """argmax_i Q_mean + omega Q_std over the ensemble, std with 1/m: q (m, N) return, candidates (N, A) -> (1, A)."""
    return candidates[(q.mean(0) + omega * q.std(0, correction=0)).argmax().unsqueeze(0)]


def make_act(args, nets):
    """-> act(obs (1, O), own_noise (1, A), noise (N, A)), the executed action (1, A). own_noise is that of IQL's
    Gaussian policy; LAPO's is deterministic."""
    actor, critics = nets["actor"], nets["critics"]

    def act(obs, own_noise, noise):
        with torch.no_grad():
            action = actor.sample(obs, own_noise)[0] if args.base == "iql" else actor.mode(obs)
            candidates = candidates_near(action, noise, args.sigma)
            if not args.optimism:
                return candidates  # a single one
            return best_candidate(critics(obs.expand(len(candidates), -1), candidates), candidates, args.omega)

    return act


def make_updates(args, nets, value_range, split):
    """-> the optimisers, and update(rows, noise, pair, whole) of the offline algorithm, unchanged. For LAPO: `pair`,
    which two critics V is of; `whole`, whether the other networks move too. IQL's networks all move every time."""
    if args.base == "lapo":
        optimizers = lapo_optimizers(args, nets)
        return optimizers, make_lapo_update(args, nets, optimizers, value_range, split)
    optimizers = {name: Adam(nets[name].parameters(), args.learning_rate) for name in ("actor", "value", "critics")}
    update, rate = make_iql_update(args, nets, optimizers, split), torch.ones((), device=value_range.device)
    return optimizers, lambda rows, noise, pair, whole: update(rows, noise, rate)


def noise_shape(args, nets):
    """Of the standard normal noise that an update takes: LAPO's codes and decoded actions, or IQL's dropout."""
    if args.base == "lapo":
        return 2, args.batch_size, nets["actor"].latent.net[-1].out_features
    widths = [layer.out_features for layer in nets["actor"].net[:-1:2]] if args.dropout else [1]
    return len(widths), args.batch_size, max(widths)


def train_online(args, run, act, update, value_range, data, score):
    """One environment step with the chosen action, then updates_per_step updates. The environment receives exactly the
    action that the buffer stores."""
    progress, generator, scale = run.progress, run.generator, run.scale
    env, obs, buffer, num_data = online_start(args, run, data)  # rewards are scaled in it
    seconds, count, candidates = 0.0, 0, args.num_candidates if args.optimism else 1
    shape = noise_shape(args, run.nets)
    for step in tqdm(range(progress["step"] + 1, args.online_steps + 1), desc="online", unit="step", disable=None):
        noise = torch.randn(1 + candidates, data.act_dim, generator=generator, device=generator.device)
        action = act(data.to_tensor(obs[None]), noise[:1], noise[1:])[0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        scaled = scale * (args.reward_scale * reward + args.reward_bias)
        row = np.concatenate([obs, action, [scaled], next_obs, [terminated]])  # a time limit keeps its bootstrap
        buffer[num_data + step - 1], obs = data.to_tensor(row), next_obs
        low, high = return_range(data.split(buffer[num_data + step - 1][None])[2], args.gamma)
        value_range[0].clamp_(max=low)  # a reward beyond those of the data widens what values are possible
        value_range[1].clamp_(min=high)
        progress["episode_return"] += float(reward)
        if terminated or truncated:
            progress["acting_returns"].append(progress["episode_return"])
            progress["episode_return"] = 0.0
            obs, progress["episode_start"] = env.reset(seed=1_000_000 * args.seed + step)[0], step

        clock, count = time.monotonic(), count + args.updates_per_step
        for i in range(args.updates_per_step):
            index = torch.randint(num_data + step, (args.batch_size,), generator=generator, device=generator.device)
            noise = torch.randn(shape, generator=generator, device=generator.device)
            pair = torch.randperm(run.nets["critics"].n, generator=generator, device=generator.device)[:2]
            values = update(buffer[index], noise, pair, i + 1 == args.updates_per_step)
        if args.cuda:
            torch.cuda.synchronize()  # for the clock; the next action would wait for the updates anyway
        seconds += time.monotonic() - clock
        progress["step"] = progress["online_steps"] = step
        if step % args.eval_every == 0 or step == args.online_steps:
            row = values | score() | {"updates_per_second": count / max(seconds, 1e-9)}
            if progress["acting_returns"]:  # of the actions as they were executed, in the episodes that ended meanwhile
                row["score_acting"] = data.score(np.mean(progress["acting_returns"]))
                row["episodes"] = len(progress["acting_returns"])
                progress["acting_returns"] = []
            progress["scores"].append([step, row["score"]])
            progress["updates_per_second"]["online"] = count / max(seconds, 1e-9)
            run.log("online", step, row)
            run.save(online=buffer[num_data : num_data + step].cpu().clone())
            seconds, count = 0.0, 0


def train(args, run, data, nets, saved):
    """Acts optimistically and goes on with the offline algorithm."""
    progress, device, reward = run.progress, data.rows.device, data.obs_dim + data.act_dim  # its column
    torch.manual_seed(args.seed)
    nets, run.scale = {name: net.to(device) for name, net in nets.items()}, saved["reward_scale"]
    data.rows[:, reward] *= run.scale
    rewards = torch.cat([data.rows[:, reward], collected(run, data)[:, reward]])
    value_range = torch.tensor(return_range(rewards, args.gamma), device=device)
    optimizers, update = make_updates(args, nets, value_range, data.split)
    run.restore(nets, optimizers, torch.Generator(device).manual_seed(args.seed))
    act, update = compile_update(make_act(args, nets), args), compile_update(update, args)
    envs = [data.make_env() for _ in range(args.eval_episodes)]
    score = partial(score_policy, args, run, data, envs)
    if progress["stage"] == "start":
        progress["offline_score"], progress["offline_error"] = closing_score(args, nets["actor"], data, envs)
        progress["start_score"] = score()["score"]
        print(f"offline policy: score {progress['offline_score']:.1f} +- {progress['offline_error']:.1f}", flush=True)
        run.enter("online")
    train_online(args, run, act, update, value_range, data, score)
    progress["closing_score"], progress["closing_error"] = closing_score(args, nets["actor"], data, envs)
    save_file(checkpoint(args, data, nets, saved, progress), run.dir / "model.pt")


ALGORITHM = "o3f"
RESUMABLE = "online_steps compile num_threads track wandb_project_name wandb_entity"
PRIVATE = "stage step episode_start episode_return acting_returns"  # of a run's progress, not in summary.json
RANGES = {
    (1e-9, 10**9): "reward_scale",
    (-(10**9), 10**9): "reward_bias",
    (0, 1): "tau learning_rate expectile positive_weight",
    (0, 0.99999): "gamma",  # V is clamped to r / (1 - gamma)
    (0, 0.9): "dropout",
    (0, 10**9): "seed online_steps sigma omega temperature max_weight kl_weight latent_noise latent_clip",
    (1, 10**9): "num_candidates updates_per_step eval_every eval_episodes batch_size",
    (1, 1024): "num_threads",
}
# what a run takes over from the offline training, where the command line does not say otherwise
INHERITED = "batch_size gamma tau learning_rate expectile temperature max_weight kl_weight positive_weight".split()
INHERITED += ["dropout", "latent_noise", "latent_clip"]


def value_target(reward, terminated, next_value, gamma):
    """y = r + gamma (1 - d) V(s'); all (B,), in units of (scaled) return."""
    return reward + gamma * (1 - terminated) * next_value


def expectile_loss(advantage, expectile):
    """Eq. 5 of the paper: E[ |expectile - 1(A < 0)| A^2 ], A = min_j Q_j(s,a) - V(s), (B,). Its minimum over V is the
    expectile of Q: values above V count `expectile`, those below 1 - expectile."""
    return ((expectile - (advantage < 0).float()).abs() * advantage**2).mean()


def policy_loss(log_prob, advantage, temperature, max_weight):
    """Eq. 7: -E[ min(exp(temperature A), max_weight) log pi(a|s) ] over the data's actions; (B,) twice."""
    return -((temperature * advantage).exp().clamp(max=max_weight) * log_prob).mean()


def dropout_forward(actor, obs, noise, dropout):
    """The policy of one update, in which a share `dropout` of the hidden units is left out at random and the others
    make up for it. obs (B, O), noise (hidden layers, B, their width) standard normal -> what actor(obs) gives."""
    x = (obs - actor.obs_mean) / actor.obs_std
    with torch.autocast(obs.device.type, torch.bfloat16, enabled=actor.bf16):
        for layer, z in zip(actor.net[:-1:2], noise, strict=True):
            x = F.relu(layer(x))
            x = x * (torch.special.ndtr(z[:, : x.shape[1]]) > dropout) / (1 - dropout)
    return torch.tanh(actor.net[-1](x.float())), actor.log_std.clamp(-20, 2)


def make_iql_update(args, nets, optimizers, split):
    """-> update(rows (B, 2 O + A + 2) with scaled rewards, noise, policy_scale), which changes all `nets` in place and
    returns detached numbers. noise is that of --dropout, without it unused; policy_scale, a tensor, multiplies the
    policy's learning rate."""
    actor, value, critics, targets = (nets[key] for key in ("actor", "value", "critics", "targets"))

    def update(rows, noise, policy_scale):
        obs, action, reward, next_obs, terminated = split(rows)
        with torch.no_grad():
            q_old, next_value = targets(obs, action).amin(0), value(next_obs)
            target = value_target(reward, terminated, next_value, args.gamma)
        v = value(obs)
        advantage = q_old - v
        value_loss = expectile_loss(advantage, args.expectile)
        optimizers["value"].minimize(value_loss)
        q = critics(obs, action)
        critic_loss = ((q - target) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(critic_loss)
        polyak(targets, critics, args.tau)
        mean, log_std = dropout_forward(actor, obs, noise, args.dropout) if args.dropout else actor(obs)
        log_prob = gaussian_log_prob(mean, log_std, action)
        loss = policy_loss(log_prob, advantage.detach(), args.temperature, args.max_weight)
        optimizers["actor"].minimize(loss, policy_scale)
        values = numbers(value_loss=value_loss, critic_loss=critic_loss, policy_loss=loss, q_mean=q.mean())
        return values | numbers(v_mean=v.mean(), std=actor.log_std.exp().mean())

    return update


def autoencoder_loss(reconstruction, action, mean, log_std, weight, kl_weight):
    """E[ w ( |a' - a|^2 + kl_weight KL(N(mean, std^2) || N(0, 1)) ) ]; reconstruction and action (B, A) standardised,
    mean and log_std (B, L) of the code, weight (B,)."""
    kl = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(-1)
    return (weight * (((reconstruction - action) ** 2).sum(-1) + kl_weight * kl)).mean()


def advantage_weight(advantage, positive_weight):
    """positive_weight where the advantage is positive, else 1 - positive_weight; (B,) -> (B,)."""
    return torch.where(advantage > 0, positive_weight, 1 - positive_weight)


def return_range(rewards, gamma):
    """The least and the greatest discounted return that rewards between these can add up to; an end gives 0."""
    low, high = min(0.0, float(rewards.min())), max(0.0, float(rewards.max()))
    return low / (1 - gamma), high / (1 - gamma)


def make_lapo_update(args, nets, optimizers, value_range, split):
    """-> update(rows (B, 2 O + A + 2) with scaled rewards, noise (2, B, 2 A) standard normal, pair (2,) indices of
    critics, whole), which changes the critics in place, and if `whole` all other `nets` too, and returns detached
    numbers. value_range: a tensor of the least and the greatest value that V may be asked for."""
    encoder, decoder, policy, latent_target = (nets[k] for k in ("encoder", "decoder", "actor", "latent_target"))
    value, critics, targets = nets["value"], nets["critics"], nets["targets"]

    def update(rows, noise, pair, whole):
        obs, action, reward, next_obs, terminated = split(rows)
        with torch.no_grad():
            target = value_target(reward, terminated, value(next_obs), args.gamma)
        q = critics(obs, action)
        critic_loss = ((q - target) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(critic_loss)
        values = numbers(critic_loss=critic_loss, q_mean=q.mean())
        if whole:
            with torch.no_grad():
                code_noise = (args.latent_noise * noise[0]).clamp(-args.latent_clip, args.latent_clip)
                both, noises = torch.cat([obs, next_obs]), torch.cat([code_noise, torch.zeros_like(code_noise)])
                action_of_both = policy.act(both, latent_target, noises)
                q_now, q_next = targets(both, action_of_both)[pair].amin(0).chunk(2)  # the noise smooths V alone
                advantage = value_target(reward, terminated, q_next, args.gamma) - value(obs)
                weight = advantage_weight(advantage, args.positive_weight)
            v = value(obs)
            value_loss = ((v - q_now.clamp(value_range[0], value_range[1])) ** 2).mean()
            optimizers["value"].minimize(value_loss)
            q_policy = critics(obs, policy.act(obs, policy.latent), k=1).mean()  # the first critic alone
            optimizers["latent"].minimize(-q_policy)
            mean, log_std = encoder(obs, action)
            reconstruction = decoder(obs, mean + log_std.exp() * noise[1])
            standardised = (action - decoder.act_mean) / decoder.act_std
            loss = autoencoder_loss(reconstruction, standardised, mean, log_std, weight, args.kl_weight)
            optimizers["autoencoder"].minimize(loss)
            polyak(policy.decoder, decoder, args.tau)
            polyak(latent_target, policy.latent, args.tau)
            values |= numbers(value_loss=value_loss, autoencoder_loss=loss, v_mean=v.mean(), q_policy=q_policy)
            values |= numbers(positive=(advantage > 0).float().mean())
        polyak(targets, critics, args.tau)
        return values

    return update


def lapo_optimizers(args, nets):
    """-> LAPO's optimisers: the latent policy, the autoencoder, V and the critics have one each."""
    parts = {"latent": nets["actor"].latent.parameters(), "value": nets["value"].parameters()}
    parts |= {"critics": nets["critics"].parameters()}
    parts["autoencoder"] = [*nets["encoder"].parameters(), *nets["decoder"].parameters()]
    return {key: Adam(parameters, args.learning_rate) for key, parameters in parts.items()}


def mlp(net, x, bf16):
    """A network's output, with `bf16` all products in bf16 but the last: bf16 can't tell a Q of 300 from one of 301."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        x = net[:-1](x)
    return net[-1](x.float())


class TanhGaussianActor(nn.Module):
    """a ~ N(tanh(net(s)), std^2), clipped to the box: IQL's policy."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden, std=1.0, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        sizes = [len(obs_mean), *hidden]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net, self.bf16 = nn.Sequential(*layers, nn.Linear(sizes[-1], act_dim)), bf16
        self.log_std = nn.Parameter(torch.full((act_dim,), math.log(std)))

    def forward(self, obs):
        """(B, O) raw observations -> mean (B, A) and log_std (A,), the same in every state."""
        mean = torch.tanh(mlp(self.net, (obs - self.obs_mean) / self.obs_std, self.bf16))
        return mean, self.log_std.clamp(-20, 2)

    def sample(self, obs, noise):
        """-> action (B, A) clipped to the box, log_prob of the action before clipping (B,), and that action (B, A)."""
        mean, log_std = self(obs)
        action = mean + log_std.exp() * noise
        return action.clamp(-1, 1), gaussian_log_prob(mean, log_std, action), action

    def mode(self, obs):
        """-> the mean (B, A), the action that evaluation executes."""
        return self(obs)[0]


def gaussian_log_prob(mean, log_std, action):
    """log N(action; mean, std^2) in nats, summed over the A dimensions: (..., A) three times -> (...)."""
    return (-0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class Value(nn.Module):
    """V(s), of a network with `activation` between its layers."""

    def __init__(self, obs_mean, obs_std, hidden, activation, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        sizes = [len(obs_mean), *hidden]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), activation())]
        self.net, self.bf16 = nn.Sequential(*layers, nn.Linear(sizes[-1], 1)), bf16

    def forward(self, obs):
        """(B, O) raw observations -> (B,) return."""
        return mlp(self.net, (obs - self.obs_mean) / self.obs_std, self.bf16).squeeze(-1)


class Standardised(nn.Module):
    """A ReLU network of an input that is standardised first."""

    def __init__(self, mean, std, hidden, outputs, bf16=False):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        layers = [m for i, o in pairwise([len(mean), *hidden]) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net, self.bf16 = nn.Sequential(*layers, nn.Linear(hidden[-1], outputs)), bf16

    def forward(self, *inputs):
        return mlp(self.net, (torch.cat(inputs, dim=-1) - self.mean) / self.std, self.bf16)


class Encoder(Standardised):
    """q(z|s,a) = N(mean, std^2): which latent code stands for an action."""

    def __init__(self, obs_stats, act_stats, latent_dim, hidden, bf16=False):
        mean, std = (torch.cat(pair) for pair in zip(obs_stats, act_stats, strict=True))
        super().__init__(mean, std, hidden, 2 * latent_dim, bf16)

    def forward(self, obs, action):
        """obs (B, O), action (B, A) -> mean, log_std (B, L)."""
        mean, log_std = super().forward(obs, action).chunk(2, dim=-1)
        return mean, log_std.clamp(-4, 15)


class Decoder(Standardised):
    """p(a|s,z): the action that a latent code stands for."""

    def __init__(self, obs_stats, act_stats, latent_dim, hidden, bf16=False):
        mean = torch.cat([obs_stats[0], torch.zeros(latent_dim)])
        std = torch.cat([obs_stats[1], torch.ones(latent_dim)])
        super().__init__(mean, std, hidden, len(act_stats[0]), bf16)
        self.register_buffer("act_mean", act_stats[0].clone())
        self.register_buffer("act_std", act_stats[1].clone())

    def action(self, obs, latent):
        """obs (B, O), latent (B, L) -> action (B, A), not yet clipped to the box, so that it keeps its gradient."""
        return self(obs, latent) * self.act_std + self.act_mean


class LatentPolicy(nn.Module):
    """LAPO's policy: pi_z chooses a latent code, and the decoder's slow copy makes an action of it."""

    def __init__(self, obs_stats, act_stats, latent_dim, hidden, max_latent, bf16=False):
        super().__init__()
        self.latent = Standardised(*obs_stats, hidden, latent_dim, bf16)
        self.decoder = Decoder(obs_stats, act_stats, latent_dim, hidden, bf16)
        self.max_latent = max_latent

    def act(self, obs, latent, noise=0.0):
        """The action, not clipped, of the code max_latent tanh(latent(s)) + noise (B, L)."""
        return self.decoder.action(obs, self.max_latent * torch.tanh(latent(obs)) + noise)

    def mode(self, obs):
        """-> the action (B, A) in [-1, 1]."""
        return self.act(obs, self.latent).clamp(-1, 1)


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


class LapoCritics(Critics):
    """Critics that see standardised actions."""

    def __init__(self, obs_stats, act_stats, hidden, n, bf16=False):
        super().__init__(*obs_stats, len(act_stats[0]), hidden, n, bf16=bf16)
        self.register_buffer("act_mean", act_stats[0].clone())
        self.register_buffer("act_std", act_stats[1].clone())

    def forward(self, obs, action, k=None):
        return super().forward(obs, (action - self.act_mean) / self.act_std, k)


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


def load_base(path, args, data):
    """The offline algorithm in a checkpoint -> its networks, the checkpoint; fills what `args` inherits from it. Slow
    copies start equal to what they follow. Raises UserError if the file is missing, broken, of another algorithm,
    environment or size, or if its critics cannot be optimistic."""
    saved = load_file(path)
    try:
        algorithm, origin, form, flags = (saved[key] for key in ("algorithm", "env_id", "format", "args"))
        if form != 1 or origin.split("-")[0] != args.env_id.split("-")[0]:
            raise UserError(f"{path} is for {origin}, in format {form}; not for {args.env_id}")
        if algorithm == "cql":
            reason = "CQL pushes the critics down outside the data: no candidate could beat the policy's own action"
            raise UserError(f"{path} comes from CQL: {reason}; take a checkpoint of offline/{args.base}.py")
        if algorithm != args.base:
            raise UserError(f"{path} comes from {algorithm}, --base {args.base} needs one of offline/{args.base}.py")
        value, hidden, count = saved["value"], saved["policy"]["hidden"], saved["num_critics"]
        stats, act_stats = (value["obs_mean"], value["obs_std"]), (torch.zeros(data.act_dim), torch.ones(data.act_dim))
        if len(stats[0]) != data.obs_dim:
            raise UserError(f"{path} expects {len(stats[0])} observations, the data have {data.obs_dim}")
        if count < 2:
            raise UserError(f"{path} has {count} critic; optimism needs an ensemble of 2 or more")
        if sum([*hidden, count, saved["policy"].get("latent_dim", 0)]) > 100_000:
            raise ValueError("absurd sizes")
        nets = {"value": Value(*stats, hidden, nn.ReLU, args.bf16)}
        if args.base == "iql":
            nets["critics"] = Critics(*stats, data.act_dim, hidden, n=count, bf16=args.bf16)
            nets["actor"] = TanhGaussianActor(*stats, data.act_dim, hidden, bf16=args.bf16)
        else:
            sizes = stats, act_stats, saved["policy"]["latent_dim"], hidden
            nets |= {"encoder": Encoder(*sizes, args.bf16), "decoder": Decoder(*sizes, args.bf16)}
            nets["actor"] = LatentPolicy(*sizes, saved["max_latent"], args.bf16)
            nets["critics"] = LapoCritics(stats, act_stats, hidden, count, args.bf16)
            # in the first checkpoints the critics saw actions as they are
            saved["critics"] = {"act_mean": act_stats[0], "act_std": act_stats[1]} | saved["critics"]
        for key, net in nets.items():
            net.load_state_dict(saved[key])
            if not all(x.isfinite().all() for x in net.state_dict().values()):
                raise UserError(f"{path} holds weights that are not finite")
        missing = [name for name in INHERITED if getattr(args, name) is None and name in flags]
        for name in missing:
            setattr(args, name, flags[name])
        saved["reward_scale"] = float(saved["reward_scale"])
        made = f"{algorithm}, {saved['step']} updates on {saved['dataset']}, {count} critics"
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        sizes = f"{data.obs_dim} observations and {data.act_dim} actions"
        reason = (
            f"no complete {args.base} for {sizes} in format 1 ({type(error).__name__}: {' '.join(str(error).split())})"
        )
        raise UserError(f"{path} holds {reason}") from error
    check_ranges(args)
    nets["targets"] = deepcopy(nets["critics"])
    if args.base == "lapo":
        nets["latent_target"] = deepcopy(nets["actor"].latent)
    print(f"offline policy {path}: {made}")
    return nets, saved


def checkpoint(args, data, nets, saved, progress):
    """The fine-tuned policy, in the format of the offline ones, from which it can go on."""
    kept = {key: net for key, net in nets.items() if key not in ("targets", "latent_target")}
    state = {key: {name: value.cpu() for name, value in net.state_dict().items()} for key, net in kept.items()}
    origin = {"env_id": args.env_id, "dataset": data.name, "args": asdict(args), "versions": versions()}
    step = saved["step"] + progress["online_steps"] * args.updates_per_step
    return {**saved, **state, **origin, "step": step, "score": progress["closing_score"]}


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
    folder = Path(__file__).resolve().parent / "offline/checkpoints" / args.env_id
    files = [folder / name for name in (["lapo.pt"] if args.base == "lapo" else ["iql_5.pt", "iql.pt"])]
    path = next((file for file in files if file.exists()), files[0])  # five critics, or two, which disagree less
    shipped = sorted(file.parent.name for file in path.parents[1].glob(f"*/{path.name}"))
    if args.checkpoint is not None:
        path = args.checkpoint = str(Path(args.checkpoint).resolve())  # so that a resumed run finds it from anywhere
    if not Path(path).exists():
        options = " --updates 100000" if args.base == "lapo" else " --updates 200000 --num-critics 5"
        options += f" --env-id {args.env_id}" + f" --dataset {args.dataset}" * bool(args.dataset)
        command = f"python offline/{args.base}.py{options}"
        hint = f"train one with {command}, or name a --checkpoint; {', '.join(shipped)} have one"
        here = args.base == "lapo" and any(folder.glob("iql*.pt"))
        raise UserError(f"no offline policy at {path}; {'--base iql has one; ' * here}{hint}")
    progress = {"stage": "start", "step": 0, "episode_start": 0, "online_steps": 0, "selection_steps": 0, "scores": []}
    scores = "offline_score offline_error start_score aligned_score closing_score closing_error"
    progress |= dict.fromkeys(scores.split())
    run = Run(args, progress | {"updates_per_second": {}, "episode_return": 0.0, "acting_returns": []})
    if run.progress["online_steps"] > args.online_steps:
        raise UserError(f"{run.dir} did {run.progress['online_steps']} --online-steps already; resume it with more")
    data = load_data(args, torch.device("cuda" if args.cuda else "cpu"))
    (nets, saved), status = load_base(path, args, data), "failed"
    try:
        train(args, run, data, nets, saved)
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
