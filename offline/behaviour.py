"""Trains the behaviour policies that offline/collect.py samples: SAC (Haarnoja et al. 2018, arXiv 1812.05905) from
scratch, with tuned temperature.

    python offline/behaviour.py --env-id hopper-medium-v2  # all datasets of hopper need the same run
    python offline/behaviour.py --resume RUN_DIR  # goes on where a run was cut off

Writes `offline/checkpoints/behaviour/<env>.pt`, weights of snapshots of the run: the ladder up to medium, which is a
third of an expert's score, the medium policy itself, and the best.

The method ends with `train`. What follows (networks, run folder) is the same in every script.
"""

import difflib
import fcntl
import json
import math
import os
import signal
import sys
import time
import zipfile
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import nn
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "hopper-medium-v2"  # a task of the environment: {hopper,walker2d,halfcheetah,antmaze}-...-v2
    seed: int = 1  # the only seed: networks, batches, training and evaluation environments derive from it
    exp_name: str = "behaviour"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    output: str | None = None  # file to write; None: offline/checkpoints/behaviour/<env>.pt
    overwrite: bool = False  # replace that file if it exists
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    train_steps: int = 1_000_000  # environment steps, with one update each
    warm_up: int = 10_000  # environment steps of uniform actions, without updates
    stop_score: float = 100.0  # score of an evaluation at which the run ends early
    medium_score: float = 100 / 3  # score of an evaluation from which the policy counts as medium
    snapshot_every: int = 10_000  # environment steps between evaluations, each a rung of the medium-replay ladder
    batch_size: int = 256  # transitions of one gradient step
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak rate of the target critics
    learning_rate: float = 3e-4  # of all networks

    compile: bool = True  # compile the update into one graph
    bf16: bool = False  # matrix products in bf16, if the CPU or GPU has units for it
    num_threads: int = 1  # CPU threads: such small networks get slower, not faster, once threads exceed the free cores


def settings(args):
    """Nothing that the command line does not say depends on the task."""
    return {}


# D4RL's names: environment, and the two returns that make 0 and 100 points (D4RL's, measured on its own environments)
ENVS = {
    "hopper": ("Hopper-v5", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v5", 1.629008, 4592.3),
    "halfcheetah": ("HalfCheetah-v5", -280.178953, 12135.0),
}
TASKS = [f"{env}-{q}-v2" for env in ENVS for q in ("random", "medium", "medium-replay", "medium-expert", "expert")]
MAZES = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse".split()
TASKS += [f"antmaze-{maze}-v2" for maze in MAZES]
ENVS["antmaze"] = ("Ant-v5", 0.0, 2000.0)  # the ant that walks through mazes; the points of its training are our own


def parse_task(env_id):
    """`hopper-medium-v2` -> (`hopper`, `medium`). Raises UserError for a name that is not in TASKS."""
    if env_id not in TASKS:
        near = difflib.get_close_matches(env_id, TASKS, n=len(TASKS), cutoff=0.0)
        raise UserError(f"unknown task '{env_id}'; known tasks, nearest first: {', '.join(near)}")
    name, quality = env_id.rsplit("-v", 1)[0].split("-", 1)
    return name, quality


def normalized_score(env_id, returns):
    """100 * (return - random) / (expert - random), D4RL's points; `returns` a number or an array."""
    _, low, high = ENVS[parse_task(env_id)[0]]
    return 100 * (returns - low) / (high - low)


def heading(obs, direction):
    """What the directional ant sees: gymnasium's 27 numbers and a unit vector in the plane, turned so that the ant
    always looks along x. It then need not learn each direction by itself. (B, 27), (B, 2) -> (B, 29)."""
    w, x, y, z = obs[:, 1:5].T
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    cos, sin, half_cos, half_sin = np.cos(yaw), np.sin(yaw), np.cos(yaw / 2), np.sin(yaw / 2)
    parts = half_cos * w + half_sin * z, half_cos * x + half_sin * y, half_cos * y - half_sin * x
    quaternion = np.stack([*parts, half_cos * z - half_sin * w], axis=1)
    quaternion *= np.where(quaternion[:, :1] < 0, -1, 1)  # q and -q are the same rotation

    def turned(v):
        return np.stack([cos * v[:, 0] + sin * v[:, 1], cos * v[:, 1] - sin * v[:, 0]], axis=1)

    parts = obs[:, :1], quaternion, obs[:, 5:13], turned(obs[:, 13:15]), obs[:, 15:27], turned(direction)
    return np.concatenate(parts, axis=1)


class Directional(gym.Wrapper):
    """An ant that is to walk where a direction points, a new one every 100 steps. It sees heading(); the reward is its
    speed along the direction, up to 2.5 m/s, plus gymnasium's own terms: 1 for being upright, less half the squared
    action. Lying on its back ends the episode, as falling does, for it cannot get up."""

    def __init__(self):
        super().__init__(gym.make("Ant-v5", include_cfrc_ext_in_observation=False, max_episode_steps=500))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (29,), np.float64)

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed)
        self.steps, self.rng = 0, np.random.default_rng(seed)
        self.draw()
        return heading(obs[None], self.direction[None])[0], info

    def draw(self):
        angle = self.rng.uniform(0, 2 * np.pi)
        self.direction = np.array([np.cos(angle), np.sin(angle)])

    def step(self, action):
        before = self.unwrapped.data.qpos[:2].copy()
        obs, _, terminated, truncated, info = self.env.step(action)
        speed = (self.unwrapped.data.qpos[:2] - before) @ self.direction / self.unwrapped.dt
        upright = 1 - 2 * (obs[2] ** 2 + obs[3] ** 2) > 0  # the z component of the torso's own z axis
        reward = min(speed, 2.5) + 1 - 0.5 * np.square(action).sum()
        self.steps += 1
        if self.steps % 100 == 0:
            self.draw()
        return heading(obs[None], self.direction[None])[0], reward, terminated or not upright, truncated, info


