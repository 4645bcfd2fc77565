"""Makes the datasets behind the D4RL task names, on this machine, without a download.

    python offline/collect.py --env-id hopper-medium-v2  # makes `o2o/hopper-medium-v2` in the local Minari store
    python offline/collect.py --env-id hopper-medium-v2 --train  # trains the behaviour policies of hopper (SAC)

D4RL's protocol (Fu et al. 2020, arXiv 2004.07219) on gymnasium's v5 environments:
  random          uniform actions
  medium          a SAC policy stopped at about a third of expert performance, sampled
  expert          the best policy of the same SAC run, sampled
  medium-replay   what SAC saw on its way to medium: here a ladder of its snapshots, sampled for the share of steps
                  that training spent around each (D4RL stores the replay buffer; a ladder is small enough to ship)
  medium-expert   half medium, half expert
The names are D4RL's, the files are not: scores on these data are not comparable with D4RL's tables.

`--train` is SAC (Haarnoja et al. 2018, arXiv 1812.05905) with tuned temperature. It writes
`offline/checkpoints/behaviour/<env>.pt` (weights of the snapshots) and can be continued where it was cut off
(`--resume RUN_DIR`).
"""

import difflib
import json
import math
import os
import pickle
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import minari
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from minari.data_collector import EpisodeBuffer
from minari.namespace import create_namespace, list_local_namespaces
from minari.storage.datasets_root_dir import get_dataset_path
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "hopper-medium-v2"  # {hopper,walker2d,halfcheetah}-{random,medium{,-replay,-expert},expert}-v2
    seed: int = 1  # the only seed: start states, action noise and, with --train, networks and batches derive from it
    num_steps: int | None = None  # transitions; None: 1,000,000, for medium-replay as many as SAC took to medium
    num_envs: int = 64  # episodes rolled out at once, with one policy call for all
    behaviour: str | None = None  # file of behaviour policies; None: offline/checkpoints/behaviour/<env>.pt
    overwrite: bool = False  # replace the dataset (or, with --train, the file of behaviour policies) if it exists

    train: bool = False  # train the behaviour policies instead of collecting
    train_steps: int = 1_000_000  # environment steps of the SAC run, with one update each
    stop_score: float = 100.0  # score of an evaluation at which the SAC run ends early
    medium_score: float = 100 / 3  # score of an evaluation from which the policy counts as medium: a third of expert
    snapshot_every: int = 10_000  # environment steps between evaluations, each a rung of the medium-replay ladder
    exp_name: str = "collect"  # part of the run folder's name
    run_dir: str | None = None  # folder of the SAC run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a SAC run that was cut off, to be continued
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
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


def make_sac(obs_dim, act_dim, device, bf16=False, gamma=0.99, tau=0.005, lr=3e-4):
    """SAC's networks and optimisers, and the function that updates all of them in place on one batch."""
    zeros, ones = torch.zeros(obs_dim), torch.ones(obs_dim)
    actor = SquashedGaussianActor(zeros, ones, act_dim, (256, 256)).to(device)
    critics = Critics(zeros, ones, act_dim, (256, 256), bf16=bf16).to(device)
    targets, log_alpha = deepcopy(critics), Scalar(0.0).to(device)
    nets = {"actor": actor, "critics": critics, "targets": targets, "log_alpha": log_alpha}
    optimizers = {name: Adam(nets[name].parameters(), lr) for name in ("actor", "critics", "log_alpha")}

    def update(rows, noise):
        """rows (B, 2 O + A + 2), noise (2, B, A) standard normal -> detached numbers."""
        obs, action, reward, next_obs, terminated = rows.split([obs_dim, act_dim, 1, obs_dim, 1], dim=-1)
        reward, terminated = reward.squeeze(-1), terminated.squeeze(-1)
        alpha = log_alpha.weight.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob, _ = actor.sample(next_obs, noise[0])
            next_value = targets(next_obs, next_action).amin(0) - alpha * next_log_prob
            target = reward + gamma * (1 - terminated) * next_value
        q = critics(obs, action)
        critic_loss = ((q - target) ** 2).mean(-1).sum()
        optimizers["critics"].minimize(critic_loss)

        new_action, log_prob, _ = actor.sample(obs, noise[1])
        optimizers["actor"].minimize((alpha * log_prob - critics(obs, new_action).amin(0)).mean())
        entropy = -log_prob.detach().mean()
        optimizers["log_alpha"].minimize(log_alpha.weight * (entropy + act_dim))  # target entropy: -A nats
        polyak(targets, critics, tau)
        return {"critic_loss": critic_loss.detach(), "q_mean": q.detach().mean(), "alpha": alpha}

    return nets, optimizers, update


