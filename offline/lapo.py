"""LAPO: latent-variable advantage-weighted policy optimisation (Chen et al., NeurIPS 2022, arXiv 2203.08949).

A conditional variational autoencoder learns which actions the data contain, those of positive advantage nine times as
much as the rest. A deterministic policy then chooses the latent code, and with it an action, that the critics value
most: it can prefer any mode of the data, but nothing outside them.

    python offline/lapo.py --env-id hopper-medium-v2  # the paper's 1,000,000 updates
    python offline/lapo.py --env-id hopper-medium-v2 --updates 100000 --matmul-precision medium

Five critics and a random pair of them in each target, as fine-tuning needs them; `--num-critics 2` is the original.
Only the autoencoder standardises actions; the critics see them as they are.

Writes a run folder, and `offline/checkpoints/<env_id>/lapo.pt`: policy, autoencoder, V and critics. Optimisers and slow
copies other than the policy's decoder start afresh when `o3f.py` goes on from it.
"""

import difflib
import json
import math
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from minari.storage.datasets_root_dir import get_dataset_path
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "hopper-medium-v2"  # {hopper,walker2d,halfcheetah}-{random,medium{,-replay,-expert},expert}-v2
    seed: int = 1  # the only seed: networks, batches and evaluation derive from it
    exp_name: str = "lapo"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    dataset: str | None = None  # Minari id or D4RL .hdf5 file; None: local Minari dataset o2o/<env_id>, made if missing
    output: str | None = None  # checkpoint to write; None: offline/checkpoints/<env_id>/lapo.pt
    overwrite: bool = False  # replace that checkpoint if it exists
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    updates: int = 1_000_000  # gradient steps
    eval_every: int = 5_000  # gradient steps between evaluations, which are also the points to resume from
    eval_episodes: int = 10  # episodes of one evaluation, all at once
    batch_size: int = 512  # transitions of one gradient step
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak rate of the targets: critics, decoder and policy
    learning_rate: float = 2e-4  # of all networks
    num_critics: int = 5  # of which a random pair makes each target
    kl_weight: float = 1.0  # of the divergence of the latent code from N(0, 1) in the autoencoder's loss
    positive_weight: float = 0.9  # weight of data whose advantage is positive; the rest has 1 minus it
    max_latent: float = 2.0  # largest latent code that the policy can choose
    latent_noise: float = 0.1  # std of the noise on the target policy's code
    latent_clip: float = 0.2  # its largest absolute value

    compile: bool = True  # compile the update into one graph
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # fp32; medium: bf16 products
    num_threads: int = 1  # CPU threads: such small networks get slower, not faster, once threads exceed the free cores


# shared: tasks
class UserError(Exception):
    """Something the user can put right: `run_cli` prints it as one sentence and exits with code 2."""


# D4RL's names: environment, and the two returns that make 0 and 100 points (D4RL's, measured on its own environments)
ENVS = {
    "hopper": ("Hopper-v5", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v5", 1.629008, 4592.3),
    "halfcheetah": ("HalfCheetah-v5", -280.178953, 12135.0),
}
TASKS = [f"{env}-{q}-v2" for env in ENVS for q in ("random", "medium", "medium-replay", "medium-expert", "expert")]


def parse_task(env_id):
    """`hopper-medium-v2` -> (`hopper`, `medium`). Raises UserError for a name that is not in TASKS."""
    if env_id not in TASKS:
        near = difflib.get_close_matches(env_id, TASKS, n=len(TASKS), cutoff=0.0)
        raise UserError(f"unknown task '{env_id}'; known tasks, nearest first: {', '.join(near)}")
    name, quality = env_id.removesuffix("-v2").split("-", 1)
    return name, quality


def normalized_score(env_id, returns):
    """100 * (return - random) / (expert - random), D4RL's points; `returns` a number or an array."""
    _, low, high = ENVS[parse_task(env_id)[0]]
    return 100 * (returns - low) / (high - low)


# end shared


# shared: dataset
class Dataset(NamedTuple):
    """An offline dataset in memory: N transitions of whole episodes. Time limits are not terminations."""

    name: str
    rows: torch.Tensor  # (N, 2 O + A + 2) float32: observation, action, reward, next observation, terminated
    episode: torch.Tensor  # (N,) index of the episode of each row
    returns: np.ndarray  # (E,) undiscounted return of each episode
    obs_dim: int
    act_dim: int
    make_env: Callable[..., gym.Env]  # the environment the data belong to


def split(rows, obs_dim, act_dim):
    """(B, 2 O + A + 2) rows -> obs (B, O), action (B, A), reward (B,), next_obs (B, O), terminated (B,)."""
    obs, action, reward, next_obs, terminated = rows.split([obs_dim, act_dim, 1, obs_dim, 1], dim=-1)
    return obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1)


