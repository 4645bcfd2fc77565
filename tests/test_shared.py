"""Copies stay copies, files keep their size and order, flags are used and checked, documented commands run."""

import ast
import importlib
import re
import shlex
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ROOT
from torch import nn

NO_TRAINING = ("collect", "collect_antmaze", "collect_kitchen", "convert")
ONLINE = sorted(ROOT.glob("*.py"))
OFFLINE = sorted(ROOT.glob("offline/*.py"))
BASELINES = sorted(ROOT.glob("baselines/*.py"))
TOOLS = sorted(ROOT.glob("tools/*.py"))
SCRIPTS = [*ONLINE, *OFFLINE, *BASELINES, *TOOLS]
TRAINING = [path for path in [*ONLINE, *OFFLINE, *BASELINES] if path.stem not in NO_TRAINING]

# what a method defines for itself under a name that others use too
OWN = {"Args", "settings", "main", "train", "train_online", "make_update", "make_updates", "make_actor", "checkpoint"}
OWN |= {"td_target", "alignment_target", "divergence", "actor_loss", "reward_scale", "make_offline_update"}


def module_of(path):
    """The script as a module; offline/iql.py and baselines/iql.py are two."""
    return importlib.import_module(f"baselines.{path.stem}" if path.parent.name == "baselines" else path.stem)


def definitions(path):
    """name -> text of each top-level function and class, decorators included."""
    text = path.read_text()
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    lines = text.splitlines()
    start = lambda n: min([n.lineno, *(decorator.lineno for decorator in n.decorator_list)]) - 1  # noqa: E731
    return {n.name: "\n".join(lines[start(n) : n.end_lineno]) for n in nodes}


def test_what_two_scripts_define_under_one_name_is_the_same():
    copies = defaultdict(lambda: defaultdict(list))  # name -> text -> files
    for path in SCRIPTS:
        for name, text in definitions(path).items():
            if (name, path.stem in NO_TRAINING) != ("parse_args", True):  # what makes data has no runs to resume
                copies[name][text].append(path.name)
    assert sum(len(files) > 1 for versions in copies.values() for files in versions.values()) > 20
    drifted = {name: list(versions.values()) for name, versions in copies.items() if len(versions) > 1}
    assert not (drifted.keys() - OWN), {name: drifted[name] for name in drifted.keys() - OWN}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_nothing_is_defined_that_nothing_uses(path):
    text = path.read_text()
    for name in definitions(path):
        assert len(re.findall(rf"\b{name}\b", text)) > 1 or name in ("main", "Args"), f"{path.name}: {name} is unused"


@pytest.mark.parametrize("path", [*ONLINE, *BASELINES], ids=lambda path: path.name)
def test_the_method_comes_first(path):
    """The first equation stands before line 120, and the plumbing after `train`."""
    tree = ast.parse(path.read_text()).body
    functions = [node for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert next(node for node in functions if node.name not in ("Args", "settings")).lineno < 120
    order = [node.name for node in functions]
    update = next(i for i, name in enumerate(order) if name.startswith("make_") and "update" in name)
    assert update < order.index("train") < order.index("UserError") < order.index("Run")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_flag_is_read_and_no_script_imports_another(path):
    tree = ast.parse(path.read_text())
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    names = {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    } | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.args"
    }
    read |= set(re.findall(r'getattr\(args, "(\w+)"', path.read_text()))
    assert names == names & read, f"never read: {names - read}"
    ours = {script.stem for script in SCRIPTS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {str(module).split(".")[0] for module in modules} & (ours | {"offline", "tests"})


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_every_number_has_a_range_and_its_default_lies_in_it(path):
    module = module_of(path)
    ranged = [flag for flags in module.RANGES.values() for flag in flags.split()]
    numeric = {field.name for field in fields(module.Args) if str(field.type).split(" |")[0] in ("int", "float")
               or field.type in (int, float)}  # fmt: skip
    numeric |= {field.name for field in fields(module.Args) if str(field.type) in ("int | None", "float | None")}
    assert len(ranged) == len(set(ranged)) and set(ranged) == numeric
    module.check_ranges(module.Args())
    lowest = {flag: low for (low, _), flags in module.RANGES.items() for flag in flags.split()}
    for flag in numeric:
        for bad in (float("nan"), lowest[flag] - 1, 10**12):
            args = module.Args()
            setattr(args, flag, bad)
            with pytest.raises(module.UserError, match=flag.replace("_", "-")):
                module.check_ranges(args)


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.name)
def test_what_may_change_on_resume_are_flags(path):
    module = module_of(path)
    assert set(module.RESUMABLE.split()) <= {field.name for field in fields(module.Args)}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_help_explains_every_flag(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    module = module_of(path)
    with pytest.raises(SystemExit):
        tyro.cli(module.Args, args=["--help"])
    text = capsys.readouterr().out
    for line in text.splitlines():
        if line.startswith("│ --"):
            explanation = re.sub(r"\(default: .*?\)|\(repeatable\)|--[\w-]+|\{.*?\}|[A-Z|]{3,}|│", "", line)
            assert len(explanation.strip(" ,|")) > 3, f"{path.name}: {line}"


def test_help_of_a_task_shows_what_will_be_used(capsys, monkeypatch):
    module = importlib.import_module("o2o_sac")
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        module.parse_args(["--env-id", "hopper-expert-v2", "--help"])
    line = next(line for line in capsys.readouterr().out.splitlines() if "--limit-end" in line)
    assert "0.125" in line


PROSE = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md"), ROOT / "results/studies/README.md"]


def without_code(path):
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S))


