"""Strategies as arithmetic: shares and copies from row counts."""

import dataclasses
import json

import pytest

from lvm_ray import cli, config, pipeline
from lvm_ray.data.balance import Share, admitted, balance_table, loss_weights, strategy, warnings
from lvm_ray.data.shards import open_shards
from lvm_ray.errors import UserError
from lvm_ray.recipe_sections import BalanceSection
from tests.toys import load_toy_tokenizer, make_toy_shards, toy_recipe

STRATEGIES = ("none", "repeat", "downsample", "temperature", "augment", "augment+temperature")
ROWS = {"segmentation": {0: 3000}, "pose": {0: 300, 1: 300, 2: 300}, "derain": dict.fromkeys(range(10), 60)}
PICTURES = dict.fromkeys(ROWS, 2)


def test_none_shares_as_the_pairs_fall():
    shares = strategy(BalanceSection(strategy="none"), ROWS, PICTURES)
    assert shares["derain"] == Share(60 / 3360, 1.0)
    assert sum(share.share for share in shares.values()) == pytest.approx(1)


def test_repeat_shares_equally_over_originals():
    assert strategy(BalanceSection(strategy="repeat"), ROWS, PICTURES) == dict.fromkeys(ROWS, Share(1 / 3, 1.0))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_shares_sum_to_one_in_the_order_of_the_tasks(name, alpha):
    shares = strategy(BalanceSection(strategy=name, alpha=alpha), ROWS, PICTURES)
    assert list(shares) == list(ROWS)
    assert sum(share.share for share in shares.values()) == pytest.approx(1)
    assert all(0 < share.copies <= len(ROWS[task]) for task, share in shares.items())


def test_temperature_lies_between_equal_shares_and_those_of_the_pairs():
    def at(alpha, name="temperature"):
        return strategy(BalanceSection(strategy=name, alpha=alpha), ROWS, PICTURES)

    assert at(0.0) == strategy(BalanceSection(strategy="repeat"), ROWS, PICTURES)
    assert at(1.0) == strategy(BalanceSection(strategy="none"), ROWS, PICTURES)
    roots = [3000**0.5, 300**0.5, 60**0.5]
    assert [share.share for share in at(0.5).values()] == pytest.approx([root / sum(roots) for root in roots])
    assert at(0.0, "augment+temperature") == strategy(BalanceSection(strategy="augment"), ROWS, PICTURES)
    copies = strategy(BalanceSection(strategy="augment+temperature", ratios={"derain": 4}), ROWS, PICTURES)
    assert [share.copies for share in copies.values()] == [1, 3, 4]
    assert [share.share for share in copies.values()] == [share.share for share in at(0.5).values()]


def test_downsample_cuts_every_task_to_the_smallest_that_takes_part():
    shares = strategy(BalanceSection(strategy="downsample"), ROWS, PICTURES)
    assert shares == {"segmentation": Share(1 / 3, 0.02), "pose": Share(1 / 3, 0.2), "derain": Share(1 / 3, 1.0)}
    shares = strategy(BalanceSection(strategy="downsample", shares={"segmentation": 3, "pose": 1, "derain": 0}), ROWS, PICTURES)
    assert shares == {"segmentation": Share(0.75, 0.1), "pose": Share(0.25, 1.0), "derain": Share(0.0, 1.0)}


def test_at_least_one_sentence_is_admitted():
    assert admitted(750, 4 / 3000) == 1  # a whole sentence, although the fraction is of 4 pairs
    assert admitted(1, 0.1) == 1
    assert admitted(750, 0.02) == 15
    assert admitted(75, 2.5) == 187


def test_loss_weights_are_one_in_the_mean_row():
    shares = strategy(BalanceSection(strategy="none"), ROWS, PICTURES)
    weights = loss_weights(BalanceSection(weights={"derain": 5.0, "pose": 0.0}), shares)
    assert sum(shares[task].share * weight for task, weight in weights.items()) == pytest.approx(1)
    assert weights["derain"] == pytest.approx(5 * weights["segmentation"]) and weights["pose"] == 0
    assert loss_weights(BalanceSection(), shares) is None
    assert loss_weights(BalanceSection(weights=dict.fromkeys(ROWS, 3.0)), shares) is None
    # What no row belongs to has no part in the mean.
    one = {"segmentation": Share(1.0, 1.0), "pose": Share(0.0, 1.0)}
    assert loss_weights(BalanceSection(weights={"pose": 7.0}), one) is None
    with pytest.raises(UserError, match=r"balance\.weights: every task of the plan weighs 0"):
        loss_weights(BalanceSection(weights={"segmentation": 0.0}), one)


