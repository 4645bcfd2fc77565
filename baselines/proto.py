"""PROTO: iterative policy regularisation (Li et al. 2023, arXiv 2305.15669), on top of extreme Q-learning.

Online the policy is held near a reference that trails it, a Polyak average of the policy itself: the constraint follows
the policy, at a fixed rate, and its weight fades (over a million steps: hardly in a short run).

    python baselines/proto.py --env-id hopper-medium-v2  # pre-trains on the data, then goes on online
    python baselines/proto.py --td3  # PROTO+TD3: a deterministic policy online
    python baselines/proto.py --checkpoint RUN_DIR/offline.pt --seed 2  # from there, not pre-trained anew

Offline: V is fitted by Gumbel regression, so that it becomes the soft maximum of Q over the data's actions, Q
bootstraps from V, and the policy imitates the better actions. Online: SAC, whose entropy is joined by the divergence
from the reference, or TD3, where it is the squared distance. Half of each batch is data; the rest comes from a buffer
that begins with 10,000 of its transitions (TD3: all of it, from one that begins with 25,000).

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
    exp_name: str = "proto"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    dataset: str | None = None  # Minari id, local or remote; None: o2o/<env_id>, made by offline/collect.py if missing
    checkpoint: str | None = None  # offline.pt or model.pt of an earlier run; None: pre-train first
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    td3: bool = False  # PROTO+TD3: online the policy is deterministic, and the divergence a squared distance
    offline_steps: int = 100_000  # updates of the pre-training, as in the paper
    online_steps: int = 50_000  # environment steps (paper: 1,000,000)
    updates_per_step: int = 1  # gradient steps per environment step
    eval_every: int = 1_000  # environment steps between evaluations
    eval_every_updates: int = 5_000  # updates between them in the pre-training
    eval_episodes: int = 10  # episodes of one evaluation, all at once

    batch_size: int = 256  # transitions of one gradient step
    reward_scale: float = 1.0  # rewards are multiplied by it in all updates; scores are of raw rewards
    reward_bias: float = 0.0  # then this is added
    normalize_rewards: bool = True  # multiply them so that the returns of the data's episodes span 1000
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak rate of the critics' targets
    tau_reference: float = 0.005  # of the reference: the smaller, the longer is the policy held near the offline one
    learning_rate: float = 3e-4  # all networks and alpha
    layer_norm: bool = True  # in critics and V
    temperature: float = 2.0  # offline: of V's soft maximum and of the imitation; online: weight of the divergence
    anneal_steps: int = 1_111_111  # environment steps until that weight is 0, linearly (authors: run length / 0.9)
    max_weight: float = 100.0  # largest weight of an imitated action
    alpha: float = 0.01  # initial temperature of SAC's entropy, tuned for -A/2 nats
    penalize_target: bool = True  # the critics' target pays for the divergence, and is paid for entropy
    minimum: bool = True  # the target takes the lesser of two critics; no: one of them, drawn anew for each batch

    compile: bool = True  # compile the update into one graph
    bf16: bool = False  # matrix products in bf16, if the CPU or GPU has units for it
    num_threads: int = 1  # CPU threads: such small networks get slower, not faster, once threads exceed the free cores


def settings(args):
    """What the authors change with the task; the command line still wins."""
    if args.env_id.startswith("halfcheetah"):
        return {"layer_norm": False}
    if not args.env_id.startswith("antmaze"):
        return {}
    values = {"temperature": 0.5, "reward_bias": -1.0, "normalize_rewards": False, "tau_reference": 5e-5}
    values |= {"offline_steps": 200_000, "penalize_target": False, "minimum": False}
    return values | {"eval_every": 5_000, "eval_every_updates": 50_000, "eval_episodes": 50}


def value_target(reward, terminated, next_value, gamma):
    """y = r + gamma (1 - d) V(s'); all (B,), in units of (scaled) return."""
    return reward + gamma * (1 - terminated) * next_value


def gumbel_loss(advantage, temperature):
    """Extreme Q-learning's regression: E[exp(z) - z - 1], z = min(advantage / temperature, 7), advantage = min_j
    Q_j(s,a) - V(s), (B,). Its minimum over V is temperature log E[exp(Q / temperature)]. Divided by
    max(largest exp(z) of the batch, 1/e), against overflow."""
    z = (advantage / temperature).clamp(max=7)
    shift = z.detach().max().clamp(min=-1)
    return ((z - shift).exp() - (z + 1) * (-shift).exp()).mean()


def policy_loss(log_prob, advantage, temperature, max_weight):
    """Eq. 7: -E[ min(exp(temperature A), max_weight) log pi(a|s) ] over the data's actions; (B,) twice."""
    return -((temperature * advantage).exp().clamp(max=max_weight) * log_prob).mean()


def regulariser(log_prob, reference_log_prob, alpha, weight):
    """alpha log pi(a|s) + weight [log pi(a|s) - log pi_k(a|s)]: what SAC pays for determinism and for leaving the
    reference pi_k, nats times a temperature; (B,) twice -> (B,)."""
    return alpha * log_prob + weight * (log_prob - reference_log_prob)


def annealed(temperature, step, steps):
    """Weight of the divergence after `step` environment steps: from `temperature` to 0 over `steps`, linearly."""
    return temperature * max(1 - step / steps, 0.0)


def td3_actor_loss(q, distance, weight):
    """-2.5 E[Q] / E|Q| + weight E[(pi - pi_k)^2], the first without a gradient in its scale; (B,) and (B, A)."""
    return -2.5 / q.detach().abs().mean().clamp(min=1e-6) * q.mean() + weight * distance.mean()


def make_offline_update(args, nets, optimizers, split):
    """-> update(rows (B, 2 O + A + 2), noise), which changes `nets` in place and returns detached numbers; noise is not
    used."""
    actor, value, critics, targets = (nets[key] for key in ("actor", "value", "critics", "targets"))

    def update(rows, noise):
        obs, action, reward, next_obs, terminated = split(rows)
        with torch.no_grad():
            q_old = targets(obs, action).amin(0)
        v = value(obs)
        value_loss = gumbel_loss(q_old - v, args.temperature)
        optimizers["value"].minimize(value_loss)
        with torch.no_grad():  # of V after its step
            advantage = q_old - value(obs)
            target = value_target(reward, terminated, value(next_obs), args.gamma)
        q = critics(obs, action)
        critic_loss = ((q - target) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(critic_loss)
        polyak(targets, critics, args.tau)
        log_prob = gaussian_log_prob(*actor(obs), action)
        loss = policy_loss(log_prob, advantage, 1 / args.temperature, args.max_weight)
        optimizers["actor"].minimize(loss)
        values = numbers(value_loss=value_loss, critic_loss=critic_loss, policy_loss=loss, q_mean=q.mean())
        return values | numbers(v_mean=v.mean(), std=actor.log_std.exp().mean())

    return update


def make_update(args, nets, optimizers, split):
    """-> update(rows (B, 2 O + A + 2), noise (2, B, A) standard normal, weight of the divergence (), which in {0, 1}:
    the critic of the target with --no-minimum, both), PROTO's online: SAC near the reference. `both` is read by TD3
    alone: does the policy move as well?"""
    actor, reference, critics, targets = (nets[key] for key in ("actor", "reference", "critics", "targets"))
    log_alpha = nets["log_alpha"][0]

    def update(rows, noise, weight, which, both):
        obs, action, reward, next_obs, terminated = split(rows)
        alpha = log_alpha.detach().exp()
        with torch.no_grad():
            next_action, log_prob, drawn = actor.sample(next_obs, noise[0])
            q = targets(next_obs, next_action)
            next_value = q.amin(0) if args.minimum else torch.where(which > 0, q[1], q[0])
            if args.penalize_target:
                near = gaussian_log_prob(*reference(next_obs), drawn)
                next_value = next_value - regulariser(log_prob, near, alpha, weight)
            target = value_target(reward, terminated, next_value, args.gamma)
        q = critics(obs, action)
        critic_loss = ((q - target) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(critic_loss)
        drawn_action, log_prob, drawn = actor.sample(obs, noise[1])
        near = gaussian_log_prob(*reference(obs), drawn)
        loss = (regulariser(log_prob, near, alpha, weight) - critics(obs, drawn_action).mean(0)).mean()
        optimizers["online_actor"].minimize(loss)
        entropy = -log_prob.detach().mean()
        optimizers["log_alpha"].minimize(log_alpha.exp() * (entropy + action.shape[1] / 2))  # target: -A/2 nats
        polyak(targets, critics, args.tau)
        polyak(reference, actor, args.tau_reference)
        values = numbers(critic_loss=critic_loss, policy_loss=loss, q_mean=q.mean(), entropy=entropy, alpha=alpha)
        return values | numbers(divergence=(log_prob - near).mean(), std=actor.log_std.exp().mean())

    return update


def make_td3_update(args, nets, optimizers, split):
    """-> update as above, PROTO+TD3's online. As in the authors' code, with --minimum the target's Q is of the
    reference's action, and the noisy action of the policy enters the penalty alone, as the batch's mean. With
    --no-minimum Q is of the noisy action."""
    actor, reference, critics, targets = (nets[key] for key in ("actor", "reference", "critics", "targets"))

    def update(rows, noise, weight, which, both):
        obs, action, reward, next_obs, terminated = split(rows)
        with torch.no_grad():
            near, noisy = reference.mode(next_obs), smoothed(actor.mode(next_obs), noise[0], 0.2, 0.5)
            q = targets(next_obs, near if args.minimum else noisy)
            next_value = q.amin(0) if args.minimum else torch.where(which > 0, q[1], q[0])
            if args.penalize_target:
                next_value = next_value - weight * ((noisy - near) ** 2).mean()
            target = value_target(reward, terminated, next_value, args.gamma)
        q = critics(obs, action)
        critic_loss = ((q - target) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(critic_loss)
        values = numbers(critic_loss=critic_loss, q_mean=q.mean())
        if both:
            with torch.no_grad():
                near = reference.mode(obs)
            chosen = actor.mode(obs)
            distance = (chosen - near) ** 2
            loss = td3_actor_loss(critics(obs, chosen)[1], distance, weight)
            optimizers["mean"].minimize(loss)
            polyak(targets, critics, args.tau)
            polyak(reference, actor, args.tau_reference)
            values |= numbers(policy_loss=loss, distance=distance.mean())
        return values

    return update


def reward_scale(rewards, last):
    """What rewards are multiplied by: 1000 / (best - worst episode return), which makes the returns span 1000, so that
    one temperature serves every task. rewards, last (N,): the last transition of each episode. Raises UserError if all
    episodes have one return."""
    ends = rewards.double().cumsum(0)[last]
    returns = ends.diff(prepend=ends.new_zeros(1))
    if returns.max() <= returns.min():
        raise UserError("every episode of the dataset has the same return: there is nothing to prefer")
    return 1000 / float(returns.max() - returns.min())


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


def draw_seeded(generator, first, own, offline, batch_size):
    """-> indices (batch_size,): `offline` of them in [0, first), the data, the rest of `own`."""
    data = torch.randint(first, (offline,), generator=generator, device=generator.device)
    index = torch.randint(len(own), (batch_size - offline,), generator=generator, device=generator.device)
    return torch.cat([data, own[index]])


def train_online(args, run, update, data, score):
    """One environment step with an action of the policy, drawn or with TD3's noise, then updates_per_step updates. The
    environment receives exactly the action that the buffer stores."""
    progress, actor, generator = run.progress, run.nets["actor"], run.generator
    env, obs, buffer, num_data = online_start(args, run, data)
    seeds = torch.randperm(num_data, generator=torch.Generator().manual_seed(args.seed)).to(buffer.device)
    seeds, offline = (seeds[:SEEDED_TD3], 0) if args.td3 else (seeds[:SEEDED], args.batch_size // 2)
    own = torch.cat([seeds, torch.arange(num_data, len(buffer), device=buffer.device)])  # rows of the online buffer
    seconds, count, values, weight = 0.0, 0, {}, torch.zeros((), device=buffer.device)
    for step in tqdm(range(progress["step"] + 1, args.online_steps + 1), desc="online", unit="step", disable=None):
        with torch.no_grad():
            noise, state = torch.randn(1, data.act_dim, generator=generator, device=generator.device), obs[None]
            if args.td3:
                action = smoothed(actor.mode(data.to_tensor(state)), noise, 0.2, 0.5)[0].cpu().numpy()
            else:
                action = actor.sample(data.to_tensor(state), noise)[0][0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        scaled = run.scale * (args.reward_scale * reward + args.reward_bias)
        row = np.concatenate([obs, action, [scaled], next_obs, [terminated]])  # a time limit keeps its bootstrap
        buffer[num_data + step - 1], obs = data.to_tensor(row), next_obs
        if terminated or truncated:
            obs, progress["episode_start"] = env.reset(seed=1_000_000 * args.seed + step)[0], step

        clock, count = time.monotonic(), count + args.updates_per_step
        weight.fill_(annealed(args.temperature, step, args.anneal_steps))
        for i in range(args.updates_per_step):
            index = draw_seeded(generator, num_data, own[: len(seeds) + step], offline, args.batch_size)
            noise = torch.randn(2, args.batch_size, data.act_dim, generator=generator, device=generator.device)
            which = torch.randint(2, (), generator=generator, device=generator.device)
            both = not args.td3 or (step * args.updates_per_step + i) % 2 == 0  # TD3's delay
            new = update(buffer[index], noise, weight, which, both)
            values |= {key: value.clone() for key, value in new.items()}  # a later CUDA graph may write over them
        if args.cuda:
            torch.cuda.synchronize()  # for the clock; the next action would wait for the updates anyway
        seconds += time.monotonic() - clock
        progress["step"] = progress["online_steps"] = step
        if step % args.eval_every == 0 or step == args.online_steps:
            progress["updates_per_second"]["online"] = count / max(seconds, 1e-9)
            row = values | {"updates_per_second": progress["updates_per_second"]["online"]} | score()
            progress["scores"].append([step, row["score"]])
            run.log("online", step, row)
            run.save(online=buffer[num_data : num_data + step].cpu().clone())
            seconds, count = 0.0, 0


def train(args, run, data, saved):
    """The method: on the data, from random networks; then online, where it ended, with a reference that trails."""
    progress, device, reward = run.progress, data.rows.device, data.obs_dim + data.act_dim  # its column
    torch.manual_seed(args.seed)
    run.scale = reward_scale(data.rows[:, reward], data.last) if args.normalize_rewards else 1.0
    data.rows[:, reward] *= run.scale
    stats, hidden = observation_stats(data), (256, 256)
    activation = (lambda: nn.Sequential(nn.LayerNorm(hidden[0]), nn.ReLU())) if args.layer_norm else nn.ReLU
    nets = {"actor": TanhGaussianActor(*stats, data.act_dim, hidden, bf16=args.bf16)}
    nets["critics"] = Critics(*stats, data.act_dim, hidden, layer_norm=args.layer_norm, bf16=args.bf16)
    nets = start_from(args.checkpoint, saved, nets)
    nets |= {"targets": deepcopy(nets["critics"]), "reference": deepcopy(nets["actor"])}
    nets["value"] = Value(*stats, hidden, activation, bf16=args.bf16)
    nets["log_alpha"] = nn.ParameterList([torch.tensor(math.log(args.alpha))])
    nets = {name: net.to(device) for name, net in nets.items()}
    names = ("actor", "critics", "value", "log_alpha")
    optimizers = {name: Adam(nets[name].parameters(), args.learning_rate) for name in names}
    optimizers["online_actor"] = Adam(nets["actor"].parameters(), args.learning_rate)  # as in the authors' code: new
    optimizers["mean"] = Adam(nets["actor"].net.parameters(), args.learning_rate)  # TD3's policy has no std
    run.restore(nets, optimizers, torch.Generator(device).manual_seed(args.seed))
    envs = [data.make_env() for _ in range(args.eval_episodes)]
    score = partial(score_policy, args, run, data, envs)
    if progress["stage"] == "start":
        run.enter("offline")
    if progress["stage"] == "offline":
        if saved is None:
            update = compile_update(make_offline_update(args, nets, optimizers, data.split), args)
            train_offline(args, run, "offline", args.offline_steps, update, data.rows, (0,), score)
        nets["reference"].load_state_dict(nets["actor"].state_dict())
        progress["offline_score"], progress["offline_error"] = closing_score(args, nets["actor"], data, envs)
        progress["start_score"] = score()["score"]
        print(f"offline policy: score {progress['offline_score']:.1f} +- {progress['offline_error']:.1f}", flush=True)
        save_file(checkpoint(args, data, nets, args.offline_steps, progress["offline_score"]), run.dir / "offline.pt")
        run.enter("online")
    make = make_td3_update if args.td3 else make_update
    train_online(args, run, compile_update(make(args, nets, optimizers, data.split), args), data, score)
    progress["closing_score"], progress["closing_error"] = closing_score(args, nets["actor"], data, envs)
    save_file(checkpoint(args, data, nets, args.online_steps, progress["closing_score"]), run.dir / "model.pt")


SEEDED, SEEDED_TD3 = 10_000, 25_000  # transitions of the data that the online buffer begins with
ALGORITHM, KIND = "proto", "tanh_gaussian"  # this script, its policy class
RESUMABLE = "offline_steps online_steps compile num_threads track wandb_project_name wandb_entity"
PRIVATE = "stage step episode_start"  # of a run's progress, not in summary.json
RANGES = {
    (-(10**9), 10**9): "reward_bias",
    (0, 1): "gamma tau tau_reference learning_rate",
    (0, 10**9): "seed offline_steps online_steps max_weight",
    (1, 10**9): "updates_per_step eval_every eval_every_updates eval_episodes batch_size anneal_steps",
    (1e-9, 10**9): "reward_scale temperature alpha",
    (1, 1024): "num_threads",
}


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


def smoothed(action, noise, std, clip):
    """TD3's target policy smoothing: clip(a + clip(std * noise)); action, noise (B, A), noise standard normal."""
    return (action + (std * noise).clamp(-clip, clip)).clamp(-1, 1)


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


def observation_stats(data):
    """-> mean and std + 1e-3 of the data's observations, (O,) each; they travel in the checkpoint."""
    obs = data.split(data.rows)[0].cpu()
    return obs.mean(0), obs.std(0) + 1e-3


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
    """Policy and critics: plain tensors, numbers and strings."""
    origin = {"format": 1, "algorithm": ALGORITHM, "env_id": args.env_id, "dataset": data.name}
    policy = {"policy": {"kind": KIND, "hidden": [256, 256]}, "step": step, "score": score}
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
