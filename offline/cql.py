"""CQL: conservative Q-learning on an offline dataset (Kumar et al., NeurIPS 2020, arXiv 2006.04779).

SAC on a fixed dataset whose critics are also pushed down on the actions that the policy would take and up on those
that the data hold. Its policy is the default start of `o2o_sac.py`; its critics are pessimistic on purpose, so they are
not saved with it.

    python offline/cql.py --env-id hopper-medium-v2  # the paper's 1,000,000 updates
    python offline/cql.py --env-id hopper-medium-v2 --updates 100000 --matmul-precision medium  # an hour on a CPU

Writes a run folder, and `offline/checkpoints/<env_id>/cql.pt`: policy, observation statistics, score.

The variant is CQL(H) with importance weights. --lagrange, --max-backup and --clip-gap are the variants that the paper's
AntMaze runs use. As in the common PyTorch versions, and other than in the paper: no entropy in the backup, and a small
learning rate for the policy.
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
    exp_name: str = "cql"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    dataset: str | None = None  # Minari id or D4RL .hdf5 file; None: local Minari dataset o2o/<env_id>, made if missing
    output: str | None = None  # checkpoint to write; None: offline/checkpoints/<env_id>/cql.pt
    overwrite: bool = False  # replace that checkpoint if it exists
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    updates: int = 1_000_000  # gradient steps
    eval_every: int = 5_000  # gradient steps between evaluations, which are also the points to resume from
    eval_episodes: int = 10  # episodes of one evaluation, all at once
    batch_size: int = 256  # transitions of one gradient step
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak rate of the target critics
    policy_lr: float = 3e-5  # actor
    critic_lr: float = 3e-4  # critics, temperature, and the multiplier of --lagrange
    hidden_layers: int = 3  # of width 256, in actor and critics
    cql_alpha: float = 10.0  # weight of the conservative term
    cql_temperature: float = 1.0  # T of its logsumexp, in units of Q
    cql_actions: int = 10  # actions drawn from each of uniform, pi(.|s), pi(.|s')
    lagrange: bool = False  # tune that weight so that the gap stays at --target-gap
    target_gap: float = 0.8  # in units of Q
    max_backup: bool = False  # back up the best of cql_actions next actions instead of one
    clip_gap: float | None = None  # lower clip of the gap of a state, in units of Q; None: no clip

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


# shared: squashed_gaussian
class SquashedGaussianActor(nn.Module):
    """a = tanh(u), u ~ N(mean(s), std(s)^2): SAC's policy. `noise` is standard normal and given from outside, so that
    a compiled and an eager update see the same numbers."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        sizes = [len(obs_mean), *hidden]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * act_dim))
        nn.init.xavier_uniform_(self.net[-1].weight, gain=0.01)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, obs):
        """(B, O) raw observations -> mean (B, A) and log_std (B, A) of u."""
        mean, log_std = self.net((obs - self.obs_mean) / self.obs_std).chunk(2, dim=-1)
        return mean, (log_std - 1).clamp(-20, 2)

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


class CqlCritics(Critics):
    """Critics that also score K actions a state; the observations' part of the first layer is computed once."""

    def many(self, obs, actions):
        """obs (B, O), actions (B, K, A) -> Q (n, B, K)."""
        (batch, k, act_dim), first = actions.shape, self.net[0]
        obs = ((obs - self.obs_mean) / self.obs_std).expand(self.n, -1, -1)
        actions = actions.reshape(1, batch * k, act_dim).expand(self.n, -1, -1)
        h = torch.baddbmm(first.bias, obs, first.weight[:, :-act_dim]).unsqueeze(2)
        h = h + stacked_matmul(actions, first.weight[:, -act_dim:], first.bf16).view(self.n, batch, k, -1)
        return self.net[1:](h.flatten(1, 2)).view(self.n, batch, k)


