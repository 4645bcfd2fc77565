"""Decision Transformer: acts by predicting the next token of an episode (Chen et al., NeurIPS 2021, arXiv 2106.01345),
with the stochastic policy of Online Decision Transformer's pre-training (Zheng et al., ICML 2022, arXiv 2202.05607).

An episode is a sequence: the return that is still to come, the observation, the action, and so on. A causal
transformer learns by maximum likelihood which action came next. To act, it is asked for a high return, from which every
reward is taken off. There is no critic and no bootstrapping.

    python offline/dt.py --env-id hopper-medium-v2 --bf16  # on a CPU with bf16 units
    python offline/dt.py --hidden 512 --layers 4 --batch-size 256 --updates 5000 --cuda --bf16  # the authors' sizes

Writes a run folder, and `offline/checkpoints/<env_id>/dt.pt`, which the online scripts fine-tune after `offline/bc.py`
has made a policy of one observation out of it. Differs from the authors' code: sized for a CPU, no dropout, Adam with a
rate that falls to 0 over --updates (so a run that is resumed for longer is not the longer run) and not LAMB, padding
has no part in the entropy, and no episode of the data is left out.

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
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
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
    env_id: str = "hopper-medium-v2"  # task: names the dataset, the checkpoint and the run folder
    seed: int = 1  # the only seed: networks, batches and evaluation derive from it
    exp_name: str = "dt"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    dataset: str | None = None  # Minari id, local or remote; None: o2o/<env_id>, made by offline/collect.py if missing
    output: str | None = None  # checkpoint to write; None: offline/checkpoints/<env_id>/dt.pt
    overwrite: bool = False  # replace that checkpoint if it exists
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    updates: int = 20_000  # gradient steps
    eval_every_updates: int = 1_000  # updates between evaluations, which are also the points to resume from
    eval_episodes: int = 10  # episodes of one evaluation, all at once
    batch_size: int = 64  # windows of one gradient step
    window: int = 20  # steps in a window, each a return-to-go, an observation and an action
    context: int = 5  # last steps that the policy sees when it acts
    target_return: float | None = None  # asked for at the start of an episode; None: that of the data's best episode
    rtg_scale: float = 0.001  # returns-to-go are multiplied by it
    hidden: int = 128  # width of the transformer
    layers: int = 3  # its blocks
    heads: int = 4  # of its attention
    learning_rate: float = 1e-3  # of the transformer; rises over `warm_up`, then falls to 0 along a cosine
    warm_up: int = 500  # updates until it is reached
    max_norm: float = 0.25  # longer gradients are shortened to it
    temperature: float = 0.1  # weight of the entropy at the start; it is tuned towards an entropy of -A nats
    temperature_lr: float = 1e-4  # its learning rate

    compile: bool = False  # compile the update into one graph: on a CPU that takes a minute and gains nothing
    bf16: bool = False  # matrix products in bf16, if the CPU or GPU has units for it
    num_threads: int = 1  # CPU threads: such small networks get slower, not faster, once threads exceed the free cores


def settings(args):
    """What the authors ask for in evaluation depends on the task, and AntMaze's returns are 0 or 1; the command line
    still wins."""
    if args.env_id.startswith("antmaze"):
        return {"rtg_scale": 1.0, "target_return": 1.0, "eval_every_updates": 5_000, "eval_episodes": 50}
    targets = {"hopper": 3600.0, "walker2d": 5000.0, "halfcheetah": 6000.0}
    task = args.env_id.split("-")[0]
    return {"target_return": targets[task]} if task in targets else {}


def borders(last):
    """-> the first and the last row of each row's episode, (N,) twice. last (N,): does an episode end here?"""
    ends, number = last.nonzero().squeeze(1), last.cumsum(0) - last.long()
    return torch.cat([ends.new_zeros(1), ends[:-1] + 1])[number], ends[number]


