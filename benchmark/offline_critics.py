"""What are the offline method's own critics worth online? OCR-CFT re-evaluates because they are pessimistic.

    python offline/td3_bc.py --env-id hopper-medium-v2 --updates 200000 --bf16 --run-dir RUN --output RUN/policy.pt
    python benchmark/offline_critics.py o2o_td3 RUN --bf16

o2o_td3.py from a TD3+BC policy, or o2o_sac.py from CQL's, with one change: no stage 1, and the critics start as
those of the offline run folder RUN. All other flags are the script's own; `--resume` works. Beside it stand the script
itself with `--checkpoint RUN/policy.pt`, and the same with `--no-reevaluate`, where the critics start untrained.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"o2o_sac": "cql", "o2o_td3": "td3_bc"}  # script -> the offline algorithm whose critics suit it


def script_with(name, folder):
    """-> the module of o2o_sac.py or o2o_td3.py, a copy of its own, whose new critics are those of the run `folder`.
    Raises UserError if there are none in it."""
    spec = importlib.util.spec_from_file_location(f"{name}_of_offline_critics", ROOT / f"{name}.py")
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    saved = script.load_file(Path(folder) / "resume.pt")
    try:
        state = saved["nets"]["critics"]
        hidden = [state[key].shape[-1] for key in sorted(state) if key.endswith("bias")][:-1]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise script.UserError(f"{folder} is no run of offline/{SOURCES[name]}.py ({error!r})") from error
    base = script.Critics

    def critics(obs_mean, obs_std, act_dim, *_, bf16=False, **__):
        """The offline algorithm's: two, without layer norm, and with its observation statistics."""
        made = base(obs_mean, obs_std, act_dim, hidden, bf16=bf16)
        try:
            made.load_state_dict(state)
        except RuntimeError as error:
            raise script.UserError(f"the critics in {folder} are not of two networks for this task") from error
        return made

    script.Critics = critics
    return script


def main():
    usage = f"usage: python benchmark/offline_critics.py {{{','.join(SOURCES)}}} RUN [flags of that script]"
    if len(sys.argv) < 3 or sys.argv[1] not in SOURCES:
        asked = {"-h", "--help"} & set(sys.argv)
        print(usage, file=sys.stdout if asked else sys.stderr)
        sys.exit(0 if asked else 2)
    name, folder = sys.argv[1], Path(sys.argv[2]).resolve()
    del sys.argv[1:3]

    try:
        script = script_with(name, folder)
    except Exception as error:
        if type(error).__name__ != "UserError":  # the script's own, which had no name before it was loaded
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    def run(args):
        args.checkpoint, args.reevaluate = args.checkpoint or str(folder / "policy.pt"), False
        return script.main(args)

    script.run_cli(run)


if __name__ == "__main__":
    main()
