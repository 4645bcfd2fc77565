"""Updates per second of the scripts' own updates, eager and compiled, in float32 and in bf16, and how near they are to
the least time that they could take: that of their matrix products alone.

    python benchmark/speed.py  # prints a table and writes results/speed.md, in about ten minutes
    python benchmark/speed.py --updates o2o_sac cql --output mine.md
    git worktree add ../before 2159bf3 && python benchmark/speed.py --before ../before  # measures that checkout too

Random data of Hopper's sizes (11 observations, 3 actions) and the batch of each script's defaults. Modes take turns and
the median counts, on one thread and by the CPU time of this process, so that other work on the machine disturbs little.
Only ratios say something about another machine. The products are those that the eager update makes, forward and
backward, in its shapes, strides and precision, one after the other.
"""

import importlib.util
import platform
import statistics
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "offline")]
OBS, ACT = 11, 3
STATS, ACT_STATS = (torch.zeros(OBS), torch.ones(OBS)), (torch.zeros(ACT), torch.ones(ACT))


@dataclass
class Args:
    updates: tuple[str, ...] = ("o2o_sac", "o2o_td3", "o2o_ppo", "o3f", "cql", "td3_bc", "iql", "lapo")  # scripts
    seconds: float = 0.6  # of each measurement
    rounds: int = 5  # measurements of each update, of which the median counts
    before: Path | None = None  # another checkout, whose compiled updates take turns with these
    output: Path = ROOT / "results/speed.md"  # file of the table


def scalar(value):
    return nn.ParameterList([torch.tensor(float(value))])


def load(name, root):
    """-> the script of this name in that checkout, as a module of its own."""
    path = root / f"{name}.py" if (root / f"{name}.py").exists() else root / f"offline/{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name} in {root}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def updates_of(name, compiled, bf16, root=ROOT):
    """-> {stage: function without arguments that does one update} of a script, on networks and data made here."""
    script = load(name, root)
    args, split = script.Args(compile=compiled, bf16=bf16), script.Data("", None, None, OBS, ACT, (0, 1), None).split
    batch, one = args.batch_size or 256, torch.tensor(1.0)  # o3f.py takes over the batch of the offline training
    rows, noise = torch.randn(batch, 2 * OBS + ACT + 2), torch.randn(2, batch, ACT)
    rows[:, OBS : OBS + ACT].tanh_()
    rows[:, -1] = (rows[:, -1] > 2).float()
    deep, wide = (*STATS, ACT, [256] * 3), (*STATS, ACT, [256] * 2)
    latent = STATS, ACT_STATS, 2 * ACT, [256] * 3
    if name == "o2o_sac":
        actor, critics = script.SquashedGaussianActor(*deep, bf16), script.Critics(*deep, layer_norm=True, bf16=bf16)
        nets = {key: deepcopy(actor) for key in ("actor", "offline", "reference")} | {"log_alpha": scalar(-1.6)}
        stages = {"reevaluate": (rows, noise[0]), "align": (rows, noise[0]), "finetune": (rows, noise, one)}
    elif name == "o2o_td3":
        actor, critics = script.DeterministicActor(*wide, bf16), script.Critics(*wide, layer_norm=True, bf16=bf16)
        nets = {key: deepcopy(actor) for key in ("actor", "actor_target", "offline", "reference")}
        stages = {"reevaluate": (rows, noise[0]), "align": (rows, noise[0])}
        stages["finetune with the actor"] = (rows, noise[0], one, True)
    elif name == "o2o_ppo":
        actor, critics = script.TanhGaussianActor(*wide, bf16=bf16), None
        nets = {"actor": actor, "value": script.Value(*STATS, [256] * 3, nn.Tanh, bf16)}
        samples = torch.randn(args.minibatch_size, OBS + ACT + 3)
        stages = {"reevaluate": (torch.randn(batch, 2 * OBS + 2), None), "finetune, a minibatch": (samples, one)}
    elif name == "o3f":
        critics = script.LapoCritics(STATS, ACT_STATS, [256] * 3, 5, bf16)
        nets = {"actor": script.LatentPolicy(*latent, 2.0, bf16)}
        candidates = torch.randn(args.num_candidates, ACT)
        stages = {"action, LAPO": (torch.randn(1, OBS), torch.randn(1, ACT), candidates)}
    elif name == "cql":
        nets, critics = {"actor": script.SquashedGaussianActor(*deep, bf16)}, script.CqlCritics(*deep, bf16=bf16)
        nets |= {"log_weight": scalar(1.0), "log_alpha": scalar(0.0)}
        stages = {"update": (rows, torch.randn(3 * args.cql_actions + 1, batch, ACT))}
    elif name == "td3_bc":
        actor, critics = script.DeterministicActor(*wide, bf16), script.Critics(*wide, bf16=bf16)
        nets, stages = {"actor": actor, "actor_target": deepcopy(actor)}, {}
        stages["update with the actor"] = (rows, noise[0], True)
    elif name == "iql":
        nets, critics = {"actor": script.TanhGaussianActor(*wide, bf16=bf16)}, script.Critics(*wide, bf16=bf16)
        nets["value"] = script.Value(*STATS, [256] * 2, nn.ReLU, bf16)
        stages = {"update": (rows, None, one)}
    else:
        critics = script.LapoCritics(STATS, ACT_STATS, [256] * 3, args.num_critics, bf16)
        nets = {"encoder": script.Encoder(*latent, bf16), "decoder": script.Decoder(*latent, bf16)}
        nets |= {"actor": script.LatentPolicy(*latent, args.max_latent, bf16)}
        nets |= {"value": script.Value(*STATS, [256] * 3, nn.ReLU, bf16)}
        nets["latent_target"] = deepcopy(nets["actor"].latent)
        stages = {"update": (rows, torch.randn(2, batch, 2 * ACT), torch.tensor([0, 1]), True)}
    nets |= {} if critics is None else {"critics": critics, "targets": deepcopy(critics)}
    if name == "lapo":
        optimizers, scale = script.lapo_optimizers(args, nets), torch.tensor([-50.0, 50.0])
        updates = [script.make_lapo_update(args, nets, optimizers, scale, split)]
    elif name == "o3f":
        updates = [script.make_act(args, nets)]
    else:
        clipped = {"max_norm": args.max_grad_norm} if name == "o2o_ppo" else {}
        optimizers = {key: script.Adam(net.parameters(), 1e-4, **clipped) for key, net in nets.items()}
        optimizers |= {"reevaluation": script.Adam(nets["value"].parameters(), 1e-4)} if name == "o2o_ppo" else {}
        make = {"iql": "make_iql_update", "cql": "make_update", "td3_bc": "make_update"}.get(name, "make_updates")
        updates = getattr(script, make)(args, nets, optimizers, *((OBS, ACT) if name == "o2o_ppo" else (split,)))
        updates = updates if isinstance(updates, tuple) else [updates]
    pairs = zip(stages.items(), updates, strict=True)
    return {stage: partial(script.compile_update(update, args), *inputs) for (stage, inputs), update in pairs}


