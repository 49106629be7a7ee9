"""Text helpers: sentences, blocks, spans, and characters that must not act on the reader's screen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_doctor.report.text import blocks, clean, counted, first_sentence, one_line, spans


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("The critic pools. It should not.", "The critic pools."),
        ("A value of 0.5 was read. More.", "A value of 0.5 was read."),
        ("Some heads (e.g. Score) differ. Mend them.", "Some heads (e.g. Score) differ."),
        ("no full stop", "no full stop."),
        ("It is in config.json: see v2.1. Then stop.", "It is in config.json: see v2.1."),
        ("One\nline.  Two.", "One line."),
        ("", ""),
    ],
)
def test_first_sentence(text: str, sentence: str) -> None:
    assert first_sentence(text) == sentence


def test_blocks_keep_lists_and_join_wrapped_lines() -> None:
    page = "Intro over\ntwo lines.\n\n1. First\n   goes on.\n2. Second.\n\n- a\n- b\n\nEnd."
    assert [(b.kind, b.items) for b in blocks(page)] == [
        ("text", ["Intro over two lines."]),
        ("numbered", ["First goes on.", "Second."]),
        ("bullets", ["a", "b"]),
        ("text", ["End."]),
    ]


def test_a_list_may_follow_its_introduction_at_once() -> None:
    assert [b.kind for b in blocks("Do this:\n1. One.\n2. Two.")] == ["text", "numbered"]


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("see https://arxiv.org/abs/2009.01325.", ["https://arxiv.org/abs/2009.01325"]),
        ("(https://en.wikipedia.org/wiki/A_(b)), and", ["https://en.wikipedia.org/wiki/A_(b)"]),
        ("http://a.b/c?d=e&f=g#h; next", ["http://a.b/c?d=e&f=g#h"]),
        ("javascript:alert(1) data:text/html,x file:///etc vbscript:x ftp://a", []),
        ("`https://in.code/` is code", []),
        ("https://... and https://", []),
    ],
)
def test_only_web_addresses_become_links(text: str, links: list[str]) -> None:
    assert [s.text for s in spans(text) if s.kind == "link"] == links


@given(st.text())
def test_spans_lose_nothing_but_backticks(text: str) -> None:
    assert "".join(s.text for s in spans(text)).replace("`", "") == text.replace("`", "")


@given(st.text(alphabet=st.characters(codec=None, exclude_categories=())))
def test_clean_text_has_nothing_that_acts(text: str) -> None:
    said = clean(text)
    said.encode("utf-8")
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066\u2028" for c in said)
    assert clean(said) == said


@given(st.text())
def test_blocks_keep_every_word(text: str) -> None:
    kept = "".join(item for block in blocks(text) for item in block.items)
    assert set("".join(kept.split())) <= set("".join(clean(text).split()))
    assert all(block.items for block in blocks(text))


def test_counted_and_one_line() -> None:
    assert [counted(n, "check") for n in (0, 1, 1200)] == ["0 checks", "1 check", "1,200 checks"]
    assert one_line(" a\n\tb\x1b[31m ") == "a b\\x1b[31m"
