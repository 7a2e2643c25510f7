"""Hugging Face's ``Trainer`` with its default arguments: AdamW at 5e-5, linear decay, no warm-up.

Transforms are those of its image classification example
(https://github.com/huggingface/transformers/tree/main/examples/pytorch/image-classification).
"""

import tempfile
from typing import Any

import torch
from common import BATCH, WORKERS, Images, pretrained, read_job, standard_evaluation, standard_training
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments


class Classifier(nn.Module):
    """A network as Trainer wants it: it returns its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def collate(examples: list[tuple[Tensor, int]]) -> dict[str, Any]:
    images, targets = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(targets)}


def main() -> None:
    job = read_job(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            num_train_epochs=job.epochs,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=BATCH,
            dataloader_num_workers=WORKERS,
            remove_unused_columns=False,  # the images are no table with columns
            report_to="none",  # it would write to whatever tracker is installed
            seed=job.seed,
        )
        trainer = Trainer(
            Classifier(pretrained(job)),
            arguments,
            data_collator=collate,
            train_dataset=Images(job.train, job.classes, standard_training(job.size)),
        )
        trainer.train()
        found = trainer.predict(Images(job.test, job.classes, standard_evaluation(job.size)))
    job.write(torch.from_numpy(found.predictions).double().softmax(dim=1))


if __name__ == "__main__":
    main()