class Products(TorchDispatchMode):
    """Keeps the factors of every matrix product that is made under it, those of a backward pass included."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if (name := function.overloadpacket.__name__) in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = args[-2:]  # the two others add a bias in front
            self.calls.append((torch.mm if name in ("mm", "addmm") else torch.bmm, left.detach(), right.detach()))
        return result


def products_of(update):
    """-> a function that makes the matrix products of one update and nothing else."""
    with Products() as seen:
        update()
    calls = [(product, left, right, product(left, right)) for product, left, right in seen.calls]

    @torch.no_grad()
    def products():
        for product, left, right, out in calls:
            product(left, right, out=out)

    return products


def rate(update, seconds):
    """-> calls per second of CPU time."""
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        update()
        count += 1
    return count / (time.process_time() - start)


def cpu():
    """-> the processor's name, and its units for bf16."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    units = [unit for unit in ("amx_bf16", "avx512_bf16") if f" {unit}" in info]
    return f"{names[0] if names else platform.processor()}, bf16 units: {', '.join(units) or 'none'}"


def main(args: Args):
    if unknown := [name for name in args.updates if name not in Args.updates]:
        sys.exit(f"error: no updates of {', '.join(unknown)} are known here; there are {', '.join(Args.updates)}")
    torch.set_num_threads(1)
    precisions = ["fp32"] + ["bf16"] * (torch.backends.cpu.get_cpu_capability() != "AVX2")  # the scripts leave it out
    kinds = {"eager": (False, ROOT), "compiled": (True, ROOT)}
    kinds |= {"before": (True, args.before)} if args.before else {}
    modes = {f"{kind}, {p}": (c, p == "bf16", root) for p in precisions for kind, (c, root) in kinds.items()}
    heads = [head for p in precisions for head in (*(f"{kind}, {p}" for kind in kinds), "of its products")]
    lines = ["| update | " + " | ".join(heads) + " | factor |", "| --- |" + " --- |" * (len(heads) + 1)]
    for name in args.updates:
        made = {mode: updates_of(name, *flags) for mode, flags in modes.items()}
        for stage in made["eager, fp32"]:
            ways = {mode: updates[stage] for mode, updates in made.items()}
            for update in ways.values():
                update()  # compiles
            ways |= {f"products, {p}": products_of(ways[f"eager, {p}"]) for p in precisions}
            rounds = [[rate(way, args.seconds) for way in ways.values()] for _ in range(args.rounds)]
            columns = zip(*rounds, strict=True)
            rates = dict(zip(ways, map(statistics.median, columns), strict=True))
            cells = {mode: f"{rates[mode]:.0f}" if rates[mode] > 20 else f"{rates[mode]:.1f}" for mode in modes}
            row = [name + " " + stage]
            for p in precisions:
                ratio = rates[f"products, {p}"] / rates[f"compiled, {p}"]
                row += [*(cells[f"{kind}, {p}"] for kind in kinds), f"{ratio:.2f}"]
            factor = rates[f"compiled, {precisions[-1]}"] / rates["eager, fp32"]
            lines.append("| " + " | ".join([*row, f"{factor:.1f}"]) + " |")
            print(lines[-1], flush=True)
    doc = f"`python benchmark/speed.py`, torch {torch.__version__}, one thread, {cpu()}. Hopper's sizes, random data."
    text = (
        "Updates per second of CPU time. Of its products: the compiled update's time in units of that of its matrix"
        "\nproducts alone, in the same precision. Factor: compiled, in bf16 where"
        "\nthe processor has units for it, against eager in fp32."
    )
    if args.before:
        words = ["git", "-C", str(args.before), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        text += f" Before: compiled as well, by the scripts of\ncommit {commit}, in the same rounds."
    args.output.write_text("\n".join(["# Speed", "", doc, text, "", *lines]) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
