"""Does an AntMaze critic know what a fall costs? V of an ant on its back beside that of an upright one in its place.

    python benchmark/fallen_ant.py --checkpoint offline/checkpoints/antmaze-umaze-v2/iql.pt

An ant on its back can't get up, so its value is that of an episode without success, -1 / (1 - gamma) = -100; one that
stands has a chance left. Where the data show too little of what follows a fall the critic has it the other way round,
and every actor that climbs it learns to fall.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "offline")]
import collect_antmaze  # noqa: E402
import iql  # noqa: E402

AFTER = (20, 100, 400)  # steps since the fall


@dataclass
class Args:
    checkpoint: str = str(ROOT / "offline/checkpoints/antmaze-umaze-v2/iql.pt")  # of offline/iql.py
    episodes: int = 10  # falls to look at


def falls(maze, episodes):
    """-> observations of ants that random actions threw on their back, {steps since the fall: (n, 29)}, and of ones
    that stand in the same place, likewise."""
    env, rng = collect_antmaze.maze_env(maze, evaluation=True), np.random.default_rng(0)
    fallen, upright = ({after: [] for after in AFTER} for _ in range(2))
    for seed in range(episodes):
        obs, _ = env.reset(seed=seed)
        start, since, step, over = obs.copy(), None, 0, False
        while not over and (since is None or since < max(AFTER)):
            if step % 3 == 0:
                action = rng.choice([-1.0, 1.0], 8)
            obs, _, terminated, truncated, _ = env.step(action)
            since = since + 1 if since is not None else 0 if obs[4] ** 2 + obs[5] ** 2 > 0.5 else None
            step, over = step + 1, terminated or truncated
            if since in fallen:
                fallen[since].append(obs.copy())
                upright[since].append(np.concatenate([obs[:2], start[2:]]))
    return fallen, upright


def load_value(path):
    """-> V of a checkpoint, and its maze. Raises UserError."""
    saved = iql.load_file(path)
    try:
        value = iql.Value(saved["value"]["obs_mean"], saved["value"]["obs_std"], (256, 256), nn.ReLU)
        value.load_state_dict(saved["value"])
        return value, collect_antmaze.parse_maze(saved["env_id"])[0]
    except (KeyError, TypeError, AttributeError, RuntimeError, collect_antmaze.UserError) as error:
        raise iql.UserError(f"{path} is not of offline/iql.py on a maze ({error})") from error


def main(args):
    """-> {steps since the fall: (mean V of the fallen, of the upright)}, printed too."""
    value, maze = load_value(args.checkpoint)
    fallen, upright = falls(maze, args.episodes)
    result = {}
    for after in AFTER:
        with torch.no_grad():
            v = [value(torch.as_tensor(np.stack(x[after]), dtype=torch.float32)) for x in (fallen, upright)]
        result[after] = tuple(x.mean().item() for x in v)
        spread = f"{v[0].min():.0f} to {v[0].max():.0f}"
        print(f"{after} steps after the fall: V {result[after][0]:.0f} ({spread}), upright {result[after][1]:.0f}")
    return result


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except iql.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