def conservative_gap(q_candidates, log_density, q_data, temperature, clip=None):
    """How far the critics rank the policy's actions above the data's, CQL(H) with importance weights (Eq. 4, App. F):

        T logsumexp_k( (Q(s, a_k) - log p(a_k)) / T ) - Q(s, a)

    q_candidates (n, B, K): return. log_density (B, K): nats, of the distribution that a_k was drawn from.
    q_data (n, B): Q of the action in the data. -> (n, B), clipped below at `clip`."""
    gap = temperature * torch.logsumexp((q_candidates - log_density) / temperature, dim=-1) - q_data
    return gap if clip is None else gap.clamp(min=clip)


def td_target(reward, terminated, next_q, gamma):
    """y = r + gamma (1 - d) max_k min_j Q_j(s', a'_k), no entropy in the backup. next_q (n, B, K); -> (B,)."""
    return reward + gamma * (1 - terminated) * next_q.amin(0).amax(-1)


def make_update(args, nets, obs_dim, act_dim):
    """-> the optimisers, and update(rows (B, 2 O + A + 2), noise (3 K + 1, B, A)), which changes `nets` in place."""
    actor, critics, targets = nets["actor"], nets["critics"], nets["targets"]
    optimizers = {
        "actor": Adam(actor.parameters(), args.policy_lr),
        "critics": Adam(critics.parameters(), args.critic_lr),
        "log_alpha": Adam(nets["log_alpha"].parameters(), args.critic_lr),
        "log_weight": Adam(nets["log_weight"].parameters(), args.critic_lr),
    }
    k = args.cql_actions

    def draw(obs, noise):
        """K actions of the policy: obs (B, O), noise (K, B, A) -> actions (B, K, A), log_prob (B, K)."""
        mean, log_std = actor(obs)
        u = mean + log_std.exp() * noise
        log_prob = squashed_log_prob(mean, log_std, u)
        return torch.tanh(u).transpose(0, 1), log_prob.transpose(0, 1)

    def update(rows, noise):
        obs, action, reward, next_obs, terminated = split(rows, obs_dim, act_dim)
        log_alpha, log_weight = nets["log_alpha"].weight, nets["log_weight"].weight
        with torch.no_grad():
            next_actions, next_log_prob = draw(next_obs, noise[:k])
            actions, log_prob = draw(obs, noise[k : 2 * k])
            uniform = torch.erf(noise[2 * k : 3 * k] / math.sqrt(2)).transpose(0, 1)  # of normal noise: U[-1, 1]
            candidates = torch.cat([uniform, actions, next_actions], dim=1)
            uniform_density = torch.full_like(log_prob, -act_dim * math.log(2))
            log_density = torch.cat([uniform_density, log_prob, next_log_prob], dim=1)
            backups = next_actions if args.max_backup else next_actions[:, :1]
            target = td_target(reward, terminated, targets.many(next_obs, backups), args.gamma)
        q = critics(obs, action)
        td_loss = ((q - target) ** 2).mean(-1).sum()
        q_candidates = critics.many(obs, candidates)
        gap = conservative_gap(q_candidates, log_density, q, args.cql_temperature, args.clip_gap).mean(-1)
        weight = torch.ones_like(log_weight)
        if args.lagrange:
            weight = log_weight.detach().exp().clamp(max=1e6)
            gap = gap - args.target_gap
            optimizers["log_weight"].minimize(-log_weight.exp() * args.cql_alpha * gap.detach().mean())
        critic_loss = td_loss + weight * args.cql_alpha * gap.sum()
        optimizers["critics"].minimize(critic_loss)

        alpha = log_alpha.detach().exp()
        new_action, new_log_prob, _ = actor.sample(obs, noise[3 * k])
        actor_loss = (alpha * new_log_prob - critics(obs, new_action).amin(0)).mean()
        optimizers["actor"].minimize(actor_loss)
        entropy = -new_log_prob.detach().mean()
        optimizers["log_alpha"].minimize(log_alpha * (entropy + act_dim))  # target entropy: -A nats
        polyak(targets, critics, args.tau)
        values = {"critic_loss": critic_loss, "gap": gap.mean(), "cql_weight": weight * args.cql_alpha}
        values |= {"q_mean": q.mean(), "actor_loss": actor_loss, "entropy": entropy, "alpha": alpha}
        return {key: value.detach() for key, value in values.items()}

    return optimizers, update


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


