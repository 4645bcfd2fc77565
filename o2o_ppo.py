"""O2PPO: from an offline policy to online PPO without the collapse (OCR-CFT, Luo et al. 2024, arXiv 2412.18855).

Two mismatches make naive fine-tuning collapse. Offline values are pessimistic, so they are no estimate of what the
policy is worth online. And an estimate, even one that is right on average, ranks other actions above the policy's own
by error alone, so the first updates destroy the policy. Only the offline *policy* is used, whatever trained it:

  1 reevaluate  learn V from the discounted returns of the data                     value_targets
  2 finetune    PPO online. Its advantage is aligned with the policy's preference   reference_advantage,
                by one more term, that of the reference policy pi_ref, whose        combined_advantage
                weight falls to 0; in PPO's terms this is the constraint as well

    python o2o_ppo.py --env-id hopper-medium-v2  # makes the dataset, then both stages
    python o2o_ppo.py --reevaluation-steps 1000000  # the paper's budget

In the released code the term of the reference cancels: shapes (N,) and (N, 1) are added. Here it is added sample by
sample; --no-align is close to what that code did. docs/method.md has what else differs.

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
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from gymnasium.wrappers.utils import RunningMeanStd
from minari.storage.datasets_root_dir import get_dataset_path
from torch import nn
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "hopper-medium-v2"  # task: names the dataset, the offline policy and the run folder
    seed: int = 1  # the only seed: networks, batches, training and evaluation environments derive from it
    exp_name: str = "o2o_ppo"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    dataset: str | None = None  # Minari id, local or remote; None: o2o/<env_id>, made by offline/collect.py if missing
    checkpoint: str | None = None  # offline policy; None: offline/checkpoints/<env_id>/iql.pt, or another there
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    reevaluation_steps: int = 50_000  # updates of stage 1 (paper: 1,000,000)
    online_steps: int = 250_000  # environment steps of stage 2, rounded up to whole iterations (paper: 250,000),
    # the learning rates fall over them, so a run that is resumed for longer is not the longer run
    reevaluate: bool = True  # stage 1; off: ablation, V starts untrained
    align: bool = True  # the reference policy's advantage; off: plain PPO
    num_envs: int = 1  # environments stepped together
    eval_every: int = 2_500  # environment steps between evaluations, rounded up to whole iterations
    eval_every_updates: int = 5_000  # updates between them in stage 1
    eval_episodes: int = 10  # episodes of one evaluation, all at once

    rollout: int = 2_048  # environment steps of one iteration, of all environments together
    epochs: int = 10  # passes over them
    minibatch_size: int = 128  # transitions of one gradient step of stage 2
    batch_size: int = 512  # those of stage 1
    reward_scale: float = 1.0  # rewards are multiplied by it in all updates; scores are of raw rewards
    reward_bias: float = 0.0  # then this is added
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # weight of longer returns in the advantage
    clip: float = 0.2  # largest change of an action's probability that is rewarded
    entropy_weight: float = 0.01  # weight of the policy's entropy
    policy_lr: float = 3e-5  # actor; falls linearly to 0 over online_steps
    critic_lr: float = 2e-4  # V in stage 2; falls likewise
    reevaluation_lr: float = 1e-4  # V in stage 1
    max_grad_norm: float = 0.5  # longer gradients are shortened to it
    max_std: float = math.exp(2)  # the offline policy's std is cut to it, once
    scale_rewards: bool = False  # divide by the running std of the discounted return
    alpha: float = 2.0  # size of the reference policy's advantage
    alignment_steps: int = 250_000  # environment steps (elsewhere: updates) in which its weight falls to 0
    reference: Literal["best", "interval"] = "best"  # pi_ref online: the best policy so far, or renewed at intervals
    reference_every: int = 2_500  # environment steps between renewals with --reference interval

    compile: bool = True  # compile each update into one graph
    bf16: bool = False  # matrix products in bf16, if the CPU or GPU has units for it
    num_threads: int = 1  # CPU threads: such small networks get slower, not faster, once threads exceed the free cores


def settings(args):
    """Defaults that differ by task, mostly as in the appendix of the paper; the command line still wins."""
    expert = args.env_id.split("-v")[0].endswith("expert")  # expert and medium-expert data
    values = {"scale_rewards": args.env_id.startswith("halfcheetah")}
    if args.env_id.startswith("antmaze"):
        values |= {"reward_bias": -1.0, "eval_every": 10_000, "eval_every_updates": 25_000, "eval_episodes": 50}
    values |= {"alignment_steps": 500_000} if expert else {}
    slow = {"epochs": 5, "max_std": 0.05, "reference_every": 10_000}
    return values | (slow if expert and args.env_id.startswith("hopper") else {})


def discounted_sums(rewards, starts, gamma):
    """R_t = r_t + gamma R_(t-1), begun anew wherever `starts`; rewards, starts (N,) -> (N,)."""
    sums, total = [], 0.0
    for reward, start in zip(rewards.tolist(), starts.tolist(), strict=True):
        total = reward if start else reward + gamma * total
        sums.append(total)
    return torch.tensor(sums, device=rewards.device)


def value_targets(data, rewards, gamma):
    """What V is fitted to in stage 1: the discounted return of the rest of the episode, plus the value of the state in
    which a time limit cut it off,

        y_t = sum_(k=t..T) gamma^(k-t) r_k + gamma^(T-t+1) (1 - d_T) V(s_(T+1)),   T the episode's last step

    -> rows (N, 2 O + 2): s_t, the sum, the factor of V, s_(T+1). rewards (N,): the data's, scaled if need be."""
    obs, _, _, next_obs, terminated = data.split(data.rows)
    sums = discounted_sums(rewards.flip(0), data.last.flip(0), gamma).flip(0)
    end = data.last.nonzero().squeeze(1)[data.last.cumsum(0) - data.last.long()]  # T of each row
    factor = gamma ** (end - torch.arange(len(end), device=end.device) + 1) * (1 - terminated[end])
    return torch.cat([obs, sums[:, None], factor[:, None], next_obs[end]], dim=1)


