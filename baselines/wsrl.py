"""WSRL: online SAC, warm-started from an offline run, without its data (Zhou et al. 2025, arXiv 2412.07762).

Methods that keep the data in the buffer do so to be safe from a collapse in the first steps. This one drops the data:
first the pre-trained policy acts for some thousand steps without an update, so that the buffer holds what it sees; then
plain SAC goes on from the pre-trained policy, critics, targets and temperature, with several updates a step.

  1 offline  CQL, or with --calibrate Cal-QL, with an ensemble of ten    td_target, conservative_gap, calibrated
             critics with layer normalisation
  2 online   SAC with the same ensemble, on what is collected            td_target, actor_loss

    python baselines/wsrl.py --env-id hopper-medium-v2 --bf16  # pre-trains on the data, then goes on online
    python baselines/wsrl.py --checkpoint RUN_DIR/offline.pt --seed 2  # the same start, without pre-training again
    python baselines/wsrl.py --offline-steps 250000 --cql-actions 10 --online-steps 500000  # the paper's budget

The pre-training is most of the cost, and with the paper's ten actions 2.4 times as much as with four. With --checkpoint
and the seed of the run that wrote it, stage 2 is that run's, bit for bit. As in the authors' code, locomotion is
pre-trained by CQL and AntMaze by Cal-QL, and targets have no entropy bonus. Other than there, Adam starts anew in stage
2, the actor has no layer normalisation and always a std that depends on the state.

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
    exp_name: str = "wsrl"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    dataset: str | None = None  # Minari id, local or remote; None: o2o/<env_id>, made by offline/collect.py if missing
    checkpoint: str | None = None  # offline.pt or model.pt of an earlier run; None: pre-train first
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    offline_steps: int = 100_000  # updates of the pre-training (paper: 250,000; AntMaze 1,000,000)
    online_steps: int = 50_000  # environment steps (paper: 500,000)
    updates_per_step: int = 4  # updates of the critics per environment step, followed by one of the policy
    warm_up: int = 5_000  # environment steps of the pre-trained policy, without updates
    offline_fraction: float = 0.0  # share of the data in the batches of stage 2; above 0: ablation
    eval_every: int = 1_000  # environment steps between evaluations
    eval_every_updates: int = 5_000  # updates between them in the pre-training
    eval_episodes: int = 10  # episodes of one evaluation, all at once

    batch_size: int = 256  # transitions of one gradient step of the critics
    reward_scale: float = 1.0  # rewards are multiplied by it in all updates; scores are of raw rewards
    reward_bias: float = 0.0  # then this is added
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak rate of the target critics
    policy_lr: float = 1e-4  # actor and temperature
    critic_lr: float = 3e-4  # critics, and the multiplier of --target-gap
    alpha: float = 1.0  # temperature at the start of the pre-training
    num_critics: int = 10  # size of the ensemble
    min_critics: int = 2  # the target is the least of that many, drawn anew for each batch
    critic_layers: int = 2  # hidden layers of the critics, of width 256; the actor has two
    max_backup: bool = False  # back up the best of cql_actions next actions instead of one
    cql_alpha: float = 5.0  # weight of the conservative term in the pre-training, without --target-gap
    cql_actions: int = 4  # actions that it draws from each of uniform, pi(.|s), pi(.|s') (paper: 10)
    target_gap: float | None = None  # tune that weight so that the gap stays there, in units of Q; None: fixed
    calibrate: bool = False  # Cal-QL: the conservative term pushes no value below what the data's policy obtained

    compile: bool = True  # compile each update into one graph
    bf16: bool = False  # matrix products in bf16, if the CPU or GPU has units for it
    num_threads: int = 1  # CPU threads: such small networks get slower, not faster, once threads exceed the free cores


def settings(args):
    """What the authors change with the task; the command line still wins."""
    if not args.env_id.startswith("antmaze"):
        return {}
    values = {"reward_scale": 10.0, "reward_bias": -5.0, "calibrate": True, "target_gap": 0.8, "max_backup": True}
    values |= {"critic_layers": 4, "eval_every": 5_000, "eval_every_updates": 25_000, "eval_episodes": 50}
    return values


def td_target(reward, terminated, next_q, gamma):
    """y = r + gamma (1 - d) max_k min_{j in Z} Q_j(s', a'_k),   a'_k ~ pi,   Z a random subset, no entropy bonus

    reward, terminated (B,); next_q (|Z|, B, K) return. -> (B,)."""
    return reward + gamma * (1 - terminated) * next_q.amin(0).amax(-1)


def conservative_gap(q_candidates, log_density, q_data, temperature, clip=None):
    """How far the critics rank the policy's actions above the data's, CQL(H) with importance weights (Eq. 4, App. F):

        T logsumexp_k( (Q(s, a_k) - log p(a_k)) / T ) - Q(s, a)

    q_candidates (n, B, K): return. log_density (B, K): nats, of the distribution that a_k was drawn from.
    q_data (n, B): Q of the action in the data. -> (n, B), clipped below at `clip`."""
    gap = temperature * torch.logsumexp((q_candidates - log_density) / temperature, dim=-1) - q_data
    return gap if clip is None else gap.clamp(min=clip)


def calibrated(q_candidates, floor, uniform):
    """max{ Q(s, a_k), G(s) } for the policy's actions, so that no value is pushed below what the data's own policy
    obtained from s. q_candidates (n, B, K), of which the first `uniform` of the K are not the policy's and stay as they
    are; floor = G (B,) return. -> (n, B, K)."""
    return torch.cat([q_candidates[..., :uniform], q_candidates[..., uniform:].maximum(floor[:, None])], dim=-1)


def returns_to_go(reward, terminated, last, gamma):
    """G(s_t) = r_t + gamma G(s_t+1), to the end of the episode. A time limit hides what would follow; where an episode
    met nothing but the data's least reward r, as mazes without success do, that is taken to go on: G = r / (1 - gamma).
    All (N,); last: does an episode end here? -> (N,) return."""
    episode, least = last.cumsum(0) - last.long(), reward.min()
    best = torch.full_like(reward, -math.inf)
    best.scatter_reduce_(0, episode, reward.masked_fill(terminated == 1, math.inf), "amax")
    sums, total = [], 0.0
    for r, end in zip(reward.flip(0).tolist(), last.flip(0).tolist(), strict=True):
        sums.append(total := r + gamma * (0.0 if end else total))
    return torch.where((best == least)[episode], least / (1 - gamma), reward.new_tensor(sums).flip(0))


def actor_loss(log_prob, q, alpha):
    """E[ alpha log pi(a|s) - min_j Q_j(s,a) ], a reparametrised; log_prob (B,), q (n, B): the least of all n."""
    return (alpha * log_prob - q.amin(0)).mean()


def draw_actions(actor, obs, noise):
    """K actions of the policy: obs (B, O), noise (K, B, A) -> actions (B, K, A), log_prob (B, K)."""
    mean, log_std = actor(obs)
    u = mean + log_std.exp() * noise
    return torch.tanh(u).transpose(0, 1), squashed_log_prob(mean, log_std, u).transpose(0, 1)


def q_of_each(critics, obs, actions):
    """Q of K actions a state: obs (B, O), actions (B, K, A) -> (n, B, K)."""
    batch, k, _ = actions.shape
    return critics(obs.repeat_interleave(k, 0), actions.flatten(0, 1)).unflatten(1, (batch, k))


def make_updates(args, nets, optimizers, split):
    """-> the update of stage 1 and the two of stage 2, which change `nets` in place and return detached numbers. rows
    (B, 2 O + A + 2), noise (n, B, A) standard normal, chosen (|Z|,): which critics the target takes. K next actions are
    backed up: cql_actions with --max-backup, else one."""
    actor, critics, targets = nets["actor"], nets["critics"], nets["targets"]
    log_alpha, lagrange, k = nets["log_alpha"][0], nets["lagrange"][0], args.cql_actions

    def td_loss(rows, next_actions, chosen):
        obs, action, reward, next_obs, terminated = split(rows)
        with torch.no_grad():
            next_q = q_of_each(targets, next_obs, next_actions)[chosen]
            target = td_target(reward, terminated, next_q, args.gamma)
        q = critics(obs, action)
        return ((q - target) ** 2).mean(-1).sum(), q

    def update_policy(rows, noise):
        """Writes actor and temperature. noise (B, A)."""
        obs, action = split(rows)[:2]
        alpha = log_alpha.detach().exp()
        new_action, log_prob, _ = actor.sample(obs, noise)
        optimizers["actor"].minimize(actor_loss(log_prob, critics(obs, new_action), alpha))
        entropy = -log_prob.detach().mean()
        optimizers["log_alpha"].minimize(log_alpha * (entropy + action.shape[1]))  # target entropy: -A nats
        return numbers(alpha=alpha, entropy=entropy)

    def pretrain(rows, noise, chosen):
        """Writes everything. The last column of rows is G(s); noise (3 cql_actions + 1, B, A)."""
        rows, floor = rows[:, :-1], rows[:, -1]
        obs, action, _, next_obs, _ = split(rows)
        with torch.no_grad():
            next_actions, next_log_prob = draw_actions(actor, next_obs, noise[:k])
            actions, log_prob = draw_actions(actor, obs, noise[k : 2 * k])
            uniform = torch.erf(noise[2 * k : 3 * k] / math.sqrt(2)).transpose(0, 1)  # of normal noise: U[-1, 1]
            uniform_density = torch.full_like(log_prob, -action.shape[1] * math.log(2))
            log_density = torch.cat([uniform_density, log_prob, next_log_prob], dim=1)
        loss, q = td_loss(rows, next_actions if args.max_backup else next_actions[:, :1], chosen)
        q_candidates = q_of_each(critics, obs, torch.cat([uniform, actions, next_actions], dim=1))
        if args.calibrate:
            q_candidates = calibrated(q_candidates, floor, k)
        gap = conservative_gap(q_candidates, log_density, q, 1.0).mean(-1)
        weight = torch.full_like(lagrange, args.cql_alpha)
        if args.target_gap is not None:
            weight, gap = F.softplus(lagrange.detach()), gap - args.target_gap
            optimizers["lagrange"].minimize(-F.softplus(lagrange) * gap.detach().mean())
        optimizers["critics"].minimize(loss + weight * gap.sum())
        values = update_policy(rows, noise[3 * k])
        polyak(targets, critics, args.tau)
        return values | numbers(td_loss=loss, gap=gap.mean(), cql_weight=weight, q_mean=q.mean())

    def update_critics(rows, noise, chosen):
        """Writes critics and targets. noise (K, B, A)."""
        with torch.no_grad():
            next_actions, _ = draw_actions(actor, split(rows)[3], noise)
        loss, q = td_loss(rows, next_actions, chosen)
        optimizers["critics"].minimize(loss)
        polyak(targets, critics, args.tau)
        return numbers(critic_loss=loss, q_mean=q.mean())

    return pretrain, update_critics, update_policy


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


def choose(args, generator):
    """-> the random subset Z, (min_critics,) indices."""
    return torch.randperm(args.num_critics, generator=generator, device=generator.device)[: args.min_critics]


def train_online(args, run, update_critics, update_policy, data, score):
    """One environment step with an action drawn from the policy, then updates_per_step updates of the critics, and one
    of the policy on all their batches. The environment receives exactly the action that the buffer stores."""
    progress, actor, generator = run.progress, run.nets["actor"], run.generator
    env, obs, buffer, num_data = online_start(args, run, data)
    num_offline, shape = round(args.offline_fraction * args.batch_size), (args.batch_size, data.act_dim)
    backups, seconds, count, values = args.cql_actions if args.max_backup else 1, 0.0, 0, {}
    for step in tqdm(range(progress["step"] + 1, args.online_steps + 1), desc="online", unit="step", disable=None):
        with torch.no_grad():
            noise = torch.randn(1, data.act_dim, generator=generator, device=generator.device)
            action = actor.sample(data.to_tensor(obs[None]), noise)[0][0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        scaled = args.reward_scale * reward + args.reward_bias
        row = np.concatenate([obs, action, [scaled], next_obs, [terminated]])  # a time limit keeps its bootstrap
        buffer[num_data + step - 1], obs = data.to_tensor(row), next_obs
        if terminated or truncated:
            obs, progress["episode_start"] = env.reset(seed=1_000_000 * args.seed + step)[0], step

        if step > args.warm_up:
            clock, count, batches = time.monotonic(), count + args.updates_per_step, []
            for _ in range(args.updates_per_step):
                batches.append(buffer[draw(generator, num_data, num_data + step, num_offline, args.batch_size)])
                noise = torch.randn(backups, *shape, generator=generator, device=generator.device)
                values = update_critics(batches[-1], noise, choose(args, generator))
            values = {key: value.clone() for key, value in values.items()}  # the next CUDA graph may write over them
            rows = torch.cat(batches)
            noise = torch.randn(len(rows), data.act_dim, generator=generator, device=generator.device)
            values |= update_policy(rows, noise)
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
    """The method: on the data, from random networks; then online, where it ended."""
    progress, device = run.progress, data.rows.device
    torch.manual_seed(args.seed)
    stats, hidden = (torch.zeros(data.obs_dim), torch.ones(data.obs_dim)), (256,) * args.critic_layers
    critics = Critics(*stats, data.act_dim, hidden, args.num_critics, layer_norm=True, bf16=args.bf16)
    nets = {"actor": SquashedGaussianActor(*stats, data.act_dim, (256, 256), args.bf16), "critics": critics}
    nets |= {"targets": deepcopy(critics), "log_alpha": nn.ParameterList([torch.tensor(math.log(args.alpha))])}
    nets = warm_start(args.checkpoint, saved, nets)
    # its softplus is the weight of --target-gap, which starts at 1
    nets["lagrange"] = nn.ParameterList([torch.tensor(math.log(math.e - 1))])
    nets = {name: net.to(device) for name, net in nets.items()}
    rates = {"actor": args.policy_lr, "log_alpha": args.policy_lr}
    rates |= {"critics": args.critic_lr, "lagrange": args.critic_lr}
    optimizers = {name: Adam(nets[name].parameters(), rate) for name, rate in rates.items()}
    run.restore(nets, optimizers, torch.Generator(device).manual_seed(args.seed))
    updates = make_updates(args, nets, optimizers, data.split)
    pretrain, update_critics, update_policy = (compile_update(update, args) for update in updates)
    envs = [data.make_env() for _ in range(args.eval_episodes)]
    score, shape = partial(score_policy, args, run, data, envs), (3 * args.cql_actions + 1, args.batch_size)
    if progress["stage"] == "start":
        run.enter("offline")
    if progress["stage"] == "offline":
        if saved is None:
            _, _, reward, _, terminated = data.split(data.rows)
            floor = returns_to_go(reward.cpu(), terminated.cpu(), data.last.cpu(), args.gamma).to(device)
            rows, extra = torch.cat([data.rows, floor[:, None]], 1), lambda step: (choose(args, run.generator),)
            shape = *shape, data.act_dim
            train_offline(args, run, "offline", args.offline_steps, pretrain, rows, shape, score, extra)
        progress["offline_score"], progress["offline_error"] = closing_score(args, nets["actor"], data, envs)
        progress["start_score"] = score()["score"]
        print(f"offline policy: score {progress['offline_score']:.1f} +- {progress['offline_error']:.1f}", flush=True)
        start = whole_checkpoint(args, data, nets, args.offline_steps, progress["offline_score"])
        save_file(start, run.dir / "offline.pt")
        run.generator.manual_seed(args.seed)  # stage 2 is then the same with --checkpoint
        for optimizer in optimizers.values():
            torch._foreach_zero_(optimizer.state_dict()["state"])
        run.enter("online")
    train_online(args, run, update_critics, update_policy, data, score)
    progress["closing_score"], progress["closing_error"] = closing_score(args, nets["actor"], data, envs)
    save_file(whole_checkpoint(args, data, nets, args.online_steps, progress["closing_score"]), run.dir / "model.pt")


ALGORITHM, KIND = "wsrl", "squashed_gaussian"  # this script, its policy class
RESUMABLE = "offline_steps online_steps compile num_threads track wandb_project_name wandb_entity"
PRIVATE = "stage step episode_start"  # of a run's progress, not in summary.json
RANGES = {
    (-(10**9), 10**9): "reward_bias",
    (0, 1): "gamma tau offline_fraction policy_lr critic_lr",
    (0, 10**9): "seed offline_steps online_steps warm_up cql_alpha target_gap",
    (1, 10**9): "updates_per_step eval_every eval_every_updates eval_episodes batch_size cql_actions",
    (1e-9, 10**9): "reward_scale alpha",
    (1, 1024): "num_threads num_critics min_critics critic_layers",
}


def mlp(net, x, bf16):
    """A network's output, with `bf16` all products in bf16 but the last: bf16 can't tell a Q of 300 from one of 301."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        x = net[:-1](x)
    return net[-1](x.float())