def make_env(name):
    return Directional() if name == "antmaze" else gym.make(ENVS[name][0])


def td_target(reward, terminated, next_q, next_log_prob, alpha, gamma):
    """y = r + gamma (1 - d) [ min_j Q_j(s', a') - alpha log pi(a'|s') ],   a' ~ pi; all (B,), next_q (n, B)."""
    return reward + gamma * (1 - terminated) * (next_q.amin(0) - alpha * next_log_prob)


def actor_loss(log_prob, q, alpha):
    """E[ alpha log pi(a|s) - min_j Q_j(s,a) ], a reparametrised; log_prob (B,), q (n, B)."""
    return (alpha * log_prob - q.amin(0)).mean()


def make_update(args, nets, optimizers, obs_dim, act_dim):
    """-> update(rows (B, 2 O + A + 2), noise (2, B, A)), which changes `nets` in place; -> detached numbers."""
    actor, critics, targets, log_alpha = nets["actor"], nets["critics"], nets["targets"], nets["log_alpha"][0]

    def update(rows, noise):
        obs, action, reward, next_obs, terminated = rows.split([obs_dim, act_dim, 1, obs_dim, 1], dim=-1)
        alpha = log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob, _ = actor.sample(next_obs, noise[0])
            next_q, rest = targets(next_obs, next_action), (next_log_prob, alpha, args.gamma)
            target = td_target(reward.squeeze(-1), terminated.squeeze(-1), next_q, *rest)
        q = critics(obs, action)
        critic_loss = ((q - target) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(critic_loss)
        new_action, log_prob, _ = actor.sample(obs, noise[1])
        optimizers["actor"].minimize(actor_loss(log_prob, critics(obs, new_action), alpha))
        entropy = -log_prob.detach().mean()
        optimizers["log_alpha"].minimize(log_alpha * (entropy + act_dim))  # target entropy: -A nats
        polyak(targets, critics, args.tau)
        return numbers(critic_loss=critic_loss, q_mean=q.mean(), alpha=alpha)

    return update


def train(args, run, device):
    """SAC from scratch. Every `snapshot_every` steps it evaluates the sampled policy, takes a snapshot, and writes
    args.output: the ladder up to medium (float16), the medium and the best snapshot (float32)."""
    (name, _), progress = parse_task(args.env_id), run.progress
    torch.manual_seed(args.seed)
    env, envs = make_env(name), [make_env(name) for _ in range(10)]
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    stats, hidden = (torch.zeros(obs_dim), torch.ones(obs_dim)), (256, 256)
    critics = Critics(*stats, act_dim, hidden, bf16=args.bf16)
    nets = {"actor": SquashedGaussianActor(*stats, act_dim, hidden, args.bf16), "critics": critics}
    nets |= {"targets": deepcopy(critics), "log_alpha": nn.ParameterList([torch.tensor(0.0)])}
    nets = {key: net.to(device) for key, net in nets.items()}
    optimizers = {key: Adam(nets[key].parameters(), args.learning_rate) for key in ("actor", "critics", "log_alpha")}
    generator, values = torch.Generator(device).manual_seed(args.seed), {}
    run.restore(nets, optimizers, generator)
    actor, update = nets["actor"], compile_update(make_update(args, nets, optimizers, obs_dim, act_dim), args)
    buffer, first = torch.zeros(args.train_steps, 2 * obs_dim + act_dim + 2, device=device), progress["step"]
    buffer[:first] = run.saved.get("buffer", buffer[:first])
    snapshots = run.saved.get("snapshots", {"ladder": [], "medium": None, "expert": None})
    start = progress["episode_start"]  # a resumed run repeats the actions of the episode that was cut off
    obs, _ = env.reset(seed=1_000_000 * args.seed + start)
    for action in buffer[start:first, obs_dim : obs_dim + act_dim].cpu().numpy():
        obs = env.step(action)[0]
    clock, count = time.monotonic(), 0
    for step in tqdm(range(first + 1, args.train_steps + 1), initial=first, total=args.train_steps, disable=None):
        noise = torch.randn(1, act_dim, generator=generator, device=device)
        if step <= args.warm_up:
            action = torch.erf(noise[0] / math.sqrt(2)).cpu().numpy()  # of normal noise: uniform on [-1, 1]
        else:
            with torch.no_grad():
                obs_tensor = torch.as_tensor(obs[None], dtype=torch.float32, device=device)
                action = actor.sample(obs_tensor, noise)[0][0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]])  # a time limit keeps its bootstrap
        buffer[step - 1], obs = torch.as_tensor(row, dtype=torch.float32), next_obs
        if terminated or truncated:
            obs, progress["episode_start"] = env.reset(seed=1_000_000 * args.seed + step)[0], step
        if step > args.warm_up:
            batch = buffer[torch.randint(step, (args.batch_size,), generator=generator, device=device)]
            values = update(batch, torch.randn(2, args.batch_size, act_dim, generator=generator, device=device))
        count += 1
        if step % args.snapshot_every:
            continue

        rate = count / max(time.monotonic() - clock, 1e-9)
        seed = 100_000_000 + 1_000_000 * args.seed
        mean_return = float(evaluate(lambda *x: actor.sample(*x)[:2], envs, seed, device)[0].mean())
        score = normalized_score(args.env_id, mean_return)
        progress["step"] = step
        run.log("sac", step, values | {"return": mean_return, "score": score, "steps_per_second": rate})
        weights = {key: value.detach().cpu().clone() for key, value in actor.state_dict().items()}
        snapshot = {"step": step, "return": mean_return, "score": score, "actor": weights}
        if snapshots["medium"] is None:
            rung = {**snapshot, "actor": {key: value.half() for key, value in weights.items()}}
            snapshots["ladder"].append(rung)
            snapshots["medium"] = snapshot if score >= args.medium_score else None
        if snapshots["expert"] is None or score > snapshots["expert"]["score"]:
            snapshots["expert"] = snapshot
        origin = {
            "format": 1,
            "algorithm": "sac",
            "env": name.removesuffix("maze"),
            "hidden": list(hidden),
            "versions": versions(),
        }
        flags = {key: value for key, value in asdict(args).items() if key not in ("output", "run_dir", "resume")}
        save_file({**origin, **snapshots, "args": flags}, Path(args.output))
        run.save(snapshots=snapshots, buffer=buffer[:step].cpu().clone())
        if score >= args.stop_score:
            break
        clock, count = time.monotonic(), 0


