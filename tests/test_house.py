"""What the project promises about its own form: rooms and their arrows, small files, the wheel and its YAMLs, the README."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rep_backbones"
SOURCES = sorted(PACKAGE.rglob("*.py"))
# each room, and those that it may import; a later one may import all before it
VERBS = "fuse verify foreign pairs candidates expand decay online_form gradient_form rep_optimizers training_forms"
ARROWS = (
    "blank affine recompute",
    "one_pass",
    "containers",
    "rules",
    "online",
    "registry",
    "blocks",
    "backbones",
    VERBS,
    "weights",
    "export",
    "yolo",
)
ALLOWED_BACK = {  # a room -> what else it may name, and why
    "registry": {"blocks"},
    "export": {"__version__"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(name: str) -> int:
    return next(index for index, names in enumerate(ARROWS) if name in names.split())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    for name in imports(path):
        if name.split(".")[0] == "ultralytics":
            assert room(path) == "yolo", f"only yolo/ imports Ultralytics, not {path}: {name}"
        if name.startswith("rep_backbones."):
            other = name.split(".")[1]
            if other not in ALLOWED_BACK.get(room(path), ()) and other != "__version__":
                assert level(other) <= level(room(path)), f"{path} imports {name}, which stands above it"


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda path: path.name)
def test_files_are_small(path: Path) -> None:
    assert path.stat().st_size < 24_000, "one idea each: split it"


@pytest.mark.parametrize("path", sorted((PACKAGE / "blocks").glob("*.py")), ids=lambda path: path.name)
def test_blocks_are_declarations(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert not {name for name in functions if "fuse" in name or "deploy" in name or "kernel" in name}
    assert "deploy" not in re.sub(r'""".*?"""', "", text, flags=re.DOTALL), "no deploy flag"
    assert len(text.splitlines()) <= 110


def test_tools_are_thin() -> None:
    for path in (ROOT / "tools").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 25


def examples() -> list[tuple[str, str]]:
    """The Python of the README, and of the how-to pages."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [
        (page.name, "\n".join(found))
        for page in pages
        if (found := re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    ]


@pytest.mark.parametrize(("page", "example"), examples(), ids=[page for page, _ in examples()])
def test_examples_run(page: str, example: str, tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    (tmp_path / "example.py").write_text(example)
    command = [sys.executable, "example.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if "print(" in example:
        assert done.stdout.split()[-1] == "True"


def test_the_readme_shows_an_example() -> None:
    assert "README.md" in dict(examples())


def test_readme_names_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)`", readme)) <= targets
    assert {"demo", "test"} <= set(re.findall(r"`make ([a-z]+)`", readme))
    for name in re.findall(r"(?:tools|cfg|docs|tests)/[\w./-]+", readme):
        assert (ROOT / name.rstrip(".")).exists(), name
    for link in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / link).exists(), link


IN_ANOTHER_FOLDER = """
import rep_backbones, sys
from pathlib import Path
from ultralytics import YOLO
home = Path(rep_backbones.__file__).parent
assert str(home).startswith(sys.argv[1]), home
model = YOLO("efficientrep-n.yaml").model
assert model.yaml["scale"] == "n"
print(sorted(path.name for path in (home / "cfg").glob("*.yaml")))
"""


def test_wheel_in_another_folder_finds_its_yamls(tmp_path: Path) -> None:
    """Built as for a release, installed alone, used where there is no checkout; the dependencies are those that are here."""
    copy = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wheel = next((tmp_path / "dist").glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    shipped = {f"rep_backbones/cfg/{path.name}" for path in (ROOT / "cfg").glob("*.yaml")}
    wanted = {str(path.relative_to(ROOT)) for path in SOURCES} | shipped | {"rep_backbones/py.typed"}
    wanted |= {f"rep_backbones/export/report.{ending}" for ending in ("css", "html.jinja", "schema.json")}
    assert wanted <= names, f"missing in the wheel: {sorted(wanted - names)}"
    (tmp_path / "elsewhere").mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", IN_ANOTHER_FOLDER, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "efficientrep.yaml" in done.stdout
