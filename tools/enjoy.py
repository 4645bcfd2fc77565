"""Evaluates any checkpoint, of an offline script or of a fine-tuned policy, or films it.

    python tools/enjoy.py --checkpoint offline/checkpoints/hopper-medium-v2/cql.pt
    python tools/enjoy.py --checkpoint runs/my-run/model.pt --episodes 1 --video hopper.mp4

Prints the score of the policy's most likely actions: the mean over the episodes and its standard error. Start states
are the same for every checkpoint. --json keeps the result in a file, under its name and hash; one that is in
it already is not evaluated again.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import imageio
import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from minari.storage.datasets_root_dir import get_dataset_path
from torch import nn
from tqdm import tqdm


@dataclass
class Args:
    checkpoint: tuple[str, ...] = ()  # files to evaluate, one after the other
    env_id: str | None = None  # task; None: the one that the checkpoint was trained on
    dataset: str | None = None  # Minari id whose environment it is; None: that of the checkpoint, or o2o/<env_id>
    episodes: int = 200  # episodes of each checkpoint
    seed: int = 1  # start states derive from it
    video: str | None = None  # film one episode of each checkpoint into this file, .mp4 or .gif
    json: str | None = None  # file that keeps the scores, of this and of earlier calls


def layers(state, prefix, x):
    """A ReLU network whose weights are `<prefix>net.<n>.weight`, (B, inputs) -> (B, outputs)."""
    numbers = sorted({int(key.split(".")[-2]) for key in state if key.startswith(f"{prefix}net.")})
    for n in numbers:
        x = F.linear(x, state[f"{prefix}net.{n}.weight"], state[f"{prefix}net.{n}.bias"])
        x = x.relu() if n < numbers[-1] else x
    return x


def mode_from(saved):
    """-> the function that maps raw observations (B, O) to the most likely actions (B, A) of a checkpoint's policy."""
    kind, state = saved["policy"]["kind"], saved["actor"]

    def squashed(obs):
        return torch.tanh(layers(state, "", (obs - state["obs_mean"]) / state["obs_std"]))

    def latent(obs):
        code = layers(state, "latent.", (obs - state["latent.mean"]) / state["latent.std"])
        x = torch.cat([obs, saved["max_latent"] * torch.tanh(code)], dim=-1)
        action = layers(state, "decoder.", (x - state["decoder.mean"]) / state["decoder.std"])
        return (action * state["decoder.act_std"] + state["decoder.act_mean"]).clamp(-1, 1)

    kinds = {"squashed_gaussian": lambda obs: squashed(obs).chunk(2, dim=-1)[0], "latent": latent}
    return {**kinds, "tanh_gaussian": squashed, "deterministic": squashed}[kind]


def load_mode(path, data):
    """-> mode_from the checkpoint at `path`, tried on one observation, and the function that makes an environment show
    what this policy looks at: a Decision Transformer its history, others the environment's observation. Raises
    UserError if it does not fit the data."""
    saved, obs, wrap = load_file(path), torch.zeros(1, data.obs_dim), lambda env: env
    try:
        if saved["policy"]["kind"] == "decision_transformer":
            net, wrap = transformer_from(saved, data.obs_dim, data.act_dim)
            mode, obs = net.mode, torch.zeros(1, saved["policy"]["context"] * (data.obs_dim + data.act_dim + 2))
        else:
            mode = mode_from(saved)
        actions = mode(obs)
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        sizes = f"{data.obs_dim} observations and {data.act_dim} actions"
        raise UserError(f"{path} holds no policy for {sizes} ({type(error).__name__}: {error})") from error
    if actions.shape != (1, data.act_dim) or not actions.isfinite().all():
        raise UserError(f"{path} gives actions of shape {tuple(actions.shape)}, {data.name} has {data.act_dim} of them")
    return mode, wrap


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


