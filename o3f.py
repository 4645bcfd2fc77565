"""O3F: fine-tuning offline policies with optimistic action selection (ICLR 2023 submission).

The offline algorithm goes on unchanged, LAPO or IQL, on a buffer that starts as the offline data and grows. Only the
action that is executed changes: of many candidates near the policy's own, the one that an ensemble of critics values
most, plus omega of its standard deviations.

    a ~ pi(a|s);  c_i ~ N(a, sigma^2), i = 1..N;  execute argmax_i Q_mean(s,c_i) + omega Q_std(s,c_i)     best_candidate

    python o3f.py --env-id hopper-medium-v2  # on LAPO, 20 updates a step as in the paper: slow on a CPU
    python o3f.py --env-id hopper-medium-v2 --online-steps 20000 --updates-per-step 1  # the same, one update a step
    python o3f.py --env-id hopper-medium-v2 --base iql  # on IQL with five critics
    python o3f.py --base iql --no-optimism  # the baseline: the same algorithm with Gaussian noise of the same sigma

Only for offline algorithms that do not push their critics down outside the data, since there the best candidate would
be the policy's own action: a CQL checkpoint is refused.

Blocks between `# shared:` and `# end shared` (tasks, data, the two offline algorithms, files, plots) are the same in
every script. The method is the rest: from candidates_near to train.
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
import imageio
import matplotlib.pyplot as plt
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
    base: Literal["lapo", "iql"] = "lapo"  # the offline algorithm that goes on
    seed: int = 1  # the only seed: batches, candidates, training and evaluation environments derive from it
    exp_name: str = "o3f"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    capture_video: bool = False  # film an episode of the offline and the final policy
    dataset: str | None = None  # Minari id or D4RL .hdf5 file; None: local Minari dataset o2o/<env_id>, made if missing
    checkpoint: str | None = None  # policy and critics; None: offline/checkpoints/<env_id>/lapo.pt or iql_5.pt
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    online_steps: int | None = None  # environment steps; None: LAPO 1,000, IQL 50,000 (paper: 100,000)
    optimism: bool = True  # choose among candidates; off: the policy's action with Gaussian noise of std sigma
    sigma: float = 0.2  # std of the candidates around the policy's action (paper: 0.05 outside locomotion)
    num_candidates: int = 100  # N
    omega: float = 0.0  # weight of the ensemble's standard deviation
    updates_per_step: int | None = None  # updates of all networks per environment step; None: LAPO 20, IQL 1
    offline_data: Literal["half", "all", "none", "part"] = "all"  # batches from one buffer that starts with all the
    # offline data, its best 50 episodes (part) or nothing (none); or half offline and half online
    eval_every: int | None = None  # environment steps between evaluations; None: LAPO 100, IQL 1,000
    eval_episodes: int = 10  # episodes of one evaluation, all at once

    batch_size: int | None = None  # transitions of one gradient step; None: as in the offline training
    gamma: float | None = None  # discount; None, here and below: as in the offline training
    tau: float | None = None  # Polyak rate of the targets
    learning_rate: float | None = None  # of all networks, IQL's policy included: its offline decay is not continued
    expectile: float | None = None  # IQL: of Q over the data's actions, which V is
    temperature: float | None = None  # IQL: weight of the advantage in the imitation
    max_weight: float | None = None  # IQL: largest weight of an imitated action
    kl_weight: float | None = None  # LAPO: of the divergence of the latent code from N(0, 1)
    positive_weight: float | None = None  # LAPO: weight of data whose advantage is positive; the rest has 1 minus it
    latent_noise: float | None = None  # LAPO: std of the noise on the target policy's code
    latent_clip: float | None = None  # LAPO: its largest absolute value

    compile: bool = True  # compile the update and the choice of actions into one graph each
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


def fill_defaults(args):
    """Settings that depend on the offline algorithm."""
    lapo = args.base == "lapo"
    defaults = {"online_steps": (1_000, 50_000), "updates_per_step": (20, 1), "eval_every": (100, 1_000)}
    for name, (for_lapo, for_iql) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, for_lapo if lapo else for_iql)
    if args.checkpoint is None:
        folder = Path(__file__).resolve().parent / "offline/checkpoints" / args.env_id
        args.checkpoint = str(folder / ("lapo.pt" if lapo else "iql_5.pt"))


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


# shared: tanh_gaussian
class TanhGaussianActor(nn.Module):
    """a ~ N(tanh(net(s)), std^2), clipped to the box: IQL's policy. With a std that is set, a deterministic one too."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden, std, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        self.net = mlp([len(obs_mean), *hidden, act_dim], nn.ReLU, bf16)
        self.log_std = nn.Parameter(torch.full((act_dim,), math.log(std)))

    def forward(self, obs):
        """(B, O) raw observations -> mean (B, A) and log_std (A,), the same in every state."""
        return torch.tanh(self.net((obs - self.obs_mean) / self.obs_std)), self.log_std.clamp(-20, 2)

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


