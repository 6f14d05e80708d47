import json
from pathlib import Path

import pytest
import torch

from quantlab.calibration.tokens import load_tokenizer
from quantlab.errors import DataError
from quantlab.evaluate.harness import TaskOptions, _data_explained, evaluate_tasks
from quantlab.evaluate.tasks import local_tasks, write_built_in, write_task
from quantlab.models import resolve_model
from quantlab.progress import NoProgress
from quantlab.skeleton import load_model

TASKS = Path(__file__).parents[3] / "shared/data/tasks"

QUERY = {"query": "Question: Why?\nAnswer:", "choices": ["A", "B"], "gold": 1}

PUBLISHED = {
    "choices": ({"query": "Question: Why?\nAnswer:", "choices": [" A", " B"], "gold": 1}, QUERY),
    "contexts": (
        {"contexts": ["x A", "x B"], "continuation": " won.", "gold": 0},
        {"contexts": ["x A", "x B"], "continuation": "won.", "gold": 0},
    ),
    "cloze": ({"context": "one two", "target": " three"}, {"context": "one two", "target": "three"}),
    "arc": ({"question": "Why?", "choices": {"text": ["A", "B"], "label": ["1", "2"]}, "answerKey": "2"}, QUERY),
    "piqa": ({"goal": "Why?", "sol1": "A", "sol2": "B", "label": 1}, QUERY),
    "winogrande": (
        {"sentence": "Ann beat Eve since _ won.", "option1": "Ann", "option2": "Eve", "answer": "1"},
        {"contexts": ["Ann beat Eve since Ann", "Ann beat Eve since Eve"], "continuation": "won.", "gold": 0},
    ),
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "A man [step] bakes.",
            "ctx_b": "he",
            "endings": ["eats. [title] End", "runs."],
            "label": "0",
        },
        {"query": "Baking: A man bakes. He", "choices": ["eats.. End", "runs."], "gold": 0},
    ),
    "boolq": (
        {"passage": "Text.", "question": "is it", "answer": True},
        {"query": "Text.\nQuestion: is it?\nAnswer:", "choices": ["no", "yes"], "gold": 1},
    ),
    "rte": (
        {"premise": "P.", "hypothesis": "H.", "label": "not_entailment"},
        {"query": "P.\nQuestion: H. True or False?\nAnswer:", "choices": ["True", "False"], "gold": 1},
    ),
    "lambada": ({"text": "one two three"}, {"context": "one two", "target": "three"}),
}


def write(folder, name, *documents):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


@pytest.mark.parametrize("layout", PUBLISHED)
def test_published_layouts_become_the_texts_that_lm_eval_scores(tmp_path, layout):
    published, expected = PUBLISHED[layout]
    (tmp_path / "out").mkdir()
    config = write_task("mine", [write(tmp_path, "mine", published)], tmp_path / "out")
    converted = Path(config["dataset_kwargs"]["data_files"]["test"])
    assert json.loads(converted.read_text()) == expected


def test_tasks_are_files_and_folders_by_name(tmp_path):
    (tmp_path / "rte").mkdir()
    files = [write(tmp_path, "boolq", {}), write(tmp_path / "rte", "validation", {})]
    assert local_tasks(tmp_path) == {"boolq": [files[0]], "rte": [files[1]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "contains no documents"),
        ("{", "cannot be read as JSON lines"),
        ("[1]\n", "must hold a JSON object"),
        ('{"a": 1}\n', r"no known layout has the fields a; known are choices \(choices, gold, query\)"),
        ('{"goal": "", "sol1": "", "sol2": "", "label": 0}\n{"goal": ""}\n', "does not have the layout PIQA"),
    ],
)
def test_an_unusable_task_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        write_task("mine", [path], tmp_path)


def test_the_built_in_task_has_four_different_choices_and_is_always_the_same(tmp_path):
    config = write_built_in(tmp_path)
    path = Path(config["dataset_kwargs"]["data_files"]["test"])
    text = path.read_text()
    items = [json.loads(line) for line in text.splitlines()]
    assert len(items) > 50
    assert all(len(set(item["choices"])) == 4 for item in items)
    assert {item["gold"] for item in items} == {0, 1, 2, 3}
    write_built_in(tmp_path)
    assert path.read_text() == text


@pytest.fixture(scope="module")
def demo():
    folder = resolve_model("demo")
    return load_model(folder, torch.float32), load_tokenizer(folder)


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_the_demo_model_knows_how_the_standard_library_goes_on(demo, tmp_path, capfd):
    options = TaskOptions(tasks=("stdlib_continuation",), limit=24)
    result = evaluate_tasks(*demo, options, NoProgress(), samples_file=tmp_path / "samples.jsonl")
    task = result["tasks"]["stdlib_continuation"]
    assert (task["samples"], task["local"], task["num_fewshot"]) == (24, True, 0)
    assert task["metrics"]["acc"]["value"] > 0.5  # chance is 0.25
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 24
    assert capfd.readouterr() == ("", "")  # lm-eval's bars and remarks


class Counting(NoProgress):
    def __init__(self):
        self.stages = []

    def begin(self, stage, total, unit):
        self.stages.append([stage, total, 0])

    def advance(self, count=1, detail=""):
        self.stages[-1][2] += count


@pytest.mark.filterwarnings("ignore")
def test_every_answer_to_a_task_is_counted(demo):
    progress = Counting()
    evaluate_tasks(*demo, TaskOptions(tasks=("stdlib_continuation",), limit=3), progress, "tasks, float model")
    assert progress.stages == [["tasks, float model", 12, 12]]  # four choices each


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not TASKS.is_dir(), reason="the task files are not beside the checkout")
def test_local_files_of_all_shapes_run_through_lm_eval(demo):
    names = ("arc_easy", "piqa", "winogrande", "lambada")
    result = evaluate_tasks(*demo, TaskOptions(tasks=names, limit=4, tasks_dir=TASKS), NoProgress())["tasks"]
    assert set(result) == set(names)
    assert all(task["samples"] == 4 and task["local"] for task in result.values())
    assert result["lambada"]["metrics"].keys() == {"perplexity", "acc"}
    assert result["arc_easy"]["metrics"].keys() == {"acc", "acc_norm"}


def test_data_that_cannot_be_had_offline_are_explained_for_tasks_of_any_layout():
    with (
        pytest.raises(DataError, match=r"the data of one of gsm8k cannot be had") as caught,
        _data_explained(["gsm8k"]),
    ):
        raise ConnectionError("no network")
    layouts = str(caught.value).partition("those of ")[2].partition(" may lie")[0].split(", ")
    assert layouts == ["ARC", "PIQA", "WinoGrande", "HellaSwag", "BoolQ", "RTE", "LAMBADA"]
    assert "such as gsm8k, have to be loaded once" in str(caught.value)


@pytest.mark.slow  # lm-eval reads its thousands of task files
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_guessed(demo):
    with pytest.raises(DataError, match="no task hellaswg; did you mean hellaswag"):
        evaluate_tasks(*demo, TaskOptions(tasks=("hellaswg",)), NoProgress())
