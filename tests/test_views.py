"""The pictures: what is drawn is what was, names cannot break out of them, and large ones are cut."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from fake_model import FakeModel, FakeTokenizer, engine_config
from msgspec.structs import replace

from sharp.engine import Engine
from sharp.request import SamplingParams
from sharp.views.pages import MAX_PAGES, PageMap
from sharp.views.timeline import BLUE, GREEN, MAX_ROWS, MAX_STEPS, RED, Timeline

PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


def rects(svg: str) -> list[Any]:
    return [node for node in ET.fromstring(svg).iter() if node.tag.endswith("rect")]


def run(**options: Any) -> Engine:
    engine = Engine(FakeModel(), FakeTokenizer(), engine_config(**options))
    for name, length in (("a", 9), ("<b>&", 70), ("c", 3)):
        engine.add_request([4 + len(name)] * length, PARAMS, name)
        engine.step()
    for _ in range(5):
        engine.step()
    return engine


def test_a_cell_for_each_sequence_of_each_step() -> None:
    engine = run()
    records = list(engine.stats.history)
    line = Timeline.of(records, names={"a": "first"})
    cells = rects(line.svg())
    assert len([c for c in cells if c.get("fill") in (GREEN, BLUE)]) == sum(r.num_seqs for r in records)
    decodes = sum(count == 1 for r in records for _, count in r.scheduled)
    assert len([c for c in cells if c.get("fill") == GREEN]) == decodes
    assert "first" in line.svg()
    assert "<b>" not in line._repr_html_()
    assert "step 1: a, tokens: 9, " in line.svg()


def test_widths_are_times() -> None:
    records = [replace(r, seconds=f) for r, f in zip(run().stats.history, (1.0, 2.0, 3.0), strict=False)]
    wide = [float(c.get("width")) for c in rects(Timeline.of(records).svg()) if "step 3" in c[0].text]
    narrow = [float(c.get("width")) for c in rects(Timeline.of(records).svg()) if "step 1" in c[0].text]
    assert 2.8 < wide[0] / narrow[0] < 3.2
    same = {c.get("width") for c in rects(Timeline.of(records, by_time=False).svg())}
    assert len(same) == 1


def test_who_got_nothing_is_red() -> None:
    records = run(scheduling_policy="blocking").stats.history
    told = [c[0].text for c in rects(Timeline.of(records).svg()) if c.get("fill") == RED]
    assert any(text.endswith("a waits: prompts first") for text in told)


def test_large_timelines_are_cut() -> None:
    record = run().stats.history[-1]
    names = tuple(f"r{i}" for i in range(MAX_ROWS + 40))
    many = replace(record, request_ids=names, counts=(1,) * len(names))
    line = Timeline.of([many] * (MAX_STEPS + 50))
    assert len(line.records) == MAX_STEPS
    assert len(rects(line.svg())) == MAX_STEPS * MAX_ROWS
    assert Timeline.of([])._repr_html_().startswith("<svg")


def test_pages_are_the_schedulers() -> None:
    engine = run()
    blocks = engine.scheduler.blocks
    pages = PageMap.of(engine.scheduler)
    counts = pages.counts()
    assert sum(counts.values()) == blocks.num_blocks
    assert counts["empty"] == blocks.num_free
    assert counts["kept"] == blocks.num_cached
    assert counts["written"] + counts["booked"] == blocks.num_used
    assert counts["written"] == sum(-(-r.num_computed_tokens // 4) for r in engine.scheduler.running)
    assert counts["booked"] > 0
    for request in engine.scheduler.running:
        assert {pages.owner[page] for page in request.block_ids} == {request.request_id}
    html = pages._repr_html_()
    assert len(rects(html[html.index("<svg") :])) == blocks.num_blocks
    assert "<b>" not in html
    assert repr(pages).startswith("64 pages: ")


def test_kept_and_shared_pages() -> None:
    engine = Engine(FakeModel(), FakeTokenizer(), engine_config())
    prompt = [5] * 21
    engine.add_request(prompt, PARAMS, "a")
    while engine.has_unfinished:
        engine.step()
    assert PageMap.of(engine.scheduler).counts()["kept"] >= 5
    engine.add_request(prompt, PARAMS, "b")
    engine.step()
    engine.add_request(prompt, PARAMS, "c")
    engine.step()
    pages = PageMap.of(engine.scheduler)
    assert max(pages.references) == 2
    assert "used by 2" in pages._repr_html_()


def test_a_map_of_many_pages_is_cut() -> None:
    count = MAX_PAGES + 5
    html = PageMap((None,) * count, (False,) * count, (0,) * count)._repr_html_()
    assert f"the first {MAX_PAGES} are drawn" in html
    assert html.count("<rect") == MAX_PAGES
