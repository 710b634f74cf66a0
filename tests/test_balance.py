"""Strategies as arithmetic: shares and copies from row counts."""

import pytest

from lvm_ray.config import BalanceSection
from lvm_ray.data.balance import Share, balance_table, strategy
from lvm_ray.errors import UserError
from tests.toys import make_toy_shards, toy_recipe

ROWS = {"segmentation": {0: 3000}, "pose": {0: 300, 1: 300, 2: 300}, "derain": dict.fromkeys(range(10), 60)}


def test_none_shares_as_the_pairs_fall():
    shares = strategy(BalanceSection(strategy="none"), ROWS)
    assert shares["derain"] == Share(60 / 3360, 1.0)
    assert sum(share.share for share in shares.values()) == pytest.approx(1)


def test_repeat_shares_equally_over_originals():
    assert strategy(BalanceSection(strategy="repeat"), ROWS) == dict.fromkeys(ROWS, Share(1 / 3, 1.0))


def test_augment_takes_all_copies_unless_told():
    shares = strategy(BalanceSection(ratios={"derain": 2.5}), ROWS)
    assert [share.copies for share in shares.values()] == [1, 3, 2.5]
    assert {share.share for share in shares.values()} == {1 / 3}


def test_explicit_shares_are_normalised_and_keep_the_copies():
    shares = strategy(BalanceSection(shares={"segmentation": 1, "pose": 1, "derain": 2}), ROWS)
    assert shares["derain"] == Share(0.5, 10)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"ratios": {"pose": 4}}, ["ratios.pose", "4", "3 copies were tokenised", "tasks.pose.copies to 4"]),
        ({"ratios": {"pose": 0.5}}, ["ratios.pose", "0.5"]),
        ({"shares": {"pose": 1}}, ["balance.shares", "segmentation"]),
        ({"shares": {"pose": 0, "segmentation": 0, "derain": 0}}, ["balance.shares", "every share is 0"]),
        ({"shares": {"pose": -1, "segmentation": 0, "derain": 2}}, ["balance.shares.pose", "-1"]),
    ],
)
def test_impossible_strategies_name_the_field(section, words):
    with pytest.raises(UserError) as error:
        strategy(BalanceSection(**section), ROWS)
    assert all(word in str(error.value) for word in words)


def test_a_task_without_pairs_is_named():
    with pytest.raises(UserError, match="task pose: no training pairs"):
        strategy(BalanceSection(), {"segmentation": {0: 8}, "pose": {0: 0}})


def test_table_counts_how_often_an_original_is_seen(tmp_path):
    recipe = toy_recipe(tmp_path, train={"steps": 30, "batch": 8})
    rows = {row["task"]: row for row in balance_table(make_toy_shards(recipe.shard_folder), recipe)}
    # 240 sentences of 4 pairs, a third each: 320 pairs over 24 and over 8 originals.
    assert rows["invert"]["seen"] == pytest.approx(320 / 24)
    assert rows["threshold"]["seen"] == pytest.approx(320 / 8)
    assert rows["threshold"]["epochs"] == pytest.approx(320 / 24)
    assert rows["threshold"]["tokens"] == 8 * 3 * 8
    assert [round(row["share_before"], 3) for row in rows.values()] == [0.6, 0.2, 0.2]
