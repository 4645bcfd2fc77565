"""O2SAC: from an offline policy to online SAC without the collapse (OCR-CFT, Luo et al. 2024, arXiv 2412.18855).

Two mismatches make naive fine-tuning collapse. Offline critics are pessimistic, so they are no estimate of what the
policy is worth online. And a critic, even one that is right on average, ranks other actions above the policy's own by
error alone, so the first updates destroy the policy. Three stages remove them; only the offline *policy* is used,
whatever trained it:

  1 reevaluate  learn Q of the frozen offline policy on the data, with SAC's own    td_target
                Bellman operator and no pessimism
  2 align       keep Q of the policy's favourite action, lower the others to what   alignment_target
                the policy's preference says; update the actor on the result
  3 finetune    SAC online, under KL(pi || pi_ref) < limit(t), by a Lagrangian      td_target,
                whose multiplier is learned; the limit grows, pi_ref improves       multiplier_loss

    python o2o_sac.py --env-id hopper-medium-v2  # makes the dataset, then all three stages
    python o2o_sac.py --reevaluation-steps 500000 --alignment-steps 500000 --online-steps 100000  # the paper's budget

Differs from the released code: evaluation has environments and seeds of its own (there it runs in the training
environment in mid-episode); the critics are stacked in one batched matmul. Same as there, not in the paper: the
asymmetric weight of the multiplier's loss, and log pi_ref clamped at -50, below which the constraint has no gradient.
The ablation --no-reevaluate starts stages 2 and 3 from untrained critics, since an offline method's own are not used.

Blocks between `# shared:` and `# end shared` (tasks, data, networks, files, plots) are the same in every script. The
method is the rest: from td_target to train, 300 lines.
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
from functools import cache, partial
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
    seed: int = 1  # the only seed: networks, batches, training and evaluation environments derive from it
    exp_name: str = "o2o_sac"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    capture_video: bool = False  # film an episode of the offline, the aligned and the final policy
    dataset: str | None = None  # Minari id or D4RL .hdf5 file; None: local Minari dataset o2o/<env_id>, made if missing
    checkpoint: str | None = None  # offline policy; None: offline/checkpoints/<env_id>/cql.pt
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    reevaluation_steps: int = 100_000  # updates of stage 1 (paper: 500,000)
    alignment_steps: int = 15_000  # updates of stage 2 (paper: 500,000)
    online_steps: int = 15_000  # environment steps of stage 3 (paper: 100,000)
    reevaluate: bool = True  # stage 1; off: ablation
    align: bool = True  # stage 2; off: ablation
    constrain: bool = True  # the constraint of stage 3; off: ablation
    fit_steps: int = 20_000  # updates that fit our actor to an offline policy of another class
    fit_std: float = 0.1  # std of the actions, given to a deterministic offline policy when ours is fitted to it
    updates_per_step: int = 10  # gradient steps per environment step
    warm_up: int = 1_000  # environment steps that act without updates
    offline_data: Literal["half", "all", "none", "part"] = "half"  # batches of stage 3: half offline and half
    # online; or from one buffer that starts with all the offline data, none of it, or its best 50 episodes
    eval_every: int = 1_000  # environment steps between evaluations
    eval_every_updates: int = 5_000  # updates between them in stages 1 and 2, rounded up to hundreds
    eval_episodes: int = 10  # episodes of one evaluation, all at once

    batch_size: int = 256  # transitions of one gradient step
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak rate of the target critics
    policy_lr: float = 1e-4  # actor
    critic_lr: float = 3e-4  # critics, temperature, and the fit to a policy of another class
    alpha: float | None = None  # temperature in stages 1 and 2, its start in stage 3; None: 0.2, expert data 0.5
    kl_start: float | None = None  # nats, limit on KL(pi || pi_ref) at step 0; None: 0.125, expert data 0.005
    kl_end: float | None = None  # nats, limit after kl_steps; None: 2.0, expert data 0.125; with interval a quarter
    kl_steps: int = 100_000  # environment steps over which the limit grows
    multiplier: float = 1.0  # lambda at the start of stage 3
    multiplier_lr: float = 5e-5  # of log lambda, one step per environment step
    kappa: float = 0.7  # weight of a violated constraint in lambda's loss; a slack one weighs 1 - kappa
    reference: Literal["best", "interval"] = "best"  # pi_ref: the best policy so far, or renewed at intervals
    reference_every: int = 10_000  # environment steps between renewals with --reference interval

    compile: bool = True  # compile each update into one graph
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


# shared: task_settings
# What the authors change with the task (appendix of the paper): (usual value, value on data of expert quality) by flag.
# Each script reads the rows of the flags that it has.
SETTINGS = {
    "alpha": (0.2, 0.5),  # O2SAC
    "kl_start": (0.125, 0.005),
    "kl_end": (2.0, 0.125),
    "exploration_noise": (0.1, 0.05),  # O2TD3
    "distance_start": (0.0025, 2.5e-5),
    "distance_end": (0.04, 6.25e-4),
    "alignment_steps": (250_000, 500_000),  # O2PPO
    "epochs": (10, 10),
    "max_std": (math.exp(2), math.exp(2)),
    "scale_rewards": (False, False),
}
EXCEPTIONS = {  # to the above, by environment
    "hopper": {"epochs": (10, 5), "max_std": (math.exp(2), 0.05)},
    "halfcheetah": {"scale_rewards": (True, True)},
}


def fill_settings(args):
    """Replaces each None in `args` that SETTINGS has a value for. The limits that --reference interval works towards
    are a quarter of the others, because its reference policy moves on by itself."""
    name, quality = parse_task(args.env_id)
    expert = quality in ("expert", "medium-expert")
    for flag, values in {**SETTINGS, **EXCEPTIONS.get(name, {})}.items():
        if getattr(args, flag, values) is None:
            quarter = flag in ("kl_end", "distance_end") and args.reference == "interval"
            setattr(args, flag, values[expert] / 4 if quarter else values[expert])


# end shared


def fill_defaults(args):
    """Replaces what is None in `args` by what the task asks for."""
    fill_settings(args)
    if args.checkpoint is None:
        args.checkpoint = str(Path(__file__).resolve().parent / "offline/checkpoints" / args.env_id / "cql.pt")


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


# shared: offline_policy
def load_policy(path, env_id, obs_dim, act_dim, std):
    """The offline policy in a checkpoint -> its frozen module, and the checkpoint; `std` is for a deterministic one.
    Raises UserError if the file is missing, broken, of another environment or of other dimensions."""
    saved = load_file(path, "cpu")
    try:
        kind, hidden, state = saved["policy"]["kind"], saved["policy"]["hidden"], saved["actor"]
        source, inputs = f"{saved['algorithm']}, {saved['step']} updates on {saved['dataset']}", len(state["obs_mean"])
        origin, version = saved["env_id"], saved["format"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is not a checkpoint of format 1: {error} is missing") from error
    if version != 1:
        raise UserError(f"{path} has format {version}; this script reads format 1")
    if origin.split("-")[0] != env_id.split("-")[0]:
        raise UserError(f"{path} was trained on {origin}, not on {env_id}; choose another --checkpoint")
    if inputs != obs_dim:
        raise UserError(f"{path} expects {inputs} observations, the data have {obs_dim}")
    if kind == "squashed_gaussian":
        policy = SquashedGaussianActor(state["obs_mean"], state["obs_std"], act_dim, hidden)
    elif kind in ("tanh_gaussian", "deterministic"):
        policy = TanhGaussianActor(state["obs_mean"], state["obs_std"], act_dim, hidden, std)
        state = {"log_std": policy.log_std.data, **state}
    else:
        raise UserError(f"{path} holds a policy of the unknown kind '{kind}'")
    try:
        policy.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"the weights in {path} do not fit a {kind} policy with {act_dim} actions") from error
    print(f"offline policy {path}: {source}")
    return policy.requires_grad_(False), saved


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


def td_target(reward, terminated, next_q, next_log_prob, alpha, gamma, penalty=0.0):
    """SAC's target, with the penalty of the constraint in stage 3:

        y = r + gamma (1 - d) [ min_j Q_j(s', a') - alpha log pi(a'|s') - lambda f(s', a') ],   a' ~ pi

    reward, terminated, next_log_prob (B,); next_q (n, B) return; penalty = lambda f, (B,) return. -> (B,)."""
    return reward + gamma * (1 - terminated) * (next_q.amin(0) - alpha * next_log_prob - penalty)


def alignment_target(q_mode, log_prob_mode, q, log_prob, alpha):
    """What the value of an action may be, given the offline policy's preference. A maximum-entropy policy satisfies
    Q(s,a) = V(s) + alpha log pi(a|s), so relative to its most likely action a*:

        y(s,a) = min{ Q(s,a*) - alpha [log pi_off(a*|s) - log pi_off(a|s)],  Q(s,a) }

    All (B,): q_mode, q the re-evaluated critics' minimum, in units of return; log_probs in nats. Never raises a value;
    equals Q(s,a*) at a = a*."""
    return torch.minimum(q_mode - alpha * (log_prob_mode - log_prob), q)


def log_ratio(log_prob, reference, obs, u):
    """f = log pi(a|s) - log pi_ref(a|s), (B,) nats: with a ~ pi a one-sample estimate of the KL divergence.
    log pi_ref is clamped at -50, as in the released code: a sample further out costs no more and has no gradient."""
    return log_prob - squashed_log_prob(*reference(obs), u).clamp(min=-50)


def actor_loss(log_prob, q, alpha, penalty=0.0):
    """E[ alpha log pi(a|s) - min_j Q_j(s,a) + lambda f(s,a) ], a reparametrised; log_prob, penalty (B,), q (n, B)."""
    return (alpha * log_prob - q.amin(0) + penalty).mean()


def multiplier_loss(multiplier, slack, kappa):
    """lambda E[ |kappa - 1(u > 0)| u ], u = limit - f (B,) nats. Violated (u < 0, weight kappa): lambda rises; slack
    (weight 1 - kappa): it falls."""
    weight = (kappa - (slack > 0).float()).abs()
    return multiplier * (weight * slack).mean()


def kl_limit(args, step):
    """The constraint's threshold after `step` environment steps, in nats: linear from kl_start to kl_end."""
    return args.kl_start + (args.kl_end - args.kl_start) * min(1.0, step / args.kl_steps)


