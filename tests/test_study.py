"""A run asked in many ways: each is the evaluation that its settings make, compared with the run's own item by item."""

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from pydantic import Field

from lvm_ray import config, pipeline
from lvm_ray.cli import main
from lvm_ray.errors import UserError
from lvm_ray.evaluate import study as studying
from lvm_ray.evaluate.compare import paired, read_items
from lvm_ray.evaluate.score import Scorer
from lvm_ray.evaluate.statistics import rounded
from lvm_ray.evaluate.study import best_way, study, ways, words
from lvm_ray.progress import Bar
from lvm_ray.tasks import TASKS
from lvm_ray.tasks.base import Picture

from .test_evaluate import evaluate, make_pipeline
from .toys import ToyTask, load_toy_tokenizer


class Bright(ToyTask):
    """The label is as bright as `shade` where the image is bright, else black."""

    name: ClassVar[str] = "bright"
    shade: int = Field(255, ge=1, le=255)

    def label(self, image: Picture) -> Picture:
        bright = image.mean(axis=2, keepdims=True) > 127
        return np.where(bright, self.shade, 0).astype(np.uint8).repeat(3, axis=2)


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "bright", Bright)
        yield


def asked(run: str, over: list[str], split: Any = "validation") -> dict[str, Any]:
    return study(run, over, split, Bar("study", None, ""), load_toy_tokenizer)


def test_without_settings_number_and_choice_of_examples_are_crossed(tmp_path):
    _, (run, _) = make_pipeline(tmp_path)
    crossed = ways(run, [], "validation")
    assert [way.settings for way in crossed[:2]] == [{}, {"evaluate.examples": 1, "evaluate.choose": "random"}]
    assert len(crossed) == 9, "three numbers, three choices; the run's own is there once"
    assert len({way.name for way in crossed}) == 9
    assert {way.recipe.evaluate.split for way in crossed} == {"validation"}
    assert not any(way.redrawn for way in crossed)


def test_a_way_is_the_evaluation_that_its_settings_make(tmp_path):
    recipe, runs = make_pipeline(tmp_path)
    found = asked(runs[0], ["evaluate.examples=[1, 2]", "evaluate.votes=[1, 2]"], "test")
    assert json.loads(Path(runs[0], "study.json").read_text()) == found
    assert [way["settings"] for way in found["ways"]] == [
        {},
        *({"evaluate.examples": examples, "evaluate.votes": votes} for examples in (1, 2) for votes in (1, 2)),
    ]
    assert not Path(runs[0], "evaluation.json").exists(), "the run's own evaluation is left alone"
    for way, changes in ((found["ways"][0], {}), (found["ways"][4], {"examples": 2, "votes": 2})):
        section = recipe.evaluate.model_copy(update=changes)
        [by_itself] = evaluate(runs[:1], recipe.model_copy(update={"evaluate": section}))
        assert way["tasks"] == by_itself["tasks"]
    folders = [f"{runs[0]}/study/test/{name}" for name in ("own", "examples=2,votes=2")]
    own, other = (read_items(folder)["swap"] for folder in folders)
    by_hand = paired(recipe.tasks["swap"], list(own.values()), list(other.values()), tokens=True, seed=0)
    assert found["ways"][4]["against"]["swap"] == rounded(by_hand)


def test_validation_items_are_asked_and_test_items_are_not(tmp_path):
    _, (run, _) = make_pipeline(tmp_path)
    asked(run, ["evaluate.examples=[1]"])
    assert {item[:10] for items in read_items(f"{run}/study/validation/own").values() for item in items} == {"validation"}


def test_what_was_asked_is_not_asked_again(tmp_path, monkeypatch):
    _, (run, _) = make_pipeline(tmp_path)
    first = asked(run, ["evaluate.examples=[1, 2]"])
    scored: list[str] = []
    score = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda scorer, unit: scored.append(unit.task) or score(scorer, unit))
    assert asked(run, ["evaluate.examples=[1, 2]"]) == first and not scored
    asked(run, ["evaluate.examples=[1, 2]", "evaluate.choose=[random, fixed]"])
    assert len(scored) == 2 * 4, "two new ways, of two tasks of two units"


