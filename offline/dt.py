"""Decision Transformer (Chen et al. 2021, arXiv 2106.01345), pre-trained as Online DT does it (arXiv 2202.05607).

The policy is a sequence model: it reads the last steps of the episode, each with the return that is still to come, and
says which action the data had there. Asked for a high return, it answers with what good episodes did. No values are
learned. Trained by maximum likelihood with an entropy bonus, whose weight is tuned:

    loss = -log pi(a_t | R_1 s_1 a_1 ... R_t s_t) - temperature * entropy        sequence_loss

    python offline/dt.py --env-id hopper-medium-v2 --bf16
    python o2o_td3.py --checkpoint CHECKPOINT  # fine-tunes a copy without memory, which offline/bc.py makes

Other than in the authors' code: 0.6 instead of 13 million weights, Adam instead of LAMB, no dropout (the loss on
held-out episodes, which is logged, shows whether it is missed), and the entropy is that of real steps, not of padding.

The method ends with `train`. What follows (networks, data, run folder) is the same in every script.
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

    updates: int = 20_000  # gradient steps (ODT: 5,000 of a larger batch)
    eval_every_updates: int = 2_000  # updates between evaluations, which are also the points to resume from
    eval_episodes: int = 10  # episodes of one evaluation, all at once
    batch_size: int = 64  # windows of one gradient step
    window: int = 20  # environment steps in each of them
    context: int = 5  # latest steps that the policy reads when it acts
    width: int = 128  # of a token
    num_layers: int = 3  # transformer blocks
    num_heads: int = 4  # of their attention
    learning_rate: float = 3e-4  # of the transformer, after warm_up_updates
    warm_up_updates: int = 1_000  # updates over which the rate grows from 0
    temperature_lr: float = 1e-4  # of the entropy's weight
    temperature: float = 0.1  # that weight at the start
    return_scale: float = 0.001  # returns-to-go are multiplied by it
    target_return: float | None = None  # what the policy is asked for; None: the best return in the data

    compile: bool = True  # compile the update into one graph
    bf16: bool = False  # matrix products in bf16, on CPUs and GPUs that have units for it
    num_threads: int = 1  # CPU threads: such small networks get slower, not faster, once threads exceed the free cores


def settings(args):
    """What the authors change with the task; the command line still wins."""
    if args.env_id.startswith("antmaze"):
        return {"return_scale": 1.0, "target_return": 1.0, "eval_every_updates": 10_000, "eval_episodes": 50}
    targets = {"hopper": 3600.0, "walker2d": 5000.0, "halfcheetah": 6000.0}
    return {"target_return": targets.get(args.env_id.split("-")[0])}


def returns_to_go(reward, last):
    """R_t = r_t + r_t+1 + ... to the end of the episode, not discounted. reward, last (N,): does an episode end here?
    -> (N,)."""
    sums = reward.double().cumsum(0)
    ends = sums[last][(last.cumsum(0) - last.long())]
    return (ends - sums + reward).float()


def sequence_loss(log_prob, entropy, temperature, real):
    """-E[ log pi(a_t | history) ] - temperature * E[ entropy ], over the steps that are no padding. log_prob, entropy,
    real (B, T): nats, nats, 0 or 1."""
    return -((log_prob + temperature * entropy) * real).sum() / real.sum()


class Windows(NamedTuple):
    """Stretches of episodes, by the index of their first step: what train_offline draws from."""

    steps: torch.Tensor  # (N, 1 + O + A): return-to-go, observation, action
    left: torch.Tensor  # (N,) steps from here to the end of the episode, this one included
    starts: torch.Tensor  # (M,) where a window may begin
    length: int

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        """(B,) -> (B, length, 1 + O + A + 1), the last number: is it real, or padding after the episode's end?"""
        first, ahead = self.starts[index][:, None], torch.arange(self.length, device=self.starts.device)
        real = ahead < self.left[first]
        steps = self.steps[(first + ahead).clamp(max=len(self.steps) - 1)]
        return torch.cat([steps * real[..., None], real[..., None].float()], dim=-1)


def steps_left(last):
    """-> (N,) how many steps there are from each to the end of its episode, itself included."""
    ends = last.nonzero().flatten()
    return ends[last.cumsum(0) - last.long()] - torch.arange(len(last), device=last.device) + 1


