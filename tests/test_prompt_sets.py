"""Prompts from every kind of file, and what is said of those that cannot be read."""

import json

import pytest

from dqtk.prompt_sets import read_prompts


def test_prompts(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a red circle\n\n  a blue cross  \n", encoding="utf-8")
    assert read_prompts([str(file)]) == ["a red circle", "a blue cross"]
    assert read_prompts([str(file)], 1) == ["a red circle"]
    assert read_prompts(["a red circle", " ", "x"]) == ["a red circle", "x"]
    assert read_prompts(["w" * 5000]) == ["w" * 5000]


def test_prompts_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"prompts: file must exist, got nowhere\.txt\. Give a text file with one prompt per line"):
        read_prompts(["nowhere.txt"])
    (tmp_path / "empty.txt").write_text("\n \n")
    for words in ([str(tmp_path / "empty.txt")], ["", " "], []):
        with pytest.raises(ValueError, match=r"prompts: list must hold at least one prompt, got none\. Give a file"):
            read_prompts(words)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"prompts: \S+latin\.txt must be UTF-8 text, got: .*Save it as UTF-8\."):
        read_prompts([str(tmp_path / "latin.txt")])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'id,prompt\n1,a red circle\n2,"a blue, small cross"\n'),
        ("parti.tsv", "Prompt\tCategory\na red circle\tShapes\na blue, small cross\tShapes\n"),
        ("a.jsonl", '{"caption": "a red circle"}\n\n"a blue, small cross"\n'),
        ("list.json", '["a red circle", {"text": "a blue, small cross"}]'),
    ],
)
def test_tables_and_json(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_prompts([str(tmp_path / name)]) == ["a red circle", "a blue, small cross"]
    assert read_prompts([str(tmp_path / name)], 1) == ["a red circle"]


@pytest.mark.parametrize(("name", "text"), [("a.csv", "prompt,id\r\na cat,1\r\n"), ("a.txt", "a cat\n"), ("a.jsonl", '"a cat"\n')])
def test_files_of_excel_and_notepad_begin_with_a_byte_order_mark(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_prompts([str(tmp_path / name)]) == ["a cat"]


def test_coco_captions_give_the_first_of_each_image(tmp_path):
    rows = [(7, 30, "second of 7"), (3, 12, "of 3"), (7, 20, "first of 7"), (3, 40, "other of 3")]
    data = {"images": [], "annotations": [{"image_id": image, "id": i, "caption": text} for image, i, text in rows]}
    (tmp_path / "captions_val2017.json").write_text(json.dumps(data))
    assert read_prompts([str(tmp_path / "captions_val2017.json")]) == ["of 3", "first of 7"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "id,words\n1,x\n", r"a\.csv:2 must have a column prompt, Prompt, caption, text, got \['id', 'words'\]"),
        ("a.jsonl", '{"prompt": "x"}\n{', r"a\.jsonl:2 must be JSON, got: "),
        ("a.jsonl", '"x"\n{"words": "y"}\n', r"a\.jsonl:2 must have a column .*, got \['words'\]"),
        (
            "a.csv",
            "id,prompt\n1,x\n2,a circle, blue\n",
            r"a\.csv:3 must have as many cells .*2.*, got 3\. Put quotes about a prompt .* comma",
        ),
        ("a.tsv", "prompt\nx\ty\n", r"a\.tsv:2 must have as many cells .*1.*, got 2\. Put quotes about a prompt .* tab"),
        ("a.jsonl", "3\n", r"must have a column .*, got 3\."),
        ("a.json", '{"images": []}', r"a\.json must be a list or COCO captions \(with annotations\), got other JSON"),
    ],
)
def test_files_of_another_form(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        read_prompts([str(tmp_path / name)])


def test_more_prompts_than_there_are():
    with pytest.raises(ValueError, match=r"prompts: number must be at most the 2 there are, got 3\. Ask for fewer\."):
        read_prompts(["a", "b"], 3)
