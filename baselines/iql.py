"""IQL goes on online (Kostrikov et al. 2022, arXiv 2110.06169, section 5.3): the offline algorithm, unchanged, on data
that grow.

V is an expectile of Q over the actions in the buffer, so no action outside it is ever asked for; the policy imitates
the buffer's actions, the better ones more. Nothing has to be rebuilt or constrained for that to work online, and
nothing makes it explore beyond the noise of its own policy either.

    python baselines/iql.py --env-id hopper-medium-v2

Starts from a checkpoint of offline/iql.py, critics and V included. One buffer holds all data and what is collected, and
is sampled uniformly; one update per environment step. As in the authors' code the policy's learning rate does not decay
online. Theirs does not offline either, when they fine-tune; the checkpoint's fell to 0, so here it jumps back (CORL's
climbs back along the cosine), and Adam and the slow critics begin anew.

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
from minari.storage.datasets_root_dir import get_dataset_path
from torch import nn
from torch.optim.adam import adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "hopper-medium-v2"  # task: names the dataset, the offline policy and the run folder
    seed: int = 1  # the only seed: batches, training and evaluation environments derive from it
    exp_name: str = "iql_online"  # part of the run folder's name
    cuda: bool = False  # train on a GPU
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "o2o"  # project there
    wandb_entity: str | None = None  # team there
    dataset: str | None = None  # Minari id, local or remote; None: o2o/<env_id>, made by offline/collect.py if missing
    checkpoint: str | None = None  # policy, critics and V; None: offline/checkpoints/<env_id>/iql.pt
    run_dir: str | None = None  # folder of this run; None: runs/<env_id>__<exp_name>__<seed>__<time>
    resume: str | None = None  # folder of a run that was cut off, to be continued

    online_steps: int = 50_000  # environment steps (paper: 1,000,000)
    updates_per_step: int = 1  # gradient steps per environment step
    warm_up: int = 0  # environment steps that act without updates
    eval_every: int = 1_000  # environment steps between evaluations
    eval_episodes: int = 10  # episodes of one evaluation, all at once

    batch_size: int = 256  # transitions of one gradient step
    reward_scale: float = 1.0  # rewards are multiplied by it in all updates; scores are of raw rewards
    reward_bias: float = 0.0  # then this is added; the scale in the checkpoint comes on top
    gamma: float = 0.99  # discount
    tau: float = 0.005  # Polyak rate of the targets
    learning_rate: float = 3e-4  # policy, V and critics
    expectile: float = 0.7  # of Q over the buffer's actions, which V is: 0.5 their mean, 1 the best of them
    schedule: Literal["constant", "abrupt", "linear"] = "constant"  # its course online: constant, or to 0.85
    temperature: float = 3.0  # beta: weight of the advantage in the imitation
    max_weight: float = 100.0  # largest weight of an imitated action
    dropout: float = 0.0  # share of the policy's hidden units that each update leaves out

    compile: bool = True  # compile the update into one graph
    bf16: bool = False  # matrix products in bf16, if the CPU or GPU has units for it
    num_threads: int = 1  # CPU threads: such small networks get slower, not faster, once threads exceed the free cores


def settings(args):
    """What the authors change with the task; the command line still wins."""
    if args.env_id.startswith("kitchen"):
        return {"temperature": 0.5, "dropout": 0.1}
    if not args.env_id.startswith("antmaze"):
        return {}
    values = {"expectile": 0.9, "temperature": 10.0, "reward_bias": -1.0}
    return values | {"eval_every": 5_000, "eval_episodes": 50}


def scheduled(schedule, start, end, share):
    """An offline objective's strength after `share` in [0, 1] of the online steps: constant at `start`, abrupt to `end`
    with the first step, or linear from one to the other."""
    return start if schedule == "constant" else end if schedule == "abrupt" else start + (end - start) * share


def value_target(reward, terminated, next_value, gamma):
    """y = r + gamma (1 - d) V(s'); all (B,), in units of (scaled) return."""
    return reward + gamma * (1 - terminated) * next_value


def expectile_loss(advantage, expectile):
    """Eq. 5 of the paper: E[ |expectile - 1(A < 0)| A^2 ], A = min_j Q_j(s,a) - V(s), (B,). Its minimum over V is the
    expectile of Q: values above V count `expectile`, those below 1 - expectile."""
    return ((expectile - (advantage < 0).float()).abs() * advantage**2).mean()


def policy_loss(log_prob, advantage, temperature, max_weight):
    """Eq. 7: -E[ min(exp(temperature A), max_weight) log pi(a|s) ] over the data's actions; (B,) twice."""
    return -((temperature * advantage).exp().clamp(max=max_weight) * log_prob).mean()


def dropout_forward(actor, obs, noise, dropout):
    """The policy of one update, in which a share `dropout` of the hidden units is left out at random and the others
    make up for it. obs (B, O), noise (hidden layers, B, their width) standard normal -> what actor(obs) gives."""
    x = (obs - actor.obs_mean) / actor.obs_std
    with torch.autocast(obs.device.type, torch.bfloat16, enabled=actor.bf16):
        for layer, z in zip(actor.net[:-1:2], noise, strict=True):
            x = F.relu(layer(x))
            x = x * (torch.special.ndtr(z[:, : x.shape[1]]) > dropout) / (1 - dropout)
    return torch.tanh(actor.net[-1](x.float())), actor.log_std.clamp(-20, 2)


def make_iql_update(args, nets, optimizers, split):
    """-> update(rows (B, 2 O + A + 2) with scaled rewards, noise, policy_scale), which changes all `nets` in place and
    returns detached numbers. noise is that of --dropout, without it unused; policy_scale, a tensor, multiplies the
    policy's learning rate."""
    actor, value, critics, targets = (nets[key] for key in ("actor", "value", "critics", "targets"))

    def update(rows, noise, policy_scale):
        obs, action, reward, next_obs, terminated = split(rows)
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
        mean, log_std = dropout_forward(actor, obs, noise, args.dropout) if args.dropout else actor(obs)
        log_prob = gaussian_log_prob(mean, log_std, action)
        loss = policy_loss(log_prob, advantage.detach(), args.temperature, args.max_weight)
        optimizers["actor"].minimize(loss, policy_scale)
        values = numbers(value_loss=value_loss, critic_loss=critic_loss, policy_loss=loss, q_mean=q.mean())
        return values | numbers(v_mean=v.mean(), std=actor.log_std.exp().mean())

    return update


def train_online(args, run, update, data, expectile, score):
    """One environment step with an action drawn from the policy, then updates_per_step updates on the whole buffer. The
    environment receives exactly the action that the buffer stores."""
    progress, actor, generator = run.progress, run.nets["actor"], run.generator
    env, obs, buffer, num_data = online_start(args, run, data)
    rate, seconds, count, values = torch.ones((), device=buffer.device), 0.0, 0, {}
    layers = [layer.out_features for layer in actor.net[:-1:2]]
    shape = len(layers), args.batch_size, max(layers)  # of --dropout's noise
    for step in tqdm(range(progress["step"] + 1, args.online_steps + 1), desc="online", unit="step", disable=None):
        with torch.no_grad():
            noise = torch.randn(1, data.act_dim, generator=generator, device=generator.device)
            mean, log_std = actor(data.to_tensor(obs[None]))
            action = (mean + log_std.exp() * noise).clamp(-1, 1)[0].cpu().numpy()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        scaled = run.scale * (args.reward_scale * reward + args.reward_bias)
        row = np.concatenate([obs, action, [scaled], next_obs, [terminated]])  # a time limit keeps its bootstrap
        buffer[num_data + step - 1], obs = data.to_tensor(row), next_obs
        if terminated or truncated:
            obs, progress["episode_start"] = env.reset(seed=1_000_000 * args.seed + step)[0], step

        if step > args.warm_up:
            clock, count = time.monotonic(), count + args.updates_per_step
            expectile.fill_(scheduled(args.schedule, args.expectile, 0.85, step / args.online_steps))
            for _ in range(args.updates_per_step):
                index = torch.randint(num_data + step, (args.batch_size,), generator=generator, device=generator.device)
                noise = torch.randn(shape, generator=generator, device=generator.device) if args.dropout else None
                values = update(buffer[index], noise, rate)
            if args.cuda:
                torch.cuda.synchronize()  # for the clock; the next action would wait for the updates anyway
            seconds += time.monotonic() - clock
        progress["step"] = progress["online_steps"] = step
        if step % args.eval_every == 0 or step == args.online_steps:
            progress["updates_per_second"]["online"] = count / max(seconds, 1e-9)
            row = values | {"updates_per_second": progress["updates_per_second"]["online"]} | score()
            progress["scores"].append([step, row["score"]])
            run.log("online", step, row)
            run.save(online=buffer[num_data : num_data + step].cpu().clone())
            seconds, count = 0.0, 0


def train(args, run, data, nets, saved):
    """The offline algorithm goes on, from the networks of the checkpoint."""
    progress, device = run.progress, data.rows.device
    torch.manual_seed(args.seed)
    nets, run.scale = {name: net.to(device) for name, net in nets.items()}, saved["reward_scale"]
    data.rows[:, data.obs_dim + data.act_dim] *= run.scale
    optimizers = {name: Adam(nets[name].parameters(), args.learning_rate) for name in ("actor", "value", "critics")}
    run.restore(nets, optimizers, torch.Generator(device).manual_seed(args.seed))
    expectile = torch.tensor(args.expectile, device=device)  # a tensor, for --schedule changes it between updates
    update = make_iql_update(replace(args, expectile=expectile), nets, optimizers, data.split)
    update = compile_update(update, args)
    envs = [data.make_env() for _ in range(args.eval_episodes)]
    score = partial(score_policy, args, run, data, envs)
    if progress["stage"] == "start":
        progress["offline_score"], progress["offline_error"] = closing_score(args, nets["actor"], data, envs)
        progress["start_score"] = score()["score"]
        print(f"offline policy: score {progress['offline_score']:.1f} +- {progress['offline_error']:.1f}", flush=True)
        run.enter("online")
    train_online(args, run, update, data, expectile, score)
    progress["closing_score"], progress["closing_error"] = closing_score(args, nets["actor"], data, envs)
    save_file(iql_checkpoint(args, data, nets, saved, progress["closing_score"]), run.dir / "model.pt")


ALGORITHM, KIND, SOURCE = "iql_online", "tanh_gaussian", "iql"  # this script, its policy class, who trains one
RESUMABLE = "online_steps compile num_threads track wandb_project_name wandb_entity"
PRIVATE = "stage step episode_start"  # of a run's progress, not in summary.json
RANGES = {
    (-(10**9), 10**9): "reward_bias",
    (0, 1): "gamma tau learning_rate expectile",
    (0, 0.9): "dropout",
    (0, 10**9): "seed online_steps warm_up temperature max_weight",
    (1, 10**9): "updates_per_step eval_every eval_episodes batch_size",
    (1e-9, 10**9): "reward_scale",
    (1, 1024): "num_threads",
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


def collected(run, data):
    """-> rows (n, 2 O + A + 2) of the n environment steps that a resumed run has made. Raises UserError."""
    done, width = run.saved.get("online", data.rows[:0]), data.rows.shape[1:]
    if not torch.is_tensor(done) or done.shape[1:] != width or len(done) != run.progress["online_steps"]:
        raise UserError(f"{run.dir}/resume.pt is damaged: it does not hold the steps that the run has made")
    return done.to(data.rows.device)


def online_start(args, run, data):
    """-> the training environment and the observation it stands at, the buffer (N + online_steps, 2 O + A + 2) with
    the data in its first N rows, and N. A resumed run repeats the actions of the episode that was cut off, so that no
    state of a simulator has to be stored."""
    start, num_data, env = run.progress["episode_start"], len(data.rows), data.make_env()
    buffer = torch.cat([data.rows, data.rows.new_zeros(args.online_steps, data.rows.shape[1])])
    done = collected(run, data)
    buffer[num_data : num_data + len(done)] = done
    obs, _ = env.reset(seed=1_000_000 * args.seed + start)
    for action in data.split(done[start:])[1].cpu().numpy():
        obs = env.step(action)[0]
    return env, obs, buffer, num_data


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


def load_iql(path, args, data):
    """A checkpoint of offline/iql.py -> its networks and the checkpoint. Raises UserError if the file is missing,
    broken, of another algorithm, environment or size."""
    saved = load_file(path)
    try:
        origin, form = saved["env_id"], saved["format"]
        if form != 1 or origin.split("-")[0] != args.env_id.split("-")[0] or saved["policy"]["kind"] != KIND:
            raise UserError(f"{path} is {saved['algorithm']} for {origin}, in format {form}; not IQL for {args.env_id}")
        hidden, count, value = saved["policy"]["hidden"], saved["num_critics"], saved["value"]
        if sum([*hidden, count]) > 100_000:
            raise ValueError("absurd sizes")
        stats = value["obs_mean"], value["obs_std"]
        if len(stats[0]) != data.obs_dim:
            raise UserError(f"{path} expects {len(stats[0])} observations, the data have {data.obs_dim}")
        nets = {"value": Value(*stats, hidden, nn.ReLU, args.bf16)}
        nets["critics"] = Critics(*stats, data.act_dim, hidden, n=count, bf16=args.bf16)
        nets["actor"] = TanhGaussianActor(*stats, data.act_dim, hidden, bf16=args.bf16)
        for key, net in nets.items():
            net.load_state_dict(saved[key])
            if not all(x.isfinite().all() for x in net.state_dict().values()) or (net.obs_std <= 0).any():
                raise UserError(f"{path} holds weights that are not finite, or a std that is not positive")
        saved["reward_scale"] = float(saved["reward_scale"])
        made = f"{saved['algorithm']}, {saved['step']} updates on {saved['dataset']}, {count} critics"
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        sizes = f"{data.obs_dim} observations and {data.act_dim} actions"
        raise UserError(f"{path} holds no complete IQL for {sizes} ({type(error).__name__})") from error
    nets["targets"] = deepcopy(nets["critics"])
    print(f"offline policy {path}: {made}", flush=True)
    return nets, saved


def iql_checkpoint(args, data, nets, saved, score):
    """The fine-tuned policy with critics and V, in the format of the offline ones."""
    weights = {
        net: {key: x.cpu() for key, x in nets[net].state_dict().items()} for net in ("actor", "critics", "value")
    }
    origin = {"algorithm": ALGORITHM, "env_id": args.env_id, "dataset": data.name, "step": args.online_steps}
    return {**saved, **weights, **origin, "score": score, "args": asdict(args), "versions": versions()}


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
    path = Path(__file__).resolve().parents[1] / "offline/checkpoints" / args.env_id / f"{SOURCE}.pt"
    shipped = sorted(file.parent.name for file in path.parents[1].glob(f"*/{path.name}"))
    if args.checkpoint is not None:
        path = args.checkpoint = str(Path(args.checkpoint).resolve())  # so that a resumed run finds it from anywhere
    if not Path(path).exists():
        flags = f"--env-id {args.env_id}" + f" --dataset {args.dataset}" * bool(args.dataset)
        hint = f"or name a --checkpoint; {', '.join(shipped)} have one"
        raise UserError(f"no offline policy at {path}; train one with python offline/{SOURCE}.py {flags}, {hint}")
    if args.online_steps and args.warm_up >= args.online_steps:
        print(f"--warm-up {args.warm_up} leaves no updates in {args.online_steps} --online-steps", file=sys.stderr)
    progress = {"stage": "start", "step": 0, "episode_start": 0, "online_steps": 0, "selection_steps": 0, "scores": []}
    scores = "offline_score offline_error start_score aligned_score closing_score closing_error"
    run = Run(args, progress | dict.fromkeys(scores.split()) | {"updates_per_second": {}})
    if run.progress["online_steps"] > args.online_steps:
        raise UserError(f"{run.dir} did {run.progress['online_steps']} --online-steps already; resume it with more")
    data = load_data(args, torch.device("cuda" if args.cuda else "cpu"))
    (nets, saved), status = load_iql(path, args, data), "failed"
    try:
        train(args, run, data, nets, saved)
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