def make_update(args, nets, optimizers):
    """-> update(windows (B, T, 1 + O + A + 1), noise (B, T, A), rate), which changes `nets` in place and returns
    detached numbers, and loss(windows, noise), (nll, entropy) without a change. rate, a tensor, multiplies the learning
    rate."""
    model, log_temperature = nets["actor"], nets["log_temperature"][0]

    def likelihood(windows, noise):
        steps, real = windows[..., :-1], windows[..., -1]
        mean, log_std = model(steps)
        action = steps[..., -mean.shape[-1] :].clamp(-1 + 1e-6, 1 - 1e-6)
        log_prob = squashed_log_prob(mean, log_std, torch.atanh(action))
        return log_prob, -squashed_log_prob(mean, log_std, mean + log_std.exp() * noise), real

    def update(windows, noise, rate):
        log_prob, entropy, real = likelihood(windows, noise)
        temperature = log_temperature.detach().exp()
        loss = sequence_loss(log_prob, entropy, temperature, real)
        optimizers["actor"].minimize(loss, rate)
        entropy = (entropy.detach() * real).sum() / real.sum()
        optimizers["log_temperature"].minimize(log_temperature.exp() * (entropy + noise.shape[-1]))  # target: -A nats
        return numbers(loss=loss, entropy=entropy, temperature=temperature)

    def held_out_loss(windows, noise):
        log_prob, entropy, real = likelihood(windows, noise)
        return sequence_loss(log_prob, entropy, 0.0, real)

    return update, held_out_loss


def held_out(last, share=0.05):
    """-> (N,) is this transition one of the last `share` of the episodes, at least one? last (N,): ends of episodes."""
    episode = last.cumsum(0) - last.long()
    count = int(episode[-1]) + 1
    return episode >= count - max(1, round(share * count)) if count > 1 else torch.zeros_like(last)


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
    """Maximum likelihood on windows of the data, from scratch; the last twentieth of the episodes is held out."""
    device, (mean, _) = data.rows.device, observation_stats(data)
    obs, action, reward = data.split(data.rows)[:3]
    stats = mean, obs.cpu().std(0) + 1e-6
    steps, left = torch.cat([returns_to_go(reward, data.last)[:, None], obs, action], dim=1), steps_left(data.last)
    out, places = held_out(data.last), torch.arange(len(steps), device=device)
    windows = Windows(steps, left, places[~out], args.window)
    rest = Windows(steps, left, places[out if out.any() else ~out], args.window)
    if args.target_return is None:
        args.target_return = steps[data.last.roll(1), 0].max().item()  # of the first steps of all episodes
    torch.manual_seed(args.seed)
    sizes = {"width": args.width, "num_layers": args.num_layers, "num_heads": args.num_heads}
    nets = {"actor": DecisionTransformer(*stats, data.act_dim, **sizes, scale=args.return_scale, bf16=args.bf16)}
    nets["log_temperature"] = nn.ParameterList([torch.tensor(math.log(args.temperature))])
    nets = {name: net.to(device) for name, net in nets.items()}
    optimizers = {"actor": Adam(nets["actor"].parameters(), args.learning_rate, max_norm=0.25)}
    optimizers["log_temperature"] = Adam(nets["log_temperature"].parameters(), args.temperature_lr)
    run.restore(nets, optimizers, torch.Generator(device).manual_seed(args.seed))
    update, loss = make_update(args, nets, optimizers)
    envs = [data.make_env() for _ in range(args.eval_episodes)]
    index = torch.randint(len(rest), (512,), generator=torch.Generator().manual_seed(0)).to(device)
    noise = torch.randn(512, args.window, data.act_dim, generator=torch.Generator().manual_seed(0)).to(device)

    def check():
        """The loss on held-out episodes, and the score."""
        with torch.no_grad():
            value = loss(rest[index], noise).item()
        seed = 100_000_000 + 1_000_000 * args.seed
        returns = roll_out(nets["actor"], envs, seed, device, args.target_return, args.context)
        return {"held_out_loss": value, "score": data.score(returns.mean())}

    grow = torch.arange(1, args.updates + 1, device=device) / max(1, args.warm_up_updates)
    rate, shape = grow.clamp(max=1.0), (args.batch_size, args.window, data.act_dim)
    update = compile_update(update, args)
    train_offline(args, run, "offline", args.updates, update, windows, shape, check, lambda step: (rate[step - 1],))
    policy = {"kind": KIND, **sizes, "context": args.context, "target_return": args.target_return}
    finish_transformer(args, run, data, envs, policy)


