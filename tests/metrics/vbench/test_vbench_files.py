"""VBench's suite, names, result files and arithmetic, against what is published and against what goes wrong with them."""

import json

import pytest
from dqtk.metrics.bootstrap import paired_bootstrap
from dqtk.metrics.flips import never_seen_bound
from dqtk.metrics.vbench.__main__ import main
from dqtk.metrics.vbench.changes import paired_changes
from dqtk.metrics.vbench.protocols import EIGHT
from dqtk.metrics.vbench.results import Scored, combined, read_results, write_results
from dqtk.metrics.vbench.suite import DIMENSIONS, QUALITY, SEMANTIC, Entry, collisions, prompt_of_name, read_suite, video_name
from dqtk.metrics.vbench.totals import normalized, totals

# Somebody's run of VBench's own program on MemFlow, printed with the quality score that it computed: 0.8443
# (github.com/KlingAIResearch/MemFlow, issue 7).
MEMFLOW = {
    "subject_consistency": 0.9672831586313744,
    "background_consistency": 0.962255859375,
    "temporal_flickering": 0.989440996222371,
    "motion_smoothness": 0.9844899026780265,
    "dynamic_degree": 0.6222222222222222,
    "aesthetic_quality": 0.6345151881376903,
    "imaging_quality": 0.7047906258108452,
}
# Open-Sora in full precision as Q-VDiT prints it, in the order of the paper's table.
OPEN_SORA = (63.68, 57.12, 96.28, 56.94, 96.13, 90.28, 39.61, 26.21)


# --- totals --------------------------------------------------------------------------------------------------------------


def test_a_published_quality_score_comes_out():
    found = totals(MEMFLOW)
    assert found.quality == pytest.approx(0.8443, abs=5e-5)
    assert (found.semantic, found.total) == (None, None)
    assert found.missing == SEMANTIC


def test_eight_dimensions_have_no_total_and_the_published_program_would_give_a_false_one():
    raw = {name: value / 100 for name, value in zip(EIGHT.dimensions, OPEN_SORA, strict=True)}
    found = totals(raw)
    assert (found.quality, found.semantic, found.total) == (None, None, None)
    assert set(found.missing) == set(DIMENSIONS) - set(EIGHT.dimensions)
    assert found.mean_of_reported == pytest.approx(sum(OPEN_SORA) / 800)
    filled = totals(dict.fromkeys(DIMENSIONS, 0.0) | raw)  # what that program does with what is missing
    assert [filled.quality, filled.semantic, filled.total] == pytest.approx([0.386, 0.133, 0.336], abs=5e-4)


def test_totals_at_the_ends_of_the_ranges():
    best = dict.fromkeys(DIMENSIONS, 1.0) | {"motion_smoothness": 0.9975, "scene": 0.8222}
    best |= {"appearance_style": 0.2855, "temporal_style": 0.364, "overall_consistency": 0.364}
    found = totals(best)
    assert [found.quality, found.semantic, found.total] == pytest.approx([1, 1, 1])
    assert found.missing == ()
    less = totals(best | {"dynamic_degree": 0.0})
    assert less.quality == pytest.approx(6 / 6.5)  # counts half
    assert less.total == pytest.approx((4 * 6 / 6.5 + 1) / 5)
    assert normalized("temporal_flickering", 0) == pytest.approx(-1.6976, abs=1e-4)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"subject consistency": 0.9}, "dimension must be one of subject_consistency.*got 'subject consistency'"),
        ({"imaging_quality": 63.7}, "imaging_quality must be a fraction of at most 1, got 63.7"),
        ({"scene": float("nan")}, "scene must be a fraction of at most 1, got nan"),
    ],
)
def test_totals_refuse(raw, said):
    with pytest.raises(ValueError, match=said):
        totals(raw)


def test_nothing_reported():
    found = totals({})
    assert (found.mean_of_reported, found.reported, found.missing) == (None, (), DIMENSIONS)
    assert len(DIMENSIONS) == 16
    assert len(QUALITY) == 7


def test_the_papers_row_in_their_order():
    raw = {name: value / 100 for name, value in zip(EIGHT.dimensions, OPEN_SORA, strict=True)}
    assert EIGHT.row(raw)[0] == pytest.approx(OPEN_SORA)
    del raw["scene"]
    row, lacking = EIGHT.row(raw)
    assert (row[6], lacking) == (None, ["scene"])
    assert EIGHT.num_prompts * EIGHT.videos_per_prompt == 1255


# --- suites and names ----------------------------------------------------------------------------------------------------


def suite(tmp_path, rows):
    file = tmp_path / "full_info.json"
    file.write_text(json.dumps(rows))
    return file


BEACH = {"appearance_style": {"appearance_style": "Ukiyo"}}