def read_minari(dataset_id, download):
    """-> episodes [(observations (T+1, O), actions (T, A), rewards (T,), terminations (T,))] and make_env."""
    try:
        data = minari.load_dataset(dataset_id, download=download)
        episodes = [(e.observations, e.actions, e.rewards, e.terminations) for e in data.iterate_episodes()]
    except Exception as error:  # whatever the store or the network raises, the user has to look at the dataset
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read the Minari dataset '{dataset_id}' ({reason}); see `minari list local`") from error
    return episodes, data.recover_environment


def read_d4rl(path, gym_id):
    """The same from a file in D4RL's layout, which has no next state where an episode ends by time limit: that last
    step is dropped. D4RL collected on the environments that gymnasium calls v4."""
    try:
        with h5py.File(path) as file:
            obs, actions, rewards, ends = (file[key][()] for key in ("observations", "actions", "rewards", "terminals"))
            limits = file["timeouts"][()] if "timeouts" in file else np.zeros(len(ends))
    except (OSError, KeyError) as error:
        raise UserError(f"{path} is not a complete HDF5 file in D4RL's layout ({error})") from error
    if not len(obs) == len(actions) == len(rewards) == len(ends) == len(limits):
        raise UserError(f"{path}: observations, actions, rewards, terminals and timeouts differ in length")
    ends, episodes, start = ends.astype(bool), [], 0
    for last in np.flatnonzero(ends | limits.astype(bool) | (np.arange(len(ends)) == len(ends) - 1)):
        if ends[last]:  # the state after a terminal is never used, so any will do
            observations, stop = np.concatenate([obs[start : last + 1], obs[last : last + 1]]), last + 1
        else:
            observations, stop = obs[start : last + 1], last
        if stop > start:
            episodes.append((observations, actions[start:stop], rewards[start:stop], ends[start:stop]))
        start = last + 1
    return episodes, lambda **kwargs: gym.make(gym_id.replace("-v5", "-v4"), **kwargs)


