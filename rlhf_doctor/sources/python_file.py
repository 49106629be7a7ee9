"""``file.py:name``: a function without required arguments, or an object, that gives a setup."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_doctor.nearest import did_you_mean, near_path
from rlhf_doctor.setups import RLHFSetup
from rlhf_doctor.sources.target import UnreadableTarget

__all__ = ["import_folders", "is_python_target", "load_python_target"]

DEFAULT_NAME = "build"
PACKAGE = "_rlhf_doctor_target"


def split_target(target: str) -> tuple[Path, str]:
    """``setups/mine.py:build`` -> (``setups/mine.py``, ``build``); the name defaults to ``build``."""
    head, colon, name = target.rpartition(":")
    if colon and head.endswith(".py"):
        return Path(head), name
    return Path(target), DEFAULT_NAME


def is_python_target(target: str) -> bool:
    """Whether a target names a Python file."""
    return split_target(target)[0].suffix == ".py"


def load_python_target(target: str) -> RLHFSetup:
    """Import the file, find the name in it and, where it is a function, call it.

    The file's folder and the working folder are importable meanwhile.

    Raises:
        UnreadableTarget: there is no such file or name, its code raises or exits, or what it gives is no setup.
    """
    path, name = split_target(target)
    if not path.is_file():
        raise UnreadableTarget(f"there is no file {str(path)!r}{near_path(path)}")
    with _importable(target):
        with _sentence_for(path, f"{path} could not be imported"):
            module = _import(path)
        given = _named(module, path, name)
        if callable(given) and not isinstance(given, (RLHFSetup, Mapping)):
            _check_signature(given, target)
            with _sentence_for(path, f"{path}:{name}"):
                given = given()
        return _as_setup(given, f"{path}:{name}")


def import_folders(target: str) -> list[str]:
    """The folders that are importable while a target is loaded: its own, and the working folder."""
    return [str(split_target(target)[0].resolve().parent), str(Path.cwd())]


@contextmanager
def _importable(target: str) -> Iterator[None]:
    before = list(sys.path)
    sys.path[:0] = import_folders(target)
    try:
        yield
    finally:
        sys.path[:] = before


def _import(path: Path) -> ModuleType:
    path = path.resolve()
    if (path.parent / "__init__.py").is_file():  # part of a package: its relative imports need the package's name
        parts = [path.stem]
        root = path.parent
        while (root / "__init__.py").is_file():
            parts.insert(0, root.name)
            root = root.parent
        sys.path.insert(0, str(root))
        return importlib.import_module(".".join(parts))
    package = ModuleType(PACKAGE)
    package.__path__ = [str(path.parent)]
    sys.modules[PACKAGE] = package
    for stale in [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]:
        del sys.modules[stale]
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{path.stem}", path)
    assert spec is not None  # the suffix is .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _named(module: ModuleType, path: Path, name: str) -> Any:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n, value in vars(found).items() if not n.startswith("_") and not inspect.ismodule(value)]
            own = [n for n in public if getattr(getattr(found, n), "__module__", module.__name__) == module.__name__]
            hint = did_you_mean(part, own) or (f"; it has {', '.join(own)}" if own else "; it defines no name")
            raise UnreadableTarget(f"{path} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def _check_signature(function: Any, target: str) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if required:
        raise UnreadableTarget(f"{target} needs arguments ({', '.join(required)}); it should be callable without any")


def _as_setup(given: Any, target: str) -> RLHFSetup:
    if inspect.iscoroutine(given):
        given.close()
    if isinstance(given, RLHFSetup):
        setup = given if given.origin != RLHFSetup().origin else given.but(origin=target)
    elif isinstance(given, Mapping):
        try:
            setup = RLHFSetup.from_mapping(given, origin=target)
        except ValueError as error:
            raise UnreadableTarget(f"{target}: {error}") from error
    else:
        raise UnreadableTarget(
            f"{target} gave {type(given).__name__}; it should give an RLHFSetup or a dict of its fields"
        )
    for field in ("declared", "calls", "functions"):
        if not isinstance(getattr(setup, field), Mapping):
            kind = type(getattr(setup, field)).__name__
            raise UnreadableTarget(f"{target}: {field} is {kind}; it should be a dict")
    if isinstance(setup.prompts, str):
        raise UnreadableTarget(f"{target}: prompts is one text; it should be a list of texts")
    return setup


@contextmanager
def _sentence_for(path: Path, what: str) -> Iterator[None]:
    """Whatever the user's code raises, as one sentence that says where."""
    try:
        yield
    except SyntaxError as error:
        raise UnreadableTarget(f"{what}: line {error.lineno} of {error.filename or path}: {error.msg}") from error
    except SystemExit as error:
        raise UnreadableTarget(f"{what}: it called sys.exit({error.code!r})") from error
    except Exception as error:  # the user's code may raise anything
        said = " ".join(str(error).split())[:300]
        raise UnreadableTarget(f"{what}: {type(error).__name__}: {said}{_where(error, path)}") from error


def _where(error: BaseException, path: Path) -> str:
    folder = str(path.resolve().parent)
    own = [f for f in traceback.extract_tb(error.__traceback__) if str(Path(f.filename).resolve()).startswith(folder)]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