def rewards_left(reward, last):
    """R_t = r_t + r_t+1 + ... to the end of the episode, undiscounted. reward, last (N,); -> (N,) return."""
    left = reward.double().flip(0).cumsum(0).flip(0)
    return (left - F.pad(left, (0, 1))[borders(last)[1] + 1]).float()


def windows(steps, first, last, length):
    """The `length` steps that end with row `last` (B,), without those before row `first` (B,), for which there is
    padding. steps (N, C) -> (B, length, C + 1), whose last column says what is a step (1) and what is padding (0)."""
    row = last.unsqueeze(1) - torch.arange(length - 1, -1, -1, device=last.device)
    real = (row >= first.unsqueeze(1)).unsqueeze(-1)
    return torch.where(real, F.pad(steps[row.clamp(min=0)], (0, 1), value=1.0), 0.0)


def sequence_loss(log_prob, entropy, real, temperature):
    """-E[ log pi(a_t | R_.., s_.., a_..) ] - temperature E[ entropy ] over the steps that are no padding.
    log_prob, entropy, real (B, K), nats -> scalar, and the two means."""
    log_prob, entropy = ((x * real).sum() / real.sum() for x in (log_prob, entropy))
    return -log_prob - temperature * entropy, log_prob, entropy


def temperature_loss(log_temperature, entropy, target):
    """temperature (entropy - target): the temperature rises while the entropy, in nats, is below its target."""
    return log_temperature.exp() * (entropy - target)


def make_update(args, nets, optimizers, steps, act_dim):
    """-> update(spans (B, 2) first and last row of each window, noise (B, K, A), scale of the learning rate), which
    writes the transformer and the temperature, and returns detached numbers. steps (N, 1 + O + A)."""
    actor, log_temperature = nets["actor"], nets["log_temperature"][0]

    def update(spans, noise, scale):
        batch = windows(steps, *spans.unbind(1), args.window)
        action, real = batch[..., -1 - act_dim : -1], batch[..., -1]
        mean, log_std = actor(batch)
        log_prob = squashed_log_prob(mean, log_std, torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6)))
        entropy = -squashed_log_prob(mean, log_std, mean + log_std.exp() * noise)
        loss, log_prob, entropy = sequence_loss(log_prob, entropy, real, log_temperature.detach().exp())
        optimizers["actor"].minimize(loss, scale)
        optimizers["temperature"].minimize(temperature_loss(log_temperature, entropy.detach(), -act_dim))
        return numbers(loss=loss, log_prob=log_prob, entropy=entropy, temperature=log_temperature.exp())

    return update


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


def train(args, run, data):
    """Updates of the transformer, from scratch."""
    device, stats, (obs, action, reward, *_) = data.rows.device, observation_stats(data), data.split(data.rows)
    torch.manual_seed(args.seed)
    actor = DecisionTransformer(*stats, data.act_dim, [args.hidden] * args.layers, args.heads, args.bf16)
    log_temperature = nn.ParameterList([torch.tensor(math.log(args.temperature))])
    nets = {"actor": actor.to(device), "log_temperature": log_temperature.to(device)}
    optimizers = {"actor": Adam(actor.parameters(), args.learning_rate, max_norm=args.max_norm)}
    optimizers["temperature"] = Adam(log_temperature.parameters(), args.temperature_lr)
    run.restore(nets, optimizers, torch.Generator(device).manual_seed(args.seed))
    left, (first, end) = rewards_left(reward, data.last), borders(data.last)
    target = float(left[first].max()) if args.target_return is None else args.target_return
    steps, rows = torch.cat([args.rtg_scale * left.unsqueeze(1), obs, action], dim=1), torch.arange(len(left)).to(end)
    spans = torch.stack([rows, torch.minimum(rows + args.window - 1, end)], dim=1)  # a window begins at any step
    update = compile_update(make_update(args, nets, optimizers, steps, data.act_dim), args)
    envs = [History(data.make_env(), args.context, target, args.rtg_scale) for _ in range(args.eval_episodes)]
    count = torch.arange(args.updates, device=device)
    rate = 0.5 * (1 + torch.cos(math.pi * count / args.updates)) * ((count + 1) / (args.warm_up + 1)).clamp(max=1)
    score, scale_at = partial(score_policy, args, run, data, envs), lambda step: (rate[step - 1],)
    shape = args.batch_size, args.window, data.act_dim
    train_offline(args, run, "offline", args.updates, update, spans, shape, score, scale_at)
    policy = {"kind": KIND, "hidden": [args.hidden] * args.layers, "heads": args.heads, "context": args.context}
    finish(args, run, data, envs, policy=policy | {"target_return": target, "rtg_scale": args.rtg_scale})


