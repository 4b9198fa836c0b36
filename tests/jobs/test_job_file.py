"""Job files: what they say, and what is refused with which words."""

import contextlib
from pathlib import Path

import pytest

from dqtk.jobs.generate import check_floors
from dqtk.jobs.layout import batches, prompts_of, variants
from dqtk.jobs.spec import read_job
from dqtk.recipes import RECIPES
from dqtk.resolve import extractor_for, scores

ROOT = Path(__file__).parents[2]


def test_a_job_says_what_it_makes(job_file):
    job = read_job(job_file(floor="bfloat16", candidates={"mine": "somewhere/else"}, seeds_per_prompt=2))
    assert [(v.name, v.role, v.original, v.recipe, v.dtype) for v in variants(job)] == [
        ("pixart", "original", "pixart", None, "float32"),
        ("pixart-bfloat16", "floor", "pixart", None, "bfloat16"),
        ("pixart-w8a8", "candidate", "pixart", "w8a8", "float32"),
        ("mine", "candidate", "pixart", None, "float32"),
    ]
    work = batches(job, prompts_of(job))
    assert [[task.id for task in batch] for batch in work] == [[f"{i:04d}-0", f"{i:04d}-1"] for i in range(5)]
    assert len({task.seed for batch in work for task in batch}) == 10


@pytest.mark.parametrize("file", sorted((ROOT / "metrics" / "jobs").glob("*.yaml")), ids=lambda file: file.stem)
def test_example_jobs_are_jobs(file, monkeypatch):
    monkeypatch.chdir(ROOT)  # their paths are relative to a checkout
    job = read_job(file)
    if job.prompts.suite != "VBench_full_info.json":  # which is not ours to ship
        assert len(prompts_of(job)) == job.prompts.num
    made = variants(job)
    assert {v.role for v in made} == {"original", "floor", "candidate"}
    assert all(v.recipe in RECIPES for v in made if v.role == "candidate")
    assert set(job.metrics) <= {*scores(), "oracle"}
    for name in job.extractors:
        with contextlib.suppress(FileNotFoundError):  # one that there is, without its weights
            extractor_for(name)


def test_the_hash_is_of_what_moves_pictures(job_file):
    plain = read_job(job_file()).hash
    assert read_job(job_file(metrics=["psnr"], extractors=[], name="other", output="elsewhere")).hash == plain
    assert read_job(job_file(recipes=[], candidates={"mine": "somewhere"}, floor="kernels", models=["a", "b"])).hash == plain
    for change in (
        *({"seed": 1}, {"threads": 2}, {"batch_size": 3}, {"call": {}}, {"prompts": ["a cat"]}),
        *({"dtype": "stored"}, {"seeds_per_prompt": 2}),
    ):
        assert read_job(job_file(**change)).hash != plain, change


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metrcs": []}, r"job: .*job\.yaml must have fields among .*, got 'metrcs'\. Did you mean 'metrics'\?"),
        ({"models": "x"}, r"models must be a list of texts, got 'x'\. Write \[a, b\]\."),
        ({"models": []}, "models must hold at least one entry"),
        ({"metrics": []}, "metrics must hold at least one entry"),
        ({"batch_size": 0}, "batch_size must be a positive count, got 0"),
        ({"threads": "two"}, "threads must be int, got 'two'"),
        ({"seed": True}, "seed must be int, got True"),
        ({"dtype": "float23"}, r"dtype must be one of .*, got 'float23'\. Did you mean 'float32'\?"),
        ({"floor": 16}, "floor must be"),
        ({"call": [1]}, "call must be"),
        (
            {"prompts": {"file": "a", "texts": ["b"]}},
            r"texts must be a list|prompts must have one of file, suite and texts, got several or none",
        ),
        ({"prompts": {"num": 3}}, "prompts must have one of file, suite and texts, got several or none"),
        ({"prompts": {"file": "x.txt", "num": -1}}, r"prompts\.num must be a positive count, got -1"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"floor": "float32"}, "floor must be another rounding than dtype, got 'float32' for both. Take kernels"),
        ({"candidates": {"mine": None}}, "candidates must map names to folders or hub ids, got 'mine': None"),
        ({"call": {"generator": 1}}, r"job: call must be free of .*, got \['generator'\]"),
        ({"call": {"output_type": "latent"}}, "job: output_type must be an image type, got 'latent'"),
        ({"candidates": {"w8a8": "x"}}, r"names of candidates must differ from recipes, got \['w8a8'\]"),
    ],
)
def test_what_is_refused(job_file, changes, says):
    with pytest.raises(ValueError, match=says):
        read_job(job_file(**changes))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "must be a mapping of fields, got list"),
        ("name: [\n", "must be YAML, got: "),
        ("name: x\nseed: 1\nseed: 2\n", "must be YAML, got: the key 'seed' twice .*line 3"),
        ("name: x\ncall: {a: 1, a: 2}\n", "must be YAML, got: the key 'a' twice"),
        ("name: x\n", "must have models, prompts, metrics, output, got only name"),
    ],
)
def test_files_that_are_no_job(tmp_path, text, says):
    (tmp_path / "j.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_job(tmp_path / "j.yaml")
    with pytest.raises(ValueError, match=r"job: file must exist, got .*nowhere\.yaml\. Check the path\."):
        read_job(tmp_path / "nowhere.yaml")


def test_two_variants_of_one_name(job_file):
    job = read_job(job_file(models=["a/one", "b/one"], recipes=[]))
    with pytest.raises(ValueError, match="names of models and candidates must differ, got one twice"):
        variants(job)


@pytest.mark.parametrize(("dtype", "floor"), [("stored", "float32"), ("float32", "stored")])
def test_the_stored_dtype_by_another_name_is_no_floor(job_file, dtype, floor):
    with pytest.raises(ValueError, match=r"job: floor must be another dtype than that of pixart, got float32 for both"):
        check_floors(variants(read_job(job_file(dtype=dtype, floor=floor))), "cpu")
    check_floors(variants(read_job(job_file(dtype=dtype, floor="bfloat16"))), "cpu")


def test_threads_are_no_floor_on_a_gpu(job_file):
    made = variants(read_job(job_file(floor="threads")))
    with pytest.raises(ValueError, match=r"job: floor must change what cuda computes, got 'threads'"):
        check_floors(made, "cuda")
    check_floors(made, "cpu")
