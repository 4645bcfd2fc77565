"""Which critic can an actor be updated on? OCR-CFT's first claim, offline: no update here sees a new transition.

    python benchmark/critics.py --env-id hopper-medium-v2 --alignment-steps 15000 --eval-every-updates 1000

Stage 1 of o2o_sac.py once, and then three actors, each `--alignment-steps` updates from the offline policy:

  fixed     on the re-evaluated critic, which stays as it is
  iterated  on the re-evaluated critic, which goes on being evaluated, for the actor as it moves
  aligned   stage 2: on the critic that alignment makes of it

The flags are those of o2o_sac.py; `--resume` works. metrics.jsonl has the three as stages, with each actor's score.
"""

import importlib.util
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# a copy of the script of its own, since it goes by another name in args.json and summary.json
spec = importlib.util.spec_from_file_location("o2o_sac_of_critics", ROOT / "o2o_sac.py")
sac = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sac)
sac.ALGORITHM = "critics"
Args = sac.Args
VARIANTS = ("fixed", "iterated", "aligned")


def make_updates(args, nets, optimizers, split):
    """-> {stage: update(rows, noise)}; each variant has an actor of its own, the last two critics of their own."""

    def of(variant, **changes):
        names = ("actor", "critics", "targets")
        own = {name: nets[f"{name}_{variant}"] for name in names if f"{name}_{variant}" in nets}
        return {**nets, **own, "reference": nets["offline"], **changes}

    def adams(variant):
        return {name: optimizers[f"{name}_{variant}"] for name in ("actor", "critics")}

    def actor_step(variant, rows, noise):
        actor, critics = of(variant)["actor"], of(variant)["critics"]
        obs = split(rows)[0]
        action, log_prob, _ = actor.sample(obs, noise)
        loss = sac.actor_loss(log_prob, critics(obs, action), args.alpha)
        optimizers[f"actor_{variant}"].minimize(loss)
        return sac.numbers(actor_loss=loss, entropy=-log_prob.mean())

    evaluate_actor = sac.make_updates(args, of("iterated", offline=nets["actor_iterated"]), adams("iterated"), split)[0]

    def fixed(rows, noise):
        return actor_step("fixed", rows, noise[1])

    def iterated(rows, noise):
        return evaluate_actor(rows, noise[0]) | actor_step("iterated", rows, noise[1])

    reevaluate = sac.make_updates(args, of("fixed"), {"critics": optimizers["critics"]}, split)[0]
    align = sac.make_updates(args, of("aligned"), adams("aligned"), split)[1]
    first = lambda update: lambda rows, noise: update(rows, noise[0])
    return {"reevaluate": first(reevaluate), "fixed": fixed, "iterated": iterated, "aligned": first(align)}


def main(args: Args):
    sac.check_ranges(args)
    if args.bf16 and not args.cuda and torch.backends.cpu.get_cpu_capability() == "AVX2":
        print("--bf16 is left out: this CPU would be 50 times slower with it", file=sys.stderr)
        args.bf16 = False
    args.exp_name, device = "critics", torch.device("cuda" if args.cuda else "cpu")
    args.checkpoint = args.checkpoint or str(ROOT / "offline/checkpoints" / args.env_id / "cql.pt")
    torch.set_num_threads(args.num_threads)
    run = sac.Run(args, {"stage": "reevaluate", "step": 0, "updates_per_second": {}, "offline_score": None})
    data = sac.load_data(args, device)
    policy = sac.load_actor(args, args.checkpoint, run, data)
    torch.manual_seed(args.seed)
    stats = policy.obs_mean, policy.obs_std
    critics = sac.Critics(*stats, data.act_dim, (256, 256, 256), layer_norm=True, bf16=args.bf16)
    nets = {
        "offline": policy,
        "critics": critics,
        "targets": deepcopy(critics),
        "log_alpha": torch.nn.ParameterList([torch.tensor(0.0)]),
    }
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
    updates = make_updates(args, nets, optimizers, data.split)
    envs, progress = [data.make_env() for _ in range(args.eval_episodes)], run.progress

    def score(policy):
        seed = 100_000_000 + 1_000_000 * args.seed
        return {"score": data.score(sac.evaluate(sac.mode_of(policy), envs, seed, device)[0].mean())}

    if progress["offline_score"] is None:
        progress["offline_score"] = score(nets["offline"])["score"]
        print(f"offline policy: score {progress['offline_score']:.1f}", flush=True)
    stages, shape = ("reevaluate", *VARIANTS), (2, args.batch_size, data.act_dim)
    for stage in stages[stages.index(progress["stage"]) :] if progress["stage"] != "done" else ():
        steps = args.reevaluation_steps if stage == "reevaluate" else args.alignment_steps
        check = dict if stage == "reevaluate" else partial(score, nets[f"actor_{stage}"])
        update = sac.compile_update(updates[stage], args)
        sac.train_offline(args, run, stage, steps, update, data.rows, shape, check)
        if stage == "reevaluate":  # the anchor of the alignment is the targets as they are
            for name in ("critics_iterated", "critics_aligned"):
                nets[name].load_state_dict(nets["critics"].state_dict())
            nets["targets_iterated"].load_state_dict(nets["targets"].state_dict())
        run.enter((*stages, "done")[stages.index(stage) + 1])
    run.summarize("complete")


if __name__ == "__main__":
    sac.run_cli(main)