ALGORITHM, KIND = "dt", "decision_transformer"  # this script, and its policy class
RANGES = {
    (1e-9, 10**9): "rtg_scale",
    (-(10**9), 10**9): "target_return",
    (0, 1): "learning_rate temperature_lr",
    (0, 10**9): "seed updates warm_up",
    (1, 10**9): "eval_every_updates eval_episodes batch_size",
    (1, 1024): "num_threads window context hidden heads",
    (1, 64): "layers",
    (1e-9, 1000): "max_norm temperature",
}
RESUMABLE = "updates compile num_threads track wandb_project_name wandb_entity"
PRIVATE = "stage step"  # of a run's progress, not in summary.json


class History(gym.Wrapper):
    """Observes the last `length` steps of the episode, as `windows` has them but flat, so that a policy of histories is
    a plain function of what it observes. The return that is asked for falls by every reward, and the action of the
    current step is still 0."""

    def __init__(self, env, length, target_return, rtg_scale):
        super().__init__(env)
        (self.obs_dim,), (act_dim,) = env.observation_space.shape, env.action_space.shape
        self.steps, self.target, self.scale = np.zeros((length, self.obs_dim + act_dim + 2)), target_return, rtg_scale
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.steps.size,), np.float64)

    def remember(self, obs):
        self.steps[:-1], self.steps[-1] = self.steps[1:].copy(), 0
        self.steps[-1, 0], self.steps[-1, 1 : 1 + self.obs_dim], self.steps[-1, -1] = self.scale * self.left, obs, 1
        return self.steps.flatten()

    def reset(self, **options):
        obs, info = self.env.reset(**options)
        self.steps[:], self.left = 0, self.target
        return self.remember(obs), info

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        self.steps[-1, 1 + self.obs_dim : -1], self.left = action, self.left - reward
        return self.remember(obs), reward, *rest