def load_dataset(env_id, dataset=None):
    """`dataset`: a Minari id or a path to a D4RL .hdf5 file; None: the local Minari dataset o2o/<env_id>, which
    offline/collect.py makes if it does not exist. Only an explicit Minari id may touch the network.
    Raises UserError if there is no such dataset or if it does not fit the task."""
    gym_id, low, high = ENVS[parse_task(env_id)[0]]
    name = dataset or f"o2o/{env_id}"
    if name.endswith((".hdf5", ".h5")):
        episodes, make_env = read_d4rl(name, gym_id)
    else:
        if not dataset and not get_dataset_path(name).exists():
            here = Path(__file__).resolve().parent
            collect = next((p for p in (here / "offline/collect.py", here / "collect.py") if p.exists()), None)
            if collect is None:
                raise UserError(f"no dataset {name} here; make it with offline/collect.py or name one with --dataset")
            print(f"{name} does not exist yet, making it with {collect.name}", flush=True)
            if subprocess.run([sys.executable, collect, "--env-id", env_id]).returncode:
                raise UserError(f"{collect} could not make {name}, for the reason above")
        episodes, make_env = read_minari(name, download=dataset is not None)
    if not episodes:
        raise UserError(f"{name} is empty")
    try:
        env = make_env()
    except (ValueError, ImportError, gym.error.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} names no environment that can be made here ({reason}); see README, Data") from error
    if env.spec is None or env.spec.id.split("-v")[0] != gym_id.split("-v")[0]:
        raise UserError(f"{name} belongs to {env.spec and env.spec.id}, {env_id} needs {gym_id.split('-v')[0]}")
    box = env.action_space
    if not hasattr(env.unwrapped, "model") or not ((box.low == -1).all() and (box.high == 1).all()):
        raise UserError(f"{env.spec.id} is not a MuJoCo environment with actions in [-1, 1]; see README, Data")
    obs_dim, act_dim = env.observation_space.shape[0], box.shape[0]
    for observations, actions, rewards, _ in episodes:
        shapes = np.shape(observations)[1:], np.shape(actions)[1:]
        if shapes != ((obs_dim,), (act_dim,)):
            expected = (obs_dim,), (act_dim,)
            raise UserError(f"{name} has observations and actions of shapes {shapes}, {env.spec.id} {expected}")
        if not all(np.isfinite(x).all() for x in (observations, actions, rewards)):
            raise UserError(f"{name} holds NaN or infinite numbers; remove those episodes first")
    blocks = [np.concatenate([o[:-1], a, r[:, None], o[1:], d[:, None]], axis=1) for o, a, r, d in episodes]
    rows = torch.from_numpy(np.concatenate(blocks, dtype=np.float32))
    episode = torch.arange(len(blocks)).repeat_interleave(torch.tensor([len(block) for block in blocks]))
    returns = np.array([rewards.sum() for _, _, rewards, _ in episodes])
    print(
        f"dataset {name}: {len(rows)} transitions, {len(blocks)} episodes, mean return {returns.mean():.0f} "
        f"(score {normalized_score(env_id, returns.mean()):.1f}), environment {env.spec.id}, "
        f"0 points at a return of {low:.0f}, 100 at {high:.0f}",
        flush=True,
    )
    return Dataset(name, rows, episode, returns, obs_dim, act_dim, make_env)


# end shared


# shared: critics
def stacked_matmul(x, weight, bf16):
    """(n, B, I) @ (n, I, O) -> (n, B, O) float32. With `bf16` from rounded inputs and through a rounded result, which
    halves the memory traffic too."""
    return torch.bmm(x.bfloat16(), weight.bfloat16()).float() if bf16 else torch.bmm(x, weight)


class StackedLinear(nn.Module):
    """n linear layers in one batched matmul: (n, B, inputs) -> (n, B, outputs), orthogonal weights of gain 1."""

    def __init__(self, n, inputs, outputs, bf16):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([nn.init.orthogonal_(torch.empty(inputs, outputs)) for _ in range(n)]))
        self.bias = nn.Parameter(torch.zeros(n, 1, outputs))
        self.bf16 = bf16

    def forward(self, x):
        if self.weight.shape[-1] == 1:  # the output stays exact: bf16 can't tell a Q of 250 from one of 251
            return (x * self.weight.transpose(1, 2)).sum(-1, keepdim=True) + self.bias
        return stacked_matmul(x, self.weight, self.bf16) + self.bias