def gae(reward, value, next_value, terminated, done, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016), all (T, n) -> (T, n):

        A_t = delta_t + gamma lam (1 - done_t) A_(t+1),   delta_t = r_t + gamma (1 - terminated_t) V(s_(t+1)) - V(s_t)

    next_value is that of the state which the step reached, also where an episode ended there; done = terminated or
    truncated. A time limit is bootstrapped like any other state, but no advantage flows through it."""
    delta = reward + gamma * (1 - terminated) * next_value - value
    advantage, following = torch.zeros_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        advantage[t] = following = delta[t] + gamma * lam * (1 - done[t]) * following
    return advantage


def reference_advantage(log_prob, entropy, act_dim, alpha):
    """The advantage that the reference policy gives an action, always above -4 alpha:

        A_ref(s,a) = alpha / A * h( log pi_ref(a|s) + H(pi_ref) ),   h(x) = softplus(x + 4 A) - 4 A

    A: the number of action dimensions. log_prob (B,) of pi_ref and its entropy, in nats -> (B,), in standard deviations
    of PPO's advantage. Its mean over pi_ref's own actions is close to 0."""
    floor = 4 * act_dim
    return alpha / act_dim * (F.softplus(log_prob + entropy + floor) - floor)


def combined_advantage(advantage, auxiliary, weight):
    """A' = (A + w std(A) A_ref) / (1 + w), sample by sample, then normalised over the iteration, so that the paper's
    division changes nothing; all of one shape. A is the advantage here, A_ref the `auxiliary` one."""
    mixed = (advantage + weight * advantage.std() * auxiliary) / (1 + weight)
    return (mixed - mixed.mean()) / (mixed.std() + 1e-8)


def reference_weight(args, step):
    """w after `step` environment steps: from 1 linearly to 0 at alignment_steps; 0 without alignment."""
    return max(0.0, 1 - step / args.alignment_steps) * args.align


def clipped_surrogate(ratio, advantage, clip):
    """PPO's objective E[ min(ratio A, clip(ratio, 1 - clip, 1 + clip) A) ] with ratio = pi / pi_old; (B,) -> scalar."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def gaussian_entropy(log_std):
    """-E[log N] in nats: sum over the A dimensions of log std + log(2 pi e) / 2; (..., A) -> (...)."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def make_updates(args, nets, optimizers, obs_dim, act_dim):
    """-> the updates of the two stages, which change `nets` in place and return detached numbers."""
    actor, value = nets["actor"], nets["value"]

    def reevaluate(rows, _):
        """Writes V. rows (B, 2 O + 2) of value_targets."""
        obs, sums, factor, last_obs = rows.split([obs_dim, 1, 1, obs_dim], dim=-1)
        with torch.no_grad():
            target = sums.squeeze(-1) + factor.squeeze(-1) * value(last_obs)
        v = value(obs)
        loss = ((v - target) ** 2).mean()
        optimizers["reevaluation"].minimize(loss)
        return numbers(value_loss=loss, v_mean=v.mean(), explained=1 - loss / target.var().clamp(min=1e-8))

    def finetune(rows, scale):
        """Writes actor and V. rows (B, O + A + 3): observation, action before clipping, its log_prob when it was
        taken, advantage, return; scale, a tensor: of both learning rates."""
        obs, action, rest = rows.split([obs_dim, act_dim, 3], dim=-1)
        old_log_prob, advantage, returns = rest.unbind(-1)
        mean, log_std = actor(obs)
        log_ratio = gaussian_log_prob(mean, log_std, action) - old_log_prob
        ratio = log_ratio.exp()
        objective = clipped_surrogate(ratio, advantage, args.clip)
        optimizers["actor"].minimize(-objective - args.entropy_weight * gaussian_entropy(log_std), scale)
        value_loss = ((value(obs) - returns) ** 2).mean()
        optimizers["value"].minimize(value_loss, scale)
        clipped = ((ratio - 1).abs() > args.clip).float().mean()
        kl = (ratio - 1 - log_ratio).mean()
        return numbers(objective=objective, value_loss=value_loss, kl=kl, clipped=clipped, std=log_std.exp().mean())

    return reevaluate, finetune


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


class Rollout:
    """The training environments, each in the middle of an episode. Each episode starts from a seed of its own, and the
    actions since then are kept: a resumed run repeats them, so that no state of a simulator has to be stored."""

    def __init__(self, args, data, scaler):
        self.args, self.data, self.scaler = args, data, scaler
        self.envs = [data.make_env() for _ in range(args.num_envs)]
        self.starts, self.actions = [0] * args.num_envs, [[] for _ in self.envs]

    def reset(self, i, step):
        """A new episode in environment i, `step` steps after the start of training. -> observation."""
        self.starts[i], self.actions[i] = step, []
        return self.envs[i].reset(seed=1_000_000_000 * (i + 1) + 1_000_000 * self.args.seed + step)[0]

    def begin(self, saved=None):
        """Resets all environments, or brings them to where `saved`, an earlier state(), had them."""
        self.obs = [self.reset(i, 0) for i in range(len(self.envs))]
        for i, env in enumerate(self.envs if saved else ()):
            self.obs[i] = self.reset(i, saved["starts"][i])
            for action in saved["actions"][i].numpy():
                self.obs[i] = env.step(action)[0]
                self.actions[i].append(action)

    def state(self):
        actions = [torch.from_numpy(np.array(a)) for a in self.actions]
        return {"starts": list(self.starts), "actions": actions, "scaler": self.scaler and self.scaler.state_dict()}

    def collect(self, actor, generator, first):
        """`rollout` environment steps with the policy's own noise; `first`: the number of the first. -> tensors
        (T, n, ...) of obs, action before clipping, log_prob, reward, next_obs, terminated, done. next_obs is what the
        step reached, also where an episode ended there."""
        steps, rows = self.args.rollout // len(self.envs), []
        shape = steps, len(self.envs), self.data.act_dim
        noise = torch.randn(shape, generator=generator, device=generator.device)
        for t in range(steps):
            obs = self.data.to_tensor(np.stack(self.obs))
            with torch.no_grad():
                executed, log_prob, action = actor.sample(obs, noise[t])
            results = []
            for i, (env, a) in enumerate(zip(self.envs, executed.cpu().numpy(), strict=True)):
                self.obs[i], reward, terminated, truncated, _ = env.step(a)
                self.actions[i].append(a)
                results.append((reward, self.obs[i], terminated, terminated or truncated))
                if terminated or truncated:
                    self.obs[i] = self.reset(i, first + t * len(self.envs))
            reward, next_obs, terminated, done = (np.stack(column) for column in zip(*results, strict=True))
            reward = self.args.reward_scale * reward + self.args.reward_bias
            if self.scaler is not None:
                reward = self.scaler(reward, done)
            rows.append((obs, action, log_prob, *map(self.data.to_tensor, (reward, next_obs, terminated, done))))
        return [torch.stack(column) for column in zip(*rows, strict=True)]


class RewardScaler:
    """Divides rewards by the running std of the discounted return. It starts as that of the data, in whose units V was
    fitted; the data count as so many samples that it hardly moves afterwards."""

    def __init__(self, gamma, num_envs):
        self.gamma, self.stats, self.total = gamma, RunningMeanStd(), np.zeros(num_envs)

    def __call__(self, reward, done):
        self.total = self.gamma * self.total + reward
        self.stats.update(self.total)
        self.total[done] = 0
        return reward / self.std()

    def std(self):
        return float(np.sqrt(self.stats.var + 1e-8))

    def state_dict(self):
        stats = [float(x) for x in (self.stats.mean, self.stats.var, self.stats.count)]
        return {"stats": stats, "total": torch.from_numpy(self.total.copy())}

    def load_state_dict(self, saved):
        self.stats.mean, self.stats.var, self.stats.count = (np.float64(x) for x in saved["stats"])
        self.total = saved["total"].numpy().copy()


def train_online(args, run, update, data, score, scaler):
    """Stage 2: PPO on iterations of `rollout` steps, with the advantage of the reference policy added."""
    progress, generator, device = run.progress, run.generator, data.rows.device
    actor, value, reference = (run.nets[key] for key in ("actor", "value", "reference"))
    rollout, saved = Rollout(args, data, scaler), run.saved.get("online")
    try:
        rollout.begin(saved)
        if saved and scaler is not None:
            scaler.load_state_dict(saved["scaler"])
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(f"{run.dir}/resume.pt is damaged: it does not hold the current episodes") from error
    iterations, seconds, count = math.ceil(args.online_steps / args.rollout), 0.0, 0
    for iteration in tqdm(range(progress["step"] // args.rollout, iterations), desc="online", disable=None):
        before, step = iteration * args.rollout, (iteration + 1) * args.rollout
        obs, action, log_prob, reward, next_obs, terminated, done = rollout.collect(actor, generator, before + 1)
        clock = time.monotonic()
        with torch.no_grad():
            v, (mean, log_std) = value(obs), reference(obs)
            advantage = gae(reward, v, value(next_obs), terminated, done, args.gamma, args.gae_lambda)
            log_prob_ref, entropy = gaussian_log_prob(mean, log_std, action), gaussian_entropy(log_std)
            auxiliary = reference_advantage(log_prob_ref, entropy, data.act_dim, args.alpha)
            weight = reference_weight(args, before)
            mixed = combined_advantage(advantage, auxiliary, weight)
            parts = (log_prob, mixed, advantage + v)
            rows = torch.cat([obs, action, *(part.unsqueeze(-1) for part in parts)], dim=-1).flatten(0, 1)
        scale = torch.tensor(1 - iteration / iterations, device=device)
        for _ in range(args.epochs):
            for index in torch.randperm(args.rollout, generator=generator, device=device).view(-1, args.minibatch_size):
                values, count = update(rows[index], scale), count + 1
        if args.cuda:
            torch.cuda.synchronize()  # for the clock
        seconds += time.monotonic() - clock
        progress["step"] = progress["online_steps"] = step
        if args.reference == "interval" and step // args.reference_every > before // args.reference_every:
            reference.load_state_dict(actor.state_dict())
        if step // args.eval_every > before // args.eval_every or iteration + 1 == iterations:
            speed = progress["updates_per_second"]["online"] = count / max(seconds, 1e-9)
            explained = 1 - advantage.var() / (advantage + v).var().clamp(min=1e-8)
            logged = values | {"reference_weight": weight, "explained": explained, "updates_per_second": speed}
            logged |= score(keep_best=args.align and args.reference == "best")
            progress["scores"].append([step, logged["score"]])
            run.log("online", step, logged)
            run.save(online=rollout.state())
            seconds, count = 0.0, 0


def train(args, run, data, actor):
    """The method: re-evaluate, fine-tune. `actor` is the offline policy, and becomes the fine-tuned one."""
    progress, device = run.progress, data.rows.device
    torch.manual_seed(args.seed)
    with torch.no_grad():
        actor.log_std.clamp_(max=math.log(args.max_std))
    value = Value(actor.obs_mean, actor.obs_std, (256, 256, 256), nn.Tanh, args.bf16)
    for layer in value.net:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
    nets = {"actor": actor, "reference": deepcopy(actor), "value": value}  # the reference is pi_ref
    nets = {name: net.to(device) for name, net in nets.items()}
    ppo = {"eps": 1e-5, "max_norm": args.max_grad_norm}
    optimizers = {
        "reevaluation": Adam(nets["value"].parameters(), args.reevaluation_lr),
        "actor": Adam(nets["actor"].parameters(), args.policy_lr, **ppo),
        "value": Adam(nets["value"].parameters(), args.critic_lr, **ppo),
    }
    run.restore(nets, optimizers, torch.Generator(device).manual_seed(args.seed))
    updates = make_updates(args, nets, optimizers, data.obs_dim, data.act_dim)
    reevaluate, finetune = (compile_update(update, args) for update in updates)
    envs = [data.make_env() for _ in range(args.eval_episodes)]
    score, reward, scaler = partial(score_actor, args, run, data, envs), data.split(data.rows)[2], None
    if args.scale_rewards:
        scaler = RewardScaler(args.gamma, args.num_envs)
        starts = torch.cat([data.last.new_ones(1), data.last[:-1]])
        scaler.stats.update(discounted_sums(reward, starts, args.gamma).double().cpu().numpy())
        reward = reward / scaler.std()

    def start_values():
        """V, mean over ten start states for each environment, beside what the offline policy obtained in an episode of
        each: V is that of the data's policy, so it should stand still, somewhat lower or, on poor data, far lower."""
        obs = data.to_tensor(np.stack([env.reset(seed=i)[0] for i, env in enumerate(10 * envs)]))
        with torch.no_grad():
            v = nets["value"](obs).mean()
        obtained = progress["discounted_return"] / (scaler.std() if scaler is not None else 1)
        return {"v_start": v.item(), "discounted_return": obtained}

    if progress["stage"] == "start":
        units = {"gamma": args.gamma, "scale": args.reward_scale, "bias": args.reward_bias}
        _, discounted, _ = evaluate(mode_of(actor), envs, args.seed, device, **units)
        progress["discounted_return"] = float(discounted.mean())
        progress["offline_score"], progress["offline_error"] = closing_score(args, actor, data, envs)
        progress["start_score"] = score(keep_best=args.align and args.reference == "best")["score"]
        print(f"offline policy: score {progress['offline_score']:.1f} +- {progress['offline_error']:.1f}", flush=True)
        run.enter("reevaluate")
    if progress["stage"] == "reevaluate":
        if args.reevaluate:
            rows = value_targets(data, reward, args.gamma)
            train_offline(args, run, "reevaluate", args.reevaluation_steps, reevaluate, rows, (1,), start_values)
        run.enter("online")
    train_online(args, run, finetune, data, score, scaler)
    progress["closing_score"], progress["closing_error"] = closing_score(args, actor, data, envs)
    steps = progress["online_steps"]
    save_file(checkpoint(args, data, nets, steps, progress["closing_score"]), run.dir / "model.pt")