def make_updates(args, nets, optimizers, obs_dim, act_dim):
    """-> the updates of the three stages, each a function of a batch and of standard normal noise that changes `nets`
    in place and returns detached numbers. rows (B, 2 O + A + 2), noise (2, B, A)."""
    actor, behaviour, reference = nets["actor"], nets["behaviour"], nets["reference"]
    critics, targets, log_alpha = nets["critics"], nets["targets"], nets["log_alpha"].weight

    def reevaluate(rows, noise):
        """Writes critics and targets. The policy is the frozen offline one and alpha is fixed."""
        obs, action, reward, next_obs, terminated = split(rows, obs_dim, act_dim)
        with torch.no_grad():
            next_action, next_log_prob, _ = behaviour.sample(next_obs, noise[0])
            next_q = targets(next_obs, next_action)
            target = td_target(reward, terminated, next_q, next_log_prob, args.alpha, args.gamma)
        q = critics(obs, action)
        loss = ((q - target) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(loss)
        polyak(targets, critics, args.tau)
        return numbers(critic_loss=loss, q_mean=q.mean(), q_target_mean=target.mean())

    def align(rows, noise):
        """Writes critics and actor. The targets stay the re-evaluated critics; the data only provide states."""
        obs = split(rows, obs_dim, act_dim)[0]
        action, log_prob, u = actor.sample(obs, noise[0])
        with torch.no_grad():
            mean, log_std = behaviour(obs)
            mode, both = torch.tanh(mean), obs.repeat(2, 1)
            log_prob_mode, log_prob_off = (squashed_log_prob(mean, log_std, x) for x in (mean, u))
            q_old, q_mode = targets(both, torch.cat([action, mode])).amin(0).chunk(2)
            target = torch.cat([alignment_target(q_mode, log_prob_mode, q_old, log_prob_off, args.alpha), q_mode])
        q = critics(both, torch.cat([action.detach(), mode]))
        loss = ((q - target) ** 2).sum() / len(rows)
        optimizers["critics"].minimize(loss)
        optimizers["actor"].minimize(actor_loss(log_prob, critics(obs, action), args.alpha))
        lowered = q_old - target[: len(rows)]
        kl = log_prob - log_prob_off
        return numbers(critic_loss=loss, q_mode=q_mode.mean(), q_mean=q.mean(), lowered=lowered.mean(), kl=kl.mean())

    def finetune(rows, noise, multiplier):
        """Writes actor, critics, targets and temperature. multiplier: lambda, a tensor without gradient. Also returns
        f of the batch (B,), for lambda's own step."""
        obs, action, reward, next_obs, terminated = split(rows, obs_dim, act_dim)
        alpha = log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob, next_u = actor.sample(next_obs, noise[0])
            penalty = multiplier * log_ratio(next_log_prob, reference, next_obs, next_u)
            next_q = targets(next_obs, next_action)
            target = td_target(reward, terminated, next_q, next_log_prob, alpha, args.gamma, penalty)
        q = critics(obs, action)
        loss = ((q - target) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(loss)
        new_action, log_prob, u = actor.sample(obs, noise[1])
        f = log_ratio(log_prob, reference, obs, u)
        optimizers["actor"].minimize(actor_loss(log_prob, critics(obs, new_action), alpha, multiplier * f))
        entropy = -log_prob.detach().mean()
        optimizers["log_alpha"].minimize(log_alpha * (entropy + act_dim))  # target entropy: -A nats
        polyak(targets, critics, args.tau)
        values = numbers(critic_loss=loss, q_mean=q.mean(), kl=f.mean(), alpha=alpha, entropy=entropy)
        return values, f.detach()

    return reevaluate, align, finetune


# shared: offline_loop
def numbers(**values):
    return {key: value.detach() for key, value in values.items()}


def train_offline(run, args, stage, steps, update, rows, act_dim, check):
    """The loop of the stages on offline data: `steps` updates on batches of `rows`. Every eval_every_updates it logs
    the update's numbers and those of `check(step)`, and saves."""
    progress, device, clock, counted = run.progress, rows.device, time.time(), 0
    blocks = range(progress["step"], steps, 100)  # a block draws its random numbers at once
    for start in tqdm(blocks, desc=stage, unit="00 updates", disable=None):
        count = min(100, steps - start)
        index = torch.randint(len(rows), (count, args.batch_size), generator=run.generator, device=device)
        noise = torch.randn(count, 2, args.batch_size, act_dim, generator=run.generator, device=device)
        for i in range(count):
            values = update(rows[index[i]], noise[i])
        progress["step"] = step = start + count
        counted += count
        if step // args.eval_every_updates > start // args.eval_every_updates or step == steps:
            values = run.finite(stage, step, values)  # waits for the device, so the clock is right on a GPU too
            progress["updates_per_second"][stage] = values["updates_per_second"] = counted / (time.time() - clock)
            report(run, stage, step, values | check(step))
            run.save()
            clock, counted = time.time(), 0


# end shared


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


# shared: reference
def choose_reference(args, run, score, steps, used):
    """--reference best: the actor becomes pi_ref if its score beats that of every pi_ref so far. Such an evaluation is
    interaction with the environment, so its `steps` are counted. `used`: False in the ablation without pi_ref."""
    if args.reference == "best" and used:
        run.progress["selection_steps"] += steps
        if score > run.progress["reference_score"]:
            run.progress["reference_score"] = score
            run.nets["reference"].load_state_dict(run.nets["actor"].state_dict())


# end shared


def train_online(run, args, update, data, device, score_of):
    """Stage 3: one environment step, then updates_per_step updates and one step of lambda. The environment receives
    exactly the action that the buffer stores."""
    progress, nets, generator = run.progress, run.nets, run.generator
    env, (buffer, first) = data.make_env(), online_buffer(run, args, data)
    buffer = buffer.to(device)
    obs, _ = env.reset(seed=args.seed)
    if run.saved and "online" in run.saved:
        set_env_state(env, run.saved["env"])
        obs = run.saved["obs"].numpy()
    log_multiplier, seconds, counted, values = nets["log_multiplier"].weight, 0.0, 0, {}
    for step in tqdm(range(progress["step"] + 1, args.online_steps + 1), desc="online", unit="step", disable=None):
        with torch.no_grad():
            noise = torch.randn(1, data.act_dim, generator=generator, device=device)
            obs_tensor = torch.as_tensor(obs[None], dtype=torch.float32, device=device)
            action = nets["actor"].sample(obs_tensor, noise)[0][0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]])  # a time limit keeps its bootstrap
        buffer[first + step - 1] = torch.as_tensor(row, dtype=torch.float32)
        obs = env.reset()[0] if terminated or truncated else next_obs

        if step > args.warm_up:
            clock = time.time()
            index = draw_batches(args, generator, first, first + step, args.updates_per_step, device)
            shape = (args.updates_per_step, 2, args.batch_size, data.act_dim)
            noise = torch.randn(shape, generator=generator, device=device)
            multiplier = log_multiplier.detach().exp() * args.constrain
            for i in range(args.updates_per_step):
                values, f = update(buffer[index[i]], noise[i], multiplier)
            slack = kl_limit(args, step) - f
            run.optimizers["log_multiplier"].minimize(multiplier_loss(log_multiplier.exp(), slack, args.kappa))
            if device.type == "cuda":
                torch.cuda.synchronize()  # for the clock; the next action would wait for the updates anyway
            counted, seconds = counted + args.updates_per_step, seconds + time.time() - clock
        progress["step"] = progress["online_steps"] = step
        if args.reference == "interval" and step % args.reference_every == 0:
            nets["reference"].load_state_dict(nets["actor"].state_dict())
        if step % args.eval_every and step != args.online_steps:
            continue
        row = run.finite("online", step, values)
        row |= {"kl_limit": kl_limit(args, step), "multiplier": log_multiplier.exp().item() * args.constrain}
        scores, eval_steps = score_of(nets["actor"], 3, step)
        progress["scores"].append([step, scores["score"]])
        choose_reference(args, run, scores["score"], eval_steps, args.constrain)
        if counted:
            progress["updates_per_second"]["online"] = row["updates_per_second"] = counted / seconds
        report(run, "online", step, scores | row)
        run.save(online=buffer[first : first + step].cpu().clone(), obs=torch.from_numpy(obs), env=env_state(env))
        seconds, counted = 0.0, 0