def test_a_suite_is_read_with_its_duplicates_as_one(tmp_path):
    file = suite(
        tmp_path,
        [
            {"prompt_en": "a beach, Ukiyo", "dimension": ["appearance_style"], "auxiliary_info": BEACH},
            {"prompt_en": "a dog", "dimension": ["subject_consistency", "dynamic_degree"]},
            {"prompt_en": "a beach, Ukiyo", "dimension": ["scene"], "auxiliary_info": {"scene": {"scene": {"scene": "beach"}}}},
        ],
    )
    beach, dog = read_suite(file)
    assert (beach.prompt, beach.dimensions, beach.style) == ("a beach, Ukiyo", ("appearance_style", "scene"), "Ukiyo")
    assert beach.left_out == {"subject_consistency", "dynamic_degree"}
    assert (dog.style, dog.left_out) == (None, {"appearance_style", "scene"})
    (only,) = read_suite(file, ["scene"])
    assert only == beach  # with all of its dimensions: papers take a list's prompts for several


def test_prompts_that_differ_in_capitals_are_found(tmp_path):
    file = suite(tmp_path, [{"prompt_en": f"{a} fantasy landscape", "dimension": ["scene"]} for a in ("A", "a", "the")])
    prompts = [entry.prompt for entry in read_suite(file)]
    assert len(prompts) == 3
    assert collisions(prompts) == [["A fantasy landscape", "a fantasy landscape"]]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ({"a": 1}, "must be a list of prompts, got dict"),
        ([], "must be a list of prompts"),
        ([{"prompt_en": "x"}], "entry 0 must have prompt_en and dimension"),
        ([{"prompt_en": " ", "dimension": ["scene"]}], "entry 0 must have prompt_en"),
        ([{"prompt_en": "x", "dimension": []}], "entry 0 must have prompt_en and dimension"),
        ([{"prompt_en": "x", "dimension": ["scene"], "auxiliary_info": ["y"]}], "must have an object as auxiliary_info"),
        (
            [{"prompt_en": "x", "dimension": ["scene"], "auxiliary_info": {"scene": place}} for place in ("a", "b")],
            "must tell one thing of scene for 'x', got 'a' and 'b'",
        ),
    ],
)
def test_what_is_no_suite_is_refused(tmp_path, rows, said):
    with pytest.raises(ValueError, match=said):
        read_suite(suite(tmp_path, rows))


def test_unknown_dimensions_and_files_are_refused(tmp_path):
    file = suite(tmp_path, [{"prompt_en": "x", "dimension": ["scene"]}])
    with pytest.raises(ValueError, match="must be among scene, got colour"):
        read_suite(file, ["colour"])
    with pytest.raises(ValueError, match="file must exist"):
        read_suite(tmp_path / "none.json")
    (tmp_path / "half.json").write_text("[{")
    with pytest.raises(ValueError, match="must be JSON"):
        read_suite(tmp_path / "half.json")


def test_video_names_there_and_back():
    for prompt, index in (("a dog - running", 4), ("x-1", 0), ("3", 12)):
        assert prompt_of_name(video_name(prompt, index)) == (prompt, index)
    assert video_name("a dog", 0) == "a dog-0.mp4"
    for prompt in ("a/b", "ü" * 125):  # 250 bytes and the suffix
        with pytest.raises(ValueError, match="must be usable as a file's name"):
            video_name(prompt, 0)
    for name in ("a dog.mp4", "-1.mp4", "a dog-x.mp4"):
        with pytest.raises(ValueError, match=r"must be called PROMPT-INDEX\.mp4"):
            prompt_of_name(name)


# --- result files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def results():
    videos = {f"{prompt}-{i}.mp4": value for i, value in enumerate((1.0, 0.0)) for prompt in ("a dog", "a cat")}
    quality = {name: 0.5 + 0.01 * i for i, name in enumerate(videos)}
    return {"dynamic_degree": Scored(score=0.5, videos=videos), "imaging_quality": Scored(score=0.515, videos=quality)}


def write(folder, name, results):
    entries = [Entry(prompt=prompt, dimensions=tuple(results), auxiliary=BEACH) for prompt in ("a dog", "a cat")]
    return write_results(folder, name, results, entries, "videos", 2, {"tools": {"dynamic_degree": "lucas-kanade"}})


def test_results_there_and_back_in_the_published_shape(tmp_path, results):
    files = write(tmp_path, "w4a4", results)
    assert [file.name for file in files] == [f"w4a4_{kind}.json" for kind in ("full_info", "eval_results", "dqtk_provenance")]
    assert read_results(files[1]) == results
    info, found, provenance = (json.loads(file.read_text()) for file in files)
    assert info[0].keys() == {"prompt_en", "dimension", "auxiliary_info", "video_list"}
    assert all(path.startswith("/") for path in info[0]["video_list"])
    assert [path.rpartition("/")[2] for path in info[1]["video_list"]] == ["a cat-0.mp4", "a cat-1.mp4"]
    assert set(found) == {"dynamic_degree", "imaging_quality"}  # an unknown key would be taken for a dimension
    assert found["imaging_quality"][0] == 0.515
    assert found["imaging_quality"][1][0]["video_results"] == 50  # of 100 per video, as published
    assert [row["video_results"] for row in found["dynamic_degree"][1]] == [True, True, False, False]
    assert provenance == {"tools": {"dynamic_degree": "lucas-kanade"}}
    assert not list(tmp_path.glob("*.partial"))