# shared: iql
def expectile_loss(advantage, expectile):
    """Eq. 5 of the paper: E[ |expectile - 1(A < 0)| A^2 ], A = min_j Q_j(s,a) - V(s), (B,). Its minimum over V is the
    expectile of Q: values above V count `expectile`, those below 1 - expectile."""
    return ((expectile - (advantage < 0).float()).abs() * advantage**2).mean()


def policy_loss(log_prob, advantage, temperature, max_weight):
    """Eq. 7: -E[ min(exp(temperature A), max_weight) log pi(a|s) ] over the data's actions; (B,) twice."""
    return -((temperature * advantage).exp().clamp(max=max_weight) * log_prob).mean()


def make_iql_update(args, nets, obs_dim, act_dim):
    """-> the optimisers, and update(rows (B, 2 O + A + 2) with scaled rewards, policy_scale), which changes all `nets`
    in place; policy_scale, a tensor, multiplies the policy's learning rate."""
    actor, value, critics, targets = (nets[key] for key in ("actor", "value", "critics", "targets"))
    optimizers = {key: Adam(nets[key].parameters(), args.learning_rate) for key in ("actor", "value", "critics")}

    def update(rows, policy_scale):
        obs, action, reward, next_obs, terminated = split(rows, obs_dim, act_dim)
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
        log_prob = gaussian_log_prob(*actor(obs), action)
        loss = policy_loss(log_prob, advantage.detach(), args.temperature, args.max_weight)
        optimizers["actor"].minimize(loss, policy_scale)
        values = {"value_loss": value_loss, "critic_loss": critic_loss, "policy_loss": loss, "q_mean": q.mean()}
        values |= {"v_mean": v.mean(), "std": actor.log_std.exp().mean()}
        return {key: value.detach() for key, value in values.items()}

    return optimizers, update


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


INHERITED = ("gamma", "tau", "learning_rate", "batch_size", "expectile", "temperature", "max_weight")
INHERITED += ("kl_weight", "positive_weight", "latent_noise", "latent_clip")