def fit_update(teacher, actor, optimizer):
    """-> update that imitates an offline policy of another class on the data's states, by maximum likelihood of its
    actions. Writes the actor."""

    def fit(rows, noise):
        obs = rows[:, : len(actor.obs_mean)]
        with torch.no_grad():
            u = torch.atanh(teacher.sample(obs, noise[0])[0].clamp(-0.999, 0.999))
        loss = -squashed_log_prob(*actor(obs), u).mean()
        optimizer.minimize(loss)
        return numbers(loss=loss)

    return fit


def train(args, run, data, teacher, hidden, device):
    """The method: fit (only for an offline policy of another class), re-evaluate, align, fine-tune."""
    progress, act_dim, same_class = run.progress, data.act_dim, isinstance(teacher, SquashedGaussianActor)
    torch.manual_seed(args.seed)
    stats = teacher.obs_mean.cpu(), teacher.obs_std.cpu()
    actor = SquashedGaussianActor(*stats, act_dim, hidden if same_class else (256, 256, 256))
    if same_class:
        actor.load_state_dict(teacher.state_dict())
    bf16 = args.matmul_precision == "medium"
    critics = Critics(*stats, act_dim, (256, 256, 256), layer_norm=True, bf16=bf16)
    nets = {
        "actor": actor,
        "behaviour": deepcopy(actor),  # pi_off, frozen
        "reference": deepcopy(actor),  # pi_ref
        "critics": critics,
        "targets": deepcopy(critics),
        "log_alpha": Scalar(math.log(args.alpha)),
        "log_multiplier": Scalar(math.log(args.multiplier)),
    }
    nets = {name: net.to(device) for name, net in nets.items()}
    rates = {"actor": args.policy_lr, "critics": args.critic_lr, "log_alpha": args.critic_lr}
    rates["log_multiplier"] = args.multiplier_lr
    optimizers = {name: Adam(nets[name].parameters(), rate) for name, rate in rates.items()}
    optimizers["fit"] = Adam(nets["actor"].parameters(), args.critic_lr)
    run.restore(nets, optimizers, torch.Generator(device).manual_seed(args.seed))
    updates = make_updates(args, nets, optimizers, data.obs_dim, act_dim)
    reevaluate, align, finetune = (compile_update(update, args.compile, device) for update in updates)
    rows, envs = data.rows.to(device), [data.make_env() for _ in range(args.eval_episodes)]

    def score_of(policy, stage, step):
        """Scores of a policy's mode and of its samples; the environment steps that the former took."""
        seed = 10_000_000 * args.seed + 1_000_000 * stage + step * args.eval_episodes
        mode, _, steps = evaluate(mode_of(policy), envs, seed, device)
        sampled, soft, _ = evaluate(lambda *x: policy.sample(*x)[:2], envs, seed, device, args.gamma, args.alpha)
        scores = {"score": normalized_score(args.env_id, mode), "score_sampled": normalized_score(args.env_id, sampled)}
        return {key: float(value) for key, value in (scores | {"soft_return": soft}).items()}, steps

    def actor_scores(stage, step):
        return score_of(nets["actor"], stage, step)[0]

    def start_values(_):
        """V of pi_off in start states beside what pi_off obtains from them, discounted and with the entropy bonus of
        its actions: re-evaluation is long enough once the former stands still near the latter."""
        obs = np.stack([env.reset(seed=i)[0] for i, env in enumerate(envs * 10)])
        obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        with torch.no_grad():
            noise = torch.randn(len(obs), act_dim, generator=torch.Generator(device).manual_seed(0), device=device)
            action, log_prob, _ = nets["behaviour"].sample(obs, noise)
            value = (nets["critics"](obs, action).amin(0) - args.alpha * log_prob).mean()
        return {"v_start": float(value), "soft_return": progress["soft_return"]}

    def film(policy, name):
        if args.capture_video:
            record_video(policy.mode, data.make_env, run.dir / "videos" / f"{name}.mp4", args.seed, device)

    def enter(stage):
        """The border between two stages is a point to resume from."""
        progress["stage"], progress["step"] = stage, 0
        run.save()

    if progress["stage"] == "start":
        scores, steps = score_of(teacher, 0, 0)
        progress["offline_score"], progress["soft_return"] = scores["score"], scores["soft_return"]
        progress["reference_score"] = -math.inf
        if same_class:
            choose_reference(args, run, scores["score"], steps, args.constrain)
        print(f"offline policy: score {scores['score']:.1f}, sampled {scores['score_sampled']:.1f}", flush=True)
        film(teacher, "offline")
        enter("fit")
    if progress["stage"] == "fit":
        if not same_class:
            fit = compile_update(fit_update(teacher, nets["actor"], optimizers["fit"]), args.compile, device)
            train_offline(run, args, "fit", args.fit_steps, fit, rows, act_dim, partial(actor_scores, 0))
            scores, steps = score_of(nets["actor"], 0, args.fit_steps)
            progress["fitted_score"], progress["soft_return"] = scores["score"], scores["soft_return"]
            for name in ("behaviour", "reference"):
                nets[name].load_state_dict(nets["actor"].state_dict())
            choose_reference(args, run, scores["score"], steps, args.constrain)
        enter("reevaluate")
    if progress["stage"] == "reevaluate":
        if args.reevaluate:
            train_offline(run, args, "reevaluate", args.reevaluation_steps, reevaluate, rows, act_dim, start_values)
        nets["targets"].load_state_dict(nets["critics"].state_dict())
        enter("align")
    if progress["stage"] == "align":
        if args.align:
            check = partial(actor_scores, 2)
            train_offline(run, args, "align", args.alignment_steps, align, rows, act_dim, check)
            nets["targets"].load_state_dict(nets["critics"].state_dict())
            scores, steps = score_of(nets["actor"], 2, args.alignment_steps)
            progress["aligned_score"] = scores["score"]
            choose_reference(args, run, scores["score"], steps, args.constrain)
            film(nets["actor"], "aligned")
        enter("online")
    train_online(run, args, finetune, data, device, score_of)
    film(nets["actor"], "final")
    save_file(export(args, data, nets, progress), run.dir / "model.pt")


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


