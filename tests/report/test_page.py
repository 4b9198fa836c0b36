"""The report page as text, and the table and verdict that it shares with the terminal."""

import dataclasses
import html
import itertools
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from dqtk.metrics.sqnr import PairSums

from dqtk.report.charts import Line, bits_class, block_of, line_chart
from dqtk.report.measures import score_measures, step_measures
from dqtk.report.page import render_page, write_page
from dqtk.report.scores import resolve_scores
from dqtk.report.trajectory import StepSums
from dqtk.report.verdict import verdict

VOID = {"meta", "link", "img", "input", "br", "line", "circle"}


class Checker(HTMLParser):
    """Every tag is closed in order; ids are unique; labels point to ids that exist."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.labels = [], [], []
        self.feed(text)
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        assert set(self.labels) <= set(self.ids)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        names = dict(attributes)
        assert len(names) == len(attributes), f"an attribute twice in {tag}"
        self.ids += [names["id"]] if "id" in names else []
        self.labels += [names["aria-labelledby"]] if "aria-labelledby" in names else []
        if tag in ("img", "input"):
            assert names.get("alt") or names.get("aria-label")

    def handle_startendtag(self, tag, attributes):
        assert tag in VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def prompts_in(page):
    return [html.unescape(text) for text in re.findall(r'<p class="prompt">(.*?)</p>', page)]


def test_well_formed_with_everything_and_with_almost_nothing(made_up):
    Checker(render_page(made_up(), command="dqtk compare a b"))
    bare = made_up(curves=(), ranges=(), sizes=(), floor_name=None, plan_summary=None, measures=())
    Checker(render_page(bare, max_pairs=0))


def test_worst_pair_first_and_the_number_shown_is_said(made_up):
    page = render_page(made_up(), max_pairs=3)
    assert [text[-1] for text in prompts_in(page)] == ["0", "3", "1"]  # 20, 30, 40 dB; the equal pair is the best
    assert "The 3 worst of 4 pairs, worst first by PSNR." in page
    assert "All pairs, worst first" in render_page(made_up())
    assert 'class="pair"' not in render_page(made_up(), max_pairs=0)
    with pytest.raises(ValueError, match=r"^write_page: max_pairs must be at least 0, got -1\. 0 leaves the pictures out\."):
        write_page(made_up(), "never.html", max_pairs=-1)


def test_nothing_from_outside_becomes_markup(made_up):
    evil = '<script>alert("x")</script>\' onload=x &amp;'
    row = made_up().rows[0]
    found = made_up(
        rows=(type(row)(**{name: getattr(row, name) for name in row.__slots__} | {"prompt": evil}),),
        reference_name=evil,
        candidate_name=evil,
        floor_name=evil,
        call_kwargs={evil: evil},
        versions={evil: evil},
        hardware={"processor": evil, "threads": "1"},
        created=evil,
    )
    plan = {"recipe": evil, "hash": evil, "kernels": {evil: 3}, "sites": []}
    site = {"id": f"t:{evil}", "role": evil, "shape": [1], "weight_bits": 4, "input_bits": None, "spec": evil, "why": evil}
    page = render_page(found, plan | {"sites": [site]}, command=evil)
    Checker(page)
    assert page.count("<script>") == 1  # the page's own
    assert "alert(" not in page.replace(html.escape(evil), "")
    assert prompts_in(page) == [evil]


def test_one_file_that_needs_nothing_else(made_up, tmp_path):
    path = write_page(made_up(), tmp_path / "new" / "report.html", command="dqtk compare a b")
    page = path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"@import|url\(", page)
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    write_page(made_up(values=(10.0,)), path)
    assert len(prompts_in(path.read_text(encoding="utf-8"))) == 1


def test_shows_scores_floor_sizes_kernels_plan_and_how_to_reproduce(made_up):
    page = render_page(made_up(), command="dqtk compare tiny-pixart out/pixart-w4a8")
    text = html.unescape(re.sub(r"<[^>]+>", " ", page.split("<body>")[1]))
    for words in (
        "bf16 rounding",
        "47.50",  # mean PSNR with the exact match at 100 dB
        "1 of 4 pairs equal, counted as 100 dB",
        "not measured no weights here",
        "1 picture turned wrong, 0 turned right",
        "linear_w4a8: cpu int_mm",
        "95.0 % quantized",
        "last <layer>",
        "dqtk compare tiny-pixart out/pixart-w4a8",
        "plan abc123",
        "9 quantized, 1 kept at 16 bits",
        "transformer on disk",
    ):
        assert words in re.sub(r"\s+", " ", text.replace(": not", " not")), words


def test_verdict_words_follow_the_numbers(made_up):
    def of(*values, **changes):
        return verdict(made_up(values, **changes))

    assert "hard to tell from the original's: mean PSNR 40.0 dB" in of(40.0, 40.0)
    assert "visible differences in detail" in of(30.0, 30.0)
    assert "drawn differently in places" in of(20.0, 20.0)
    assert "other pictures than the original's" in of(9.0, 9.0)
    assert "paints exactly the original's pictures: 2 images, equal to the last bit" in of(math.inf, math.inf)
    # Exact matches do not buy the rest a better word: the median decides, and the worst is named.
    mixed = of(math.inf, math.inf, 12.0, 12.0, 12.0)
    assert "other pictures than the original's: mean PSNR 47.2 dB" in mixed
    assert "12.0 dB in the median and 12.0 dB in the worst of 5 images" in mixed
    assert "the noise floor is 50.0 dB" in of(30.0, 31.0)
    # An interval of the paired difference that includes 0 is no proof: only one that ends by the floor is.
    assert "; no further away than the noise floor (50.0 dB), to within 0.5 dB" in of(49.6, 52.0)
    assert "; not clearly further away than the noise floor (50.0 dB) in 3 prompts (9.0 dB further in the mean)" in of(
        20.0, 52.0, 51.0
    )
    assert "; not clearly further away than the noise floor (50.0 dB) in 2 prompts (0.5 dB nearer in the mean)" in of(49.0, 52.0)
    assert "The oracle finds the captions shown worse than before" in of(30.0)  # the only image lost it
    assert "the oracle cannot tell from so few pictures" in of(30.0, 31.0, 32.0, 33.0)
    assert "PSNR was not measured" in verdict(made_up(measures=()))


def test_terminal_table_fits_and_says_what_is_missing(made_up):
    table = made_up().table()
    assert max(len(line) for line in table.splitlines()) <= 100
    assert re.search(r"PSNR \(dB\) +47\.50 +\d+\.\d+ to \d+\.\d+ +50\.00", table)
    assert re.search(r"LPIPS +not measured: no weights here", table)
    assert "transformer in memory" in table
    assert "linear_w4a8: cpu int_mm: 9 layers" in table
    assert "attention " not in table


def test_terminal_table_says_what_attention_computes(made_up):
    blocks = {"kernel": "block_attention: torch", "densities": [[0.25, 0.35]]}
    table = made_up(plan_summary={"attention": [blocks, {"id": "dense"}]}).table()
    said = " ".join(table[table.index("\nattention ") :].split())
    assert said.startswith(
        "attention 1 attention in blocks. Runs as: block_attention: torch (1). 30.0 % of the blocks are computed"
    )


def test_chart_of_few_many_flat_and_missing_values():
    for values in ((1.0,), (5.0, 5.0), (math.inf, 3.0), tuple(float(i) for i in range(1000)), (-0.001, 0.002), (1e-7, 2e-7)):
        svg = line_chart("t", "x", "y", [Line(label="<a>", style="own", values=values)])
        Checker(svg)
        numbers = [float(n) for n in re.findall(r'[xy][12]?="(-?[\d.]+)"', svg)]
        assert all(-1 <= n <= 441 for n in numbers)
        assert "nan" not in svg
        labels = re.findall(r'text-anchor="end">(.*?)<', svg)
        assert len(set(labels)) == len(labels) >= 2
    assert "nothing to draw" in line_chart("t", "x", "y", [Line(label="a", style="own", values=(math.inf,))])


def test_chart_labels_are_as_far_apart_as_their_lines():
    svg = line_chart("t", "x", "y", [Line(label="a", style="own", values=(-12.0, -1.0))])
    ticks = [float(text) for text in re.findall(r'text-anchor="end">(.*?)<', svg)]
    assert len(ticks) > 2
    assert {b - a for a, b in itertools.pairwise(ticks)} == {2.5}


def test_blocks_and_bit_classes():
    assert block_of("transformer:transformer_blocks.3.attn1.to_q") == "transformer: transformer_blocks.3"
    assert block_of("unet:down_blocks.1.attentions.0.proj_in") == "unet: down_blocks.1"
    assert block_of("transformer:proj_out") == "transformer: proj_out"
    assert block_of("text_encoder:encoder.block.0.layer.0.q") == "text_encoder: encoder.block.0"
    assert block_of("proj_out") == "proj_out"
    assert [bits_class(b) for b in (None, 2, 3, 4.25, 6, 8, 16)] == ["b16", "b02", "b02", "b04", "b08", "b08", "b16"]


def test_equal_pictures_are_called_identical_and_caps_are_said(made_up, row):
    rows = [dataclasses.replace(row(i, math.inf), floor={"psnr": math.inf}) for i in range(3)]
    psnr = score_measures(rows, resolve_scores(("psnr",))[0], {}, 0)[0]
    found = made_up(values=(math.inf,) * 3, measures=(psnr,))
    page = render_page(found)
    assert "100.00" not in page
    assert page.count('<td class="number">identical</td>') == 2
    assert "3 of 3 pairs equal, counted as 100 dB; of the noise floor 3 equal, counted alike" in page
    assert re.search(r"PSNR \(dB\) +identical +identical$", found.table(), re.MULTILINE)
    near = [dataclasses.replace(row(i, 30.0), floor={"psnr": math.inf}) for i in range(3)]
    psnr = score_measures(near, resolve_scores(("psnr",))[0], {}, 0)[0]
    assert "the noise floor is identical pictures" in verdict(made_up(values=(30.0,) * 3, measures=(psnr,)))


def test_steps_above_the_cap_are_said(made_up):
    ones = torch.ones(2, dtype=torch.float64)
    sums = PairSums(reference_squared=ones, error_squared=torch.tensor([1e-12, 1e-3], dtype=torch.float64), product=ones)
    steps = StepSums(timesteps=(1.0,), sums=(sums,))
    measures = step_measures({"candidate": {"own": steps, "same": None}, "floor": {"own": steps}}, [0, 1], 0)
    page = render_page(made_up(measures=tuple(measures)))
    assert "1 image above 100 dB, counted as that; 1 image of the noise floor above 100 dB, counted as that" in page


def test_ranges_are_drawn_where_levels_are_shared_and_listed_whole(made_up):
    page = render_page(made_up())
    part = page[page.index('id="ranges"') : page.index('id="cost"')]
    assert part.count("<polyline") == 2  # the third was seen at other levels
    assert "ff.&lt;down&gt; (3 layers)" in part
    assert "cross_attn.q" in part
    assert "0.1</td>" in part
    assert 'id="ranges"' not in render_page(made_up(ranges=()))