def load_base(path, args, obs_dim, act_dim, bf16):
    """The offline algorithm in a checkpoint -> its networks, the checkpoint; fills what `args` inherits from it. Slow
    copies start equal to what they follow. Raises UserError if the file is missing, broken, of another algorithm,
    environment or size, or if its critics cannot be optimistic."""
    saved = load_file(path, "cpu")
    try:
        algorithm, origin, version, settings = (saved[key] for key in ("algorithm", "env_id", "format", "args"))
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a checkpoint of format 1: {error} is missing") from error
    if version != 1:
        raise UserError(f"{path} has format {version}; this script reads format 1")
    if algorithm == "cql":
        reason = "CQL pushes the critics down outside the data, so that no candidate could beat the policy's own action"
        raise UserError(f"{path} comes from CQL: {reason}; take a checkpoint of offline/{args.base}.py")
    if algorithm != args.base:
        raise UserError(f"{path} comes from {algorithm}, --base {args.base} needs one of offline/{args.base}.py")
    if origin.split("-")[0] != args.env_id.split("-")[0]:
        raise UserError(f"{path} was trained on {origin}, not on {args.env_id}; choose another --checkpoint")
    try:
        value, hidden, count = saved["value"], saved["policy"]["hidden"], saved["num_critics"]
        stats = value["obs_mean"], value["obs_std"]
        if len(stats[0]) != obs_dim:
            raise UserError(f"{path} expects {len(stats[0])} observations, the data have {obs_dim}")
        if count < 2:
            raise UserError(f"{path} has {count} critic; optimism needs an ensemble of 2 or more")
        nets = {"critics": Critics(*stats, act_dim, hidden, n=count, bf16=bf16)}
        nets["value"] = Value(*stats, hidden, nn.ReLU, bf16)
        if args.base == "iql":
            nets["policy"] = TanhGaussianActor(*stats, act_dim, hidden, 1.0, bf16)
        else:
            sizes = stats, (torch.zeros(act_dim), torch.ones(act_dim)), saved["policy"]["latent_dim"], hidden
            nets |= {"encoder": Encoder(*sizes, bf16), "decoder": Decoder(*sizes, bf16)}
            nets["policy"] = LatentPolicy(*sizes, saved["max_latent"], bf16)
        for key, net in nets.items():
            net.load_state_dict(saved["actor" if key == "policy" else key])
    except KeyError as error:
        raise UserError(f"{path} is not a complete checkpoint of offline/{args.base}.py: no {error}") from error
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit {args.base} with {act_dim} actions") from error
    nets["targets"] = deepcopy(nets["critics"])
    if args.base == "lapo":
        nets["latent_target"] = deepcopy(nets["policy"].latent)
    for name in INHERITED:
        if getattr(args, name) is None:
            setattr(args, name, settings.get(name))
    print(f"offline policy {path}: {algorithm}, {saved['step']} updates on {saved['dataset']}, {count} critics")
    return nets, saved


def candidates_near(action, noise, sigma):
    """c_i = clip(a + sigma * noise_i): action (1, A), noise (N, A) standard normal -> (N, A) in the box [-1, 1]."""
    return (action + sigma * noise).clamp(-1, 1)


def best_candidate(q, candidates, omega):
    """argmax_i Q_mean + omega Q_std over the ensemble, std with 1/m: q (m, N) return, candidates (N, A) -> (1, A)."""
    return candidates[(q.mean(0) + omega * q.std(0, correction=0)).argmax().unsqueeze(0)]


def make_act(args, nets):
    """-> act(obs (1, O), own_noise (1, A), noise (N, A)), the executed action (1, A). own_noise is that of IQL's
    Gaussian policy; LAPO's is deterministic."""
    policy, critics = nets["policy"], nets["critics"]

    def act(obs, own_noise, noise):
        with torch.no_grad():
            action = policy.sample(obs, own_noise)[0] if args.base == "iql" else policy.mode(obs)
            candidates = candidates_near(action, noise, args.sigma)
            if not args.optimism:
                return candidates  # a single one
            return best_candidate(critics(obs.expand(len(candidates), -1), candidates), candidates, args.omega)

    return act


def make_update(args, nets, value_range, obs_dim, act_dim):
    """-> the optimisers, and update(rows, noise, pair) of the offline algorithm, unchanged."""
    if args.base == "lapo":
        return make_lapo_update(args, nets, value_range, obs_dim, act_dim)
    optimizers, iql_update = make_iql_update(args, {**nets, "actor": nets["policy"]}, obs_dim, act_dim)
    constant_rate = torch.ones((), device=next(nets["policy"].parameters()).device)
    return optimizers, lambda rows, noise, pair: iql_update(rows, constant_rate)


# shared: online_data
def offline_part(data, part):
    """The rows that the online buffer starts with: all, or with `part` those of the best 50 episodes."""
    best = torch.from_numpy(np.argsort(data.returns)[-50:].copy())
    return data.rows[torch.isin(data.episode, best)] if part == "part" else data.rows