ALGORITHM, KIND, SOURCE = "o2o_ppo", "tanh_gaussian", "iql"  # this script, its policy class, who trains one
KINDS = "squashed_gaussian deterministic tanh_gaussian latent decision_transformer"  # what bc.py imitates
RESUMABLE = "reevaluation_steps online_steps compile num_threads track wandb_project_name wandb_entity"
PRIVATE = "stage step episode_start reference_score discounted_return"  # of a run's progress, not in summary.json
RANGES = {
    (-(10**9), 10**9): "reward_bias",
    (0, 1): "gamma gae_lambda clip entropy_weight policy_lr critic_lr reevaluation_lr",
    (0, 10**9): "seed reevaluation_steps online_steps alpha",
    (1, 10**9): "eval_every eval_every_updates eval_episodes rollout epochs minibatch_size batch_size"
    " alignment_steps reference_every",
    (1e-9, 10**9): "reward_scale max_grad_norm max_std",
    (1, 1024): "num_threads num_envs",
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


def score_actor(args, run, data, envs, keep_best=False):
    """-> {"score"} of the actor's mode, from the same start states in every evaluation of a run. With `keep_best` the
    actor becomes pi_ref if it beats every pi_ref so far: interaction, so its steps are counted."""
    progress, actor = run.progress, run.nets["actor"]
    returns, _, steps = evaluate(mode_of(actor), envs, 100_000_000 + 1_000_000 * args.seed, data.rows.device)
    score = data.score(returns.mean())
    if keep_best:
        progress["selection_steps"] += steps
        if score > progress["reference_score"]:
            progress["reference_score"] = score
            run.nets["reference"].load_state_dict(actor.state_dict())
    return {"score": score}


def closing_score(args, policy, data, envs, episodes=50):
    """-> the score over `episodes` or a few more, from start states that only this function uses, the same before and
    after training, and the standard error of that mean."""
    first = 200_000_000 + 1_000_000 * args.seed
    seeds = range(first, first + episodes, len(envs))
    returns = np.concatenate([evaluate(mode_of(policy), envs, seed, data.rows.device)[0] for seed in seeds])
    scores = np.array([data.score(x) for x in returns])
    return float(scores.mean()), float(scores.std() / math.sqrt(len(scores)))


def make_actor(saved, data, bf16):
    """The policy of a checkpoint, for the observations and actions of the data."""
    sizes = torch.zeros(data.obs_dim), torch.ones(data.obs_dim), data.act_dim, saved["policy"]["hidden"]
    actor = TanhGaussianActor(*sizes, bf16=bf16)
    actor.load_state_dict(saved["actor"])
    return actor


def load_actor(args, path, run, data):
    """The offline policy in a checkpoint; if it is of another class, a copy that offline/bc.py teaches to imitate it.
    Raises UserError if the file is missing, broken, or of another environment."""
    saved, copy, bc = load_file(path), run.dir / "imitated.pt", Path(__file__).resolve().parent / "offline/bc.py"
    try:
        kind, origin = saved["policy"]["kind"], f"{saved['algorithm']}, {saved['step']} updates on {saved['dataset']}"
        if saved["format"] != 1 or saved["env_id"].split("-")[0] != args.env_id.split("-")[0]:
            raise UserError(f"{path} is for {saved['env_id']}, in format {saved['format']}; not for {args.env_id}")
        if sum(saved["policy"].get("hidden", ())) > 100_000:
            raise ValueError("absurd sizes")
        if kind == KIND:
            actor = make_actor(saved, data, args.bf16)
            if not all(x.isfinite().all() for x in actor.state_dict().values()) or (actor.obs_std <= 0).any():
                raise UserError(f"{path} holds weights that are not finite, or a std that is not positive")
            print(f"offline policy {path}: {origin}", flush=True)
            return actor
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        sizes = f"{data.obs_dim} observations and {data.act_dim} actions"
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.150}"
        raise UserError(f"{path} holds no policy for {sizes} in format 1 ({reason})") from error
    if kind not in KINDS.split():
        raise UserError(f"{path} holds a policy of kind {kind!r:.40}; those that can be imitated are {KINDS}")
    if path == copy or not bc.exists():
        raise UserError(f"{path} holds a {kind} policy, not a {KIND} one; imitating it takes offline/bc.py beside this")
    flags, folder = {"env-id": args.env_id, "dataset": data.name, "seed": args.seed}, run.dir / "imitation"
    flags |= {"teacher": Path(path).resolve(), "policy": KIND, "output": copy, "run-dir": folder}
    flags = {"resume": folder} if (folder / "args.json").exists() else flags  # this run was cut off while it imitated
    command = [sys.executable, bc, *(f"--{key}={value}" for key, value in flags.items())]
    if not copy.exists():
        save_file(json.dumps({"algorithm": ALGORITHM, **asdict(args)}, indent=1), run.dir / "args.json")  # for --resume
        if subprocess.run(command).returncode:
            (run.dir / "args.json").unlink()
            raise UserError(f"{path} holds a {kind} policy, not a {KIND} one, and offline/bc.py could not imitate it")
    taught = load_file(copy).get("args")
    if not args.resume and (not isinstance(taught, dict) or taught.get("teacher") != str(Path(path).resolve())):
        raise UserError(f"{copy} imitates another policy than {path}; name another --run-dir")
    return load_actor(args, copy, run, data)


