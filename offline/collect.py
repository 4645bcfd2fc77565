"""Makes the datasets behind the D4RL task names, on this machine, without a download.

  python offline/collect.py --env-id hopper-medium-v2            dataset `o2o/hopper-medium-v2`, in the local Minari store
  python offline/collect.py --env-id hopper-medium-v2 --train    train the behaviour policies of hopper itself (SAC), hours

D4RL's protocol (Fu et al. 2020, arXiv 2004.07219) on gymnasium's v5 environments:
  random          uniform actions
  medium          a SAC policy stopped at about a third of expert performance, sampled
  expert          the best policy of the same SAC run, sampled
  medium-replay   what SAC saw on its way to medium: here a ladder of its snapshots, sampled for the share of steps
                  that training spent around each (D4RL stores the replay buffer; a ladder is small enough to ship)
  medium-expert   half medium, half expert
The names are D4RL's, the files are not: scores on these data are not comparable with D4RL's tables.

`--train` is SAC (Haarnoja et al. 2018, arXiv 1812.05905) with tuned temperature. It writes
`offline/checkpoints/behaviour/<env>.pt` (weights of the snapshots) and continues where it was cut off (`--resume`).
"""

import difflib
import math
import os
import shutil
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

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
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


@dataclass
class Args:
    env_id: str = "hopper-medium-v2"
    """task: {hopper,walker2d,halfcheetah}-{random,medium,medium-replay,medium-expert,expert}-v2"""
    seed: int = 1
    """the only seed: start states, action noise and, with --train, networks and batches derive from it"""
    num_steps: int | None = None
    """transitions to collect; None: 1,000,000, for medium-replay as many as SAC needed to reach medium"""
    num_envs: int = 64
    """episodes that are rolled out at once, with one batched policy call for all of them"""
    behaviour: str | None = None
    """file of behaviour policies; None: offline/checkpoints/behaviour/<env>.pt"""
    overwrite: bool = False
    """replace the dataset (or, with --train, the file of behaviour policies) if it exists"""
    train: bool = False
    """train the behaviour policies instead of collecting"""
    train_steps: int = 1_000_000
    """environment steps of the SAC run, one update each"""
    stop_score: float = 100.0
    """normalised score of an evaluation at which the SAC run ends early"""
    medium_score: float = 100 / 3
    """normalised score of an evaluation at which the `medium` snapshot is taken: a third of expert"""
    snapshot_every: int = 10_000
    """environment steps between evaluations, each of which is a rung of the medium-replay ladder"""
    resume: bool = False
    """continue a SAC run that was cut off, from `<behaviour>.resume.pt`"""
    compile: bool = True
    """compile the update with torch.compile"""
    matmul_precision: str = "medium"
    """of float32 matrix products: highest (fp32), high, medium (bf16 inputs, fp32 sums)"""
    num_threads: int = 1
    """CPU threads: small networks get slower, not faster, once threads exceed the free cores"""
    cuda: bool = False
    """train on a GPU"""


# shared: tasks
class UserError(Exception):
    """Something the user can put right: `run_cli` prints it as one sentence and exits with code 2."""


# D4RL's names: environment, and the two returns that make 0 and 100 points (D4RL's, measured on its own environments)
ENVS = {
    "hopper": ("Hopper-v5", -20.272305, 3234.3),
    "walker2d": ("Walker2d-v5", 1.629008, 4592.3),
    "halfcheetah": ("HalfCheetah-v5", -280.178953, 12135.0),
}
QUALITIES = ("random", "medium", "medium-replay", "medium-expert", "expert")
TASKS = [f"{name}-{quality}-v2" for name in ENVS for quality in QUALITIES]


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


