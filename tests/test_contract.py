"""One check, one file, one name: the contract, held by every check there is and by every one still to come."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, environment

from rlhf_doctor import diagnosis
from rlhf_doctor.check import FAMILY_ROLES, HEADINGS, Check, registry
from rlhf_doctor.facts import GIVEN, facts, split_role
from rlhf_doctor.finding import Severity, Stage
from rlhf_doctor.report.text import URL

CHECKS = list(registry().values())
PACKAGE = ROOT / "rlhf_doctor"
CODE = re.compile(r"[A-Z]{3}\d{3}")
CHECK_FILES = sorted(path for path in (PACKAGE / "checks").rglob("*.py") if re.match(r"[a-z]{3}\d{3}_", path.name))
LONGEST = 100  # lines of code that a check needs; imports, page, faults and what follows from it are not counted
EFFECTS = ("explains", "across_roles", "effect")
HEAVY = ("torch", "transformers", "peft", "safetensors", "numpy")
# From the left to the right, as a setup passes them; nothing imports what lies to the right of it.
PATH = ("setups", "sources", "instruments", "checks", "examine", "diagnosis", "report")
LIGHT = [
    *(PACKAGE / f"{name}.py" for name in ("cli", "check", "finding", "facts", "setups", "examine", "diagnosis")),
    *(
        path
        for name in ("checks", "report", "sources")
        for path in sorted((PACKAGE / name).rglob("*.py"))
        if path.stem not in ("trace_view", "trace_sample", "trace_wiring")  # imported where there is a trace
    ),
]

every_check = pytest.mark.parametrize("one", CHECKS, ids=lambda one: one.code)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """What a file imports when it runs, as dotted names; ``top_level``: when it is imported itself."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        later = top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if not typing_only and not later:
            nodes += ast.iter_child_nodes(node)


def module_of(path: Path) -> str:
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def code_of(one: Check) -> int:
    """Lines of the check and of what it uses of its file, without docstrings, comments, blank lines and effects."""
    source = Path(inspect.getfile(one.run)).read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    defined: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {name.id: node for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)}
    used, queue = set(), [defined[one.run.__name__]]
    while queue:
        node = queue.pop()
        if node not in used:
            used.add(node)
            queue += [defined[n.id] for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in defined]
    counted: set[int] = set()
    for node in used:
        declared = getattr(node, "decorator_list", ())
        first = min([node.lineno, *(d.lineno for d in declared)])
        counted |= set(range(first, (node.end_lineno or first) + 1))
        for said in (k for d in declared if isinstance(d, ast.Call) for k in d.keywords if k.arg in EFFECTS):
            if lines[said.lineno - 1].lstrip().startswith(str(said.arg)):
                counted -= set(range(said.lineno, (said.end_lineno or 0) + 1))
    for inner in (inner for node in used for inner in ast.walk(node)):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner):
            counted -= set(range(inner.body[0].lineno, (inner.body[0].end_lineno or 0) + 1))
    return sum(bool(lines[n - 1].strip()) and not lines[n - 1].lstrip().startswith("#") for n in counted)


def test_every_file_of_a_check_registers_one() -> None:
    files = Counter(Path(inspect.getfile(one.run)) for one in CHECKS)
    assert sorted(files) == CHECK_FILES
    assert [relative(path) for path, count in files.items() if count > 1] == []


@every_check
def test_file_is_code_and_slug_in_the_folder_of_its_family(one: Check) -> None:
    assert CODE.fullmatch(one.code)
    slug = one.slug.removeprefix(f"{one.family}-").replace("-", "_")
    expected = PACKAGE / "checks" / one.family / f"{one.code.lower()}_{slug}.py"
    assert relative(Path(inspect.getfile(one.run))) == relative(expected)


def test_codes_and_names_are_unique_and_a_family_has_one_prefix() -> None:
    slugs = Counter(one.slug for one in CHECKS)
    assert [slug for slug, count in slugs.items() if count > 1] == []
    assert set(slugs).isdisjoint(registry())
    pairs = {(one.family, one.code[:3]) for one in CHECKS}
    assert len(pairs) == len({family for family, _ in pairs}) == len({prefix for _, prefix in pairs})
    assert set(FAMILY_ROLES) <= {prefix for _, prefix in pairs}