def online_buffer(run, args, data):
    """-> rows (N + online_steps, 2 O + A + 2), offline ones first, then those that a resumed run had; and N. Raises
    UserError if that run did more than online_steps already."""
    offline = offline_part(data, args.offline_data)
    buffer, first = torch.cat([offline, torch.zeros(args.online_steps, offline.shape[1])]), len(offline)
    if run.saved and "online" in run.saved:
        done = run.saved["online"]
        if len(done) > args.online_steps:
            raise UserError(f"{run.dir} did {len(done)} environment steps already; resume it with at least as many")
        buffer[first : first + len(done)] = done
    return buffer, first


def draw_batches(args, generator, first, last, count, device):
    """Indices (count, batch_size) into a buffer whose rows [0, first) are offline and [first, last) online data."""
    half = args.batch_size // 2
    parts = [(0, last, args.batch_size)]
    if args.offline_data == "half":
        parts = [(0, first, half), (first, last, args.batch_size - half)]
    if args.offline_data == "none":
        parts = [(first, last, args.batch_size)]
    return torch.cat([torch.randint(a, b, (count, n), generator=generator, device=device) for a, b, n in parts], dim=1)


# end shared


def train(args, run, data, nets, saved, device):
    """Acts optimistically and goes on with the offline algorithm."""
    progress, scale = run.progress, saved["reward_scale"]
    torch.manual_seed(args.seed)
    nets = {name: net.to(device) for name, net in nets.items()}
    (buffer, first), reward_column = online_buffer(run, args, data), data.obs_dim + data.act_dim
    buffer = buffer.to(device)
    buffer[:first, reward_column] *= scale  # what a resumed run had is scaled already
    value_range = torch.tensor(return_range(buffer[:, reward_column], args.gamma), device=device)
    optimizers, update = make_update(args, nets, value_range, data.obs_dim, data.act_dim)
    generator = torch.Generator(device).manual_seed(args.seed)
    run.restore(nets, optimizers, generator)
    update = compile_update(update, args.compile, device)
    act = compile_update(make_act(args, nets), args.compile, device)
    env, envs = data.make_env(), [data.make_env() for _ in range(args.eval_episodes)]

    def score_of(step):
        seed = 10_000_000 * args.seed + 1_000_000 * (step > 0) + step * args.eval_episodes
        mean_return, _, _ = evaluate(mode_of(nets["policy"]), envs, seed, device)
        return float(normalized_score(args.env_id, mean_return))

    def film(name):
        if args.capture_video:
            record_video(nets["policy"].mode, data.make_env, run.dir / "videos" / f"{name}.mp4", args.seed, device)

    if progress["stage"] == "start":
        progress["offline_score"], progress["stage"] = score_of(0), "online"
        print(f"offline policy: score {progress['offline_score']:.1f}", flush=True)
        film("offline")
        run.save()
    obs, _ = env.reset(seed=args.seed)
    if run.saved and "online" in run.saved:
        set_env_state(env, run.saved["env"])
        obs = run.saved["obs"].numpy()
    seconds, counted, candidates = 0.0, 0, args.num_candidates if args.optimism else 1
    for step in tqdm(range(progress["step"] + 1, args.online_steps + 1), desc="online", unit="step", disable=None):
        noise = torch.randn(1 + candidates, data.act_dim, generator=generator, device=device)
        obs_tensor = torch.as_tensor(obs[None], dtype=torch.float32, device=device)
        action = act(obs_tensor, noise[:1], noise[1:])[0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        row = np.concatenate([obs, action, [reward * scale], next_obs, [terminated]])
        buffer[first + step - 1] = torch.as_tensor(row, dtype=torch.float32)
        low, high = return_range(buffer[first + step - 1, reward_column], args.gamma)
        value_range[0].clamp_(max=low)  # a reward beyond those of the data widens what values are possible
        value_range[1].clamp_(min=high)
        progress["episode_return"] += float(reward)
        if terminated or truncated:
            progress["acting_returns"].append(progress["episode_return"])
            progress["episode_return"] = 0.0
        obs = env.reset()[0] if terminated or truncated else next_obs

        clock = time.time()
        index = draw_batches(args, generator, first, first + step, args.updates_per_step, device)
        noises = torch.randn(
            args.updates_per_step, 2, args.batch_size, 2 * data.act_dim, generator=generator, device=device
        )
        for i in range(args.updates_per_step):
            pair = torch.randperm(saved["num_critics"], generator=generator, device=device)[:2]
            values = update(buffer[index[i]], noises[i], pair)
        if device.type == "cuda":
            torch.cuda.synchronize()  # for the clock; the next action would wait for the updates anyway
        counted, seconds = counted + args.updates_per_step, seconds + time.time() - clock
        progress["step"] = progress["online_steps"] = step
        if step % args.eval_every and step != args.online_steps:
            continue
        row = run.finite("online", step, values)
        if progress["acting_returns"]:  # of the actions as they were executed, in the episodes that ended meanwhile
            row["score_acting"] = float(normalized_score(args.env_id, np.mean(progress["acting_returns"])))
            row["episodes"] = len(progress["acting_returns"])
            progress["acting_returns"] = []
        score = score_of(step)
        progress["scores"].append([step, score])
        progress["updates_per_second"]["online"] = row["updates_per_second"] = counted / seconds
        report(run, "online", step, {"score": score} | row)
        run.save(online=buffer[first : first + step].cpu().clone(), obs=torch.from_numpy(obs), env=env_state(env))
        seconds, counted = 0.0, 0
    film("final")
    save_file(export(args, data, nets, saved, progress), run.dir / "model.pt")


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


# shared: env_state
def env_state(env):
    """Everything that the next env.step depends on: MuJoCo's state, the time limit's counter, the random state."""
    base, kind = env.unwrapped, mujoco.mjtState.mjSTATE_INTEGRATION
    physics = np.zeros(mujoco.mj_stateSize(base.model, kind))
    mujoco.mj_getState(base.model, base.data, physics, kind)
    elapsed = env.get_wrapper_attr("_elapsed_steps")
    return {"physics": torch.from_numpy(physics), "elapsed": elapsed, "rng": base.np_random.bit_generator.state}


def set_env_state(env, saved):
    """The inverse of env_state, on an environment that has been reset once."""
    base = env.unwrapped
    mujoco.mj_setState(base.model, base.data, saved["physics"].numpy(), mujoco.mjtState.mjSTATE_INTEGRATION)
    env.set_wrapper_attr("_elapsed_steps", saved["elapsed"])
    base.np_random.bit_generator.state = saved["rng"]


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


# shared: summary
def write_summary(run, args, data_name, algorithm, status):
    """summary.json from run.progress; -> the summary. Scores are D4RL's points, `scores` [environment step, score]."""
    progress, scores = run.progress, [score for _, score in run.progress["scores"]]
    early = [score for step, score in progress["scores"] if step <= args.online_steps / 10] or scores[:1]
    summary = {
        "env_id": args.env_id,
        "dataset": data_name,
        "algorithm": algorithm,
        "seed": args.seed,
        **{key: progress[key] for key in ("offline_score", "fitted_score", "aligned_score", "scores")},
        "final_score": float(np.mean(scores[-5:])) if scores else None,
        "best_score": max(scores, default=None),
        "initial_drop": progress["offline_score"] - min(early) if early else None,
        "auc": float(np.mean(scores)) if scores else None,
        **{key: progress[key] for key in ("online_steps", "selection_steps", "updates_per_second")},
        "wall_seconds": time.time() - run.started,
        "versions": versions(),
        "status": status,
    }
    write_json(summary, run.dir / "summary.json")
    return summary


def draw_curve(run):
    """curve.png, all stages side by side: values against updates (stage 1), scores against updates (stage 2) and
    against environment steps (stage 3)."""
    rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    panels = [stage for stage in ("reevaluate", "align", "online") if any(row["stage"] == stage for row in rows)]
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5), squeeze=False, layout="constrained")
    for axis, stage in zip(axes[0], panels, strict=True):
        points = [row for row in rows if row["stage"] == stage]
        values = ("q_mean", "v_start", "soft_return", "discounted_return")
        for key in values if stage == "reevaluate" else ("score", "score_sampled"):
            if f"{stage}/{key}" in points[0]:
                axis.plot([row["step"] for row in points], [row[f"{stage}/{key}"] for row in points], ".-", label=key)
        if stage != "reevaluate":
            axis.axhline(run.progress["offline_score"], color="black", linestyle="--", label="offline policy")
        axis.set(title=stage, xlabel="environment steps" if stage == "online" else "updates")
        axis.set_ylabel("return, discounted" if stage == "reevaluate" else "normalised score")
        axis.locator_params(axis="x", nbins=5)
        axis.legend(fontsize=8)
    figure.savefig(run.dir / "curve.png", dpi=100)
    plt.close(figure)