@pytest.mark.parametrize(
    ("balance", "words"),
    [
        ({"weights": {"depth": 1.0}}, "balance.weights names 'depth'"),
        ({"weights": {"swap": -0.5}}, "balance.weights.swap is -0.5"),
        ({"weights": {"swap": float("nan")}}, "balance.weights.swap is nan"),
        ({"alpha": 1.5}, "less than or equal to 1"),
        ({"strategy": "oversample"}, "downsample"),
    ],
)
def test_impossible_sections_are_refused_with_the_field(tmp_path, balance, words):
    with pytest.raises(ValueError, match=words):
        toy_recipe(tmp_path, balance=balance)


def test_augment_takes_all_copies_unless_told():
    shares = strategy(BalanceSection(ratios={"derain": 2.5}), ROWS, PICTURES)
    assert [share.copies for share in shares.values()] == [1, 3, 2.5]
    assert {share.share for share in shares.values()} == {1 / 3}


def test_explicit_shares_are_normalised_and_keep_the_copies():
    shares = strategy(BalanceSection(shares={"segmentation": 1, "pose": 1, "derain": 2}), ROWS, PICTURES)
    assert shares["derain"] == Share(0.5, 10)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"ratios": {"pose": 4}}, ["ratios.pose", "4", "3 copies were tokenised", "tasks.pose.copies to 4"]),
        ({"ratios": {"pose": 0}}, ["ratios.pose", "0", "above 0"]),
        ({"shares": {"pose": 1}}, ["balance.shares", "segmentation"]),
        ({"shares": {"pose": 0, "segmentation": 0, "derain": 0}}, ["balance.shares", "every share is 0"]),
        ({"shares": {"pose": -1, "segmentation": 0, "derain": 2}}, ["balance.shares.pose", "-1"]),
    ],
)
def test_impossible_strategies_name_the_field(section, words):
    with pytest.raises(UserError) as error:
        strategy(BalanceSection(**section), ROWS, PICTURES)
    assert all(word in str(error.value) for word in words)


def test_a_task_without_pairs_is_named():
    with pytest.raises(UserError, match="task pose: no training pairs"):
        strategy(BalanceSection(), {"segmentation": {0: 8}, "pose": {0: 0}}, PICTURES)


def test_table_counts_how_often_an_original_is_seen(tmp_path):
    recipe = toy_recipe(tmp_path, train={"steps": 30, "batch": 8})
    rows = {row["task"]: row for row in balance_table(make_toy_shards(recipe.shard_folder), recipe)}
    # 240 sentences of 4 pairs, a third each: 320 pairs over 24 and over 8 originals.
    assert rows["invert"]["seen"] == pytest.approx(320 / 24)
    assert rows["threshold"]["seen"] == pytest.approx(320 / 8)
    assert rows["threshold"]["epochs"] == pytest.approx(320 / 24)
    assert rows["threshold"]["tokens"] == 8 * 3 * 8
    assert [round(row["share_before"], 3) for row in rows.values()] == [0.6, 0.2, 0.2]


def test_a_row_counts_by_its_pictures():
    rows = {"pose": {0: 100}, "video": {0: 50}, "images": {0: 200}}
    shares = strategy(BalanceSection(strategy="none"), rows, {"pose": 2, "video": 8, "images": 1})
    assert [share.share for share in shares.values()] == pytest.approx([0.25, 0.5, 0.25])
    cut = strategy(BalanceSection(strategy="downsample"), rows, {"pose": 2, "video": 8, "images": 1})
    assert [share.copies for share in cut.values()] == pytest.approx([1, 0.5, 1])


def test_table_of_downsampling_counts_only_the_originals_that_are_drawn_on(tmp_path):
    recipe = toy_recipe(tmp_path, train={"steps": 30, "batch": 8}, balance={"strategy": "downsample"})
    for row in balance_table(make_toy_shards(recipe.shard_folder), recipe):
        assert row["seen"] == row["epochs"] == pytest.approx(320 / 8)  # 8 originals of every task
        assert row["tokens"] == 8 * 8