def test_files_of_the_published_program_are_read(tmp_path):
    """Keys with spaces (the leaderboard's), Windows' slashes, per-frame lists beside the verdicts."""
    rows = [{"video_path": r"D:\videos\a dog-0.mp4", "video_results": 0.25, "frame_results": [0.2, 0.3]}]
    rows += [{"video_path": "a dog-1.mp4", "video_results": [1, 0]}]
    (tmp_path / "x.json").write_text(json.dumps({"appearance style": [0.25, rows]}))
    assert read_results(tmp_path / "x.json") == {
        "appearance_style": Scored(score=0.25, videos={"a dog-0.mp4": 0.25, "a dog-1.mp4": None})
    }


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "must map dimensions to"),
        ({"Human_Anatomy": [0.5, []]}, "must be one of VBench's 16 dimensions, got 'Human_Anatomy'"),
        ({"scene": 0.5}, r"scene must be \[score, videos\], got 0.5"),
        ({"scene": [True, []]}, r"scene must be \[score, videos\]"),
        ({"scene": [0.5, [{"video_path": "x"}]]}, "scene must list video_path and video_results"),
        ({"scene": [0.5, [{"video_path": "a/x-0.mp4", "video_results": 1}] * 2]}, "must have each video once, got 'x-0.mp4' twice"),
    ],
)
def test_other_files_are_refused(tmp_path, data, said):
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=said):
        read_results(tmp_path / "x.json")


def test_several_files_of_one_model_are_laid_together(results):
    other = {"scene": Scored(score=0.4, videos={})}
    assert set(combined([results, other])) == {"dynamic_degree", "imaging_quality", "scene"}
    with pytest.raises(ValueError, match="every dimension must come from one file, got dynamic_degree, imaging_quality twice"):
        combined([results, results])


# --- changes -------------------------------------------------------------------------------------------------------------


def scored(values):
    return {"scene": Scored(score=0.0, videos=values)}


def test_changes_are_paired_by_name_and_bootstrapped_over_prompts():
    before = {f"p{p}-{i}.mp4": 0.1 * p + 0.02 * i for p in range(6) for i in range(3)}
    after = {name: value - 0.01 * int(name[1]) for name, value in before.items()}
    after["p9-0.mp4"] = 1.0
    before["p0-0.mp4"] = None
    (change,) = paired_changes(scored(dict(reversed(after.items()))), scored(before)).values()
    assert (change.num_videos, change.num_unmatched) == (17, 2)
    own = paired_bootstrap([-0.01 * p for p in range(6) for i in range(3)][1:], [p for p in range(6) for i in range(3)][1:])
    assert change.interval.estimate == pytest.approx(own.estimate)
    assert change.interval.low == pytest.approx(own.low, abs=0.004)  # prompts come in another order
    with pytest.raises(ValueError, match="scene must have videos of one name in both results"):
        paired_changes(scored({"a-0.mp4": 1.0}), scored({"b-0.mp4": 1.0}))
    with pytest.raises(ValueError, match="must share a dimension"):
        paired_changes(scored({"a-0.mp4": 1.0}), {"color": Scored(score=0, videos={})})


def test_verdicts_that_never_flipped_are_not_certain():
    def change(name, value):
        same = {name: Scored(score=value, videos={f"p{i}-0.mp4": value for i in range(12)})}
        return paired_changes(same, same)[name].interval

    bound = never_seen_bound(12)
    verdict = change("dynamic_degree", 1.0)
    assert (verdict.low, verdict.estimate, verdict.high) == (-bound, 0, bound)
    for name, value in (("scene", 0.5), ("imaging_quality", 1.0)):  # a measured number, 1 or another, that did not change did not
        assert (change(name, value).low, change(name, value).high) == (0, 0)


def test_the_table_says_what_is_missing_and_what_changed(tmp_path, results, capsys):
    own = str(write(tmp_path, "own", results)[1])
    worse = {name: Scored(score=r.score, videos={base: v * 0.9 for base, v in r.videos.items()}) for name, r in results.items()}
    other = str(write(tmp_path, "other", worse)[1])
    assert main([other, "--original", own]) == 0
    said = capsys.readouterr().out
    assert "| imaging_quality | 0.5150 | -0.0515 (" in said
    assert "| **total** | not measured | | |" in said
    assert "vbench-8: 51.50 / - / - / 50.00 / - / - / - / - (without aesthetic_quality" in said
    assert "mean_of_reported (of 2 raw scores): 0.5075" in said
    assert main([own, own]) == 2
    assert "vbench: error: vbench: every dimension must come from one file" in capsys.readouterr().err