# shared: cli
def run_cli(main):
    """Runs main(args) on the command line; a UserError becomes one sentence on stderr and exit code 2."""
    try:
        main(tyro.cli(Args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# end shared


# shared: save_file
def save_file(payload, path):
    """torch.save that never leaves half a file: written beside `path`, then renamed. Raises UserError if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(payload, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error}); the previous file, if any, is unchanged") from error


# end shared


# shared: env_state
def env_state(env):
    """Everything that env.step depends on, as tensors and numbers: MuJoCo's state, time limit counter, random state."""
    base, limit = env.unwrapped, env
    while not isinstance(limit, gym.wrappers.TimeLimit):
        limit = limit.env
    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.zeros(mujoco.mj_stateSize(base.model, kind))
    mujoco.mj_getState(base.model, base.data, state, kind)
    rng = base.np_random.bit_generator.state
    return {"physics": torch.from_numpy(state), "elapsed": limit._elapsed_steps, "rng": rng}


def set_env_state(env, saved):
    """The inverse of env_state, on an environment that has been reset once."""
    base, limit = env.unwrapped, env
    while not isinstance(limit, gym.wrappers.TimeLimit):
        limit = limit.env
    mujoco.mj_setState(base.model, base.data, saved["physics"].numpy(), mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(base.model, base.data)
    limit._elapsed_steps = saved["elapsed"]
    base.np_random.bit_generator.state = saved["rng"]


# end shared


# shared: mlp
class StackedLinear(nn.Module):
    """n linear layers in one batched matmul: (n, B, inputs) -> (n, B, outputs), orthogonal weights of gain 1."""

    def __init__(self, n, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.stack([nn.init.orthogonal_(torch.empty(inputs, outputs)) for _ in range(n)]))
        self.bias = nn.Parameter(torch.zeros(n, 1, outputs))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


class StackedLayerNorm(nn.Module):
    """Layer normalisation of (n, B, width), with a scale and a shift for each of the n networks."""

    def __init__(self, n, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n, 1, width))
        self.bias = nn.Parameter(torch.zeros(n, 1, width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


class Critics(nn.Module):
    """n Q-functions side by side: observations (B, O) and actions (B, A) -> Q of shape (n, B)."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden, n=2, layer_norm=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        sizes = [len(obs_mean) + act_dim, *hidden]
        layers = []
        for inputs, outputs in zip(sizes[:-1], sizes[1:]):
            layers += [StackedLinear(n, inputs, outputs)]
            layers += [StackedLayerNorm(n, outputs)] if layer_norm else []
            layers += [nn.ReLU()]
        self.net = nn.Sequential(*layers, StackedLinear(n, sizes[-1], 1))
        self.n = n

    def forward(self, obs, action):
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, action], dim=-1)
        return self.net(x.expand(self.n, *x.shape)).squeeze(-1)


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
        layers = [m for i, o in zip(sizes[:-1], sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
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
    """log density of a = tanh(u) in nats, (B, A) three times -> (B,):

        log N(u; mean, std^2) - sum log(1 - tanh(u)^2),   log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u))

    Takes u and not a: atanh(a) is not finite where tanh rounds to 1."""
    normal = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


# end shared


# shared: update_tools
class Adam:
    """torch.optim.Adam (Kingma & Ba 2015, betas 0.9 and 0.999) as plain tensor operations: torch.optim's own step
    breaks the compiled update into pieces, which costs a quarter of its speed. `lr` is a tensor, free to change."""

    def __init__(self, params, lr, eps=1e-8):
        self.params, self.eps = list(params), eps
        device = self.params[0].device
        self.lr, self.steps = torch.tensor(float(lr), device=device), torch.zeros((), device=device)
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.square = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def minimize(self, loss):
        """One step on a scalar loss. Only this optimiser's parameters get gradients, so the critics' weights stay out
        of the actor's graph. autograd.grad and not loss.backward(): the latter does nothing inside torch.compile."""
        grads = torch.autograd.grad(loss, self.params)
        self.steps += 1
        torch._foreach_lerp_(self.mean, grads, 0.1)
        torch._foreach_mul_(self.square, 0.999)
        torch._foreach_addcmul_(self.square, grads, grads, 0.001)
        root = torch._foreach_div(torch._foreach_sqrt(self.square), (1 - 0.999**self.steps).sqrt())
        step = torch._foreach_div(self.mean, torch._foreach_add(root, self.eps))
        torch._foreach_sub_(self.params, torch._foreach_mul(step, self.lr / (1 - 0.9**self.steps)))

    def state_dict(self):
        return {"lr": self.lr, "steps": self.steps, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state):
        for mine, saved in zip(
            [self.lr, self.steps, *self.mean, *self.square],
            [state["lr"], state["steps"], *state["mean"], *state["square"]],
        ):
            mine.copy_(saved)


@torch.no_grad()
def polyak(target, source, tau):
    """target <- (1 - tau) * target + tau * source, in place."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def compile_update(update, enabled):
    """The whole update as one graph (CUDA graphs on a GPU); with `enabled` False the same function as it stands."""
    if not enabled:
        return update
    torch._dynamo.config.trace_autograd_ops = True  # lets torch.autograd.grad stay inside the graph
    mode = "reduce-overhead" if torch.cuda.is_available() else "default"
    return torch.compile(update, mode=mode, fullgraph=True)


# end shared


def split(rows, obs_dim, act_dim):
    """(B, 2 O + A + 2) rows of a buffer -> obs, action, reward (B,), next_obs, terminated (B,)."""
    obs, action, reward, next_obs, terminated = rows.split([obs_dim, act_dim, 1, obs_dim, 1], dim=-1)
    return obs, action, reward.squeeze(-1), next_obs, terminated.squeeze(-1)


def make_sac(obs_dim, act_dim, device, gamma=0.99, tau=0.005, lr=3e-4):
    """SAC's networks and optimisers, and the function that updates all of them in place on one batch."""
    zeros, ones = torch.zeros(obs_dim), torch.ones(obs_dim)
    actor = SquashedGaussianActor(zeros, ones, act_dim, (256, 256)).to(device)
    critics = Critics(zeros, ones, act_dim, (256, 256)).to(device)
    targets = deepcopy(critics)
    log_alpha = nn.Parameter(torch.zeros((), device=device))
    actor_optimizer, critic_optimizer = Adam(actor.parameters(), lr), Adam(critics.parameters(), lr)
    alpha_optimizer = Adam([log_alpha], lr)

    def update(rows, noise):
        """rows (B, 2 O + A + 2), noise (2, B, A) standard normal -> critic loss, mean Q, temperature (detached)."""
        obs, action, reward, next_obs, terminated = split(rows, obs_dim, act_dim)
        alpha = log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob, _ = actor.sample(next_obs, noise[0])
            next_value = targets(next_obs, next_action).amin(0) - alpha * next_log_prob
            target = reward + gamma * (1 - terminated) * next_value
        q = critics(obs, action)
        critic_loss = ((q - target) ** 2).mean(-1).sum()
        critic_optimizer.minimize(critic_loss)

        new_action, log_prob, _ = actor.sample(obs, noise[1])
        actor_optimizer.minimize((alpha * log_prob - critics(obs, new_action).amin(0)).mean())
        alpha_optimizer.minimize(-log_alpha * (log_prob.detach().mean() - act_dim))  # target entropy: -A nats
        polyak(targets, critics, tau)
        return critic_loss.detach(), q.detach().mean(), alpha

    modules = {"actor": actor, "critics": critics, "targets": targets}
    optimizers = {"actor": actor_optimizer, "critics": critic_optimizer, "alpha": alpha_optimizer}
    return modules, optimizers, log_alpha, update


@torch.no_grad()
def rollout_returns(actor, gym_id, episodes, seed, device):
    """Returns of `episodes` episodes with sampled actions, all at once in environments of their own: (episodes,)."""
    envs = [gym.make(gym_id) for _ in range(episodes)]
    generator = torch.Generator().manual_seed(seed)
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    returns, alive = np.zeros(episodes), np.arange(episodes)
    while len(alive):
        noise = torch.randn(episodes, envs[0].action_space.shape[0], generator=generator)[alive].to(device)
        actions = actor.sample(torch.as_tensor(obs[alive], dtype=torch.float32, device=device), noise)[0].cpu().numpy()
        still = []
        for i, action in zip(alive, actions):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            if not (terminated or truncated):
                still.append(i)
        alive = np.array(still, dtype=int)
    return returns


def train(args, path):
    """SAC from scratch; every `snapshot_every` steps an evaluation, a snapshot and a resume file. Writes `path` with
    the ladder (float16) and the medium and best snapshots (float32)."""
    name, _ = parse_task(args.env_id)
    gym_id, resume_path = ENVS[name][0], path.with_name(path.name + ".resume.pt")
    if path.exists() and not (args.overwrite or args.resume):
        raise UserError(f"{path} exists; pass --overwrite to train these policies again")
    if args.resume and not resume_path.exists():
        raise UserError(f"nothing to resume: {resume_path} does not exist; leave --resume out to start the run")
    device = torch.device("cuda" if args.cuda else "cpu")
    torch.manual_seed(args.seed)
    env = gym.make(gym_id)
    obs_dim, act_dim = env.observation_space.shape[0], env.action_space.shape[0]
    modules, optimizers, log_alpha, update = make_sac(obs_dim, act_dim, device)
    update = compile_update(update, args.compile)
    actor = modules["actor"]
    buffer = torch.zeros(args.train_steps, 2 * obs_dim + act_dim + 2, device=device)
    generator = torch.Generator(device=device).manual_seed(args.seed)
    warm_up, batch_size = 10_000, 256
    snapshots, medium, best, step = [], None, 0, 0
    obs, _ = env.reset(seed=args.seed)
    if args.resume:
        saved = torch.load(resume_path, map_location=device, weights_only=True)
        for key in modules:
            modules[key].load_state_dict(saved["modules"][key])
        for key in optimizers:
            optimizers[key].load_state_dict(saved["optimizers"][key])
        log_alpha.data.copy_(saved["log_alpha"])
        generator.set_state(saved["generator"].cpu())
        step, snapshots, medium, best = saved["step"], saved["snapshots"], saved["medium"], saved["best"]
        buffer[:step] = saved["buffer"]
        obs = saved["obs"].cpu().numpy()
        set_env_state(env, saved["env"])

    started, first = time.time(), step
    for step in tqdm(range(step + 1, args.train_steps + 1), initial=step, total=args.train_steps, disable=None):
        with torch.no_grad():
            noise = torch.randn(1, act_dim, generator=generator, device=device)
            if step <= warm_up:
                action = 2 * torch.rand(act_dim, generator=generator, device=device) - 1
            else:
                action = actor.sample(torch.as_tensor(obs[None], dtype=torch.float32, device=device), noise)[0][0]
        next_obs, reward, terminated, truncated, _ = env.step(action.cpu().numpy())
        row = np.concatenate([obs, action.cpu().numpy(), [reward], next_obs, [float(terminated)]])
        buffer[step - 1] = torch.as_tensor(row, dtype=torch.float32)
        obs = env.reset()[0] if terminated or truncated else next_obs
        if step > warm_up:
            rows = buffer[torch.randint(step, (batch_size,), generator=generator, device=device)]
            update(rows, torch.randn(2, batch_size, act_dim, generator=generator, device=device))
        if step % args.snapshot_every:
            continue

        returns = rollout_returns(actor, gym_id, 10, args.seed + 10_000 + step, device)
        score = normalized_score(args.env_id, returns.mean())
        if not np.isfinite(score) or not all(p.isfinite().all() for p in actor.parameters()):
            raise UserError(f"the weights are not finite at step {step}; the last good state is {resume_path}")
        weights = {k: v.detach().cpu().clone() for k, v in actor.state_dict().items()}
        snapshot = {"step": step, "return": float(returns.mean()), "score": float(score), "actor": weights}
        snapshots.append({**snapshot, "actor": {k: v.half() for k, v in weights.items()}})
        if medium is None and score >= args.medium_score:
            medium = snapshot
        if not best or score > best["score"]:
            best = snapshot
        rate = (step - first) / (time.time() - started)
        print(f"step {step}: return {returns.mean():.0f} +- {returns.std():.0f}, score {score:.1f}, {rate:.0f} steps/s", flush=True)
        save_file({"format": 1, "algorithm": "sac", "env": name, "hidden": [256, 256], "medium": medium, "expert": best,
                   "ladder": snapshots if medium is None else [s for s in snapshots if s["step"] <= medium["step"]],
                   "args": asdict(args), "versions": versions()}, path)
        save_file({"modules": {k: m.state_dict() for k, m in modules.items()},
                   "optimizers": {k: o.state_dict() for k, o in optimizers.items()}, "log_alpha": log_alpha.detach(),
                   "generator": generator.get_state(), "step": step, "snapshots": snapshots, "medium": medium,
                   "best": best, "buffer": buffer[:step].clone(), "obs": torch.from_numpy(obs), "env": env_state(env)},
                  resume_path)
        if score >= args.stop_score:
            break


def versions():
    """Of the packages that decide what a run computes."""
    return {m.__name__: str(m.__version__) for m in (torch, np, gym, mujoco, minari)} | {"python": sys.version.split()[0]}


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
    envs = [gym.make(gym_id) for _ in range(min(num_envs, num_steps))]
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
        for i, action in zip(alive, actions.numpy()):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            observations, steps = current[i]
            observations.append(obs[i].copy())
            steps.append((action, reward, terminated, truncated))
            if terminated or truncated:
                columns = [np.stack(column) for column in zip(*steps)]
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
            raise UserError(f"no behaviour policies at {path}; train them with: python offline/collect.py --env-id {args.env_id} --train")
        policies = torch.load(path, weights_only=True)
        if policies.get("algorithm") != "sac" or policies.get("env") != name:
            raise UserError(f"{path} does not hold behaviour policies of {name}; train them with --train")
    num_steps = args.num_steps or (policies["medium"]["step"] if quality == "medium-replay" else 1_000_000)
    started, episodes = time.time(), []
    with tqdm(total=num_steps, unit="step", unit_scale=True, desc=dataset_id, disable=None) as bar:
        for i, (weights, steps) in enumerate(behaviour_schedule(quality, policies, num_steps)):
            episodes += rollouts(weights, policies["hidden"], gym_id, steps, args.num_envs, args.seed + i, bar)
    returns = np.array([sum(episode.rewards) for episode in episodes])
    total = sum(len(episode.rewards) for episode in episodes)
    rolled = time.time() - started

    # written into a store of its own and renamed: an interrupted run leaves no half dataset behind
    root = target.parents[1]
    with tempfile.TemporaryDirectory(dir=root, prefix=".collect-") as store:
        previous = os.environ.get("MINARI_DATASETS_PATH")
        os.environ["MINARI_DATASETS_PATH"] = store
        try:
            minari.create_dataset_from_buffers(
                dataset_id,
                episodes,
                env=gym_id,
                algorithm_name="uniform random" if quality == "random" else "SAC",
                author="o2o",
                code_permalink="offline/collect.py",
                eval_env=gym_id,
                ref_min_score=low,
                ref_max_score=high,
                description=f"{args.env_id} made by offline/collect.py on {gym_id} (D4RL's protocol, not D4RL's file); "
                f"arguments {asdict(args)}; versions {versions()}",
                requirements=[f"mujoco=={mujoco.__version__}", f"gymnasium=={gym.__version__}"],
            )
        finally:
            if previous is None:
                del os.environ["MINARI_DATASETS_PATH"]
            else:
                os.environ["MINARI_DATASETS_PATH"] = previous
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


def main(args: Args):
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    name, _ = parse_task(args.env_id)
    path = Path(args.behaviour) if args.behaviour else HERE / "checkpoints" / "behaviour" / f"{name}.pt"
    train(args, path) if args.train else collect(args, path)


if __name__ == "__main__":
    run_cli(main)
