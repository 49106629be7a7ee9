"""The HTML page: its structure, its links, its promise to ask nothing of any other place, and its escaping."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import report_records as records
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_doctor.report import html, json_, markdown, terminal

VOID = {"meta", "link", "input", "br", "hr"}
SVG_VOID = {"path", "rect"}
NETWORK = {"src", "srcset", "action", "formaction", "poster", "data", "background", "ping", "cite", "xlink:href"}


class Page(HTMLParser):
    """Every element with its attributes and the text of the embedded record; unclosed elements are an error."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.embedded = ""
        self.scripts = 0
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SVG_VOID, f"{tag} closes itself"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if self.open and self.open[-1] == "script" and tag == "script" and attributes.get("id") == "record":
            self.embedded += data

    def all(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


CASES = sorted(records.EVERY)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    made: dict[str, Any] = records.EVERY[request.param]()
    return made


def test_embedded_record_is_the_record(case: dict[str, Any]) -> None:
    assert json.loads(Page(html.render(case)).embedded) == case
    assert json.loads(json_.render(case)) == case


def test_every_internal_link_and_reference_resolves(case: dict[str, Any]) -> None:
    page = Page(html.render(case))
    ids = page.all("id")
    assert len(set(ids)) == len(ids)
    for name in ("aria-labelledby", "for", "aria-controls", "aria-describedby"):
        for value in page.all(name):
            assert set(value.split()) <= set(ids), f"{name}={value}"
    for target in page.all("href"):
        if target.startswith("#"):
            assert target[1:] in ids, target
    for mark in page.all("marker-end"):
        assert mark.removeprefix("url(#").removesuffix(")") in ids


def test_nothing_is_asked_of_another_place(case: dict[str, Any]) -> None:
    said = html.render(case)
    page = Page(said)
    for tag, attributes in page.elements:
        assert not NETWORK & attributes.keys(), f"{tag} {attributes}"
        assert not any(name.startswith("on") for name in attributes), f"{tag} {attributes}"
        if "href" in attributes and tag != "a":
            assert attributes["href"] == "data:,", tag
        if tag == "a":
            assert attributes["href"].startswith(("#", "https://", "http://"))
    assert "@import" not in said
    assert "url(" not in said.replace("url(#tip-", "")
    for forbidden in ("fetch(", "XMLHttpRequest", "WebSocket", "sendBeacon", "innerHTML", "eval("):
        assert forbidden not in said
    policies = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies
    assert policies[0].startswith("default-src 'none'")


def test_headings_and_landmarks_are_in_order(case: dict[str, Any]) -> None:
    page = Page(html.render(case))
    tags = [tag for tag, _ in page.elements]
    levels = [int(tag[1]) for tag in tags if tag in ("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    for landmark in ("header", "nav", "main", "footer"):
        assert tags.count(landmark) == 1
    assert ("html", {"lang": "en"}) in page.elements
    for tag, attributes in page.elements:
        if tag == "section":
            assert "aria-labelledby" in attributes
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label")


def test_the_page_says_what_a_manager_and_an_engineer_need() -> None:
    said = records.visible_text(html.render(records.founding()))
    at = said.index("Do not start this RLHF run yet")
    for words in (
        "Started as it is, the policy will be driven towards scores", "Fix this first",
        "Start the reward model from the SFT checkpoint", "The four models", "What each output sees",
        "Operations that mix positions", "Diagnosis", "The four models share one architecture",
        "1 finding follows from this", "Looks odd, is normal", "What was not checked, and why", "Provenance",
        "0123456789abcdef",
    ):  # fmt: skip
        at = said.index(words, at)


def test_each_map_has_its_alternative_in_words() -> None:
    page = Page(html.render(records.founding()))
    words = [a["aria-label"] for tag, a in page.elements if tag == "svg" and "aria-label" in a]
    assert len(words) == 4
    assert "Full lower triangle" in words[0]
    assert "picture of a Transformer decoder" in words[0]
    assert "at most 2 tokens back and 2 tokens ahead" in words[2]
    assert "here it comes about otherwise" in words[3]
    assert "recurrent" in words[3]


ATTACKS = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "]]><img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "javascript:alert(1)",
    "[x](javascript:alert(1))",
    "https://evil.example/\"onmouseover='alert(1)'",
    "{{ 7 * 7 }}{% raw %}",
    "[red]markup[/red]",
    "\x1b[31mred\x1b[0m\x1b]8;;http://x\x07",
    "\x00\ud800\u202eevil\u2028",
    "'; DROP TABLE",
    "a" * 3000,
    "&lt;b&gt;&amp;",
    "</style><style>*{display:none}",
    "`code` | table | *x* _y_ # h",
    "\r\nnew\r\n1. line\n- item",
]


def hostile(make: Callable[[], dict[str, Any]], text: str) -> dict[str, Any]:
    """The record with ``text`` in every string that a user's files, models or messages can fill."""
    made = copy.deepcopy(make())
    for found in made["findings"]:
        found["message"] = text
        found["page"] = dict.fromkeys(found["page"], text)
        for evidence in found["evidence"]:
            evidence.update(dict.fromkeys(evidence, text))
    for one in (*made["diagnosis"], *made["skipped"], *made["errors"], *made["crashed"]):
        one.update({key: text for key in one if key in ("message", "reason", "traceback")})
    for card in made["setup"]["roles"].values():
        for key in ("class_name", "model_type", "path", "why", "where", "dtype", "measured_shape", "kind", "emits"):
            card[key] = text
        if card["head"]:
            card["head"]["name"] = text
        if card["influence"]:
            card["influence"]["tokens_of"] = text
        if card["census"]:
            card["census"]["attention"] = {text: 2}
    made["setup"] |= {"origin": text, "declared": {text: text, "list": [text, {text: text}]}}
    made["verdict"] |= {"sentence": text, "cost": text}
    made["environment"] |= {"command": f"rlhf-doctor check {text}", "platform": text, "started": text}
    made["environment"]["inputs"] = [{"path": text, "bytes": 3, "sha256": None}]
    return made


def safe(page: str, calm: Page) -> Page:
    """The page parses, has no element that the calm page has not, and nothing that acts."""
    found = Page(page)
    counts = [tag for tag, _ in found.elements]
    for tag in ("script", "style", "svg", "form", "meta", "link", "path", "rect", "article"):
        assert counts.count(tag) == [tag for tag, _ in calm.elements].count(tag), tag
    assert not {"img", "iframe", "object", "embed", "base"} & set(counts)
    for tag, attributes in found.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert "href" not in attributes or attributes["href"].startswith(("#", "https://", "http://", "data:,"))
        assert not NETWORK & attributes.keys(), tag
    return found


CALM = {name: Page(html.render(hostile(make, "calm"))) for name, make in records.EVERY.items()}


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
@pytest.mark.parametrize("name", CASES)
def test_known_attacks_stay_text(name: str, attack: str) -> None:
    made = hostile(records.EVERY[name], attack)
    page = html.render(made)
    found = safe(page, CALM[name])
    page.encode("utf-8")
    assert json.loads(found.embedded) == json.loads(json.dumps(made))


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet=st.characters(codec=None, exclude_categories=()), max_size=200))
def test_any_string_stays_text_in_every_format(text: str) -> None:
    made = hostile(records.founding, text)
    page = html.render(made)
    page.encode("utf-8")
    assert json.loads(safe(page, CALM["founding"]).embedded) == json.loads(json.dumps(made))
    assert json.loads(json_.render(made).encode("utf-8")) == json.loads(json.dumps(made))
    for renderer in (terminal, markdown):
        said = renderer.render(made)
        said.encode("utf-8")
        assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in said)