def test_pixels_are_seen_as_often_as_the_admitted_copies_show_them(tmp_path):
    recipe = toy_recipe(tmp_path, train={"steps": 30, "batch": 8}, balance={"ratios": {"threshold": 2.5}})
    manifest = make_toy_shards(recipe.shard_folder)
    assert [row["pixel_seen"] for row in balance_table(manifest, recipe)] == [None] * 3

    covered = {"train": {"invert": [1.0], "threshold": [1.0, 0.5, 0.25]}}
    seen = {row["task"]: row for row in balance_table(dataclasses.replace(manifest, covered=covered), recipe)}
    assert seen["invert"]["pixel_seen"] == seen["invert"]["seen"]
    assert seen["threshold"]["pixel_seen"] == pytest.approx(seen["threshold"]["seen"] * (1 + 0.5 + 0.25 / 2) / 2.5)
    assert seen["swap"]["pixel_seen"] is None


def test_repeats_beyond_the_limit_say_what_would_help(tmp_path):
    recipe = toy_recipe(tmp_path, train={"steps": 96, "batch": 8})  # 256 sentences a task
    manifest = make_toy_shards(recipe.shard_folder)

    def warned(**changes):
        return warnings(balance_table(manifest, toy_recipe(tmp_path, **{"train": {"steps": 96, "batch": 8}} | changes)))

    # invert: 256 / 6 sentences; threshold: 256 / (3 x 2); swap: 256 / (2 x 2)
    assert [line.split(":")[0] for line in warned(balance={"most_repeats": 50.0})] == ["swap"]
    (line,) = warned(balance={"most_repeats": 50.0})
    assert "64 times" in line and "beyond 50" in line and "tasks.swap.copies of 3" in line and "\n" not in line
    (line,) = warned(balance={"most_repeats": 70.0, "ratios": {"swap": 1}})
    assert "128 times" in line and ": balance.ratios.swap of 2," in line
    (line, _) = warned(balance={"most_repeats": 100.0, "strategy": "repeat"})
    assert line.startswith("threshold") and "balance.strategy augment with balance.ratios.threshold of 2" in line
    lines = warned(balance={"most_repeats": 127.0, "strategy": "downsample"})
    assert "a balance.strategy that draws on all of its pairs" in lines[0] and "copies of 2" not in lines[0]
    teacher = {"train": {"steps": 96 * 2}}
    assert [line.split(" shows")[0] for line in warned(balance={"most_repeats": 100.0}, teacher=teacher)] == [
        "swap: the teacher's training"
    ]


def test_the_verb_shows_the_mixture_and_keeps_table_and_picture(tmp_path, capsys):
    recipe = toy_recipe(tmp_path, balance={"most_repeats": 4.0, "strategy": "repeat", "weights": {"swap": 2.0}})
    make_toy_shards(recipe.shard_folder)
    rows = pipeline.balance(recipe)
    out = capsys.readouterr().out
    assert "balance: repeat" in out and "loss weight" in out and "░" in out and "█" in out
    assert "warning: threshold: the training shows each version 11 times" in out
    assert json.loads((tmp_path / "data" / "balance.json").read_text()) == rows
    picture = (tmp_path / "data" / "balance.svg").read_text()
    assert picture.startswith("<svg xmlns") and "Balance: repeat" in picture and "threshold" in picture


def test_training_warns_before_it_starts_and_a_dry_run_too(tmp_path, capsys, monkeypatch):
    recipe = toy_recipe(tmp_path, balance={"most_repeats": 8.0, "strategy": "repeat"})
    make_toy_shards(recipe.shard_folder)
    (tmp_path / "recipe.yaml").write_text(config.dump(recipe))
    monkeypatch.setattr("lvm_ray.tokenizer.load_tokenizer", load_toy_tokenizer)  # a dry run rehearses a micro batch
    assert cli.main(["train", str(tmp_path / "recipe.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "warning: swap: the training shows each version 11 times" in out
    assert "balance repeat: invert 33.3% in 3.56 epochs of 1 copies" in out
    monkeypatch.setattr(pipeline, "_train", lambda recipe, only: [])
    pipeline.train(recipe)
    assert "warning: swap: the training shows" in capsys.readouterr().out
    assert open_shards(recipe.shard_folder).manifest.rows["train"]["swap"] == {0: 8, 1: 8}


def test_the_limit_of_repeats_computes_nothing(tmp_path):
    prints = [
        config.fingerprint(toy_recipe(tmp_path, balance=balance)) for balance in ({}, {"most_repeats": 3.0}, {"alpha": 0.1})
    ]
    assert prints[0] == prints[1] != prints[2]
