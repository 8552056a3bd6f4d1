"""What trainings on Scenes read: scenes, label maps and `.beton`, each made once; packing is the top-level command."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from relabel.commands import call

from .annotator import annotate, quality
from .compose import write_scenes
from .strong_annotator import strong_annotator
from .weak_annotator import weak_annotator

VAL_SCENES = 2000


@dataclass(frozen=True)
class Data:
    """Training scenes with one annotator's label maps ("strong", "weak", or "none"), and the validation scenes of all.

    What is not there yet in `folder` is made by `make`; scenes of another count are other scenes.
    """

    folder: Path
    scenes: int
    annotator: str = "strong"

    @property
    def root(self) -> Path:
        return self.folder / str(self.scenes)

    @property
    def layout(self) -> Path:
        return self.root / "train.json"

    @property
    def label_maps(self) -> Path:
        return self.root / f"label_maps_{self.annotator}"

    @property
    def train(self) -> Path:
        return self.root / f"train_{self.annotator}.beton"

    @property
    def val(self) -> Path:
        return self.folder / "val.beton"

    def make(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        once(self.folder / "val.done", partial(write_scenes, self.folder, "val", VAL_SCENES, seed=0))
        once(self.root / "train.done", partial(write_scenes, self.root, "train", self.scenes, seed=0))
        maps = []
        if self.annotator != "none":
            once(self.label_maps.with_suffix(".done"), self._annotate)
            maps = [f"--cfg.label_map_dir={self.label_maps}"]
        for images, beton, more in ((self.folder / "val", self.val, []), (self.root / "train", self.train, maps)):
            if not beton.exists():
                # As when docs/claims.md was measured: a sample's number decides its crops.
                same = ("--cfg.order=sorted", "--cfg.jpeg=encode")
                command("write_datasets.py", f"--cfg.data_dir={images}", f"--cfg.write_path={beton}", *same, *more)

    def quality(self) -> dict[str, float]:
        """Of the label maps of the training scenes, in percent."""
        return quality(self.layout, self.label_maps)

    def _annotate(self) -> None:
        network = strong_annotator() if self.annotator == "strong" else weak_annotator()[0]
        annotate(network, self.root / "train", self.label_maps)


def once(mark: Path, step: Callable[[], None]) -> None:
    """Do `step` unless the file `mark` exists, then create it."""
    if not mark.exists():
        step()
        mark.touch()


def command(name: str, *arguments: object) -> None:
    """Run a command; if it fails, exit with its exit code."""
    if code := call(name, *arguments):
        sys.exit(code)