def finish_transformer(args, run, data, envs, policy):
    """The closing score over 50 episodes, and the checkpoint: plain tensors, numbers and strings."""
    actor, progress, scores = run.nets["actor"], run.progress, []
    for seed in range(200_000_000 + 1_000_000 * args.seed, 10**12, len(envs)):
        returns = roll_out(actor, envs, seed, data.rows.device, args.target_return, args.context)
        scores += [data.score(x) for x in returns]
        if len(scores) >= CLOSING_EPISODES:
            break
    progress["closing_score"] = float(np.mean(scores))
    progress["closing_error"] = float(np.std(scores) / math.sqrt(len(scores)))
    origin = {"format": 1, "algorithm": ALGORITHM, "env_id": args.env_id, "dataset": data.name, "policy": policy}
    weights = {"actor": {key: value.cpu() for key, value in actor.state_dict().items()}}
    flags = {key: value for key, value in asdict(args).items() if key not in ("output", "run_dir", "resume")}
    last = {"step": args.updates, "score": progress["closing_score"], "args": flags, "versions": versions()}
    save_file({**origin, **weights, **last}, Path(args.output))


ALGORITHM, KIND, CLOSING_EPISODES = "dt", "decision_transformer", 50  # this script, its policy class
RANGES = {
    (-(10**9), 10**9): "target_return",
    (0, 1): "learning_rate temperature_lr",
    (0, 10**9): "seed updates warm_up_updates",
    (1, 10**9): "eval_every_updates eval_episodes batch_size",
    (1, 1024): "num_threads num_layers num_heads window context",
    (1, 8192): "width",
    (1e-9, 10**9): "temperature return_scale",
}
RESUMABLE = "updates compile num_threads track wandb_project_name wandb_entity"
PRIVATE = "stage step"  # of a run's progress, not in summary.json