class StackedLayerNorm(nn.Module):
    """Layer normalisation of (n, B, width), with a scale and a shift for each of the n networks."""

    def __init__(self, n, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, 1, width))
        self.bias = nn.Parameter(torch.zeros(n, 1, width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


class Critics(nn.Module):
    """n Q-functions side by side: raw observations (B, O) and actions (B, A) -> Q of shape (n, B)."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden, n=2, layer_norm=False, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        sizes, layers, self.n = [len(obs_mean) + act_dim, *hidden], [], n
        for inputs, outputs in pairwise(sizes):
            norm = [StackedLayerNorm(n, outputs)] if layer_norm else []
            layers += [StackedLinear(n, inputs, outputs, bf16), *norm, nn.ReLU()]
        self.net = nn.Sequential(*layers, StackedLinear(n, sizes[-1], 1, bf16))

    def forward(self, obs, action):
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, action], dim=-1)
        return self.net(x.expand(self.n, *x.shape)).squeeze(-1)


# end shared


# shared: mlp
class HiddenLinear(nn.Linear):
    """nn.Linear from inputs and weights rounded to bf16, and through a rounded result."""

    def forward(self, x):
        return (x.bfloat16() @ self.weight.t().bfloat16()).float() + self.bias


def mlp(sizes, activation, bf16):
    """Linear layers with `activation` between them; `bf16` for the products between hidden ones, where the work is."""
    first, *hidden, last = pairwise(sizes)
    layers = [nn.Linear(*first), activation()]
    for pair in hidden:
        layers += [HiddenLinear(*pair) if bf16 else nn.Linear(*pair), activation()]
    return nn.Sequential(*layers, nn.Linear(*last))


# end shared


# shared: value
class Value(nn.Module):
    """V(s), of a network with `activation` between its layers."""

    def __init__(self, obs_mean, obs_std, hidden, activation, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        self.net = mlp([len(obs_mean), *hidden, 1], activation, bf16)

    def forward(self, obs):
        """(B, O) raw observations -> (B,) return."""
        return self.net((obs - self.obs_mean) / self.obs_std).squeeze(-1)


# end shared


# shared: update_tools
class Scalar(nn.Module):
    """One learned number, with the state_dict that a network has."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(value)))


class Adam:
    """torch.optim.Adam (betas 0.9 and 0.999) as plain tensor operations: torch.optim's own step breaks the compiled
    update into pieces, which costs a quarter of its speed."""

    def __init__(self, params, lr, eps=1e-8, max_norm=None):
        self.params, self.lr, self.eps, self.max_norm = list(params), lr, eps, max_norm
        self.steps = torch.zeros((), device=self.params[0].device)
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.square = [torch.zeros_like(p) for p in self.params]
        for tensor in (self.steps, *self.mean, *self.square):
            torch._dynamo.mark_static_address(tensor)  # CUDA graphs refuse to change other tensors in place

    def minimize(self, loss, scale=1.0):
        """One step on a scalar loss, at `scale` times the learning rate. Only this optimiser's parameters get
        gradients, so the critics' weights stay out of the actor's graph. autograd.grad and not loss.backward(): the
        latter does nothing inside torch.compile."""
        grads = torch.autograd.grad(loss, self.params)
        with torch.no_grad():
            if self.max_norm is not None:
                norm = torch.stack(torch._foreach_norm(grads)).norm()
                grads = torch._foreach_mul(grads, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
            self.steps += 1
            torch._foreach_lerp_(self.mean, grads, 0.1)
            torch._foreach_mul_(self.square, 0.999)
            torch._foreach_addcmul_(self.square, grads, grads, 0.001)
            root = torch._foreach_div(torch._foreach_sqrt(self.square), (1 - 0.999**self.steps).sqrt())
            step = torch._foreach_div(self.mean, torch._foreach_add(root, self.eps))
            torch._foreach_sub_(self.params, torch._foreach_mul(step, self.lr * scale / (1 - 0.9**self.steps)))

    def state_dict(self):
        return {"state": [self.steps, *self.mean, *self.square]}

    def load_state_dict(self, saved):
        for mine, value in zip(self.state_dict()["state"], saved["state"], strict=True):
            mine.copy_(value)


@torch.no_grad()
def polyak(target, source, tau):
    """target <- (1 - tau) * target + tau * source, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


@cache
def can_compile():
    """Is there a C++ compiler? Says so once if not."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        print("no C++ compiler found: updates run uncompiled, about a third slower", file=sys.stderr)
        return False
    torch._dynamo.config.trace_autograd_ops = True  # lets torch.autograd.grad stay inside the graph
    return True


def compile_update(update, enabled, device):
    """The whole update as one graph (CUDA graphs on a GPU); with `enabled` False the same function as it stands."""
    if not (enabled and can_compile()):
        return update
    mode = "reduce-overhead" if torch.device(device).type == "cuda" else "default"
    return torch.compile(update, mode=mode, fullgraph=True)


# end shared


# shared: value_target
def value_target(reward, terminated, next_value, gamma):
    """y = r + gamma (1 - d) V(s'); all (B,), in units of (scaled) return."""
    return reward + gamma * (1 - terminated) * next_value


# end shared


# shared: lapo
class Standardised(nn.Module):
    """A ReLU network of an input that is standardised first."""

    def __init__(self, mean, std, hidden, outputs, bf16):
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.net = mlp([len(mean), *hidden, outputs], nn.ReLU, bf16)

    def forward(self, *inputs):
        return self.net((torch.cat(inputs, dim=-1) - self.mean) / self.std)


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
        """The action, not clipped, of the code max_latent tanh(latent(s)) + noise (B, L), kept within max_latent."""
        code = self.max_latent * torch.tanh(latent(obs)) + noise
        return self.decoder.action(obs, code.clamp(-self.max_latent, self.max_latent))

    def mode(self, obs):
        """-> the action (B, A) in [-1, 1]."""
        return self.act(obs, self.latent).clamp(-1, 1)


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


def make_lapo_update(args, nets, value_range, obs_dim, act_dim):
    """-> the optimisers, and update(rows (B, 2 O + A + 2) with scaled rewards, noise (2, B, 2 A) standard normal,
    pair (2,) indices of critics), which changes all `nets` in place. value_range: a tensor of the least and the
    greatest value that V may be asked for."""
    encoder, decoder, policy, latent_target = (nets[k] for k in ("encoder", "decoder", "policy", "latent_target"))
    value, critics, targets = nets["value"], nets["critics"], nets["targets"]
    parts = {"latent": policy.latent.parameters(), "value": value.parameters(), "critics": critics.parameters()}
    parts["autoencoder"] = [*encoder.parameters(), *decoder.parameters()]
    optimizers = {key: Adam(parameters, args.learning_rate) for key, parameters in parts.items()}

    def update(rows, noise, pair):
        obs, action, reward, next_obs, terminated = split(rows, obs_dim, act_dim)
        with torch.no_grad():
            target = value_target(reward, terminated, value(next_obs), args.gamma)
            code_noise = (args.latent_noise * noise[0]).clamp(-args.latent_clip, args.latent_clip)
            both, noises = torch.cat([obs, next_obs]), torch.cat([code_noise, torch.zeros_like(code_noise)])
            action_of_both = policy.act(both, latent_target, noises)
            q_now, q_next = targets(both, action_of_both)[pair].amin(0).chunk(2)  # the noise smooths V alone
            advantage = value_target(reward, terminated, q_next, args.gamma) - value(obs)
            weight = advantage_weight(advantage, args.positive_weight)
        v = value(obs)
        value_loss = ((v - q_now.clamp(value_range[0], value_range[1])) ** 2).mean()
        optimizers["value"].minimize(value_loss)
        q = critics(obs, action)
        critic_loss = ((q - target) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(critic_loss)
        q_policy = critics(obs, policy.act(obs, policy.latent)).mean()
        optimizers["latent"].minimize(-q_policy)
        mean, log_std = encoder(obs, action)
        reconstruction = decoder(obs, mean + log_std.exp() * noise[1])
        standardised = (action - decoder.act_mean) / decoder.act_std
        loss = autoencoder_loss(reconstruction, standardised, mean, log_std, weight, args.kl_weight)
        optimizers["autoencoder"].minimize(loss)
        polyak(targets, critics, args.tau)
        polyak(policy.decoder, decoder, args.tau)
        polyak(latent_target, policy.latent, args.tau)
        values = {"value_loss": value_loss, "critic_loss": critic_loss, "autoencoder_loss": loss, "q_mean": q.mean()}
        values |= {"v_mean": v.mean(), "q_policy": q_policy, "positive": (advantage > 0).float().mean()}
        return {key: value.detach() for key, value in values.items()}

    return optimizers, update


# end shared


def reward_scale(rewards):
    """What rewards are multiplied by: 1 / the largest one. Raises UserError if none is positive."""
    largest = float(rewards.max())
    if largest <= 0:
        raise UserError(f"the largest reward of the dataset is {largest}: LAPO's scale of rewards needs a positive one")
    return 1 / largest


# shared: evaluate
@torch.no_grad()
def evaluate(policy, envs, seed, device, gamma=1.0, alpha=0.0):
    """One episode in each of `envs`, all at once; `policy` maps obs (n, O) and noise (n, A) to actions (n, A) and their
    log_prob (n,). Start states and noise come from `seed` alone: no random number of training is drawn. -> mean return,
    mean of sum gamma^t (r - alpha log_prob), and the environment steps of all episodes together."""
    generator = torch.Generator().manual_seed(seed)
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, discounted, alive, steps, discount = np.zeros(len(envs)), np.zeros(len(envs)), np.arange(len(envs)), 0, 1.0
    while len(alive):
        noise = torch.randn(len(envs), envs[0].action_space.shape[0], generator=generator)[alive].to(device)
        actions, log_prob = policy(torch.as_tensor(obs[alive], dtype=torch.float32, device=device), noise)
        actions, bonus = actions.cpu().numpy(), -alpha * log_prob.cpu().numpy()
        running = np.ones(len(alive), dtype=bool)
        for k, i in enumerate(alive):
            obs[i], reward, terminated, truncated, _ = envs[i].step(actions[k])
            returns[i] += reward
            discounted[i] += discount * (reward + bonus[k])
            running[k] = not (terminated or truncated)
        steps, alive, discount = steps + len(alive), alive[running], discount * gamma
    return returns.mean(), discounted.mean(), steps


def mode_of(policy):
    """The policy that executes the most likely action, for evaluate."""
    return lambda obs, noise: (policy.mode(obs), torch.zeros(len(obs)))


# end shared


# shared: files
def save_file(payload, path):
    """torch.save that never leaves half a file: written beside `path`, then renamed. Raises UserError if it fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(payload, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); the previous file, if any, is unchanged") from error


def write_json(payload, path):
    """Never leaves half a file either."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(payload, indent=1))
    os.replace(temporary, path)


def load_file(path, device):
    """torch.load of tensors, numbers and strings only. Raises UserError if the file is missing or broken."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is incomplete or no checkpoint of ours ({type(error).__name__})") from error


def versions():
    """Of the packages that decide what a run computes."""
    return {m.__name__: str(m.__version__) for m in (torch, np, gym, mujoco, minari)}


# end shared


# shared: run_folder
class Run:
    """The run folder and everything that makes a run resumable. `progress` holds plain numbers, strings and lists."""

    def __init__(self, args, algorithm, progress):
        default = f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir, saved = Path(args.resume or args.run_dir or default), None
        if args.resume and (self.dir / "resume.pt").exists():
            saved = load_file(self.dir / "resume.pt", "cpu")
        elif not args.resume and (self.dir / "args.json").exists():
            raise UserError(f"{self.dir} holds a run already; continue it with --resume or name another --run-dir")
        self.dir.mkdir(parents=True, exist_ok=True)
        write_json({"algorithm": algorithm, **asdict(args)}, self.dir / "args.json")
        self.metrics = open(self.dir / "metrics.jsonl", "a")
        self.metrics.truncate(saved["metrics_bytes"] if saved else 0)  # rows after resume.pt will be written again
        self.progress, self.saved = saved["progress"] if saved else progress, saved
        self.started = time.time() - (saved["seconds"] if saved else 0)
        self.nets, self.optimizers, self.generator = {}, {}, None
        self.board, self.wandb = SummaryWriter(self.dir / "tensorboard"), None
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": self.dir.name}
            self.wandb = wandb.init(**names, config=asdict(args))

    def restore(self, nets, optimizers, generator):
        """Names what resume.pt holds, and loads it when this run continues one."""
        self.nets, self.optimizers, self.generator = nets, optimizers, generator
        if self.saved:
            for kind, parts in (("nets", nets), ("optimizers", optimizers)):
                for key, part in parts.items():
                    part.load_state_dict(self.saved[kind][key])
            generator.set_state(self.saved["generator"])

    def save(self, **extra):
        """Writes resume.pt. `extra`: what the current stage needs beyond networks, optimisers and progress."""
        parts = {"nets": self.nets, "optimizers": self.optimizers}
        state = {kind: {key: part.state_dict() for key, part in parts[kind].items()} for kind in parts}
        state |= {"generator": self.generator.get_state(), "progress": self.progress, **extra}
        position = {"metrics_bytes": self.metrics.tell(), "seconds": time.time() - self.started}
        save_file({**state, **position}, self.dir / "resume.pt")

    def finite(self, stage, step, values):
        """-> `values` as plain numbers. Raises UserError if one is not finite; resume.pt keeps the last good state."""
        values = {key: float(value) for key, value in values.items()}
        for key, value in values.items():
            if not math.isfinite(value):
                message = f"{stage}/{key} is not finite at step {step}; {self.dir}/resume.pt keeps the last good state"
                raise UserError(f"{message}, lower the learning rates or check the data")
        return values

    def log(self, stage, step, values):
        """One row of metrics.jsonl."""
        values = {f"{stage}/{key}": value for key, value in self.finite(stage, step, values).items()}
        for key, value in values.items():
            self.board.add_scalar(key, value, step)
        self.metrics.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self.metrics.flush()
        if self.wandb:
            self.wandb.log({**values, f"{stage}/step": step})


def stored_args(folder, algorithm):
    """The arguments of the run in `folder`. Raises UserError if there is none or if it is another algorithm's."""
    path = Path(folder) / "args.json"
    if not path.exists():
        raise UserError(f"nothing to resume: {path} does not exist")
    try:
        stored = json.loads(path.read_text())
        if stored.pop("algorithm") != algorithm:
            raise UserError(f"{folder} is not a run of {algorithm}; resume it with the script that started it")
        return Args(**{**stored, "resume": str(folder)})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged or of another version of this script ({error})") from error


def run_cli(main, algorithm):
    """Runs main(args) on the command line; a UserError becomes one sentence on stderr and exit code 2. With --resume
    the stored arguments are the defaults, and the command line still wins."""
    try:
        args = tyro.cli(Args)
        main(tyro.cli(Args, default=stored_args(args.resume, algorithm)) if args.resume else args)
    except (UserError, OSError) as error:  # OSError: no space left, no permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def pick_device(cuda):
    if cuda and not torch.cuda.is_available():
        raise UserError("--cuda was asked for but torch sees no CUDA device; leave it out to run on the CPU")
    return torch.device("cuda" if cuda else "cpu")


# end shared


# shared: offline_summary
def write_offline_summary(run, args, data_name, algorithm, status):
    """summary.json from run.progress: at every evaluation with status `unfinished`, at the end `complete`."""
    summary = {"env_id": args.env_id, "dataset": data_name, "algorithm": algorithm, "seed": args.seed, **run.progress}
    summary |= {"wall_seconds": time.time() - run.started, "versions": versions(), "status": status}
    write_json(summary, run.dir / "summary.json")


# end shared


def export(args, nets, scale, data, step, score):
    """The checkpoint that fine-tuning loads: the offline objective goes on online. Slow copies are left out."""
    kept = {key: net for key, net in nets.items() if key not in ("policy", "targets", "latent_target")}
    return {
        "format": 1,
        "algorithm": "lapo",
        "env_id": args.env_id,
        "dataset": data.name,
        "policy": {"kind": "latent", "hidden": [256] * 3, "latent_dim": 2 * data.act_dim},
        "max_latent": args.max_latent,
        "actor": {name: value.cpu() for name, value in nets["policy"].state_dict().items()},
        **{key: {name: value.cpu() for name, value in net.state_dict().items()} for key, net in kept.items()},
        "num_critics": args.num_critics,
        "reward_scale": scale,
        "step": step,
        "score": score,
        "args": asdict(args),
        "versions": versions(),
    }


def main(args: Args):
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    parse_task(args.env_id)
    output = Path(args.output or Path(__file__).resolve().parent / "checkpoints" / args.env_id / "lapo.pt")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists; pass --overwrite to replace it or --output to write elsewhere")
    device = pick_device(args.cuda)
    data = load_dataset(args.env_id, args.dataset)
    run = Run(args, "lapo", {"step": 0, "score": None, "scores": [], "updates_per_second": None})
    obs_dim, act_dim, rows = data.obs_dim, data.act_dim, data.rows.to(device, copy=True)
    reward = rows[:, obs_dim + act_dim]
    scale = reward_scale(reward)
    reward *= scale  # a view of rows
    value_range = torch.tensor(return_range(reward, args.gamma), device=device)
    obs, action = data.rows[:, :obs_dim], data.rows[:, obs_dim : obs_dim + act_dim]
    obs_stats, act_stats = ((x.mean(0), x.std(0) + 1e-3) for x in (obs, action))
    envs = [data.make_env() for _ in range(args.eval_episodes)]

    torch.manual_seed(args.seed)
    bf16, hidden, sizes = args.matmul_precision == "medium", [256] * 3, (obs_stats, act_stats, 2 * act_dim)
    nets = {"encoder": Encoder(*sizes, hidden, bf16), "decoder": Decoder(*sizes, hidden, bf16)}
    nets["policy"] = LatentPolicy(*sizes, hidden, args.max_latent, bf16)
    nets["policy"].decoder.load_state_dict(nets["decoder"].state_dict())
    nets |= {"critics": Critics(*obs_stats, act_dim, hidden, n=args.num_critics, bf16=bf16)}
    nets |= {"latent_target": deepcopy(nets["policy"].latent), "targets": deepcopy(nets["critics"])}
    nets |= {"value": Value(*obs_stats, hidden, nn.ReLU, bf16)}
    nets = {name: net.to(device) for name, net in nets.items()}
    optimizers, update = make_lapo_update(args, nets, value_range, obs_dim, act_dim)
    update, generator = compile_update(update, args.compile, device), torch.Generator(device).manual_seed(args.seed)
    run.restore(nets, optimizers, generator)

    first, clock, counted = run.progress["step"], time.time(), 0
    for step in tqdm(range(first + 1, args.updates + 1), desc="lapo", unit="update", disable=None):
        batch = rows[torch.randint(len(rows), (args.batch_size,), generator=generator, device=device)]
        noise = torch.randn(2, args.batch_size, 2 * act_dim, generator=generator, device=device)
        pair = torch.randperm(args.num_critics, generator=generator, device=device)[:2]
        values = update(batch, noise, pair)
        counted += 1
        if step % args.eval_every and step != args.updates:
            continue
        values = run.finite("offline", step, values)
        values["updates_per_second"] = counted / (time.time() - clock)
        seed = 10_000_000 * args.seed + step * args.eval_episodes
        mean_return, _, _ = evaluate(mode_of(nets["policy"]), envs, seed, device)
        values["score"] = float(normalized_score(args.env_id, mean_return))
        run.log("offline", step, values)
        print(f"lapo {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
        run.progress |= {"step": step} | {key: values[key] for key in ("score", "updates_per_second")}
        run.progress["scores"].append([step, values["score"]])
        save_file(export(args, nets, scale, data, step, values["score"]), run.dir / "model.pt")
        run.save()
        write_offline_summary(run, args, data.name, "lapo", "unfinished")
        clock, counted = time.time(), 0
    save_file(export(args, nets, scale, data, run.progress["step"], run.progress["score"]), output)
    write_offline_summary(run, args, data.name, "lapo", "complete")
    print(f"{output}: {run.progress['step']} updates, score {run.progress['score']:.1f}")


if __name__ == "__main__":
    run_cli(main, "lapo")