@every_check
def test_it_says_what_holds_at_which_stage_and_how_grave(one: Check) -> None:
    assert one.title == one.title.strip().rstrip(".")
    assert 0 < len(one.title) < 80
    assert "\n" not in one.title
    assert isinstance(one.stage, Stage)
    assert isinstance(one.severity, Severity)


@every_check
def test_page_has_every_heading_and_a_source_with_an_address(one: Check) -> None:
    page = one.page
    assert tuple(page) == HEADINGS
    assert [heading for heading, text in page.items() if not text.strip()] == []
    assert URL.search(page["Source"])
    assert re.search(r"^1\. ", page["How to fix"], re.MULTILINE), "the steps are numbered"


@every_check
def test_it_ships_faults_that_start_from_a_healthy_setup(one: Check) -> None:
    assert one.faults
    titles = [fault.title for fault in one.faults]
    assert len(set(titles)) == len(titles)
    assert [fault.title for fault in one.faults if fault.wants not in (("healthy",), ("healthy_files",))] == []


@every_check
def test_needs_are_facts(one: Check) -> None:
    known = facts()
    strangers = [n for n in one.needs if n not in ("setup", "options") and split_role(n)[1] not in known]
    assert strangers == []


def test_needs_of_facts_are_facts() -> None:
    known = facts()
    needs = [(fact.name, need) for fact in known.values() for need in fact.needs]
    assert [(name, n) for name, n in needs if n not in GIVEN and split_role(n)[1] not in known] == []


@every_check
def test_after_names_other_checks_in_no_circle(one: Check) -> None:
    checks = registry()
    seen: set[str] = set()
    queue = list(one.after)
    while queue:
        code = queue.pop()
        assert code in checks, f"{one.code} is after {code}, which is no check"
        assert code != one.code, f"{one.code} is after itself"
        if code not in seen:
            seen.add(code)
            queue += checks[code].after


@every_check
def test_it_is_short(one: Check) -> None:
    assert code_of(one) <= LONGEST


def test_codes_of_the_diagnosis_are_codes() -> None:
    explained = {one.code: one.explains for one in CHECKS if one.explains}
    named = {*explained, *(code for codes in explained.values() for code in codes)}
    assert [code for code in named if not CODE.fullmatch(code)] == []
    assert [code for code in named if not code.startswith(diagnosis.ORDER)] == []
    assert {one.code[:3] for one in CHECKS} <= {place[:3] for place in diagnosis.ORDER}
    assert [root for root, codes in explained.items() if root in codes or len(set(codes)) != len(codes)] == []
    assert [one.code for one in CHECKS if one.across_roles and not one.explains] == []


@pytest.mark.parametrize("path", LIGHT, ids=relative)
def test_nothing_heavy_is_imported_at_the_top(path: Path) -> None:
    assert {name.split(".")[0] for name in imports(path, top_level=True)}.isdisjoint(HEAVY)


def test_importing_every_light_module_and_the_facts_loads_nothing_heavy() -> None:
    modules = [module_of(path) for path in LIGHT]
    code = (
        "import importlib, json, sys\n"
        "for name in json.loads(sys.argv[1]): importlib.import_module(name)\n"
        "importlib.import_module('rlhf_doctor.facts').facts()\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(modules)],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(ran.stdout) == []


@pytest.mark.parametrize("layer", PATH)
def test_nothing_imports_what_is_to_the_right_of_it(layer: str) -> None:
    right = {f"rlhf_doctor.{name}" for name in PATH[PATH.index(layer) + 1 :]}
    folder = PACKAGE / layer
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{layer}.py"]:
        for name in imports(path):
            assert ".".join(name.split(".")[:2]) not in right, f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "reference_impl").rglob("*.py")), ids=relative)
def test_the_reference_imports_nothing_of_the_doctor(path: Path) -> None:
    assert "rlhf_doctor" not in {name.split(".")[0] for name in imports(path)}
