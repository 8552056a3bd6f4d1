"""A run that is done, to be looked at: its settings and log, and how hard training images are for its network."""

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from ffcv_fields import CenterCropDecoder, LabelMapDecoder
from ffcv.fields.decoders import IntDecoder
from torch import nn

from ..data.cleaning import cleaned_labels
from ..data.dataset import open_dataset
from ..data.loader import Batch
from ..data.packing import packed_once
from ..data.reading import Reading, classes_of
from ..errors import BadInput
from ..models import build_model
from ..normalization import normalize
from ..processes import Processes, decoding_threads, hide_progress
from ..progress import Progress
from ..settings import as_dict
from .run_folder import RunFolder, read_log
from .settings import Settings
from .targets import soft_targets

BATCH, BEST = 64, 5


@dataclass(frozen=True)
class Difficulty:
    """How the network of a run does on one training image, on the region that validation would crop.

    `loss`: the cross-entropy of its prediction against the target of that region, without augmentation, CutMix and
    label smoothing; `excess`: what it is above the target's entropy, which no prediction goes below. `share`: of the
    single label in the target that is pooled over the whole image. `best`: its five best classes with their
    probabilities, best first. `seen`: the region, `(x, y, w, h)` in pixels.
    """

    loss: float
    excess: float
    share: float
    best: list[tuple[int, float]]
    seen: tuple[int, int, int, int]