class SquashedGaussianActor(nn.Module):
    """a = tanh(u), u ~ N(mean(s), std(s)^2): SAC's policy. `noise` is standard normal and given from outside, so that
    a compiled and an eager update see the same numbers."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        sizes = [len(obs_mean), *hidden]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net, self.bf16 = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * act_dim)), bf16
        nn.init.xavier_uniform_(self.net[-1].weight, gain=0.01)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, obs):
        """(B, O) raw observations -> mean (B, A) and log_std (B, A) of u."""
        mean, log_std = mlp(self.net, (obs - self.obs_mean) / self.obs_std, self.bf16).chunk(2, dim=-1)
        return mean, (log_std - 1).clamp(-20, 2)  # a new network's std is 1 / e

    def sample(self, obs, noise):
        """-> action (B, A) in [-1, 1], its log_prob (B,) in nats, and u (B, A)."""
        mean, log_std = self(obs)
        u = mean + log_std.exp() * noise
        return torch.tanh(u), squashed_log_prob(mean, log_std, u), u

    def mode(self, obs):
        """-> tanh of the mean (B, A), the action that evaluation executes."""
        return torch.tanh(self(obs)[0])


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


def draw(generator, num_data, end, num_offline, batch_size):
    """-> indices (batch_size,): `num_offline` of the data, in [0, num_data), the rest of online steps, up to `end`."""
    parts = (0, num_data, num_offline), (num_data, end, batch_size - num_offline)
    return torch.cat([torch.randint(a, b, (n,), generator=generator, device=generator.device) for a, b, n in parts])


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


def warm_start(path, saved, nets):
    """Loads the networks of an earlier run of this script, if there is one. -> nets. Raises UserError."""
    try:
        for key, net in nets.items() if saved is not None else ():
            net.load_state_dict(saved[key])
            good = all(x.isfinite().all() for x in net.state_dict().values())
            if not good or (getattr(net, "obs_std", torch.ones(1)) <= 0).any():
                raise UserError(f"{path} holds weights that are not finite, or a std that is not positive")
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{path} holds no {ALGORITHM} that fits the data and the flags ({type(error).__name__})"
        ) from error
    return nets


def whole_checkpoint(args, data, nets, step, score):
    """`checkpoint`, and what a run needs beside it in order to start there."""
    extra = {net: {key: x.cpu() for key, x in nets[net].state_dict().items()} for net in ("targets", "log_alpha")}
    return checkpoint(args, data, nets, step, score) | extra


def checkpoint(args, data, nets, step, score):
    """The fine-tuned policy, in the format of the offline ones: plain tensors, numbers and strings."""
    sizes = [layer.out_features for layer in nets["actor"].net if isinstance(layer, nn.Linear)]
    origin = {"format": 1, "algorithm": ALGORITHM, "env_id": args.env_id, "dataset": data.name}
    policy = {"policy": {"kind": KIND, "hidden": sizes[:-1]}, "step": step, "score": score}
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
    if args.min_critics > args.num_critics:
        raise UserError(f"--min-critics {args.min_critics} is more than --num-critics {args.num_critics}")
    if args.calibrate and args.gamma == 1:
        raise UserError("--calibrate needs a --gamma below 1: what never succeeds has no finite return without")
    if args.online_steps and args.warm_up >= args.online_steps:
        print(f"--warm-up {args.warm_up} leaves no updates in {args.online_steps} --online-steps", file=sys.stderr)
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
