"""The repository agrees with itself: notebooks, module, packaging, settings."""
import ast
import configparser
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import resolve_name
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from nbs_lib.core import settings

ROOT = Path(__file__).resolve().parent.parent
STEPS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LIBRARY = sorted((ROOT / "notebooks" / "library").glob("*/*.ipynb"))
NOTEBOOKS = STEPS + LIBRARY
FLOORS = ("core", "tracking", "runs", "data", "models", "serving", "evaluation", "feedback", "labelling", "loop",
          "steps", "schedule", "web", "cli")   # lowest first
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text())["cells"]


def exported(notebook: Path) -> str | None:
    "The module that a notebook says it exports, `package.name`."
    said = (re.match(r"#\| default_exp (\S+)", "".join(c["source"])) for c in cells(notebook))
    return next((m[1] for m in said if m), None)


def module_of(notebook: Path) -> str:
    "The module that a notebook in this place has to export."
    return f"{'steps' if notebook in STEPS else notebook.parent.name}.{notebook.stem.split('_', 1)[1]}"


def imports(file: Path) -> set[str]:
    "The modules of nbs_lib that a module imports, wherever in it, and those that it names in a string."
    module, found = ".".join(file.relative_to(ROOT).with_suffix("").parts), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"\bnbs_lib(?:\.\w+)+", node.value))
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            package, name = module.rpartition(".")[0], node.module or ""
            base = resolve_name("." * node.level + name, package) if node.level else name
            found |= {base, *(f"{base}.{a.name}" for a in node.names)}
    own = {name for name in found if name.startswith("nbs_lib.")}
    return {name.removeprefix("nbs_lib.") for name in own if (ROOT / f"{name.replace('.', '/')}.py").is_file()}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_notebooks_hold_no_outputs_and_no_volatile_metadata(notebook):
    content = json.loads(notebook.read_text())
    assert set(content["metadata"]) <= {"kernelspec", "language_info"}
    assert len({c["id"] for c in content["cells"]}) == len(content["cells"])
    for cell in content["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")
        assert set(cell["metadata"]) <= {"tags", "jp-MarkdownHeadingCollapsed"}


@pytest.mark.parametrize("step", STEPS, ids=lambda p: p.stem)
def test_cleaning_keeps_the_one_parameters_cell_of_a_step(step, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "notebooks").mkdir()
    copy = Path(shutil.copy(step, tmp_path / "notebooks"))
    subprocess.run([Path(sys.executable).with_name("nbdev-clean")], cwd=tmp_path, check=True)
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells(copy)) == 1
    assert cells(copy) == cells(step)


def test_the_module_is_what_the_notebooks_export(tmp_path):
    passing = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("notebooks", "nbs_lib"): shutil.copytree(ROOT / name, tmp_path / name, ignore=passing)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], cwd=tmp_path, check=True)
    trees = ROOT / "nbs_lib", tmp_path / "nbs_lib"
    names = {str(p.relative_to(tree)) for tree in trees for p in tree.rglob("*.py")}
    _, different, missing = filecmp.cmpfiles(ROOT / "nbs_lib", tmp_path / "nbs_lib", names, shallow=False)
    assert not different and not missing, "run `make notebooks`"
    own = {n for n in names if not n.endswith("__init__.py") and n != "_modidx.py"}
    modules = {n.removesuffix(".py").replace("/", ".") for n in own}
    assert modules == {m for n in NOTEBOOKS if (m := exported(n))}


def test_each_notebook_exports_the_module_of_its_place():
    for notebook in NOTEBOOKS:
        assert exported(notebook) in ({module_of(notebook)} | ({None} if notebook in STEPS else set())), notebook


def test_packages_import_only_from_lower_floors_and_modules_from_smaller_numbers():
    number = {module_of(n): n.stem.split("_")[0] for n in LIBRARY}
    for file in (ROOT / "nbs_lib").glob("*/*.py"):
        if file.stem == "__init__": continue
        package, name = file.parent.name, f"{file.parent.name}.{file.stem}"
        for other in imports(file) - {name}:
            beside = other.split(".")[0] == package
            lower = FLOORS.index(other.split(".")[0]) < FLOORS.index(package)
            assert beside or lower, f"{name} imports {other} from a higher floor"
            smaller = not beside or package == "steps" or number[other] < number[name]
            assert smaller, f"{name} imports {other}, of a larger number"
            assert package == "steps" or not other.startswith("steps."), f"{name} imports the step {other}"


def test_the_packages_have_at_most_nine_floors():
    def wanted(package: str) -> set[str]:
        files = (ROOT / "nbs_lib" / package).glob("*.py")
        return {other.split(".")[0] for file in files for other in imports(file)} - {package}
    below = {package: wanted(package) for package in FLOORS}
    def height(package: str) -> int: return 1 + max(map(height, below[package]), default=0)
    assert max(map(height, FLOORS)) <= 9


def test_no_module_is_longer_than_400_lines():
    for file in (ROOT / "nbs_lib").glob("*/*.py"): assert len(file.read_text().splitlines()) <= 400, file