def train(args, path):
    """SAC from scratch. Every `snapshot_every` steps it evaluates the sampled policy, takes a snapshot, writes `path`:
    the ladder up to medium (float16), the medium and the best snapshot (float32)."""
    name, _ = parse_task(args.env_id)
    if path.exists() and not (args.overwrite or args.resume):
        raise UserError(f"{path} exists; pass --overwrite to train these policies again")
    device = pick_device(args.cuda)
    run = Run(args, "collect", {"step": 0})
    torch.manual_seed(args.seed)
    env, envs = gym.make(ENVS[name][0]), [gym.make(ENVS[name][0]) for _ in range(10)]
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    nets, optimizers, update = make_sac(obs_dim, act_dim, device, args.matmul_precision == "medium")
    actor, update = nets["actor"], compile_update(update, args.compile, device)
    buffer = torch.zeros(args.train_steps, 2 * obs_dim + act_dim + 2, device=device)
    generator = torch.Generator(device).manual_seed(args.seed)
    run.restore(nets, optimizers, generator)
    warm_up, batch_size, values = 10_000, 256, {}
    obs, _ = env.reset(seed=args.seed)
    ladder, medium, best, first = [], None, None, run.progress["step"]
    if run.saved:
        ladder, medium, best = (run.saved[key] for key in ("ladder", "medium", "best"))
        buffer[:first], obs = run.saved["buffer"].to(device), run.saved["obs"].numpy()
        set_env_state(env, run.saved["env"])

    clock, counted = time.time(), 0
    for step in tqdm(range(first + 1, args.train_steps + 1), initial=first, total=args.train_steps, disable=None):
        noise = torch.randn(1, act_dim, generator=generator, device=device)
        if step <= warm_up:
            action = torch.erf(noise[0] / math.sqrt(2)).cpu().numpy()  # of normal noise: uniform on [-1, 1]
        else:
            with torch.no_grad():
                obs_tensor = torch.as_tensor(obs[None], dtype=torch.float32, device=device)
                action = actor.sample(obs_tensor, noise)[0][0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        row = np.concatenate([obs, action, [reward], next_obs, [terminated]])  # a time limit keeps its bootstrap
        buffer[step - 1] = torch.as_tensor(row, dtype=torch.float32)
        obs = env.reset()[0] if terminated or truncated else next_obs
        if step > warm_up:
            batch = buffer[torch.randint(step, (batch_size,), generator=generator, device=device)]
            values = update(batch, torch.randn(2, batch_size, act_dim, generator=generator, device=device))
        counted += 1
        if step % args.snapshot_every:
            continue

        rate = counted / (time.time() - clock)
        mean_return, _, _ = evaluate(lambda *x: actor.sample(*x)[:2], envs, 10_000_000 * args.seed + step, device)
        score = float(normalized_score(args.env_id, mean_return))
        run.log("sac", step, {**values, "return": mean_return, "score": score, "steps_per_second": rate})
        print(f"sac {step}: return {mean_return:.0f}, score {score:.1f}, {rate:.0f} steps/s", flush=True)
        weights = {key: value.detach().cpu().clone() for key, value in actor.state_dict().items()}
        snapshot = {"step": step, "return": float(mean_return), "score": score, "actor": weights}
        if medium is None:
            ladder.append({**snapshot, "actor": {key: value.half() for key, value in weights.items()}})
            medium = snapshot if score >= args.medium_score else None
        if best is None or score > best["score"]:
            best = snapshot
        policies = {"format": 1, "algorithm": "sac", "env": name, "hidden": [256, 256], "ladder": ladder}
        policies |= {"medium": medium, "expert": best, "args": asdict(args), "versions": versions()}
        save_file(policies, path)
        run.progress["step"] = step
        extra = {"ladder": ladder, "medium": medium, "best": best, "buffer": buffer[:step].cpu().clone()}
        run.save(**extra, obs=torch.from_numpy(obs), env=env_state(env))
        if score >= args.stop_score:
            break
        clock, counted = time.time(), 0


def behaviour_schedule(quality, policies, num_steps):
    """-> list of (actor or None for uniform actions, steps): who acts, and for how many of `num_steps` transitions."""
    if quality == "random":
        return [(None, num_steps)]
    if quality == "medium-replay":
        rungs = policies["ladder"]
        edges = np.linspace(0, num_steps, len(rungs) + 1).round().astype(int)
        # the first rung stands for SAC's warm-up, which acts uniformly
        return [(None if i == 0 else rung["actor"], int(edges[i + 1] - edges[i])) for i, rung in enumerate(rungs)]
    half = num_steps // 2
    if quality == "medium-expert":
        return [(policies["medium"]["actor"], half), (policies["expert"]["actor"], num_steps - half)]
    return [(policies[quality]["actor"], num_steps)]


@torch.no_grad()
def rollouts(weights, hidden, gym_id, num_steps, num_envs, seed, bar):
    """Whole episodes, at least `num_steps` transitions of them, from `num_envs` environments with one policy call for
    all. An environment stops after the episode in which its share of the steps is complete, so no episode is cut."""
    # at least 5,000 steps for each: the last episode, which is finished, then adds little
    envs = [gym.make(gym_id) for _ in range(min(num_envs, max(1, num_steps // 5_000)))]
    obs_dim, act_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    actor = None
    if weights is not None:
        actor = SquashedGaussianActor(torch.zeros(obs_dim), torch.ones(obs_dim), act_dim, hidden)
        actor.load_state_dict({k: v.float() for k, v in weights.items()})
    generator = torch.Generator().manual_seed(seed)
    share, episodes = -(-num_steps // len(envs)), []
    obs = np.stack([env.reset(seed=seed * 1_000 + i)[0] for i, env in enumerate(envs)])
    current = [([obs[i].copy()], []) for i in range(len(envs))]  # observations (T+1), steps (T) of the open episodes
    done_steps, alive = np.zeros(len(envs), dtype=int), np.arange(len(envs))
    while len(alive):
        if actor is None:
            actions = 2 * torch.rand(len(alive), act_dim, generator=generator) - 1
        else:
            noise = torch.randn(len(alive), act_dim, generator=generator)
            actions = actor.sample(torch.as_tensor(obs[alive], dtype=torch.float32), noise)[0]
        finished = []
        for i, action in zip(alive, actions.numpy(), strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            observations, steps = current[i]
            observations.append(obs[i].copy())
            steps.append((action, reward, terminated, truncated))
            if terminated or truncated:
                columns = [np.stack(column) for column in zip(*steps, strict=True)]
                episodes.append(EpisodeBuffer(None, None, None, np.stack(observations), *columns))
                done_steps[i] += len(steps)
                bar.update(len(steps))
                obs[i], _ = envs[i].reset()
                current[i] = ([obs[i].copy()], [])
                if done_steps[i] >= share:
                    finished.append(i)
        alive = np.setdiff1d(alive, finished) if finished else alive
    return episodes


def collect(args, path):
    """Rolls out the behaviour policies and writes `o2o/<env_id>` into the local Minari store, all of it or nothing."""
    name, quality = parse_task(args.env_id)
    gym_id, low, high = ENVS[name]
    dataset_id = f"o2o/{args.env_id}"
    target = Path(get_dataset_path(dataset_id))
    if target.exists() and not args.overwrite:
        raise UserError(f"dataset {dataset_id} exists at {target}; pass --overwrite to make it again")
    policies = {"hidden": []}
    if quality != "random":
        if not path.exists():
            raise UserError(f"no behaviour policies at {path}; train them with --env-id {args.env_id} --train")
        policies = load_file(path, "cpu")
        if policies.get("algorithm") != "sac" or policies.get("env") != name:
            raise UserError(f"{path} does not hold behaviour policies of {name}; train them with --train")
        if policies["medium"] is None:
            raise UserError(f"the SAC run behind {path} has not reached medium yet; continue it with --train --resume")
    num_steps = args.num_steps or (policies["medium"]["step"] if quality == "medium-replay" else 1_000_000)
    started, episodes = time.time(), []
    with tqdm(total=num_steps, unit="step", unit_scale=True, desc=dataset_id, disable=None) as bar:
        for i, (weights, steps) in enumerate(behaviour_schedule(quality, policies, num_steps)):
            episodes += rollouts(weights, policies["hidden"], gym_id, steps, args.num_envs, args.seed + i, bar)
    returns = np.array([sum(episode.rewards) for episode in episodes])
    total = sum(len(episode.rewards) for episode in episodes)
    rolled = time.time() - started

    # written into a store of its own and then renamed: an interrupted run leaves no half dataset behind
    root = get_dataset_path()
    with tempfile.TemporaryDirectory(dir=root, prefix=".collect-") as store, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Minari would like an author's e-mail address
        os.environ["MINARI_DATASETS_PATH"] = store
        try:
            minari.create_dataset_from_buffers(
                dataset_id,
                episodes,
                env=gym_id,
                eval_env=gym_id,
                algorithm_name="uniform random" if quality == "random" else "SAC",
                author="o2o",
                code_permalink="offline/collect.py",
                ref_min_score=low,
                ref_max_score=high,
                description=f"{args.env_id} made by offline/collect.py on {gym_id} (D4RL's protocol, not D4RL's file); "
                f"arguments {asdict(args)}; versions {versions()}",
                requirements=[f"mujoco=={mujoco.__version__}", f"gymnasium=={gym.__version__}"],
            )
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        if "o2o" not in list_local_namespaces():
            create_namespace("o2o")
        if target.exists():
            shutil.rmtree(target)
        os.replace(Path(store) / dataset_id, target)
    print(
        f"{dataset_id}: {total} transitions, {len(episodes)} episodes on {gym_id}, mean return {returns.mean():.0f} "
        f"(score {normalized_score(args.env_id, returns.mean()):.1f}, best episode {returns.max():.0f}), "
        f"{total / rolled:.0f} transitions/s, {time.time() - started:.0f} s in all, at {target}"
    )


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


def main(args: Args):
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    name, _ = parse_task(args.env_id)
    path = Path(args.behaviour or Path(__file__).resolve().parent / "checkpoints/behaviour" / f"{name}.pt")
    train(args, path) if args.train else collect(args, path)


if __name__ == "__main__":
    run_cli(main, "collect")
