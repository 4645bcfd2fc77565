"""Scores every policy that ships on 200 episodes, twenty times those of an evaluation in training.

    python results/policies.py    # writes results/policies.json, whose numbers `results/report.py` puts into README.md

The score is of the policy's mode: normalised mean return, and its standard error. Start states are the same for all.
Files that were scored before, known by their hash, are not scored again.
"""

import hashlib
import json
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import o2o_sac
import o3f

ROOT = Path(__file__).resolve().parents[1]
EPISODES, SEED = 200, 123_456_789  # no evaluation seed of a training run is near


def load(path, obs_dim, act_dim):
    """A checkpoint of offline/ -> its policy."""
    if o2o_sac.load_file(path, "cpu")["algorithm"] != "lapo":
        return o2o_sac.load_policy(path, path.parent.name, obs_dim, act_dim, std=1.0)[0]
    args = o3f.Args(env_id=path.parent.name, base="lapo")
    return o3f.load_base(path, args, obs_dim, act_dim, bf16=False)[0]["policy"]


def score(path, episodes=EPISODES):
    """-> mean and standard error, both normalised, of `episodes` episodes."""
    task = path.parent.name
    envs = [gym.make(o2o_sac.ENVS[o2o_sac.parse_task(task)[0]][0]) for _ in range(10)]
    policy = o2o_sac.mode_of(load(path, envs[0].observation_space.shape[0], envs[0].action_space.shape[0]))
    means = []
    for first in range(SEED, SEED + episodes, len(envs)):
        means.append(o2o_sac.normalized_score(task, o2o_sac.evaluate(policy, envs, first, "cpu")[0]))
    return {"score": float(np.mean(means)), "error": float(np.std(means, ddof=1) / len(means) ** 0.5)}


def main(folder=ROOT / "offline/checkpoints", output=ROOT / "results/policies.json"):
    torch.set_num_threads(1)
    known, found = json.loads(output.read_text())["policies"] if output.exists() else {}, {}
    for path in sorted(folder.glob("*-v2/*.pt")):
        name, digest = f"{path.parent.name}/{path.name}", hashlib.sha256(path.read_bytes()).hexdigest()
        fresh = known.get(name, {}).get("sha256") == digest
        found[name] = known[name] if fresh else {**score(path), "sha256": digest}
        print(f"{name}: {found[name]['score']:.1f} +- {found[name]['error']:.1f}", flush=True)
    o2o_sac.write_json({"episodes": EPISODES, "versions": o2o_sac.versions(), "policies": found}, output)


if __name__ == "__main__":
    main()
