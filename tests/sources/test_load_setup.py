"""A setup comes from a Python file, from folders, or from nothing at all; what cannot be read is said in a sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_doctor import RLHFSetup, UnreadableTarget, load_setup
from rlhf_doctor.sources.checkpoints import files_of

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str, name: str = "mine.py") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return written


DICT = "def build():\n    return {'prompts': ['hello'], 'declared': {'gamma': 0.9}}\n"


def test_a_function_that_gives_a_dict(write: Write) -> None:
    setup = load_setup(f"{write(DICT)}:build", declared={"lam": 0.95})
    assert setup.prompts == ["hello"]
    assert setup.declared == {"gamma": 0.9, "lam": 0.95}
    assert setup.origin.endswith("mine.py:build")


def test_the_name_defaults_to_build(write: Write) -> None:
    assert load_setup(write(DICT)).prompts == ["hello"]


@pytest.mark.parametrize(
    "line",
    [
        "thing = RLHFSetup(prompts=['hello'])",
        "thing = {'prompts': ['hello']}",
        "thing = lambda size=3: RLHFSetup(prompts=['hello'])",
        "class thing:\n    made = staticmethod(lambda: RLHFSetup(prompts=['hello']))",
    ],
)
def test_objects_and_functions(write: Write, line: str) -> None:
    name = "thing.made" if line.startswith("class") else "thing"
    setup = load_setup(f"{write('from rlhf_doctor import RLHFSetup' + chr(10) + line)}:{name}")
    assert setup.prompts == ["hello"]


@pytest.mark.parametrize("line", ["from neighbour_of_mine import PROMPTS", "from .neighbour_of_mine import PROMPTS"])
def test_neighbours_can_be_imported(write: Write, line: str) -> None:
    write("PROMPTS = ['near']\n", "neighbour_of_mine.py")
    before = list(sys.path)
    setup = load_setup(f"{write(line + chr(10) + 'build = dict(prompts=PROMPTS)')}:build")
    sys.modules.pop("neighbour_of_mine", None)
    assert setup.prompts == ["near"]
    assert sys.path == before


def test_a_file_in_a_package_imports_relatively(tmp_path: Path) -> None:
    inner = tmp_path / "doctor_test_package" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").touch()
    (inner.parent / "common.py").write_text("PROMPTS = ['far']\n")
    (inner / "mine.py").write_text("from ..common import PROMPTS\nbuild = dict(prompts=PROMPTS)\n")
    assert load_setup(f"{inner / 'mine.py'}:build").prompts == ["far"]


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        (
            "def build(): raise ValueError('no data')",
            "build",
            r"mine\.py:build: ValueError: no data \(mine\.py, line 1\)",
        ),
        ("import sys\ndef build(): sys.exit(3)", "build", r"sys\.exit\(3\)"),
        ("raise KeyError('x')", "build", r"could not be imported: KeyError: 'x' \(mine\.py, line 1\)"),
        ("import no_such_module", "build", "ModuleNotFoundError.*no_such_module"),
        ("def build(:", "build", "line 1 of .*mine"),
        ("def build(): return 7", "build", "gave int; it should give an RLHFSetup or a dict"),
        ("def build(): return None", "build", "gave NoneType"),
        ("async def build(): return {}", "build", "gave coroutine"),
        ("def build(config): return {}", "build", r"needs arguments \(config\)"),
        ("def build_setup(): return {}", "biuld_setup", "did you mean 'build_setup'"),
        ("def other(): return {}", "xyz", "it has other"),
        ("", "build", "it defines no name"),
        ("build = {'polcy': 1}", "build", "'polcy' is no field of RLHFSetup; did you mean 'policy'"),
        ("build = {'declared': 3}", "build", "declared is int; it should be a dict"),
        ("build = {'prompts': 'hello'}", "build", "prompts is one text"),
        ("def build(): return build()", "build", "RecursionError"),
        ("def build(): raise SystemExit", "build", r"sys\.exit\(None\)"),
    ],
)
def test_what_goes_wrong_is_one_sentence(write: Write, text: str, name: str, sentence: str) -> None:
    with pytest.raises(UnreadableTarget, match=sentence) as caught:
        load_setup(f"{write(text)}:{name}")
    assert "mine.py" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistyped_file_gets_the_nearest_suggested(write: Write) -> None:
    path = write(DICT)
    with pytest.raises(UnreadableTarget, match=r"no file '.*mnie\.py'; did you mean '.*mine\.py'"):
        load_setup(f"{path.with_name('mnie.py')}:build")


def test_a_mistyped_folder_in_the_middle_of_a_path(write: Write, tmp_path: Path) -> None:
    (tmp_path / "setups").mkdir()
    write(DICT, "setups/mine.py")
    with pytest.raises(UnreadableTarget, match=r"did you mean '.*setups/mine\.py'"):
        load_setup(tmp_path / "setpus" / "mine.py")


def test_folders_by_role_override_targets(write: Write, tmp_path: Path) -> None:
    text = "build = {'policy': '/a', 'reward': '/b', 'declared': {'gamma': 0.9}}"
    setup = load_setup(write(text), policy=tmp_path, reference="adapter-off", tokenizer="/t")
    assert (setup.policy, setup.reference, setup.reward) == (str(tmp_path), "adapter-off", "/b")
    assert setup.value is None
    assert setup.tokenizer == "/t"
    assert setup.declared == {"gamma": 0.9}


def test_later_targets_override_earlier_ones(write: Write) -> None:
    first = write("build = {'policy': '/a', 'prompts': ['x'], 'declared': {'gamma': 0.9, 'lam': 1}}", "first.py")
    second = write("build = {'policy': '/b', 'declared': {'gamma': 1.0}}", "second.py")
    setup = load_setup(first, second)
    assert (setup.policy, setup.prompts) == ("/b", ["x"])
    assert setup.declared == {"gamma": 1.0, "lam": 1}
    assert "first.py" in setup.origin
    assert "second.py" in setup.origin


def test_a_folder_with_a_subfolder_for_each_role(tmp_path: Path) -> None:
    for role in ("policy", "reward"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text("{}")
    setup = load_setup(tmp_path)
    assert setup.present == ("policy", "reward")
    assert files_of(setup) == [tmp_path / "policy" / "config.json", tmp_path / "reward" / "config.json"]


def test_folders_that_are_no_setup(tmp_path: Path) -> None:
    with pytest.raises(UnreadableTarget, match="no subfolder called policy"):
        load_setup(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnreadableTarget, match="is a checkpoint; say whose: --policy"):
        load_setup(tmp_path)
    with pytest.raises(UnreadableTarget, match="neither a Python file"):
        load_setup(tmp_path / "config.json")


def test_a_reference_that_knows_its_origin_keeps_it(write: Write) -> None:
    text = "from rlhf_doctor import RLHFSetup\nbuild = RLHFSetup(prompts=['x'], origin='experiment 12')"
    assert load_setup(write(text)).origin == "experiment 12"


def test_files_of_a_python_target_include_the_file(write: Write) -> None:
    path = write(DICT)
    assert files_of(load_setup(f"{path}:build")) == [path]


def test_trust_in_remote_code_must_be_asked_for(write: Write) -> None:
    path = write(DICT)
    assert not load_setup(path).trust_remote_code
    assert load_setup(path, trust_remote_code=True).trust_remote_code


def test_nothing_gives_the_built_in_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    import reference_impl

    monkeypatch.setattr(reference_impl, "build_setup", lambda: {"prompts": ["built in"]})
    setup = load_setup(declared={"gamma": 0.9})
    assert isinstance(setup, RLHFSetup)
    assert setup.prompts == ["built in"]
    assert setup.origin == "the built-in reference"
    assert setup.declared == {"gamma": 0.9}