def transformer_from(saved, obs_dim, act_dim):
    """-> the Decision Transformer in a checkpoint, and the function that makes an environment show it its history.
    Raises ValueError, TypeError or KeyError if it does not fit observations and actions of these sizes."""
    policy, state = saved["policy"], saved["actor"]
    hidden, heads, context = list(policy["hidden"]), policy["heads"], policy["context"]
    if not all(type(x) is int and 0 < x <= 1024 for x in (heads, context, *hidden)) or not 0 < len(hidden) <= 64:
        raise ValueError("absurd sizes")
    if len(set(hidden)) > 1 or hidden[0] % heads:
        raise ValueError("its blocks differ in width, or have no whole number of heads")
    options = {"length": context, **{key: float(policy[key]) for key in ("target_return", "rtg_scale")}}
    if not math.isfinite(options["target_return"] * options["rtg_scale"]):
        raise ValueError("the return that it asks for is not finite")
    with torch.device("meta"):  # takes no memory before the sizes are known to be those of the file
        net = DecisionTransformer(torch.empty(obs_dim), torch.empty(obs_dim), act_dim, hidden, heads)
    shapes, found = ({key: x.shape for key, x in weights.items()} for weights in (net.state_dict(), state))
    if shapes != found or {x.dtype for x in state.values()} != {torch.float32}:
        raise ValueError("its weights do not fit its sizes")
    if not all(x.isfinite().all() for x in state.values()) or (state["obs_std"] <= 0).any():
        raise ValueError("it holds weights that are not finite, or a std that is not positive")
    net.load_state_dict(state, assign=True)
    return net.requires_grad_(False), partial(History, **options)


def film(mode, wrap, data, path, seed):
    """One episode as a film. Raises UserError if this machine cannot render."""
    frames = []
    try:
        env = wrap(data.source.recover_environment(render_mode="rgb_array"))
        obs, done = env.reset(seed=seed)[0], False
        bar = tqdm(desc="film", unit="frame", disable=None)  # without a GPU a frame takes a fifth of a second
        while not done:
            bar.update()
            frames.append(env.render())
            obs, _, terminated, truncated, _ = env.step(mode(data.to_tensor(obs[None]))[0].cpu().numpy())
            done = terminated or truncated
        temporary = Path(path).with_name(f".{Path(path).name}")  # keeps the ending, which chooses the format
        imageio.mimsave(temporary, frames, fps=env.metadata.get("render_fps", 30))
        os.replace(temporary, path)
    except Exception as error:  # whatever the renderer or the encoder raises
        hint = "it takes what gymnasium renders with: pygame, or for MuJoCo MUJOCO_GL=egl or osmesa"
        raise UserError(f"cannot film ({' '.join(str(error).split()) or type(error).__name__}); {hint}") from error
    print(f"{path}: {len(frames)} steps")


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


def main(args: Args):
    if not args.checkpoint or args.episodes < 1 or args.seed < 0:
        raise UserError("name a --checkpoint, at least one of --episodes, and a --seed that is not negative")
    if args.video and Path(args.video).suffix not in (".mp4", ".gif"):
        raise UserError(f"--video {args.video} has to end in .mp4 or .gif")
    torch.set_num_threads(1)
    device, known, known_data = torch.device("cpu"), {"episodes": args.episodes, "policies": {}}, {}
    if args.json and Path(args.json).exists():
        try:
            known = json.loads(Path(args.json).read_text())
            good = known["episodes"] == args.episodes and isinstance(known["policies"], dict)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise UserError(f"{args.json} holds no scores over {args.episodes} episodes; name another file")
    for path in map(Path, args.checkpoint):
        saved = load_file(path)
        task, source, its = args.env_id or str(saved.get("env_id")), args.dataset, str(saved.get("dataset"))
        named = not (source or args.env_id) and re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", its)
        source = its if named and get_dataset_path(its).exists() else source  # own data are no o2o/<env_id>
        name, digest = f"{path.parent.name}/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest()
        if known["policies"].get(name, {}).get("sha256") == digest and not args.video:
            print(f"{path}: known")
            continue
        if (task, source) not in known_data:
            known_data[task, source] = load_data(Args(env_id=task, dataset=source), device)
        data = known_data[task, source]
        mode, wrap = load_mode(path, data)
        if args.video:
            film(mode, wrap, data, args.video, args.seed)
        envs, scores = [wrap(data.make_env()) for _ in range(min(10, args.episodes))], []
        policy = lambda obs, _, mode=mode: (mode(obs), torch.zeros(len(obs)))  # noqa: E731
        while len(scores) < args.episodes:
            seed = 300_000_000 + 1_000_000 * args.seed + len(scores)
            scores += [data.score(x) for x in evaluate(policy, envs, seed, device)[0]]
        scores = scores[: args.episodes]
        error = float(np.std(scores, ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else 0.0
        known["policies"][name] = {"score": float(np.mean(scores)), "error": error, "sha256": digest}
        print(f"{path}: score {np.mean(scores):.1f} +- {error:.1f} over {len(scores)} episodes", flush=True)
        if args.json:
            save_file(json.dumps({**known, "versions": versions()}, indent=1), Path(args.json))
    return known["policies"]


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