def checkpoint(args, data, nets, step, score):
    """The fine-tuned policy, in the format of the offline ones: plain tensors, numbers and strings."""
    sizes = [layer.out_features for layer in nets["actor"].net if isinstance(layer, nn.Linear)]
    origin = {"format": 1, "algorithm": ALGORITHM, "env_id": args.env_id, "dataset": data.name}
    policy = {"policy": {"kind": KIND, "hidden": sizes[:-1]}, "step": step, "score": score}
    weights = {net: {key: x.cpu() for key, x in nets[net].state_dict().items()} for net in ("actor", "value")}
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
    if args.rollout % args.minibatch_size or args.rollout % args.num_envs:
        raise UserError(f"--rollout {args.rollout} is no multiple of --minibatch-size and of --num-envs")
    torch.set_num_threads(args.num_threads)
    if args.cuda and not torch.cuda.is_available():
        raise UserError("--cuda was asked for but torch sees no CUDA device; leave it out to run on the CPU")
    if args.bf16 and not args.cuda and torch.backends.cpu.get_cpu_capability() == "AVX2":
        print("--bf16 is left out: this CPU would be 50 times slower with it", file=sys.stderr)
        args.bf16 = False
    folder = Path(__file__).resolve().parent / "offline/checkpoints" / args.env_id
    files = [folder / f"{name}.pt" for name in (SOURCE, "td3_bc", "bc", "iql", "iql_5")]  # others are imitated
    path = next((file for file in files if file.exists()), files[0])
    shipped = sorted(file.parent.name for file in path.parents[1].glob(f"*/{path.name}"))
    if args.checkpoint is not None:
        path = args.checkpoint = str(Path(args.checkpoint).resolve())  # so that a resumed run finds it from anywhere
    if not Path(path).exists():
        flags = f"--env-id {args.env_id}" + f" --dataset {args.dataset}" * bool(args.dataset)
        hint = f"or name a --checkpoint; {', '.join(shipped)} have one"
        raise UserError(f"no offline policy at {path}; train one with python offline/{SOURCE}.py {flags}, {hint}")
    progress = {"stage": "start", "step": 0, "episode_start": 0, "online_steps": 0, "selection_steps": 0, "scores": []}
    scores = "offline_score offline_error start_score aligned_score closing_score closing_error"
    progress |= dict.fromkeys(scores.split())
    run = Run(args, progress | {"reference_score": -math.inf, "updates_per_second": {}})
    whole = -(-args.online_steps // args.rollout) * args.rollout  # iterations
    if run.progress["online_steps"] > whole:
        raise UserError(f"{run.dir} did {run.progress['online_steps']} --online-steps already; resume it with more")
    data = load_data(args, torch.device("cuda" if args.cuda else "cpu"))
    actor, status = load_actor(args, path, run, data), "failed"
    try:
        train(args, run, data, actor)
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
