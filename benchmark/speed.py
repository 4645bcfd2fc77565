"""Updates per second of the scripts' own updates: compiled and eager, in float32 and in bf16.

    python benchmark/speed.py  # prints a table and writes results/speed.md
    python benchmark/speed.py --updates o2o_sac o2o_td3 --seconds 2

Random data of Hopper's sizes (11 observations, 3 actions) and the batch of each script's default. Precisions and
modes take turns, and the best of the rounds counts, so that other work on the machine disturbs the ratios little; only
ratios say something about another machine.
"""

import importlib
import platform
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "offline")]
OBS, ACT = 11, 3
STATS = torch.zeros(OBS), torch.ones(OBS)


@dataclass
class Args:
    updates: tuple[str, ...] = ("o2o_sac", "o2o_td3", "cql", "td3_bc", "iql", "lapo")  # scripts to measure
    seconds: float = 1.0  # of each measurement
    rounds: int = 3  # measurements of each update, of which the best counts
    num_threads: int = 1  # CPU threads
    output: Path | None = ROOT / "results/speed.md"  # file of the table


def scalar(value):
    return nn.ParameterList([torch.tensor(float(value))])


def updates_of(name, compiled, bf16):
    """-> {stage: function without arguments that does one update} of a script."""
    script = importlib.import_module(name)
    args, split = script.Args(compile=compiled, bf16=bf16), script.Data("", None, None, OBS, ACT, (0, 1), None).split
    rows = torch.randn(args.batch_size, 2 * OBS + ACT + 2)
    rows[:, OBS : OBS + ACT].tanh_()
    rows[:, -1] = (rows[:, -1] > 2).float()
    noise, hidden = torch.randn(2, args.batch_size, ACT), (256, 256, 256)
    if name == "o2o_sac":
        actor = script.SquashedGaussianActor(*STATS, ACT, hidden, bf16)
        nets = {key: deepcopy(actor) for key in ("actor", "behaviour", "reference")} | {"log_alpha": scalar(-1.6)}
        nets["critics"] = script.Critics(*STATS, ACT, hidden, layer_norm=True, bf16=bf16)
        stages = {
            "reevaluate": (rows, noise[0]),
            "align": (rows, noise[0]),
            "finetune": (rows, noise, torch.tensor(1.0)),
        }
    elif name == "o2o_td3":
        actor = script.DeterministicActor(*STATS, ACT, hidden[:2], bf16)
        nets = {key: deepcopy(actor) for key in ("actor", "actor_target", "behaviour", "reference")}
        nets["critics"] = script.Critics(*STATS, ACT, hidden[:2], layer_norm=True, bf16=bf16)
        stages = {"reevaluate": (rows, noise[0]), "align": (rows, noise[0])}
        stages["finetune"] = (rows, noise[0], torch.tensor(1.0), True)
    elif name == "cql":
        nets = {"actor": script.SquashedGaussianActor(*STATS, ACT, hidden, bf16), "log_weight": scalar(1.0)}
        nets |= {"critics": script.CqlCritics(*STATS, ACT, hidden, bf16=bf16), "log_alpha": scalar(0.0)}
        stages = {"offline": (rows, torch.randn(3 * args.cql_actions + 1, args.batch_size, ACT))}
    elif name == "td3_bc":
        actor = script.DeterministicActor(*STATS, ACT, hidden[:2], bf16)
        nets = {"actor": actor, "actor_target": deepcopy(actor)}
        nets["critics"] = script.Critics(*STATS, ACT, hidden[:2], bf16=bf16)
        stages = {"offline": (rows, noise[0], True)}
    elif name == "iql":
        nets = {"actor": script.TanhGaussianActor(*STATS, ACT, hidden[:2], bf16=bf16)}
        nets |= {"value": script.Value(*STATS, hidden[:2], nn.ReLU, bf16)}
        nets["critics"] = script.Critics(*STATS, ACT, hidden[:2], bf16=bf16)
        stages = {"offline": (rows, None, torch.tensor(1.0))}
    elif name == "lapo":
        act_stats = torch.zeros(ACT), torch.ones(ACT)
        sizes = STATS, act_stats, 2 * ACT, hidden
        nets = {"encoder": script.Encoder(*sizes, bf16), "decoder": script.Decoder(*sizes, bf16)}
        nets["actor"] = script.LatentPolicy(*sizes, args.max_latent, bf16)
        nets |= {"value": script.Value(*STATS, hidden, nn.ReLU, bf16), "latent_target": deepcopy(nets["actor"].latent)}
        nets["critics"] = script.LapoCritics(STATS, act_stats, hidden, args.num_critics, bf16)
        stages = {"offline": (rows, torch.randn(2, args.batch_size, 2 * ACT), torch.tensor([0, 1]), True)}
    else:
        sys.exit(f"error: no update of {name} is known here; there are {', '.join(Args.updates)}")
    nets["targets"] = deepcopy(nets["critics"])
    if name == "lapo":
        optimizers = script.lapo_optimizers(args, nets)
        functions = [script.make_lapo_update(args, nets, optimizers, torch.tensor([-50.0, 50.0]), split)]
    else:
        optimizers = {key: script.Adam(net.parameters(), 1e-4) for key, net in nets.items()}
        make = next(
            getattr(script, n) for n in ("make_updates", "make_update", "make_iql_update") if hasattr(script, n)
        )
        functions = make(args, nets, optimizers, split)
        functions = functions if isinstance(functions, tuple) else [functions]
    compiled = [script.compile_update(function, args) for function in functions]
    bound = zip(compiled, stages.values(), strict=True)
    return dict(zip(stages, [lambda f=f, a=a: f(*a) for f, a in bound], strict=True))


def rate(function, seconds):
    """-> calls of the function per second of this process's time."""
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        function()
        count += 1
    return count / (time.process_time() - start)


def cpu():
    """-> the processor's name, and its units for bf16."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if f" {unit}" in info]
    return f"{names[0] if names else platform.processor()}, bf16 units: {', '.join(units) or 'none'}"


def main(args: Args):
    torch.set_num_threads(args.num_threads)
    modes = {f"{c}, {p}": (c == "compiled", p == "bf16") for p in ("fp32", "bf16") for c in ("eager", "compiled")}
    lines = [f"torch {torch.__version__}, {args.num_threads} thread(s), {cpu()}. Updates per second.", ""]
    lines += ["| update | " + " | ".join(modes) + " |", "| --- |" + " --- |" * len(modes)]
    for name in args.updates:
        made = {mode: updates_of(name, *flags) for mode, flags in modes.items()}
        for stage in next(iter(made.values())):
            best = dict.fromkeys(modes, 0.0)
            for functions in made.values():
                functions[stage]()  # compiles
            for _ in range(args.rounds):
                for mode, functions in made.items():
                    best[mode] = max(best[mode], rate(functions[stage], args.seconds))
            lines.append(f"| {name} {stage} | " + " | ".join(f"{value:.1f}" for value in best.values()) + " |")
            print(lines[-1], flush=True)
    if args.output:
        args.output.write_text("# Speed\n\n`python benchmark/speed.py` on\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