def test_text_that_looks_like_json_or_html_comes_back_from_the_embedded_record() -> None:
    made = hostile(records.founding, "</script>\u2028<!-- & \\u003c")
    page = html.render(made)
    assert "</script>\u2028" not in page
    assert json.loads(Page(page).embedded)["setup"]["origin"] == "</script>\u2028<!-- & \\u003c"


@pytest.mark.parametrize("renderer", [html, json_])
def test_nan_is_refused(renderer: Any) -> None:
    made = records.record()
    made["environment"]["seconds"] = float("nan")
    with pytest.raises(ValueError, match=r"not JSON compliant|Out of range"):
        renderer.render(made)


def test_markdown_has_no_html_and_no_markup_of_the_user() -> None:
    for attack in ATTACKS:
        lines = markdown.render(hostile(records.founding, attack)).splitlines()
        said = "\n".join(line for line in lines if not line.startswith("    "))  # those are code blocks
        assert "<script" not in said.replace("\\<script", "")
        assert "<img" not in said.replace("\\<img", "")
        assert "](javascript" not in said.replace("\\](javascript", "")


def test_importing_the_report_imports_no_renderer_and_no_torch() -> None:
    code = (
        "import sys; from rlhf_doctor.report import html, json_, markdown, terminal, view, record;"
        "print([m for m in ('torch', 'transformers', 'jinja2', 'rich', 'numpy') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_rendering_imports_no_torch() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); import report_records as r;"
        "[r.golden()]; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