ALGORITHM = "behaviour"
RESUMABLE = "train_steps stop_score compile num_threads track wandb_project_name wandb_entity"
PRIVATE = "stage episode_start"  # of a run's progress, not in summary.json
RANGES = {
    (0, 1): "gamma tau learning_rate",
    (0, 10**9): "seed train_steps warm_up stop_score medium_score",
    (1, 10**9): "snapshot_every batch_size",
    (1, 1024): "num_threads",
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
    name, _ = parse_task(args.env_id)
    if args.output is None:
        args.output = str(Path(__file__).resolve().parent / "checkpoints/behaviour" / f"{name.removesuffix('maze')}.pt")
    if Path(args.output).exists() and not (args.overwrite or args.resume):
        raise UserError(f"{args.output} exists; pass --overwrite to train these policies again")
    run, status = Run(args, {"stage": "sac", "step": 0, "episode_start": 0}), "failed"
    try:
        train(args, run, torch.device("cuda" if args.cuda else "cpu"))
        status = "complete"
    except BaseException as error:
        status = "interrupted" if interrupted(error) else status
        raise
    finally:
        summary = run.summarize(status)
        if run.writing:
            print(f"{status} after {summary['wall_seconds']:.0f} s; everything is in {run.dir}")
    return summary


if __name__ == "__main__":
    run_cli(main)
