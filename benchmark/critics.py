"""Which critic can an actor be updated on? OCR-CFT's first claim, offline: no update here sees a new transition.

    python results/critics.py --env-id hopper-medium-v2 --alignment-steps 15000 --eval-every-updates 1000

Stage 1 of o2o_sac.py once, and then three actors, each `--alignment-steps` updates from the offline policy:

  fixed     on the re-evaluated critic, which stays as it is
  iterated  on the re-evaluated critic, which goes on being evaluated, for the actor as it moves
  aligned   stage 2: on the critic that alignment makes of it

The flags are those of o2o_sac.py; `--resume` works. metrics.jsonl has the three as stages, with each actor's score.
"""

import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import o2o_sac as sac

Args = sac.Args
VARIANTS = ("fixed", "iterated", "aligned")


def make_updates(args, nets, optimizers, obs_dim, act_dim):
    """-> {stage: update(rows, noise)}; each variant has an actor of its own, the last two critics of their own."""

    def of(variant, **changes):
        names = ("actor", "critics", "targets")
        own = {name: nets[f"{name}_{variant}"] for name in names if f"{name}_{variant}" in nets}
        return {**nets, **own, "reference": nets["behaviour"], **changes}

    def adams(variant):
        return {name: optimizers[f"{name}_{variant}"] for name in ("actor", "critics")}

    def actor_step(variant, rows, noise):
        actor, critics = of(variant)["actor"], of(variant)["critics"]
        obs = rows[:, :obs_dim]
        action, log_prob, _ = actor.sample(obs, noise)
        loss = sac.actor_loss(log_prob, critics(obs, action), args.alpha)
        optimizers[f"actor_{variant}"].minimize(loss)
        return sac.numbers(actor_loss=loss, entropy=-log_prob.mean())

    evaluate_actor = sac.make_updates(
        args, of("iterated", behaviour=nets["actor_iterated"]), adams("iterated"), obs_dim, act_dim
    )[0]

    def fixed(rows, noise):
        return actor_step("fixed", rows, noise[1])

    def iterated(rows, noise):
        return evaluate_actor(rows, noise) | actor_step("iterated", rows, noise[1])

    reevaluate = sac.make_updates(args, of("fixed"), {"critics": optimizers["critics"]}, obs_dim, act_dim)[0]
    align = sac.make_updates(args, of("aligned"), adams("aligned"), obs_dim, act_dim)[1]
    return {"reevaluate": reevaluate, "fixed": fixed, "iterated": iterated, "aligned": align}


def main(args: Args):
    sac.fill_defaults(args)
    args.exp_name = "critics"
    torch.set_num_threads(args.num_threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    device = sac.pick_device(args.cuda)
    data = sac.load_dataset(args.env_id, args.dataset)
    policy, saved = sac.load_policy(args.checkpoint, args.env_id, data.obs_dim, data.act_dim, args.fit_std)
    if not isinstance(policy, sac.SquashedGaussianActor):
        raise sac.UserError(
            f"{args.checkpoint} holds no squashed-Gaussian policy; this study takes one of offline/cql.py"
        )
    run = sac.Run(args, "critics", {"stage": "reevaluate", "step": 0, "updates_per_second": {}, "offline_score": None})
    torch.manual_seed(args.seed)
    stats, bf16 = (policy.obs_mean, policy.obs_std), args.matmul_precision == "medium"
    critics = sac.Critics(*stats, data.act_dim, (256, 256, 256), layer_norm=True, bf16=bf16)
    nets = {"behaviour": policy, "critics": critics, "targets": deepcopy(critics), "log_alpha": sac.Scalar(0.0)}
    for variant in VARIANTS:
        nets[f"actor_{variant}"] = deepcopy(policy).requires_grad_(True)
    for variant in ("iterated", "aligned"):
        nets[f"critics_{variant}"] = deepcopy(critics)
    nets["targets_iterated"] = deepcopy(critics)
    nets = {name: net.to(device) for name, net in nets.items()}
    rates = {"critics": args.critic_lr} | {f"actor_{variant}": args.policy_lr for variant in VARIANTS}
    rates |= {"critics_iterated": args.critic_lr, "critics_aligned": args.critic_lr}
    optimizers = {name: sac.Adam(nets[name].parameters(), rate) for name, rate in rates.items()}
    run.restore(nets, optimizers, torch.Generator(device).manual_seed(args.seed))
    updates = make_updates(args, nets, optimizers, data.obs_dim, data.act_dim)
    rows, envs, progress = data.rows.to(device), [data.make_env() for _ in range(args.eval_episodes)], run.progress

    def score(policy, step):
        seed = 10_000_000 * args.seed + 1_000_000 * 2 + step * args.eval_episodes
        mean_return, _, _ = sac.evaluate(sac.mode_of(policy), envs, seed, device)
        return {"score": float(sac.normalized_score(args.env_id, mean_return))}

    if progress["offline_score"] is None:
        progress["offline_score"] = score(nets["behaviour"], 0)["score"]
        print(f"offline policy: score {progress['offline_score']:.1f}", flush=True)
    stages = ("reevaluate", *VARIANTS)
    for stage in stages[stages.index(progress["stage"]) :]:
        steps = args.reevaluation_steps if stage == "reevaluate" else args.alignment_steps
        check = (lambda step: {}) if stage == "reevaluate" else partial(score, nets[f"actor_{stage}"])
        update = sac.compile_update(updates[stage], args.compile, device)
        sac.train_offline(run, args, stage, steps, update, rows, data.act_dim, check)
        if stage == "reevaluate":
            for name in ("targets", "critics_iterated", "critics_aligned", "targets_iterated"):
                nets[name].load_state_dict(nets["critics"].state_dict())
        progress["stage"], progress["step"] = (*stages, "done")[stages.index(stage) + 1], 0
        run.save()
    summary = {"env_id": args.env_id, "dataset": data.name, "algorithm": "critics", "seed": args.seed}
    summary |= {key: progress[key] for key in ("offline_score", "updates_per_second")}
    summary |= {"policy": f"{saved['algorithm']}, {saved['step']} updates", "versions": sac.versions()}
    sac.write_json({**summary, "status": "complete"}, run.dir / "summary.json")


if __name__ == "__main__":
    sac.run_cli(main, "critics")