def anchors(path):
    """The names that GitHub gives a file's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_inside_the_project_lead_somewhere():
    links = [(path, link) for path in PROSE for link in re.findall(r"\]\(([^)]+)\)", without_code(path))]
    inside = [(path, link) for path, link in links if not link.startswith("http")]
    assert len(inside) > 30
    for path, link in inside:
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}"


def documented_commands():
    """(where, script, arguments) of every `python ....py` in the prose and in the scripts' docstrings."""
    texts = {
        str(path.relative_to(ROOT)): "\n".join(re.findall(r"^```bash\n(.*?)^```", path.read_text(), re.M | re.S))
        for path in PROSE
    }
    texts |= {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in SCRIPTS}
    for where, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", line):
                match = re.match(r"\s*(?:[A-Z_]+=\S+ )*(?:\S*/)?python (\S+\.py)(.*)", part)
                if match:
                    yield where, match[1], shlex.split(match[2], comments=True)
                if "./benchmark.sh" in part:
                    arguments = shlex.split(part.split("./benchmark.sh")[1], comments=True)
                    yield where, "benchmark/benchmark.py", arguments


def test_documented_commands_parse():
    commands = list(documented_commands())
    assert len(commands) > 10
    for where, script, argv in commands:
        if script == "mean.py":  # a patched copy that the line before makes
            script = "o2o_sac.py"
        assert (ROOT / script).exists(), f"{where}: {script} does not exist"
        if script.startswith("benchmark/") and script != "benchmark/benchmark.py":
            continue
        try:
            tyro.cli(module_of(Path(script)).Args, args=argv)
        except SystemExit as stop:
            if stop.code:  # --help ends with 0
                pytest.fail(f"{where}: python {script} {shlex.join(argv)}")


def test_the_documented_way_to_write_a_checkpoint_and_to_act_with_it_works(tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    net = nn.Sequential(nn.Linear(11, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
    names = {"net": net, "mean": torch.full((11,), 0.5), "std": torch.full((11,), 2.0)}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    assert torch.allclose(names["action"], net(torch.full((1, 11), -0.25)).tanh(), atol=1e-6)


SHIPPED = sorted((ROOT / "offline/checkpoints").glob("*-v[0-9]/*.pt"))
SIZES = {
    "hopper": (11, 3),
    "walker2d": (17, 6),
    "halfcheetah": (17, 6),
    "antmaze": (29, 8),
    "kitchen": (59, 9),
}  # observations, actions


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_shipped_policy_is_small_tells_nothing_of_where_it_was_made_and_is_loaded(path):
    task, algorithm = path.parent.name, path.stem.removesuffix("_5")
    saved = torch.load(path, weights_only=True)
    assert (saved["algorithm"], saved["env_id"], saved["dataset"]) == (algorithm, task, f"o2o/{task}")
    least = 5_000 if task.startswith("kitchen") else 50_000  # a few demonstrations are soon learnt by heart
    assert saved["step"] >= {"lapo": 20_000, "bc": 20_000, "dt": 10_000}.get(algorithm, least)
    assert path.stat().st_size < (6e6 if algorithm == "lapo" else 2.5e6)  # LAPO: five critics of three layers
    assert not [value for value in saved["args"].values() if isinstance(value, str) and value.startswith("/")]
    scripts = {"cql": "o2o_sac", "td3_bc": "o2o_td3", "iql": "o2o_ppo"}
    if path.stem in scripts:
        script = importlib.import_module(scripts[path.stem])
        obs_dim, act_dim = SIZES[task.split("-")[0]]
        data = script.Data("", None, None, obs_dim, act_dim, (0, 1), None)
        args = script.Args(env_id=task, checkpoint=str(path))
        run = type("Folder", (), {"dir": path.parent})
        actor = script.load_actor(args, path, run, data)
        assert actor.mode(torch.zeros(2, obs_dim)).shape == (2, act_dim)


def test_the_default_task_has_a_policy_for_every_script():
    assert {path.name for path in SHIPPED if path.parent.name == "hopper-medium-v2"} >= {
        *("cql.pt", "td3_bc.pt", "iql.pt", "iql_5.pt", "lapo.pt")
    }