def squashed_log_prob(mean, log_std, u):
    """log density of a = tanh(u) in nats, (..., A) three times -> (...):

        log N(u; mean, std^2) - sum log(1 - tanh(u)^2),   log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u))

    Takes u and not a: atanh(a) is not finite where tanh rounds to 1."""
    normal = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (normal - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class Block(nn.Module):
    """Attention to earlier tokens and a ReLU layer, both residual: (B, T, H) -> (B, T, H)."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out, self.num_heads = nn.Linear(width, 3 * width), nn.Linear(width, width), num_heads
        self.wide = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # CPUs are slow at the others in bf16
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.wide(self.norms[1](x))


class DecisionTransformer(nn.Module):
    """a_t = tanh(u), u ~ N(mean, std^2), both functions of R_1 s_1 a_1 ... R_t s_t. A token sees those before it and
    knows no position, as in ODT; so padding after a sequence changes nothing in it."""

    def __init__(self, obs_mean, obs_std, act_dim, width, num_layers, num_heads, scale=1.0, bf16=False):
        super().__init__()
        self.register_buffer("obs_mean", obs_mean.clone())
        self.register_buffer("obs_std", obs_std.clone())
        self.register_buffer("return_scale", torch.tensor(scale))
        self.sizes, self.bf16 = [1, len(obs_mean), act_dim], bf16
        self.embeddings = nn.ModuleList([nn.Linear(size, width) for size in self.sizes])
        self.blocks = nn.ModuleList([Block(width, num_heads) for _ in range(num_layers)])
        self.norms, self.head = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)]), nn.Linear(width, 2 * act_dim)
        nn.init.orthogonal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, steps):
        """steps (B, T, 1 + O + A): return-to-go, observation, action, all raw -> mean and log_std (B, T, A) of u. The
        last action is not looked at."""
        to_go, obs, action = steps.split(self.sizes, dim=-1)
        inputs = to_go * self.return_scale, (obs - self.obs_mean) / self.obs_std, action
        tokens = [embed(x) for embed, x in zip(self.embeddings, inputs, strict=True)]
        x = self.norms[0](torch.stack(tokens, dim=2).flatten(1, 2))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            for block in self.blocks:
                x = block(x)
        mean, spread = self.head(self.norms[1](x[:, 1::3].float())).chunk(2, dim=-1)  # at the observations' tokens
        return mean, -5 + 3.5 * (torch.tanh(spread) + 1)


@torch.no_grad()
def roll_out(model, envs, seed, device, target_return, context, watch=lambda: None):
    """One episode in each of the n `envs`, all at once, with the most likely actions of a policy that reads the latest
    `context` steps and is asked for target_return, of which each reward is taken off. `watch` is called before every
    step. -> raw returns (n,)."""
    n, alive, returns, length = len(envs), np.arange(len(envs)), np.zeros(len(envs)), 0
    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
    history = torch.zeros(n, context, sum(model.sizes), device=device)
    while len(alive):
        watch()
        history, length = history.roll(-1, dims=1), min(length + 1, context)
        now = np.column_stack([target_return - returns, obs, np.zeros((n, model.sizes[-1]))])
        history[:, -1] = torch.as_tensor(now, dtype=torch.float32, device=device)
        actions = torch.tanh(model(history[alive, -length:])[0][:, -1])
        history[alive, -1, -model.sizes[-1] :], over = actions, []
        for i, action in zip(alive, actions.cpu().numpy(), strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i] += reward
            over += [i] if terminated or truncated else []
        alive = np.setdiff1d(alive, over)
    return returns


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
                norm = torch.stack(torch._foreach_norm(grads)).norm()
                grads = torch._foreach_mul(grads, (self.max_norm / (norm + 1e-6)).clamp(max=1.0))
            adam(self.params, grads, self.means, self.squares, [], self.steps, **options)

    def state_dict(self):
        return {"state": [*self.steps, *self.means, *self.squares]}

    def load_state_dict(self, saved):
        for mine, value in zip(self.state_dict()["state"], saved["state"], strict=True):
            mine.copy_(value.view(mine.shape))  # a view, or a smaller one would be broadcast


def numbers(**values):
    return {key: value.detach() for key, value in values.items()}


def compile_update(update, args):
    """The whole update as one graph (CUDA graphs on a GPU); with --no-compile, or no compiler that works, eagerly."""
    torch._dynamo.config.trace_autograd_ops = True  # lets torch.autograd.grad stay inside the graph
    mode = "reduce-overhead" if args.cuda else "default"
    ways = [torch.compile(update, mode=mode, fullgraph=True)] * args.compile + [update]

    def run(*inputs):
        try:
            return ways[0](*inputs)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # before anything was computed
            reason = f"{type(error.inner_exception).__name__}; the updates run uncompiled, about a third slower"
            print(f"no C++ compiler that works: {reason}", file=sys.stderr)
            return ways.pop(0) and update(*inputs)

    return run if args.compile else update


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
    try:
        spec, places = json.loads(spec), {f"{getattr(gym.wrappers, w).__module__}:{w}" for w in harmless}
        if spec["entry_point"].startswith("gymnasium_robotics."):  # AntMaze, Kitchen, Adroit
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
        good = {wrapper["entry_point"] for wrapper in spec["additional_wrappers"]} <= places
        good &= gym.registry[spec["id"]].entry_point == spec["entry_point"]
        good &= not any(isinstance(value, str) and "/" in value for value in spec["kwargs"].values())  # files
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(f"{name} names no environment that gymnasium knows ({error!r}); none was made") from error
    if not good:
        raise UserError(f"{name} names {spec['id']} with code or wrappers that are not gymnasium's; none was made")


def load_data(args, device):
    """args.dataset, or the local o2o/<env_id>, which offline/collect.py makes if it is missing. Raises UserError if
    there is no such dataset, or if it is not flat, not finite, or of no environment here."""
    name, here = args.dataset or f"o2o/{args.env_id}", Path(__file__).resolve().parent
    scripts = [path / "collect.py" for path in (here / "offline", here, here.parent / "offline")]
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
    rewards = rows[:, obs_dim + act_dim]
    rewards[:] = getattr(args, "reward_scale", 1.0) * rewards + getattr(args, "reward_bias", 0.0)
    data = Data(name, *(torch.from_numpy(x).to(device) for x in (rows, last)), obs_dim, act_dim, (low, high), source)
    score = f"score {data.score(np.mean([e.rewards.sum() for e in episodes])):.1f}"
    scale = "the return, for lack of references" if None in points else f"0 at a return of {low:.0f}, 100 at {high:.0f}"
    print(f"dataset {name}: {len(rows)} transitions, {score} ({scale}), environment {env.spec.id}", flush=True)
    return data


def observation_stats(data):
    """-> mean and std + 1e-3 of the data's observations, (O,) each; they travel in the checkpoint."""
    obs = data.split(data.rows)[0].cpu()
    return obs.mean(0), obs.std(0) + 1e-3


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
    everything that the next update depends on. `progress` are plain numbers, strings and lists. Nothing is written
    before `restore`, when all that can be refused has been."""

    def __init__(self, args, progress):
        now = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}"  # two runs may start in one second
        default = f"runs/{args.env_id}__{args.exp_name}__{args.seed}__{now}"
        self.args, self.dir, self.writing = args, Path(args.resume or args.run_dir or default), False
        if not args.resume and (self.dir / "args.json").exists():
            raise UserError(f"{self.dir} holds a run already; continue it with --resume or name another --run-dir")
        self.begun = args.resume and (self.dir / "resume.pt").exists()
        self.saved = {"progress": progress, "metrics": [], "seconds": 0.0}
        self.saved |= load_file(self.dir / "resume.pt") if self.begun else {}
        self.progress, self.metrics = self.saved["progress"], self.saved["metrics"]
        try:
            for key, x in progress.items():
                if not isinstance(self.progress[key], float | None if x is None else type(x)):
                    raise TypeError(key)
            json.dumps([self.progress, list(map(json.loads, self.metrics))])
            self.started = time.monotonic() - float(self.saved["seconds"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{self.dir}/resume.pt is damaged, or of another script ({error!r})") from error

    def restore(self, nets, optimizers, generator):
        """Names what resume.pt holds, loads it when this run continues one, and begins to write."""
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
            for kind, parts in {"nets": nets, "optimizers": optimizers}.items():
                for key, part in parts.items() if self.begun else ():
                    part.load_state_dict(self.saved[kind][key])
            generator.set_state(self.saved["generator"] if self.begun else generator.get_state())
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
            hint = f"{self.dir}/resume.pt keeps the last good state, " * (self.dir / "resume.pt").exists()
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
    args = tyro.cli(Args, args=[word for word in argv if word not in ("-h", "--help")])
    if not args.resume:
        return tyro.cli(Args, args=argv, default=replace(Args(), **settings(args)))
    try:
        stored = json.loads((Path(args.resume) / "args.json").read_text())
        algorithm, default = stored.pop("algorithm"), Args(**{**stored, "resume": args.resume})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{args.resume} holds no run of this script that could be resumed ({error})") from error
    args = tyro.cli(Args, args=argv, default=default)
    changed = [flag for flag, value in asdict(args).items() if value != getattr(default, flag)]
    if algorithm != ALGORITHM or not set(changed) <= set(RESUMABLE.split()):
        raise UserError(
            f"{args.resume} is a run of {algorithm}; when it is resumed, only these may change: {RESUMABLE}"
        )
    return args


def run_cli(main):
    """A UserError becomes one sentence on stderr and exit code 2; SIGTERM ends a run like Ctrl-C, with a summary."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs would ignore the former
        signal.signal(number, signal.default_int_handler)
    try:
        main(parse_args())
    except (UserError, OSError) as error:  # OSError: no space left, no permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main(args: Args):
    """-> what summary.json says. Raises UserError before anything is written, if it can."""
    check_ranges(args)
    torch.set_num_threads(args.num_threads)
    if args.cuda and not torch.cuda.is_available():
        raise UserError("--cuda was asked for but torch sees no CUDA device; leave it out to run on the CPU")
    if args.width % args.num_heads:
        raise UserError(f"--width {args.width} is not a multiple of --num-heads {args.num_heads}")
    check_output(args, "dt.pt")
    run = Run(args, {"stage": "offline", "step": 0, "closing_score": None, "updates_per_second": {}})
    data, status = load_data(args, torch.device("cuda" if args.cuda else "cpu")), "failed"
    try:
        train(args, run, data)
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        summary = run.summarize(status)
        print("\n".join(f"{key:15} {value:7.1f}" for key, value in summary.items() if isinstance(value, float)))
        print(f"{status} after {summary['wall_seconds']:.0f} s; everything is in {run.dir}")
    return summary


if __name__ == "__main__":
    run_cli(main)