def export(args, actor, data, step, score):
    """The checkpoint that fine-tuning loads: the policy alone, with the statistics that normalise its observations."""
    return {
        "format": 1,
        "algorithm": "cql",
        "env_id": args.env_id,
        "dataset": data.name,
        "policy": {"kind": "squashed_gaussian", "hidden": [256] * args.hidden_layers},
        "actor": {key: value.detach().cpu().clone() for key, value in actor.state_dict().items()},
        "step": step,
        "score": score,
        "args": asdict(args),
        "versions": versions(),
    }


def main(args: Args):
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    parse_task(args.env_id)
    output = Path(args.output or Path(__file__).resolve().parent / "checkpoints" / args.env_id / "cql.pt")
    if output.exists() and not args.overwrite:
        raise UserError(f"{output} exists; pass --overwrite to replace it or --output to write elsewhere")
    device = pick_device(args.cuda)
    data = load_dataset(args.env_id, args.dataset)
    run = Run(args, "cql", {"step": 0, "score": None, "scores": [], "updates_per_second": None})
    obs_dim, act_dim, rows = data.obs_dim, data.act_dim, data.rows.to(device)
    stats = data.rows[:, :obs_dim].mean(0), data.rows[:, :obs_dim].std(0) + 1e-3
    envs = [data.make_env() for _ in range(args.eval_episodes)]

    torch.manual_seed(args.seed)
    hidden = [256] * args.hidden_layers
    critics = CqlCritics(*stats, act_dim, hidden, bf16=args.matmul_precision == "medium")
    nets = {"actor": SquashedGaussianActor(*stats, act_dim, hidden), "critics": critics}
    nets |= {"targets": deepcopy(nets["critics"]), "log_alpha": Scalar(0.0), "log_weight": Scalar(0.0)}
    nets = {name: net.to(device) for name, net in nets.items()}
    optimizers, update = make_update(args, nets, obs_dim, act_dim)
    update, generator = compile_update(update, args.compile, device), torch.Generator(device).manual_seed(args.seed)
    run.restore(nets, optimizers, generator)

    actor, first, clock, counted = nets["actor"], run.progress["step"], time.time(), 0
    for step in tqdm(range(first + 1, args.updates + 1), desc="cql", unit="update", disable=None):
        batch = rows[torch.randint(len(rows), (args.batch_size,), generator=generator, device=device)]
        noise = torch.randn(3 * args.cql_actions + 1, args.batch_size, act_dim, generator=generator, device=device)
        values = update(batch, noise)
        counted += 1
        if step % args.eval_every and step != args.updates:
            continue
        values = run.finite("offline", step, values)
        values["updates_per_second"] = counted / (time.time() - clock)
        seed = 10_000_000 * args.seed + step * args.eval_episodes
        mean_return, _, _ = evaluate(mode_of(actor), envs, seed, device)
        values["score"] = float(normalized_score(args.env_id, mean_return))
        run.log("offline", step, values)
        print(f"cql {step}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
        run.progress |= {"step": step} | {key: values[key] for key in ("score", "updates_per_second")}
        run.progress["scores"].append([step, values["score"]])
        save_file(export(args, actor, data, step, values["score"]), run.dir / "model.pt")
        run.save()
        write_offline_summary(run, args, data.name, "cql", "unfinished")
        clock, counted = time.time(), 0
    save_file(export(args, actor, data, run.progress["step"], run.progress["score"]), output)
    write_offline_summary(run, args, data.name, "cql", "complete")
    print(f"{output}: {run.progress['step']} updates, score {run.progress['score']:.1f}")


if __name__ == "__main__":
    run_cli(main, "cql")