def test_other_colours_have_shards_of_their_own(tmp_path):
    recipe, (run, _) = make_pipeline(tmp_path, tasks={"bright": {"train": 12, "copies": 2}})
    found = asked(run, ["tasks.bright.shade=[85, 255]"], "test")
    assert [way["settings"] for way in found["ways"]] == [{}, {"tasks.bright.shade": 85}]
    darker, folder = recipe.tasks["bright"].model_copy(update={"shade": 85}), tmp_path / "darker"
    again, [other, _] = make_pipeline(folder, tasks={"bright": json.loads(darker.model_dump_json())})
    [by_itself] = evaluate([other], again)
    assert found["ways"][1]["tasks"]["bright"]["error"]["value"] == by_itself["tasks"]["bright"]["error"]["value"]
    assert found["ways"][1]["tasks"]["bright"]["error"] != found["ways"][0]["tasks"]["bright"]["error"]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ("evaluate.examples", "write it as evaluate.examples="),
        ("evaluate.examples=2", "name the values as a list"),
        ("evaluate.examples=[]", "name the values as a list"),
        ("evaluate.examples=[1", "not a YAML value"),
        ("model.width=[8]", "of a setting below evaluate or tasks"),
        ("evaluate.split=[test]", "of a setting below evaluate or tasks"),
        ("evaluate.exampels=[1]", "evaluate.exampels"),
        ("evaluate.examples=[4]", "evaluate.examples is 4"),
    ],
)
def test_what_cannot_be_crossed_is_refused_by_name(tmp_path, over, said):
    _, (run, _) = make_pipeline(tmp_path)
    with pytest.raises(UserError, match=said):
        asked(run, [over])
    assert not Path(run, "study").exists()


def test_the_best_way_is_the_one_that_gains_most():
    def way(number: int, difference: float, higher: bool) -> dict[str, Any]:
        entry = {"difference": difference, "higher_is_better": higher}
        return {"settings": {"evaluate.examples": number}, "against": {"pose": {"pck": entry}}}

    def best(*differences: float, higher: bool = True) -> Any:
        rows = [way(number, difference, higher) for number, difference in enumerate(differences, 1)]
        return best_way({"ways": [{"settings": {}, "against": {}}, *rows]}, "pose", "pck")

    assert best(0.1, 0.3, -0.5)[0] == {"evaluate.examples": 2}
    assert best(0.1, 0.3, -0.5, higher=False)[0] == {"evaluate.examples": 3}
    assert best(-0.1, 0.0) is None
    assert words({"evaluate.examples": 2, "evaluate.choose": "fixed"}) == "examples 2, choose fixed"


def test_the_verb_prints_the_table_and_what_would_have_helped(tmp_path, capsys, monkeypatch):
    recipe, runs = make_pipeline(tmp_path)
    Path(tmp_path, "config.yaml").write_text(config.dump(recipe.model_copy(update={"run": runs[0]})))
    original = studying.study
    monkeypatch.setattr(studying, "study", lambda *arguments: original(*arguments, load=load_toy_tokenizer))
    assert main(["study", runs[0], "--over", "evaluate.examples=[1, 2]"]) == 0
    printed = capsys.readouterr().out
    assert "ways to ask, validation split" in printed and "examples 1" in printed and "as the run has it" in printed
    assert "swap" in printed and "how many were tried" in printed
    assert main(["study", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_run_without_a_model_is_told_to_train(tmp_path):
    _, (run, _) = make_pipeline(tmp_path)
    Path(run, "model", "model.safetensors").unlink()
    with pytest.raises(UserError, match="run `lvm-ray train` first"):
        pipeline.study(run, [], "validation")
