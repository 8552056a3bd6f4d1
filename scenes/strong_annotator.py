"""The strong annotator of Scenes, made as the paper's was: from far more images than the student sees, single labels.

It learns from 40,000 scenes of photographs that occur in no other scene, each with its one single label, as a random
crop; where objects are, what else is there, and what an object looks like alone it is never told. Its weights come
with the code, as those of EfficientNet-L2 come to a user of ReLabel. To make them again, in about 15 minutes of a core
that computes in bfloat16:
    python -m scenes.strong_annotator
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from .annotator import MAP_SIZE, Annotator
from .compose import CANVAS, compose, photographs_of

WEIGHTS = Path(__file__).with_name("strong_annotator.safetensors")
LAYERS = [(32, 2), (48, 2), (64, 1), (64, 1), (64, 1), (64, 1)]  # channels, stride
CELL = 4  # pixels of its input
SCENES, EPOCHS, BATCH_SIZE = 40_000, 8, 64
LEAST_SIDE = 50  # pixels of a random crop


def strong_annotator(weights: Path = WEIGHTS) -> Annotator:
    """The strong annotator, in eval mode."""
    model = Annotator(MAP_SIZE * CELL, LAYERS)
    model.load_state_dict(load_file(weights))
    return model.eval()


def scenes_of(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scenes uint8 `[N, 3, CANVAS, CANVAS]` and their single labels `[N]`; nothing else is kept of them."""
    photographs, labels = photographs_of("annotator")
    rng = np.random.default_rng([seed, count])
    pixels, single = np.empty((count, CANVAS, CANVAS, 3), np.uint8), np.empty(count, np.int64)
    for i in tqdm(range(count), desc="scenes for the strong annotator", disable=None):
        pixels[i], objects = compose(rng, photographs, labels)
        single[i] = objects[0][0]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(single)


def train(count: int, epochs: int, seed: int = 0) -> Annotator:
    """Train it from random weights on `count` scenes."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    scenes, labels = scenes_of(count, seed)
    model = Annotator(MAP_SIZE * CELL, LAYERS).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer, steps = torch.optim.AdamW(model.parameters(), weight_decay=1e-2), count // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
    for epoch in range(epochs):
        losses = []
        order = torch.from_numpy(rng.permutation(count))
        for step in tqdm(range(steps), desc=f"strong annotator, epoch {epoch + 1}/{epochs}", disable=None):
            batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            images = model.input.normalize(random_crops(scenes[batch], MAP_SIZE * CELL, rng))
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"strong annotator: epoch {epoch + 1} of {epochs}, loss {np.mean(losses):.3f}", flush=True)
    return model.eval()


def random_crops(images: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """One random square of all images, resized to `size` and for every other batch flipped, float `[B, 3, S, S]`."""
    side = int(rng.integers(LEAST_SIDE, CANVAS, endpoint=True))
    y, x = rng.integers(0, CANVAS - side, 2, endpoint=True)
    crops = images[:, :, y : y + side, x : x + side].float()
    crops = F.interpolate(crops, (size, size), mode="bicubic", antialias=True).clamp(0, 255)
    return crops.flip(3) if rng.random() < 0.5 else crops


def save(model: Annotator, file: Path) -> None:
    """Its weights, in float16."""
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file({name: value.half() if value.is_floating_point() else value for name, value in weights.items()}, file)


if __name__ == "__main__":
    save(train(SCENES, EPOCHS), WEIGHTS)
    print(f"{WEIGHTS} written")