def export(args, data, nets, progress):
    """The checkpoint of the fine-tuned policy, in the format of the offline ones."""
    sizes = [layer.out_features for layer in nets["actor"].net if isinstance(layer, nn.Linear)]
    return {
        "format": 1,
        "algorithm": "o2o_sac",
        "env_id": args.env_id,
        "dataset": data.name,
        "policy": {"kind": "squashed_gaussian", "hidden": sizes[:-1]},
        "actor": {key: value.cpu() for key, value in nets["actor"].state_dict().items()},
        "critics": {key: value.cpu() for key, value in nets["critics"].state_dict().items()},
        "step": progress["online_steps"],
        "score": progress["scores"][-1][1] if progress["scores"] else progress["offline_score"],
        "args": asdict(args),
        "versions": versions(),
    }


def main(args: Args):
    fill_defaults(args)
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    device = pick_device(args.cuda)
    if not Path(args.checkpoint).exists():
        command = f"python offline/cql.py --env-id {args.env_id} --updates 100000"
        hint = f"train one with: {command}, or name one with --checkpoint"
        raise UserError(f"no offline policy at {args.checkpoint}; {hint}")
    data = load_dataset(args.env_id, args.dataset)
    teacher, saved = load_policy(args.checkpoint, args.env_id, data.obs_dim, data.act_dim, args.fit_std)
    progress = {"stage": "start", "step": 0, "online_steps": 0, "selection_steps": 0, "updates_per_second": {}}
    progress |= {"offline_score": None, "fitted_score": None, "aligned_score": None, "scores": []}
    run, status = Run(args, "o2o_sac", progress), "failed"
    try:
        train(args, run, data, teacher.to(device), saved["policy"]["hidden"], device)
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        summary = write_summary(run, args, data.name, "o2o_sac", status)
        for key, value in summary.items():
            if isinstance(value, float):
                print(f"{key:15} {value:7.1f}")
        print(f"{status} after {summary['wall_seconds']:.0f} s; everything is in {run.dir}")
    return summary


if __name__ == "__main__":
    run_cli(main, "o2o_sac")
