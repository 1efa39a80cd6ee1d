# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # From your photos to a number
#
# The steps of [docs/your-photos.md](../docs/your-photos.md), in a notebook: labels, audit, split,
# training with validation, a score with its interval, the worst answer. Open this file as a
# notebook with jupytext (in Jupyter: *Open With*, *Notebook*).
#
# All of it happens in one folder. Give it photos and a table of your own, or let the next cells
# draw some.

# %%
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

from IPython.display import Image, Markdown, display
from PIL import Image as Picture
from PIL import ImageDraw

FOLDER = Path("notebook-run")  # everything is written here
STEPS = int(os.environ.get("STEPS", "60"))  # of the training; a few minutes on two slow cores


def nanomolmo2(line: str) -> None:
    """Run a command as one would in a terminal, and show what it prints."""
    command = [sys.executable, "-m", "nanomolmo2", *shlex.split(line)]
    done = subprocess.run(
        command, cwd=FOLDER, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(done.stdout)
    done.check_returncode()


# %% [markdown]
# ## 1. Photos and a table
#
# `labels.csv` has a line for every thing: the picture, what it is, and its box in pixels. Here:
# steel washers among bricks, drawn.


# %%
def draw_photo(path: Path, rng: random.Random) -> list[str]:
    """Draw a picture; returns its lines of the table."""
    picture = Picture.new("RGB", (240, 200), (rng.randrange(190, 230),) * 3)
    pen = ImageDraw.Draw(picture)
    cells = rng.sample([(x, y) for x in range(5) for y in range(4)], 5)
    washers = rng.randrange(1, 4)
    lines = []
    for number, (column, row) in enumerate(cells):
        x, y, radius = 48 * column + 24, 50 * row + 25, rng.randrange(13, 19)
        box = (x - radius, y - radius, x + radius, y + radius)
        if number < washers:
            pen.ellipse(box, outline=(60, 60, 70), width=6)
            lines.append(",".join(map(str, (path.name, "washer", *box))))
        else:
            pen.rectangle(box, fill=(150, 80, 60))
    picture.save(path)
    return lines


photos = FOLDER / "photos"
photos.mkdir(parents=True, exist_ok=True)
generator = random.Random(0)
table = ["image,label,x0,y0,x1,y1"]
for index in range(24):
    table += draw_photo(photos / f"{index:02}.png", generator)
(photos / "labels.csv").write_text("\n".join(table) + "\n")
print("\n".join(table[:4]))
display(Image(filename=str(photos / "00.png")))

# %% [markdown]
# ## 2. Records, and a look at them

# %%
nanomolmo2("data import --from csv photos/labels.csv all.jsonl --images photos")
nanomolmo2("inspect all.jsonl --audit")

# %% [markdown]
# ## 3. Keep some photos back

# %%
nanomolmo2("data split all.jsonl --share 0.25 --out parts")

# %% [markdown]
# ## 4. Train
#
# A run goes on where it stopped (`--resume`): a second execution of this cell does not begin again.

# %%
resume = "--resume" if (FOLDER / "run").exists() else ""
nanomolmo2(
    f"train --data parts/train.jsonl --val parts/val.jsonl --steps {STEPS} --out run {resume}"
)

# %% [markdown]
# ## 5. Measure

# %%
nanomolmo2("eval parts/val.jsonl --model run/model --out scores --json scores.json")
display(Markdown((FOLDER / "scores" / "table.md").read_text()))
scores = json.loads((FOLDER / "scores.json").read_text())
print(scores)

# %% [markdown]
# The worst answer of all, as the page `scores/index.html` shows it:

# %%
answers = [json.loads(line) for line in (FOLDER / "scores" / "predictions.jsonl").open()]
worst = min(answers, key=lambda answer: answer["score"])
print(worst["question"], "->", worst["answer"], f"(score {worst['score']:.2f})")
display(Image(filename=worst["images"][0]["path"]))

# %% [markdown]
# ## 6. Ask

# %%
nanomolmo2("ask photos/00.png 'Point to the washer.' --model run/model --draw answer.png")
display(Image(filename=str(FOLDER / "answer.png")))
