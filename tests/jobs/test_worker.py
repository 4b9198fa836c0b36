"""Workers: the protocol both ways, and every way in which a program can let one down."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
from PIL import Image, ImageStat

from dqtk.cli import main
from dqtk.jobs.evaluate import evaluate
from dqtk.jobs.folders import folder_pictures
from dqtk.jobs.gates import parse_gate
from dqtk.jobs.spec import read_job
from dqtk.jobs.worker import Sample, Worker, WorkerError
from dqtk.jobs.worker_scores import answers, ask

EXAMPLE = Path(__file__).parents[2] / "metrics" / "jobs" / "worker.py"
GREETING = {"protocol": 1, "name": "fake", "version": "2", "higher_is_better": False, "of": "pictures"}


@pytest.fixture
def fake(tmp_path):
    """A function (body of the loop, greeting) -> command of a worker; ``asked`` is a request, ``say`` writes an answer."""

    def write(body, greeting=GREETING, before=""):
        script = tmp_path / f"worker{len(list(tmp_path.glob('worker*.py')))}.py"
        script.write_text(
            "import json, os, sys, time\n"
            "def say(data):\n    print(data if isinstance(data, str) else json.dumps(data), flush=True)\n"
            f"{before}\n"
            f"say({greeting!r})\n"
            "for line in sys.stdin:\n    asked = json.loads(line)\n    n = len(asked['samples'])\n"
            f"    {body}\n"
        )
        return shlex.join([sys.executable, str(script)])

    return write


def samples(tmp_path, num=2):
    files = [tmp_path / f"{i}.png" for i in range(num)]
    for i, file in enumerate(files):
        Image.new("RGB", (4, 3), (40 * i,) * 3).save(file)
    return [Sample(files=(file,), prompt=f"number {i}") for i, file in enumerate(files)]


def test_samples_go_there_and_values_come_back(fake, tmp_path):
    body = "say({'id': asked['id'], 'values': [len(s['prompt']) + asked['id'] for s in asked['samples']]})"
    with Worker("mine", fake(body)) as worker:
        assert (worker.greeting.name, worker.greeting.higher_is_better, worker.greeting.digits) == ("fake", False, 4)
        assert worker.values(samples(tmp_path)) == [8.0, 8.0]
        assert worker.values(samples(tmp_path, 3)) == [9.0, 9.0, 9.0]
        process = worker._process
    assert process.returncode == 0


def test_a_label_or_unit_of_nothing_is_none_at_all(fake):
    with Worker("mine", fake(NOBODY, greeting=GREETING | {"label": None, "unit": None})) as worker:
        assert (worker.greeting.label, worker.greeting.unit) == ("fake", "")


def test_the_example_measures_brightness(tmp_path):
    with Worker("brightness", shlex.join([sys.executable, str(EXAMPLE), "brightness"])) as worker:
        assert worker.values(samples(tmp_path, 3)) == [0.0, 40.0, 80.0]
        assert worker.greeting.label == "Brightness"
        lost = Sample(files=(tmp_path / "gone.png",), prompt=None)
        with pytest.raises(WorkerError, match=r"worker brightness: scores must be computed, got the error: FileNotFoundError: "):
            worker.values([lost])
        assert worker.values(samples(tmp_path, 1)) == [0.0]  # started afresh


LATE = "time.sleep(30)"
NOBODY = "say({'id': asked['id'], 'values': [1.0] * n})"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "print('out of memory', file=sys.stderr); sys.exit(7)",
            r"must be answered, got the end .*status 7.*it said: out of memory",
        ),
        ("os._exit(3)", r"an answer must be answered, got the end of the program \(status 3\)\. Try the command by hand\."),
        ("say({'id': asked['id'], 'values': [1.0]})", r"answer must hold 2 values, one per sample, got 1\."),
        ("say({'id': asked['id'], 'values': 1.0})", r"answer must hold 2 values, one per sample, got 1\.0\."),
        ("say({'id': asked['id'], 'values': [1.0, None]})", r"values must be finite numbers, got \[1\.0, None\]"),
        ('say(\'{"id": 0, "values": [1, NaN]}\')', r"values must be finite numbers, got \[1, nan\]"),
        ("say({'id': 5, 'values': [1.0] * n})", r"answer must have the id 0, got 5\."),
        ("say('loading checkpoint 1/2')", r"an answer must be a JSON object on one line, got 'loading checkpoint 1/2'\. Only the"),
        ("say('[1, 2]')", r"an answer must be a JSON object on one line, got '\[1, 2\]'\."),
        ("say({'id': asked['id'], 'error': 'no CUDA'})", r"scores must be computed, got the error: no CUDA\."),
        (LATE, r"an answer must come within 1\.5 s, got none\."),
    ],
)
def test_a_worker_that_lets_one_down_is_named(fake, tmp_path, body, says):
    start = time.monotonic()
    with Worker("mine", fake(body), timeout=1.5 if body == LATE else 60) as worker:
        assert worker.greeting.name == "fake"
        process = worker._process
        with pytest.raises(WorkerError, match=rf"^worker mine: (.*){says}"):
            worker.values(samples(tmp_path))
        assert process.returncode is not None  # nothing is left running
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    ("greeting", "says"),
    [
        ("hello", r"a greeting must be a JSON object on one line, got 'hello'"),
        (GREETING | {"protocol": 2}, r"greeting must speak protocol 1, got 2\."),
        (GREETING | {"higher_is_better": "yes"}, r"greeting must have higher_is_better \(bool\), got 'yes'\."),
        (GREETING | {"of": "sounds"}, r"greeting must be of pictures or clips, got 'sounds'\."),
        ({"protocol": 1}, r"greeting must have name \(str\), got None\."),
        (GREETING | {"digits": "three"}, r"greeting must have digits from 0 to 15, or none, got 'three'\."),
        (GREETING | {"digits": -1}, r"greeting must have digits from 0 to 15, or none, got -1\."),
        (GREETING | {"digits": True}, r"greeting must have digits .*, got True\."),
    ],
)
def test_a_greeting_says_what_the_score_is(fake, greeting, says):
    with Worker("mine", fake(NOBODY, greeting)) as worker, pytest.raises(WorkerError, match=says):
        _ = worker.greeting


def test_a_program_that_is_not_there_or_dies_at_once():
    nowhere = r"worker mine: command must be a program, got: No such file .*: /nowhere/python\."
    with Worker("mine", "/nowhere/python worker.py") as worker, pytest.raises(WorkerError, match=nowhere):
        worker.values([])
    absent = shlex.join([sys.executable, "-c", "import absent_package"])
    says = r"a greeting must be answered, got .*status 1.*No module named 'absent_package'"
    with Worker("mine", absent) as worker, pytest.raises(WorkerError, match=says):
        _ = worker.greeting
    with pytest.raises(ValueError, match=r"worker mine: command must name a program, got ' '\."):
        Worker("mine", " ")
    with pytest.raises(ValueError, match=r"worker mine: timeout must be above 0 seconds, got 0\."):
        Worker("mine", "true", timeout=0)


def test_null_for_digits_is_named(fake):
    before = "say('" + json.dumps(GREETING | {"digits": None}) + "'); time.sleep(30)"
    with Worker("mine", fake(NOBODY, before=before)) as worker, pytest.raises(WorkerError, match=r"digits .*, got None\."):
        _ = worker.greeting


def test_a_word_too_long_for_a_file_names_none():
    assert Worker("mine", f"python -c {'x' * 5000}").identity != Worker("mine", f"python -c {'y' * 5000}").identity


def test_pictures_are_not_given_to_a_worker_of_clips(fake, tmp_path):
    with Worker("mine", fake(NOBODY, GREETING | {"of": "clips"})) as worker:
        with pytest.raises(WorkerError, match=r"worker mine: samples must be clips, got one of 1 files"):
            worker.values(samples(tmp_path))
        clip = Sample(files=tuple(s.files[0] for s in samples(tmp_path, 3)), prompt=None)
        assert worker.values([clip]) == [1.0]


def test_what_a_worker_started_ends_with_it(fake, tmp_path):
    note = tmp_path / "child"
    before = f"import subprocess; open({str(note)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))"
    with Worker("mine", fake(LATE, before=before), timeout=1.0) as worker:
        assert worker.greeting
        with pytest.raises(WorkerError, match="within 1 s"):
            worker.values(samples(tmp_path))
    alive = subprocess.run(["ps", "-o", "stat=", "-p", note.read_text()], capture_output=True, text=True).stdout.strip()
    assert alive[:1] in ("", "Z")  # gone, or dead and not yet collected


def test_the_identity_is_of_the_command_and_the_files_that_it_names(fake, tmp_path):
    command = fake(NOBODY)
    first = Worker("mine", command).identity
    assert Worker("other name", command).identity == first
    assert Worker("mine", f"{command} --fast").identity != first
    script = Path(shlex.split(command)[1])
    script.write_text(script.read_text() + "# another version\n")
    assert Worker("mine", command).identity != first


def test_the_example_speaks_the_documented_lines(tmp_path):
    """Without the client: what docs/preference.md says is what goes over the pipe."""
    (sample,) = samples(tmp_path, 1)
    asked = json.dumps({"id": 4, "samples": [{"files": [str(sample.files[0])], "prompt": "x"}]}) + "\n"
    ran = subprocess.run([sys.executable, str(EXAMPLE), "brightness"], input=asked, capture_output=True, text=True, timeout=60)
    greeting, answer = map(json.loads, ran.stdout.splitlines())
    assert greeting == {"protocol": 1, "name": "brightness", "version": "1", "of": "pictures", "higher_is_better": True} | {
        "label": "Brightness",
        "digits": 2,
    }
    assert answer == {"id": 4, "values": [0.0]}


@pytest.fixture
def evaluated(pictures, tmp_path):
    """A function (workers, **how) -> records by (variant, name) of two folders of three pictures."""
    clean, noisy = pictures("clean", num=3), pictures("noisy", noise=90, num=3)

    def run(workers, **how):
        found = evaluate(clean, noisy, tmp_path / "out", metrics=["psnr"], workers=workers, **how)
        return {(record.model, record.name): record for record in found}

    return run


def test_an_evaluation_has_the_workers_means_and_changes(evaluated, tmp_path):
    found = evaluated({"brightness": shlex.join([sys.executable, str(EXAMPLE), "brightness"])})
    before, after = found["clean", "brightness"], found["noisy", "brightness"]
    with Image.open(tmp_path / "noisy" / "0001-0.png") as image:
        wanted = ImageStat.Stat(image.convert("L")).mean[0]
    rows = pandas.read_parquet(tmp_path / "out" / "samples.parquet").set_index(["variant", "id"])
    assert rows.loc[("noisy", "0001-0"), "brightness"] == pytest.approx(wanted)
    change = found["noisy", "brightness@change"]
    assert change.value == pytest.approx(after.value - before.value)
    assert change.low <= change.value <= change.high
    assert after.extra["worker"] == "brightness 1"
    assert (after.num_samples, after.higher_is_better) == (3, True)


def test_values_are_kept_and_a_worker_is_started_for_what_is_missing_only(evaluated, fake, tmp_path):
    log = tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write(f'{{n}} ')"
    command = fake(f"{note}; say({{'id': asked['id'], 'values': [float(len(s['prompt'])) for s in asked['samples']]}})")
    first = evaluated({"length": command})
    again = evaluated({"length": command})
    assert log.read_text() == "6 "
    assert {key: r.value for key, r in first.items()} == {key: r.value for key, r in again.items()}
    next((tmp_path / "out" / "cache" / "workers").glob("*.json")).unlink()
    evaluated({"length": command})
    assert log.read_text() == "6 1 "


def test_a_worker_that_dies_is_a_gap_and_not_a_crash(evaluated, fake, tmp_path):
    dies = fake("say({'id': asked['id'], 'values': [1.0] * n}) if asked['id'] else sys.exit(3)")
    odd = fake(NOBODY, GREETING | {"digits": "three"})
    found = evaluated({"mine": dies, "gone": "/nowhere/python", "odd": odd}, gates=[parse_gate("mine < 0")])
    assert "greeting must have digits" in found["noisy", "odd"].not_measured
    record = found["noisy", "mine"]
    assert record.value is None
    assert record.not_measured.startswith("worker mine: an answer must be answered, got the end of the program (status 3)")
    assert "command must be a program" in found["clean", "gone"].not_measured
    assert found["noisy", "psnr@vs_original"].value > 0
    assert "not measured of noisy: mine: worker mine" in (tmp_path / "out" / "report.md").read_text()
    script = Path(shlex.split(dies)[1])
    script.write_text(script.read_text().replace("else sys.exit(3)", "else say({'id': 0, 'values': [2.0] * n})"))
    assert evaluated({"mine": dies})["noisy", "mine"].value == 2.0  # another program: asked again


def test_names_of_workers_are_checked_before_anything_runs(evaluated, tmp_path):
    for workers, says in (
        ({"psnr": "true"}, r"workers: names must differ from those of scores, got psnr\."),
        ({"a b": "true"}, r"evaluate: workers must map names of scores to commands, got 'a b': 'true'\."),
        ({"mine": " "}, r"evaluate: workers must map names of scores to commands, got 'mine': ' '\."),
        (
            {"mine": "a 'b"},
            r"evaluate: workers: the command of mine must be words as in a shell, got \"a 'b\": No closing quotation\.",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            evaluated(workers)
    assert not (tmp_path / "out").exists()


def test_jobs_and_the_command_line_take_workers(pictures, tmp_path, job_file, capsys):
    job = read_job(job_file(workers={"image_reward": "python worker.py"}))
    assert job.workers == {"image_reward": "python worker.py"}
    assert job.hash == read_job(job_file()).hash  # pictures do not depend on it
    with pytest.raises(ValueError, match="job: workers must map names of scores to commands, got 'x': 3"):
        read_job(job_file(workers={"x": 3}))
    with pytest.raises(
        ValueError, match=r"job: workers: the command of x must be words .*: No closing quotation\. Close the quotes"
    ):
        read_job(job_file(workers={"x": 'python "worker.py'}))
    a, b = str(pictures("a", num=2)), str(pictures("b", noise=9, num=2))
    words = ["evaluate", a, b, "--metrics", "psnr", "--output", str(tmp_path / "cli")]
    command = shlex.join([sys.executable, str(EXAMPLE), "brightness"])
    assert main([*words, "--worker", f"bright={command}", "--fail-if", "bright@change > 200"]) == 0
    assert "bright@change" in capsys.readouterr().out
    assert main([*words, "--worker", "bright"]) == 2
    assert "--worker must be NAME=COMMAND, got 'bright'." in capsys.readouterr().err


def test_processes_share_the_samples_and_one_failure_is_told_by_all(pictures, fake, tmp_path):
    """Three shares give what one does; the note of a process that failed is the reason for the set."""
    found, cache = folder_pictures(pictures("some", num=5)), tmp_path / "cache"
    command = fake("say({'id': asked['id'], 'values': [float(len(s['prompt'])) for s in asked['samples']]})")
    for rank in range(3):
        ask(cache, "mine", command, found[rank::3], rank)
    shared = answers(cache, "mine", command, found)
    ask(tmp_path / "alone", "mine", command, found, 0)
    assert answers(tmp_path / "alone", "mine", command, found) == shared
    assert shared.values == [float(len(picture.prompt)) for picture in found]
    failing = fake(
        "sys.exit(4) if 'prompt' in line and len(asked['samples']) == 1 else say({'id': asked['id'], 'values': [1.0] * n})"
    )
    for rank in range(3):
        ask(cache, "mine", failing, found[rank::3], rank)  # the last share is a single picture
    assert "status 4" in answers(cache, "mine", failing, found)
    assert answers(cache, "mine", command, found) == shared  # another command, other values
