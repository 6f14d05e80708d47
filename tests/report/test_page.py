import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from quantlab.cli.app import invoke
from quantlab.errors import UsageError
from quantlab.report.html import render_page, write_report
from quantlab.report.html.layers import heat_level
from quantlab.report.html.markup import escape, tag
from quantlab.report.html.runs import find_runs
from quantlab.report.html.scores import clear_winner
from quantlab.report.html.tradeoff import front

VOID = {"meta", "br", "wbr"}


class Outline(HTMLParser):
    """The elements of a page, and whether they are properly nested."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.text = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def named(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def headings(self):
        return [tag for tag, _ in self.elements if re.fullmatch(r"h[1-6]", tag)]


def page_of(*folders):
    return render_page(*find_runs(folders))


def rewrite(folder, **changes):
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | changes))


def sections(outline):
    return [attributes["id"] for attributes in outline.named("section")]


def test_page_of_one_run_has_every_section_with_a_heading_and_a_link(run_folder):
    outline = Outline(page_of(run_folder))
    assert sections(outline) == [
        "summary",
        "tradeoff",
        "layers",
        "codebooks",
        "resources",
        "fallbacks",
        "provenance",
    ]
    assert [link["href"] for link in outline.named("a")] == ["#summary", *(f"#{key}" for key in sections(outline))]
    assert outline.headings == ["h1", *["h2"] * 7, "h4"]


def test_page_says_what_the_records_say(run_folder):
    text = " ".join(Outline(page_of(run_folder)).text)
    for expected in ("ganq 4-bit on demo", "3.2 times smaller", "10.500", "+0.500", "0.0500", "± 0.0010"):
        assert expected in text
    assert "iterations=10" in text
    assert "quantlab run ganq_w4" in text
    assert "ab" * 32 in text


def test_page_has_the_recipe_and_the_commands_that_made_it(comparison):
    (comparison / "commands.txt").write_text("quantlab compare ganq gptq\nquantlab compare rtn --set 'a=<b>'\n")
    (comparison / "cells" / "rtn-w4-s0" / "recipe.resolved.yaml").write_text("version: 1  # <i>\n")
    page = write_report([comparison], comparison / "page.html").read_text()
    text = "".join(Outline(page).text)
    assert "quantlab compare ganq gptq\nquantlab compare rtn --set 'a=<b>'" in text
    assert text.count("version: 1  # <i>") == text.count("The recipe in full") == 1


def test_page_needs_nothing_outside_itself(run_folder):
    page = page_of(run_folder)
    outline = Outline(page)
    loading = [
        (name, attributes)
        for name, attributes in outline.elements
        for key, value in attributes.items()
        if key in ("src", "srcset", "data", "action") or (key.endswith("href") and not value.startswith("#"))
    ]
    assert loading == []
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", page)
    assert "@import" not in page
    (policy,) = [meta["content"] for meta in outline.named("meta") if "http-equiv" in meta]
    assert "default-src 'none'; script-src 'sha256-" in policy


def test_same_records_give_the_same_page(run_folder):
    assert page_of(run_folder) == page_of(run_folder)


def test_ids_are_unique_and_everything_referred_to_exists(comparison):
    outline = Outline(page_of(comparison))
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in outline.elements:
        for key, value in attributes.items():
            if key == "aria-labelledby":
                assert set(value.split()) <= set(ids)
            elif key.endswith("href"):
                assert value.removeprefix("#") in ids
            for reference in re.findall(r"url\(#([^)]+)\)", value or ""):
                assert reference in ids


def test_pictures_and_tables_can_be_used_without_seeing_them(run_folder):
    outline = Outline(page_of(run_folder))
    pictures = outline.named("svg")
    assert len(pictures) == 7
    assert all(picture["role"] == "img" and picture["aria-labelledby"] for picture in pictures)
    names = [name for name, _ in outline.elements]
    assert names.count("caption") == names.count("table") == 2
    assert {attributes["scope"] for attributes in outline.named("th")} == {"row", "col"}
    regions = [attributes for attributes in outline.named("div") if attributes.get("role") == "region"]
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)
    assert {"header", "nav", "main", "footer"} <= set(names)
    assert dict(outline.elements)["html"]["lang"] == "en"


def test_pictures_take_their_colors_from_the_page(run_folder):
    page = page_of(run_folder)
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    used = {name for picture in pictures for name in re.findall(r"var\(--([\w-]+)\)", picture)}
    assert {"ink", "muted", "accent", "heat--5"} <= used
    defined = set(re.findall(r"--([\w-]+):", page))
    assert used <= defined
    fixed = {color for picture in pictures for color in re.findall(r"#[0-9a-f]{6}\b", picture)}
    assert fixed <= {"#000000"}  # what matplotlib writes into definitions that every use overrides


def test_no_text_from_outside_becomes_markup(hostile_run):
    page = page_of(hostile_run)
    outline = Outline(page)
    names = [name for name, _ in outline.elements]
    assert names.count("script") == 1
    assert names.count("style") == 1
    assert not {"img", "iframe", "object", "base", "link"} & set(names)
    assert not [key for _, attributes in outline.elements for key in attributes if key.startswith("on")]
    assert page.encode().decode() == page  # no unpaired surrogates
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page)
    assert "document.title='broken'" in " ".join(outline.text)
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)


def test_attributes_cannot_be_left():
    assert tag("a", "x", title="\" onclick='y'") == '<a title="&quot; onclick=&#x27;y&#x27;">x</a>'
    assert escape("a<b>&\x07") == "a&lt;b&gt;&amp;\N{REPLACEMENT CHARACTER}"
    assert escape(tag("i", "<")) == "<i>&lt;</i>"


def test_run_without_evaluation_has_no_tradeoff_and_says_so(run_folder):
    (run_folder / "eval.json").write_text('{"perplexity": {}}')
    outline = Outline(page_of(run_folder))
    assert "tradeoff" not in sections(outline)
    assert "perplexity was not measured" in " ".join(outline.text)


def test_manifest_without_memory_and_engine_times_is_shown_without_them(run_folder):
    content = json.loads((run_folder / "manifest.json").read_text())
    del content["memory"], content["engine_s"], content["seed"]
    (run_folder / "manifest.json").write_text(json.dumps(content))
    outline = Outline(page_of(run_folder))
    assert "Memory at the expected peak" not in outline.text
    assert "Time by stage" in outline.text


def test_comparison_shows_every_cell_and_why_one_is_missing(comparison):
    outline = Outline(page_of(comparison))
    text = " ".join(outline.text)
    assert "3 runs on demo" in text
    assert "ganq 4-bit is closest to the float model: KL 0.0500" in text
    assert "gptq 4-bit follows with 0.0900" in text
    assert "1 cell has no result" in text
    assert "no factor" in text
    assert [name for name, _ in outline.elements].count("details") >= 3
    assert sections(outline)[:3] == ["summary", "tradeoff", "runs"]
    assert outline.headings.count("h1") == 1


def test_several_folders_become_one_page(run_folder, comparison):
    runs, failures = find_runs([run_folder, comparison, run_folder])
    assert [run.label for run in runs] == ["ganq 4-bit, run", "ganq 4-bit, ganq-w4-s0", "gptq 4-bit", "rtn 4-bit"]
    assert [failure.label for failure in failures] == ["lnq-w4-s0"]


def test_seeds_tell_runs_of_one_variant_apart(comparison):
    for seed in (1, 2):
        folder = comparison / "cells" / f"ganq-w4-s{seed}"
        folder.mkdir()
        for name in ("manifest.json", "eval.json"):
            (folder / name).write_text((comparison / "cells" / "ganq-w4-s0" / name).read_text())
        calibration = json.loads((folder / "manifest.json").read_text())["calibration"]
        rewrite(folder, seed=seed, calibration=calibration | {"token_sha256": f"{seed}" * 64})
    runs, _ = find_runs([comparison])
    assert [run.label for run in runs][:3] == ["ganq 4-bit, seed 0", "ganq 4-bit, seed 1", "ganq 4-bit, seed 2"]
    # The other seeds are as close to the float model, but they are no rivals.
    assert clear_winner(runs, "stdlib").variant == "ganq"


def test_a_difference_within_the_noise_has_no_winner(comparison):
    folder = comparison / "cells" / "gptq-w4-s0"
    scores = json.loads((folder / "eval.json").read_text())
    scores["perplexity"]["stdlib"]["kl"] = 0.0527  # the standard errors are 0.001 each: 2 x 0.00141 = 0.00283
    (folder / "eval.json").write_text(json.dumps(scores))
    runs, _ = find_runs([comparison])
    assert clear_winner(runs, "stdlib") is None
    assert "within the noise" in page_of(comparison)
    scores["perplexity"]["stdlib"]["kl"] = 0.0530
    (folder / "eval.json").write_text(json.dumps(scores))
    assert clear_winner(find_runs([comparison])[0], "stdlib").variant == "ganq"


def test_front_has_the_runs_that_no_other_beats():
    points = [("a", 3, 1.0), ("b", 1, 3.0), ("c", 2, 3.5), ("d", 2, 2.0), ("e", 3, 1.5)]
    assert [name for name, *_ in front(points)] == ["b", "d", "a"]


@pytest.mark.parametrize(
    ("ratio", "level"), [(1, 0), (1 / 20, -10), (0.001, -10), (0.0, -10), (4, 10), (99, 10), (2, 5), (float("nan"), 0)]
)
def test_shades_are_logarithmic_and_end(ratio, level):
    assert heat_level(ratio) == level


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits_per_weight": "4"}, "bits_per_weight must be a number"),
        ({"bits_per_weight": float("nan")}, "bits_per_weight is nan"),
        ({"layers": [{"name": "a"}]}, "it has no 'bits'"),
        ({"layers": 3}, "not iterable"),
        ({"stages_s": {"evaluate": 1.0}}, "it has no 'quantize'"),
        ({"memory": {"parts": {}}}, "it has no 'expected_peak_bytes'"),
        ({"command": 3}, "must be texts"),
    ],
)
def test_a_record_that_cannot_be_shown_is_refused_by_name(run_folder, change, message):
    rewrite(run_folder, **change)
    with pytest.raises(UsageError, match=message) as error:
        page_of(run_folder)
    assert str(run_folder) in str(error.value)


def test_accuracy_on_tasks_is_a_column_where_it_was_measured(comparison):
    assert "Tasks" not in Outline(page_of(comparison)).text
    path = comparison / "cells" / "gptq-w4-s0" / "eval.json"
    accuracies = {"float": {"acc": {"value": 0.75}}, "quantized": {"acc": {"value": 0.70}}}
    path.write_text(json.dumps({**json.loads(path.read_text()), "tasks": {"rte": accuracies}}))
    text = Outline(page_of(comparison)).text
    for expected in ("Tasks", "75.00%", "70.00%", "-5.00 points"):
        assert expected in text
    path.write_text(json.dumps({"tasks": {}}))
    with pytest.raises(UsageError, match="it has no 'perplexity'"):
        page_of(comparison)


def test_folder_of_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not the folder of a finished run"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "cells").mkdir()
    with pytest.raises(UsageError, match="no run is finished"):
        write_report([tmp_path], tmp_path / "report.html")


def test_command_writes_into_the_folder_or_where_it_is_told(run_folder, tmp_path, capsys):
    assert invoke(["report", str(run_folder)]) == 0
    assert capsys.readouterr().out.strip() == str(run_folder / "report.html")
    assert invoke(["report", str(run_folder), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_bytes() == (run_folder / "report.html").read_bytes()
    assert invoke(["report", str(tmp_path / "nothing")]) == 2
