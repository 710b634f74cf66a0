"""A contact sheet: some rows of a data set decoded to pictures, to see with one's own eyes that tokens and tokenizer agree."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw

from lvm_ray.data.shards import Shards
from lvm_ray.tokenizer import Tokenizer

ROWS, COLUMNS, PICTURES = 8, 8, 32  # at most: of the sheet, and pictures in all
SIDE = 128  # of a picture in pixels, at most
GAP = 4
CAPTION = 14  # height of the row's id


def contact_sheet(shards: Shards, split: str, task: str, tokenizer: Tokenizer) -> bytes:
    """A PNG file: rows spread evenly over a task's split, one below the other, their pictures side by side under their ids."""
    manifest = shards.manifest
    total, columns = manifest.rows[split][task][0], min(manifest.images_per_row[task], COLUMNS)
    count = min(total, ROWS, max(2, PICTURES // columns))
    ids, tokens = shards.take(split, task, 0, np.linspace(0, total - 1, count).astype(int).tolist())
    tokens_RKN = tokens.reshape(count, -1, manifest.image_tokens)[:, :columns]
    pictures = tokenizer.decode(tokens_RKN.reshape(-1, manifest.image_tokens))
    side = min(pictures.shape[1], SIDE)
    height = CAPTION + side + GAP
    sheet = Image.new("RGB", (max(columns * (side + GAP), 240) + GAP, count * height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(ids):
        pen.text((GAP, row * height + 1), name, fill="black")
        for column in range(columns):
            picture = Image.fromarray(pictures[row * columns + column]).resize((side, side))
            sheet.paste(picture, (GAP + column * (side + GAP), row * height + CAPTION))
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()