def test_a_public_name_means_one_thing():
    "But for commands, which are called like what they do; a method that grows by @patch belongs to its class."
    places: dict[str, list[str]] = {}
    for file in (ROOT / "nbs_lib").glob("*/*.py"):
        for node in ast.parse(file.read_text()).body if file.parent.name != "cli" else ():
            names = []
            if isinstance(node, ast.Assign):
                targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
                names = [t.id for t in targets if isinstance(t, ast.Name)]
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name] * (not any("patch" in ast.unparse(d) for d in node.decorator_list))
            for name in names:
                if not name.startswith("_"): places.setdefault(name, []).append(f"{file.parent.name}.{file.stem}")
    assert not {name: found for name, found in places.items() if len(found) > 1}


def test_functions_with_three_parameters_or_more_describe_each_in_a_docment():
    "But for commands, whose options have help texts, for private classes, and for a method of nbclient's."
    def public(body: list) -> list[ast.FunctionDef]:
        inner = [f for n in body if isinstance(n, ast.ClassDef) and n.name[0] != "_" for f in public(n.body)]
        return inner + [n for n in body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.name[0] != "_"]
    for file in (f for f in (ROOT / "nbs_lib").glob("*/*.py") if f.parent.name != "cli"):
        lines = file.read_text().splitlines()
        for function in public(ast.parse(file.read_text()).body):
            if (file.stem, function.name) == ("papermill_engine", "output"): continue
            a = function.args
            args = [x for x in a.posonlyargs + a.args + a.kwonlyargs if not re.match("self$|cls$|_", x.arg)]
            alone = len({x.end_lineno for x in args}) == len(args)
            told = alone and all("#" in lines[x.end_lineno - 1][x.end_col_offset:] for x in args)
            assert len(args) < 3 or told, f"{file}:{function.lineno}: {function.name}"


def test_sqlite_is_opened_in_one_place():
    assert [f.name for f in (ROOT / "nbs_lib").rglob("*.py") if "sqlite3.connect" in f.read_text()] == ["sqlite.py"]


def test_scripts_and_styles_are_packaged_named_by_a_module_beside_them_and_parse():
    static = sorted((ROOT / "nbs_lib").glob("*/static/*"))
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["nbs_lib"]
    assert static and {p for pattern in packaged for p in (ROOT / "nbs_lib").glob(pattern)} >= set(static)
    for file in static:
        modules = [m.read_text() for m in file.parent.parent.glob("*.py")]
        assert any(f'"static/{file.name}"' in m or f"'static/{file.name}'" in m for m in modules), file
        assert max(map(len, file.read_text().splitlines())) <= 120, file
        if file.suffix == ".js" and shutil.which("node"):
            command = ["node", "--input-type=module", "--check"]
            done = subprocess.run(command, stdin=file.open(), capture_output=True, text=True)
            assert done.returncode == 0, f"{file}: {done.stderr}"


def test_no_step_notebook_exports_while_it_runs_or_hides_a_failure():
    for notebook in NOTEBOOKS:
        for cell in cells(notebook):
            assert "nbdev_export()" not in "".join(cell["source"])
            assert "raises-exception" not in cell["metadata"].get("tags", [])


def test_the_environment_for_conda_is_the_same():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [pip] = [d["pip"] for d in conda if isinstance(d, dict)]
    wanted = PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["dev"]
    assert sorted(p for p in pip if not p.startswith("--")) == sorted(wanted)
    assert f"python{PYPROJECT['requires-python']}" in conda


def test_every_requirement_is_pinned_without_an_address():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9._-]+==[0-9a-z.+!]+( ; .+)?", line) for line in lines)
    pins: dict[str, set[str]] = {}
    for line in lines: pins.setdefault(line.partition("==")[0], set()).add(line.partition("==")[2].split(" ;")[0])
    for text in PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert any(requirement.specifier.contains(v) for v in pins[requirement.name.lower()]), text


def test_every_dependency_says_why_it_is_there():
    block = re.search(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)[1]
    assert all("#" in line for line in block.splitlines())


def test_the_settings_file_shows_the_defaults(tmp_path, monkeypatch):
    for name in [v for v in os.environ if v.startswith("LOOPBOOK_")]: monkeypatch.delenv(name)
    shipped, none = settings.load_settings(ROOT), settings.load_settings(tmp_path)
    assert shipped.model_dump(exclude={"home"}) == none.model_dump(exclude={"home"})
    parser = configparser.ConfigParser(inline_comment_prefixes=(";",), interpolation=None)
    parser.read(ROOT / "settings.ini")
    for section, model in settings.SECTIONS.items(): assert set(parser[section]) == set(model.model_fields), section


def test_every_setting_says_what_it_means():
    for model in (*settings.SECTIONS.values(), settings.Recipe):
        for name, field in model.model_fields.items():
            assert field.description or name in ("epochs",), f"{model.__name__}.{name}"


def test_the_command_line_loads_nothing_heavy():
    heavy = ("torch", "pandas", "papermill", "wandb", "trackio", "sklearn", "matplotlib", "pyarrow")
    code = f"import sys, nbs_lib.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_run_builds_no_grammar_of_addresses():
    code = "import sys, nbs_lib.runs.execute, nbs_lib.runs.papermill_engine; print('rfc3987_syntax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