class Block(nn.Module):
    """Attention, then two layers, each added to its input after a normalisation: a block of GPT-2."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(width), nn.LayerNorm(width), heads
        self.attention = nn.Linear(width, 3 * width, bias=False)  # of a key, Adam would inflate mere rounding errors
        self.projection = nn.Linear(width, width)
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x, seen):
        """(B, T, W) -> the same; seen (B, 1, T, T): which token looks at which."""
        query, key, value = self.attention(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = (query / math.sqrt(key.shape[-1]) @ key.mT).masked_fill(~seen, -math.inf)
        mixed = scores.softmax(-1) @ value  # F.scaled_dot_product_attention's backward pass is ten times slower on CPUs
        x = x + self.projection(mixed.transpose(1, 2).flatten(2))
        return x + self.net(self.norm2(x))


class DecisionTransformer(nn.Module):
    """pi(a_t | R, s up to t, a before t) = tanh(N(mean, std^2)). No token says where it stands: the order shows in what
    it may look at."""

    def __init__(self, obs_mean, obs_std, act_dim, hidden, heads, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        self.sizes, self.bf16 = [1, len(obs_mean), act_dim], bf16
        self.embeddings = nn.ModuleList(nn.Linear(size, hidden[0]) for size in self.sizes)
        self.blocks = nn.ModuleList(Block(width, heads) for width in hidden)
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(hidden[0]) for _ in "12"), nn.Linear(hidden[0], 2 * act_dim)
        nn.init.orthogonal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, steps):
        """(B, K, O + A + 2) steps as `windows` has them -> mean and log_std of u, (B, K, A), a = tanh(u)."""
        rtg, obs, action, real = steps.split([*self.sizes, 1], dim=-1)
        inputs, length = (rtg, (obs - self.obs_mean) / self.obs_std, action), 3 * steps.shape[1]
        with torch.autocast(steps.device.type, torch.bfloat16, enabled=self.bf16):
            tokens = [embed(x) for embed, x in zip(self.embeddings, inputs, strict=True)]
            x = self.norms[0](torch.stack(tokens, dim=2).flatten(1, 2))  # R_1, s_1, a_1, R_2, ...
            near = torch.ones(length, length, dtype=torch.bool, device=x.device)
            seen = near.tril() & (real.bool().repeat_interleave(3, 1).mT | near.tril().triu())  # itself: never nothing
            for block in self.blocks:
                x = block(x, seen.unsqueeze(1))
            x = self.norms[1](x[:, 1::3])
        mean, log_std = self.head(x.float()).chunk(2, dim=-1)
        return mean, -5 + 3.5 * (torch.tanh(log_std) + 1)

    def mode(self, steps):
        """(B, K (O + A + 2)) what History observes -> tanh of the mean (B, A), the action that evaluation executes."""
        return torch.tanh(self(steps.unflatten(-1, (-1, sum(self.sizes) + 1)))[0][:, -1])


def squashed_log_prob(mean, log_std, u):
    """log density of a = tanh(u) in nats, (..., A) three times -> (...):

        log N(u; mean, std^2) - sum log(1 - tanh(u)^2),   log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u))

    Takes u and not a: atanh(a) is not finite where tanh rounds to 1."""
    normal = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


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


def observation_stats(data):
    """-> mean and std + 1e-3 of the data's observations, (O,) each; they travel in the checkpoint."""
    obs = data.split(data.rows)[0].cpu()
    return obs.mean(0), obs.std(0) + 1e-3


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


def finish(args, run, data, envs, **more):
    """The closing score, and the checkpoint that fine-tuning loads: plain tensors, numbers and strings; `more` of it
    than the policy."""
    actor, progress = run.nets["actor"], run.progress
    score, progress["closing_error"] = closing_score(args, actor, data, envs)
    progress["closing_score"] = score
    origin = {"format": 1, "algorithm": ALGORITHM, "env_id": args.env_id, "dataset": data.name}
    weights = {"actor": {key: value.cpu() for key, value in actor.state_dict().items()}}
    flags = {key: value for key, value in asdict(args).items() if key not in ("output", "run_dir", "resume")}
    numbers = {"step": args.updates, "score": score, "args": flags, "versions": versions()}
    save_file({**origin, **weights, **more, **numbers}, Path(args.output))


def check_output(args, default):
    """Makes --output absolute. Raises UserError if it cannot be written: before training, not after it."""
    path = Path(args.output or Path(__file__).resolve().parent / "checkpoints" / args.env_id / default).resolve()
    folder = next(parent for parent in path.parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{path} cannot be written; name another --output")
    if path.exists() and not (args.overwrite or args.resume):
        raise UserError(f"{path} exists; pass --overwrite to replace it, or --output to write elsewhere")
    args.output = str(path)


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
    if args.hidden % args.heads:
        raise UserError(f"--hidden is {args.hidden}; it has to be a multiple of --heads, {args.heads}")
    check_output(args, "dt.pt")
    run = Run(args, {"stage": "offline", "step": 0, "closing_score": None, "updates_per_second": {}})
    data, status = load_data(args, torch.device("cuda" if args.cuda else "cpu")), "failed"
    try:
        train(args, run, data)
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