class FinishedRun:
    """The run in a `logging.folder`, and the training data that it names.

    `settings` are by dotted name; `lines` those of its log; `data` is the path of its training `.beton`; `labels` the
    single labels that it trained on, int64, -1 where it left a sample out; `exchanged`: it pooled transposed regions;
    `packed_again`: the `.beton` is not the one of its checkpoint.

    Raises:
        BadInput: the folder holds no run or no complete checkpoint, or its training data are gone or of other classes.
    """

    def __init__(self, path: Path, processes: Processes) -> None:
        try:
            settings = yaml.safe_load((path / "config.yaml").read_text())
            self.lines = read_log(path)
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise BadInput(f"{path}: holds no run of train_imagenet.py ({error}); give its logging.folder") from None
        self.path, self.settings, self._processes = path, as_dict(Settings()) | settings, processes
        setting = self.settings
        relabel = setting["data.relabel.path"] if setting["data.relabel.use"] else ""
        self.data = packed_once(
            "train", setting["data.train_dataset"], setting["data.data_path"], relabel, dry_run=True
        )
        self.num_classes: int = setting["model.num_classes"]
        classes = classes_of(self.data, self.num_classes)
        state = RunFolder(str(path), self.settings, classes=classes).load(torch.device("cpu"), True, 0)
        if state is None:
            raise BadInput(f"{path}: holds no checkpoint")
        self.epoch, was = state["epoch"], state.get("data") or {}
        self._weights = state.get("ema", state["model"])
        dataset, list_file = open_dataset(self.data), setting["data.clean_labels"]
        labels = cleaned_labels(list_file, self.data, say=False) if list_file else dataset.column("label").copy()
        self.labels: np.ndarray = labels
        self.packed_again = was.get("metadata_crc") != zlib.crc32(dataset.metadata.view(np.uint8).data)
        order = dataset.handlers["label_map"].imported_axis_order if "label_map" in dataset.handlers else ""
        official = setting["data.relabel.use"] and setting["data.relabel.pairing"] == "official"
        self.exchanged = official and order == "yx"
        image = dataset.column("image")
        self._sizes = np.stack([image["width"], image["height"]], 1).astype(np.int64)

    def trained_on(self) -> str:
        """What its targets are, in words."""
        setting = self.settings
        if not setting["data.relabel.use"]:
            return "trained on single labels"
        words = f"trained on label maps pooled over the {'crop' if setting['data.relabel.localized'] else 'full image'}"
        words += "" if setting["data.relabel.multi"] else ", the best class alone"
        return words + (", rows and columns exchanged as in the official code" if self.exchanged else "")

    def network(self) -> nn.Module:
        """With the weights that were validated, in evaluation mode."""
        setting = self.settings
        network = build_model(
            setting["model.arch"], self.num_classes, 1 - setting["optim.bn.momentum"], setting["optim.bn.eps"],
            setting["model.use_blurpool"],
        )  # fmt: skip
        network.load_state_dict(self._weights)
        return network.eval().to(self._processes.device)

    def seen(self, numbers: np.ndarray) -> np.ndarray:
        """The regions that validation crops of samples, to whole pixels: int64 `[N, 4]`, `(x, y, w, h)`."""
        size, sizes = self._size(), self._sizes[numbers]
        shorter = round(size / self.settings["data.crop_ratio"])
        side = np.maximum(np.rint(sizes.min(1) * size / shorter).astype(np.int64), 1)
        return np.stack([(sizes[:, 0] - side) // 2, (sizes[:, 1] - side) // 2, side, side], 1)

    def _size(self) -> int:
        return self.settings["validation.resolution"] or self.settings["data.image_size"]

    @torch.inference_mode()
    def difficulties(self, numbers: list[int]) -> dict[int, Difficulty]:
        """Of samples of the training data, by their number in the file; all of them have label maps.

        Raises:
            BadInput: as `Loader` does.
        """
        network, setting = self.network(), self.settings
        threads = decoding_threads(setting["data.num_workers"], self._processes)
        reading = Reading(self.num_classes, self._processes, threads, decode=setting["data.decode"])
        image = CenterCropDecoder(self._size(), setting["data.crop_ratio"], reading.decode, reading.statistics())
        pipelines = {
            "image": [image, *reading.to_device()],
            "label": [IntDecoder(), *reading.to_device()],
            "label_map": [LabelMapDecoder(), *reading.to_device()],
        }
        labels = np.full_like(self.labels, -1)
        labels[numbers] = self.labels[numbers]
        loader = reading.loader(self.data, BATCH, pipelines, order="sequential", labels=labels, drop_last=False)
        order = loader.order_of(0)
        found: dict[int, Difficulty] = {}
        with Progress("network", len(order), "training images", hidden=bool(hide_progress())) as progress:
            for batch in loader.epoch(0):
                which = order[len(found) : len(found) + len(batch.labels)]
                found |= self._one_batch(network, batch, which)
                progress.update(len(which))
        return found

    def _one_batch(self, network: nn.Module, batch: Batch, which: np.ndarray) -> dict[int, Difficulty]:
        seen = self.seen(which)
        log_p = network(normalize(batch.images)).float().log_softmax(1)
        target, whole = self._targets(batch, seen, which)
        loss = -(target * log_p).sum(1)
        excess = loss + torch.xlogy(target, target).sum(1)
        share = whole.gather(1, batch.labels[:, None])[:, 0]
        best = log_p.exp().topk(min(BEST, self.num_classes), 1)
        columns = (loss.tolist(), excess.tolist(), share.tolist(), best.indices.tolist(), best.values.tolist())
        return {
            number: Difficulty(a, b, c, list(zip(classes, shares, strict=True)), tuple(region))
            for number, region, a, b, c, classes, shares in zip(which.tolist(), seen.tolist(), *columns, strict=True)
        }

    def _targets(self, batch: Batch, seen: np.ndarray, which: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """What the run would train on for the regions `seen`, and the target pooled over the whole image."""
        setting, sizes = self.settings, self._sizes[which]
        boxes = np.concatenate([seen[:, :2] / sizes, (seen[:, :2] + seen[:, 2:]) / sizes], 1).astype(np.float32)
        boxes = boxes[:, [1, 0, 3, 2]] if self.exchanged else boxes
        batch.crop_boxes = torch.from_numpy(np.ascontiguousarray(boxes)).to(batch.labels.device)
        temperature = setting["data.relabel.temperature"]
        whole = soft_targets(batch, self.num_classes, localized=False, temperature=temperature)
        if not setting["data.relabel.use"]:
            batch.label_maps = None
        target = soft_targets(
            batch, self.num_classes, localized=setting["data.relabel.localized"], multi=setting["data.relabel.multi"],
            temperature=temperature,
        )  # fmt: skip
        return target, whole