def report(run, stage, step, values):
    """Logs, prints and draws one row of numbers."""
    run.log(stage, step, values)
    print(f"{stage} {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
    draw_curve(run)


@torch.no_grad()
def record_video(policy, make_env, path, seed, device):
    """One episode as an mp4 file. Raises UserError if this machine cannot render."""
    frames = []
    try:
        env = make_env(render_mode="rgb_array")
        obs, done = env.reset(seed=seed)[0], False
        while not done:
            frames.append(env.render())
            obs_batch = torch.as_tensor(obs[None], dtype=torch.float32, device=device)
            obs, _, terminated, truncated, _ = env.step(policy(obs_batch).cpu().numpy()[0])
            done = terminated or truncated
    except (ImportError, AttributeError, gym.error.Error, mujoco.FatalError) as error:
        hint = "set MUJOCO_GL=egl or osmesa, or leave --capture-video out"
        raise UserError(f"cannot render ({error}); {hint}") from error
    path.parent.mkdir(exist_ok=True)
    imageio.mimsave(path, frames, fps=env.metadata["render_fps"])


# end shared


def export(args, data, nets, saved, progress):
    """The checkpoint of the fine-tuned policy, in the format of the offline ones, from which it can go on."""
    kept = {key: net for key, net in nets.items() if key not in ("policy", "targets", "latent_target")}
    state = {key: {name: value.cpu() for name, value in net.state_dict().items()} for key, net in kept.items()}
    return {
        **saved,
        **state,
        "env_id": args.env_id,
        "dataset": data.name,
        "actor": {name: value.cpu() for name, value in nets["policy"].state_dict().items()},
        "step": saved["step"] + progress["online_steps"] * args.updates_per_step,
        "score": progress["scores"][-1][1] if progress["scores"] else progress["offline_score"],
        "args": asdict(args),
        "versions": versions(),
    }


def main(args: Args):
    fill_defaults(args)
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    parse_task(args.env_id)
    device = pick_device(args.cuda)
    if not Path(args.checkpoint).exists():
        options = " --updates 100000" if args.base == "lapo" else " --updates 200000 --num-critics 5"
        hint = f"python offline/{args.base}.py --env-id {args.env_id}{options}, or name one with --checkpoint"
        raise UserError(f"no offline policy at {args.checkpoint}; train one with: {hint}")
    data = load_dataset(args.env_id, args.dataset)
    bf16 = args.matmul_precision == "medium"
    nets, saved = load_base(args.checkpoint, args, data.obs_dim, data.act_dim, bf16)
    progress = {"stage": "start", "step": 0, "online_steps": 0, "selection_steps": 0, "updates_per_second": {}}
    progress |= {"offline_score": None, "fitted_score": None, "aligned_score": None, "scores": []}
    progress |= {"episode_return": 0.0, "acting_returns": []}
    run, status = Run(args, "o3f", progress), "failed"
    try:
        train(args, run, data, nets, saved, device)
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        summary = write_summary(run, args, data.name, "o3f", status)
        for key, value in summary.items():
            if isinstance(value, float):
                print(f"{key:15} {value:7.1f}")
        print(f"{status} after {summary['wall_seconds']:.0f} s; everything is in {run.dir}")
    return summary


if __name__ == "__main__":
    run_cli(main, "o3f")
